"""Commands of `psa` that are long enough for a file of their own: options in, tables or JSON out."""

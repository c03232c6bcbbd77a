"""Commands that are too long for `psa.cli`: parsing and printing, nothing else."""

"""The command `psa understand` as a script: `python qwen2.5_vl.py --input video.mp4 --prompt "…" --use_psa`."""

import sys

from psa.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "understand")
    main()

"""Videos by wan22_a14b: dense, or by PSA with --use_psa. See examples/README.md, or --help."""

import sys
from pathlib import Path

from psa.commands.generate import script

sys.path.insert(0, str(Path(__file__).parents[2]))
from configs.model_configs import MODEL_CONFIGS

if __name__ == "__main__":
    script(("wan22_a14b",), MODEL_CONFIGS)

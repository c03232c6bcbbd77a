"""CogVideoX videos: dense, or by PSA with --use_psa. See examples/README.md, or --help."""

import sys
from pathlib import Path

from psa.commands.generate import script

sys.path.insert(0, str(Path(__file__).parents[2]))
from configs.model_configs import MODEL_CONFIGS

if __name__ == "__main__":
    script(("cogvideo1.5_5b", "cogvideo_5b", "cogvideo_5b_lora"), MODEL_CONFIGS)

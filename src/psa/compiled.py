"""What a trace takes as a constant instead of following how it was found.

Imported only while torch.compile traces: the decorator brings in the whole of TorchDynamo.
"""

import torch

from .config import PSAConfig


@torch.compiler.assume_constant_result
def constant_config(key: str, **changes: float) -> PSAConfig:
    """A configuration with another density or target error."""
    return PSAConfig.from_key(key).replace(**changes)

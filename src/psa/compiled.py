"""What a trace takes as a constant instead of following how it was found.

Imported only while torch.compile traces: the decorator brings in the whole of TorchDynamo.
"""

import torch
from torch import Tensor

from .config import PSAConfig
from .reorder.spatial import cached_permutation


@torch.compiler.assume_constant_result
def constant_order(*key) -> Tensor:
    """The spatial order of a grid."""
    return cached_permutation(*key).q_order


@torch.compiler.assume_constant_result
def constant_config(key: str, **changes: float) -> PSAConfig:
    """A configuration with another density or target error."""
    return PSAConfig.from_key(key).replace(**changes)

"""How much is worked on at a time: what fits a processor's caches, or what keeps a GPU busy with few launches."""

import torch
from torch import Tensor

GPU_ELEMENTS = 1 << 28
"""Elements of scratch on a GPU (1 GiB in float32)."""


def scratch_elements(like: Tensor, on_cpu: int) -> int:
    """Elements of scratch to hold at a time on the device of ``like``."""
    return on_cpu if like.device.type == "cpu" else GPU_ELEMENTS


def mean_square(x: Tensor) -> Tensor:
    """Mean over the tokens of every channel's square, float32 [B, H, D] of x [B, H, L, D]; on a GPU without a copy."""
    if x.device.type == "cpu":
        return x.float().square().mean(2)
    return torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).square() / x.shape[2]

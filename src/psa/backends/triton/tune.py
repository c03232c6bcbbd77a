"""Which tile shape, warps and pipeline depth each kernel uses."""

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Tile and launch options of one kernel.

    Attributes:
        BLOCK_M, BLOCK_N: query rows and pyramid rows per tile; WHOLE_N: rows per tile of whole level-1 blocks.
    """

    BLOCK_M: int
    BLOCK_N: int
    WHOLE_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return asdict(self)


def padded(dim: int) -> int:
    """Head dimension as tiles have it: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


@lru_cache
def default_launch(kernel: str, dim: int, itemsize: int, capability: int, block_m: int, block_n: int) -> Launch:
    """The table: chosen from registers, shared memory and spills of the compiled kernels."""
    rows = min(128, block_m & -block_m)
    return Launch(rows, 64, 128 if rows == 128 else 64, 8 if rows == 128 else 4, 2)


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_for(kernel: str, q: Tensor, block_m: int, block_n: int) -> Launch:
    """The launch of ``kernel`` ("forward", "grad_queries", "grad_rows") for a call on the device of ``q``."""
    capability = _capability(q.device) if q.is_cuda else 90
    return default_launch(kernel, padded(q.shape[-1]), q.element_size(), capability, block_m, block_n)

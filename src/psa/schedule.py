"""From levels to the list of blocks that each query block reads, without a dense mask."""

import torch
from torch import Tensor


def level_index(levels: Tensor) -> Tensor:
    """log2 of each level as int32; -1 where a block is skipped. Exact: a float's exponent bits."""
    return ((levels.float().view(torch.int32) >> 23) - 127).clamp(min=-1)


def build_schedule(levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The per-row schedule of ``levels`` [B, H, M, N] (uint8) over ``count`` levels 1, 2, 4, ….

    Returns:
        blocks: int32 [B, H, M, N], block ids; the kept ones first, sorted by (level, id).
        ends: int32 [B, H, M, count]; ``ends[e]`` = number of kept blocks whose level is at most 2**e.

    The transposed schedule is the same function of ``levels.transpose(-1, -2)``.
    """
    index = level_index(levels)
    order = torch.where(index < 0, count, index)
    blocks = order.sort(dim=-1, stable=True).indices.to(torch.int32)
    ends = torch.stack([(order <= e).sum(-1, dtype=torch.int32) for e in range(count)], dim=-1)
    return blocks, ends

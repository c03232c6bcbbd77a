"""The published modes at a density of one's own: their intervals, stretched by one factor per head."""

import torch
from torch import Tensor

from .allocate import DROPPED, BlockMask, apply_mask, levels_from, normalise
from .caps import per_head
from .config import PUBLISHED_RATIOS
from .schedule import level_index

BOUNDS = {
    "topk": tuple((level, PUBLISHED_RATIOS[level][1]) for level in (1, 2, 4, 8)),
    "thresholdbound": ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8)),
}
"""Upper bounds per level: shares of the blocks, and shares of the importance (preset psa_balanced of Wan2.1_14b)."""


def stretched_levels(
    importance: Tensor, mode: str, density: float | Tensor, block_n: int, cap: Tensor | None, mask: BlockMask
) -> Tensor:
    """Levels uint8 [B, H, M, N]: blocks in descending order of importance get ``BOUNDS[mode]`` times a factor per head.

    The factor is the largest that keeps the head at or below ``density`` (a number or [B, H, 1, 1]), found by
    bisection. topk goes by a block's place in its row, thresholdbound by the importance that comes before it; pinned
    blocks come last in the order, and at level 1.
    """
    bounds = [(level.bit_length() - 1, bound) for level, bound in BOUNDS[mode] if level <= block_n]
    caps = None if cap is None else level_index(per_head(cap, importance.shape[1]))[:, :, None, :]
    place = _places(importance, mode, mask)
    pairs = torch.ones_like(place[:1, :1]) if mask.visible is None else mask.visible
    total = pairs.expand_as(place).sum((2, 3), keepdim=True, dtype=torch.float32)

    def indices(factor: Tensor) -> Tensor:
        index = torch.full_like(place, DROPPED, dtype=torch.int32)
        for level, bound in reversed(bounds):
            index.masked_fill_(place <= factor * bound, level)
        if caps is not None:
            index = torch.where(index == DROPPED, index, torch.minimum(index, caps))
        return apply_mask(index, mask)

    low = torch.zeros_like(total)
    high = torch.full_like(total, 1.0 / bounds[0][1])
    for _ in range(24):
        middle = 0.5 * (low + high)
        index = indices(middle)
        kept = torch.where(index == DROPPED, 0.0, (-index.float()).exp2()).sum((2, 3), keepdim=True)
        fits = kept <= density * total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return levels_from(indices(low))


def _places(importance: Tensor, mode: str, mask: BlockMask) -> Tensor:
    """Where each block stands in its row, in (0, 1]: by its rank, or by the importance of what comes before it."""
    weight = shares = normalise(importance, mask.visible)
    if mask.pinned is not None:
        weight = weight.masked_fill(mask.pinned, -1.0)
    if mask.visible is not None:
        weight = weight.masked_fill(~mask.visible, -1.0)
    ordered, order = weight.sort(dim=-1, descending=True, stable=True)
    if mode == "topk":
        seen = shares.shape[-1] if mask.visible is None else mask.visible.sum(-1, keepdim=True)
        place = (torch.arange(1, shares.shape[-1] + 1, device=shares.device) / seen).expand_as(ordered)
    else:
        ordered = ordered.clamp(min=0)
        place = (ordered.cumsum(-1) - ordered).clamp(min=1e-6)
    return torch.empty_like(place).scatter_(-1, order, place)

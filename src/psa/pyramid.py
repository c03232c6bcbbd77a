"""K and V averaged at every level: the rows that attention reads, with the bias that each row carries."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.base import Selection
from .values import MAX_LEVEL


@dataclass(frozen=True)
class RowLayout:
    """Where the rows of each level lie in one buffer: level 1 first (the tokens), then 2, 4, … up to the block.

    Group g of block n at level 2**e is row ``offsets[e] + n * (block_n >> e) + g``.
    """

    length: int
    block_n: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.offsets[-1] + self.rows[-1]

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(1 << e for e in range(len(self.rows)))


def row_layout(length: int, block_n: int) -> RowLayout:
    """The layout for ``length`` tokens in blocks of ``block_n``."""
    exponents = range(int(math.log2(min(block_n, MAX_LEVEL))) + 1)
    rows = tuple(-(-length // (1 << e)) for e in exponents)
    offsets = tuple(sum(rows[:e]) for e in exponents)
    return RowLayout(length, block_n, rows, offsets)


def group_sums(x: Tensor, level: int) -> Tensor:
    """Sums of ``level`` consecutive tokens along dim -2: [..., L, D] -> [..., ceil(L/level), D]."""
    if level == 1:
        return x
    length = x.shape[-2]
    missing = -length % level
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (-1, level)).sum(-2)


def group_counts(length: int, level: int, key_mask: Tensor | None, *, like: Tensor) -> Tensor:
    """Real tokens per group: [1|B, ceil(L/level)], in the dtype and on the device of ``like``."""
    real = torch.ones(1, length, dtype=like.dtype, device=like.device) if key_mask is None else key_mask.to(like.dtype)
    return group_sums(real.unsqueeze(-1), level).squeeze(-1)


def group_means(x: Tensor, level: int, key_mask: Tensor | None = None) -> Tensor:
    """Means over the real tokens of each group; zero where a group has none. x [B, H, L, D] (METHOD: §2)."""
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0.0)
    if level == 1:
        return x
    counts = group_counts(x.shape[-2], level, key_mask, like=x)
    return group_sums(x, level) / counts.clamp(min=1)[:, None, :, None]


def group_variances(k: Tensor, level: int, key_mask: Tensor | None = None) -> Tensor:
    """Population variance of each channel over a group's real tokens: [B, Hkv, ceil(L/level), D]."""
    means = group_means(k, level, key_mask)
    spread = k - means.repeat_interleave(level, dim=-2)[..., : k.shape[-2], :]
    return group_means(spread.square(), level, key_mask)


def row_bias(k: Tensor, level: int, selection: Selection) -> Tensor:
    """The bias of each row of one level, float [1|B, 1|H, ceil(L/level)].

    ``ln(n_g)``, and where the selection asks for it ``min(½ · scale² · Σ_d w_d σ²_{g,d}, cap)``: the second-order
    (Gaussian) estimate of what averaging loses of Σ exp. Groups without real tokens get -inf. A constant for autograd.
    """
    with torch.no_grad():
        bias = group_counts(k.shape[-2], level, selection.key_mask, like=k).log()[:, None, :]
        if selection.query_power is None or level == 1:
            return bias
        power = selection.query_power.to(k.dtype)
        variances = group_variances(k, level, selection.key_mask)
        groups = power.shape[1] // k.shape[1]
        weighted = torch.einsum("bkgd,bkrd->bkgr", power.unflatten(1, (-1, groups)), variances).flatten(1, 2)
        correction = 0.5 * selection.scale**2 * weighted
        if selection.bias_cap is not None:
            correction = torch.minimum(correction, selection.bias_cap.to(k.dtype)[..., None])
        return bias + correction

"""The coarsest level that each KV block allows, by its own keys."""

import torch
from torch import Tensor

from .pyramid import group_means
from .values import MAX_LEVEL

OUTLYING = 5.0
"""Times the median block's spread of keys above which a block is an outlier's."""
OUTLIERS = 1 / 64
"""Share of a head's KV blocks that are outliers', at most; one of them in any case."""


def per_head(cap: Tensor, heads: int) -> Tensor:
    """[B, Hkv, N] -> [B, H, N]."""
    return cap.repeat_interleave(heads // cap.shape[1], dim=1)


def similarity_cap(
    k: Tensor, block_n: int, thresholds: dict[int, float] | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """The coarsest level that a KV block's own keys allow (METHOD §3, ``use_sim_mask``).

    Within each block, ``c_h`` is the mean cosine between the first and last key of every group of h; the coarsest h
    whose ``c_h`` exceeds its threshold is the cap, else 1. A partial last block is completed by repeating its last
    token (as are masked tokens, by the last real one before them).

    Args:
        k: [B, Hkv, Lk, D].
        thresholds: default {2: .7, 4: .65, 8: .6}.

    Returns:
        uint8 [B, Hkv, N] in {1, 2, 4, 8}.
    """
    thresholds = {2: 0.7, 4: 0.65, 8: 0.6} if thresholds is None else thresholds
    batch, heads, length, _ = k.shape
    count = -(-length // block_n)
    index = torch.arange(count * block_n, device=k.device).clamp(max=length - 1)
    if key_mask is not None:
        last_real = torch.where(key_mask, torch.arange(length, device=k.device), 0).cummax(dim=-1).values
        keys = k.gather(2, last_real[:, index][:, None, :, None].expand(batch, heads, -1, k.shape[-1]))
    else:
        keys = k[:, :, index]
    keys = torch.nn.functional.normalize(keys.double() if k.dtype == torch.float64 else keys.float(), dim=-1)
    blocks = keys.unflatten(2, (count, block_n))
    cap = torch.ones(batch, heads, count, dtype=torch.uint8, device=k.device)
    for level, threshold in sorted(thresholds.items()):
        cosine = (blocks[..., ::level, :] * blocks[..., level - 1 :: level, :]).sum(-1).mean(-1)
        cap.masked_fill_(cosine > threshold, level)
    return cap


def outlier_cap(k: Tensor, power: Tensor, scale: float, block_n: int, key_mask: Tensor | None = None) -> Tensor:
    """Level 1 for KV blocks whose keys lie so far apart that no mean can stand for them, as beside a giant outlier.

    Importance of pooled keys does not see such a block. It is one whose spread of logits, ``½ · scale² · Σ_d w_d σ²_d``
    nats over its keys, is more than ``OUTLYING`` times the median block's and one nat.

    Args:
        k: [B, Hkv, Lk, D]. power: w, float32 [B, H, D], see :func:`psa.memory.mean_square`.

    Returns:
        uint8 [B, H, N], 1 or the coarsest level.
    """
    weight, keys = power.unflatten(1, (k.shape[1], -1)).mT, k.float()
    energy = group_means(keys.square() @ weight, block_n, key_mask)
    spread = energy - group_means(keys, block_n, key_mask).square() @ weight
    spread = spread.masked_fill(spread < 1e-4 * energy, 0.0)  # rounding
    nats = (0.5 * scale**2 * spread).nan_to_num(torch.inf, torch.inf).mT.flatten(1, 2)
    blocks, ascending = nats.shape[-1], nats.sort(-1).values
    usual = ascending[..., (blocks - 1) // 2, None].clamp(min=1)
    some = min(blocks - 1, max(1, int(OUTLIERS * blocks)))
    outlying = (nats > OUTLYING * usual) & (nats > ascending[..., blocks - 1 - some, None])
    coarsest = torch.full_like(nats, min(block_n, MAX_LEVEL), dtype=torch.uint8)
    return coarsest.masked_fill(outlying, 1)


def with_outliers(cap: Tensor | None, outliers: Tensor) -> Tensor | None:
    """Both caps in one, [B, H, N]; on a CPU, which may look, None if nothing is capped."""
    if cap is not None:
        return torch.minimum(per_head(cap, outliers.shape[1]), outliers)
    return None if outliers.device.type == "cpu" and not bool((outliers == 1).any()) else outliers

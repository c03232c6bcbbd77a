"""What averaging loses of the output to first order: values that rise with the logit inside a pooled group.

A pooled group answers every query with its mean value. The exact answer of a group under a query q_i leans towards the
values whose keys resemble q_i: to first order in the logits' spread it is ``v̄_g + scale · Cov_g(v, k) q_i``. Averaged
over a query block, the sum of these terms over all pooled blocks is one D×D matrix per query block:

    C_m = Σ_n share(m, n) · Cov_n,level(k, v)            out_i += scale · q_i C_m

with share(m, n) the importance of the block. It costs 2·M·N·D² multiply-adds, D/(64·128) of dense attention for blocks
128×64, whatever the density. Covariances within groups of a level are interpolated between two levels, groups of
``FINE`` and whole blocks, by how much of the keys' spread lies within groups of that level.
"""

import math

import torch
from torch import Tensor

from .config import MAX_LEVEL
from .pyramid import group_counts, group_means, group_sums
from .schedule import level_index

FINE = 4
"""Group size of the finer of the two covariances."""
CHUNK = 1 << 24
"""Covariance elements held at a time (64 MB in float32)."""


def slope_basis(k: Tensor, v: Tensor, block_n: int, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Covariances of key and value within groups, and how to mix them for every level.

    Args:
        k, v: [B, Hkv, Lk, D] in plan order.

    Returns:
        covariance: [B, Hkv, N, 2, D, D], mean over a block's real tokens of (k - k̄_g)ᵀ v, for groups of FINE and for
            the whole block (or 128 tokens, the largest group).
        mix: float32 [B, Hkv, N, E, 2], zero for level 1.
    """
    top = min(block_n, MAX_LEVEL)
    pad = (0, 0, 0, -k.shape[2] % block_n)
    keys, values = torch.nn.functional.pad(k, pad), torch.nn.functional.pad(v, pad)
    real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    real = torch.nn.functional.pad(real, (0, pad[3]))
    weight = real[:, None, :, None].to(k.dtype)
    counts = group_counts(real.shape[1], block_n, real, like=k).clamp(min=1)[:, None, :, None, None]
    keys = (keys - group_means(keys, top, real).repeat_interleave(top, dim=2)) * weight
    values = values * weight
    whole = _blockwise(keys, values, block_n)
    scaled = _scaled_sums(keys, FINE, real)
    between = _blockwise(scaled, _scaled_sums(values, FINE, real), block_n // FINE)
    return torch.stack([whole - between, whole], dim=3) / counts[..., None], _mix(keys.detach().float(), real, block_n)


def _blockwise(a: Tensor, b: Tensor, rows: int) -> Tensor:
    return a.unflatten(2, (-1, rows)).mT @ b.unflatten(2, (-1, rows))


def _scaled_sums(x: Tensor, level: int, real: Tensor) -> Tensor:
    """Sums over groups divided by the root of their counts: products of two are count · mean · mean."""
    return group_sums(x, level) * group_counts(x.shape[2], level, real, like=x).clamp(min=1).rsqrt()[:, None, :, None]


def _mix(centred: Tensor, real: Tensor, block_n: int) -> Tensor:
    """Weights of the two covariances per level, by the share of the keys' spread within its groups."""
    count = int(math.log2(min(block_n, MAX_LEVEL))) + 1
    fine = int(math.log2(FINE))
    sums, tokens, between = centred, real.float(), []
    for e in range(count):
        if e:
            sums, tokens = group_sums(sums, 2), tokens.unflatten(-1, (-1, 2)).sum(-1)
        energy = sums.square().sum(-1) / tokens.clamp(min=1)[:, None]
        between.append(energy.unflatten(-1, (-1, block_n >> e)).sum(-1))
    within = (between[0][..., None] - torch.stack(between, dim=-1)).clamp(min=0)
    at_fine, at_top = within[..., fine, None], within[..., -1, None]
    tiny = torch.finfo(torch.float32).tiny
    coarse = ((within - at_fine) / (at_top - at_fine).clamp(min=tiny)).clamp(0, 1)
    small = (within / at_fine.clamp(min=tiny)).clamp(0, 1)
    index = torch.arange(count, device=centred.device)
    mix = torch.stack([torch.where(index <= fine, small, 1 - coarse), torch.where(index <= fine, 0.0, coarse)], -1)
    return mix * (index > 0)[:, None]


def slope_correction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    shares: Tensor,
    block_m: int,
    block_n: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The first-order term of every query: [B, H, Lq, D] in the dtype of q. Differentiable in q, k and v.

    Args:
        q [B, H, Lq, D], k, v [B, Hkv, Lk, D], key_mask [B, Lk]: in plan order.
        levels: uint8 [1|B, 1|H, M, N].
        shares: float16 [B, H, M, N], importance times N (one = an even share), 0 where no correction is wanted. Blocks
            at levels 0 and 1 never get one.
    """
    batch, kv_heads, _, dim = k.shape
    groups, (blocks_q, blocks_k) = q.shape[1] // kv_heads, levels.shape[2:]
    dtype = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) and not q.is_cuda else q.dtype
    index = level_index(levels).clamp(min=0).expand(shares.shape).long()
    step = max(1, CHUNK // (2 * blocks_k * dim * dim))
    missing = blocks_q * block_m - q.shape[2]
    out = []
    for b in range(batch):
        for first in range(0, kv_heads, step):
            heads = slice(first * groups, min(first + step, kv_heads) * groups)
            mask = None if key_mask is None else key_mask[b : b + 1]
            part_k, part_v = (x[b : b + 1, first : first + step].to(dtype) for x in (k, v))
            covariance, mix = slope_basis(part_k, part_v, block_n, mask)
            chosen = index[b, heads]
            per_head = mix[0].repeat_interleave(groups, dim=0)[:, None].expand(-1, blocks_q, -1, -1, -1)
            weight = per_head.gather(3, chosen[..., None, None].expand(*chosen.shape, 1, 2)).squeeze(3)
            weight = weight * (shares[b, heads].float() / blocks_k)[..., None]
            flat = covariance[0].flatten(1, 2).flatten(2)
            weight = weight.to(dtype).flatten(2).unflatten(0, (-1, groups)).flatten(1, 2)
            matrix = (weight @ flat).unflatten(-1, (dim, dim)).unflatten(1, (groups, blocks_q)).flatten(0, 1)
            rows = torch.nn.functional.pad(q[b, heads].to(dtype), (0, 0, 0, missing)).unflatten(1, (blocks_q, block_m))
            out.append((scale * rows @ matrix).flatten(1, 2)[:, : q.shape[2]])
    return torch.cat(out).view(q.shape).to(q.dtype)

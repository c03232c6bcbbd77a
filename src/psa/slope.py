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

from .autocast import unaffected
from .memory import scratch_elements
from .pyramid import group_sums
from .schedule import level_index
from .values import MAX_LEVEL

FINE = 4
"""Group size of the finer of the two covariances."""
CHUNK = 1 << 24
"""Covariance elements held at a time on a CPU (64 MB in float32)."""


def slope_basis(
    k: Tensor, v: Tensor, block_n: int, key_mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two cross moments of key and value per block, and how to mix them into the covariance within groups of a level.

    Args:
        k, v: [B, Hkv, Lk, D] in plan order, float32 or float64.
        dtype: of the products. Where that is a narrower one, values lose their means too before they are rounded: what
            rounding does to a mean would weigh as much as what is sought.

    Returns:
        moments: (whole, between), each [B, Hkv, N, D, D]: Σ (k - k̄)ᵀ v over a block's real tokens, and the part
            of it that lies between the means of groups of FINE.
        mix: float32 [B, Hkv, N, E, 2], zero for level 1; the covariance of level 2**e is ``Σ_i mix[e, i] moments[i]``.
    """
    real = None
    pad = -k.shape[2] % block_n
    if pad or key_mask is not None:
        mask = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        real = torch.nn.functional.pad(mask, (0, pad))
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) * real[:, None, :, None] for x in (k, v))
    keys = centred(k, block_n, real)
    values = centred(v, block_n, real) if dtype.itemsize < v.dtype.itemsize else v
    fine_keys, fine_values = group_sums(keys, FINE), group_sums(values, FINE)
    if real is None:
        fine_keys = fine_keys / FINE
    else:
        fine_keys = fine_keys / real.unflatten(1, (-1, FINE)).sum(-1).clamp(min=1)[:, None, :, None]
    moments = (
        _blockwise(keys.to(dtype), values.to(dtype), block_n),
        _blockwise(fine_keys.to(dtype), fine_values.to(dtype), block_n // FINE),
    )
    return moments, slope_mix(keys.detach().float(), real, block_n)


def centred(x: Tensor, block_n: int, real: Tensor | None) -> Tensor:
    """Keys or values less the mean of the real ones in their coarsest group; zero where not real. x in whole blocks."""
    top = min(block_n, MAX_LEVEL)
    groups = x.unflatten(2, (-1, top))
    if real is None:
        return (groups - groups.sum(3, keepdim=True) / top).flatten(2, 3)
    kept = real.unflatten(1, (-1, top))[:, None, :, :, None]
    count = kept.sum(3, keepdim=True).clamp(min=1)
    return ((groups - groups.sum(3, keepdim=True) / count) * kept).flatten(2, 3)


def _blockwise(a: Tensor, b: Tensor, rows: int) -> Tensor:
    return a.unflatten(2, (-1, rows)).mT @ b.unflatten(2, (-1, rows))


def slope_mix(keys: Tensor, real: Tensor | None, block_n: int) -> Tensor:
    """The ``mix`` of :func:`slope_basis`, by the share of the keys' spread that lies within a level's groups.

    keys: float32 [B, Hkv, Lk, D] of :func:`centred`; real: bool [B, Lk] over whole blocks, None if all are.
    """
    levels = int(math.log2(min(block_n, MAX_LEVEL))) + 1
    fine = int(math.log2(FINE))
    tokens = None if real is None else real.float()[:, None]
    sums, between = keys, []
    for e in range(levels):
        if e:
            sums = group_sums(sums, 2)
            tokens = None if tokens is None else tokens.unflatten(-1, (-1, 2)).sum(-1)
        energy = torch.linalg.vector_norm(sums, dim=-1).square() / (1 << e if tokens is None else tokens.clamp(min=1))
        between.append(energy.unflatten(-1, (-1, block_n >> e)).sum(-1))
    within = (between[0][..., None] - torch.stack(between, dim=-1)).clamp(min=0)
    at_fine, at_top = within[..., fine, None], within[..., -1, None]
    tiny = torch.finfo(torch.float32).tiny
    coarse = ((within - at_fine) / (at_top - at_fine).clamp(min=tiny)).clamp(0, 1)
    small = (within / at_fine.clamp(min=tiny)).clamp(0, 1)
    index = torch.arange(levels, device=keys.device)
    fines = torch.where(index <= fine, small, 1 - coarse)
    wholes = torch.where(index <= fine, small, torch.ones_like(small))
    mix = torch.stack([wholes, -fines], dim=-1) * (index > 0)[:, None]
    size = block_n if real is None else real.unflatten(1, (-1, block_n)).sum(-1).clamp(min=1)[:, None, :, None, None]
    return mix / size


@unaffected
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
    fits = q.dtype in (torch.float32, torch.float64) or (q.dtype == torch.bfloat16 and q.is_cuda)
    dtype = q.dtype if fits else torch.float32  # moments of float16 may exceed its range
    wide = torch.promote_types(dtype, torch.float32)
    index = level_index(levels).clamp(min=0).expand(shares.shape).long()
    step = max(1, scratch_elements(q, CHUNK) // (2 * blocks_k * dim * dim))
    missing = blocks_q * block_m - q.shape[2]
    out = []
    for b in range(batch):
        for first in range(0, kv_heads, step):
            heads = slice(first * groups, min(first + step, kv_heads) * groups)
            mask = None if key_mask is None else key_mask[b : b + 1]
            part_k, part_v = (x[b : b + 1, first : first + step].to(wide) for x in (k, v))
            moments, mix = slope_basis(part_k, part_v, block_n, mask, dtype)
            chosen = index[b, heads]
            per_head = mix[0].repeat_interleave(groups, dim=0)[:, None].expand(-1, blocks_q, -1, -1, -1)
            weight = per_head.gather(3, chosen[..., None, None].expand(*chosen.shape, 1, 2)).squeeze(3)
            weight = (weight * (shares[b, heads].float() / blocks_k)[..., None]).to(dtype)
            weight = weight.unflatten(0, (-1, groups)).flatten(1, 2)
            matrix = weight[..., 0] @ moments[0][0].flatten(2) + weight[..., 1] @ moments[1][0].flatten(2)
            matrix = matrix.unflatten(-1, (dim, dim)).unflatten(1, (groups, blocks_q)).flatten(0, 1)
            rows = torch.nn.functional.pad(q[b, heads].to(dtype), (0, 0, 0, missing)).unflatten(1, (blocks_q, block_m))
            out.append((scale * rows @ matrix).flatten(1, 2)[:, : q.shape[2]])
    return torch.cat(out).view(q.shape).to(q.dtype)

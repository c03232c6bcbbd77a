"""One pass over K and V: every level of the pyramid, the bias of each row, and how alike neighbouring keys are."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import MAX_LEVEL
from .common import LOG2_E, level_offset
from .tune import padded

SIMILARITIES = 3


@dataclass(frozen=True)
class Pyramid:
    """K and V at every level, level-major, whole blocks (see :mod:`.common`).

    Attributes:
        length: tokens, as k had them.
        keys, values: [B, Hkv, R, D], contiguous, dtype of k.
        counts: float32 [1|B, R], log2 of each row's number of real tokens; -inf where there are none.
        bias: float32 [1|B, 1|H, R], all of a row's bias in units of log2; ``counts`` itself where nothing is added.
        similarity: float32 [B, Hkv, N, 3], mean cosines c2, c4, c8 (METHOD §3), or None.
    """

    length: int
    keys: Tensor
    values: Tensor
    counts: Tensor
    bias: Tensor
    similarity: Tensor | None


@triton.jit
def _halve(x, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """Sums of neighbouring rows: [ROWS, D_PAD] -> [ROWS / 2, D_PAD]."""
    return tl.sum(tl.reshape(x, (ROWS // 2, 2, D_PAD)), axis=1)


@triton.jit
def _load_tokens(base, token, real, strides, D: tl.constexpr, D_PAD: tl.constexpr):
    cols = tl.arange(0, D_PAD)
    offsets = token.to(tl.int64)[:, None] * strides[0] + cols[None, :] * strides[1]
    return tl.load(base + offsets, mask=real[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, row, x, D: tl.constexpr, D_PAD: tl.constexpr):
    cols = tl.arange(0, D_PAD)
    offsets = row[:, None] * D + cols[None, :]
    tl.store(base + offsets, x.to(base.dtype.element_ty), mask=tl.broadcast_to((cols < D)[None, :], offsets.shape))


@triton.jit
def _cosine(base, first, last, length, strides, D: tl.constexpr, D_PAD: tl.constexpr):
    """Mean cosine of token pairs; a short last block is completed by repeating its last token."""
    a = _load_tokens(base, tl.minimum(first, length - 1), first >= 0, strides, D, D_PAD)
    b = _load_tokens(base, tl.minimum(last, length - 1), last >= 0, strides, D, D_PAD)
    norms = tl.sqrt(tl.sum(a * a, 1)) * tl.sqrt(tl.sum(b * b, 1))
    cosines = tl.sum(a * b, 1) / tl.maximum(norms, 1e-20)
    return tl.sum(cosines) / first.shape[0]


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr, mask_ptr, power_ptr, cap_ptr, keys_ptr, values_ptr, counts_ptr, bias_ptr, similarity_ptr,
    k_strides, v_strides, mask_stride, power_strides, cap_strides,
    heads, length, blocks, rows, half_scale_squared,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, block_n: tl.constexpr, TOKENS: tl.constexpr,
    LEVELS: tl.constexpr, HAS_MASK: tl.constexpr, VARIANCE: tl.constexpr, SIMILARITY: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens of one KV head: K, then V. Grid (tokens / TOKENS, B * Hkv).

    Means of 2h tokens come from sums over h, variances from those of the halves (Chan et al. 1983), in float32.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    k_ptr += wide_batch * k_strides[0] + wide_head * k_strides[1]
    v_ptr += wide_batch * v_strides[0] + wide_head * v_strides[1]
    base = tl.program_id(1).to(tl.int64) * rows
    keys_ptr += base * D
    values_ptr += base * D
    cols = tl.arange(0, D_PAD)

    token = chunk * TOKENS + tl.arange(0, TOKENS)
    real = token < length
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + wide_batch * mask_stride + token, mask=real, other=0) != 0)
    sums = _load_tokens(k_ptr, token, real, (k_strides[2], k_strides[3]), D, D_PAD)
    value_sums = _load_tokens(v_ptr, token, real, (v_strides[2], v_strides[3]), D, D_PAD)
    counts = real.to(tl.float32)
    spread = tl.zeros((TOKENS, D_PAD), tl.float32)
    means = sums
    if HAS_MASK:
        counts_ptr += wide_batch * rows
        owns_counts = head == 0
    else:
        owns_counts = tl.program_id(1) == 0
    for e in tl.static_range(LEVELS):
        GROUPS: tl.constexpr = TOKENS >> e
        row = level_offset(e, blocks, block_n) + chunk * GROUPS + tl.arange(0, GROUPS)
        if e > 0:
            child_means, child_counts = means, counts
            sums = _halve(sums, 2 * GROUPS, D_PAD)
            value_sums = _halve(value_sums, 2 * GROUPS, D_PAD)
            counts = tl.sum(tl.reshape(counts, (GROUPS, 2)), axis=1)
            means = sums / tl.maximum(counts, 1.0)[:, None]
            if VARIANCE:
                parent = tl.reshape(tl.broadcast_to(means[:, None, :], (GROUPS, 2, D_PAD)), (2 * GROUPS, D_PAD))
                shift = child_means - parent
                spread = _halve(spread + child_counts[:, None] * shift * shift, 2 * GROUPS, D_PAD)
        _store_rows(keys_ptr, row, means, D, D_PAD)
        _store_rows(values_ptr, row, value_sums / tl.maximum(counts, 1.0)[:, None], D, D_PAD)
        log_count = tl.where(counts > 0, tl.log2(tl.maximum(counts, 1.0)), -float("inf"))
        if owns_counts:
            tl.store(counts_ptr + row, log_count)
        if VARIANCE:
            variances = spread / tl.maximum(counts, 1.0)[:, None]
            for g in range(GROUP):
                query_head = wide_head * GROUP + g
                power_base = power_ptr + wide_batch * power_strides[0] + query_head * power_strides[1]
                power = tl.load(power_base + cols * power_strides[2], mask=cols < D, other=0.0)
                cap = tl.load(cap_ptr + wide_batch * cap_strides[0] + query_head * cap_strides[1])
                correction = half_scale_squared * tl.sum(variances * power[None, :], 1)
                if e > 0:
                    log_bias = log_count + tl.minimum(correction, cap) * LOG2_E
                else:
                    log_bias = log_count
                tl.store(bias_ptr + (wide_batch * heads * GROUP + query_head) * rows + row, log_bias)
    if SIMILARITY:
        at = similarity_ptr + (tl.program_id(1).to(tl.int64) * blocks + chunk) * 3
        for e in tl.static_range(1, 4):
            first = chunk * TOKENS + (tl.arange(0, TOKENS >> e) << e)
            cosine = _cosine(k_ptr, first, first + (1 << e) - 1, length, (k_strides[2], k_strides[3]), D, D_PAD)
            tl.store(at + e - 1, cosine)


def build_pyramid(
    k: Tensor,
    v: Tensor,
    block_n: int,
    *,
    key_mask: Tensor | None = None,
    query_power: Tensor | None = None,
    bias_cap: Tensor | None = None,
    scale: float = 1.0,
    similarity: bool = False,
) -> Pyramid:
    """Pools K and V at every level, in one launch.

    Args:
        k, v: [B, Hkv, L, D], any strides.
        key_mask: bool [B, L]; masked tokens enter no mean and count as missing.
        query_power, bias_cap: float32 [B|1, H, D] and [B|1, H|1] switch the variance bias on (METHOD §4b).
        similarity: also mean cosines of neighbouring keys, for blocks of at most 128 tokens.
    """
    batch, heads, length, dim = k.shape
    blocks = triton.cdiv(length, block_n)
    tokens = min(block_n, MAX_LEVEL)
    levels = tokens.bit_length()
    rows = blocks * (2 * block_n - ((2 * block_n) >> levels))
    new = k.new_empty
    group = 1 if query_power is None else query_power.shape[1] // heads
    keys, values = new(batch, heads, rows, dim), new(batch, heads, rows, dim)
    counts = new(1 if key_mask is None else batch, rows, dtype=torch.float32)
    bias = counts[:, None]
    if query_power is not None:
        bias = new(batch, heads * group, rows, dtype=torch.float32)
    cosines = new(batch, heads, blocks, SIMILARITIES, dtype=torch.float32) if similarity else None
    wide = padded(dim)
    _pool_kernel[(blocks * (block_n // tokens), batch * heads)](
        k, v, key_mask, query_power, bias_cap, keys, values, counts, bias, cosines,
        k.stride(), v.stride(), 0 if key_mask is None else key_mask.stride(0),
        _strides(query_power, batch, heads * group), _strides(bias_cap, batch, heads * group),
        heads, length, blocks, rows, 0.5 * scale * scale,
        GROUP=group, D=dim, D_PAD=wide, block_n=block_n, TOKENS=tokens, LEVELS=levels,
        HAS_MASK=key_mask is not None, VARIANCE=query_power is not None, SIMILARITY=similarity,
        num_warps=4 if tokens * wide <= 8192 else 8,
    )  # fmt: skip
    return Pyramid(length, keys, values, counts, bias, cosines)


def _strides(x: Tensor | None, batch: int, heads: int) -> tuple[int, ...]:
    """Strides of a tensor expanded over batch and heads; zeros for an absent one."""
    return (0, 0, 0) if x is None else x.expand(batch, heads, *x.shape[2:]).stride()

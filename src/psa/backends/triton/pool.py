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


def pool_options(variance: bool) -> dict[str, int]:
    """Launch options. The variances' registers are worth more than the occupancy that ptxas would spill them for."""
    return {"num_warps": 8, "maxnreg": 255} if variance else {"num_warps": 8}


def pool_columns(dim: int) -> int:
    """Channels per program of the pooling kernel: more leave no registers for the sums of 128 tokens."""
    return min(64, padded(dim))


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
def _halve_line(x, ROWS: tl.constexpr):
    """Sums of neighbours: [ROWS] -> [ROWS / 2]."""
    return tl.sum(tl.reshape(x, (ROWS // 2, 2)), axis=1)


@triton.jit
def _load_tokens(base, token, real, col, strides, D: tl.constexpr):
    """Columns ``col`` of the tokens in float32, zeros where not ``real``."""
    offsets = token.to(tl.int64)[:, None] * strides[0] + col[None, :] * strides[1]
    return tl.load(base + offsets, mask=real[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _cosine(base, first, last, length, strides, D: tl.constexpr, D_PAD: tl.constexpr):
    """Mean cosine of token pairs; a short last block is completed by repeating its last token."""
    col = tl.arange(0, D_PAD)
    a = _load_tokens(base, tl.minimum(first, length - 1), first >= 0, col, strides, D)
    b = _load_tokens(base, tl.minimum(last, length - 1), last >= 0, col, strides, D)
    norms = tl.sqrt(tl.sum(a * a, 1)) * tl.sqrt(tl.sum(b * b, 1))
    cosines = tl.sum(a * b, 1) / tl.maximum(norms, 1e-20)
    return tl.sum(cosines) / first.shape[0]


@triton.jit
def _pool_side(
    x_ptr, rows_ptr, token, real, col, strides, chunk, blocks, D: tl.constexpr, COLS: tl.constexpr,
    block_n: tl.constexpr, TOKENS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Means of TOKENS tokens of K or V at every level; sums of 2h tokens come from sums of h, in float32."""
    sums = _load_tokens(x_ptr, token, real, col, strides, D)
    counts = real.to(tl.float32)
    for e in tl.static_range(LEVELS):
        if e > 0:
            sums = _halve(sums, TOKENS >> (e - 1), COLS)
            counts = _halve_line(counts, TOKENS >> (e - 1))
        row = level_offset(e, blocks, block_n) + chunk * (TOKENS >> e) + tl.arange(0, TOKENS >> e)
        means = (sums / tl.maximum(counts, 1.0)[:, None]).to(rows_ptr.dtype.element_ty)
        there = tl.broadcast_to((col < D)[None, :], means.shape)
        tl.store(rows_ptr + row[:, None] * D + col[None, :], means, mask=there)


@triton.jit
def _log_counts(counts):
    return tl.where(counts > 0, tl.log2(tl.maximum(counts, 1.0)), -float("inf"))


@triton.jit
def _spreads(
    k_ptr, power_ptr, token, real, strides, power_stride, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """``Σ_d w_d σ²_{g,d}`` of every group of tokens for one query head: a tuple, one vector per level.

    It is ``mean_g(Σ_d w_d y_d²) - Σ_d w_d mean_g(y_d)²`` with y the keys less the mean of all tokens here, which keeps
    the difference from cancelling.
    """
    spreads = ()
    for e in tl.static_range(LEVELS):
        spreads = spreads + (tl.zeros((TOKENS >> e,), tl.float32),)  # noqa: RUF005 - Triton has no starred tuples
    for part in tl.range(D_PAD // COLS, num_stages=1):
        col = part * COLS + tl.arange(0, COLS)
        power = tl.load(power_ptr + col * power_stride, mask=col < D, other=0.0)
        counts = real.to(tl.float32)
        sums = _load_tokens(k_ptr, token, real, col, strides, D)
        centre = tl.sum(sums, 0) / tl.maximum(tl.sum(counts, 0), 1.0)
        sums = tl.where(real[:, None], sums - centre[None, :], 0.0)
        squares = tl.sum(sums * sums * power[None, :], 1)
        added = (spreads[0],)
        for e in tl.static_range(1, LEVELS):
            sums = _halve(sums, TOKENS >> (e - 1), COLS)
            counts = _halve_line(counts, TOKENS >> (e - 1))
            squares = _halve_line(squares, TOKENS >> (e - 1))
            some = tl.maximum(counts, 1.0)
            means = sums / some[:, None]
            spread = squares / some - tl.sum(means * means * power[None, :], 1)
            added = added + (spreads[e] + spread,)  # noqa: RUF005
        spreads = added
    return spreads


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr, mask_ptr, power_ptr, cap_ptr, keys_ptr, values_ptr, counts_ptr, bias_ptr, similarity_ptr,
    k_strides, v_strides, mask_stride, power_strides, cap_strides,
    heads, length, blocks, rows, half_scale_squared,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr, block_n: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr, HAS_MASK: tl.constexpr, VARIANCE: tl.constexpr,
    SIMILARITY: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens and COLS channels of one KV head: K, then V; the first channels' also biases.

    Grid (tokens / TOKENS, B * Hkv, channels / COLS).
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1) % heads
    wide_batch, wide_head = (tl.program_id(1) // heads).to(tl.int64), head.to(tl.int64)
    k_ptr += wide_batch * k_strides[0] + wide_head * k_strides[1]
    v_ptr += wide_batch * v_strides[0] + wide_head * v_strides[1]
    token_strides = (k_strides[2], k_strides[3])
    base = tl.program_id(1).to(tl.int64) * rows * D
    token = chunk * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    real = token < length
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + wide_batch * mask_stride + token, mask=real, other=0) != 0)
    _pool_side(k_ptr, keys_ptr + base, token, real, col, token_strides, chunk, blocks, D, COLS, block_n, TOKENS, LEVELS)
    _pool_side(
        v_ptr, values_ptr + base, token, real, col, (v_strides[2], v_strides[3]), chunk, blocks, D, COLS, block_n,
        TOKENS, LEVELS,
    )  # fmt: skip
    if tl.program_id(2) != 0:
        return
    if HAS_MASK:
        counts_ptr += wide_batch * rows
        owns_counts = head == 0
    else:
        owns_counts = tl.program_id(1) == 0
    if owns_counts:
        counts = real.to(tl.float32)
        for e in tl.static_range(LEVELS):
            if e > 0:
                counts = _halve_line(counts, TOKENS >> (e - 1))
            row = level_offset(e, blocks, block_n) + chunk * (TOKENS >> e) + tl.arange(0, TOKENS >> e)
            tl.store(counts_ptr + row, _log_counts(counts))
    if VARIANCE:
        for g in range(GROUP):
            query_head = wide_head * GROUP + g
            power_base = power_ptr + wide_batch * power_strides[0] + query_head * power_strides[1]
            cap = tl.load(cap_ptr + wide_batch * cap_strides[0] + query_head * cap_strides[1])
            bias_base = bias_ptr + (wide_batch * heads * GROUP + query_head) * rows
            spreads = _spreads(
                k_ptr, power_base, token, real, token_strides, power_strides[2], D, D_PAD, COLS, TOKENS, LEVELS
            )
            counts = real.to(tl.float32)
            for e in tl.static_range(LEVELS):
                if e > 0:
                    counts = _halve_line(counts, TOKENS >> (e - 1))
                row = level_offset(e, blocks, block_n) + chunk * (TOKENS >> e) + tl.arange(0, TOKENS >> e)
                correction = tl.minimum(half_scale_squared * tl.maximum(spreads[e], 0.0), cap) * LOG2_E
                tl.store(bias_base + row, _log_counts(counts) + correction)
    if SIMILARITY:
        at = similarity_ptr + (tl.program_id(1).to(tl.int64) * blocks + chunk) * 3
        for e in tl.static_range(1, 4):
            first = chunk * TOKENS + (tl.arange(0, TOKENS >> e) << e)
            cosine = _cosine(k_ptr, first, first + (1 << e) - 1, length, token_strides, D, D_PAD)
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
    cols = pool_columns(dim)
    _pool_kernel[(blocks * (block_n // tokens), batch * heads, padded(dim) // cols)](
        k, v, key_mask, query_power, bias_cap, keys, values, counts, bias, cosines,
        k.stride(), v.stride(), 0 if key_mask is None else key_mask.stride(0),
        _strides(query_power, batch, heads * group), _strides(bias_cap, batch, heads * group),
        heads, length, blocks, rows, 0.5 * scale * scale,
        GROUP=group, D=dim, D_PAD=padded(dim), COLS=cols, block_n=block_n, TOKENS=tokens, LEVELS=levels,
        HAS_MASK=key_mask is not None, VARIANCE=query_power is not None, SIMILARITY=similarity,
        **pool_options(query_power is not None),
    )  # fmt: skip
    return Pyramid(length, keys, values, counts, bias, cosines)


def _strides(x: Tensor | None, batch: int, heads: int) -> tuple[int, ...]:
    """Strides of a tensor expanded over batch and heads; zeros for an absent one."""
    return (0, 0, 0) if x is None else x.expand(batch, heads, *x.shape[2:]).stride()

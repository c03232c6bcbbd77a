"""One pass over K and V: every level of the pyramid, how alike neighbouring keys are, and where real tokens begin."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import MAX_LEVEL
from .common import level_offset
from .tune import padded

PARTS = 8
"""Neighbouring tokens that one thread holds."""
SCAN = 4096
"""Tokens of a key mask that are looked at together."""


def pool_warps(tokens: int, cols: int) -> int:
    """Warps of the pooling kernel: each thread holds PARTS tokens of 8 channels."""
    return max(1, tokens * cols // (32 * 8 * PARTS))


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
        caps: uint8 [B, Hkv, N], log2 of what :func:`psa.similarity_cap` gives, or None.
        first_real: int32 [B], the first KV block with a real key, or None.
    """

    length: int
    keys: Tensor
    values: Tensor
    counts: Tensor
    bias: Tensor
    caps: Tensor | None = None
    first_real: Tensor | None = None


@triton.jit
def halve(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums of neighbouring rows: [ROWS, COLS] -> [ROWS / 2, COLS]."""
    return tl.sum(tl.reshape(x, (ROWS // 2, 2, COLS)), axis=1)


@triton.jit
def halve_parts(x):
    """The same of [PARTS, SLOTS, COLS], where row ``slot * PARTS + part`` has its neighbour in the same slot.

    A slot's parts lie in one thread's registers, so these sums take no other thread; a slot of one part is paired with
    the next slot.
    """
    PARTS: tl.constexpr = x.shape[0]
    SLOTS: tl.constexpr = x.shape[1]
    COLS: tl.constexpr = x.shape[2]
    if PARTS > 1:
        return tl.sum(tl.reshape(x, (PARTS // 2, 2, SLOTS, COLS)), axis=1)
    else:
        return tl.reshape(tl.sum(tl.reshape(x, (SLOTS // 2, 2, COLS)), axis=1), (1, SLOTS // 2, COLS))


@triton.jit
def halve_line(x, ROWS: tl.constexpr):
    """Sums of neighbours: [ROWS] -> [ROWS / 2]."""
    return tl.sum(tl.reshape(x, (ROWS // 2, 2)), axis=1)


@triton.jit
def load_tokens(base, token, real, col, strides, D: tl.constexpr):
    """Columns ``col`` of the tokens in float32, zeros where not ``real``."""
    offsets = token.to(tl.int64)[:, None] * strides[0] + col[None, :] * strides[1]
    return tl.load(base + offsets, mask=real[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _pool_side(
    x_ptr, rows_ptr, real, token, col, strides, chunk, blocks, D: tl.constexpr, block_n: tl.constexpr,
    PARTS: tl.constexpr, SLOTS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Means of a chunk's tokens, K's or V's, at every level; sums of 2h tokens come from sums of h, in float32.

    ``token``, ``real``: [PARTS, SLOTS], which tokens, and whether they exist and are not masked.
    """
    offsets = token.to(tl.int64)[:, :, None] * strides[0] + col[None, None, :] * strides[1]
    there = (col < D)[None, None, :]
    sums = tl.load(x_ptr + offsets, mask=real[:, :, None] & there, other=0.0).to(tl.float32)
    counts = real.to(tl.float32)[:, :, None]
    for e in tl.static_range(LEVELS):
        if e > 0:
            sums = halve_parts(sums)
            counts = halve_parts(counts)
        first = level_offset(e, blocks, block_n) + chunk * (PARTS * SLOTS >> e)
        _store_means(sums, counts, rows_ptr, first, col, D)


@triton.jit
def _store_means(sums, counts, rows_ptr, first, col, D: tl.constexpr):
    """Writes the rows from ``first`` on, as :func:`halve_parts` orders them."""
    PARTS: tl.constexpr = sums.shape[0]
    SLOTS: tl.constexpr = sums.shape[1]
    row = first + tl.arange(0, SLOTS)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]
    # One reciprocal per row: a division per element takes more instructions than everything else.
    means = (sums * (1.0 / tl.maximum(counts, 1.0))).to(rows_ptr.dtype.element_ty)
    there = tl.broadcast_to((col < D)[None, None, :], means.shape)
    tl.store(rows_ptr + row[:, :, None] * D + col[None, None, :], means, mask=there)


@triton.jit
def _are_real(mask_ptr, stride, token, length, HAS_MASK: tl.constexpr):
    """Whether tokens exist and are not masked."""
    real = token < length
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + token * stride, mask=real, other=0) != 0)
    return real


@triton.jit
def _first_real(mask_ptr, stride, length, SCAN: tl.constexpr):
    """The first real token; 0 where there is none."""
    found = length
    start = 0
    while (found == length) & (start < length):
        token = start + tl.arange(0, SCAN)
        real = tl.load(mask_ptr + token * stride, mask=token < length, other=0) != 0
        found = tl.min(tl.where(real, token, length))
        start += SCAN
    return tl.where(found == length, 0, found)


@triton.jit
def _last_real(mask_ptr, stride, stop, SCAN: tl.constexpr):
    """The last real token before ``stop``; 0 where there is none."""
    found = -1
    start = stop
    while (found < 0) & (start > 0):
        start -= SCAN
        token = start + tl.arange(0, SCAN)
        real = tl.load(mask_ptr + token * stride, mask=(token >= 0) & (token < stop), other=0) != 0
        found = tl.max(tl.where(real, token, -1))
    return tl.maximum(found, 0)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _cosines(base, first, last, strides, D: tl.constexpr, D_PAD: tl.constexpr):
    """Sum of the cosines of token pairs."""
    col = tl.arange(0, D_PAD)
    a = load_tokens(base, first, first >= 0, col, strides, D)
    b = load_tokens(base, last, last >= 0, col, strides, D)
    norms = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12) * tl.maximum(tl.sqrt(tl.sum(b * b, 1)), 1e-12)
    return tl.sum(tl.sum(a * b, 1) / norms)


@triton.jit
def _similarity_cap(
    k_ptr, mask_ptr, strides, mask_stride, thresholds, block, length, D: tl.constexpr, D_PAD: tl.constexpr,
    block_n: tl.constexpr, TOKENS: tl.constexpr, HAS_MASK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """log2 of the coarsest level whose mean cosine passes its threshold (METHOD §3), for one KV block.

    Tokens that are missing at the end, or masked, repeat the last real one before them.
    """
    zero = tl.zeros((), tl.float32)
    sums = (zero, zero, zero)
    for part in range(block_n // TOKENS):
        start = block * block_n + part * TOKENS
        if HAS_MASK:
            before = _last_real(mask_ptr, mask_stride, tl.minimum(start, length), SCAN)
            token = start + tl.arange(0, TOKENS)
            real = tl.load(mask_ptr + token * mask_stride, mask=token < length, other=0) != 0
            known = tl.associative_scan(tl.where(real, token, before), 0, _later)
        added = ()
        for e in tl.static_range(1, 4):
            if HAS_MASK:
                groups = tl.reshape(known, (TOKENS >> e, 1 << e))
                first, last = tl.min(groups, 1), tl.max(groups, 1)
            else:
                first = tl.minimum(start + (tl.arange(0, TOKENS >> e) << e), length - 1)
                last = tl.minimum(start + (tl.arange(0, TOKENS >> e) << e) + (1 << e) - 1, length - 1)
            added = added + (sums[e - 1] + _cosines(k_ptr, first, last, strides, D, D_PAD),)  # noqa: RUF005
        sums = added
    cap = 0
    for e in tl.static_range(1, 4):
        cap = tl.where(sums[e - 1] * (1 << e) / block_n > thresholds[e - 1], e, cap)
    return cap


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr, mask_ptr, keys_ptr, values_ptr, counts_ptr, caps_ptr, first_real_ptr,
    k_strides, v_strides, mask_strides, thresholds, heads, length, blocks, rows,
    D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr, block_n: tl.constexpr, TOKENS: tl.constexpr,
    LEVELS: tl.constexpr, HAS_MASK: tl.constexpr, SIMILARITY: tl.constexpr, FIRST_REAL: tl.constexpr,
    SCAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens and COLS channels of one KV head: K, then V; the first channels' also the rest.

    Grid (tokens / TOKENS, B * Hkv, channels / COLS).
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1) % heads
    wide_batch, wide_head = (tl.program_id(1) // heads).to(tl.int64), head.to(tl.int64)
    k_ptr += wide_batch * k_strides[0] + wide_head * k_strides[1]
    v_ptr += wide_batch * v_strides[0] + wide_head * v_strides[1]
    token_strides = (k_strides[2], k_strides[3])
    base = tl.program_id(1).to(tl.int64) * rows * D
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    SLOTS: tl.constexpr = TOKENS // PARTS
    token = chunk * TOKENS + tl.arange(0, SLOTS)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]
    if HAS_MASK:
        mask_ptr += wide_batch * mask_strides[0]
    real = _are_real(mask_ptr, mask_strides[1], token, length, HAS_MASK)
    _pool_side(
        k_ptr, keys_ptr + base, real, token, col, token_strides, chunk, blocks, D, block_n, PARTS, SLOTS, LEVELS,
    )  # fmt: skip
    _pool_side(
        v_ptr, values_ptr + base, real, token, col, (v_strides[2], v_strides[3]), chunk, blocks, D, block_n, PARTS,
        SLOTS, LEVELS,
    )  # fmt: skip
    if tl.program_id(2) != 0:
        return
    if HAS_MASK:
        counts_ptr += wide_batch * rows
        owns_counts = head == 0
    else:
        owns_counts = tl.program_id(1) == 0
    if owns_counts:
        in_line = chunk * TOKENS + tl.arange(0, TOKENS)
        counts = _are_real(mask_ptr, mask_strides[1], in_line, length, HAS_MASK).to(tl.float32)
        for e in tl.static_range(LEVELS):
            if e > 0:
                counts = halve_line(counts, TOKENS >> (e - 1))
            row = level_offset(e, blocks, block_n) + chunk * (TOKENS >> e) + tl.arange(0, TOKENS >> e)
            log_counts = tl.where(counts > 0, tl.log2(tl.maximum(counts, 1.0)), -float("inf"))
            tl.store(counts_ptr + row, log_counts)
        if FIRST_REAL:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next
            if chunk == 0:
                tl.store(first_real_ptr + wide_batch, _first_real(mask_ptr, mask_strides[1], length, SCAN) // block_n)
    if SIMILARITY:  # noqa: SIM102
        if chunk % (block_n // TOKENS) == 0:
            block = chunk // (block_n // TOKENS)
            cap = _similarity_cap(
                k_ptr, mask_ptr, token_strides, mask_strides[1], thresholds, block, length, D, D_PAD, block_n, TOKENS,
                HAS_MASK, SCAN,
            )  # fmt: skip
            tl.store(caps_ptr + tl.program_id(1).to(tl.int64) * blocks + block, cap.to(tl.uint8))


def build_pyramid(
    k: Tensor,
    v: Tensor,
    block_n: int,
    *,
    key_mask: Tensor | None = None,
    thresholds: dict[int, float] | None = None,
    first_real: bool = False,
) -> Pyramid:
    """Pools K and V at every level, in one launch; its bias is that of the counts.

    Args:
        k, v: [B, Hkv, L, D], any strides.
        key_mask: bool [B, L], any strides; masked tokens enter no mean and count as missing.
        thresholds: also each block's similarity cap, by these.
        first_real: also each batch item's first block with a real key, with a key mask.
    """
    batch, heads, length, dim = k.shape
    blocks = triton.cdiv(length, block_n)
    tokens = min(block_n, MAX_LEVEL)
    levels = tokens.bit_length()
    rows = blocks * (2 * block_n - ((2 * block_n) >> levels))
    new, cols = k.new_empty, pool_columns(dim)
    keys, values = new(batch, heads, rows, dim), new(batch, heads, rows, dim)
    counts = new(1 if key_mask is None else batch, rows, dtype=torch.float32)
    caps = None if thresholds is None else new(batch, heads, blocks, dtype=torch.uint8)
    first = new(batch, dtype=torch.int32) if first_real and key_mask is not None else None
    _pool_kernel[(blocks * (block_n // tokens), batch * heads, padded(dim) // cols)](
        k, v, key_mask, keys, values, counts, caps, first,
        k.stride(), v.stride(), (0, 1) if key_mask is None else key_mask.stride(),
        tuple((thresholds or {}).get(level, float("inf")) for level in (2, 4, 8)), heads, length, blocks, rows,
        D=dim, D_PAD=padded(dim), COLS=cols, block_n=block_n, TOKENS=tokens, LEVELS=levels,
        HAS_MASK=key_mask is not None, SIMILARITY=caps is not None, FIRST_REAL=first is not None, SCAN=SCAN,
        PARTS=PARTS, num_warps=pool_warps(tokens, cols),
    )  # fmt: skip
    return Pyramid(length, keys, values, counts, counts[:, None], caps, first)

"""Pooled importance on the device: one pass over the pooled keys per group of query blocks (METHOD §4c).

A program owns a few query blocks. It averages their queries, multiplies them with all pooled keys once, and writes each
block's sum of exponentials to a scratch that only it reads, relative to the running maximum of that moment. The true
maximum and denominator are known at the end of the pass, so a second walk over the scratch (an eighth of the logits, in
cache) turns the sums into importance: half the products and exponentials of a two-pass softmax.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .score import RowRules, encode_shares

LOG2E = math.log2(math.e)
MAX_ROWS = 64


@triton.jit
def _mean_queries(
    q_ptr,
    stride_l,
    stride_d,
    first_row,
    length_q,
    head_dim: tl.constexpr,
    ROWS: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Means over POOL consecutive query rows: float32 [ROWS, BLOCK_D], zeros where no row is real."""
    rows = first_row + tl.arange(0, ROWS).to(tl.int64) * POOL
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(POOL):
        real = (rows + i < length_q)[:, None] & (channels < head_dim)[None, :]
        offsets = (rows + i)[:, None] * stride_l + channels[None, :] * stride_d
        total += tl.load(q_ptr + offsets, mask=real, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(length_q - rows, 1), POOL)
    return total / count.to(tl.float32)[:, None]


@triton.jit
def _real_counts(mask_ptr, keys, length_k, COLS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Real tokens in each group of COLS keys: int32 [KEYS]."""
    if MASKED:
        tokens = keys[:, None] * COLS + tl.arange(0, COLS)[None, :]
        real = tl.load(mask_ptr + tokens, mask=tokens < length_k, other=0)
        return tl.sum((real != 0).to(tl.int32), axis=1)
    return tl.minimum(tl.maximum(length_k - keys * COLS, 0), COLS)


@triton.jit
def _importance_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    out_ptr,
    sums_ptr,
    peaks_ptr,
    first_real_ptr,
    q_strides: tl.constexpr,
    k_strides: tl.constexpr,
    mask_stride,
    length_q,
    length_k,
    blocks_m,
    blocks_n,
    work_items,
    text_length,
    scale_log2,
    exponent,
    head_dim: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POOL: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ENCODE: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
):
    PER_M: tl.constexpr = BLOCK_M // POOL
    PER_N: tl.constexpr = BLOCK_N // COLS
    TILE_M: tl.constexpr = ROWS // PER_M
    TILE_N: tl.constexpr = KEYS // PER_N
    slot = tl.program_id(0)
    row = tl.arange(0, ROWS)
    tiles = tl.cdiv(blocks_n, TILE_N)
    sums_ptr += slot.to(tl.int64) * ROWS * tiles * TILE_N
    peaks_ptr += slot.to(tl.int64) * ROWS * tiles
    groups_m = tl.cdiv(blocks_m, TILE_M)
    pooled_k = tl.cdiv(length_k, COLS)
    for item in range(slot, work_items, tl.num_programs(0)):
        # Causal work grows with the query block, so the longest items go first.
        group = groups_m - 1 - item % groups_m if CAUSAL else item % groups_m
        head = (item // groups_m % HEADS).to(tl.int64)
        batch = (item // groups_m // HEADS).to(tl.int64)
        first_row = group.to(tl.int64) * TILE_M * BLOCK_M
        queries = _mean_queries(
            q_ptr + batch * q_strides[0] + head * q_strides[1],
            q_strides[2],
            q_strides[3],
            first_row,
            length_q,
            head_dim,
            ROWS,
            POOL,
            BLOCK_D,
        ).to(k_ptr.dtype.element_ty)
        last_token = tl.minimum(first_row + (row + 1).to(tl.int64) * POOL, length_q) - 1 + length_k - length_q
        real_row = first_row + row * POOL < length_q
        stop = tiles
        if CAUSAL:
            last = tl.minimum(first_row + ROWS * POOL, length_q) - 1 + length_k - length_q
            stop = tl.minimum(tl.maximum(last // (BLOCK_N * TILE_N) + 1, 0), tiles).to(tl.int32)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        k_head = k_ptr + batch * k_strides[0] + (head // GROUPS) * k_strides[1]
        channels = tl.arange(0, BLOCK_D)
        for tile in range(0, stop):
            keys = tile * KEYS + tl.arange(0, KEYS)
            k_offsets = keys[None, :].to(tl.int64) * k_strides[2] + channels[:, None] * k_strides[3]
            in_range = (keys < pooled_k)[None, :] & (channels < head_dim)[:, None]
            pooled = tl.load(k_head + k_offsets, mask=in_range, other=0.0)
            count = _real_counts(mask_ptr + batch * mask_stride, keys, length_k, COLS, KEYS, MASKED)
            bias = tl.where(count > 0, tl.log2(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
            logits = tl.dot(queries, pooled, input_precision="ieee") * scale_log2 + bias[None, :]
            if CAUSAL:
                key_position = tl.minimum((keys + 1) * COLS, length_k) - 1
                logits = tl.where(key_position[None, :] <= last_token[:, None], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, axis=1))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            mass = tl.exp2(logits - safe[:, None])
            total = total * tl.exp2(peak - safe) + tl.sum(mass, axis=1)
            peak = new_peak
            per_block = tl.sum(tl.reshape(mass, (ROWS, TILE_N, PER_N)), axis=2)
            blocks = tile * TILE_N + tl.arange(0, TILE_N)
            tl.store(sums_ptr + row[:, None] * (tiles * TILE_N) + blocks[None, :], per_block)
            tl.store(peaks_ptr + row * tiles + tile, safe)
        tl.debug_barrier()
        seen = real_row & (total > 0)
        weight = tl.where(seen, 1.0 / tl.maximum(total, 1e-38), 0.0)
        peak = tl.where(seen, peak, 0.0)
        rows_seen = tl.sum(tl.reshape(seen.to(tl.float32), (TILE_M, PER_M)), axis=1)
        m = group * TILE_M + tl.arange(0, TILE_M)
        line = (batch * HEADS + head) * blocks_m + m
        for start in range(0, blocks_n, WIDTH):
            n = start + tl.arange(0, WIDTH)
            written = n < stop * TILE_N
            part = tl.load(sums_ptr + row[:, None] * (tiles * TILE_N) + n[None, :], mask=written[None, :], other=0.0)
            then = tl.load(peaks_ptr + row[:, None] * tiles + n[None, :] // TILE_N, mask=written[None, :], other=0.0)
            share = part * tl.exp2(then - peak[:, None]) * weight[:, None]
            share = tl.sum(tl.reshape(share, (TILE_M, PER_M, WIDTH)), axis=1) / tl.maximum(rows_seen, 1.0)[:, None]
            if ENCODE:
                share = encode_shares(
                    share,
                    (rows_seen > 0)[:, None],
                    head,
                    m[:, None],
                    n[None, :],
                    tl.load(first_real_ptr + batch) if MASKED else 0,
                    length_q,
                    length_k,
                    blocks_m,
                    blocks_n,
                    text_length,
                    exponent,
                    BLOCK_M,
                    BLOCK_N,
                    CAUSAL,
                    TEXT_FIRST,
                )
            inside = (m < blocks_m)[:, None] & (n < blocks_n)[None, :]
            tl.store(out_ptr + line[:, None] * blocks_n + n[None, :], share, mask=inside)
        tl.debug_barrier()


def importance(
    q: Tensor,
    pooled_k: Tensor,
    length_k: int,
    rules: RowRules,
    *,
    rows: int,
    cols: int,
    scale: float,
    key_mask: Tensor | None = None,
    encode: float | None = None,
) -> Tensor:
    """What :func:`psa.importance.importance` gives for ``"pooled"``: float32 [B, H, M, N], rows that sum to one or zero.

    Args:
        q: [B, H, Lq, D], any strides.
        pooled_k: [B, Hkv, ceil(length_k / cols), D], means over ``cols`` real keys (rows of the pyramid), any strides.
        rows, cols: query rows and key rows averaged into one.
        encode: return keys of proportional mode instead (see :func:`.score.encode_shares`), with this exponent.
    """
    batch, heads, length_q, head_dim = q.shape
    blocks_m, blocks_n = -(-length_q // rules.block_m), -(-length_k // rules.block_n)
    per_m, per_n = rules.block_m // rows, rules.block_n // cols
    tile_rows = max(per_m, MAX_ROWS)
    keys = max(per_n, 128 if head_dim <= 128 else 64)
    work = batch * heads * -(-blocks_m // (tile_rows // per_m))
    programs = min(work, 2 * _processors(q.device))
    tiles = -(-blocks_n * per_n // keys)
    out = torch.empty(batch, heads, blocks_m, blocks_n, dtype=torch.float32, device=q.device)
    sums = torch.empty(programs, tile_rows, tiles * keys // per_n, dtype=torch.float32, device=q.device)
    peaks = torch.empty(programs, tile_rows, tiles, dtype=torch.float32, device=q.device)
    masked = key_mask is not None
    _importance_kernel[(programs,)](
        q,
        pooled_k,
        key_mask.view(torch.uint8) if masked else q,
        out,
        sums,
        peaks,
        rules.first_real if rules.first_real is not None else q,
        q.stride(),
        pooled_k.stride(),
        key_mask.stride(0) if masked else 0,
        length_q,
        length_k,
        blocks_m,
        blocks_n,
        work,
        rules.text_length,
        scale * LOG2E,
        1.0 if encode is None else encode,
        head_dim,
        HEADS=heads,
        GROUPS=heads // pooled_k.shape[1],
        BLOCK_M=rules.block_m,
        BLOCK_N=rules.block_n,
        POOL=rows,
        COLS=cols,
        ROWS=tile_rows,
        KEYS=keys,
        WIDTH=64,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        CAUSAL=rules.is_causal,
        MASKED=masked,
        ENCODE=encode is not None,
        TEXT_FIRST=rules.text_first,
        num_warps=4,
        num_stages=3 if head_dim <= 128 else 2,
    )
    return out


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

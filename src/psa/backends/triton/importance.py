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

from .common import computed_once
from .rank import store_ranked_keys
from .score import RowRules, encode_shares, row_width
from .tune import padded

LOG2E = math.log2(math.e)
MAX_ROWS = 64
POOL_WARPS = 8
WIDTHS = {False: 64, True: 32}
"""KV blocks that the second walk takes at once; with ``rank_exponent``, whose sorting needs the registers."""


@triton.jit
def _sum_queries(
    q_ptr, stride_l, stride_d, left, head_dim: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr,
    BLOCK_D: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Sums over POOL consecutive query rows, or of their squares: float32 [ROWS, BLOCK_D]. ``left`` rows are real."""
    rows = tl.arange(0, ROWS) * POOL
    channels = tl.arange(0, BLOCK_D)
    offsets = rows[:, None] * stride_l + channels[None, :] * stride_d
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(POOL):
        real = (rows + i < left)[:, None] & (channels < head_dim)[None, :]
        queries = tl.load(q_ptr + offsets, mask=real, other=0.0).to(tl.float32)
        total += queries * queries if SQUARES else queries
        q_ptr += stride_l
    return total


@triton.jit
def _pool_keys_kernel(
    k_ptr, mask_ptr, pooled_ptr, k_strides, mask_strides, heads, length_k, pooled_rows,
    head_dim: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Means over POOL consecutive real keys, for plans made apart from attention. Grid (row tiles, B * Hkv)."""
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for i in range(POOL):
        token = rows.to(tl.int64) * POOL + i
        real = token < length_k
        if MASKED:
            at = batch * mask_strides[0] + token * mask_strides[1]
            real = real & (tl.load(mask_ptr + at, mask=real, other=0) != 0)
        offsets = token[:, None] * k_strides[2] + channels[None, :] * k_strides[3]
        inside = real[:, None] & (channels < head_dim)[None, :]
        total += tl.load(k_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        count += real.to(tl.float32)
    mean = (total * (1.0 / tl.maximum(count, 1.0))[:, None]).to(pooled_ptr.dtype.element_ty)
    at = (line * pooled_rows + rows)[:, None] * head_dim + channels[None, :]
    tl.store(pooled_ptr + at, mean, mask=(rows < pooled_rows)[:, None] & (channels < head_dim)[None, :])


@triton.jit
def _count_bias(mask_ptr, stride, keys, length_k, COLS: tl.constexpr, MASKED: tl.constexpr):
    """log2 of how many real tokens each group of COLS keys has; -inf where there are none."""
    if MASKED:
        tokens = keys[:, None] * COLS + tl.arange(0, COLS)[None, :]
        real = tl.load(mask_ptr + tokens * stride, mask=tokens < length_k, other=0)
        count = tl.sum((real != 0).to(tl.int32), axis=1)
        return computed_once(tl.where(count > 0, tl.log2(tl.maximum(count, 1).to(tl.float32)), float("-inf")))
    # Two numbers serve every key: as many logarithms as keys take more instructions than the products.
    whole = tl.log2(tl.full((), COLS, tl.float32))
    part = tl.log2(tl.maximum(length_k % COLS, 1).to(tl.float32))
    last = length_k // COLS
    return tl.where(keys < last, whole, tl.where((keys == last) & (length_k % COLS > 0), part, float("-inf")))


@triton.jit
def _importance_kernel(
    q_ptr, k_ptr, mask_ptr, out_ptr, sums_ptr, peaks_ptr, power_ptr, first_real_ptr, wanted_ptr,
    q_strides, k_strides, mask_strides, length_q, length_k, blocks_m, blocks_n, work_items, text_length,
    scale_log2, exponent, rank_exponent,
    head_dim: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOL: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ENCODE: tl.constexpr, TEXT_FIRST: tl.constexpr,
    POWER: tl.constexpr, RANKED: tl.constexpr, CHOOSY: tl.constexpr,
):  # fmt: skip
    """Grid: as many programs as run together; each takes every so many-th group of query blocks.

    With RANKED, which is the width of a whole row, keys take a block's place in its row into account. With POWER, the
    sums of the queries' squares are left behind, one per group: float32 [B, H, groups, D].
    """
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
        # 64-bit only to the first row: the rows of one program span little, and narrow offsets save registers.
        tile_q = q_ptr + batch * q_strides[0] + head * q_strides[1] + first_row * q_strides[2]
        left = (length_q - first_row).to(tl.int32)
        channels = tl.arange(0, BLOCK_D)
        if POWER:
            # A pass of its own: both sums at once take more registers than there are.
            squares = _sum_queries(tile_q, q_strides[2], q_strides[3], left, head_dim, ROWS, POOL, BLOCK_D, True)
            at = ((batch * HEADS + head) * groups_m + group) * head_dim
            tl.store(power_ptr + at + channels, tl.sum(squares, axis=0), mask=channels < head_dim)
        queries = _sum_queries(tile_q, q_strides[2], q_strides[3], left, head_dim, ROWS, POOL, BLOCK_D, False)
        averaged = tl.minimum(tl.maximum(left - row * POOL, 1), POOL)
        queries = (queries / averaged.to(tl.float32)[:, None]).to(k_ptr.dtype.element_ty)
        last_token = tl.minimum(first_row + (row + 1).to(tl.int64) * POOL, length_q) - 1 + length_k - length_q
        real_row = first_row + row * POOL < length_q
        stop = tiles
        if CAUSAL:
            last = tl.minimum(first_row + ROWS * POOL, length_q) - 1 + length_k - length_q
            stop = tl.minimum(tl.maximum(last // (BLOCK_N * TILE_N) + 1, 0), tiles).to(tl.int32)
        if CHOOSY:
            stop = tl.where(tl.load(wanted_ptr + batch * HEADS + head) != 0, stop, 0)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        k_head = k_ptr + batch * k_strides[0] + (head // GROUPS) * k_strides[1]
        k_offsets = tl.arange(0, KEYS)[:, None] * k_strides[2] + channels[None, :] * k_strides[3]
        for tile in range(0, stop):
            keys = tile * KEYS + tl.arange(0, KEYS)
            in_range = (keys < pooled_k)[:, None] & (channels < head_dim)[None, :]
            tile_ptr = k_head + tile * (KEYS * k_strides[2])
            pooled = tl.load(tile_ptr + k_offsets, mask=in_range, other=0.0)
            at_mask = mask_ptr + batch * mask_strides[0] if MASKED else mask_ptr
            bias = _count_bias(at_mask, mask_strides[1], keys, length_k, COLS, MASKED)
            logits = tl.dot(queries, tl.trans(pooled), input_precision="tf32x3") * scale_log2 + bias[None, :]
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
        first_real = tl.load(first_real_ptr + batch) if MASKED and CAUSAL and ENCODE else 0
        # [PER_M, TILE_M, WIDTH]: a block's rows lie in one thread's registers, and their sum takes no other.
        rows = (tl.arange(0, TILE_M)[None, :] * PER_M + tl.arange(0, PER_M)[:, None])[:, :, None]
        peak = tl.trans(tl.reshape(peak, (TILE_M, PER_M)))[:, :, None]
        weight = (tl.trans(tl.reshape(weight, (TILE_M, PER_M))) / tl.maximum(rows_seen, 1.0)[None, :])[:, :, None]
        for start in range(0, blocks_n, WIDTH):
            n = start + tl.arange(0, WIDTH)
            written = (n < stop * TILE_N)[None, None, :]
            part = tl.load(sums_ptr + rows * (tiles * TILE_N) + n[None, None, :], mask=written, other=0.0)
            then = tl.load(peaks_ptr + rows * tiles + (n // TILE_N)[None, None, :], mask=written, other=0.0)
            share = tl.sum(part * tl.exp2(then - peak) * weight, axis=0)
            if ENCODE and not RANKED:
                share = encode_shares(
                    share, (rows_seen > 0)[:, None], m[:, None], n[None, :], first_real, length_q, length_k, blocks_n,
                    text_length, exponent, BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST,
                )  # fmt: skip
            inside = (m < blocks_m)[:, None] & (n < blocks_n)[None, :]
            tl.store(out_ptr + line[:, None] * blocks_n + n[None, :], share, mask=inside)
        tl.debug_barrier()
        if ENCODE and RANKED:
            for block in range(group * TILE_M, tl.minimum((group + 1) * TILE_M, blocks_m)):
                _rank_row(
                    out_ptr + ((batch * HEADS + head) * blocks_m + block) * blocks_n, block, first_real, length_q,
                    length_k, blocks_n, text_length, exponent, rank_exponent, BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST,
                    RANKED,
                )  # fmt: skip


@triton.jit
def _rank_row(
    row_ptr, m, first_real, length_q, length_k, blocks_n, text_length, exponent, rank_exponent,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TEXT_FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Turns a row of importance, which this program has written, into keys."""
    n = tl.arange(0, WIDTH)
    weight = tl.load(row_ptr + n, mask=n < blocks_n, other=0.0)
    tl.debug_barrier()
    store_ranked_keys(
        weight, row_ptr, m, n, first_real, length_q, length_k, blocks_n, text_length, exponent, rank_exponent,
        BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST,
    )  # fmt: skip


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
    encode: tuple[float, float] | None = None,
    power: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """What :func:`psa.importance.importance` gives for ``"pooled"``: float32 [B, H, M, N], rows of sum one or zero.

    Args:
        q: [B, H, Lq, D], any strides.
        pooled_k: [B, Hkv, ceil(length_k / cols), D], means over ``cols`` real keys (rows of the pyramid), any strides.
        rows, cols: query rows and key rows averaged into one.
        encode: return keys of proportional mode instead (see :func:`.score.encode_shares`), with this exponent and
            rank exponent.
        power: float32 [B, H, :func:`power_parts`, D], takes the sums of the queries' squares.
        wanted: bool [B, H], heads that are to be scored; the others get 0.
    """
    batch, heads, length_q, head_dim = q.shape
    blocks_m, blocks_n = -(-length_q // rules.block_m), -(-length_k // rules.block_n)
    per_m, per_n = rules.block_m // rows, rules.block_n // cols
    single = q.dtype == torch.float32
    exponent, rank_exponent = encode or (1.0, 0.0)
    ranked = rank_exponent != 0.0
    extras = ranked or power is not None
    tile_rows, keys, warps, stages = tiling(rules.block_m, rules.block_n, rows, cols, head_dim, single, extras)
    work = batch * heads * -(-blocks_m // (tile_rows // per_m))
    programs = min(work, 2 * _processors(q.device))
    tiles = -(-blocks_n * per_n // keys)
    out = torch.empty(batch, heads, blocks_m, blocks_n, dtype=torch.float32, device=q.device)
    sums = torch.empty(programs, tile_rows, tiles * keys // per_n, dtype=torch.float32, device=q.device)
    peaks = torch.empty(programs, tile_rows, tiles, dtype=torch.float32, device=q.device)
    masked = key_mask is not None
    _importance_kernel[(programs,)](
        q, pooled_k, key_mask.view(torch.uint8) if masked else None, out, sums, peaks, power, rules.first_real,
        wanted.contiguous().view(torch.uint8) if wanted is not None else None,
        q.stride(), pooled_k.stride(), key_mask.stride() if masked else (0, 1), length_q, length_k, blocks_m, blocks_n,
        work, rules.text_length, scale * LOG2E, exponent, rank_exponent,
        head_dim, HEADS=heads, GROUPS=heads // pooled_k.shape[1], BLOCK_M=rules.block_m, BLOCK_N=rules.block_n,
        POOL=rows, COLS=cols, ROWS=tile_rows, KEYS=keys, WIDTH=WIDTHS[ranked], BLOCK_D=padded(head_dim),
        CAUSAL=rules.is_causal, MASKED=masked, ENCODE=encode is not None, TEXT_FIRST=rules.text_first,
        POWER=power is not None, RANKED=row_width(blocks_n) if ranked else 0,
        CHOOSY=wanted is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def power_parts(length_q: int, block_m: int, rows: int) -> int:
    """Groups of query blocks whose squares :func:`importance` sums."""
    return -(-length_q // (max(block_m // rows, MAX_ROWS) * rows))


def pool_keys(k: Tensor, cols: int, key_mask: Tensor | None = None) -> Tensor:
    """Means over ``cols`` consecutive real keys: [B, Hkv, Lk, D] -> [B, Hkv, ceil(Lk / cols), D], in the dtype of k."""
    batch, heads, length, dim = k.shape
    pooled = k.new_empty(batch, heads, -(-length // cols), dim)
    masked = key_mask is not None
    _pool_keys_kernel[(triton.cdiv(pooled.shape[2], 64), batch * heads)](
        k, key_mask.view(torch.uint8) if masked else None, pooled, k.stride(), key_mask.stride() if masked else (0, 1),
        heads, length, pooled.shape[2],
        head_dim=dim, POOL=cols, ROWS=64, BLOCK_D=padded(dim), MASKED=masked, num_warps=POOL_WARPS,
    )  # fmt: skip
    return pooled


def tiling(
    block_m: int, block_n: int, rows: int, cols: int, dim: int, single: bool, extras: bool
) -> tuple[int, int, int, int]:
    """Pooled query rows and pooled keys per tile, warps, and pipeline stages.

    ``single``: float32 operands, of which wide ones fill the shared memory of smaller GPUs; ``extras``: rows are sorted
    or squares summed, which spills with 4 warps.
    """
    tile_rows = max(block_m // rows, MAX_ROWS)
    wide = single and dim > 64
    keys = max(block_n // cols, 16 if wide else 32 if single else 64)
    return tile_rows, keys, max(8 if single or extras or dim > 128 else 4, tile_rows // 16), 1 if wide else 2


def shared_bytes(block_m: int, block_n: int, rows: int, cols: int, dim: int, single: bool) -> int:
    """About what a tile takes of shared memory; float32 operands are split in three for the tensor cores."""
    tile_rows, keys, _, stages = tiling(block_m, block_n, rows, cols, dim, single, False)
    return (tile_rows + stages * keys) * padded(dim) * (7 if single else 2)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

"""Gradients of the pyramid's rows over their readers, and of the tokens through every row they were averaged into."""

import triton
import triton.language as tl

from .common import (
    LN_2,
    LOG2_E,
    hidden_rows,
    inside,
    lane_bias,
    level_offset,
    load_rows,
    query_tile,
)
from .transposed import tile_of_level


@triton.jit
def _store_tokens(
    grad, pooled_ptr, counts_ptr, base, strides, first, length, blocks, rows, SIDE: tl.constexpr,
    block_n: tl.constexpr, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Adds to level-1 gradients those of the rows that each token was averaged into, divided by their counts."""
    token = first + tl.arange(0, BLOCK_N)
    there = token < length
    exists = inside(first, length, BLOCK_N, D, D_PAD)
    pooled_rows = rows - blocks * block_n
    head = (tl.num_programs(1) * SIDE + tl.program_id(1)).to(tl.int64)
    pooled_ptr += head * pooled_rows * D
    for e in tl.range(1, LEVELS, num_stages=1):
        row = level_offset(e, blocks, block_n) + (token >> e)
        share = tl.exp2(-tl.load(counts_ptr + row, mask=there, other=0.0))
        offsets = (row - blocks * block_n)[:, None] * D + tl.arange(0, D_PAD)[None, :]
        pooled = tl.load(pooled_ptr + offsets, mask=exists, other=0.0)
        grad += pooled * tl.where(share == float("inf"), 0.0, share)[:, None]
    real = tl.load(counts_ptr + token, mask=there, other=-float("inf")) > -0.5
    grad = tl.where(real[:, None], grad, 0.0)
    tl.store(query_tile(base, first, strides, BLOCK_N, D_PAD), grad.to(base.dtype.element_ty), mask=exists)


@triton.jit
def _psa_bwd_dkv_kernel(
    q_ptr, keys_ptr, values_ptr, counts_ptr, bias_ptr, levels_ptr, pair_ptr, lists_ptr, sizes_ptr,
    grad_out_ptr, log2_lse_ptr, delta_ptr, pooled_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, grad_out_strides, grad_k_strides, grad_v_strides, list_strides, level_strides, bias_strides,
    pair_strides, counts_stride, heads, length_q, length_k, query_blocks, blocks, rows, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, ROW_BIAS: tl.constexpr, PAIR_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    POOLED: tl.constexpr,
):  # fmt: skip
    """dk̄ and dv̄ of BLOCK_N pyramid rows of one level and KV head, summed over the group's heads and their readers.

    Grid (tiles of the pooled levels, or of level 1, B * Hkv). The pooled launch leaves float32 [2, B * Hkv, R', D]
    behind; the launch for level 1 adds those and writes dk and dv.
    """
    tile = tl.program_id(0)
    if POOLED:
        tile += tl.cdiv(blocks * block_n, BLOCK_N)
    level, place = tile_of_level(tile, blocks, block_n, BLOCK_N, LEVELS)
    kv_heads = heads // GROUP
    kv_head = tl.program_id(1) % kv_heads
    wide_batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    row = place * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = blocks * (block_n >> level) - place * BLOCK_N
    there = tl.arange(0, BLOCK_N) < lanes
    at = level_offset(level, blocks, block_n) + row
    block = row >> (LOG2_BLOCK - level)
    base = tl.program_id(1).to(tl.int64) * rows * D
    keys = load_rows(keys_ptr + base, at, lanes, BLOCK_N, D, D_PAD)
    values = load_rows(values_ptr + base, at, lanes, BLOCK_N, D, D_PAD)
    grad_keys = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    grad_values = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    query = tl.arange(0, BLOCK_M)
    STEPS: tl.constexpr = block_m // BLOCK_M

    for g in range(GROUP):
        head = (kv_head * GROUP + g).to(tl.int64)
        q_base = q_ptr + wide_batch * q_strides[0] + head * q_strides[1]
        grad_base = grad_out_ptr + wide_batch * grad_out_strides[0] + head * grad_out_strides[1]
        row_base = (wide_batch * heads + head) * length_q
        bias_base = bias_ptr + wide_batch * bias_strides[0] + head * bias_strides[1]
        bias = lane_bias(level, block, row, lanes, bias_base, pair_ptr, blocks, block_n, BLOCK_N, ROW_BIAS, False)
        line = wide_batch * list_strides[0] + head * list_strides[1] + tile
        list_base = lists_ptr + line * query_blocks
        pair_base = levels_ptr + wide_batch * level_strides[0] + head * level_strides[1]
        if PAIR_BIAS:
            pair_bias_base = pair_ptr + wide_batch * pair_strides[0] + head * pair_strides[1]
        steps = tl.load(sizes_ptr + line) * STEPS
        reader = tl.load(list_base, mask=steps > 0, other=0).to(tl.int32)
        for i in range(steps):
            first = reader * block_m + (i % STEPS) * BLOCK_M
            exists = inside(first, length_q, BLOCK_M, D, D_PAD)
            q = tl.load(query_tile(q_base, first, (q_strides[2], q_strides[3]), BLOCK_M, D_PAD), exists, other=0.0)
            grad_tile = query_tile(grad_base, first, (grad_out_strides[2], grad_out_strides[3]), BLOCK_M, D_PAD)
            grad_out = tl.load(grad_tile, mask=exists, other=0.0)
            log2_lse = tl.load(
                log2_lse_ptr + row_base + first + query, mask=first + query < length_q, other=float("inf")
            )
            delta = tl.load(delta_ptr + row_base + first + query, mask=first + query < length_q, other=0.0)
            pair = reader.to(tl.int64) * blocks + block
            lane = bias
            if POOLED and PAIR_BIAS:
                lane += tl.load(pair_bias_base + pair, mask=there, other=0.0).to(tl.float32) * LOG2_E
            if POOLED or block_n < BLOCK_N:
                read_as = tl.load(pair_base + pair, mask=there, other=0).to(tl.int32)
                lane = tl.where(read_as == (1 << level), lane, -float("inf"))
            reader = tl.load(list_base + (i + 1) // STEPS, mask=i + 1 < steps, other=0).to(tl.int32)
            products = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
            scores = products * scale_log2 + lane[:, None]
            if CAUSAL:
                hidden = hidden_rows(level, row, first + query + length_k - length_q, length_k)
                scores = tl.where(tl.trans(hidden), -float("inf"), scores)
            weights = tl.exp2(scores - log2_lse[None, :])
            grad_values = tl.dot(weights.to(q.dtype), grad_out, grad_values, input_precision=PRECISION)
            grad_weights = tl.dot(values, tl.trans(grad_out), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            grad_keys = tl.dot(grad_scores.to(q.dtype), q, grad_keys, input_precision=PRECISION)

    grad_keys *= scale_log2 * LN_2
    if POOLED:
        pooled_rows = rows - blocks * block_n
        offsets = (at - blocks * block_n)[:, None] * D + tl.arange(0, D_PAD)[None, :]
        stored = there[:, None] & (tl.arange(0, D_PAD) < D)[None, :]
        side = tl.num_programs(1).to(tl.int64) * pooled_rows * D
        pooled_ptr += tl.program_id(1).to(tl.int64) * pooled_rows * D
        tl.store(pooled_ptr + offsets, grad_keys, mask=stored)
        tl.store(pooled_ptr + side + offsets, grad_values, mask=stored)
    else:
        counts_ptr += wide_batch * counts_stride
        token = place * BLOCK_N
        k_base = grad_k_ptr + wide_batch * grad_k_strides[0] + kv_head.to(tl.int64) * grad_k_strides[1]
        v_base = grad_v_ptr + wide_batch * grad_v_strides[0] + kv_head.to(tl.int64) * grad_v_strides[1]
        _store_tokens(
            grad_keys, pooled_ptr, counts_ptr, k_base, (grad_k_strides[2], grad_k_strides[3]),
            token, length_k, blocks, rows, 0, block_n, BLOCK_N, LEVELS, D, D_PAD,
        )  # fmt: skip
        _store_tokens(
            grad_values, pooled_ptr, counts_ptr, v_base, (grad_v_strides[2], grad_v_strides[3]),
            token, length_k, blocks, rows, 1, block_n, BLOCK_N, LEVELS, D, D_PAD,
        )  # fmt: skip

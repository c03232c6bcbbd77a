"""Attention of query blocks over the pyramid rows that their lists name (METHOD §2), in one online softmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Selection
from .call import Call, prepare
from .common import (
    LN_2,
    finite_softmax_update,
    head_tile,
    hidden_rows,
    inside,
    lane_bias,
    level_offset,
    level_table,
    load_rows,
    load_whole,
    online_softmax_update,
    program_of_queries,
    rows_of_tile,
    whole_rows,
    whole_tiles,
)
from .tune import Launch


@triton.jit
def _psa_fwd_kernel(
    q_ptr, keys_ptr, values_ptr, bias_ptr, blocks_ptr, ends_ptr, pair_ptr, out_ptr, lse_ptr,
    q_strides, out_strides, list_strides, bias_strides, pair_strides,
    heads, length_q, length_k, blocks, rows, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ROW_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M query rows of one head. Grid (query tiles, B * H).

    First the whole level-1 tiles, which need neither bias nor mask, then every other row of the list.
    """
    tile, wide_batch, wide_head, keys_ptr, values_ptr, bias_ptr, list_ptr, ends_ptr, pair_line = program_of_queries(
        keys_ptr, values_ptr, bias_ptr, blocks_ptr, ends_ptr, list_strides, bias_strides, pair_strides,
        heads, blocks, rows, GROUP, D, block_m, LEVELS, BLOCK_M, CAUSAL,
    )  # fmt: skip
    if PAIR_BIAS:
        pair_ptr += pair_line
    first_row = tile * BLOCK_M
    query_row = first_row + tl.arange(0, BLOCK_M)
    position = query_row + length_k - length_q
    exists = inside(first_row, length_q, BLOCK_M, D, D_PAD)
    q = tl.load(head_tile(q_ptr, q_strides, wide_batch, wide_head, first_row, BLOCK_M, D_PAD), exists, other=0.0)
    running_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)

    done = 0
    if not HAS_MASK:
        first_position = first_row + length_k - length_q
        done = whole_tiles(list_ptr, ends_ptr, first_position, length_k, CAUSAL, block_n, WHOLE_N)
        first = whole_rows(0, list_ptr, done, block_n, LOG2_BLOCK, WHOLE_N)
        for t in range(done):
            keys = load_whole(keys_ptr, first, block_n, WHOLE_N, D, D_PAD)
            products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            values = load_whole(values_ptr, first, block_n, WHOLE_N, D, D_PAD)
            first = whole_rows(t + 1, list_ptr, done, block_n, LOG2_BLOCK, WHOLE_N)
            weights, shrink, running_max, running_sum = finite_softmax_update(
                products, scale_log2, running_max, running_sum
            )
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)

    tile_ends, shifts, last_positions = level_table(ends_ptr, done * WHOLE_N, block_n, BLOCK_N, LEVELS)
    level, block, row, lanes = rows_of_tile(0, list_ptr, tile_ends, shifts, last_positions, LOG2_BLOCK, BLOCK_N, LEVELS)
    for t in range(tile_ends[LEVELS - 1]):
        at = level_offset(level, blocks, block_n) + row
        keys = load_rows(keys_ptr, at, lanes, BLOCK_N, D, D_PAD)
        products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        values = load_rows(values_ptr, at, lanes, BLOCK_N, D, D_PAD)
        bias = lane_bias(level, block, row, lanes, bias_ptr, pair_ptr, blocks, block_n, BLOCK_N, ROW_BIAS, PAIR_BIAS)
        scores = products * scale_log2 + bias[None, :]
        if CAUSAL:
            scores = tl.where(hidden_rows(level, row, position, length_k), -float("inf"), scores)
        level, block, row, lanes = rows_of_tile(
            t + 1, list_ptr, tile_ends, shifts, last_positions, LOG2_BLOCK, BLOCK_N, LEVELS
        )
        weights, shrink, running_max, running_sum = online_softmax_update(scores, running_max, running_sum)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)

    out = acc * (1.0 / tl.where(running_sum > 0, running_sum, 1.0))[:, None]
    lse = tl.where(running_sum > 0, (running_max + tl.log2(tl.maximum(running_sum, 1e-30))) * LN_2, -float("inf"))
    out_tile = head_tile(out_ptr, out_strides, wide_batch, wide_head, first_row, BLOCK_M, D_PAD)
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=exists)
    lse_row = tl.program_id(1).to(tl.int64) * length_q + query_row
    tl.store(lse_ptr + lse_row, lse, mask=query_row < length_q)


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """out [B, H, Lq, D] in the dtype of q, lse float32 [B, H, Lq] (natural log). Three launches, no sync."""
    return attend(prepare(q, k, v, selection))


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """The last of the three launches: attention over a pyramid and lists that are already there."""
    q = call.q
    batch, heads, length_q, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, length_q, dtype=torch.float32)

    def run(launch: Launch) -> None:
        constants = call.constants()
        constants["ROW_BIAS"] |= launch.reads_bias
        _psa_fwd_kernel[(triton.cdiv(length_q, launch.BLOCK_M), batch * heads)](
            q, *call.tensors(), out, lse, q.stride(), out.stride(), *call.strides(), *call.sizes(),
            **constants, **launch.options(),
        )  # fmt: skip

    call.run("forward", run)
    return out, lse

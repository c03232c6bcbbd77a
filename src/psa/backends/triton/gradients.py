"""Gradients: of the queries over the same lists as forward, of the pyramid's rows over transposed ones, no atomics.

With ``p = exp(s - lse)``: ``dv̄ = pᵀ·do``, ``ds = p (do·v̄ᵀ - delta)``, ``delta = Σ_d do·out - dlse``,
``dq = scale · ds·k̄``, ``dk̄ = scale · dsᵀ·q``; a token's gradient is the sum over levels of its row's divided by the
row's number of real tokens. Biases are constants.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Selection
from .call import Call, broadcast_strides, prepare
from .common import (
    LN_2,
    LOG2_E,
    head_tile,
    hidden_rows,
    inside,
    lane_bias,
    level_offset,
    level_table,
    load_rows,
    load_whole,
    program_of_queries,
    rows_of_tile,
    whole_rows,
    whole_tiles,
)
from .rows import _psa_bwd_dkv_kernel
from .transposed import readers, tile_count
from .tune import Launch, padded

ROW_CONSTANTS = (
    "GROUP", "D", "D_PAD", "block_m", "block_n", "LOG2_BLOCK", "LEVELS", "CAUSAL", "ROW_BIAS", "PAIR_BIAS", "PRECISION",
)  # fmt: skip


@triton.jit
def _psa_bwd_delta_kernel(
    grad_out_ptr, grad_lse_ptr, out_ptr, lse_ptr, delta_ptr, log2_lse_ptr, grad_strides, out_strides, lse_strides,
    heads, length, HAS_GRAD_LSE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta of each query row, and its lse in units of log2, +inf for rows that keep nothing (so that p = 0)."""
    first = tl.program_id(0) * BLOCK_M
    wide_batch, wide_head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    exists = inside(first, length, BLOCK_M, D, D_PAD)
    grad_tile = head_tile(grad_out_ptr, grad_strides, wide_batch, wide_head, first, BLOCK_M, D_PAD)
    out_tile = head_tile(out_ptr, out_strides, wide_batch, wide_head, first, BLOCK_M, D_PAD)
    grad = tl.load(grad_tile, mask=exists, other=0.0).to(tl.float32)
    out = tl.load(out_tile, mask=exists, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    at = tl.program_id(1).to(tl.int64) * length + row
    lse = tl.load(lse_ptr + at, mask=row < length, other=-float("inf"))
    if HAS_GRAD_LSE:
        lse_base = grad_lse_ptr + wide_batch * lse_strides[0] + wide_head * lse_strides[1]
        delta -= tl.load(lse_base + row.to(tl.int64) * lse_strides[2], mask=row < length, other=0.0).to(tl.float32)
    empty = lse == -float("inf")
    tl.store(delta_ptr + at, tl.where(empty, 0.0, delta), mask=row < length)
    tl.store(log2_lse_ptr + at, tl.where(empty, float("inf"), lse * LOG2_E), mask=row < length)


@triton.jit
def _psa_bwd_dq_kernel(
    q_ptr, keys_ptr, values_ptr, bias_ptr, blocks_ptr, ends_ptr, pair_ptr, grad_out_ptr, log2_lse_ptr, delta_ptr,
    grad_q_ptr, q_strides, grad_out_strides, grad_q_strides, list_strides, bias_strides, pair_strides,
    heads, length_q, length_k, blocks, rows, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ROW_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query rows; the walk over the list is forward's."""
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
    grad_tile = head_tile(grad_out_ptr, grad_out_strides, wide_batch, wide_head, first_row, BLOCK_M, D_PAD)
    grad_out = tl.load(grad_tile, mask=exists, other=0.0)
    row_base = tl.program_id(1).to(tl.int64) * length_q + query_row
    log2_lse = tl.load(log2_lse_ptr + row_base, mask=query_row < length_q, other=float("inf"))
    delta = tl.load(delta_ptr + row_base, mask=query_row < length_q, other=0.0)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)

    done = 0
    if not HAS_MASK:
        first_position = first_row + length_k - length_q
        done = whole_tiles(list_ptr, ends_ptr, first_position, length_k, CAUSAL, block_n, WHOLE_N)
        first = whole_rows(0, list_ptr, done, block_n, LOG2_BLOCK, WHOLE_N)
        for t in range(done):
            keys = load_whole(keys_ptr, first, block_n, WHOLE_N, D, D_PAD)
            values = load_whole(values_ptr, first, block_n, WHOLE_N, D, D_PAD)
            first = whole_rows(t + 1, list_ptr, done, block_n, LOG2_BLOCK, WHOLE_N)
            products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            grad_weights = tl.dot(grad_out, tl.trans(values), input_precision=PRECISION)
            weights = tl.exp2(products * scale_log2 - log2_lse[:, None])
            grad_scores = weights * (grad_weights - delta[:, None])
            acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    tile_ends, shifts, last_positions = level_table(ends_ptr, done * WHOLE_N, block_n, BLOCK_N, LEVELS)
    level, block, row, lanes = rows_of_tile(0, list_ptr, tile_ends, shifts, last_positions, LOG2_BLOCK, BLOCK_N, LEVELS)
    for t in range(tile_ends[LEVELS - 1]):
        at = level_offset(level, blocks, block_n) + row
        keys = load_rows(keys_ptr, at, lanes, BLOCK_N, D, D_PAD)
        values = load_rows(values_ptr, at, lanes, BLOCK_N, D, D_PAD)
        bias = lane_bias(level, block, row, lanes, bias_ptr, pair_ptr, blocks, block_n, BLOCK_N, ROW_BIAS, PAIR_BIAS)
        products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        grad_weights = tl.dot(grad_out, tl.trans(values), input_precision=PRECISION)
        scores = products * scale_log2 + bias[None, :]
        if CAUSAL:
            scores = tl.where(hidden_rows(level, row, position, length_k), -float("inf"), scores)
        level, block, row, lanes = rows_of_tile(
            t + 1, list_ptr, tile_ends, shifts, last_positions, LOG2_BLOCK, BLOCK_N, LEVELS
        )
        weights = tl.exp2(scores - log2_lse[:, None])
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    grad_q_tile = head_tile(grad_q_ptr, grad_q_strides, wide_batch, wide_head, first_row, BLOCK_M, D_PAD)
    tl.store(grad_q_tile, (acc * (scale_log2 * LN_2)).to(grad_q_ptr.dtype.element_ty), mask=exists)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v. Seven launches, no sync, no atomics: the same bits every time."""
    call = prepare(q, k, v, selection)
    delta, log2_lse = _delta(grad_out, grad_lse, out, lse)
    grad_q = _grad_queries(call, grad_out, log2_lse, delta)
    return grad_q, *_grad_rows(call, k, v, grad_out, log2_lse, delta)


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = out.shape
    delta = out.new_empty(batch, heads, length, dtype=torch.float32)
    log2_lse = torch.empty_like(delta)
    _psa_bwd_delta_kernel[(triton.cdiv(length, 64), batch * heads)](
        grad_out, grad_lse, out, lse.contiguous(), delta, log2_lse, grad_out.stride(), out.stride(),
        (0, 0, 0) if grad_lse is None else grad_lse.stride(), heads, length,
        HAS_GRAD_LSE=grad_lse is not None, D=dim, D_PAD=padded(dim), BLOCK_M=64, num_warps=4,
    )  # fmt: skip
    return delta, log2_lse


def _grad_queries(call: Call, grad_out: Tensor, log2_lse: Tensor, delta: Tensor) -> Tensor:
    q = call.q
    grad_q = q.new_empty(q.shape)

    def run(launch: Launch) -> None:
        _psa_bwd_dq_kernel[(triton.cdiv(q.shape[2], launch.BLOCK_M), q.shape[0] * q.shape[1])](
            q, *call.tensors(), grad_out, log2_lse, delta, grad_q, q.stride(), grad_out.stride(), grad_q.stride(),
            *call.strides(), *call.sizes(), **call.constants(), **launch.options(),
        )  # fmt: skip

    call.run("grad_queries", run)
    return grad_q


def _grad_rows(
    call: Call, k: Tensor, v: Tensor, grad_out: Tensor, log2_lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    q, pyramid, levels = call.q, call.pyramid, call.selection.levels.contiguous()
    grad_k, grad_v, constants = k.new_empty(k.shape), v.new_empty(v.shape), call.constants()
    block_n, count = call.selection.block_n, constants["LEVELS"]
    heads, length_q, length_k, blocks, rows, scale_log2 = call.sizes()
    batch_heads = k.shape[0] * k.shape[1]
    pooled = q.new_empty(2, batch_heads, rows - blocks * block_n, k.shape[-1], dtype=torch.float32)
    _, bias_strides, pair_strides = call.strides()

    def run(launch: Launch) -> None:
        lists, sizes = readers(levels, block_n, launch.BLOCK_N, count)
        list_strides = broadcast_strides(lists, lists.shape[-1])
        whole = tile_count(blocks, block_n, launch.BLOCK_N, 1)
        for first, tiles in ((True, lists.shape[2] - whole), (False, whole)):
            _psa_bwd_dkv_kernel[(tiles, batch_heads)](
                q, pyramid.keys, pyramid.values, pyramid.counts, pyramid.bias, levels, call.tensors()[-1], lists,
                sizes, grad_out, log2_lse, delta, pooled, grad_k, grad_v,
                q.stride(), grad_out.stride(), grad_k.stride(), grad_v.stride(), list_strides,
                broadcast_strides(levels), bias_strides, pair_strides, 0 if pyramid.counts.shape[0] == 1 else rows,
                heads, length_q, length_k, lists.shape[-1], blocks, rows, scale_log2,
                **{name: constants[name] for name in ROW_CONSTANTS}, POOLED=first,
                BLOCK_M=launch.BLOCK_M, BLOCK_N=launch.BLOCK_N, num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )  # fmt: skip

    call.run("grad_rows", run)
    return grad_k, grad_v

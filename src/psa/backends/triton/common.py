"""What the attention kernels share: where a tile's rows lie, how they are read, and the online softmax.

Pyramid rows lie level by level, whole blocks at every level (a short last block is padded with rows of bias -inf):
row ``g`` of block ``n`` at level ``2**e`` is ``level_offset(e) + n * (block_n >> e) + g``. A query block's packed list
starts every level at a tile boundary, so that a tile's level is one scalar and a lane's row costs a handful of integer
instructions; inside a level, blocks follow each other without a gap, however few rows each has.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"))


@triton.jit
def computed_once(x):
    """The same values; keeps the compiler from recomputing them in every layout that uses them.

    A matrix fragment's column vector is replicated over 8 threads of each warp: recomputing a lane's index chain there
    costs 16 copies of it per thread, where moving the result costs two instructions.
    """
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def level_offset(level, blocks, block_n: tl.constexpr):
    """First row of level ``2**level`` in the pyramid."""
    return blocks * (2 * block_n - ((2 * block_n) >> level))


@triton.jit
def level_table(ends_ptr, done, block_n: tl.constexpr, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """Per level, as tuples of scalars: the tile it ends before, its position shift, and the position it ends at.

    The first ``done`` rows of level 1 are left out. Position ``p = t * BLOCK_N + lane + shift`` counts rows as if the
    whole list were of that level, so ``p // (rows per block)`` is the list entry and the rest is the row in the block.
    """
    tile_ends, shifts, last_positions = (), (), ()
    tiles = 0
    first = done
    for e in tl.static_range(LEVELS):
        entries = tl.load(ends_ptr + e)
        shifts = shifts + (first - tiles * BLOCK_N,)  # noqa: RUF005 - Triton has no starred tuples
        tiles += tl.cdiv(entries * (block_n >> e) - first, BLOCK_N)
        tile_ends = tile_ends + (tiles,)  # noqa: RUF005
        last_positions = last_positions + (entries * (block_n >> e),)  # noqa: RUF005
        first = entries * (block_n >> (e + 1))
    return tile_ends, shifts, last_positions


@triton.jit
def tile_level(t, tile_ends, shifts, last_positions, LEVELS: tl.constexpr):
    """Level index, position shift and last position of tile ``t``: scalars."""
    level = 0
    shift, last_position = shifts[0], last_positions[0]
    for e in tl.static_range(1, LEVELS):
        past = t >= tile_ends[e - 1]
        level = tl.where(past, e, level)
        shift = tl.where(past, shifts[e], shift)
        last_position = tl.where(past, last_positions[e], last_position)
    return level, shift, last_position


@triton.jit
def rows_of_tile(
    t, list_ptr, tile_ends, shifts, last_positions, LOG2_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Tile ``t`` of a packed list: its level index, each lane's KV block, row within the level, and how many lanes."""
    level, shift, last_position = tile_level(t, tile_ends, shifts, last_positions, LEVELS)
    log2_rows = LOG2_BLOCK - level
    start = t * BLOCK_N + shift
    lanes = last_position - start
    lane = tl.arange(0, BLOCK_N)
    position = start + lane
    block = tl.load(list_ptr + (position >> log2_rows), mask=lane < lanes, other=0)
    row = (block << log2_rows) + (position & ((1 << log2_rows) - 1))
    return level, block, row, lanes


@triton.jit
def load_rows(base, row, lanes, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of a contiguous [rows, D] buffer: [BLOCK_N, D_PAD], zeros from lane ``lanes`` on and beyond D."""
    cols = tl.arange(0, D_PAD)
    offsets = row[:, None] * D + cols[None, :]
    valid = (tl.arange(0, BLOCK_N) < lanes)[:, None]
    if D == D_PAD:
        return tl.load(base + offsets, mask=valid, other=0.0)
    return tl.load(base + offsets, mask=valid & (cols < D)[None, :], other=0.0)


@triton.jit
def query_tile(base, first, strides, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """Pointers [ROWS, D_PAD] to rows of one strided head; only a scalar depends on ``first``, so loops stay lean."""
    offsets = tl.arange(0, ROWS)[:, None] * strides[0] + tl.arange(0, D_PAD)[None, :] * strides[1]
    return base + first.to(tl.int64) * strides[0] + offsets


@triton.jit
def head_tile(base, strides, batch, head, first, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """The same of a strided [B, H, L, D], for one of its heads."""
    return query_tile(base + batch * strides[0] + head * strides[1], first, (strides[2], strides[3]), ROWS, D_PAD)


@triton.jit
def inside(first, length, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Which elements of such a tile exist: [ROWS, D_PAD]."""
    rows = (tl.arange(0, ROWS) < length - first)[:, None]
    if D == D_PAD:
        return tl.broadcast_to(rows, (ROWS, D_PAD))
    return rows & (tl.arange(0, D_PAD) < D)[None, :]


@triton.jit
def program_of_queries(
    keys_ptr, values_ptr, bias_ptr, blocks_ptr, ends_ptr, list_strides, bias_strides, pair_strides,
    heads, blocks, rows, GROUP: tl.constexpr, D: tl.constexpr, block_m: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """What a program of BLOCK_M query rows works on; its grid is (query tiles, B * H).

    Returns:
        The tile (causal ones with the most work first), batch and head (64-bit), then its head's keys, values and row
        biases, its query block's list and ends, and where its pair biases begin: an offset, since Triton 3.6 cannot
        return a pointer that is None.
    """
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    head = tl.program_id(1) % heads
    wide_batch, wide_head = (tl.program_id(1) // heads).to(tl.int64), head.to(tl.int64)
    line = (tile * BLOCK_M) // block_m
    list_line = wide_batch * list_strides[0] + wide_head * list_strides[1] + line
    kv_row = (wide_batch * (heads // GROUP) + head // GROUP) * rows
    bias_ptr += wide_batch * bias_strides[0] + wide_head * bias_strides[1]
    pair_line = wide_batch * pair_strides[0] + wide_head * pair_strides[1] + line.to(tl.int64) * blocks
    return (
        tile, wide_batch, wide_head, keys_ptr + kv_row * D, values_ptr + kv_row * D, bias_ptr,
        blocks_ptr + list_line * blocks, ends_ptr + list_line * LEVELS, pair_line,
    )  # fmt: skip


@triton.jit
def lane_bias(
    level, block, row, lanes, bias_ptr, pair_ptr, blocks,
    block_n: tl.constexpr, BLOCK_N: tl.constexpr, ROW_BIAS: tl.constexpr, PAIR_BIAS: tl.constexpr,
):  # fmt: skip
    """Bias of each lane's row, in log2: the row's own or log2 of the level, plus the block pair's; -inf outside."""
    valid = tl.arange(0, BLOCK_N) < lanes
    if ROW_BIAS:
        bias = tl.load(bias_ptr + level_offset(level, blocks, block_n) + row, mask=valid, other=-float("inf"))
    else:
        bias = tl.where(valid, level.to(tl.float32), -float("inf"))
    if PAIR_BIAS:
        pair = tl.load(pair_ptr + block, mask=valid, other=0.0).to(tl.float32)
        bias += tl.where(level > 0, pair * LOG2_E, 0.0)
    if ROW_BIAS or PAIR_BIAS:
        bias = computed_once(bias)
    return bias


@triton.jit
def hidden_rows(level, row, position, length_k):
    """Causal rule: [queries, lanes], True where a row's last real token lies after the query's position."""
    last_token = computed_once(tl.minimum((row + 1) << level, length_k) - 1)
    return last_token[None, :] > position[:, None]


@triton.jit
def count_whole(list_ptr, entries, limit, CHUNK: tl.constexpr):
    """How many of the first ``entries`` ids of an ascending list are below ``limit``."""
    whole = 0
    for start in range(0, entries, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        ids = tl.load(list_ptr + entry, mask=entry < entries, other=2147483647)
        whole += tl.sum((ids < limit).to(tl.int32))
    return whole


@triton.jit
def whole_tiles(
    list_ptr, ends_ptr, last_position, length_k, CAUSAL: tl.constexpr, block_n: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """How many tiles of BLOCK_N rows at the head of the level-1 list need no mask.

    Their tokens all exist, and with the causal rule none lies after ``last_position``.

    Level-1 lists ascend, so what needs a mask comes last; the loop over pooled rows takes the rest.
    """
    entries = tl.load(ends_ptr)
    if CAUSAL:
        limit = tl.minimum(tl.maximum(last_position + 1, 0), length_k) // block_n
        entries = count_whole(list_ptr, entries, limit, 256)
    else:
        entries = tl.maximum(entries - (length_k % block_n != 0), 0)
    return entries * block_n // BLOCK_N


@triton.jit
def whole_rows(t, list_ptr, limit, block_n: tl.constexpr, LOG2_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row of tile ``t`` of level-1 blocks (a scalar) where a block holds whole tiles, else every lane's row.

    ``limit`` tiles exist; beyond it nothing is read (the caller asks one tile ahead).
    """
    if block_n >= BLOCK_N:
        block = tl.load(list_ptr + t * BLOCK_N // block_n, mask=t < limit, other=0)
        first = block * block_n + t * BLOCK_N % block_n
    else:
        position = t * BLOCK_N + tl.arange(0, BLOCK_N)
        block = tl.load(list_ptr + (position >> LOG2_BLOCK), mask=position < limit * BLOCK_N, other=0)
        first = block * block_n + (position & (block_n - 1))
    return first


@triton.jit
def load_whole(
    base, first, block_n: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """The rows that :func:`whole_rows` names: [BLOCK_N, D_PAD]. A scalar keeps the lanes' offsets out of the loop."""
    cols = tl.arange(0, D_PAD)
    if block_n >= BLOCK_N:
        lanes = tl.arange(0, BLOCK_N)
        pointers = base + first * D + lanes[:, None] * D + cols[None, :]
    else:
        pointers = base + first[:, None] * D + cols[None, :]
    if D == D_PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.broadcast_to((cols < D)[None, :], pointers.shape), other=0.0)


@triton.jit
def online_softmax_update(scores, running_max, running_sum):
    """One step of the online softmax on ``scores`` in units of log2 (-inf = absent).

    Returns the tile's weights, the factor by which everything so far shrinks, and the new maximum and sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(running_max - shift)
    return weights, shrink, new_max, running_sum * shrink + tl.sum(weights, 1)


@triton.jit
def finite_softmax_update(products, scale_log2, running_max, running_sum):
    """The same where every product is finite: the scale folds into one multiply-add per score."""
    new_max = tl.maximum(running_max, tl.max(products, 1) * scale_log2)
    weights = tl.exp2(products * scale_log2 - new_max[:, None])
    shrink = tl.exp2(running_max - new_max)
    return weights, shrink, new_max, running_sum * shrink + tl.sum(weights, 1)

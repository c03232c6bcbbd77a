"""Which query blocks read each tile of pyramid rows: the lists that the gradients of the rows walk."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128


@triton.jit
def tile_of_level(index, blocks, block_n: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """Tiles of TILE rows are numbered level by level: level index and tile within the level, scalars."""
    level = 0
    first = 0
    end = 0
    for e in tl.static_range(LEVELS):
        past = index >= end
        level = tl.where(past, e, level)
        first = tl.where(past, end, first)
        end += tl.cdiv(blocks * (block_n >> e), TILE)
    return level, index - first


def tile_count(blocks: int, block_n: int, tile: int, levels: int) -> int:
    """Tiles of the first ``levels`` levels."""
    return sum(-(-blocks * (block_n >> e) // tile) for e in range(levels))


@triton.jit
def _readers_kernel(
    levels_ptr, lists_ptr, sizes_ptr, query_blocks, blocks,
    block_n: tl.constexpr, LOG2_BLOCK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One list: the query blocks, ascending, that read any row of this tile at its level. Grid (tiles, B' * H')."""
    level, tile = tile_of_level(tl.program_id(0), blocks, block_n, TILE, LEVELS)
    block = (tile * TILE + tl.arange(0, TILE)) >> (LOG2_BLOCK - level)
    levels_ptr += tl.program_id(1).to(tl.int64) * query_blocks * blocks
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lists_ptr += line * query_blocks
    size = 0
    for start in range(0, query_blocks, CHUNK):
        reader = start + tl.arange(0, CHUNK)
        there = (reader < query_blocks)[:, None] & (block < blocks)[None, :]
        offsets = reader.to(tl.int64)[:, None] * blocks + block[None, :]
        chosen = tl.load(levels_ptr + offsets, mask=there, other=0).to(tl.int32) == (1 << level)
        reads = tl.max(chosen.to(tl.int32), axis=1)
        place = size + tl.cumsum(reads, 0) - 1
        tl.store(lists_ptr + place, reader.to(lists_ptr.dtype.element_ty), mask=reads > 0)
        size += tl.sum(reads)
    tl.store(sizes_ptr + line, size)


def readers(levels: Tensor, block_n: int, tile: int, count: int) -> tuple[Tensor, Tensor]:
    """The transposed schedule at the grain of the gradients' tiles.

    Where a tile covers several KV blocks its list is the union of theirs, and the kernel masks what a block was not
    read for: coarse levels have too few rows per block to fill a tile alone.

    Args:
        levels: uint8 [B', H', M, N].
        tile: pyramid rows per tile. count: number of levels.

    Returns:
        lists [B', H', tiles, M], int16 where M allows it (undefined after a list's end); sizes int32 [B', H', tiles].
    """
    batch, heads, query_blocks, blocks = levels.shape
    tiles = tile_count(blocks, block_n, tile, count)
    dtype = torch.int16 if query_blocks < 2**15 else torch.int32
    lists = torch.empty(batch, heads, tiles, query_blocks, dtype=dtype, device=levels.device)
    sizes = torch.empty(batch, heads, tiles, dtype=torch.int32, device=levels.device)
    _readers_kernel[(tiles, batch * heads)](
        levels.contiguous(), lists, sizes, query_blocks, blocks,
        block_n=block_n, LOG2_BLOCK=block_n.bit_length() - 1, TILE=tile, LEVELS=count, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return lists, sizes

"""From levels to the list of blocks that each row reads or, with the axes exchanged, to each block's readers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LISTS = 16
CHUNK = 128


@triton.jit
def list_blocks(index, n, blocks_ptr, ends_ptr, in_range, COUNT: tl.constexpr):
    """Stores one row's kept blocks, sorted by (level, id), and where each level ends. ``index``, ``n``: [N]."""
    end = 0
    for e in range(COUNT):
        match = (index == e) & in_range
        place = end + tl.cumsum(match.to(tl.int32), 0) - 1
        tl.store(blocks_ptr + place, n, mask=match)
        end += tl.sum(match.to(tl.int32))
        tl.store(ends_ptr + e, end)


@triton.jit
def _schedule_kernel(
    levels_ptr,
    blocks_ptr,
    ends_ptr,
    strides,
    heads,
    rows,
    cols,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """LISTS lists per program, each over ``cols`` blocks: counts first, then places. Any strides, also transposed."""
    row = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    head = tl.program_id(1).to(tl.int64)
    levels_ptr += head // heads * strides[0] + head % heads * strides[1]
    line = head * rows + row
    exponent = tl.arange(0, WIDTH)
    counts = tl.zeros((LISTS, WIDTH), tl.int32)
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = row.to(tl.int64)[:, None] * strides[2] + col[None, :].to(tl.int64) * strides[3]
        level = tl.load(levels_ptr + offsets, mask=inside, other=0).to(tl.int32)
        for e in range(COUNT):
            found = tl.sum((level == (1 << e)).to(tl.int32), axis=1)
            counts += tl.where(exponent[None, :] == e, found[:, None], 0)
    before = exponent[:, None] <= exponent[None, :]
    ends = tl.sum(tl.where(before[None], counts[:, :, None], 0), axis=1)  # Triton 3.6 cannot scan so small a tile
    keep = (row < rows)[:, None] & (exponent < COUNT)[None, :]
    tl.store(ends_ptr + line[:, None] * COUNT + exponent[None, :], ends, mask=keep)
    place = ends - counts
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        offsets = row.to(tl.int64)[:, None] * strides[2] + col[None, :].to(tl.int64) * strides[3]
        level = tl.load(levels_ptr + offsets, mask=inside, other=0).to(tl.int32)
        for e in range(COUNT):
            match = (level == (1 << e)).to(tl.int32)
            first = tl.sum(tl.where(exponent[None, :] == e, place, 0), axis=1)
            at = first[:, None] + tl.cumsum(match, 1) - 1
            tl.store(
                blocks_ptr + line[:, None] * cols + at, tl.broadcast_to(col[None, :], match.shape), mask=match != 0
            )
            place += tl.where(exponent[None, :] == e, tl.sum(match, axis=1)[:, None], 0)


def build_schedule(levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What :func:`psa.schedule.build_schedule` gives; entries of ``blocks`` after the last end are undefined.

    Args:
        levels: uint8 [B, H, M, N], any strides; pass ``levels.transpose(-1, -2)`` for the transposed schedule.
        count: number of levels 1, 2, 4, ….

    Returns:
        blocks int32 [B, H, M, N], ends int32 [B, H, M, count].
    """
    batch, heads, rows, cols = levels.shape
    blocks = torch.empty(batch, heads, rows, cols, dtype=torch.int32, device=levels.device)
    ends = torch.empty(batch, heads, rows, count, dtype=torch.int32, device=levels.device)
    if blocks.numel():
        _schedule_kernel[(triton.cdiv(rows, LISTS), batch * heads)](
            levels,
            blocks,
            ends,
            levels.stride(),
            heads,
            rows,
            cols,
            COUNT=count,
            WIDTH=8,
            LISTS=LISTS,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return blocks, ends

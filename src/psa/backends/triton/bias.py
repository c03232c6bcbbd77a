"""The variance bias of every pyramid row (METHOD §4b): in a launch of its own, or beside the budget's few programs."""

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from ...config import MAX_LEVEL
from .common import LOG2_E, level_offset
from .pool import Pyramid, halve, halve_line, load_tokens, pool_columns
from .tune import padded

PARTS = 16
BIAS_OPTIONS = {"num_warps": 8, "maxnreg": 255}
"""The registers are worth more than the occupancy that ptxas would spill them for."""


@triton.jit
def _mean_power(power_ptr, parts, share, col, D: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """``share`` times the sum of ``parts`` rows of a contiguous [parts, D]: columns ``col``."""
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (col < D)[None, :]
        total += tl.sum(tl.load(power_ptr + part[:, None] * D + col[None, :], mask=there, other=0.0), 0)
    return total * share


@triton.jit
def _spreads(
    keys_ptr, real, power_ptr, parts, share, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``Σ_d w_d σ²_{g,d}`` of every group of tokens for one query head: a tuple, one vector per level.

    It is ``mean_g(Σ_d w_d y_d²) - Σ_d w_d mean_g(y_d)²`` with y the keys less the mean of all tokens here, which keeps
    the difference from cancelling.
    """
    spreads = ()
    for e in tl.static_range(LEVELS):
        spreads = spreads + (tl.zeros((TOKENS >> e,), tl.float32),)  # noqa: RUF005 - Triton has no starred tuples
    for at in tl.range(D_PAD // COLS, num_stages=1):
        col = at * COLS + tl.arange(0, COLS)
        power = _mean_power(power_ptr, parts, share, col, D, COLS, PARTS)
        counts = real.to(tl.float32)
        sums = load_tokens(keys_ptr, tl.arange(0, TOKENS), real, col, (D, 1), D)
        centre = tl.sum(sums, 0) / tl.maximum(tl.sum(counts, 0), 1.0)
        sums = tl.where(real[:, None], sums - centre[None, :], 0.0)
        squares = tl.sum(sums * sums * power[None, :], 1)
        added = (spreads[0],)
        for e in tl.static_range(1, LEVELS):
            sums = halve(sums, TOKENS >> (e - 1), COLS)
            counts = halve_line(counts, TOKENS >> (e - 1))
            squares = halve_line(squares, TOKENS >> (e - 1))
            share_of_one = 1.0 / tl.maximum(counts, 1.0)
            means = sums * share_of_one[:, None]
            spread = squares * share_of_one - tl.sum(means * means * power[None, :], 1)
            added = added + (spreads[e] + spread,)  # noqa: RUF005
        spreads = added
    return spreads


@triton.jit
def row_bias(
    program, rows_ptr, counts_ptr, power_ptr, cap_ptr, bias_ptr, power_out_ptr, cap_out_ptr, power_strides, cap_strides,
    counts_stride, heads, chunks, blocks, rows, parts, share, limit, half_scale_squared,
    GROUPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr, BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Bias of the rows over TOKENS tokens, for one query head. ``program`` counts tokens first, then heads.

    With SUMS, ``power_ptr`` holds sums over parts of the queries and ``limit`` is the cap: power and cap of each head
    are left behind, as a plan keeps them.
    """
    chunk, line = program % chunks, program // chunks
    batch, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    power_ptr += batch * power_strides[0] + head * power_strides[1]
    counts_ptr += batch * counts_stride
    bias_ptr += line.to(tl.int64) * rows
    if SUMS:
        if chunk == 0:
            for at in range(D_PAD // COLS):
                col = at * COLS + tl.arange(0, COLS)
                power = _mean_power(power_ptr, parts, share, col, D, COLS, PARTS)
                tl.store(power_out_ptr + line.to(tl.int64) * D + col, power, mask=col < D)
            tl.store(cap_out_ptr + line, limit)
    else:
        limit = tl.load(cap_ptr + batch * cap_strides[0] + head * cap_strides[1])
    real = tl.load(counts_ptr + chunk * TOKENS + tl.arange(0, TOKENS)) > -0.5
    rows_ptr += (batch * (heads // GROUPS) + head // GROUPS) * rows * D + chunk.to(tl.int64) * TOKENS * D
    spreads = _spreads(rows_ptr, real, power_ptr, parts, share, D, D_PAD, COLS, TOKENS, LEVELS, PARTS)
    for e in tl.static_range(LEVELS):
        row = level_offset(e, blocks, BLOCK_N) + chunk * (TOKENS >> e) + tl.arange(0, TOKENS >> e)
        correction = tl.minimum(half_scale_squared * tl.maximum(spreads[e], 0.0), limit) * LOG2_E
        tl.store(bias_ptr + row, tl.load(counts_ptr + row) + correction)


@triton.jit
def _bias_kernel(
    rows_ptr, counts_ptr, power_ptr, cap_ptr, bias_ptr, power_out_ptr, cap_out_ptr, power_strides, cap_strides,
    counts_stride, heads, chunks, blocks, rows, parts, share, limit, half_scale_squared,
    GROUPS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr, BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """:func:`row_bias` in a launch of its own. Grid (tokens / TOKENS * B * H)."""
    row_bias(
        tl.program_id(0), rows_ptr, counts_ptr, power_ptr, cap_ptr, bias_ptr, power_out_ptr, cap_out_ptr,
        power_strides, cap_strides, counts_stride, heads, chunks, blocks, rows, parts, share, limit,
        half_scale_squared, GROUPS, D, D_PAD, COLS, BLOCK_N, TOKENS, LEVELS, PARTS, SUMS,
    )  # fmt: skip


@dataclass(frozen=True)
class RowBias:
    """One call's variance bias: ``tensors`` and ``numbers`` by the names of :func:`row_bias`'s arguments.

    Attributes:
        programs: how many programs of :func:`row_bias` it takes.
        pyramid: what it belongs to, with the bias that those programs write.
    """

    programs: int
    pyramid: Pyramid
    arguments: dict[str, object]
    constants: dict[str, object]

    @property
    def power(self) -> Tensor:
        return self.arguments["power_out_ptr"]  # type: ignore[return-value]

    @property
    def cap(self) -> Tensor:
        return self.arguments["cap_out_ptr"]  # type: ignore[return-value]

    def run(self) -> Pyramid:
        """One launch; the pyramid with its bias."""
        _bias_kernel[(self.programs,)](**self.arguments, **self.constants, **BIAS_OPTIONS)
        return self.pyramid


def bias_constants(dim: int, block_n: int, group: int, sums: bool) -> dict[str, object]:
    """The constexpr arguments of :func:`row_bias`."""
    tokens = min(block_n, MAX_LEVEL)
    return {
        "GROUPS": group, "D": dim, "D_PAD": padded(dim), "COLS": pool_columns(dim), "BLOCK_N": block_n,
        "TOKENS": tokens, "LEVELS": tokens.bit_length(), "PARTS": PARTS, "SUMS": sums,
    }  # fmt: skip


def bias_from_power(pyramid: Pyramid, block_n: int, power: Tensor, cap: Tensor, heads: int, scale: float) -> RowBias:
    """From the power of each head's queries, float32 [B|1, H, D], and its cap, float32 [B|1, H|1]."""
    batch = pyramid.keys.shape[0]
    power = (power if power.stride(-1) == 1 else power.contiguous()).expand(batch, heads, -1)
    inputs = {"power_ptr": power, "cap_ptr": cap, "power_out_ptr": None, "cap_out_ptr": None}
    inputs |= {"power_strides": power.stride()[:2], "cap_strides": cap.expand(batch, heads).stride()}
    return _row_bias(pyramid, block_n, heads, scale, inputs, parts=1, share=1.0, limit=0.0)


def bias_from_sums(pyramid: Pyramid, block_n: int, sums: Tensor, length: int, cap: float, scale: float) -> RowBias:
    """From partial sums of squares, float32 [B, H, parts, D], over ``length`` queries."""
    batch, heads, parts, dim = sums.shape
    inputs = {"power_ptr": sums, "cap_ptr": None, "power_out_ptr": sums.new_empty(batch, heads, dim)}
    inputs |= {"cap_out_ptr": sums.new_empty(batch, heads), "power_strides": sums.stride()[:2], "cap_strides": (0, 0)}
    return _row_bias(pyramid, block_n, heads, scale, inputs, parts=parts, share=1.0 / length, limit=cap)


def _row_bias(
    pyramid: Pyramid, block_n: int, heads: int, scale: float, inputs: dict[str, object], **numbers: float
) -> RowBias:
    batch, kv_heads, rows, dim = pyramid.keys.shape
    blocks = triton.cdiv(pyramid.length, block_n)
    constants = bias_constants(dim, block_n, heads // kv_heads, inputs["cap_ptr"] is None)
    chunks = blocks * block_n // min(block_n, MAX_LEVEL)
    bias = pyramid.counts.new_empty(batch, heads, rows)
    arguments = inputs | numbers | {
        "rows_ptr": pyramid.keys, "counts_ptr": pyramid.counts, "bias_ptr": bias, "heads": heads, "chunks": chunks,
        "counts_stride": 0 if pyramid.counts.shape[0] == 1 else rows, "blocks": blocks, "rows": rows,
        "half_scale_squared": 0.5 * scale * scale,
    }  # fmt: skip
    return RowBias(chunks * batch * heads, replace(pyramid, bias=bias), arguments, constants)

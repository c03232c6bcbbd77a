"""Which block pairs a query block sees or must keep, and the keys that shares become, as kernels compute them."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PINNED = tl.constexpr(1e30)
HIDDEN = tl.constexpr(float("inf"))
LEAST_SHARE = tl.constexpr(2.0**-60)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
"""2**64 divided by the golden ratio, as a signed number: multiples of it modulo 2**64 are evenly spread fractions."""


@dataclass(frozen=True)
class RowRules:
    """Visibility and pins (see :func:`psa.allocate.block_mask`), as numbers that kernels take.

    Attributes:
        first_real: int32 [B], the first KV block with a real key, which causal calls pin; None without a key mask
            (block 0).
    """

    block_m: int
    block_n: int
    is_causal: bool = False
    text_length: int = 0
    text_first: bool = False
    first_real: Tensor | None = None


def row_rules(
    block_m: int, block_n: int, is_causal: bool, text_length: int, text_position: str, key_mask: Tensor | None
) -> RowRules:
    """The rules of a call; one small reduction over ``key_mask`` [B, Lk] where causality asks for its first key."""
    first_real = None
    if key_mask is not None and is_causal:
        first_real = (key_mask.to(torch.uint8).argmax(dim=-1) // block_n).to(torch.int32)
    return RowRules(block_m, block_n, is_causal, text_length, text_position == "first", first_real)


@triton.jit
def visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """How many KV blocks, from the first on, query block m sees."""
    if CAUSAL:
        last = tl.minimum((m + 1) * BLOCK_M, length_q) - 1 + length_k - length_q
        return tl.where(last >= 0, tl.minimum(last // BLOCK_N + 1, blocks_n), 0)
    return blocks_n + m * 0


@triton.jit
def is_pinned(
    m, n, first_real, length_q, length_k, text_length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TEXT_FIRST: tl.constexpr,
):  # fmt: skip
    """Whether a visible pair must stay at level 1: text, the causal diagonal, the first block with a real key."""
    if TEXT_FIRST:
        pinned = (m * BLOCK_M < text_length) | (n * BLOCK_N < text_length)
    else:
        last_q = tl.minimum((m + 1) * BLOCK_M, length_q) - 1
        last_k = tl.minimum((n + 1) * BLOCK_N, length_k) - 1
        pinned = (last_q >= length_q - text_length) | (last_k >= length_k - text_length)
    if CAUSAL:
        last_key = tl.minimum((n + 1) * BLOCK_N, length_k) - 1
        pinned = pinned | (last_key > m * BLOCK_M + length_k - length_q) | (n == first_real)
    return pinned


@triton.jit
def log_keys(share, m, n, blocks_n, exponent):
    """``exponent * log2(share)`` plus the tie-break of :func:`psa.allocate.proportional`."""
    key = exponent * tl.log2(tl.maximum(share, LEAST_SHARE))
    step = tl.cast(m, tl.int64) * blocks_n + n
    return key + ((step * GOLDEN) >> 40 & 0xFFFFFF).to(tl.float32) * (2.0**-30)


@triton.jit
def encode_shares(
    share, has_mass, m, n, first_real, length_q, length_k, blocks_n, text_length, exponent,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TEXT_FIRST: tl.constexpr,
):  # fmt: skip
    """Keys of proportional mode: :func:`log_keys`, PINNED and HIDDEN for pairs whose level is fixed.

    Rows without mass count as uniform.
    """
    seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
    share = tl.where(has_mass, share, 1.0 / tl.maximum(seen, 1).to(tl.float32))
    key = log_keys(share, m, n, blocks_n, exponent)
    pinned = is_pinned(m, n, first_real, length_q, length_k, text_length, BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST)
    return tl.where(n < seen, tl.where(pinned, PINNED, key), HIDDEN)


@triton.jit
def level_indices(key, log_tau, cap, keep_all, COARSEST: tl.constexpr):
    """``round(log_tau - key)`` clamped to [0, COARSEST] and to ``cap``: int32; 8 where the block is skipped, which
    without ``keep_all`` is what would be coarser than COARSEST."""
    real = tl.minimum(tl.maximum(log_tau - key + 0.5, -1.0), 9.0)
    index = tl.maximum(tl.floor(real), 0.0).to(tl.int32)
    capped = tl.minimum(tl.minimum(index, COARSEST), cap)
    dropped = (key == HIDDEN) | ((index > COARSEST) & (keep_all == 0))
    return tl.where(dropped, 8, capped)


@triton.jit
def head_setting(settings_ptr, line, exponent, keep_all, density, PER_HEAD: tl.constexpr):
    """A head's own (exponent, keep_all, density) where there is a table [B * H, 3], else those of the call."""
    if PER_HEAD:
        exponent = tl.load(settings_ptr + line * 3)
        keep_all = tl.load(settings_ptr + line * 3 + 1).to(tl.int32)
        density = tl.load(settings_ptr + line * 3 + 2)
    return exponent, keep_all, density


@triton.jit
def kept_rows(index):
    """128 / level, exactly: int32; 0 where the block is skipped."""
    return tl.where(index < 8, 128 >> tl.minimum(index, 7), 0)


def level_exponent(block_n: int, most: int = 128) -> int:
    return int(math.log2(min(block_n, most)))


def row_width(blocks_n: int) -> int:
    """Lanes that hold one row of block pairs."""
    return max(16, triton.next_power_of_2(blocks_n))

"""Places in a row's descending order: quantiles by a radix search over bits (METHOD §3), all places by a sort."""

import triton
import triton.language as tl

from .score import HIDDEN, PINNED, is_pinned, log_keys, visible_blocks

FIXED = tl.constexpr(2.0**52)


@triton.jit
def normalised(weight, visible):
    """As :func:`psa.allocate.normalise`: a row that sums to one over ``visible``; all-zero rows become uniform."""
    # NaN counts as nothing, infinity as the largest number.
    weight = tl.where(visible & (weight > 0), tl.minimum(weight, 3.4028234663852886e38), 0.0)
    peak = tl.max(weight, axis=0)
    weight = tl.where(peak > 0, weight / tl.maximum(peak, 1.1754943508222875e-38), visible.to(tl.float32))
    return weight / tl.maximum(tl.sum(weight, axis=0), 1.1754943508222875e-38)


@triton.jit
def _largest(key, count):
    """The ``count`` largest keys (int32, -1 for absent), equal ones in the order of their index: bool [N]."""
    threshold = 0
    for step in range(31):
        attempt = threshold | (0x40000000 >> step)
        enough = tl.sum((key >= attempt).to(tl.int32)) >= count
        threshold = tl.where(enough, attempt, threshold)
    above = key > threshold
    equal = (key == threshold).to(tl.int32)
    room = count - tl.sum(above.to(tl.int32))
    return (above | ((equal != 0) & (tl.cumsum(equal, 0) <= room))) & (count > 0)


@triton.jit
def _within(key, share, bound):
    """How many leading terms of the descending row have a cumulative share of at most ``bound``.

    Sums are integers (shares times 2**52): exact, and independent of the order.
    """
    amount = (share.to(tl.float64) * FIXED).to(tl.int64)
    # The smallest threshold whose keys, all together, are still within the bound.
    threshold = 0
    for step in range(31):
        attempt = threshold | (0x40000000 >> step)
        total = tl.sum(tl.where(key >= attempt, amount, 0))
        threshold = tl.where(total.to(tl.float32) * (1.0 / FIXED) > bound, attempt, threshold)
    total = tl.sum(tl.where(key > threshold, amount, 0))
    equal = tl.sum((key == threshold).to(tl.int32))
    each = tl.max(tl.where(key == threshold, amount, 0))
    more = 0
    for step in range(17):
        attempt = more + (0x10000 >> step)
        fits = (total + each * attempt).to(tl.float32) * (1.0 / FIXED) <= bound
        more = tl.where(fits & (attempt <= equal), attempt, more)
    return tl.sum((key > threshold).to(tl.int32)) + more


@triton.jit
def rank_indices(
    share,
    visible,
    seen,
    EXPONENTS: tl.constexpr,
    BOUNDS: tl.constexpr,
    INTERVALS: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Level indices by rank in the descending row: topk quotas or cumulative thresholds; 8 for what is left over."""
    key = tl.where(visible, share.to(tl.int32, bitcast=True), -1)
    index = tl.full(key.shape, 8, tl.int32)
    end = 0
    for i in tl.static_range(INTERVALS):
        start = end
        if CUMULATIVE:
            within = _within(key, share, BOUNDS[i] + 1e-6)
            end = tl.where(within > 0, tl.minimum(within + 1, seen), start)
            if EXPONENTS[i] == 0:
                least = tl.floor(seen.to(tl.float64) * tl.full((), 0.06, tl.float64)).to(tl.int32) + 1
                end = tl.maximum(end, tl.minimum(least, seen))
        else:
            end = tl.floor(seen.to(tl.float64) * tl.full((), BOUNDS[i], tl.float64)).to(tl.int32)
        end = tl.maximum(end, start)
        index = tl.where((index == 8) & _largest(key, end), EXPONENTS[i], index)
    return index


@triton.jit
def store_ranked_keys(
    weight, keys_ptr, m, n, first_real, length_q, length_k, blocks_n, text_length, exponent, rank_exponent,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TEXT_FIRST: tl.constexpr,
):  # fmt: skip
    """Keys of one row in proportional mode with ``rank_exponent``: a share counts divided by a power of its place.

    One sort of (share, place of the pair) in a 64-bit number each; a sorted element knows where its key goes.
    """
    seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
    share = normalised(weight, n < seen)
    pinned = is_pinned(m, n, first_real, length_q, length_k, text_length, BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST)
    bits = tl.where((n < seen) & (pinned == 0), share.to(tl.int32, bitcast=True), -1)
    ordered = tl.sort((bits.to(tl.int64) << 32) | (0x7FFFFFFF - n), descending=True)
    bits = (ordered >> 32).to(tl.int32)
    index = 0x7FFFFFFF - (ordered & 0x7FFFFFFF).to(tl.int32)
    key = log_keys(tl.maximum(bits, 0).to(tl.float32, bitcast=True), m, index, blocks_n, exponent)
    key -= rank_exponent * tl.log2((n + 1).to(tl.float32))
    key = tl.where(bits >= 0, key, tl.where(index < seen, PINNED, HIDDEN))
    tl.store(keys_ptr + index, key, mask=index < blocks_n)

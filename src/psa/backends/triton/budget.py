"""The threshold of proportional mode: the smallest tau whose density fits, exactly, without a sort or a sync.

One program per head (or per layer): bisect on a sample, count the whole head once at both ends of a narrow bracket
while gathering the few keys that differ between them, then bisect on those alone. The answer is plain
bisection's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias import BIAS_OPTIONS, RowBias, row_bias
from .score import HIDDEN, RowRules, head_setting, kept_rows, level_exponent, level_indices, visible_blocks

SAMPLE = 4096
CHUNK = 4096
COUNT_CHUNK = 1024
SOLVE_WARPS = 8


@triton.jit
def _kept(key, log_tau, cap, keep_all, COARSEST: tl.constexpr):
    return tl.sum(kept_rows(level_indices(key, log_tau, cap, keep_all, COARSEST)).to(tl.int64))


@triton.jit
def _load_keys(keys_ptr, caps_ptr, head, at, total, blocks_n, GROUPS: tl.constexpr, CAPPED: tl.constexpr, span):
    """Keys at flat positions ``at`` of the program's heads, and the cap of each."""
    key = tl.load(keys_ptr + at, mask=at < total, other=float("inf"))
    cap = tl.full(at.shape, 7, tl.int32)
    if CAPPED:
        kv_head = (head + at // span) // GROUPS
        cap = tl.load(caps_ptr + kv_head * blocks_n + at % blocks_n, mask=at < total, other=7).to(tl.int32)
    return key, cap


@triton.jit
def _solve(
    program, keys_ptr, caps_ptr, list_ptr, list_caps_ptr, log_tau_ptr, settings_ptr,
    heads, length_q, length_k, blocks_m, blocks_n, exponent, keep_all, density, ranked,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, COARSEST: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SAMPLE: tl.constexpr, CHUNK: tl.constexpr,
    COUNT_CHUNK: tl.constexpr,
):  # fmt: skip
    """log_tau per (batch, head): levels from it keep at most ``density`` of the visible pairs, from any lower one more.

    Counts are integers in units of 1/128 of a block pair, so that the result does not depend on the order of sums.
    """
    exponent, keep_all, density = head_setting(settings_ptr, program, exponent, keep_all, density, PER_HEAD)
    lowest = -60.0 * exponent - 31.0 * ranked - 2.0
    span = tl.cast(blocks_m, tl.int64) * blocks_n
    members = heads if SHARED else 1
    total = span * members
    head = 0 if SHARED else program % heads
    batch = program if SHARED else program // heads
    base = (batch.to(tl.int64) * heads + head) * span
    keys_ptr += base
    list_ptr += base
    if CAPPED:
        list_caps_ptr += base
        caps_ptr += batch.to(tl.int64) * (heads // GROUPS) * blocks_n

    visible = tl.zeros((), tl.int64)
    for first_m in range(0, blocks_m, COUNT_CHUNK):
        m = first_m + tl.arange(0, COUNT_CHUNK)
        seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
        visible += tl.sum(tl.where(m < blocks_m, seen, 0).to(tl.int64))
    visible *= members
    budget = tl.floor(density * visible.to(tl.float32) * 128.0).to(tl.int64)
    highest = COARSEST + 3.0

    # A spread-out sample: multiples of the golden ratio, so that no row or column is favoured.
    fraction = (tl.arange(0, SAMPLE).to(tl.uint32) * 2654435769).to(tl.uint64)
    spread = ((fraction * total.to(tl.uint64)) >> 32).to(tl.int64)
    some, some_caps = _load_keys(keys_ptr, caps_ptr, head, spread, total, blocks_n, GROUPS, CAPPED, span)
    sampled = tl.sum((some != HIDDEN).to(tl.int32)).to(tl.float32)
    low = lowest
    high = highest + 0.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        fits = _kept(some, middle, some_caps, keep_all, COARSEST).to(tl.float32) <= density * 128.0 * sampled
        low = tl.where(fits, low, middle)
        high = tl.where(fits, middle, high)

    width = 0.125
    low = tl.maximum(low - width, lowest)
    high = tl.minimum(high + width, highest)
    bracketed = low < lowest
    fixed = tl.zeros((), tl.int64)
    found = tl.zeros((), tl.int64)
    while bracketed == 0:
        kept_low = tl.zeros((), tl.int64)
        kept_high = tl.zeros((), tl.int64)
        fixed = tl.zeros((), tl.int64)
        found = tl.zeros((), tl.int64)
        for start in range(0, total, CHUNK):
            at = start + tl.arange(0, CHUNK).to(tl.int64)
            key, cap = _load_keys(keys_ptr, caps_ptr, head, at, total, blocks_n, GROUPS, CAPPED, span)
            first = kept_rows(level_indices(key, low, cap, keep_all, COARSEST))
            last = kept_rows(level_indices(key, high, cap, keep_all, COARSEST))
            differs = (first != last).to(tl.int32)
            place = found + tl.cumsum(differs, 0) - 1
            tl.store(list_ptr + place, key, mask=differs != 0)
            if CAPPED:
                tl.store(list_caps_ptr + place, cap.to(tl.uint8), mask=differs != 0)
            kept_low += tl.sum(first.to(tl.int64))
            kept_high += tl.sum(last.to(tl.int64))
            fixed += tl.sum(tl.where(differs != 0, 0, first).to(tl.int64))
            found += tl.sum(differs)
        too_low = (kept_high > budget) & (high < highest)
        too_high = (kept_low <= budget) & (low > lowest)
        bracketed = ((too_low | too_high) == 0).to(tl.int1)
        # The bracket stays below one octave, so that a gathered key moves by one level at most.
        new_low = tl.where(too_low, high, tl.where(too_high, tl.maximum(low - 0.5, lowest), low))
        new_high = tl.where(too_low, tl.minimum(high + 0.5, highest), tl.where(too_high, low, high))
        low = new_low
        high = new_high
    tl.debug_barrier()

    middle = 0.5 * (low + high)
    while (low < middle) & (middle < high):
        kept = fixed
        for start in range(0, found, CHUNK):
            at = start + tl.arange(0, CHUNK).to(tl.int64)
            key = tl.load(list_ptr + at, mask=at < found, other=float("inf"))
            cap = tl.full(at.shape, 7, tl.int32)
            if CAPPED:
                cap = tl.load(list_caps_ptr + at, mask=at < found, other=7).to(tl.int32)
            kept += _kept(key, middle, cap, keep_all, COARSEST)
        fits = kept <= budget
        low = tl.where(fits, low, middle)
        high = tl.where(fits, middle, high)
        middle = 0.5 * (low + high)
    if SHARED:
        for member in range(heads):
            tl.store(log_tau_ptr + batch * heads + member, high)
    else:
        tl.store(log_tau_ptr + program, high)


@triton.jit
def _solve_kernel(
    keys_ptr, caps_ptr, list_ptr, list_caps_ptr, log_tau_ptr, settings_ptr,
    rows_ptr, counts_ptr, power_ptr, cap_ptr, bias_ptr, power_out_ptr, cap_out_ptr,
    heads, length_q, length_k, blocks_m, blocks_n, exponent, keep_all, density, ranked, solvers,
    power_strides, cap_strides, counts_stride, chunks, blocks, rows, parts, share, limit, half_scale_squared,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr, COARSEST: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SAMPLE: tl.constexpr, CHUNK: tl.constexpr,
    COUNT_CHUNK: tl.constexpr, VARIANCE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COLS: tl.constexpr,
    TOKENS: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """:func:`_solve` on the first ``solvers`` programs; with the variance bias, its rows on the others.

    A dozen programs leave most of the GPU idle, so that the bias costs no launch and hardly any time.
    """
    program = tl.program_id(0)
    if program < solvers:
        _solve(
            program, keys_ptr, caps_ptr, list_ptr, list_caps_ptr, log_tau_ptr, settings_ptr, heads, length_q, length_k,
            blocks_m, blocks_n, exponent, keep_all, density, ranked, GROUPS, SHARED, CAPPED, COARSEST, PER_HEAD,
            BLOCK_M, BLOCK_N, CAUSAL, SAMPLE, CHUNK, COUNT_CHUNK,
        )  # fmt: skip
    elif VARIANCE:
        row_bias(
            program - solvers, rows_ptr, counts_ptr, power_ptr, cap_ptr, bias_ptr, power_out_ptr, cap_out_ptr,
            power_strides, cap_strides, counts_stride, heads, chunks, blocks, rows, parts, share, limit,
            half_scale_squared, GROUPS, D, D_PAD, COLS, BLOCK_N, TOKENS, LEVELS, PARTS, SUMS,
        )  # fmt: skip


NO_BIAS = dict.fromkeys(
    ("rows_ptr", "counts_ptr", "power_ptr", "cap_ptr", "bias_ptr", "power_out_ptr", "cap_out_ptr"), None
) | {
    "power_strides": (0, 0), "cap_strides": (0, 0), "counts_stride": 0, "chunks": 0, "blocks": 0, "rows": 0, "parts": 0,
    "share": 0.0, "limit": 0.0, "half_scale_squared": 0.0,
}  # fmt: skip
"""Arguments of :func:`row_bias` where there is none."""
NO_BIAS_CONSTANTS = {"D": 16, "D_PAD": 16, "COLS": 16, "TOKENS": 16, "LEVELS": 1, "PARTS": 1, "SUMS": False}


def solve(
    keys: Tensor,
    lengths: tuple[int, int],
    rules: RowRules,
    *,
    exponent: float,
    keep_all: bool,
    density: float,
    rank_exponent: float = 0.0,
    share_heads: bool = False,
    settings: Tensor | None = None,
    caps: Tensor | None = None,
    bias: RowBias | None = None,
) -> Tensor:
    """log2(tau) per head, float32 [B, H], for ``keys`` [B, H, M, N] of :func:`.score.encode_shares`.

    Args:
        lengths: tokens of q and of k.
        settings: float32 [B, H, 3], each head's own exponent, keep_all and density, instead of those of the call.
        caps: uint8 [B, Hkv, N], level indices that bound each KV block.
        bias: the variance bias to write in the same launch.
    """
    batch, heads, blocks_m, blocks_n = keys.shape
    log_tau = torch.empty(batch, heads, dtype=torch.float32, device=keys.device)
    gathered = torch.empty_like(keys)
    gathered_caps = torch.empty_like(keys, dtype=torch.uint8) if caps is not None else None
    solvers = batch if share_heads else batch * heads
    arguments = {"heads": heads, **NO_BIAS, **(bias.arguments if bias else {})}
    groups = {"GROUPS": heads // caps.shape[1] if caps is not None else 1, "BLOCK_N": rules.block_n}
    constants = {**groups, **(bias.constants if bias else NO_BIAS_CONSTANTS)}
    _solve_kernel[(solvers + (bias.programs if bias else 0),)](
        keys, caps, gathered, gathered_caps, log_tau, settings, length_q=lengths[0], length_k=lengths[1],
        blocks_m=blocks_m, blocks_n=blocks_n, exponent=exponent, keep_all=int(keep_all), density=density,
        ranked=rank_exponent, solvers=solvers, **arguments, **constants, SHARED=share_heads, CAPPED=caps is not None,
        COARSEST=level_exponent(rules.block_n), PER_HEAD=settings is not None, BLOCK_M=rules.block_m,
        CAUSAL=rules.is_causal, SAMPLE=SAMPLE, CHUNK=CHUNK, COUNT_CHUNK=COUNT_CHUNK, VARIANCE=bias is not None,
        **solve_options(bias is not None),
    )  # fmt: skip
    return log_tau


def solve_options(variance: bool) -> dict[str, int]:
    return BIAS_OPTIONS if variance else {"num_warps": SOLVE_WARPS}

"""From importance to levels and their schedule, one program per row and no sort (METHOD §3, §4a)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from .budget import solve
from .importance import importance, pool_keys
from .rank import normalised, rank_indices
from .schedule import list_blocks
from .score import (
    RowRules,
    encode_shares,
    head_setting,
    is_pinned,
    level_exponent,
    level_indices,
    row_rules,
    visible_blocks,
)


@triton.jit
def _encode_kernel(
    importance_ptr,
    keys_ptr,
    settings_ptr,
    first_real_ptr,
    strides,
    heads,
    length_q,
    length_k,
    blocks_m,
    blocks_n,
    text_length,
    exponent,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
):
    """Proportional mode on given importance: the keys that :mod:`.importance` writes on its own."""
    m = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    exponent, _, _ = head_setting(settings_ptr, line, exponent, 1, 1.0, PER_HEAD)
    n = tl.arange(0, WIDTH)
    source = importance_ptr + batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2]
    weight = tl.load(source + n.to(tl.int64) * strides[3], mask=n < blocks_n, other=0.0).to(tl.float32)
    seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
    key = encode_shares(
        normalised(weight, n < seen),
        n >= 0,
        m,
        n,
        tl.load(first_real_ptr + batch) if MASKED else 0,
        length_q,
        length_k,
        blocks_n,
        text_length,
        exponent,
        BLOCK_M,
        BLOCK_N,
        CAUSAL,
        TEXT_FIRST,
    )
    tl.store(keys_ptr + (line * blocks_m + m) * blocks_n + n, key, mask=n < blocks_n)


@triton.jit
def _select_kernel(
    source_ptr,
    log_tau_ptr,
    settings_ptr,
    caps_ptr,
    first_real_ptr,
    levels_ptr,
    blocks_ptr,
    ends_ptr,
    strides,
    heads,
    length_q,
    length_k,
    blocks_m,
    blocks_n,
    text_length,
    fixed_log_tau,
    keep_all,
    GROUPS: tl.constexpr,
    EXPONENTS: tl.constexpr,
    BOUNDS: tl.constexpr,
    INTERVALS: tl.constexpr,
    MODE: tl.constexpr,
    COARSEST: tl.constexpr,
    PER_HEAD: tl.constexpr,
    CAPPED: tl.constexpr,
    SOLVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
):
    """Levels and schedule of one row: from keys and log_tau (proportional), or from importance (the ranked modes)."""
    m = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    n = tl.arange(0, WIDTH)
    seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
    visible = n < seen
    source = source_ptr + batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2]
    cap = tl.full((WIDTH,), 7, tl.int32)
    if CAPPED:
        kv_line = batch * (heads // GROUPS) + head // GROUPS
        cap = tl.load(caps_ptr + kv_line * blocks_n + n, mask=n < blocks_n, other=7).to(tl.int32)
    if MODE == "proportional":
        key = tl.load(source + n.to(tl.int64) * strides[3], mask=n < blocks_n, other=float("inf"))
        log_tau = tl.load(log_tau_ptr + line) if SOLVED else fixed_log_tau
        _, keep_all, _ = head_setting(settings_ptr, line, 1.0, keep_all, 1.0, PER_HEAD)
        index = level_indices(key, log_tau, cap, keep_all, COARSEST)
    else:
        weight = tl.load(source + n.to(tl.int64) * strides[3], mask=n < blocks_n, other=0.0).to(tl.float32)
        share = normalised(weight, visible)
        index = rank_indices(share, visible, seen, EXPONENTS, BOUNDS, INTERVALS, MODE == "thresholdbound")
        index = tl.where(index == 8, 8, tl.minimum(index, cap))
        first_real = tl.load(first_real_ptr + batch) if MASKED else 0
        pinned = is_pinned(m, n, first_real, length_q, length_k, text_length, BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST)
        index = tl.where(visible, tl.where(pinned, 0, index), 8)
    row = line * blocks_m + m
    level = tl.where(index == 8, 0, 1 << tl.minimum(index, 7))
    tl.store(levels_ptr + row * blocks_n + n, level.to(tl.uint8), mask=n < blocks_n)
    list_blocks(index, n, blocks_ptr + row * blocks_n, ends_ptr + row * (COARSEST + 1), n < blocks_n, COARSEST + 1)


def row_options(width: int) -> dict[str, int]:
    """Launch options of the kernels that hold one row: 8 elements of it per thread, up to 4096.

    The cap on registers keeps the assembler from spilling a few for the sake of occupancy.
    """
    warps = min(16, max(1, width // 256))
    return {"num_warps": warps, "maxnreg": 128}


def allocate(
    source: Tensor,
    config: PSAConfig,
    rules: RowRules,
    lengths: tuple[int, int],
    *,
    encoded: bool = False,
    caps: Tensor | None = None,
    settings: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (uint8 [B, H, M, N]) and their schedule, as :func:`psa.allocate.allocate_levels` gives them.

    Args:
        source: [B, H, M, N], importance (any strides); or, ``encoded``, keys of proportional mode.
        lengths: tokens of q and of k.
        caps: uint8 [B, Hkv, N] from :func:`psa.similarity_cap`.
        settings: float32 [B, H, 3], each head's own exponent, keep_all and density: proportional mode, whatever the
            mode of ``config``.
    """
    batch, heads, blocks_m, blocks_n = source.shape
    width = max(16, triton.next_power_of_2(blocks_n))
    mode = config.mask_mode if settings is None and config.mask_mode != "auto" else "proportional"
    table = settings.contiguous() if settings is not None else source
    first_real = rules.first_real if rules.first_real is not None else source
    shared = {"PER_HEAD": settings is not None, "WIDTH": width, **row_options(width)}
    shared |= {"BLOCK_M": rules.block_m, "BLOCK_N": rules.block_n, "CAUSAL": rules.is_causal}
    shared |= {"MASKED": rules.first_real is not None, "TEXT_FIRST": rules.text_first}
    grid = (blocks_m, batch * heads)
    sizes = (heads, *lengths, blocks_m, blocks_n, rules.text_length)
    caps = None if caps is None else _cap_indices(caps)
    log_tau = None
    if mode == "proportional":
        if not encoded:
            keys = torch.empty(source.shape, dtype=torch.float32, device=source.device)
            _encode_kernel[grid](
                source, keys, table, first_real, source.stride(), *sizes, float(config.exponent), **shared
            )
            source = keys
        if settings is not None or config.density is not None:
            choice = {"exponent": float(config.exponent), "keep_all": config.keep_all, "density": config.density or 1.0}
            share = config.share_heads and settings is None
            log_tau = solve(
                source, lengths, rules, **choice, share_heads=share, settings=None if settings is None else table,
                caps=caps,
            )  # fmt: skip
    count = level_exponent(rules.block_n) + 1
    levels = torch.empty(source.shape, dtype=torch.uint8, device=source.device)
    blocks = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    ends = torch.empty(*source.shape[:3], count, dtype=torch.int32, device=source.device)
    ratios = config.mask_ratios or {}
    intervals = [(level.bit_length() - 1, bound) for level, (_, bound) in ratios.items() if level]
    _select_kernel[grid](
        source,
        log_tau if log_tau is not None else source,
        table,
        caps if caps is not None else levels,
        first_real,
        levels,
        blocks,
        ends,
        source.stride(),
        *sizes,
        0.0 if config.tau is None else math.log2(config.tau),
        int(config.keep_all),
        GROUPS=heads // caps.shape[1] if caps is not None else 1,
        EXPONENTS=tuple(exponent for exponent, _ in intervals),
        BOUNDS=tuple(bound for _, bound in intervals),
        INTERVALS=len(intervals),
        MODE=mode,
        COARSEST=count - 1,
        CAPPED=caps is not None,
        SOLVED=log_tau is not None,
        **shared,
    )
    return levels, blocks, ends


def _cap_indices(caps: Tensor) -> Tensor:
    """log2 of caps in {1, 2, 4, 8}: uint8."""
    return (caps > 1).to(torch.uint8) + (caps > 2) + (caps > 4)


def estimate(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    *,
    scale: float,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    pooled_k: Tensor | None = None,
    rules: RowRules | None = None,
    encode: float | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Importance float32 [B, H, M, N] of q [B, H, Lq, D] for k [B, Hkv, Lk, D]; see :func:`.importance.importance`."""
    if rules is None:
        rules = row_rules(config.block_m, config.block_n, is_causal, 0, "last", None)
    if pooled_k is None:
        pooled_k = pool_keys(k, config.importance_cols, key_mask)
    pooled = {"rows": config.importance_rows, "cols": config.importance_cols, "wanted": wanted}
    return importance(q, pooled_k, k.shape[2], rules, scale=scale, key_mask=key_mask, encode=encode, **pooled)


def select(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    *,
    scale: float,
    is_causal: bool = False,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    given: Tensor | None = None,
    pooled_k: Tensor | None = None,
    caps: Tensor | None = None,
    settings: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 3 and 4 on reordered tokens: levels uint8 [B, H, M, N], and their schedule (blocks, ends).

    No host sync; at most three launches beside pooling (importance, budget, selection).

    Args:
        q: [B, H, Lq, D]; k: [B, Hkv, Lk, D].
        given: [1|B, 1|H, M, N], importance to use instead of the pooled estimate.
        pooled_k: [B, Hkv, ceil(Lk / importance_cols), D], the pyramid's rows of that level, where they exist already.
        caps: uint8 [B, Hkv, N] from :func:`psa.similarity_cap`.
        settings: float32 [B, H, 3], with ``given``: each head's own exponent, keep_all and density.
    """
    rules = row_rules(config.block_m, config.block_n, is_causal, text_length, text_position, key_mask)
    lengths = (q.shape[2], k.shape[2])
    if given is not None:
        blocks = (-(-lengths[0] // config.block_m), -(-lengths[1] // config.block_n))
        source = given.expand(q.shape[0], q.shape[1], *blocks)
        return allocate(source, config, rules, lengths, caps=caps, settings=settings)
    encode = config.exponent if config.mask_mode in ("proportional", "auto") else None
    source = estimate(
        q, k, config, scale=scale, is_causal=is_causal, key_mask=key_mask, pooled_k=pooled_k, rules=rules, encode=encode
    )
    return allocate(source, config, rules, lengths, encoded=encode is not None, caps=caps)

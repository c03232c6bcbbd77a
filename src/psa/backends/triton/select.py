"""From importance to levels and their schedule, one program per row (METHOD §3, §4a)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from .bias import RowBias
from .budget import solve
from .importance import importance
from .rank import normalised, rank_indices, store_ranked_keys
from .schedule import list_blocks
from .score import (
    RowRules,
    encode_shares,
    head_setting,
    is_pinned,
    level_exponent,
    level_indices,
    row_width,
    visible_blocks,
)


@triton.jit
def _encode_kernel(
    importance_ptr, keys_ptr, settings_ptr, first_real_ptr, strides, heads, length_q, length_k, blocks_m, blocks_n,
    text_length, exponent, rank_exponent,
    PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TEXT_FIRST: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Proportional mode on given importance: the keys that :mod:`.importance` writes on its own."""
    m = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    exponent, _, _ = head_setting(settings_ptr, line, exponent, 1, 1.0, PER_HEAD)
    n = tl.arange(0, WIDTH)
    source = importance_ptr + batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2]
    weight = tl.load(source + n.to(tl.int64) * strides[3], mask=n < blocks_n, other=0.0).to(tl.float32)
    first_real = tl.load(first_real_ptr + batch) if MASKED else 0
    keys_ptr += (line * blocks_m + m) * blocks_n
    if RANKED:
        store_ranked_keys(
            weight, keys_ptr, m, n, first_real, length_q, length_k, blocks_n, text_length, exponent, rank_exponent,
            BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST,
        )  # fmt: skip
    else:
        seen = visible_blocks(m, length_q, length_k, blocks_n, BLOCK_M, BLOCK_N, CAUSAL)
        key = encode_shares(
            normalised(weight, n < seen), n >= 0, m, n, first_real, length_q, length_k, blocks_n, text_length, exponent,
            BLOCK_M, BLOCK_N, CAUSAL, TEXT_FIRST,
        )  # fmt: skip
        tl.store(keys_ptr + n, key, mask=n < blocks_n)


@triton.jit
def _select_kernel(
    source_ptr, log_tau_ptr, settings_ptr, caps_ptr, first_real_ptr, levels_ptr, blocks_ptr, ends_ptr,
    strides, heads, length_q, length_k, blocks_m, blocks_n, text_length, fixed_log_tau, keep_all,
    GROUPS: tl.constexpr, EXPONENTS: tl.constexpr, BOUNDS: tl.constexpr, INTERVALS: tl.constexpr, MODE: tl.constexpr,
    COARSEST: tl.constexpr, PER_HEAD: tl.constexpr, CAPPED: tl.constexpr, SOLVED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, TEXT_FIRST: tl.constexpr,
):  # fmt: skip
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
    bias: RowBias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (uint8 [B, H, M, N]) and their schedule, as :func:`psa.allocate.allocate_levels` gives them.

    Args:
        source: [B, H, M, N], importance (any strides); or, ``encoded``, keys of proportional mode.
        lengths: tokens of q and of k.
        caps: uint8 [B, Hkv, N], log2 of what :func:`psa.similarity_cap` gives.
        settings: float32 [B, H, 3], each head's own exponent, keep_all and density: proportional mode, whatever the
            mode of ``config``.
        bias: the variance bias to write on the way: beside the budget, where there is one, else by itself.
    """
    batch, heads, blocks_m, blocks_n = source.shape
    mode = config.mask_mode if settings is None and config.mask_mode != "auto" else "proportional"
    settings = None if settings is None else settings.contiguous()
    width = row_width(blocks_n)
    shared = {"PER_HEAD": settings is not None, "WIDTH": width, **row_options(width)}
    shared |= {"BLOCK_M": rules.block_m, "BLOCK_N": rules.block_n, "CAUSAL": rules.is_causal}
    shared |= {"MASKED": rules.first_real is not None, "TEXT_FIRST": rules.text_first}
    grid = (blocks_m, batch * heads)
    sizes = (heads, *lengths, blocks_m, blocks_n, rules.text_length)
    exponents = (float(config.exponent), float(config.rank_exponent) if settings is None else 0.0)
    if mode == "proportional" and not encoded:
        keys = torch.empty(source.shape, dtype=torch.float32, device=source.device)
        _encode_kernel[grid](
            source, keys, settings, rules.first_real, source.stride(), *sizes, *exponents,
            **shared, RANKED=exponents[1] != 0.0,
        )  # fmt: skip
        source = keys
    log_tau = None
    if mode == "proportional" and (settings is not None or config.density is not None):
        log_tau = solve(
            source, lengths, rules, exponent=exponents[0], rank_exponent=exponents[1], keep_all=config.keep_all,
            density=config.density or 1.0, share_heads=config.share_heads and settings is None, settings=settings,
            caps=caps, bias=bias,
        )  # fmt: skip
    elif bias is not None:
        bias.run()
    count = level_exponent(rules.block_n) + 1
    levels = torch.empty(source.shape, dtype=torch.uint8, device=source.device)
    blocks = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    ends = torch.empty(*source.shape[:3], count, dtype=torch.int32, device=source.device)
    ratios = config.mask_ratios or {}
    intervals = [(level.bit_length() - 1, bound) for level, (_, bound) in ratios.items() if level]
    _select_kernel[grid](
        source, log_tau, settings, caps, rules.first_real, levels, blocks, ends, source.stride(), *sizes,
        0.0 if config.tau is None else math.log2(config.tau), int(config.keep_all),
        GROUPS=heads // caps.shape[1] if caps is not None else 1, EXPONENTS=tuple(level for level, _ in intervals),
        BOUNDS=tuple(bound for _, bound in intervals), INTERVALS=len(intervals), MODE=mode, COARSEST=count - 1,
        CAPPED=caps is not None, SOLVED=log_tau is not None, **shared,
    )  # fmt: skip
    return levels, blocks, ends


def cap_indices(caps: Tensor) -> Tensor:
    """log2 of caps, powers of two up to 128: uint8."""
    return torch.stack([caps >> e > 0 for e in range(1, 8)]).sum(0, dtype=torch.uint8)


def select(
    q: Tensor,
    pooled_k: Tensor,
    length_k: int,
    config: PSAConfig,
    rules: RowRules,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    caps: Tensor | None = None,
    power: Tensor | None = None,
    bias: RowBias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 3 and 4: levels uint8 [B, H, M, N] and their schedule (blocks, ends), in at most three launches, no sync.

    Args:
        q: [B, H, Lq, D]. pooled_k: as :func:`.importance.importance` takes them, and ``power`` too.
        caps, bias: as :func:`allocate` takes them.
    """
    encode = (config.exponent, config.rank_exponent) if config.mask_mode == "proportional" else None
    source = importance(
        q, pooled_k, length_k, rules, rows=config.importance_rows, cols=config.importance_cols, scale=scale,
        key_mask=key_mask, encode=encode, power=power,
    )  # fmt: skip
    lengths = (q.shape[2], length_k)
    return allocate(source, config, rules, lengths, encoded=encode is not None, caps=caps, bias=bias)

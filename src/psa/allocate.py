"""From importance to levels: topk, thresholdbound and proportional, and the pinned blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .caps import per_head
from .config import MASK_MODES, PSAConfig
from .errors import ConfigError, ShapeError
from .schedule import level_index
from .values import MAX_LEVEL, Ratios, check_density, check_ratios, is_power_of_two, nearest

DROPPED = 8
"""Level index that stands for a skipped block while levels are computed (no block is pooled 256 times)."""


@dataclass(frozen=True)
class BlockMask:
    """Which block pairs a query block may see, and which of them must stay at level 1.

    Attributes:
        visible: bool [1, 1, M, N]; None when every pair is.
        pinned: bool [1|B, 1, M, N]; None when nothing is pinned.
    """

    visible: Tensor | None = None
    pinned: Tensor | None = None


def block_mask(
    length_q: int,
    length_k: int,
    block_m: int,
    block_n: int,
    *,
    is_causal: bool = False,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> BlockMask:
    """Visibility and pins of every block pair.

    Text query blocks and text KV blocks are pinned. When causal (bottom-right aligned), so are the blocks that are not
    wholly visible to the query block's first row, and the first block that holds a real key.
    """
    first_q = torch.arange(0, length_q, block_m, device=device)
    first_k = torch.arange(0, length_k, block_n, device=device)
    last_q = (first_q + block_m).clamp(max=length_q) - 1
    last_k = (first_k + block_n).clamp(max=length_k) - 1
    visible = pinned = None
    if is_causal:
        shift = length_k - length_q
        visible = first_k[None, :] <= (last_q + shift)[:, None]
        pinned = (last_k[None, :] > (first_q + shift)[:, None])[None, None]
        pinned = pinned | _first_real_block(first_k, block_n, key_mask)
    if text_length:
        text_q = _holds_text(first_q, last_q, length_q, text_length, text_position)
        text_k = _holds_text(first_k, last_k, length_k, text_length, text_position)
        text = (text_q[:, None] | text_k[None, :])[None, None]
        pinned = text if pinned is None else pinned | text
    if visible is not None and pinned is not None:
        visible = visible[None, None]
        pinned = pinned & visible
    return BlockMask(visible, pinned)


def _holds_text(first: Tensor, last: Tensor, length: int, text_length: int, position: str) -> Tensor:
    return first < text_length if position == "first" else last >= length - text_length


def _first_real_block(first_k: Tensor, block_n: int, key_mask: Tensor | None) -> Tensor:
    if key_mask is None:
        return (first_k == 0)[None, None, None, :]
    start = key_mask.to(torch.uint8).argmax(dim=-1)
    return (first_k[None, :] == (start // block_n * block_n)[:, None])[:, None, None, :]


def allocate_levels(
    importance: Tensor,
    *,
    mask_mode: str,
    mask_ratios: Ratios | None = None,
    density: float | Tensor | None = None,
    block_n: int,
    tau: float | None = None,
    exponent: float | Tensor = 1.0,
    rank_exponent: float = 0.0,
    keep_all: bool | Tensor = True,
    share_heads: bool = False,
    cap: Tensor | None = None,
    mask: BlockMask | None = None,
) -> Tensor:
    """Levels for every block pair (METHOD §3 and §4a).

    Rows are normalised first; an all-zero row counts as uniform; equal values keep their order.

    Args:
        importance: [B, H, M, N], non-negative.
        mask_mode: ``"topk"`` or ``"thresholdbound"`` (with ``mask_ratios``), or ``"proportional"`` (with ``density`` or
            ``tau``).
        block_n: KV block size, the bound of every level.
        exponent, rank_exponent, keep_all, tau, share_heads: of proportional mode, see :class:`psa.PSAConfig`.
            density, exponent and keep_all may be tensors [1|B, 1|H, 1, 1], one value per head.
        cap: [B, H|Hkv, N] coarsest level of each KV block, from :func:`similarity_cap`.
        mask: visible and pinned block pairs; quotas and shares count visible pairs only.

    Returns:
        uint8 [B, H, M, N]. In proportional mode the density is the largest that is not above ``density``, unless pins
        and caps alone exceed it.

    Raises:
        ConfigError, ShapeError.
    """
    if importance.ndim != 4 or not importance.dtype.is_floating_point:
        raise ShapeError(f"importance: expected floats [B, H, M, N], got {importance.dtype} {list(importance.shape)}")
    if not is_power_of_two(block_n) or block_n < 16:
        raise ConfigError(f"block_n: {block_n!r} is not a power of two of at least 16")
    if mask_mode not in MASK_MODES:
        raise ConfigError(f"mask_mode: {mask_mode!r} is unknown{nearest(mask_mode, MASK_MODES)}")
    if mask_ratios is not None and density is not None:
        raise ConfigError("mask_ratios and density exclude each other; give one")
    mask = mask or BlockMask()
    caps = None if cap is None else level_index(per_head(cap, importance.shape[1]))[:, :, None, :]
    shares = normalise(importance, mask.visible)
    if mask_mode in ("proportional", "auto"):
        if (density is None) == (tau is None):
            raise ConfigError("proportional: give either density or tau")
        if density is not None and not isinstance(density, Tensor):
            check_density(density, min(block_n, MAX_LEVEL), keep_all is not False)
        log_share = exponent * shares.clamp(min=2.0**-60).log2_()
        if rank_exponent:
            log_share -= rank_exponent * ranks(shares, mask).float().log2_()
        least = -60.0 * exponent - 31.0 * rank_exponent
        index = proportional(log_share, least, mask, caps, density, tau, keep_all, share_heads, block_n)
    else:
        if mask_ratios is None:
            raise ConfigError(f"{mask_mode}: mask_ratios are missing")
        index = ranked(shares, mask.visible, mask_mode, check_ratios(mask_ratios, block_n))
        if caps is not None:
            index = torch.where(index == DROPPED, index, torch.minimum(index, caps))
        index = apply_mask(index, mask)
    return levels_from(index)


def allocate_by(
    config: PSAConfig, importance: Tensor, cap: Tensor | None = None, mask: BlockMask | None = None
) -> Tensor:
    """:func:`allocate_levels` as ``config`` says."""
    names = ("mask_ratios", "density", "block_n", "tau", "exponent", "rank_exponent", "keep_all", "share_heads")
    settings = {name: getattr(config, name) for name in names}
    return allocate_levels(importance, mask_mode=str(config.mask_mode), **settings, cap=cap, mask=mask)


def levels_from(index: Tensor) -> Tensor:
    """2**index as uint8, 0 where ``DROPPED``."""
    levels = torch.bitwise_left_shift(torch.ones_like(index), index.clamp(max=7))
    return levels.masked_fill(index == DROPPED, 0).to(torch.uint8)


def apply_mask(index: Tensor, mask: BlockMask) -> Tensor:
    """Level indices with pinned blocks at level 1 and invisible ones dropped."""
    if mask.pinned is not None:
        index = index.masked_fill(mask.pinned, 0)
    if mask.visible is not None:
        index = index.masked_fill(~mask.visible, DROPPED)
    return index


def normalise(importance: Tensor, visible: Tensor | None) -> Tensor:
    """Rows that sum to one over the visible blocks, float32; all-zero rows become uniform."""
    weight = torch.nan_to_num(importance.float(), nan=0.0, posinf=torch.finfo(torch.float32).max).clamp(min=0)
    if visible is not None:
        weight = weight.masked_fill(~visible, 0.0)
    if weight.shape[-1] == 0:
        return weight
    peak = weight.amax(dim=-1, keepdim=True)
    even = torch.ones_like(weight) if visible is None else visible.to(weight.dtype).expand_as(weight)
    weight = torch.where(peak > 0, weight / peak.clamp(min=torch.finfo(torch.float32).tiny), even)
    return weight / weight.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def ranked(shares: Tensor, visible: Tensor | None, mode: str, ratios: Ratios) -> Tensor:
    """Level indices by position in the descending order of a row: topk quotas or cumulative thresholds (METHOD §3)."""
    count = shares.shape[-1]
    weight = shares if visible is None else shares.masked_fill(~visible, -1.0)
    sorted_weight, order = weight.sort(dim=-1, descending=True, stable=True)
    seen = torch.full((), count, device=shares.device) if visible is None else visible.sum(-1, keepdim=True)
    positions = torch.arange(count, device=shares.device)
    cumulative = sorted_weight.clamp(min=0).cumsum(-1) if mode == "thresholdbound" else None
    by_rank = torch.full_like(order, DROPPED, dtype=torch.int32)
    end = torch.zeros_like(seen)
    for level, (_, bound) in ratios.items():
        if level == 0:
            continue
        start = end
        if cumulative is None:
            end = (seen.double() * bound).floor().long()
        else:
            within = (cumulative <= bound + 1e-6).logical_and(positions < seen).sum(-1, keepdim=True)
            end = torch.where(within > 0, torch.minimum(within + 1, seen), start)
            if level == 1:
                floor = torch.minimum((seen.double() * 0.06).floor().long() + 1, seen)
                end = torch.maximum(end, floor)
        end = torch.maximum(end, start)
        by_rank.masked_fill_((positions >= start) & (positions < end), int(math.log2(level)))
    return torch.empty_like(by_rank).scatter_(-1, order, by_rank)


def ranks(shares: Tensor, mask: BlockMask) -> Tensor:
    """The place, from 1, of each block in its row's descending order; pinned and invisible blocks come last."""
    weight = shares
    if mask.pinned is not None:
        weight = weight.masked_fill(mask.pinned, -1.0)
    if mask.visible is not None:
        weight = weight.masked_fill(~mask.visible, -1.0)
    order = weight.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(1, shares.shape[-1] + 1, device=shares.device)
    return torch.empty_like(order).scatter_(-1, order, places.expand_as(order))


def proportional(
    log_share: Tensor,
    least: float | Tensor,
    mask: BlockMask,
    caps: Tensor | None,
    density: float | Tensor | None,
    tau: float | None,
    keep_all: bool | Tensor,
    share_heads: bool,
    block_n: int,
) -> Tensor:
    """Level indices ``round(log2(tau) - log_share)``, clamped to [0, log2 block_n] (METHOD §4a).

    ``log_share`` is log2 of share**exponent, never below ``least``. The optimum of minimising Σ share**p · log2(level)
    under Σ 1/level = budget keeps rows in proportion to share**p. ``tau`` is found by bisection: elementwise work, no
    sort. A fixed fractional offset per block pair, far below what importance can resolve, breaks ties so that the
    budget is met on constant rows too.
    """
    coarsest = int(math.log2(min(block_n, MAX_LEVEL)))
    log_share = log_share + _tie_break(log_share)

    limit = coarsest if keep_all is True else DROPPED
    if isinstance(keep_all, Tensor):
        limit = torch.where(keep_all, float(coarsest), float(DROPPED))

    def indices(log_tau: Tensor) -> Tensor:
        """Level indices as floats; above ``coarsest`` is dropped."""
        index = (log_tau - log_share + 0.5).floor_().clamp_(min=0)
        index = torch.minimum(index, limit) if isinstance(limit, Tensor) else index.clamp_(max=limit)
        if caps is not None:
            index = torch.where(index > coarsest, index, torch.minimum(index, caps.to(index.dtype)))
        return apply_mask(index, mask)

    def final(log_tau: Tensor) -> Tensor:
        index = indices(log_tau)
        return torch.where(index > coarsest, float(DROPPED), index).to(torch.int32)

    if tau is not None:
        log_tau = torch.full_like(log_share[..., :1, :1], math.log2(tau))
        return final(log_tau)

    assert density is not None  # checked by allocate_levels
    over = (1, 2, 3) if share_heads else (2, 3)
    pairs = torch.ones_like(log_share[..., :1, :1]) if mask.visible is None else mask.visible
    total = pairs.expand_as(log_share).sum(over, keepdim=True, dtype=torch.float32)
    low = torch.zeros_like(total) + (least - 2.0)
    high = torch.full_like(total, coarsest + 3.0)
    for _ in range(32):
        middle = 0.5 * (low + high)
        kept = functional.threshold(indices(middle).neg_().exp2_(), 0.75 * 2.0**-coarsest, 0.0).sum(over, keepdim=True)
        fits = kept <= density * total
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
    return final(high)


def _tie_break(log_share: Tensor) -> Tensor:
    """A fixed offset in [0, 1/64) for each (query block, KV block): multiples of the golden ratio, modulo one.

    The same in every head, so that a process that holds some of the heads selects what one with all of them does.
    """
    m, n = log_share.shape[-2:]
    steps = torch.arange(m * n, device=log_share.device, dtype=torch.float64)
    return ((steps * 0.6180339887498949) % 1.0 / 64).to(log_share.dtype).view(1, 1, m, n)

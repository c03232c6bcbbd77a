"""Stages 3 and 4, importance and levels, as opaque torch operators, so that compiled graphs hold one node for each.

``psa::select`` makes levels, ``psa::probe`` only the automatic mode's choice.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from .allocate import BlockMask, allocate_by, block_mask
from .auto import Layer, choose, select_auto, slope_shares
from .autocast import unaffected
from .backends import planner
from .candidates import Choice
from .caps import outlier_cap, similarity_cap, with_outliers
from .config import PSAConfig
from .importance import block_scores, importance, measured_mass, score_rows
from .memory import mean_square, scratch_elements
from .schedule import level_index
from .vmap import batched

SELECT_AT_ONCE = 1 << 25
"""Query elements above which a CPU plans heads one by one, so that a long sequence's scratch is that of one head. A
GPU, which one head would leave idle, plans as many together as its own limit takes (:mod:`psa.memory`)."""


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


@torch.library.custom_op("psa::select", mutates_args=())
@unaffected
def select(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    given: Tensor | None,
    key_mask: Tensor | None,
    choice: Tensor | None,
    config_key: str,
    scale: float,
    is_causal: bool,
    text_length: int,
    text_position: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stages 3 and 4 on reordered tokens. v lets the automatic mode probe; ``choice`` [B, H, 4] spares it.

    Returns, each empty where the configuration has no use for it:
        levels uint8 [B, H, M, N]; query_power float32 [B, H, D] and bias_cap float32 [B, H] of the variance bias;
        pair_bias float16 [B, H, M, N] of the measured bias; slope float16 [B, H, M, N]; choice float32 [B, H, 5]: the
        automatic mode's (:class:`psa.candidates.Choice`), and the importance's concentration, by which drift shows.
    """
    config = PSAConfig.from_key(config_key)
    q, k = q.detach(), k.detach()
    device = None if 0 in (*q.shape, *k.shape) else planner(q, k, config)
    pooled = config.importance == "pooled" and config.bias != "measured"
    split = device is None or not pooled or config.mask_mode == "auto"
    together = _heads_at_once(q)
    if split and together and not config.share_heads:
        settings = (config_key, scale, is_causal, text_length, text_position)
        levels, power, caps, pairs, slope, facts = _in_groups(
            lambda *some: select(*some, *settings), q, k, v, given, key_mask, choice, together
        )
        return levels, power, caps, pairs, slope, facts
    mask = _block_mask(q, k, config, is_causal, text_length, text_position, key_mask)
    shape = (q.shape[0], q.shape[1], _blocks(q.shape[2], config.block_m), _blocks(k.shape[2], config.block_n))
    where = {"is_causal": is_causal, "text_length": text_length, "text_position": text_position, "key_mask": key_mask}
    none, none_half = q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float16)
    if config.type == "dense" or 0 in (*shape, q.shape[2]):
        levels = torch.ones(shape, dtype=torch.uint8, device=q.device)
        levels = levels if mask.visible is None else levels * mask.visible
        return levels, none, none.clone(), none_half, none_half.clone(), none.clone()
    scored, ratio = given, None
    if config.bias == "measured":
        measured, ratio = measured_mass(q, k, config, scale=scale, is_causal=is_causal, key_mask=key_mask)
        scored = measured if scored is None else scored
    elif scored is None and device is not None and pooled:
        scored = device.plan_importance(q, k, config, scale=scale, is_causal=is_causal, key_mask=key_mask)
    elif scored is None:
        scored = importance(q, k, config, scale=scale, is_causal=is_causal, key_mask=key_mask)
    scored = scored.expand(shape)
    cap = similarity_cap(k, config.block_n, config.sim_thresholds, key_mask) if config.use_sim_mask else None
    if config.mask_mode == "auto":
        layer = _layer(q, k, v, _known(scored.float()), mask, cap, config, scale, is_causal, key_mask)
        if given is not None:
            layer = replace(layer, finer=None)
        if device is not None and not config.published:
            layer = replace(layer, device_levels=partial(device.plan_levels, q, k, config, caps=layer.cap, **where))
        levels, caps, shares, chosen = select_auto(layer, None if choice is None else Choice.unpack(choice))
        facts = torch.cat([chosen.pack(), concentration(scored)[..., None]], dim=-1)
        shares = shares if config.slope else none_half.clone()
        return levels, layer.power, caps.contiguous(), none_half, shares, facts
    levels = (
        device.plan_levels(q, k, config, scored, caps=cap, **where)
        if device is not None
        else allocate_by(config, scored, cap, mask)
    )
    power, caps = none, none.clone()
    if config.bias == "variance":
        power = mean_square(q)
        caps = power.new_full(shape[:2], float(config.bias_cap or 0.0))
    pairs = none_half
    if ratio is not None:
        pairs = ratio.gather(-1, level_index(levels).clamp(min=0).long()[..., None]).squeeze(-1)
    return levels, power, caps, pairs, slope_shares(scored, levels) if config.slope else none_half.clone(), none.clone()


@torch.library.custom_op("psa::probe", mutates_args=())
@unaffected
def probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    config_key: str,
    scale: float,
    is_causal: bool,
    text_length: int,
    text_position: str,
) -> Tensor:
    """What :func:`select` would choose for every head at one density, float32 [B, H, 4]
    (:meth:`psa.candidates.Choice.pack`), and no more: importance is estimated for the probed query blocks alone."""
    settings = (config_key, scale, is_causal, text_length, text_position)
    config, together = PSAConfig.from_key(config_key), _heads_at_once(q)
    q, k = q.detach(), k.detach()
    if together:
        return _in_groups(
            lambda q, k, v, _, mask, __: (probe(q, k, v, mask, *settings),), q, k, v, None, key_mask, None, together
        )[0]
    where = {"scale": scale, "is_causal": is_causal, "key_mask": key_mask}
    if config.bias == "measured":
        estimate = _known(measured_mass(q, k, config, **where)[0])
    else:
        estimate = lambda only: block_scores(score_rows(q, k, config, **where).of_blocks(only))  # noqa: E731
    mask = _block_mask(q, k, config, is_causal, text_length, text_position, key_mask)
    cap = similarity_cap(k, config.block_n, config.sim_thresholds, key_mask) if config.use_sim_mask else None
    return choose(_layer(q, k, v, estimate, mask, cap, config, scale, is_causal, key_mask)).pack()


@probe.register_fake
def _(q, k, v, key_mask, config_key, scale, is_causal, text_length, text_position):
    return q.new_empty((*q.shape[:2], 4), dtype=torch.float32)


def _layer(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    estimate: Callable[..., Tensor],
    mask: BlockMask,
    cap: Tensor | None,
    config: PSAConfig,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
) -> Layer:
    """What the automatic mode chooses by. cap: of the configuration, [B, Hkv, N]; outliers' blocks join in here."""
    power = mean_square(q)
    cap = with_outliers(cap, outlier_cap(k, power, scale, config.block_n, key_mask))
    finer = _finer(q, k, config, scale, is_causal, key_mask)
    return Layer(q, k, v, power, estimate, mask, cap, config, scale, is_causal, key_mask, finer)


def _known(scored: Tensor) -> Callable[..., Tensor]:
    """Importance [B, H, M, N] that is known already, as :class:`psa.auto.Layer` takes it."""
    return lambda only=None: scored if only is None else scored[:, :, only]


def _block_mask(
    q: Tensor, k: Tensor, config: PSAConfig, is_causal: bool, text_length: int, text_position: str,
    key_mask: Tensor | None,
) -> BlockMask:  # fmt: skip
    return block_mask(
        q.shape[2],
        k.shape[2],
        config.block_m,
        config.block_n,
        is_causal=is_causal,
        text_length=text_length,
        text_position=text_position,
        key_mask=key_mask,
        device=q.device,
    )


def _finer(
    q: Tensor, k: Tensor, config: PSAConfig, scale: float, is_causal: bool, key_mask: Tensor | None
) -> Callable[..., Tensor] | None:
    """Importance pooled half as coarsely in both directions, see :class:`psa.auto.Layer`. None where there is no such
    thing."""
    rows, cols = config.importance_rows // 2, config.importance_cols // 2
    if config.importance != "pooled" or not rows or not cols:
        return None
    fine = config.replace(importance_rows=rows, importance_cols=cols)
    where = {"scale": scale, "is_causal": is_causal, "key_mask": key_mask}
    device, pooled = planner(q, k, fine), cache(partial(score_rows, q, k, fine, **where))

    def estimate(*, only: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        if only is not None:
            return block_scores(pooled().of_blocks(only), wanted)
        if device is None:
            return block_scores(pooled(), wanted)
        return device.plan_importance(q, k, fine, wanted=wanted, **where)

    return estimate


def concentration(scored: Tensor) -> Tensor:
    """Mean over query blocks of the sum of squared shares, float32 [B, H]: 1/N when even, 1 when one block has all."""
    share = scored.float() / scored.float().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return share.square().sum(-1).mean(-1)


def _heads_at_once(q: Tensor) -> int:
    """How many heads are planned together; 0: all."""
    limit = scratch_elements(q, SELECT_AT_ONCE)
    if q.numel() <= limit or q.shape[0] * q.shape[1] <= 1:
        return 0
    return 1 if q.device.type == "cpu" else max(1, limit // (q.shape[2] * q.shape[3]))


def _in_groups(
    function: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    given: Tensor | None,
    key_mask: Tensor | None,
    choice: Tensor | None,
    together: int,
) -> list[Tensor]:
    """``function`` of these tensors for at most so many heads at a time as are to go ``together``, whole groups of them
    if more. It gives tensors [B, H, ...]."""
    group = q.shape[1] // k.shape[1]
    step = 1 if together < group else together // group * group
    joined: list[Tensor] = []
    for b in range(q.shape[0]):
        item = slice(b, b + 1)
        mask = None if key_mask is None else key_mask[item]
        for h in range(0, q.shape[1], step):
            head, kv = slice(h, h + step), slice(h // group, -(-(h + step) // group))
            values = None if v is None else v[item, kv]
            scores = None if given is None else given.expand(q.shape[0], q.shape[1], -1, -1)[item, head]
            chosen = None if choice is None else choice.expand(q.shape[0], q.shape[1], -1)[item, head]
            parts = function(q[item, head], k[item, kv], values, scores, mask, chosen)
            if not joined:
                joined = [x.new_empty((*q.shape[:2], *x.shape[2:])) if x.numel() else x for x in parts]
            for whole, part in zip(joined, parts, strict=True):
                if part.numel():
                    whole[b, head] = part[0]
    return joined


@select.register_fake
def _(q, k, v, given, key_mask, choice, config_key, scale, is_causal, text_length, text_position):
    config = PSAConfig.from_key(config_key)
    shape = (q.shape[0], q.shape[1], _blocks(q.shape[2], config.block_m), _blocks(k.shape[2], config.block_n))
    sparse = config.type != "dense" and 0 not in (*shape, q.shape[2])
    auto = sparse and config.mask_mode == "auto"
    variance = auto or (sparse and config.bias == "variance")
    none = (0,)
    return (
        q.new_empty(shape, dtype=torch.uint8),
        q.new_empty((q.shape[0], q.shape[1], q.shape[3]) if variance else none, dtype=torch.float32),
        q.new_empty(shape[:2] if variance else none, dtype=torch.float32),
        q.new_empty(shape if sparse and config.bias == "measured" else none, dtype=torch.float16),
        q.new_empty(shape if sparse and config.slope else none, dtype=torch.float16),
        q.new_empty((*shape[:2], 5) if auto else none, dtype=torch.float32),
    )


torch.library.register_vmap(select, batched(select, 0))
torch.library.register_vmap(probe, batched(probe, 0))

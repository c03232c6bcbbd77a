"""The method's stages as opaque torch operators, so that compiled graphs hold one node for each.

``psa::select`` makes levels, ``psa::attend`` and ``psa::attend_backward`` call the named backend. Each has a fake
kernel and a rule for ``torch.func.vmap``.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from .allocate import allocate_by, block_mask
from .auto import Layer, select_auto, slope_shares
from .autocast import unaffected
from .backends import choose, planner
from .backends.base import Selection
from .candidates import Choice
from .caps import outlier_cap, similarity_cap, with_outliers
from .config import PSAConfig
from .importance import block_scores, importance, measured_mass, score_rows
from .memory import mean_square, scratch_elements
from .schedule import level_index

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
    limit = scratch_elements(q, SELECT_AT_ONCE)
    if split and q.numel() > limit and q.shape[0] * q.shape[1] > 1 and not config.share_heads:
        settings = (config_key, scale, is_causal, text_length, text_position)
        together = 1 if q.device.type == "cpu" else max(1, limit // (q.shape[2] * q.shape[3]))
        return _select_in_groups(q, k, v, given, key_mask, choice, together, *settings)
    mask = block_mask(
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
        power = mean_square(q)
        cap = with_outliers(cap, outlier_cap(k, power, scale, config.block_n, key_mask))
        allocate = None
        if device is not None and not config.published:
            allocate = partial(device.plan_levels, q, k, config, caps=cap, **where)
        finer = None if given is not None else _finer(q, k, config, scale, is_causal, key_mask)
        layer = Layer(q, k, v, power, scored.float(), mask, cap, config, scale, is_causal, key_mask, finer, allocate)
        levels, caps, shares, chosen = select_auto(layer, None if choice is None else Choice.unpack(choice))
        facts = torch.cat([chosen.pack(), concentration(scored)[..., None]], dim=-1)
        shares = shares if config.slope else none_half.clone()
        return levels, power, caps.contiguous(), none_half, shares, facts
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


def _finer(
    q: Tensor, k: Tensor, config: PSAConfig, scale: float, is_causal: bool, key_mask: Tensor | None
) -> Callable[..., Tensor] | None:
    """Importance pooled half as coarsely in both directions, of all query blocks or ``only`` some, int64 [S]; heads
    that are not ``wanted``, bool [B, H], may be left out. None where there is no such thing."""
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


def _select_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    given: Tensor | None,
    key_mask: Tensor | None,
    choice: Tensor | None,
    together: int,
    *settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`select` for at most so many heads at a time as are to go ``together``, whole groups of them if more."""
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
            parts = select(q[item, head], k[item, kv], values, scores, mask, chosen, *settings)
            if not joined:
                joined = [x.new_empty((*q.shape[:2], *x.shape[2:])) if x.numel() else x for x in parts]
            for whole, part in zip(joined, parts, strict=True):
                if part.numel():
                    whole[b, head] = part[0]
    levels, power, caps, pairs, slope, facts = joined
    return levels, power, caps, pairs, slope, facts


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


@torch.library.custom_op("psa::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    query_power: Tensor | None,
    bias_cap: Tensor | None,
    pair_bias: Tensor | None,
    key_mask: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Stages 5 and 6: out [B, H, Lq, D] in the dtype of q, lse float32 [B, H, Lq]."""
    selection = Selection(levels, block_m, block_n, scale, is_causal, query_power, bias_cap, pair_bias, key_mask)
    return choose(backend, q, k, v, selection).forward(q.detach(), k.detach(), v.detach(), selection)


@attend.register_fake
def _(q, k, v, levels, query_power, bias_cap, pair_bias, key_mask, block_m, block_n, scale, is_causal, backend):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=lse_dtype)


@torch.library.custom_op("psa::attend_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    levels: Tensor,
    query_power: Tensor | None,
    bias_cap: Tensor | None,
    pair_bias: Tensor | None,
    key_mask: Tensor | None,
    block_m: int,
    block_n: int,
    scale: float,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their own dtypes. Levels and biases are constants."""
    selection = Selection(levels, block_m, block_n, scale, is_causal, query_power, bias_cap, pair_bias, key_mask)
    return choose(backend, q, k, v, selection).backward(grad_out, grad_lse, q, k, v, out, lse, selection)


@attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, levels, query_power, bias_cap, pair_bias, key_mask, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, levels, query_power, bias_cap, pair_bias, key_mask)


def _differentiate(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *constants = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attend_backward(grad_out, grad_lse, q, k, v, out, lse, *constants, *ctx.settings)
    return (*grads, *([None] * 10))


attend.register_autograd(_differentiate, setup_context=_save)


def _fold(info, dims, args):
    """Moves each mapped dimension into the batch dimension; what is not mapped is repeated for every item."""
    folded = []
    for arg, dim in zip(args, dims, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
        folded.append(arg)
    return folded


def _spread(tensor, batch):
    """[V, 1|B, ...] -> [V * B, ...]."""
    return tensor.expand(tensor.shape[0], batch, *tensor.shape[2:]).flatten(0, 1)


def batched(op, first_tensors):
    """The rule of an operator for ``torch.func.vmap``: the mapped dimension joins the batch."""

    def rule(info, dims, *args):
        args = _fold(info, dims, args)
        batch = args[first_tensors].shape[1]
        flat = [_spread(arg, batch) if isinstance(arg, Tensor) else arg for arg in args]
        outs = op(*flat)
        outs = tuple(o.unflatten(0, (info.batch_size, batch)) if o.numel() else o for o in outs)
        return outs, tuple(0 if o.numel() else None for o in outs)

    return rule


torch.library.register_vmap(select, batched(select, 0))
torch.library.register_vmap(attend, batched(attend, 0))
torch.library.register_vmap(attend_backward, batched(attend_backward, 0))

"""The three calls of the library, `plan`, `attend` and their composition `psa_attention`, and what they accept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, planning
from .autocast import cast
from .backends import reference
from .checks import Grid, check_importance, check_key_mask, check_plan, check_scale, check_tensors, check_text
from .config import PSAConfig
from .errors import ConfigError
from .order import Arranged, Held, Tokens, arrange
from .plan import Plan
from .reorder import Permutation, SemanticState
from .slope import slope_correction
from .state import CONCENTRATION, ProbeState
from .whole import at_once, plan_and_attend


def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: PSAConfig | None = None,
    density: float | None = None,
    target_error: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    grid: Grid | None = None,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    return_plan: bool = False,
    backend: str = "auto",
    attn_mask: None = None,
    dropout_p: float = 0.0,
) -> Any:
    """Pyramid sparse attention, a drop-in for ``scaled_dot_product_attention``; differentiable in q, k and v.

    Args:
        q: [B, H, Lq, D], float32, float16 or bfloat16 (float64 off the GPU). Any strides.
        k, v: [B, Hkv, Lk, D], same dtype and device; Hkv must equal H unless ``enable_gqa``.
        config: all settings; default: the automatic mode, which probes every head and takes what measures best.
        density: share of the work to keep, in (0, 1], default .15. Overrides a published mode of ``config``.
        target_error: instead of a density, the relative error each head may have.
        is_causal: bottom-right aligned, as in flash-attention, when Lq differs from Lk.
        scale: default 1/sqrt(D).
        grid: (T, H, W) of the video tokens, token (t, h, w) at (t*H + h)*W + w; makes blocks neighbourhoods.
        text_length, text_position: text tokens beside the grid, ``"first"`` or ``"last"``; always read in full.
        key_mask: bool [B, Lk], True for real tokens.
        plan: reuse this one instead of making one.
        return_lse, return_plan: also return lse (natural log, [B, H, Lq]) and the Plan, in this order.
        backend: ``"auto"``, or a name of :func:`psa.backends`, which never falls back.
        attn_mask, dropout_p: accepted for compatibility; anything but None and 0 is refused.

    Returns:
        out [B, H, Lq, D]; with lse and plan, a tuple. Rows that see nothing are 0, their lse -inf.

    Raises:
        ShapeError, ConfigError, BackendError.
    """
    if attn_mask is not None:
        raise ConfigError("attn_mask: not supported; use is_causal, key_mask [B, Lk], or a Plan from levels")
    if dropout_p:
        raise ConfigError(f"dropout_p: attention dropout is not supported, got {dropout_p!r}")
    call = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    fixed = (config, density, target_error, grid, key_mask, text_length or None)
    if plan is None:
        settings = resolve_config(config, density, target_error)
        tokens = {"grid": grid, "text_length": text_length, "text_position": text_position, "key_mask": key_mask}
        out, plan = plan_then_attend(q, k, v, settings, backend, **call, **tokens, return_lse=return_lse)
    elif text_position != "last" or any(given is not None for given in fixed):
        names = "config, density, target_error, grid, key_mask, text_length and text_position"
        raise ConfigError(f"plan: a given plan fixes {names}; leave them out")
    else:
        out = attend(q, k, v, plan, **call, return_lse=return_lse, backend=backend)
    if not return_plan:
        return out
    return (*out, plan) if return_lse else (out, plan)


@torch.no_grad()
def make_plan(
    q: Tensor,
    k: Tensor,
    config: PSAConfig | None = None,
    *,
    v: Tensor | None = None,
    density: float | None = None,
    target_error: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    grid: Grid | None = None,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    importance: Tensor | None = None,
    state: SemanticState | None = None,
    probes: ProbeState | None = None,
    layer: object = 0,
    step: int | None = None,
) -> Plan:
    """Stages 2 to 4, exported as ``psa.plan``: token order, importance and levels.

    Arguments as in :func:`psa_attention`, and:

    Args:
        v: lets the automatic mode probe; without v and a choice to reuse it takes a fixed setting, no error is known,
            and ``probes`` records nothing.
        importance: [1|B, 1|H, M, N], scores of your own in the plan's token order, instead of ``config.importance``.
        state: centroids of the last call, ``plan.reorder_state`` of its plan (where tokens go by content).
        probes, layer, step: with both of ``probes`` and ``step``, the automatic mode reuses the layer's choice as the
            state says; without, it probes.
    """
    if isinstance(config, Tensor):
        raise ConfigError("config: expected a PSAConfig, got a Tensor; values go in by name, pass v=")
    settings = resolve_config(config, density, target_error)
    tokens = Tokens(is_causal, grid, text_length, text_position, key_mask)
    q, k, v = _checked(q, k, v, tokens, enable_gqa)
    scale, recorded = check_scale(scale, q.shape[-1]), _Recorded(probes, layer, step)
    if importance is not None:
        check_importance(importance, q, (-(-q.shape[2] // settings.block_m), -(-k.shape[2] // settings.block_n)))
        if settings.rearrange_method == "auto":
            raise ConfigError("importance: scores of your own need one token order; rearrange_method 'auto' tries two")
    choice, held = recorded.choice(settings, q, k)
    arranged = arrange(q, k, v, settings, tokens, scale=scale, state=state, choice=choice, held=held)
    return _plan(arranged, settings, tokens, scale, importance, recorded, choice)


class _Recorded(NamedTuple):
    """Where the automatic mode keeps what it chooses, if anywhere."""

    probes: ProbeState | None
    layer: object
    step: int | None

    def choice(self, config: PSAConfig, q: Tensor, k: Tensor) -> tuple[Tensor | None, Held | None]:
        """The choice to reuse, if any, and the order that it was made for."""
        if self.probes is None or self.step is None or config.mask_mode != "auto" or config.type == "dense":
            return None, None
        choice = self.probes.choice(self.layer, self.step, config, q, k)
        return choice, None if choice is None else self.probes.held(self.layer, self.step)

    def record(self, plan: Plan, reused: Tensor | None, held: Held | None) -> None:
        if self.probes is not None and self.step is not None:
            self.probes.record(self.layer, self.step, plan, reused, held)


def _plan(
    arranged: Arranged,
    settings: PSAConfig,
    tokens: Tokens,
    scale: float,
    importance: Tensor | None,
    recorded: _Recorded,
    reused: Tensor | None,
) -> Plan:
    """The plan of tokens in its order."""
    q, k, v = arranged[:3]
    choice = arranged.choice if reused is None else reused[..., :CONCENTRATION].contiguous()
    levels, power, caps, pairs, slope, chosen = planning.select(
        q,
        k,
        v,
        importance,
        arranged.key_mask,
        choice,
        settings.key,
        scale,
        tokens.is_causal,
        tokens.text_length,
        tokens.text_position,
    )
    if arranged.by_content is not None:
        chosen = torch.cat([chosen, arranged.by_content[..., None].float()], dim=-1)
    made = {"query_power": power, "bias_cap": caps, "pair_bias": pairs, "slope": slope, "choice": chosen}
    plan = _plan_of(arranged, settings, tokens, levels, **made)
    if reused is not None or v is not None:
        recorded.record(plan, reused, arranged.held)
    return plan


def _plan_of(arranged: Arranged, config: PSAConfig, tokens: Tokens, levels: Tensor, **made: Tensor) -> Plan:
    """The plan of levels and what an operator ``made`` beside them; what is empty has no use."""
    return Plan(
        levels,
        config.block_m,
        config.block_n,
        arranged.q.shape[2],
        arranged.k.shape[2],
        tokens.is_causal,
        arranged.permutation,
        key_mask=tokens.key_mask,
        config=config,
        text=(tokens.text_length, tokens.text_position),
        reorder_state=arranged.state,
        **{name: value for name, value in made.items() if value.numel()},
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Stages 5 to 7: attention over the pyramid as ``plan`` says. Differentiable in q, k and v, through lse too.

    q, k, v are in the caller's order; the plan's token order is applied and undone here. Levels and biases are
    constants for gradients. Arguments and errors as in :func:`psa_attention`.

    Returns:
        out [B, H, Lq, D], or (out, lse [B, H, Lq]).
    """
    q, k, v = cast(q, k, v)
    check_tensors(q, k, v, enable_gqa)
    scale = check_scale(scale, q.shape[-1])
    check_plan(plan, q, k, is_causal)
    order = plan.permutation
    if order is not None:
        q, k, v = order.apply_q(q), order.apply_k(k), order.apply_k(v)
    return _restored(*_read(q, k, v, plan, scale, is_causal, backend), order, return_lse)


def _read(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, is_causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """out and lse of tokens in the plan's order."""
    if q.numel() == 0 or k.shape[2] == 0:
        out, lse = q * 0.0, (q.sum(-1) * 0.0).float() - torch.inf
    else:
        selection = plan.selection(scale, is_causal)
        if backend == "reference":
            out, lse = reference.forward(q, k, v, selection)
        else:
            out, lse = ops.attend(
                q,
                k,
                v,
                selection.levels,
                selection.query_power,
                selection.bias_cap,
                selection.pair_bias,
                selection.key_mask,
                selection.block_m,
                selection.block_n,
                scale,
                is_causal,
                backend,
            )
        if plan.slope is not None:
            mask = selection.key_mask
            terms = (q, k, v, plan.levels, plan.slope, plan.block_m, plan.block_n, scale, mask)
            out = out + slope_correction(*terms)
    return out, lse


def _restored(out: Tensor, lse: Tensor, order: Permutation | None, return_lse: bool) -> Any:
    """What a call returns, in the caller's order."""
    if order is not None:
        out = order.restore_q(out)
        lse = order.restore_q(lse) if return_lse else lse
    return (out, lse) if return_lse else out


def plan_then_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: PSAConfig,
    backend: str,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    grid: Grid | None = None,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    state: SemanticState | None = None,
    probes: ProbeState | None = None,
    layer: object = 0,
    step: int | None = None,
) -> tuple[Any, Plan]:
    """:func:`make_plan` and :func:`attend`, as one operator where that is faster (see :mod:`psa.whole`): what
    :func:`attend` returns, and the plan. Tokens are put in order once."""
    tokens = Tokens(is_causal, grid, text_length, text_position, key_mask)
    together = at_once(q, k, config, backend)
    q, k, v = _checked(q, k, v, tokens, enable_gqa)
    scale, recorded = check_scale(scale, q.shape[-1]), _Recorded(probes, layer, step)
    choice, held = recorded.choice(config, q, k)
    arranged = arrange(q, k, v, config, tokens, scale=scale, state=state, choice=choice, held=held)
    q, k, v, mask, order, *_ = arranged
    if not together:
        with torch.no_grad():
            plan = _plan(arranged, config, tokens, scale, None, recorded, choice)
        return _restored(*_read(q, k, v, plan, scale, is_causal, backend), order, return_lse), plan
    out, lse, levels, power, cap = plan_and_attend(
        q, k, v, mask, config.key, scale, is_causal, text_length, text_position, backend
    )
    plan = _plan_of(arranged, config, tokens, levels, query_power=power, bias_cap=cap)
    return _restored(out, lse, order, return_lse), plan


def resolve_config(config: PSAConfig | None, density: float | None, target_error: float | None = None) -> PSAConfig:
    """The settings of a call: ``density`` or ``target_error`` select the automatic mode."""
    if config is not None and not isinstance(config, PSAConfig):
        raise ConfigError(f"config: expected a PSAConfig, got {type(config).__name__}; see psa.PSAConfig.from_dict")
    if density is not None and target_error is not None:
        raise ConfigError("target_error: excludes density; see max_density of PSAConfig for an upper bound")
    changes = {"density": density, "target_error": target_error}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return config if config is not None else _DEFAULT
    if torch.compiler.is_compiling():
        from .compiled import constant_config

        return constant_config((config or _DEFAULT).key, **changes)
    return (config or _DEFAULT).replace(**changes)


_DEFAULT = PSAConfig()


def _checked(q: Tensor, k: Tensor, v: Any, tokens: Tokens, enable_gqa: bool) -> tuple[Tensor, Tensor, Any]:
    """q, k and v (or None) as they take part, once everything about them is known to fit."""
    q, k, v = cast(q, k, v)
    check_tensors(q, k, v, enable_gqa)
    check_text(q, k, tokens.grid, tokens.text_length, tokens.text_position, tokens.is_causal)
    check_key_mask(tokens.key_mask, k)
    return q, k, v

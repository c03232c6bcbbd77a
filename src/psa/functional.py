"""The three calls of the library, `plan`, `attend` and their composition `psa_attention`, and what they accept."""

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import reference
from .config import PSAConfig
from .errors import ConfigError, ShapeError
from .plan import Plan
from .reorder import Permutation, SemanticState, reorder

Grid = tuple[int, int, int]


def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: PSAConfig | None = None,
    density: float | None = None,
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
        config: all settings; default: published topk, or what ``density`` selects.
        density: share of the work to keep, in (0, 1]; overrides the mode of ``config``.
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
    if plan is None:
        plan = make_plan(
            q,
            k,
            config,
            density=density,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            grid=grid,
            text_length=text_length,
            text_position=text_position,
            key_mask=key_mask,
        )
    elif config is not None or density is not None or key_mask is not None or grid is not None:
        raise ConfigError("plan: a given plan already fixes config, density, grid and key_mask; leave them out")
    out = attend(
        q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend
    )
    if not return_plan:
        return out
    return (*out, plan) if return_lse else (out, plan)


@torch.no_grad()
def make_plan(
    q: Tensor,
    k: Tensor,
    config: PSAConfig | None = None,
    *,
    density: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    grid: Grid | None = None,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    importance: Tensor | None = None,
    state: SemanticState | None = None,
) -> Plan:
    """Stages 2 to 4, exported as ``psa.plan``: token order, importance and levels.

    Arguments as in :func:`psa_attention`, and:

    Args:
        importance: [1|B, 1|H, M, N], scores of your own in the plan's token order, instead of ``config.importance``.
        state: centroids of the last call, ``plan.reorder_state`` of its plan (semantic and hybrid orders).
    """
    q, k = _autocast(q, k)
    check_tensors(q, k, None, enable_gqa)
    settings = resolve_config(config, density)
    scale = check_scale(scale, q.shape[-1])
    check_text(q, k, grid, text_length, text_position, is_causal)
    check_key_mask(key_mask, k)
    permutation = next_state = None
    if settings.use_rearrange and (grid is not None or settings.rearrange_method == "semantic") and not is_causal:
        permutation, next_state = _permutation(q, k, settings, grid, text_length, text_position, key_mask, state)
    mask_in_order = key_mask
    if permutation is not None:
        q, k = permutation.apply_q(q), permutation.apply_k(k)
        mask_in_order = None if key_mask is None else permutation.apply_k_mask(key_mask)
    blocks = (-(-q.shape[2] // settings.block_m), -(-k.shape[2] // settings.block_n))
    if importance is not None:
        check_importance(importance, q, blocks)
    levels, power, pairs = ops.select(
        q, k, importance, mask_in_order, settings.key, scale, is_causal, text_length, text_position
    )
    return Plan(
        levels,
        settings.block_m,
        settings.block_n,
        q.shape[2],
        k.shape[2],
        is_causal,
        permutation,
        query_power=power if power.numel() else None,
        bias_cap=power.new_full((1, 1), settings.bias_cap) if power.numel() else None,
        pair_bias=pairs if pairs.numel() else None,
        key_mask=key_mask,
        config=settings,
        text=(text_length, text_position),
        reorder_state=next_state,
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
    q, k, v = _autocast(q, k, v)
    check_tensors(q, k, v, enable_gqa)
    scale = check_scale(scale, q.shape[-1])
    check_plan(plan, q, k, is_causal)
    order = plan.permutation
    if order is not None:
        q, k, v = order.apply_q(q), order.apply_k(k), order.apply_k(v)
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
    if order is not None:
        out = order.restore_q(out)
        lse = order.restore_q(lse) if return_lse else lse
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over two disjoint sets of keys exactly: ``out = Σ exp(lse_i - lse) out_i``.

    Differentiable. Rows where both parts are empty (lse -inf) stay 0 and -inf.

    Args:
        out_a, out_b: [B, H, L, D]. lse_a, lse_b: [B, H, L], natural log.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        shapes = [list(t.shape) for t in (out_a, lse_a, out_b, lse_b)]
        raise ShapeError(f"merge: expected out [B, H, L, D] and lse [B, H, L] twice, got {shapes}")
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top.isneginf(), 0.0)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    return out.to(out_a.dtype), (safe.log() + top).masked_fill(empty, -torch.inf)


# -- what is accepted ------------------------------------------------------------------------------------------------


def resolve_config(config: PSAConfig | None, density: float | None) -> PSAConfig:
    """The settings of a call: ``density`` alone selects the proportional mode."""
    if config is not None and not isinstance(config, PSAConfig):
        raise ConfigError(f"config: expected a PSAConfig, got {type(config).__name__}; see psa.PSAConfig.from_dict")
    if density is None:
        return config if config is not None else _DEFAULT
    if torch.compiler.is_compiling():
        from .compiled import constant_config

        return constant_config((config or _DEFAULT).key, density)
    return (config or _DEFAULT).replace(density=density)


_DEFAULT = PSAConfig()


def check_tensors(q: Tensor, k: Tensor, v: Tensor | None, enable_gqa: bool) -> None:
    """Raises ShapeError unless q [B, H, Lq, D] and k, v [B, Hkv, Lk, D] fit together."""
    named = {"q": q, "k": k} | ({"v": v} if v is not None else {})
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ShapeError(f"{name}: expected [batch, heads, length, head_dim], got {got}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ShapeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ShapeError(
                f"{name}: {tensor.dtype} on {tensor.device} beside q, {q.dtype} on {q.device}; move or cast one"
            )
        if tensor.shape[0] != q.shape[0] or tensor.shape[3] != q.shape[3] or tensor.shape[3] == 0:
            raise ShapeError(f"{name}: batch and head_dim of {list(tensor.shape)} do not fit q {list(q.shape)}")
    if v is not None and v.shape != k.shape:
        raise ShapeError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads:
        if not enable_gqa:
            raise ShapeError(f"k: {kv_heads} heads beside {heads} of q; pass enable_gqa=True for grouped queries")
        if kv_heads == 0 or heads % kv_heads:
            raise ShapeError(f"k: {kv_heads} heads do not divide the {heads} heads of q")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale, 1/sqrt(D) by default; ConfigError unless finite and positive."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
        raise ConfigError(f"scale: {scale!r} is not a finite positive number")
    return float(scale)


def check_text(q: Tensor, k: Tensor, grid: Grid | None, text_length: int, text_position: str, is_causal: bool) -> None:
    """Raises unless grid and text fit the sequence."""
    if text_position not in ("first", "last"):
        raise ConfigError(f"text_position: {text_position!r} is neither 'first' nor 'last'")
    if isinstance(text_length, bool) or not isinstance(text_length, int) or text_length < 0:
        raise ConfigError(f"text_length: {text_length!r} is not a whole number from 0")
    length_q, length_k = q.shape[2], k.shape[2]
    if text_length > min(length_q, length_k):
        raise ShapeError(f"text_length: {text_length} is longer than the sequence ({min(length_q, length_k)})")
    if grid is None:
        return
    if is_causal:
        raise ConfigError("grid: a causal sequence keeps its order; leave grid out")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or not all(isinstance(s, int) and s > 0 for s in grid):
        raise ShapeError(f"grid: expected three positive whole numbers (T, H, W), got {grid!r}")
    tokens = grid[0] * grid[1] * grid[2] + text_length
    if length_q != tokens or length_k != tokens:
        raise ShapeError(
            f"grid: {grid[0]}×{grid[1]}×{grid[2]} video + {text_length} text tokens = {tokens}, "
            f"but q has {length_q} and k {length_k}"
        )


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    """Raises ShapeError unless key_mask is bool [B, Lk]."""
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected:
        got = f"{key_mask.dtype} {list(key_mask.shape)}" if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise ShapeError(f"key_mask: expected bool {list(expected)} (True = real token), got {got}")
    if key_mask.device != k.device:
        raise ShapeError(f"key_mask: on {key_mask.device}, but k is on {k.device}")


def check_importance(importance: Tensor, q: Tensor, blocks: tuple[int, int]) -> None:
    """Raises ShapeError unless importance is floating [1|B, 1|H, M, N]."""
    ok = isinstance(importance, Tensor) and importance.ndim == 4 and importance.dtype.is_floating_point
    if (
        not ok
        or importance.shape[0] not in (1, q.shape[0])
        or importance.shape[1] not in (1, q.shape[1])
        or tuple(importance.shape[2:]) != blocks
    ):
        got = list(importance.shape) if isinstance(importance, Tensor) else type(importance).__name__
        raise ShapeError(f"importance: expected floats [1|{q.shape[0]}, 1|{q.shape[1]}, *{list(blocks)}], got {got}")


def check_plan(plan: Plan, q: Tensor, k: Tensor, is_causal: bool) -> None:
    """Raises unless the plan was made for tensors of these shapes and this causality."""
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan: expected a Plan, got {type(plan).__name__}; see psa.plan and Plan.from_levels")
    if plan.is_causal is not None and plan.is_causal != is_causal:
        raise ConfigError(f"plan: made with is_causal={plan.is_causal}, used with is_causal={is_causal}")
    expected = (-(-q.shape[2] // plan.block_m), -(-k.shape[2] // plan.block_n))
    lengths = (plan.length_q, plan.length_k)
    if (
        tuple(plan.levels.shape[2:]) != expected
        or plan.levels.shape[0] not in (1, q.shape[0])
        or plan.levels.shape[1] not in (1, q.shape[1])
        or (None not in lengths and lengths != (q.shape[2], k.shape[2]))
    ):
        raise ShapeError(
            f"plan: levels {list(plan.levels.shape)} in blocks {plan.block_m}×{plan.block_n} "
            f"(lengths {lengths[0]}, {lengths[1]}) do not fit q {list(q.shape)} and k {list(k.shape)}"
        )
    if plan.levels.device != q.device:
        raise ShapeError(f"plan: on {plan.levels.device}, but q is on {q.device}; use plan.to(device)")
    check_key_mask(plan.key_mask, k)


def _permutation(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    grid: Grid | None,
    text_length: int,
    text_position: str,
    key_mask: Tensor | None,
    state: SemanticState | None,
) -> tuple[Permutation, SemanticState | None]:
    return reorder(
        config.rearrange_method,
        q,
        k,
        grid,
        text_length=text_length,
        text_position=text_position,
        tile_size=config.tile_size,
        state=state,
        key_mask=key_mask,
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the inputs of ``scaled_dot_product_attention``."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors)

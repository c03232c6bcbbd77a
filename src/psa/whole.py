"""Stages 3 to 6 as one operator, where the GPU's kernels do all of them in five launches.

Planning and attention share a pyramid and a schedule there, which a plan that is made apart cannot.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops, planning
from .backends import choose, planner
from .backends.base import Selection
from .config import PSAConfig
from .vmap import batched


def at_once(q: Any, k: Any, config: PSAConfig, backend: str) -> bool:
    """Whether a call is this one operator: a fixed setting with pooled importance, on a GPU, with tokens on both sides.

    Arguments that are no tensors are left to the checks that name them.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and on_gpu(q) and q.numel() and k.numel()):
        return False
    fixed = config.type == "psa" and config.mask_mode != "auto" and not config.slope
    pooled = config.importance == "pooled" and config.bias != "measured"
    return backend in ("auto", "triton") and fixed and pooled


def on_gpu(q: Tensor) -> bool:
    return q.is_cuda


@torch.library.custom_op("psa::plan_and_attend", mutates_args=())
def plan_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    config_key: str,
    scale: float,
    is_causal: bool,
    text_length: int,
    text_position: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`psa.planning.select` and :func:`psa.ops.attend` do one after the other, on reordered tokens.

    Returns:
        out [B, H, Lq, D], lse float32 [B, H, Lq], levels uint8 [B, H, M, N]; query_power float32 [B, H, D] and bias_cap
        float32 [B, H] of the variance bias, empty without it.
    """
    config = PSAConfig.from_key(config_key)
    q, k, v = q.detach(), k.detach(), v.detach()
    asked = Selection(q.new_empty(0), config.block_m, config.block_n, scale, is_causal, key_mask=key_mask)
    chosen, device = choose(backend, q, k, v, asked), planner(q, k, config)
    if device is not None and chosen is device:
        where = {"is_causal": is_causal, "text_length": text_length, "text_position": text_position}
        out, lse, made = device.plan_and_attend(q, k, v, config, scale=scale, key_mask=key_mask, **where)
        power, cap = (
            q.new_empty(0, dtype=torch.float32) if x is None else x for x in (made.query_power, made.bias_cap)
        )
        return out, lse, made.levels, power, cap
    levels, power, cap, *_ = planning.select(
        q, k, None, None, key_mask, None, config_key, scale, is_causal, text_length, text_position
    )
    bias = (power, cap) if power.numel() else (None, None)
    made = Selection(levels, config.block_m, config.block_n, scale, is_causal, *bias, key_mask=key_mask)
    return *chosen.forward(q, k, v, made), levels, power, cap


@plan_and_attend.register_fake
def _(q, k, v, key_mask, config_key, scale, is_causal, text_length, text_position, backend):
    config = PSAConfig.from_key(config_key)
    blocks = (-(-q.shape[2] // config.block_m), -(-k.shape[2] // config.block_n))
    variance = config.bias == "variance"
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
        q.new_empty((*q.shape[:2], *blocks), dtype=torch.uint8),
        q.new_empty((*q.shape[:2], q.shape[3]) if variance else (0,), dtype=torch.float32),
        q.new_empty(q.shape[:2] if variance else (0,), dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    q, k, v, key_mask, config_key, ctx.scale, ctx.is_causal, _, _, ctx.backend = inputs
    ctx.config = PSAConfig.from_key(config_key)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _differentiate(ctx, grad_out, grad_lse, *_):
    q, k, v, key_mask, out, lse, levels, power, cap = ctx.saved_tensors
    bias = (power, cap) if power.numel() else (None, None)
    grads = ops.attend_backward(
        torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, q, k, v, out, lse, levels, *bias, None,
        key_mask, ctx.config.block_m, ctx.config.block_n, ctx.scale, ctx.is_causal, ctx.backend,
    )  # fmt: skip
    return (*grads, *([None] * 7))


plan_and_attend.register_autograd(_differentiate, setup_context=_save)
torch.library.register_vmap(plan_and_attend, batched(plan_and_attend, 0))

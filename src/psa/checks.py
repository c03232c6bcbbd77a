"""What the public functions accept: each check raises an error that says what was expected and what came."""

import math

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError
from .plan import Plan

Grid = tuple[int, int, int]


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
    power = plan.query_power
    if power is not None and power.shape[-1] != q.shape[3]:
        raise ShapeError(f"plan: made for head_dim {power.shape[-1]}, used with q {list(q.shape)}")
    if plan.levels.device != q.device:
        raise ShapeError(f"plan: on {plan.levels.device}, but q is on {q.device}; use plan.to(device)")
    check_key_mask(plan.key_mask, k)

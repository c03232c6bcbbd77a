"""The fast path wherever there is no GPU kernel: compiled C on CPUs that have a compiler, else plain torch operators.

Two engines serve the same call. `native` (float32, bfloat16, float16 on a CPU; computes in float32) is the C code of
`psa.backends.native`. `blocks` runs on any device and in float64 too: per query block it gathers the rows that the
plan selects, multiplies, normalises, multiplies. Both need memory O(L) beyond their inputs and the plan, and both give
the same bits run after run.
"""

import torch
from torch import Tensor

from . import blocks
from .base import Selection
from .native import calls, unavailable_reasons

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def device_reasons() -> list[str]:
    return []


def unsupported_reasons(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> list[str]:
    """The torch backend serves any device and the four common floating dtypes."""
    if q.dtype not in (*HALF_OR_SINGLE, torch.float64):
        return [f"dtype {q.dtype} is not one of float32, bfloat16, float16, float64"]
    return []


def native_reasons() -> list[str]:
    """Why the compiled engine cannot be used on this machine; [] = it can. May compile it (about two seconds, once)."""
    return unavailable_reasons()


def engine_for(q: Tensor) -> str:
    """Which engine serves tensors like q: "native" or "blocks"."""
    servable = q.device.type == "cpu" and q.dtype in HALF_OR_SINGLE
    return "native" if servable and not native_reasons() else "blocks"


@torch.no_grad()
def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Pyramid attention with the levels as given (METHOD: §2).

    Returns:
        out [B, H, Lq, D] in the dtype of q; lse [B, H, Lq], natural log, float32 (float64 for float64 inputs). Rows
        that select nothing: out 0, lse -inf.
    """
    if q.numel() == 0 or k.numel() == 0:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(q.shape), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    engine = calls if engine_for(q) == "native" else blocks
    out, lse = engine.forward(q, k, v, selection)
    return out.to(q.dtype), lse


@torch.no_grad()
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their own dtypes; levels and biases are constants. grad_lse may be None."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    engine = calls if engine_for(q) == "native" else blocks
    dq, dk, dv = engine.backward(grad_out, grad_lse, q, k, v, out, lse, selection)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

"""Attention over disjoint sets of keys, put together."""

import torch
from torch import Tensor

from .errors import ShapeError


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

"""Stages 5 and 6, attention over the pyramid, as opaque torch operators: compiled graphs hold one node for each.

``psa::attend`` and ``psa::attend_backward`` call the named backend.
"""

import torch
from torch import Tensor

from .backends import choose
from .backends.base import Selection
from .vmap import batched


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


torch.library.register_vmap(attend, batched(attend, 0))
torch.library.register_vmap(attend_backward, batched(attend_backward, 0))

"""Which order tokens are cut into blocks in: stage 2, as :func:`psa.plan` and :func:`psa.psa_attention` take it.

With ``rearrange_method="auto"`` every KV head has the order that its probes measure to be better: the place on the grid
alone (Gilbert), or content first (hybrid).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .auto import needs_curve, one_density
from .checks import Grid
from .config import PSAConfig
from .reorder import Permutation, SemanticState, reorder
from .reorder.keys import key_order
from .state import BY_CONTENT, CONCENTRATION


class Tokens(NamedTuple):
    """What a call says of its tokens, beside their values."""

    is_causal: bool
    grid: Grid | None
    text_length: int
    text_position: str
    key_mask: Tensor | None


class Arranged(NamedTuple):
    """q, k, v and key mask in the plan's token order, and how they came there."""

    q: Tensor
    k: Tensor
    v: Any
    """None where the call has none."""
    key_mask: Tensor | None
    permutation: Permutation | None
    """None: the caller's order stays."""
    state: SemanticState | None
    """Centroids for the next call."""
    by_content: Tensor | None = None
    """Heads whose tokens go by content, bool [B, H]; None where the order is not chosen per head."""
    choice: Tensor | None = None
    """What the probes of both orders chose beside it, float32 [B, H, 4]; None where there was no need to probe."""


def arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: PSAConfig,
    tokens: Tokens,
    *,
    scale: float,
    state: SemanticState | None = None,
    choice: Tensor | None = None,
) -> Arranged:
    """q, k and v (or None) in the plan's token order. ``choice`` is the automatic mode's to reuse; without one, the
    order ``"auto"`` probes both orders, and without v too it takes the first."""
    method = config.rearrange_method
    known = choice is not None and choice.shape[-1] > BY_CONTENT
    fixed = config.type == "dense" or tokens.is_causal or not config.use_rearrange or 0 in (*q.shape, *k.shape)
    if method != "auto" or fixed or not (known or v is not None):
        method = "Gilbert" if method == "auto" else method
        return _moved(q, k, v, tokens, *token_order(q, k, method, config, tokens, state))
    place, _ = _base_order(q, k, "Gilbert", config, tokens, None)
    place = _masked_last(place or _unmoved(q, k), tokens)
    method = "semantic" if tokens.grid is None else "hybrid"
    content, state = _base_order(q, k, method, config, tokens, state)
    assert content is not None
    if known:
        assert choice is not None
        by_content, probed = choice[..., BY_CONTENT] > 0.5, None
        order = _with_sorted_keys(q, k, place.where(by_content, content), config, tokens)
    else:
        place, content = (_with_sorted_keys(q, k, base, config, tokens) for base in (place, content))
        by_content, probed = _probed(q, k, v, config, tokens, scale, place, content)
        order = place.where(by_content, content)
    return _moved(q, k, v, tokens, order, state)._replace(by_content=by_content, choice=probed)


def _moved(
    q: Tensor, k: Tensor, v: Tensor | None, tokens: Tokens, order: Permutation | None, state: SemanticState | None
) -> Arranged:
    if order is None:
        return Arranged(q, k, v, tokens.key_mask, None, state)
    v = None if v is None else order.apply_k(v)
    mask = None if tokens.key_mask is None else order.apply_k_mask(tokens.key_mask)
    return Arranged(order.apply_q(q), order.apply_k(k), v, mask, order, state)


def token_order(
    q: Tensor, k: Tensor, method: str, config: PSAConfig, tokens: Tokens, state: SemanticState | None
) -> tuple[Permutation | None, SemanticState | None]:
    """The permutation (None: the caller's order stays) and the centroids for the next call."""
    if tokens.is_causal:
        return None, None
    base, state = _base_order(q, k, method, config, tokens, state)
    if not config.sort_keys or config.type != "psa":
        return base, state
    return _with_sorted_keys(q, k, base or _unmoved(q, k), config, tokens), state


@torch.no_grad()
def _base_order(
    q: Tensor, k: Tensor, method: str, config: PSAConfig, tokens: Tokens, state: SemanticState | None
) -> tuple[Permutation | None, SemanticState | None]:
    """What :func:`psa.reorder.reorder` gives, if anything."""
    if not config.use_rearrange or (tokens.grid is None and method != "semantic"):
        return None, None
    return reorder(
        method,
        q,
        k,
        tokens.grid,
        text_length=tokens.text_length,
        text_position=tokens.text_position,
        tile_size=config.tile_size,
        state=state,
        key_mask=tokens.key_mask,
        seed=config.seed,
    )


def _unmoved(q: Tensor, k: Tensor) -> Permutation:
    return Permutation(torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=k.device))


def _masked_last(order: Permutation, tokens: Tokens) -> Permutation:
    """``order``, the same for all heads, with masked video keys behind the real ones; text keeps its place."""
    if tokens.key_mask is None:
        return order
    text, length = tokens.text_length, tokens.key_mask.shape[1]
    rank = 1 + (~tokens.key_mask[:, order.k_order]).int()
    if tokens.text_position == "first":
        rank[:, :text] = 0
    else:
        rank[:, length - text :] = 3
    keys = order.k_order[rank.argsort(dim=-1, stable=True)]
    return Permutation(order.q_order, keys[:, None], tokens.key_mask)


@torch.no_grad()
def _with_sorted_keys(q: Tensor, k: Tensor, base: Permutation, config: PSAConfig, tokens: Tokens) -> Permutation:
    """``base`` with the keys of every block sorted, per head, if they are to be."""
    if not config.sort_keys:
        return base
    mask = None if tokens.key_mask is None else base.apply_k_mask(tokens.key_mask)
    order = key_order(q.detach(), base.apply_k(k).detach(), mask, config.block_n)
    return Permutation(base.q_order, base.k_order.expand(order.shape).gather(-1, order), tokens.key_mask)


@torch.no_grad()
def _probed(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: PSAConfig,
    tokens: Tokens,
    scale: float,
    place: Permutation,
    content: Permutation,
) -> tuple[Tensor, Tensor | None]:
    """Which heads err less with tokens by content, bool [B, H], and what else the probes chose for every head: None
    where a curve of errors is still to say its density. Heads that share keys and values are judged together."""
    settings = (one_density(config).key, scale, tokens.is_causal, tokens.text_length, tokens.text_position)
    group = q.shape[1] // k.shape[1]
    choices, errors = [], []
    for order in (place, content):
        moved = _moved(q, k, v, tokens, order, None)
        *_, chosen = ops.select(moved.q, moved.k, moved.v, None, moved.key_mask, None, *settings)
        choices.append(chosen[..., :CONCENTRATION])
        errors.append(chosen[..., 2].square().unflatten(1, (-1, group)).mean(2).repeat_interleave(group, dim=1))
    by_content = errors[1] < errors[0]
    chosen = None if needs_curve(config) else torch.where(by_content[..., None], choices[1], choices[0])
    return by_content, chosen

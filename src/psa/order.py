"""Which order tokens are cut into blocks in: stage 2, as :func:`psa.plan` and :func:`psa.psa_attention` take it.

With ``rearrange_method="auto"`` every KV head has the order that its probes measure to be better: the place on the grid
alone (Gilbert), or content first (hybrid).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import planning
from .auto import needs_curve, one_density
from .checks import Grid
from .config import PSAConfig
from .reorder import Permutation, SemanticState, reorder
from .reorder.keys import key_order
from .state import BY_CONTENT


class Tokens(NamedTuple):
    """What a call says of its tokens, beside their values."""

    is_causal: bool
    grid: Grid | None
    text_length: int
    text_position: str
    key_mask: Tensor | None


@dataclass(frozen=True)
class Held:
    """The order by content of one call's tokens, before keys are sorted, for calls that reuse what was chosen for it.

    Clusters drift: on the bundled model's layers an order that is two of its twelve steps old costs 5 % of the error,
    one that is four steps old 10 %. Making one takes about as long as the rest of a plan.
    """

    tokens: Tokens
    """Without their mask, which may be another in every call."""
    q_order: Tensor
    k_order: Tensor
    """int32 [B, H, Lq] and [B, Hkv, Lk]: half of what a Permutation takes."""

    @classmethod
    def of(cls, tokens: Tokens, order: Permutation | None) -> "Held | None":
        """None for an order that is the same for all heads, which costs nothing to make."""
        if order is None or not order.per_head:
            return None
        return cls(tokens._replace(key_mask=None), order.q_order.int(), order.k_order.int())

    def order_of(self, q: Tensor, k: Tensor, tokens: Tokens) -> Permutation | None:
        """The order, if it is one of such tokens; None else."""
        fits = self.q_order.shape == q.shape[:3] and self.k_order.shape == k.shape[:3]
        if not fits or self.tokens != tokens._replace(key_mask=None):
            return None
        order = Permutation(self.q_order.to(q.device).long(), self.k_order.to(k.device).long())
        return _masked_last(order, tokens)


class Arranged(NamedTuple):
    """q, k, v and key mask in the plan's token order, and how they came there."""

    q: Tensor
    k: Tensor
    v: Any
    """None where the call has none."""
    key_mask: Tensor | None
    permutation: Permutation | None
    """None: the caller's order stays."""
    state: SemanticState | None = None
    """Centroids for the next call."""
    by_content: Tensor | None = None
    """Heads whose tokens go by content, bool [B, H]; None where the order is not chosen per head."""
    choice: Tensor | None = None
    """What the probes of both orders chose beside it, float32 [B, H, 4]; None where there was no need to probe."""
    held: Held | None = None
    """The order, if it was made here, for calls that reuse the choice."""


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
    held: Held | None = None,
) -> Arranged:
    """q, k and v (or None) in the plan's token order.

    Args:
        state: centroids of the last call.
        choice: the automatic mode's to reuse; without one, the order ``"auto"`` probes both orders, and without v too
            it takes the first.
        held: the order that the choice was made for, if it is known.
    """
    if tokens.is_causal or config.type == "dense":
        return _moved(q, k, v, tokens, None)
    two = config.rearrange_method == "auto" and config.use_rearrange
    two = two and (v is not None and 0 not in (*q.shape, *k.shape) if choice is None else choice.shape[-1] > BY_CONTENT)
    by_content = choice[..., BY_CONTENT] > 0.5 if two and choice is not None else None
    order, new = None if held is None or choice is None else held.order_of(q, k, tokens), None
    if order is None:
        if two:
            place, content, state = _two_orders(q, k, config, tokens, state)
            if by_content is None:
                return _probed(q, k, v, config, tokens, scale, place, content)._replace(state=state)
            order = place.where(by_content, content)
        else:
            method = "Gilbert" if config.rearrange_method == "auto" else config.rearrange_method
            order, state = _base_order(q, k, method, config, tokens, state)
        new = Held.of(tokens, order)
    moved = _moved(q, k, v, tokens, _with_sorted_keys(q, k, order, config, tokens))
    return moved._replace(state=state, held=new, by_content=by_content)


def _moved(q: Tensor, k: Tensor, v: Tensor | None, tokens: Tokens, order: Permutation | None) -> Arranged:
    if order is None:
        return Arranged(q, k, v, tokens.key_mask, None)
    v = None if v is None else order.apply_k(v)
    mask = None if tokens.key_mask is None else order.apply_k_mask(tokens.key_mask)
    return Arranged(order.apply_q(q), order.apply_k(k), v, mask, order)


def _two_orders(
    q: Tensor, k: Tensor, config: PSAConfig, tokens: Tokens, state: SemanticState | None
) -> tuple[Permutation, Permutation, SemanticState | None]:
    """The orders by place and by content that ``"auto"`` chooses between, and the centroids."""
    place, _ = _base_order(q, k, "Gilbert", config, tokens, None)
    content, state = _base_order(q, k, "semantic" if tokens.grid is None else "hybrid", config, tokens, state)
    assert content is not None
    return _masked_last(place or _unmoved(q, k), tokens), content, state


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
    """``order`` with masked video keys behind the real ones, in all heads alike; text keeps its place."""
    if tokens.key_mask is None:
        return order
    text, length = tokens.text_length, tokens.key_mask.shape[1]
    keys = order.k_order.expand(len(tokens.key_mask), order.k_order.shape[1] if order.k_order.ndim == 3 else 1, -1)
    rank = 1 + (~tokens.key_mask[:, None].expand(keys.shape)).gather(-1, keys).int()
    if tokens.text_position == "first":
        rank[..., :text] = 0
    else:
        rank[..., length - text :] = 3
    return Permutation(order.q_order, keys.gather(-1, rank.argsort(dim=-1, stable=True)), tokens.key_mask)


@torch.no_grad()
def _with_sorted_keys(
    q: Tensor, k: Tensor, base: Permutation | None, config: PSAConfig, tokens: Tokens
) -> Permutation | None:
    """``base`` (None: the caller's order) with the keys of every block sorted, per head, if they are to be."""
    if not config.sort_keys:
        return base
    base = base or _unmoved(q, k)
    mask = None if tokens.key_mask is None else base.apply_k_mask(tokens.key_mask)
    order = key_order(q.detach(), base.apply_k(k).detach(), mask, config.block_n)
    return Permutation(base.q_order, base.k_order.expand(order.shape).gather(-1, order), tokens.key_mask)


def _probed(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: PSAConfig,
    tokens: Tokens,
    scale: float,
    place: Permutation,
    content: Permutation,
) -> Arranged:
    """Every head in the order in which it errs less, and what the probes chose for it there: not where a curve of
    errors is still to say its density. Heads that share keys and values are judged together."""
    settings = (one_density(config).key, scale, tokens.is_causal, tokens.text_length, tokens.text_position)
    group = q.shape[1] // k.shape[1]
    orders, choices, errors = [], [], []
    for base in (place, content):
        order = _with_sorted_keys(q, k, base, config, tokens)
        assert order is not None
        with torch.no_grad():
            tried = _moved(q, k, v, tokens, order)
            chosen = planning.probe(tried.q, tried.k, tried.v, tried.key_mask, *settings)
        orders.append(order)
        choices.append(chosen)
        errors.append(chosen[..., 2].square().unflatten(1, (-1, group)).mean(2).repeat_interleave(group, dim=1))
    by_content = errors[1] < errors[0]
    chosen = None if needs_curve(config) else torch.where(by_content[..., None], choices[1], choices[0])
    moved = _moved(q, k, v, tokens, orders[0].where(by_content, orders[1]))
    held = Held.of(tokens, place.where(by_content, content))
    return moved._replace(by_content=by_content, choice=chosen, held=held)

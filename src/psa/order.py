"""Which order tokens are cut into blocks in: stage 2, as :func:`psa.plan` and :func:`psa.psa_attention` take it."""

import torch
from torch import Tensor

from .checks import Grid
from .config import PSAConfig
from .reorder import Permutation, SemanticState, reorder
from .reorder.keys import key_order


@torch.no_grad()
def token_order(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    *,
    is_causal: bool,
    grid: Grid | None,
    text_length: int,
    text_position: str,
    key_mask: Tensor | None,
    state: SemanticState | None = None,
) -> tuple[Permutation | None, SemanticState | None]:
    """The permutation (None: the caller's order stays) and the centroids for the next call."""
    permutation = next_state = None
    if is_causal:
        return None, None
    if config.use_rearrange and (grid is not None or config.rearrange_method == "semantic"):
        permutation, next_state = reorder(
            config.rearrange_method,
            q,
            k,
            grid,
            text_length=text_length,
            text_position=text_position,
            tile_size=config.tile_size,
            state=state,
            key_mask=key_mask,
            seed=config.seed,
        )
    if config.sort_keys and config.type == "psa":
        permutation = _with_sorted_keys(q, k, key_mask, permutation, config.block_n)
    return permutation, next_state


def _with_sorted_keys(
    q: Tensor, k: Tensor, key_mask: Tensor | None, base: Permutation | None, block_n: int
) -> Permutation:
    """``base`` with the keys of every block sorted, per head."""
    if base is None:
        order = key_order(q.detach(), k.detach(), key_mask, block_n)
        return Permutation(torch.arange(q.shape[2], device=q.device), order, key_mask)
    moved = None if key_mask is None else base.apply_k_mask(key_mask)
    order = key_order(q.detach(), base.apply_k(k).detach(), moved, block_n)
    return Permutation(base.q_order, base.k_order.expand(order.shape).gather(-1, order), key_mask)

"""Stage 2: make tokens that resemble each other contiguous, so that a block of them is worth averaging.

permutation, state = reorder("hybrid", q, k, (8, 30, 52), text_length=226)
out = permutation.restore_q(attention(permutation.apply_q(q), permutation.apply_k(k), permutation.apply_k(v)))
"""

from difflib import get_close_matches

from torch import Tensor

from psa.errors import ConfigError, ShapeError
from psa.reorder.permutation import Permutation, check_text
from psa.reorder.semantic import SemanticState, semantic_permutation
from psa.reorder.spatial import gilbert_order, spatial_permutation, tile_order

METHODS = ("Gilbert", "tile", "semantic", "hybrid")

__all__ = [
    "METHODS",
    "Permutation",
    "SemanticState",
    "gilbert_order",
    "reorder",
    "semantic_permutation",
    "spatial_permutation",
    "tile_order",
]


def reorder(
    method: str,
    q: Tensor,
    k: Tensor,
    grid: tuple[int, int, int] | None,
    *,
    text_length: int = 0,
    text_position: str = "last",
    tile_size: tuple[int, int, int] = (2, 8, 8),
    state: SemanticState | None = None,
    key_mask: Tensor | None = None,
    seed: int = 0,
) -> tuple[Permutation, SemanticState | None]:
    """The permutation that ``method`` gives for q [B, H, L, D] and k [B, Hkv, L, D], and the state for the next call.

    Gilbert and tile look at ``grid`` (T, H, W) only (token t,h,w at (t*H + h)*W + w) and return no state; semantic
    looks at q and k only and may go without a grid; hybrid does both. Text tokens, first or last, keep their places.
    ``key_mask`` bool [B, L] (True = real token) and ``seed`` matter to those two, see ``semantic_permutation``.

    Raises ConfigError for an unknown method, a missing grid or bad settings; ShapeError when T*H*W + text_length != L.
    """
    name = resolve_method(method).lower()
    check_text(text_length, text_position)
    if grid is not None:
        _check_grid(grid, q, k, text_length)
    if name == "semantic":
        base_order = None
    elif grid is None:
        raise ConfigError(f"rearrange_method {method!r} needs the token grid: pass grid=(T, H, W), or use 'semantic'.")
    elif name == "hybrid":
        base_order = spatial_permutation("gilbert", grid, device=q.device).q_order
    else:
        return spatial_permutation(name, grid, text_length, text_position, tile_size, q.device), None
    return semantic_permutation(
        q,
        k,
        state=state,
        base_order=base_order,
        text_length=text_length,
        text_position=text_position,
        key_mask=key_mask,
        seed=seed,
    )


def resolve_method(method: str) -> str:
    """The method's name as ``METHODS`` spells it, whatever its case. ConfigError, naming the nearest, if unknown."""
    by_lower = {name.lower(): name for name in METHODS}
    if isinstance(method, str) and method.lower() in by_lower:
        return by_lower[method.lower()]
    nearest = get_close_matches(str(method).lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    raise ConfigError(f"rearrange_method must be one of {', '.join(METHODS)}; got {method!r}.{hint}")


def _check_grid(grid: tuple[int, int, int], q: Tensor, k: Tensor, text_length: int) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ConfigError(f"grid must be three sizes (T, H, W) of at least 1; got {tuple(grid)}.")
    t, h, w = grid
    tokens = t * h * w + text_length
    if q.shape[2] != tokens or k.shape[2] != tokens:
        raise ShapeError(
            f"grid {t}x{h}x{w} plus text_length {text_length} is {tokens} tokens, but q has {q.shape[2]} and k "
            f"{k.shape[2]}. Pass the grid of these tokens, or grid=None for no reordering."
        )

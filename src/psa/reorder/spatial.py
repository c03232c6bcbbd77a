"""Static orders of a token grid: the generalised Hilbert curve and 3-D tiles. One per grid, cached per device.

Why reorder at all: a KV block is read through its averages, and in raster order 64 consecutive tokens are one thin line
of the picture. Along these orders they are a compact neighbourhood in time and space, whose keys resemble each other.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from psa.errors import ConfigError
from psa.reorder.permutation import Permutation, with_text

Axis = tuple[int, int]  # (distance of neighbours in the flat index, signed number of points: < 0 runs backwards)


def gilbert_order(width: int, height: int, depth: int) -> Tensor:
    """Visiting order of the generalised Hilbert curve through a box of any size.

    int64 [width*height*depth], on the CPU: the flat index x + width*(y + height*z) of the point at each curve position.
    The curve is Jakub Červený's gilbert3d (https://github.com/jakubcerveny/gilbert, BSD-2): a box is cut into up to
    five smaller boxes, turned so that the end of one touches the start of the next; halves are made even where
    possible, which makes every step a unit step when the sizes are even.

    Raises ConfigError for sizes below 1.
    """
    if min(width, height, depth) < 1:
        raise ConfigError(f"a grid needs sizes of at least 1; got width {width}, height {height}, depth {depth}.")
    x, y, z = (1, width), (width, height), (width * height, depth)
    if width >= height and width >= depth:
        axes = x, y, z
    elif height >= depth:
        axes = y, x, z
    else:
        axes = z, x, y
    return torch.from_numpy(_walk_with_memory()(*axes).copy())


def tile_order(grid: tuple[int, int, int], tile_size: tuple[int, int, int]) -> Tensor:
    """Visiting order of a (T, H, W) grid tile by tile: int64 [T*H*W], the flat index (t*H + h)*W + w at each position.

    ``tile_size`` is (T, H, W) too. Tiles are visited in a serpentine (each row of tiles runs against the one before, so
    consecutive tiles touch), tokens inside a tile in raster order. Edge tiles of a ragged grid are simply smaller.

    Raises ConfigError for sizes below 1.
    """
    if len(grid) != 3 or len(tile_size) != 3 or min(*grid, *tile_size) < 1:
        raise ConfigError(f"grid and tile_size are three sizes >= 1, in T, H, W order; got {grid} and {tile_size}.")
    coords = np.indices(grid).reshape(3, -1)
    tile = np.array(tile_size)[:, None]
    tile_t, tile_h, tile_w = coords // tile
    tiles_h, tiles_w = -(-grid[1] // tile_size[1]), -(-grid[2] // tile_size[2])
    serpent_h = np.where(tile_t % 2 == 1, tiles_h - 1 - tile_h, tile_h)
    tile_row = tile_t * tiles_h + serpent_h
    serpent_w = np.where(tile_row % 2 == 1, tiles_w - 1 - tile_w, tile_w)
    return torch.from_numpy(np.argsort(tile_row * tiles_w + serpent_w, kind="stable"))


def spatial_permutation(
    method: str,
    grid: tuple[int, int, int],
    text_length: int = 0,
    text_position: str = "last",
    tile_size: tuple[int, int, int] = (2, 8, 8),
    device: torch.device | str = "cpu",
) -> Permutation:
    """One order for all heads, queries and keys alike: ``method`` "gilbert" or "tile" over a (T, H, W) grid.

    Text tokens (``text_length`` of them, "first" or "last") keep their places. Computed once per grid and device; the
    tensors are shared by all callers, so do not write to them.

    Raises ConfigError for an unknown method, sizes below 1 or a bad text setting.
    """
    key = (method.lower(), tuple(grid), text_length, text_position, tuple(tile_size), torch.device(device))
    if torch.compiler.is_compiling():
        order = spatial_order(*key)
        return Permutation(order, order)
    return cached_permutation(*key)


@torch.library.custom_op("psa::spatial_order", mutates_args=())
def spatial_order(
    method: str,
    grid: Sequence[int],
    text_length: int,
    text_position: str,
    tile_size: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The order of `spatial_permutation`, int64 [L], as a node of a compiled graph, which may hold several."""
    return cached_permutation(method, tuple(grid), text_length, text_position, tuple(tile_size), device).q_order.clone()


@spatial_order.register_fake
def _(method, grid, text_length, text_position, tile_size, device):
    return torch.empty(grid[0] * grid[1] * grid[2] + text_length, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def cached_permutation(method, grid, text_length, text_position, tile_size, device) -> Permutation:
    """`spatial_permutation` with hashable arguments."""
    if method == "gilbert":
        order = gilbert_order(width=grid[2], height=grid[1], depth=grid[0])
    elif method == "tile":
        order = tile_order(grid, tile_size)
    else:
        raise ConfigError(f"a spatial order is 'gilbert' or 'tile'; got {method!r}.")
    with torch.inference_mode(False):  # the cache outlives this call; its tensors may serve a backward pass later
        order = with_text(order.clone(), text_length, text_position)
        permutation = Permutation(order, order)
        _ = permutation.q_inverse  # copied with the order: what every stream and graph may share is finished by then
        return permutation.to(device)


def _walk_with_memory():
    """The curve's recursion, remembering the boxes it has walked: one shape and orientation occurs many times."""

    @cache
    def walk(a: Axis, b: Axis, c: Axis) -> np.ndarray:
        """Flat offsets from the starting corner along a curve that starts there and ends at the far end of ``a``."""
        for axis, others in ((a, (b, c)), (b, (a, c)), (c, (a, b))):
            if all(abs(count) == 1 for _, count in others):
                return np.arange(abs(axis[1])) * _step(axis)
        return np.concatenate([start + walk(*axes) for start, axes in _cut(a, b, c)])

    return walk


def _cut(a: Axis, b: Axis, c: Axis) -> list[tuple[int, tuple[Axis, Axis, Axis]]]:
    """Cut a box into smaller ones, each as (offset of its starting corner, its axes), in visiting order."""
    w, h, d = (abs(count) for _, count in (a, b, c))
    a_near, a_rest = _halve(a)
    b_near, b_rest = _halve(b)
    c_near, c_rest = _halve(c)
    a_last, c_last = _span(a) - _step(a), _span(c) - _step(c)
    b_turn, c_turn = _span(b_near) - _step(b), _span(c_near) - _step(c)

    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes, one behind the other
        return [(0, (a_near, b, c)), (_span(a_near), (a_rest, b, c))]
    if 3 * h > 4 * d:  # flat along c: out along b, across, and back
        return [
            (0, (b_near, c, a_near)),
            (_span(b_near), (a, b_rest, c)),
            (a_last + b_turn, (_back(b_near), c, _back(a_rest))),
        ]
    if 3 * d > 4 * h:  # flat along b: the same with c
        return [
            (0, (c_near, a_near, b)),
            (_span(c_near), (a, b, c_rest)),
            (a_last + c_turn, (_back(c_near), _back(a_rest), b)),
        ]
    return [
        (0, (b_near, c_near, a_near)),
        (_span(b_near), (c, a_near, b_rest)),
        (b_turn + c_last, (a, _back(b_near), _back(c_rest))),
        (a_last + _span(b_near) + c_last, (_back(c), _back(a_rest), b_rest)),
        (a_last + b_turn, (_back(b_near), c_near, _back(a_rest))),
    ]


def _halve(axis: Axis) -> tuple[Axis, Axis]:
    """Near and far part. Rounding is towards minus infinity, as in the original curve; odd halves grow by a point."""
    stride, count = axis
    near = count // 2
    if near % 2 and abs(count) > 2:
        near += 1 if count > 0 else -1
    return (stride, near), (stride, count - near)


def _step(axis: Axis) -> int:
    return axis[0] if axis[1] > 0 else -axis[0]


def _span(axis: Axis) -> int:
    return axis[0] * axis[1]


def _back(axis: Axis) -> Axis:
    return axis[0], -axis[1]

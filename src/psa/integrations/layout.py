"""How a diffusers model lays out its tokens: read from its configuration and the arguments of a call."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ..errors import ShapeError

Grid = tuple[int, int, int]

TEXT_FIRST = (
    "AuraFlow", "Bria", "Chroma", "CogVideoX", "CogView", "ConsisID", "EasyAnimate", "Flux", "LongCatImage", "Lumina2",
    "QwenImage",
)  # fmt: skip
TEXT_LAST = ("HiDream", "HunyuanImage", "HunyuanVideo", "Mochi", "MotifVideo", "SD3")
NO_TEXT = ("Allegro", "ChronoEdit", "Cosmos", "Kandinsky5", "Latte", "LTX", "PixArt", "SkyReels", "Wan")
UNCOUNTED_TEXT = ("AuraFlow", "EasyAnimate", "HiDream", "HunyuanImage", "HunyuanVideo15", "Lumina2", "Mochi")
"""Where several encoders, registers or removed padding leave only the sequence to tell how much text there is."""
CHANNEL_AXIS = {"CogVideoX": 2, "ConsisID": 2, "Kandinsky5": 4}
"""Classes by the beginning of their names; all others are read as [B, C, F, H, W] with text where the user says."""
TIMESTEPS = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class Layout:
    """The tokens that one self-attention call sees.

    Attributes:
        grid: (T, H, W) of the video tokens; None when the model tells no grid: its tokens then keep their order.
        text_position: ``"first"``, ``"last"``, ``"none"``, or None where nothing is known about the class.
        text_length: tokens of text that the call brings; None when only the sequence tells (padding removed, several
            text encoders).
    """

    grid: Grid | None
    text_position: str | None = None
    text_length: int | None = None

    def text_in(self, length: int, model: str) -> int:
        """Text tokens in a sequence of ``length``.

        Raises:
            ShapeError: when grid and text do not add up to the sequence; prints both.
        """
        if self.grid is None:
            return 0 if self.text_position in (None, "none") else min(self.text_length or 0, length)
        t, h, w = self.grid
        rest = length - t * h * w
        expected = 0 if self.text_position == "none" else self.text_length
        if rest == 0:
            return 0
        if rest < 0 or (expected is not None and rest != expected and self.text_position is not None):
            text = "" if expected is None else f" + {expected} text"
            raise ShapeError(
                f"{model}: a grid of {t}×{h}×{w} = {t * h * w} video{text} tokens does not make "
                f"the sequence of {length} that its attention sees; pass layout=... to say how it is made up"
            )
        if self.text_position is None:
            raise ShapeError(
                f"{model}: {length} tokens hold a grid of {t}×{h}×{w} = {t * h * w} and {rest} others; "
                "say where those are: text_position='first' or 'last'"
            )
        return rest


def read_layout(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], text_position: str | None
) -> tuple[Layout, Any]:
    """The layout of a call of ``model(*args, **kwargs)``, and its timestep (None where it has none)."""
    call = arguments(model, args, kwargs)
    name = type(model).__name__
    position = text_position or _known_position(name)
    text = call.get("encoder_hidden_states")
    fixed = isinstance(text, Tensor) and text.ndim == 3 and not name.startswith(UNCOUNTED_TEXT)
    length = text.shape[1] if fixed and position in ("first", "last") else None  # type: ignore[union-attr]
    timestep = next((call[name] for name in TIMESTEPS if call.get(name) is not None), None)
    return Layout(_read_grid(model, name, call), position, length), timestep


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    names = parameters(type(model))
    return {**dict(zip(names, args, strict=False)), **kwargs}


@lru_cache
def parameters(cls: type) -> tuple[str, ...]:
    """Names of the arguments of a model's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _known_position(name: str) -> str | None:
    for position, names in (("first", TEXT_FIRST), ("last", TEXT_LAST), ("none", NO_TEXT)):
        if name.startswith(names):
            return position
    return None


def _read_grid(model: nn.Module, name: str, call: Mapping[str, Any]) -> Grid | None:
    hidden = call.get("hidden_states")
    if not isinstance(hidden, Tensor):
        return None
    if hidden.ndim == 3:
        return _packed_grid(call, hidden.shape[1])
    t, h, w = _patch_size(getattr(model, "config", {}))
    if hidden.ndim == 4:
        return 1, hidden.shape[2] // h, hidden.shape[3] // w
    if hidden.ndim == 5:
        channels = next((axis for start, axis in CHANNEL_AXIS.items() if name.startswith(start)), 1)
        frames, height, width = (hidden.shape[axis] for axis in range(1, 5) if axis != channels)
        return frames // t, height // h, width // w
    return None


def _packed_grid(call: Mapping[str, Any], length: int) -> Grid | None:
    """The grid of tokens that come already packed as [B, L, C]: told beside them, or by their position ids."""
    sizes = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    if all(isinstance(size, int) for size in sizes):
        return sizes  # type: ignore[return-value]
    shapes, ids = call.get("img_shapes"), call.get("img_ids")
    grid = None
    if shapes:
        first = shapes[0] if isinstance(shapes[0], (list, tuple)) and not isinstance(shapes[0][0], int) else [shapes[0]]
        grid = tuple(int(size) for size in first[0])
    elif isinstance(ids, Tensor):
        ids = ids[0] if ids.ndim == 3 else ids
        # (frame or image, row, column) in the first three columns of Flux's ids.
        grid = (1, *(int(ids[:, axis].max()) + 1 for axis in (1, 2)))
    # Reference images beside the picture make the sequence longer than its grid.
    return grid if grid is not None and grid[0] * grid[1] * grid[2] == length else None  # type: ignore[return-value]


def _patch_size(config: Any) -> Grid:
    patch = config.get("patch_size") or 1
    if isinstance(patch, (tuple, list)):
        return (1, *patch) if len(patch) == 2 else tuple(patch)  # type: ignore[return-value]
    return config.get("patch_size_t") or 1, patch, patch

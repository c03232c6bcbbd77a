"""The little world that the tiny model is trained on: a grammar of captions, and clips drawn to match them.

A caption names one or two textured shapes from left to right, what each does, and the backdrop, for example
``a small red circle moving left over stripes``. Sizes and speeds are in pixels, whatever the canvas: a larger canvas
shows more of the same world.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.14, 0.26, 0.90),
    "yellow": (0.93, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.86),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 14.0, "large": 19.0}  # radius in pixels
MOTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "staying still": (0.0, 0.0),
    "growing": (0.0, 0.0),
}
BACKDROPS = ("stripes", "checks", "clouds", "waves")
SPEED, GROWTH = 1.0, 0.24  # pixels per frame: of a moving shape, and of a growing shape's radius
NEAR, FAR, AWRY = 4.0, 8.0, 5.0  # pixels: least and greatest gap between two things, and how far they stand off a line
LIGHT, COOLNESS = 0.4, 0.12  # how much brighter the left edge is than the right, and bluer the top than the bottom
GRAMMAR = (
    "a {small|large} {" + "|".join(COLOURS) + "} {" + "|".join(SHAPES) + "} {" + "|".join(MOTIONS) + "} "
    "[and a second such object of another colour, right of the first] over {" + "|".join(BACKDROPS) + "}"
)


@dataclass(frozen=True)
class Thing:
    """One shape and what it does."""

    size: str
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.motion}"

    @property
    def held_out(self) -> bool:
        """True for the fifth of all (colour, shape, motion) that training never shows in a scene of one."""
        return (
            3 * list(COLOURS).index(self.colour) + SHAPES.index(self.shape) + 2 * list(MOTIONS).index(self.motion)
        ) % 5 == 0


@dataclass(frozen=True)
class Scene:
    """One or two things over a backdrop."""

    things: tuple[Thing, ...]
    backdrop: str

    def __str__(self) -> str:
        return " and ".join(map(str, self.things)) + f" over {self.backdrop}"

    @property
    def held_out(self) -> bool:
        """True for scenes that training never shows: with anything held out in it."""
        return any(thing.held_out for thing in self.things)


def sample_scene(rng: random.Random, *, held_out: bool = False, pairs: float = 0.25) -> Scene:
    """A random scene; two things of different colours with probability ``pairs``."""
    while True:
        count = 2 if rng.random() < pairs else 1
        colours = rng.sample(list(COLOURS), count)
        things = tuple(
            Thing(rng.choice(list(SIZES)), colour, rng.choice(SHAPES), rng.choice(list(MOTIONS))) for colour in colours
        )
        scene = Scene(things, rng.choice(BACKDROPS))
        if scene.held_out == held_out:
            return scene


def parse(prompt: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ConfigError: with the grammar, where the caption is not of it.
    """
    body, found, backdrop = " ".join(prompt.lower().split()).rstrip(".").partition(" over ")
    if not found or backdrop not in BACKDROPS:
        raise ConfigError(f"prompt: must end in 'over' and one of {', '.join(BACKDROPS)}; the grammar is: {GRAMMAR}")
    things = tuple(map(_parse_thing, body.split(" and ")))
    if len(things) > 2 or len({thing.colour for thing in things}) < len(things):
        raise ConfigError(f"prompt: names one object, or two of different colours; the grammar is: {GRAMMAR}")
    return Scene(things, backdrop)


def _parse_thing(text: str) -> Thing:
    words = text.split(" ", 4)
    if len(words) == 5 and words[0] == "a":
        thing = Thing(*words[1:])
        if thing.size in SIZES and thing.colour in COLOURS and thing.shape in SHAPES and thing.motion in MOTIONS:
            return thing
    raise ConfigError(f"prompt: {text!r} is no object of the grammar: {GRAMMAR}")


def render(scene: Scene, frames: int, height: int, width: int, rng: random.Random) -> Tensor:
    """A clip of the scene, float32 ``[frames, 3, height, width]`` in 0…1; ``rng`` places things and varies textures."""
    time = torch.arange(frames, dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    video = _backdrop(scene.backdrop, time, y, x, rng)
    for thing, (cx, cy, radius) in zip(scene.things, _places(scene.things, frames, height, width, rng), strict=True):
        dx = x - cx[:, None, None]
        dy = y - cy[:, None, None]
        cover = (0.5 - _distance(thing.shape, dx, dy, radius[:, None, None])).clamp(0, 1)[:, None]
        light = 1 + 0.16 * torch.sin(0.9 * (dx + dy) + rng.uniform(0, 6.3))[:, None]
        colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
        video = video * (1 - cover) + (colour * light).clamp(0, 1) * cover
    return video


def _places(
    things: tuple[Thing, ...], frames: int, height: int, width: int, rng: random.Random
) -> list[tuple[Tensor, ...]]:
    """Centre x, y and radius over time of every thing, inside the canvas and clear of each other.

    Two things stand side by side, the first on the left; or the first above the second and a little to its left, where
    one moves left and the other right, or the canvas is too narrow. Where it is too low as well, they may touch.
    """
    canvas, largest = (width, height), 0.45 * min(height, width)
    plain = [_track(thing, frames, largest) for thing in things]
    opposed = {thing.motion for thing in things} == {"moving left", "moving right"}
    axis = 0 if not opposed and _fits(_apart(plain, 0, NEAR), canvas) else 1
    group = plain
    for _ in range(50):
        group = [_track(thing, frames, largest, rng.uniform(0.92, 1.08), rng.uniform(0.85, 1.15)) for thing in things]
        aside = rng.uniform(-AWRY, AWRY) if axis == 0 else rng.uniform(NEAR, AWRY)
        group = _apart(group, axis, rng.uniform(NEAR, FAR), aside)
        if _fits(group, canvas):
            break
    return _put(group, canvas, rng)


Track = tuple[Tensor, Tensor, Tensor]  # x and y of the centre, and the radius, of every frame


def _track(thing: Thing, frames: int, largest: float, size: float = 1.0, speed: float = 1.0) -> Track:
    """What a thing does, its centre 0 on average."""
    time = torch.arange(frames, dtype=torch.float32)
    radius = (SIZES[thing.size] * size + GROWTH * time * (thing.motion == "growing")).clamp(max=largest)
    x, y = ((time - time.mean()) * SPEED * speed * direction for direction in MOTIONS[thing.motion])
    return x, y, radius


def _apart(group: list[Track], axis: int, gap: float, aside: float = 0.0) -> list[Track]:
    """Two things, the second moved along ``axis`` until it is always clear of the first, and ``aside`` the other way;
    one thing as it is."""
    if len(group) < 2:
        return group
    first, second = group
    away = (first[2] + second[2] + first[axis] - second[axis]).max() + gap
    x, y = (away, aside) if axis == 0 else (aside, away)
    return [first, (second[0] + x, second[1] + y, second[2])]


def _room(group: list[Track], axis: int, extent: float) -> tuple[float, float]:
    """Least and greatest shift along ``axis`` that keeps a group inside; in the wrong order where none does."""
    low = max(float((track[2] - track[axis]).max()) for track in group)
    return low, min(float((extent - track[2] - track[axis]).min()) for track in group)


def _fits(group: list[Track], canvas: tuple[int, int]) -> bool:
    return all(low <= high for low, high in (_room(group, axis, extent) for axis, extent in enumerate(canvas)))


def _put(group: list[Track], canvas: tuple[int, int], rng: random.Random) -> list[Track]:
    """One thing anywhere on the canvas, two about its middle; in the middle along an axis that is too short."""
    rooms = [_room(group, axis, extent) for axis, extent in enumerate(canvas)]
    spread = 0.5 if len(group) == 1 else 0.25
    left, top = (0.5 * (low + high) + rng.uniform(-spread, spread) * max(0.0, high - low) for low, high in rooms)
    return [(x + left, y + top, radius) for x, y, radius in group]


def _distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the outline, negative inside; the bounding box is ± ``radius`` both ways."""
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return dx.abs().maximum(dy.abs()) - radius
    if shape == "triangle":  # upright: base below, apex above
        slant = (2 * dx.abs() - (dy + radius)) / math.sqrt(5)
        return slant.maximum(dy - radius)
    long, short = dx.abs().maximum(dy.abs()) - radius, dx.abs().minimum(dy.abs()) - radius / 3
    return long.maximum(short)


def _backdrop(kind: str, time: Tensor, y: Tensor, x: Tensor, rng: random.Random) -> Tensor:
    """A greyish texture ``[frames, 3, height, width]``: little saturation, so that colour belongs to the things.

    It is lit from the left and cooler above: a model with relative positions cannot tell where on the canvas it is, and
    light is what it can draw first and find its way by.
    """
    phase, t = rng.uniform(0, 2 * math.pi), time[:, None, None]
    if kind == "stripes":
        pattern = torch.sin(2 * math.pi * (x + 0 * t) / 16 + phase)
    elif kind == "checks":
        shift = rng.uniform(0, 32)
        pattern = (4 * torch.sin(math.pi * (x + shift + 0 * t) / 12) * torch.sin(math.pi * (y + shift) / 12)).clamp(
            -1, 1
        )
    elif kind == "waves":
        pattern = torch.sin(2 * math.pi * (y - 0.8 * t) / 20 + 0.9 * torch.sin(2 * math.pi * x / 40) + phase)
    else:
        pattern = 0 * t + sum(
            torch.sin(rng.uniform(0.05, 0.22) * x * sign + rng.uniform(0.05, 0.22) * y + rng.uniform(0, 6.3))
            for sign in (-1, 1, -1, 1)
        ) / 2.2  # fmt: skip
    aside, below = 0.5 - x / x.shape[1], 0.5 - y / y.shape[0]
    base = (0.45 + 0.17 * pattern) * (1 + LIGHT * aside)
    tint = torch.tensor([rng.uniform(0.93, 1.07) for _ in range(3)])[:, None, None]
    cool = 1 + COOLNESS * torch.stack((-below, torch.zeros_like(below), below))
    return (base[:, None] * tint * cool).clamp(0, 1)

"""Reads colour, shape and motion off the pixels of a clip, knowing nothing of how it was drawn or generated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..extras import need
from .scenes import Scene

HUES = {"red": 0, "yellow": 54, "green": 130, "cyan": 185, "blue": 231, "magenta": 304}  # degrees
SATURATED = 0.30  # chroma (largest minus smallest channel) from which a pixel belongs to a thing
SMALLEST = 90  # pixels: less of a colour is no thing
WHOLE = 0.75  # of a colour's pixels that have to lie in one piece; the rest may be specks anywhere
MOVING, SWELLING = 0.55, 0.15  # pixels per frame: of the centre, and of the square root of the area
CLOSED, LONGEST = 0.9, 1.7  # pixels between a thing's edges that are its own; its longer over its shorter side
LEANING = 0.25  # difference in fullness between opposite thirds of the box
SIDE = 24


@dataclass(frozen=True)
class Seen:
    """What one thing looks like; ``shape`` or ``motion`` is ``"unclear"`` where none fits."""

    colour: str
    shape: str
    motion: str


def read(video: Tensor) -> list[Seen]:
    """The things in a clip ``[frames, 3, height, width]`` with values in 0…1, one per colour, in no order."""
    owner = _colours(video.float())
    return [
        Seen(colour, *_shape_and_motion(owner == index))
        for index, colour in enumerate(HUES)
        if (owner == index).sum((1, 2)).median() >= SMALLEST
    ]


def matches(scene: Scene, video: Tensor) -> dict[str, bool]:
    """Whether a scene's colours, shapes and motions, and nothing else, are seen: by attribute and under ``"all"``."""
    seen = {thing.colour: thing for thing in read(video)}
    wanted = {thing.colour: thing for thing in scene.things}
    result = {"colour": seen.keys() == wanted.keys()}
    for name in ("shape", "motion"):
        result[name] = all(
            colour in seen and getattr(seen[colour], name) == getattr(thing, name) for colour, thing in wanted.items()
        )
    return result | {"all": all(result.values())}


def _colours(video: Tensor) -> Tensor:
    """Index into HUES of every saturated pixel, -1 elsewhere: ``[frames, height, width]``."""
    high, low = video.amax(1), video.amin(1)
    red, green, blue = video.unbind(1)
    chroma = (high - low).clamp(min=1e-6)
    hue = torch.where(
        high == red,
        (green - blue) / chroma % 6,
        torch.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    gap = (hue[..., None] * 60 - torch.tensor(list(HUES.values()))).abs()
    return torch.where(high - low >= SATURATED, gap.minimum(360 - gap).argmin(-1), -1)


def _shape_and_motion(mask: Tensor) -> tuple[str, str]:
    """From one thing's pixels, bool ``[frames, height, width]``."""
    mask, whole = _largest_piece(mask)
    area = mask.sum((1, 2))
    frames = (area >= 0.4 * area.median()).nonzero().flatten()
    if len(frames) < 0.8 * len(mask) or whole[frames].mean() < WHOLE:
        return "unclear", "unclear"
    boxes = [_box(mask[frame]) for frame in frames]
    outline = torch.stack([_fit(mask[frame], box) for frame, box in zip(frames, boxes, strict=True)]).mean(0)
    centre = torch.tensor([[(left + right) / 2, (top + bottom) / 2] for left, right, top, bottom in boxes])
    drift = _slope(frames, centre)
    swell = _slope(frames, area[frames].float().sqrt()[:, None])[0]
    sides = (
        torch.tensor([(right - left) / (bottom - top) for left, right, top, bottom in boxes]).log().mean().abs().exp()
    )
    one = _closed(mask[frames]) >= CLOSED and sides <= LONGEST  # not two of them side by side
    return _shape(outline) if one else "unclear", _motion(float(drift[0]), float(drift[1]), float(swell))


def _largest_piece(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The largest connected piece of every frame's mask, bool ``[frames, height, width]``, and the share of the pixels
    that is in it, ``[frames]``."""
    label = need("skimage.measure", "report").label
    pieces, share = torch.zeros_like(mask), torch.zeros(len(mask))
    for frame, pixels in enumerate(mask):
        if pixels.any():
            numbers = torch.from_numpy(label(pixels.numpy(), connectivity=2))
            sizes = numbers.flatten().bincount()[1:]
            pieces[frame] = numbers == 1 + sizes.argmax()
            share[frame] = sizes.max() / sizes.sum()
    return pieces, share


def _closed(mask: Tensor) -> Tensor:
    """What share of the pixels between the outermost ones of a row, or of a column if that is less, is covered: mean
    over the frames. Every row and column of a triangle, square, circle or cross is one run."""
    shares = []
    for axis in (1, 2):
        before, after = mask.int().cummax(axis).values, mask.flip(axis).int().cummax(axis).values.flip(axis)
        shares.append(mask.sum((1, 2)) / (before * after).sum((1, 2)).clamp(min=1))
    return torch.minimum(*shares).mean()


def _motion(across: float, down: float, swell: float) -> str:
    fast, slow = max(abs(across), abs(down)), min(abs(across), abs(down))
    if fast < MOVING:
        return "growing" if swell > SWELLING else "staying still" if swell > -SWELLING else "unclear"
    if slow > 0.5 * fast:
        return "unclear"
    if abs(across) > abs(down):
        return "moving right" if across > 0 else "moving left"
    return "moving down" if down > 0 else "moving up"


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """Left, right, top and bottom edge, leaving out the outermost hundredth of the pixels in every direction."""
    y, x = mask.nonzero().float().unbind(1)
    (left, right), (top, bottom) = (torch.quantile(part, torch.tensor([0.01, 0.99])).tolist() for part in (x, y))
    return left, right + 1, top, bottom + 1


def _fit(mask: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The boxed part of a mask, resampled to ``[SIDE, SIDE]``, 0 or 1."""
    left, right, top, bottom = box
    steps = (torch.arange(SIDE) + 0.5) / SIDE
    rows = (top + steps * (bottom - top)).long().clamp(max=mask.shape[0] - 1)
    columns = (left + steps * (right - left)).long().clamp(max=mask.shape[1] - 1)
    return mask[rows[:, None], columns].float()


def _shape(outline: Tensor) -> str:
    """From the share of frames that cover each place of the bounding box, ``[SIDE, SIDE]``.

    A triangle's lower third is fuller than its upper one. The rest tell themselves by how full the four corners of a
    quarter's width are: a square's are full, a circle's hold .315, a cross's nothing.
    """
    third, quarter = SIDE // 3, SIDE // 4
    leaning = float(outline[-third:].mean() - outline[:third].mean())
    aside = float(outline[:, -third:].mean() - outline[:, :third].mean())
    ends = (slice(None, quarter), slice(-quarter, None))
    corners = float(sum(outline[rows, columns].mean() for rows in ends for columns in ends)) / 4
    if leaning < -LEANING or abs(aside) > LEANING:
        return "unclear"
    if leaning > LEANING:
        return "triangle"
    return "square" if corners > 0.65 else "circle" if corners > 0.15 else "cross"


def _slope(time: Tensor, values: Tensor) -> Tensor:
    """Least-squares slope over time of every column of ``values`` ``[frames, columns]``."""
    moment = time.float() - time.float().mean()
    return (moment[:, None] * (values - values.mean(0))).sum(0) / moment.square().sum().clamp(min=1e-6)

"""The arenas of the quality benchmark: structured synthetic fields, and q, k, v of two small trained transformers.

An arena is a function from a number of seeds to cases (name, q, k, v, grid). To add one, add it to ``ARENAS``.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

TRAINED = Path(__file__).parents[1] / "tests" / "data" / "trained_qkv.safetensors"
SETTINGS = ((1.0, 0.3), (1.0, 1.0), (2.0, 1.0), (2.0, 0.3))
"""(temperature, noise) of the synthetic fields."""
HELD_OUT = tuple(
    (temperature, noise, grid)
    for temperature in (0.7, 1.4, 3.0)
    for noise in (0.5, 1.6)
    for grid in ((8, 32, 32), (6, 24, 40))
)
"""(temperature, noise, grid) of twelve fields on which nothing was tuned; their seeds start at 100."""
CHANNELS = 32
ROTARY = (24, 20, 20)


@dataclass(frozen=True)
class Case:
    """One layer of heads. q, k, v: float32 [1, H, L, D] in raster order of ``grid`` (T, H, W)."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int, int]


def synthetic(
    temperature: float, noise: float, seed: int = 0, grid: tuple[int, int, int] = (8, 32, 32), head_dim: int = 64
) -> Case:
    """One head over a smooth random field, as METHOD.md §4 states it."""
    draw = torch.Generator().manual_seed(seed)
    field = _field(grid, draw)
    weight_k, weight_v, other = (torch.randn(CHANNELS, head_dim, generator=draw) / CHANNELS**0.5 for _ in range(3))
    tokens = field.shape[0]
    q, k, v = (
        field @ weight + noise * torch.randn(tokens, head_dim, generator=draw)
        for weight in (weight_k + 0.6 * other, weight_k, weight_v)
    )
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    q, k = (_rotate(x, grid) for x in (q, k))
    name = f"field-t{temperature:g}-n{noise:g}-s{seed}"
    return Case(name, (temperature * q)[None, None], k[None, None], v[None, None], grid)


def trained(path: Path | str = TRAINED) -> list[Case]:
    """The layers of a file of trained q, k, v (``LAYER.q`` ..., grids in the metadata)."""
    with safe_open(str(path), "pt") as file:
        facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        names = sorted({key.rsplit(".", 1)[0] for key in file.keys()})  # noqa: SIM118
        return [
            Case(
                name,
                *(file.get_tensor(f"{name}.{part}").float() for part in "qkv"),
                grid=tuple(facts[name]["grid_thw"]),
            )
            for name in names
        ]


def tiny(steps: tuple[int, ...] = (1, 7, 10), seed: int = 0) -> list[Case]:
    """Every layer of the bundled model at some of its denoising steps, on one prompt it was not trained on."""
    from psa import demo
    from psa.tiny.scenes import sample_scene

    pipe = demo.load_pipeline()
    scene = str(sample_scene(random.Random(f"arena {seed}"), held_out=True, pairs=1.0))
    layers = len(pipe.transformer.blocks)
    # Each step calls the model twice, with the text and without; the first of them is captured.
    wanted = [2 * layers * step + layer for step in steps for layer in range(layers)]
    with demo.captured(pipe.transformer, lambda call: call in wanted) as kept:
        demo.make_video(pipe, scene, seed)
    grid = (1 + (demo.FRAMES - 1) // 2, demo.HEIGHT // 8, demo.WIDTH // 8)
    return [
        Case(f"step{call // (2 * layers)}-layer{call % layers}", *(x.float() for x in qkv), grid=grid)
        for call, qkv in zip(wanted, kept, strict=True)
    ]


def tuned_fields(seeds: int) -> Iterator[Case]:
    for seed in range(seeds):
        yield from (synthetic(*setting, seed) for setting in SETTINGS)


def held_out_fields(seeds: int) -> Iterator[Case]:
    for number, (temperature, noise, grid) in enumerate(HELD_OUT):
        yield synthetic(temperature, noise, 100 + number, grid)


ARENAS: dict[str, Callable[[int], Iterator[Case]]] = {
    "trained": lambda seeds: iter(trained()),
    "synthetic": tuned_fields,
    "held-out": held_out_fields,
    "tiny": lambda seeds: iter(tiny()),
}


def _field(grid: tuple[int, int, int], draw: torch.Generator) -> Tensor:
    """Gaussian random channels with a power-law spectrum, standardised: [T*H*W, CHANNELS]. Frequencies are
    in cycles per token; the constant component is left out, as standardising would."""
    axes = [torch.fft.fftfreq(size) * stretch for size, stretch in zip(grid, (2.0, 1.0, 1.0), strict=True)]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    radius[0, 0, 0] = torch.inf
    spectrum = torch.fft.fftn(torch.randn(CHANNELS, *grid, generator=draw), dim=(1, 2, 3)) * radius**-1.6
    channels = torch.fft.ifftn(spectrum, dim=(1, 2, 3)).real.flatten(1)
    channels = (channels - channels.mean(1, keepdim=True)) / channels.std(1, keepdim=True)
    return channels.T


def _rotate(x: Tensor, grid: tuple[int, int, int], base: float = 1e4) -> Tensor:
    """3-D rotary position: the channels are split among t, y and x."""
    t, y, z = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    parts = []
    for part, position in zip(x.split(ROTARY, dim=-1), (t, y, z), strict=True):
        half = part.shape[-1] // 2
        angle = position.flatten()[:, None] * base ** (-torch.arange(half) / half)
        a, b = part[..., :half], part[..., half:]
        parts.append(torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1))
    return torch.cat(parts, dim=-1)

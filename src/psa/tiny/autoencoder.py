"""Trains the tiny model's autoencoder on rendered clips."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import CHANNELS, encode, make_vae
from .scenes import render, sample_scene

PIXELS, FRAMES, BATCH = 64, 9, 4
RATE = 2e-3


def clips(count: int, frames: int, pixels: int, rng: random.Random, *, pairs: float) -> tuple[Tensor, list[str]]:
    """Rendered clips of training scenes, float32 ``[count, frames, 3, pixels, pixels]`` in 0…1, and their captions."""
    scenes = [sample_scene(rng, pairs=pairs) for _ in range(count)]
    return torch.stack([render(scene, frames, pixels, pixels, rng) for scene in scenes]), list(map(str, scenes))


def train_autoencoder(
    folder: Path, *, steps: tuple[int, int], seed: int, on_step: Callable[[str, int, float], None] = lambda *told: None
) -> Any:
    """The VAE in evaluation mode, its latents normalised; reads ``folder/vae.pt`` where it is done.

    It learns ``steps[0]`` steps with compact latents, then ``steps[1]`` with sharp ones. An interrupted run continues.
    ``on_step("autoencoder", step, loss)`` after every step, and ``on_step("sharpening", …)``.
    """
    done = folder / "vae.pt"
    if not done.exists():
        torch.manual_seed(seed)
        vae = make_vae()
        _train(vae, _compact, folder / "vae_compact.pt", steps[0], seed, partial(on_step, "autoencoder"))
        _train(vae, _sharp, folder / "vae_sharp.pt", steps[1], seed + 1, partial(on_step, "sharpening"))
        vae.requires_grad_(False)
        sample = clips(64, FRAMES, PIXELS, random.Random(seed), pairs=0.5)[0]
        latents = torch.cat([encode(vae, part) for part in sample.split(8)])
        mean, std = (part.tolist() for part in (latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))))
        write(done, {"weights": vae.state_dict(), "mean": mean, "std": std})
    saved = torch.load(done, weights_only=True)
    vae = make_vae(saved["mean"], saved["std"])
    vae.load_state_dict(saved["weights"])
    return vae.eval().requires_grad_(False)


def _train(
    vae: Any,
    loss_of: Callable[[Any, Tensor], Tensor],
    state: Path,
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """One phase, from wherever ``state`` says it is; the phase's last state holds its result."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        loss = loss_of(vae, clips(BATCH, FRAMES, PIXELS, random.Random(seed * 1_000_003 + step), pairs=0.5)[0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            body = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
            write(state, {"weights": vae.state_dict(), **body})


def _compact(vae: Any, video: Tensor) -> Tensor:
    """Absolute plus squared error in -1…1, and a little Kullback–Leibler divergence."""
    wanted = video.transpose(1, 2) * 2 - 1
    off, divergence = _off(vae, wanted)
    return off.abs().mean() + 2 * off.square().mean() + 5e-4 * divergence


def _sharp(vae: Any, video: Tensor) -> Tensor:
    """Absolute error, four times as heavy on the coloured things, and a tenth of the divergence."""
    wanted = video.transpose(1, 2) * 2 - 1
    off, divergence = _off(vae, wanted)
    weight = 1 + 3 * (wanted.amax(1, keepdim=True) - wanted.amin(1, keepdim=True) > 0.6)
    return (off.abs() * weight).mean() + 5e-5 * divergence


def _off(vae: Any, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded minus wanted, and the divergence from a standard normal, summed over a latent's channels."""
    posterior = vae.encode(wanted).latent_dist
    return vae.decode(posterior.sample()).sample - wanted, posterior.kl().mean() * CHANNELS / posterior.mean[0].numel()


def write(path: Path, body: Any) -> None:
    """Saves under a temporary name, then renames, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(body, partial)
    partial.replace(path)

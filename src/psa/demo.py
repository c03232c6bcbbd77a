"""`psa demo`: one prompt of the tiny model's world, generated with dense attention and with PSA, side by side."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tiny
from .checkpoint import Checkpoint
from .config import PUBLISHED_RATIOS, PSAConfig
from .devices import pick_device
from .errors import PSAError
from .extras import need
from .functional import make_plan, psa_attention
from .integrations import enable
from .pictures import demo_picture
from .tiny import FPS, FRAMES, GUIDANCE, HEIGHT, STEPS, WIDTH
from .tiny.checker import matches
from .tiny.scenes import Scene, parse
from .video import likeness, to_uint8, write_video

PROMPT = "a large magenta square moving left over clouds"


@dataclass(frozen=True)
class DemoResult:
    """What was made and measured. ``seen_dense`` and ``seen_psa``: whether a checker sees what the prompt says."""

    prompt: str
    tokens: int
    density: float
    seconds_dense: float
    seconds_psa: float
    speedup: float
    psnr: float
    ssim: float
    seen_dense: bool
    seen_psa: bool
    video: Path
    picture: Path
    record: Path


def rivals(density: float) -> dict[str, PSAConfig]:
    """Settings to compare at one density: the library's own, and three ways of spending it that are known."""
    scale, exact = density / 0.15, max(0.0, (density - 1 / 64) / (1 - 1 / 64))
    bounds = {level: (min(1.0, low * scale), min(1.0, high * scale)) for level, (low, high) in PUBLISHED_RATIOS.items()}
    published = {**bounds, 0: (bounds[0][0], 1.0)}
    return {
        "psa": PSAConfig(density=density, rearrange_method="auto"),
        "published topk": PSAConfig(mask_ratios=published),
        "one mean per block": PSAConfig(mask_ratios={1: (0.0, exact), 64: (exact, 1.0)}),
        "binary": PSAConfig(mask_ratios={1: (0.0, density)}),
    }


def load_pipeline(folder: str | Path | None = None) -> Any:
    """The tiny model as a diffusers pipeline, or another checkpoint of its kind."""
    pipe = Checkpoint(str(folder or tiny.path())).load("float32", image=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_video(
    pipe: Any,
    prompt: str,
    seed: int,
    steps: int = STEPS,
    on_step: Callable[[int], None] = lambda step: None,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    frames: int = FRAMES,
) -> np.ndarray:
    """A clip of the tiny model, uint8 ``[frames, height, width, 3]``; ``on_step(step)`` after every step."""

    def told(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return tensors

    output = pipe(
        prompt, width=width, height=height, num_frames=frames, num_inference_steps=steps, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed), output_type="np", callback_on_step_end=told,
    )  # fmt: skip
    return to_uint8(output.frames[0])


def seen(scene: Scene, frames: np.ndarray) -> dict[str, bool]:
    """What the checker sees of a scene in uint8 frames ``[frames, height, width, 3]``."""
    return matches(scene, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)


@contextlib.contextmanager
def captured(
    transformer: torch.nn.Module, wanted: Callable[[int], bool]
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collects q, k, v ``[batch, heads, tokens, head dim]`` of the dense self-attention calls of wanted numbers.

    Calls are counted while the transformer runs: a text encoder has self-attention too.
    """
    calls, running, kept, plain = 0, False, [], torch.nn.functional.scaled_dot_product_attention

    def enter(*_: Any) -> None:
        nonlocal running
        running = True

    def leave(*_: Any) -> None:
        nonlocal running
        running = False

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        if running and query.shape == key.shape:
            if wanted(calls):
                kept.append(tuple(x.detach().clone() for x in (query, key, value)))
            calls += 1
        return plain(query, key, value, *args, **options)

    hooks = transformer.register_forward_pre_hook(enter), transformer.register_forward_hook(leave)
    torch.nn.functional.scaled_dot_product_attention = recording
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        torch.nn.functional.scaled_dot_product_attention = plain


def run(
    prompt: str = PROMPT,
    output_dir: str | Path = "outputs/demo",
    *,
    density: float = 0.15,
    seed: int = 0,
    steps: int = STEPS,
    device: str = "cpu",
    on_step: Callable[[str, int], None] = lambda method, step: None,
) -> DemoResult:
    """Makes the prompt's clip twice from one seed; writes ``demo.mp4``, ``demo.png`` and ``demo.json``.

    Args:
        prompt: of the grammar :data:`psa.tiny.scenes.GRAMMAR`.
        density: share of dense attention's work that PSA keeps.
        device: cpu, cuda or cuda:N.
        on_step: called as ``on_step("dense" or "psa", step)`` after every step of each.

    Raises:
        ConfigError: with the grammar, for a prompt that is not of it; for a device that is not there.
    """
    scene, config, place = parse(prompt), rivals(density)["psa"], pick_device(device)
    for module, extra in (("diffusers", "diffusers"), ("av", "diffusers"), ("matplotlib", "report")):
        need(module, extra)
    need("skimage.metrics", "report")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline().to(place)
    _warm_up(pipe, config)
    blocks = len(pipe.transformer.blocks)
    middle = 2 * blocks * (steps // 2) + blocks // 2  # a middle layer at the middle step, of the pass with text
    with captured(pipe.transformer, lambda call: call == middle) as kept:
        began = time.perf_counter()
        dense = make_video(pipe, str(scene), seed, steps, partial(on_step, "dense"))
        seconds_dense = time.perf_counter() - began
    with enable(pipe, config=config) as handle:
        began = time.perf_counter()
        sparse = make_video(pipe, str(scene), seed, steps, partial(on_step, "psa"))
        seconds_psa, stats = time.perf_counter() - began, handle.stats
    alike = likeness(dense, sparse)
    both = np.concatenate((dense, sparse), axis=2).repeat(3, axis=1).repeat(3, axis=2)
    write_video(folder / "demo.mp4", both, FPS)
    _draw(folder / "demo.png", dense, sparse, kept[0], config, str(scene))
    result = DemoResult(
        str(scene), kept[0][0].shape[2], stats["overall_density"], seconds_dense, seconds_psa,
        seconds_dense / seconds_psa, alike["psnr"], alike["ssim"],
        seen(scene, dense)["all"], seen(scene, sparse)["all"],
        folder / "demo.mp4", folder / "demo.png", folder / "demo.json",
    )  # fmt: skip
    _write(result, stats)
    return result


def _warm_up(pipe: Any, config: PSAConfig) -> None:
    """Compiles the CPU engine, or a GPU's kernels for clips of this size, so that this is not taken for PSA's cost."""
    if pipe.device.type == "cpu":
        x = torch.randn(1, 1, 512, 64)
        psa_attention(x, x, x, config=config)
        return
    make_video(pipe, PROMPT, 0, 1)
    with enable(pipe, config=config):
        make_video(pipe, PROMPT, 0, 1)


def _draw(
    path: Path, dense: np.ndarray, sparse: np.ndarray, qkv: tuple[Tensor, Tensor, Tensor], config: PSAConfig, title: str
) -> None:
    q, k, v = qkv
    grid = (1 + (FRAMES - 1) // 2, HEIGHT // 8, WIDTH // 8)
    if q.shape[2] != grid[0] * grid[1] * grid[2]:
        raise PSAError(f"demo: {q.shape[2]} tokens, expected a grid of {grid}")
    plan = make_plan(q[:1], k[:1], config, v=v[:1], grid=grid)
    demo_picture(path, dense, sparse, plan, grid, title)


def _write(result: DemoResult, stats: dict[str, Any]) -> None:
    partial = result.record.with_suffix(".partial")
    body = asdict(result) | {"threads": torch.get_num_threads(), "torch": torch.__version__, "stats": stats}
    partial.write_text(json.dumps(body, indent=1, default=str))
    partial.replace(result.record)

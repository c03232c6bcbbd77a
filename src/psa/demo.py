"""`psa demo`: dense attention against PSA on a real clip's tokens, in time and in quality."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .clips import CLIP, clip_qkv, read_frames
from .config import PSAConfig
from .functional import make_plan, psa_attention
from .measure import cosine, relative_error, timed
from .pictures import demo_picture
from .plan import Plan

DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.4)


@dataclass(frozen=True)
class DemoRow:
    """One setting on the clip: measured density, relative error (mean over heads), cosine, and time over dense time."""

    method: str
    density: float
    error: float
    cosine: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class DemoResult:
    rows: list[DemoRow]
    tokens: int
    grid: tuple[int, int, int]
    dense_seconds: float
    picture: Path
    record: Path


def methods(density: float) -> dict[str, PSAConfig]:
    """The compared settings at one density; all with the same importance and token order."""
    scale = density / 0.15
    published = {level: (lo * scale, hi * scale) for level, (lo, hi) in
                 {1: (0.0, 0.10), 2: (0.10, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35)}.items()}  # fmt: skip
    exact = (density - 1 / 64) / (1 - 1 / 64)
    return {
        "binary (keep or drop)": PSAConfig(mask_ratios={1: (0.0, density)}),
        "published topk": PSAConfig(mask_ratios=published),
        "one mean per dropped block": PSAConfig(mask_ratios={1: (0.0, exact), 64: (exact, 1.0)}),
        "proportional": PSAConfig(mask_mode="proportional", density=density),
        "proportional + variance bias": PSAConfig(mask_mode="proportional", density=density, bias="variance"),
        "automatic (the default)": PSAConfig(density=density),
    }


def run(
    video: str | Path = CLIP,
    output_dir: str | Path = "outputs/demo",
    *,
    densities: tuple[float, ...] = DENSITIES,
    heads: int = 4,
    on_row: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> DemoResult:
    """Runs every method at every density on 16 frames, then writes ``demo.png`` and ``demo.json``.

    ``on_row(done, total, name)`` is called before each setting.
    """
    frames = read_frames(video)
    q, k, v, grid = clip_qkv(frames, heads=heads)
    cases = [(density, name, config) for density in densities for name, config in methods(density).items()]
    on_row(0, len(cases) + 1, "dense attention")
    exact, dense_seconds = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    psa_attention(q, k, v, config=cases[0][2], grid=grid)  # compiles the CPU engine and computes the token order
    rows = []
    for done, (density, name, config) in enumerate(cases, start=1):
        on_row(done, len(cases) + 1, f"{name} at density {density:g}")
        rows.append(_score(name, config, q, k, v, exact, grid, dense_seconds))
    shown = make_plan(q, k, PSAConfig(mask_mode="proportional", density=0.15, bias="variance"), grid=grid)
    folder = Path(output_dir)
    picture = _draw(folder / "demo.png", rows, shown, frames, grid)
    record = _write(folder / "demo.json", rows, grid, dense_seconds, str(video))
    return DemoResult(rows, q.shape[2], grid, dense_seconds, picture, record)


def _score(
    name: str,
    config: PSAConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    grid: tuple[int, int, int],
    dense: float,
) -> DemoRow:
    (out, plan), taken = timed(lambda: psa_attention(q, k, v, config=config, grid=grid, return_plan=True))
    error = float(relative_error(out, exact).mean())
    return DemoRow(name, plan.density, error, cosine(out, exact), taken, dense / taken)


def _draw(path: Path, rows: list[DemoRow], plan: Plan, frames: Tensor, grid: tuple[int, int, int]) -> Path:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.method, []).append((row.density, row.error))
    token = (grid[0] // 2 * grid[1] + grid[1] * 5 // 8) * grid[2] + grid[2] // 4
    return demo_picture(path, plan, frames, grid, token, head=plan.levels.shape[1] - 1, curves=curves)


def _write(path: Path, rows: list[DemoRow], grid: tuple[int, int, int], dense: float, video: str) -> Path:
    body = {"video": Path(video).name, "grid": grid, "dense_seconds": dense, "threads": torch.get_num_threads()}
    body |= {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(body, indent=1))
    partial.replace(path)
    return path


def best_rows(rows: list[DemoRow], density: float = 0.15) -> Iterator[DemoRow]:
    """The rows nearest to one density, one for each method."""
    for method in dict.fromkeys(row.method for row in rows):
        yield min((row for row in rows if row.method == method), key=lambda row: abs(row.density - density))

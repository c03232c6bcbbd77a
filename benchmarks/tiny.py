"""Does the tiny model do what its prompts say, densely and by PSA? Appends rows to ``benchmarks/results/tiny.jsonl``.

    python benchmarks/tiny.py [--videos 208] [--model FOLDER] [--part 0/2]
    python benchmarks/tiny.py --curves [--videos 4] [--part 0/2]
    python benchmarks/tiny.py --frames PROMPT

Prompts are held out of training; video i has seed i in every setting. Rows that are there already are not made again.
Likeness (PSNR, SSIM) is to the dense video of the same prompt and seed; ``--curves`` measures it for many settings.
"""

import argparse
import contextlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from quality import THRESHOLDS

import psa
from psa.config import PSAConfig
from psa.demo import load_pipeline, make_video, rivals, seen
from psa.tiny import STEPS, path
from psa.tiny.scenes import Scene, parse, sample_scene
from psa.video import likeness

RESULTS = Path(__file__).parent / "results" / "tiny.jsonl"


@dataclass(frozen=True)
class Setting:
    """How a video is made. ``density`` is None where it follows from the input."""

    method: str
    density: float | None
    order: str = "Gilbert"

    @property
    def config(self) -> PSAConfig | None:
        """None for dense attention."""
        if self.method == "dense":
            return None
        order = {"use_rearrange": False} if self.order == "raster" else {"rearrange_method": self.order}
        if self.density is None:
            return PSAConfig(mask_mode="thresholdbound", mask_ratios=THRESHOLDS, **order)
        known = rivals(self.density)
        known["published topk, similarity cap"] = known["published topk"].replace(use_sim_mask=True)
        known["proportional, count"] = PSAConfig(density=self.density, mask_mode="proportional")
        known["proportional, variance"] = known["proportional, count"].replace(bias="variance")
        return known[self.method].replace(**order)


DENSE = Setting("dense", 1.0)


def usual(method: str, density: float) -> Setting:
    """Ours in the order that its probes choose for every head, the others in the published one."""
    return Setting(method, density, "auto" if method == "psa" else "Gilbert")


MATCH = (DENSE, usual("psa", 0.15))
METHODS = (
    "psa",
    "proportional, variance",
    "proportional, count",
    "published topk",
    "published topk, similarity cap",
    "binary",
    "one mean per block",
)
CURVES = (
    DENSE,
    *(usual(method, density) for density in (0.05, 0.1, 0.15, 0.25) for method in METHODS),
    Setting("published thresholdbound", None),
    *(
        Setting(method, 0.1, order)
        for order in ("tile", "raster", "semantic", "hybrid")
        for method in ("psa", "proportional, variance", "published topk")
    ),
    Setting("psa", 0.1),
)


def scenes(count: int) -> list[Scene]:
    """The same held-out scenes every time."""
    rng = random.Random("held out")
    return [sample_scene(rng, held_out=True) for _ in range(count)]


def make(pipe, scene: Scene, seed: int, setting: Setting, steps: int) -> tuple[np.ndarray, dict]:
    """uint8 frames [F, H, W, 3], and the row."""
    config = setting.config
    handle = psa.enable(pipe, config=config, min_queries=0) if config else None
    with handle or contextlib.nullcontext():
        began = time.perf_counter()
        frames = make_video(pipe, str(scene), seed, steps)
        seconds = time.perf_counter() - began
        density = handle.stats["overall_density"] if handle else 1.0
    return frames, {"measured_density": density, "seconds": round(seconds, 2), **seen(scene, frames)}


def keep_frames(pipe, prompt: str, steps: int, density: float = 0.1, count: int = 6) -> None:
    """Writes frames of one prompt at 90 % sparsity for the README's picture, with PSNR to the dense clip."""
    clips, dense = {}, None
    for setting in (DENSE, *(usual(method, density) for method in rivals(density))):
        frames, row = make(pipe, parse(prompt), 0, setting, steps)
        dense = frames if dense is None else dense
        name = setting.method if setting == DENSE else f"{setting.method}\n{likeness(dense, frames)['psnr']:.1f} dB"
        clips[name] = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
        print(name, row)
    np.savez_compressed(RESULTS.with_name("tiny_frames.npz"), prompt=prompt, **clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, help="default 208, and 4 for curves")
    parser.add_argument("--curves", action="store_true", help="many settings instead of dense attention and PSA at .15")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--model", default=str(path()))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th video from the i-th, to share the work")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--frames", metavar="PROMPT", help="instead: keep frames of one prompt by every method")
    args = parser.parse_args()
    pipe = load_pipeline(args.model)
    if args.frames:
        return keep_frames(pipe, args.frames, args.steps)
    first, stride = map(int, args.part.split("/"))
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["seed"], row["steps"], Setting(row["method"], row["density"], row["order"])) for row in done}
    videos = args.videos or (4 if args.curves else 208)
    for seed, scene in list(enumerate(scenes(videos)))[first::stride]:
        dense = None
        for setting in CURVES if args.curves else MATCH:
            if (seed, args.steps, setting) in done:
                continue
            if dense is None and setting != DENSE:
                dense = make(pipe, scene, seed, DENSE, args.steps)[0]
            frames, row = make(pipe, scene, seed, setting, args.steps)
            dense = frames if setting == DENSE else dense
            row = {"seed": seed, "prompt": str(scene), "steps": args.steps, **asdict(setting), **row}
            row |= {name: round(value, 4) for name, value in likeness(dense, frames).items()}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(seed, setting, "seen" if row["all"] else f"NOT SEEN: {scene}", row["psnr"], flush=True)


if __name__ == "__main__":
    main()

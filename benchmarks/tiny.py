"""Does the tiny model do what its prompts say, densely and by PSA? Appends rows to ``benchmarks/results/tiny.jsonl``.

    python benchmarks/tiny.py [--videos 208] [--methods dense,psa] [--densities 0.15] [--model FOLDER] [--part 0/2]

Prompts are held out of training; video i has seed i in every method. Rows that are there already are not made again.
Likeness (PSNR, SSIM) is to the dense video of the same prompt and seed.
"""

import argparse
import contextlib
import json
import random
import time
from pathlib import Path

import numpy as np

import psa
from psa.config import PSAConfig
from psa.demo import STEPS, load_pipeline, make_video, rivals, seen
from psa.tiny import path
from psa.tiny.scenes import Scene, parse, sample_scene
from psa.video import likeness

RESULTS = Path(__file__).parent / "results" / "tiny.jsonl"


def scenes(count: int) -> list[Scene]:
    """The same held-out scenes every time."""
    rng = random.Random("held out")
    return [sample_scene(rng, held_out=True) for _ in range(count)]


def config(method: str, density: float) -> PSAConfig | None:
    return None if method == "dense" else rivals(density)[method]


def make(pipe, scene: Scene, seed: int, settings: PSAConfig | None, steps: int) -> tuple[np.ndarray, dict]:
    """uint8 frames [F, H, W, 3], and the row."""
    handle = psa.enable(pipe, config=settings, min_queries=0) if settings else None
    with handle or contextlib.nullcontext():
        began = time.perf_counter()
        frames = make_video(pipe, str(scene), seed, steps)
        seconds = time.perf_counter() - began
        density = handle.stats["overall_density"] if handle else 1.0
    return frames, {"measured_density": density, "seconds": round(seconds, 2), **seen(scene, frames)}


def keep_frames(pipe, prompt: str, steps: int, density: float = 0.1, count: int = 6) -> None:
    """Writes frames of one prompt at 90 % sparsity for the README's picture, with PSNR to the dense clip."""
    clips, dense = {}, None
    for method in ("dense", *rivals(density)):
        frames, row = make(pipe, parse(prompt), 0, config(method, density), steps)
        dense = frames if dense is None else dense
        name = method if method == "dense" else f"{method}\n{likeness(dense, frames)['psnr']:.1f} dB"
        clips[name] = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
        print(name, row)
    np.savez_compressed(RESULTS.with_name("tiny_frames.npz"), prompt=prompt, **clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=208)
    parser.add_argument("--methods", default="dense,psa")
    parser.add_argument("--densities", default="0.15")
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
    done = {(row["seed"], row["method"], row["density"], row["steps"]) for row in done}
    densities = [float(text) for text in args.densities.split(",")]
    cases = [(m, d) for m in args.methods.split(",") for d in ([1.0] if m == "dense" else densities)]
    for seed, scene in list(enumerate(scenes(args.videos)))[first::stride]:
        dense = None
        for method, density in cases:
            if (seed, method, density, args.steps) in done:
                continue
            if dense is None and method != "dense":
                dense = make(pipe, scene, seed, None, args.steps)[0]
            frames, row = make(pipe, scene, seed, config(method, density), args.steps)
            dense = frames if method == "dense" else dense
            row = {"seed": seed, "prompt": str(scene), "method": method, "density": density, "steps": args.steps} | row
            row |= {name: round(value, 4) for name, value in likeness(dense, frames).items()}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["seed"], method, density, "seen" if row["all"] else f"NOT SEEN: {scene}", row["psnr"], flush=True)


if __name__ == "__main__":
    main()

"""From how many tokens on the automatic mode pays: processor seconds of one layer, dense and by PSA.

    OMP_NUM_THREADS=1 python benchmarks/short.py

Appends rows to ``benchmarks/results/short.jsonl``. Processor seconds of one thread, the median of ``--repeats`` runs
after one that does not count. ``ten``: a probing call and nine that reuse its choice, on average.
"""

import argparse
import json
from pathlib import Path

import torch
from probe_cost import seconds
from quality import stamp

import psa
from psa.bench import smooth_inputs

RESULTS = Path(__file__).parent / "results" / "short.jsonl"
GRIDS = ((4, 16, 16), (6, 16, 16), (8, 16, 16), (12, 16, 16), (16, 16, 16))
LAYERS = ((4, 64), (4, 128), (6, 32), (12, 128))
"""Heads and channels of a head."""


def measure(grid: tuple[int, int, int], heads: int, head_dim: int, repeats: int) -> dict[str, float]:
    """Seconds of a call: dense, probing, reusing a choice, and with a fixed setting."""
    length = grid[0] * grid[1] * grid[2]
    q, k, v = smooth_inputs(1, heads, length, head_dim, torch.float32, torch.device("cpu"), seed=0)
    auto, fixed = (psa.PSAConfig(mask_mode=mode, density=0.15) for mode in ("auto", "proportional"))
    state = psa.ProbeState()
    psa.plan(q, k, auto, v=v, grid=grid, probes=state, step=0)

    def call(config: psa.PSAConfig, probes: psa.ProbeState | None = None, step: int | None = None) -> torch.Tensor:
        return psa.attend(q, k, v, psa.plan(q, k, config, v=v, grid=grid, probes=probes, step=step))

    calls = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "probing": lambda: call(auto),
        "reusing": lambda: call(auto, state, 1),
        "fixed": lambda: call(fixed),
    }
    return {name: seconds(made, repeats) for name, made in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for heads, head_dim in LAYERS:
        for grid in GRIDS:
            with torch.inference_mode():
                spent = measure(grid, heads, head_dim, options.repeats)
            ten = (spent["probing"] + 9 * spent["reusing"]) / 10
            row = {
                "length": grid[0] * grid[1] * grid[2],
                "heads": heads,
                "head_dim": head_dim,
                "seconds": {name: round(value, 5) for name, value in spent.items()},
                "ten": round(spent["dense"] / ten, 3),
                "fixed": round(spent["dense"] / spent["fixed"], 3),
                **stamp(),
            }
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()

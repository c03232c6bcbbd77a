"""What probing costs: processor seconds of a probing plan, a reusing plan and dense attention, in one run.

    OMP_NUM_THREADS=1 python benchmarks/probe_cost.py [--length 16384] [--head_dim 64]

Appends a row to ``benchmarks/results/probe_cost.jsonl``. Processor seconds of one thread, so that other work on the
machine does not count; each the median of ``--repeats`` runs after one that does not count.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import arenas
import quality
import torch

import psa

RESULTS = Path(__file__).parent / "results" / "probe_cost.jsonl"


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def layer(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """Two heads of synthetic fields; wider heads repeat the channels of a narrow one."""
    grid = (length // 1024, 32, 32)
    cases = [arenas.synthetic(1.0, 1.0, 0, grid), arenas.synthetic(2.0, 0.3, 1, grid)]
    q, k, v = (torch.cat([getattr(case, name) for case in cases], dim=1) for name in "qkv")
    return q.repeat(1, 1, 1, head_dim // 64), k.repeat(1, 1, 1, head_dim // 64), v.repeat(1, 1, 1, head_dim // 64), grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--head_dim", type=int, choices=(64, 128), default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    q, k, v, grid = layer(options.length, options.head_dim)
    fixed, auto = psa.PSAConfig(mask_mode="proportional", density=0.15), psa.PSAConfig(density=0.15)
    target, shared = psa.PSAConfig(target_error=0.05), psa.PSAConfig(density=0.15, share_heads=True)
    ordered = psa.PSAConfig(density=0.15, rearrange_method="auto")
    state, orders = psa.ProbeState(), psa.ProbeState(steps=48)
    reused = psa.plan(q, k, auto, v=v, grid=grid, probes=state, step=0)
    clusters = psa.plan(q, k, ordered, v=v, grid=grid, probes=orders, step=0).reorder_state
    attend = psa.attend
    parts = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "probing plan": lambda: psa.plan(q, k, auto, v=v, grid=grid),
        "probing plan for a target": lambda: psa.plan(q, k, target, v=v, grid=grid),
        "probing plan of a shared budget": lambda: psa.plan(q, k, shared, v=v, grid=grid),
        "reusing plan": lambda: psa.plan(q, k, auto, v=v, grid=grid, probes=state, step=1),
        "probing plan with orders": lambda: psa.plan(q, k, ordered, v=v, grid=grid, state=clusters),
        "reusing plan with orders": lambda: psa.plan(
            q, k, ordered, v=v, grid=grid, probes=orders, step=1, state=clusters
        ),
        "reusing plan with new orders": lambda: psa.plan(
            q, k, ordered, v=v, grid=grid, probes=orders, step=4, state=clusters
        ),
        "fixed plan": lambda: psa.plan(q, k, fixed, grid=grid),
        "attend": lambda: attend(q, k, v, reused, backend="torch"),
        "attend without slope": lambda: attend(q, k, v, dataclasses.replace(reused, slope=None), backend="torch"),
    }
    spent = {name: seconds(call, options.repeats) for name, call in parts.items()}
    probing, for_target, for_shared = (
        (spent[name] - spent["reusing plan"]) / spent["dense"]
        for name in ("probing plan", "probing plan for a target", "probing plan of a shared budget")
    )
    row = {
        "length": options.length,
        "head_dim": options.head_dim,
        "heads": 2,
        "seconds": {name: round(value, 4) for name, value in spent.items()},
        "probing": round(probing, 4),
        "amortised": round(probing / auto.probe_every, 4),
        "for a target": round(for_target, 4),
        "of a shared budget": round(for_shared, 4),
        "of orders": round((spent["probing plan with orders"] - spent["reusing plan with orders"]) / spent["dense"], 4),
        "clustering": round(
            (spent["reusing plan with new orders"] - spent["reusing plan with orders"]) / spent["dense"], 4
        ),
        "sorted keys": round((spent["reusing plan"] - spent["fixed plan"]) / spent["dense"], 4),
        "slope": round((spent["attend"] - spent["attend without slope"]) / spent["dense"], 4),
        **quality.stamp(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

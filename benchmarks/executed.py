"""Counts the instructions that every kernel executes, on a GPU that is emulated: PTX, summed over warps.

    python benchmarks/executed.py [--arch 90] [--length 16384]

Appends rows to ``benchmarks/results/executed.jsonl``: one call from q, k and v to out, bfloat16, D = 128, density .15,
two heads of synthetic fields, and its gradients at 8192 tokens; instructions per token and head.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Triton 3.10 switches the default off; the kernels count on fused multiply-adds.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
import triton
from emulator import emulated
from probe_cost import layer

from psa.backends import triton as backend
from psa.config import PSAConfig

RESULTS = Path(__file__).parent / "results" / "executed.jsonl"
DIM, DENSITY = 128, 0.15


def count(arch: int, length: int) -> list[dict]:
    """One row per kernel."""
    q, k, v = (x.to(torch.bfloat16) for x in layer(length, DIM)[:3])
    config = PSAConfig(mask_mode="proportional", density=DENSITY)
    counts = {}
    with emulated(arch, "early") as driver:
        out, lse, selection = backend.plan_and_attend(q, k, v, config, scale=DIM**-0.5)
        counts["forward"] = dict(driver.counts)
        driver.counts.clear()
        if length <= 8192:
            backend.backward(torch.randn_like(out), None, q, k, v, out, lse, selection)
            counts["backward"] = dict(driver.counts)
    facts = {"arch": arch, "length": length, "dim": DIM, "density": DENSITY, "triton": triton.__version__}
    tokens = q.shape[1] * length
    return [
        facts | {"pass": which, "kernel": kernel, "instructions": round(sum(found.values()) / tokens, 2)}
        for which, kernels in counts.items()
        for kernel, found in kernels.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=(80, 90, 120))
    parser.add_argument("--length", type=int, action="append")
    options = parser.parse_args()
    for arch in options.arch or (80, 90, 120):
        for length in options.length or (8192, 16384):
            for row in count(arch, length):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

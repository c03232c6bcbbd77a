"""How wrong a reused choice is: the bundled model's layers, probed at the first step and after ten.

    python benchmarks/reuse.py

For every layer, head and step: the true error with the choice made last, the error that was reported with it, the
true error with a choice of the step's own, and whether drift would have probed by then; in Gilbert order, and in the
order that the probes choose. Rows go to
``benchmarks/results/reuse.jsonl``; ``benchmarks/render.py`` makes the table.
"""

import argparse
import json
from pathlib import Path

import arenas
import quality

import psa
from psa.tiny import STEPS

RESULTS = Path(__file__).parent / "results" / "reuse.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, cases = [], arenas.tiny(tuple(range(STEPS)))
    for order in ("Gilbert", "auto"):
        drifting = psa.PSAConfig(density=0.15, rearrange_method=order)
        never = drifting.replace(probe_drift=1e9)
        kept, watched = psa.ProbeState(), psa.ProbeState()
        clusters = {}
        for case in cases:
            step, layer = (int("".join(filter(str.isdigit, part))) for part in case.name.split("-"))
            bench = quality.open_case(case, "Gilbert")
            tokens = {"v": case.v, "grid": case.grid, "state": clusters.get(layer)}
            reused = psa.plan(case.q, case.k, never, probes=kept, layer=layer, step=step, **tokens)
            psa.plan(case.q, case.k, drifting, probes=watched, layer=layer, step=step, **tokens)
            fresh = psa.plan(case.q, case.k, drifting, **tokens)
            clusters[layer] = reused.reorder_state
            facts = zip(bench.errors(reused).tolist(), bench.errors(fresh).tolist(), reused.report, strict=True)
            for head, (error, own, report) in enumerate(facts):
                rows.append(
                    {
                        "order": order,
                        "layer": layer,
                        "head": head,
                        "step": step,
                        "error": round(error, 6),
                        "fresh": round(own, 6),
                        "reported": round(report["error"], 6),
                        "setting": report["setting"],
                        "probed by drift": (str(layer), step) in watched.probed,
                        **quality.stamp(),
                    }
                )
            print(f"{order}, {case.name}: done", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

"""Scores every way of choosing levels on its arenas and appends result rows to ``benchmarks/results/quality.jsonl``.

    python benchmarks/quality.py [--arena trained|synthetic|held-out|tiny|all] [--seeds 3] [--quick]

Errors are ‖o − o*‖ / ‖o*‖ per head against dense attention in float32. "exact" importance is the true softmax mass of
each block pair; "ours" is what the library estimates. Tables are rendered by ``benchmarks/render.py``.
"""

import argparse
import datetime
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import arenas
import torch
from torch import Tensor

import psa
import psa.auto
from psa.candidates import Candidate
from psa.config import PUBLISHED_RATIOS

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
THRESHOLDS = {1: (0.0, 0.4), 2: (0.4, 0.5), 4: (0.5, 0.6), 8: (0.6, 0.8), 0: (0.8, 1.0)}
"""Bounds of the published thresholdbound preset (Wan2.1_14b); its density follows from the input."""
BLOCK_M, BLOCK_N = 128, 64
MAKER = Callable[["Bench", Tensor | None, float], psa.Plan]


@dataclass(frozen=True)
class Bench:
    """A case in one token order, with its truth. out: dense attention [1, H, L, D]; mass: [1, H, M, N]."""

    case: arenas.Case
    order: str
    out: Tensor
    mass: Tensor

    def plan(self, importance: Tensor | None, probed: bool = True, **settings) -> psa.Plan:
        order = {"use_rearrange": False} if self.order == "raster" else {"rearrange_method": self.order}
        config = psa.PSAConfig(**{"block_m": BLOCK_M, "block_n": BLOCK_N, **order, **settings})
        v = self.case.v if probed else None
        return psa.plan(self.case.q, self.case.k, config, v=v, grid=self.case.grid, importance=importance)

    def ranked(self, importance: Tensor | None, density: float, rest: int) -> psa.Plan:
        """The most important blocks at level 1, the others at level ``rest``, at equal density."""
        floor = 1.0 / rest if rest else 0.0
        share = max(0.0, (density - floor) / (1.0 - floor))
        return self.plan(importance, mask_mode="topk", mask_ratios={1: (0.0, share), rest: (share, 1.0)})

    def errors(self, plan: psa.Plan) -> Tensor:
        out = psa.attend(self.case.q, self.case.k, self.case.v, plan, backend="torch")
        return ((out - self.out).flatten(2).norm(dim=-1) / self.out.flatten(2).norm(dim=-1))[0]


def open_case(case: arenas.Case, order: str) -> Bench:
    """Dense attention and the true mass of every block pair, in chunks of one query block."""
    q, k, v = case.q, case.k, case.v
    empty = torch.empty(0)
    probe = Bench(case, order, empty, empty).plan(None, mask_mode="topk")
    permutation = probe.permutation
    queries, keys, values = (
        (q, k, v) if permutation is None else (permutation.apply_q(q), permutation.apply_k(k), permutation.apply_k(v))
    )
    out, masses = torch.empty_like(queries), []
    for start in range(0, q.shape[2], BLOCK_M):
        part = queries[:, :, start : start + BLOCK_M]
        share = (part @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
        out[:, :, start : start + BLOCK_M] = share @ values
        share = torch.nn.functional.pad(share.sum(2), (0, -share.shape[-1] % BLOCK_N))
        masses.append(share.unflatten(-1, (-1, BLOCK_N)).sum(-1))
    out = out if permutation is None else permutation.restore_q(out)
    return Bench(case, order, out, torch.stack(masses, dim=2))


def proportional(**settings) -> MAKER:
    def make(bench: Bench, importance: Tensor | None, density: float) -> psa.Plan:
        return bench.plan(importance, mask_mode="proportional", density=density, **settings)

    return make


def published_topk(bench: Bench, importance: Tensor | None, density: float, **settings) -> psa.Plan:
    """The published intervals, scaled so that they give ``density``."""
    factor = density / 0.15
    ratios = {level: tuple(min(1.0, b * factor) for b in bounds) for level, bounds in PUBLISHED_RATIOS.items()}
    ratios[0] = (ratios[0][0], 1.0)
    return bench.plan(importance, mask_mode="topk", mask_ratios=ratios, **settings)


def automatic(**settings) -> MAKER:
    return lambda bench, importance, density: bench.plan(importance, density=density, **settings)


def without(barred: Callable[[Candidate], bool]) -> MAKER:
    """The automatic mode, some of its candidates left out."""
    handicap = psa.auto.handicap

    def make(bench: Bench, importance: Tensor | None, density: float) -> psa.Plan:
        def stricter(candidate: Candidate, layer: psa.auto.Layer) -> float:
            return psa.auto.BARRED if barred(candidate) else handicap(candidate, layer)

        with mock.patch.object(psa.auto, "handicap", stricter):
            return bench.plan(importance, density=density)

    return make


METHODS: dict[str, MAKER] = {
    "published topk": published_topk,
    "published topk, similarity cap": lambda b, i, d: published_topk(b, i, d, use_sim_mask=True),
    "published thresholdbound": lambda b, i, d: b.plan(i, mask_mode="thresholdbound", mask_ratios=THRESHOLDS),
    "binary": lambda b, i, d: b.ranked(i, d, 0),
    "one mean per block": lambda b, i, d: b.ranked(i, d, BLOCK_N),
    "p1": proportional(exponent=1.0),
    "p2": proportional(exponent=2.0),
    "p3": proportional(exponent=3.0),
    "p1 drop": proportional(exponent=1.0, keep_all=False),
    "p2 drop": proportional(exponent=2.0, keep_all=False),
    "p1 variance": proportional(exponent=1.0, bias="variance"),
    "p2 variance": proportional(exponent=2.0, bias="variance"),
    "p1 variance uncapped": proportional(exponent=1.0, bias="variance", bias_cap=99.0),
    "p2 variance uncapped": proportional(exponent=2.0, bias="variance", bias_cap=99.0),
    "p1 measured": proportional(exponent=1.0, bias="measured"),
    "p2 measured": proportional(exponent=2.0, bias="measured"),
    "p1 sorted": proportional(exponent=1.0, sort_keys=True),
    "p1 sorted variance": proportional(exponent=1.0, bias="variance", sort_keys=True),
    "p1 variance slope": proportional(exponent=1.0, bias="variance", slope=True),
    "p1 sorted variance slope": proportional(exponent=1.0, bias="variance", sort_keys=True, slope=True),
    "p2 sorted variance slope": proportional(exponent=2.0, bias="variance", sort_keys=True, slope=True),
    "auto": automatic(),
    "auto, keys unsorted": automatic(sort_keys=False),
    "auto, importance 8x4": automatic(importance_rows=8, importance_cols=4),
    "auto, shared": automatic(share_heads=True),
    "auto, published tried": automatic(published=True),
    "auto, no probes": lambda b, i, d: b.plan(i, False, density=d),
    "auto, no slope": automatic(slope=False),
    "auto, one cap": without(lambda c: c.cap > 0),
    "auto, one exponent": without(lambda c: c.exponent != 1.0),
    "auto, no dropping": without(lambda c: not c.keep_all),
    "auto, coarse importance only": without(lambda c: c.fine),
    "auto, 24 probes": automatic(probe_rows=24),
    "auto, 1024 probes": automatic(probe_rows=1024),
    "auto, blocks 128x32": automatic(block_n=32),
    "auto, blocks 128x128": automatic(block_n=128),
    "auto, blocks 64x64": automatic(block_m=64),
    "auto, order per head": automatic(rearrange_method="auto"),
    "auto, tile 2x8x8": automatic(rearrange_method="tile"),
    "auto, tile 4x4x4": automatic(rearrange_method="tile", tile_size=(4, 4, 4)),
    "auto, tile 8x4x4": automatic(rearrange_method="tile", tile_size=(8, 4, 4)),
}
REPORTED = {"reported": "error", "spread": "error_spread"}
TARGETS = (0.02, 0.03, 0.05, 0.08, 0.12)


ORDERS = dict.fromkeys(arenas.ARENAS, ("Gilbert", "raster", "tile"))
ORDERS["tiny"] = ("Gilbert", "raster", "tile", "semantic", "hybrid")


def rows(
    bench: Bench, methods: dict[str, MAKER], densities: tuple[float, ...], sources: tuple[str, ...]
) -> Iterator[dict]:
    for density in densities:
        for source in sources:
            importance = bench.mass if source == "exact" else None
            for name, make in methods.items():
                if any(word in name for word in ("blocks", "tile", "order")) and importance is not None:
                    continue  # the true mass is known for this order and blocks of BLOCK_M x BLOCK_N
                plan = make(bench, importance, density)
                kept = plan.density_per_head.expand(1, bench.case.q.shape[1])[0]
                facts = plan.report
                for head, error in enumerate(bench.errors(plan).tolist()):
                    extra = {}
                    if facts:
                        fact = facts[head]
                        extra = {name: round(fact[key], 6) for name, key in REPORTED.items()}
                        extra["setting"] = fact["setting"]
                    norm = float(bench.out[0, head].norm())
                    yield {
                        "case": bench.case.name,
                        "head": head,
                        "order": bench.order,
                        "method": name,
                        "importance": source,
                        "density": density,
                        "kept": round(float(kept[head]), 5),
                        "error": round(error, 6),
                        "norm": round(norm, 3),
                        **extra,
                    }


def target_rows(bench: Bench) -> Iterator[dict]:
    """target_error against the true error, per head."""
    for target in TARGETS:
        plan = bench.plan(None, target_error=target)
        true = bench.errors(plan).tolist()
        for fact in plan.report:
            yield {
                "case": bench.case.name,
                "head": fact["head"],
                "order": bench.order,
                "method": "target_error",
                "importance": "ours",
                "target": target,
                "kept": round(fact["density"], 5),
                "reported": round(fact["error"], 6),
                "error": round(true[fact["head"]], 6),
                "setting": fact["setting"],
            }


def stamp() -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "psa": psa.__version__,
        "machine": platform.machine(),
    }


def cases(arena: str, seeds: int) -> Iterator[tuple[str, arenas.Case]]:
    for name in arenas.ARENAS if arena == "all" else (arena,):
        yield from ((name, case) for case in arenas.ARENAS[name](seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arena", choices=(*arenas.ARENAS, "all"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="our importance only")
    parser.add_argument("--quick", action="store_true", help="Gilbert order and density .15 only")
    parser.add_argument("--targets", action="store_true", help="target_error too, where methods are named")
    parser.add_argument("--methods", nargs="*", help="names, default all; an empty list leaves target_error only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = METHODS if options.methods is None else {name: METHODS[name] for name in options.methods}
    sources = ("ours",) if options.ours else ("exact", "ours")
    args_out: Path = options.out
    args_out.parent.mkdir(parents=True, exist_ok=True)
    with args_out.open("a") as file:
        for arena, case in cases(options.arena, options.seeds):
            for order in ("Gilbert",) if options.quick else ORDERS[arena]:
                densities = (0.15,) if options.quick or order != "Gilbert" else (0.1, 0.15, 0.25)
                bench = open_case(case, order)
                targets = target_rows(bench) if order == "Gilbert" and (options.targets or not options.methods) else ()
                for row in itertools.chain(rows(bench, chosen, densities, sources), targets):
                    file.write(json.dumps({"arena": arena, **row, **stamp()}) + "\n")
                file.flush()
                print(f"{arena} {case.name} {order}: done", flush=True)


if __name__ == "__main__":
    main()

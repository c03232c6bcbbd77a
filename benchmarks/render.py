"""Renders the result rows into tables inside README and docs, and into pictures beside them.

    python benchmarks/render.py

A page holds ``<!-- table: NAME -->`` … ``<!-- end -->``; what lies between is replaced. Pictures go to
``docs/pictures``.
"""

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from render_gpu import aot_table, emulated_table, executed_table, gpu_picture, gpu_table
from render_tiny import likeness_picture, likeness_table, match_table, tiny_picture, training_table

from psa.pictures import pyplot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*/*.md"))]
TRAINING = ROOT / "src" / "psa" / "tiny" / "model" / "training.json"
PICTURES = ROOT / "docs" / "pictures"
RIVALS = ("published topk", "one mean per block")
ARENAS = ("trained", "synthetic", "held-out")
TARGETS = (0.02, 0.03, 0.05, 0.08, 0.12)
Row = dict


def load(name: str) -> list[Row]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


def errors(rows: list[Row], arena: str, order: str = "Gilbert", density: float = 0.15) -> dict[tuple[str, str], dict]:
    """(method, importance) -> {(case, head): error}; later rows win."""
    found: dict[tuple[str, str], dict] = defaultdict(dict)
    for row in rows:
        if row["arena"] == arena and row["order"] == order and row.get("density") == density:
            found[row["method"], row["importance"]][row["case"], row["head"]] = row["error"]
    return found


def methods_table(rows: list[Row], arena: str) -> str:
    found = errors(rows, arena)
    topk, one = (found[rival, "exact"] for rival in RIVALS)
    lines = [
        "| method | importance | ÷ published topk | ÷ one-mean | worst head ÷ the better |",
        "|---|---|---|---|---|",
    ]
    for (method, importance), by_head in found.items():
        if not by_head:
            continue
        by_topk = mean([error / topk[head] for head, error in by_head.items()])
        by_one = mean([error / one[head] for head, error in by_head.items()])
        worst = max(error / min(topk[head], one[head]) for head, error in by_head.items())
        lines.append(f"| {method} | {importance} | {by_topk:.3f} | {by_one:.3f} | {worst:.2f} |")
    return "\n".join(lines)


def fields_table(rows: list[Row]) -> str:
    """Mean error per (temperature, noise) with the spread over seeds."""
    found = errors(rows, "synthetic")
    shown = [("binary", "exact"), *((r, "exact") for r in RIVALS), ("p1", "exact"), ("p1 variance uncapped", "exact")]
    shown.append(("auto", "ours"))
    kinds = sorted({case.rsplit("-s", 1)[0] for case, _ in found["p1", "exact"]})
    lines = ["| field | " + " | ".join(name for name, _ in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for kind in kinds:
        cells = []
        for key in shown:
            values = [error for (case, _), error in found[key].items() if case.rsplit("-s", 1)[0] == kind]
            cells.append(f"{mean(values):.4f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {kind.removeprefix('field-')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


FIVE = (("Gilbert", 0.1), ("Gilbert", 0.15), ("Gilbert", 0.25), ("tile", 0.15), ("raster", 0.15))
"""Orders and densities that were scored on every arena."""


def orders_table(
    rows: list[Row], arena: str, one: str, cases: tuple[tuple[str, float], ...], rivals: tuple[str, ...] = RIVALS
) -> str:
    """Geometric means over an arena's heads, ``one`` setting for all among them; auto's worst head against the better
    of ``RIVALS``."""
    shown = [*((rival, "exact") for rival in rivals), (one, "ours"), ("auto", "ours")]
    names = " | ".join(f"{m}, {i}" for m, i in shown)
    lines = [f"| order, density | {names} | worst head ÷ the better |", "|---" * (len(shown) + 2) + "|"]
    for order, density in cases:
        found = errors(rows, arena, order, density)
        cells = [f"{mean(list(found[key].values())):.4f}" for key in shown]
        better = [found[rival, "exact"] for rival in RIVALS]
        worst = max(error / min(rival[head] for rival in better) for head, error in found["auto", "ours"].items())
        lines.append(f"| {order}, {density:g} | " + " | ".join([*cells, f"{worst:.2f}"]) + " |")
    found = errors(rows, arena)
    ours = found["auto, order per head", "ours"]
    worst = max(error / min(found[rival, "exact"][head] for rival in RIVALS) for head, error in ours.items())
    cells = ["—"] * (len(shown) - 1) + [f"{mean(list(ours.values())):.4f}", f"{worst:.2f}"]
    lines.append("| chosen per head, 0.15 | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(rows: list[Row]) -> list[Row]:
    return list({(r["case"], r["head"], r["target"]): r for r in rows if "target" in r}.values())


def targets_table(rows: list[Row]) -> str:
    lines = [
        "| target | heads | true ≤ 1.2 × target | mean density | median of abs(reported ÷ true − 1) |",
        "|---" * 5 + "|",
    ]
    groups = defaultdict(list)
    for row in sorted(targets(rows), key=lambda row: row["target"]):
        for name in (row["target"], f"all of {row['arena']}", "all"):
            groups[name].append(row)
    for name in (*TARGETS, *(f"all of {arena}" for arena in (*ARENAS, "tiny")), "all"):
        group = groups[name]
        met = sum(r["error"] <= 1.2 * r["target"] for r in group) / len(group)
        away = sorted(abs(r["reported"] / r["error"] - 1) for r in group if r["kept"] < 1)
        density = sum(r["kept"] for r in group) / len(group)
        lines.append(f"| {name} | {len(group)} | {met:.0%} | {density:.3f} | {away[len(away) // 2]:.1%} |")
    return "\n".join(lines)


def held_out_table(rows: list[Row]) -> str:
    """Fields on which nothing was tuned, one by one."""
    found = errors(rows, "held-out")
    topk, one, ours = (found[key] for key in ((RIVALS[0], "exact"), (RIVALS[1], "exact"), ("auto", "ours")))
    reported = {
        (row["case"], row["head"]): f"{row['reported']:.4f} ± {row['spread']:.4f}"
        for row in rows
        if row["arena"] == "held-out" and row["method"] == "auto" and row["importance"] == "ours"
    }
    lines = ["| field | published topk | one mean per block | auto | ÷ the better | reported |", "|---" * 6 + "|"]
    for head in sorted(ours):
        better = ours[head] / min(topk[head], one[head])
        cells = [f"{topk[head]:.4f}", f"{one[head]:.4f}", f"{ours[head]:.4f}", f"{better:.2f}", reported[head]]
        lines.append(f"| {head[0].removeprefix('field-')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shared_table(rows: list[Row]) -> str:
    """A layer's error with a budget for each head and with one for all, at equal total density."""
    lines = ["| layer | importance | density each | density shared | error each | error shared | quotient |"]
    lines.append("|---" * 7 + "|")
    found = defaultdict(dict)
    for row in rows:
        if row["arena"] in ("trained", "tiny") and row["order"] == "Gilbert" and row.get("density") == 0.15:
            found[row["case"], row["importance"], row["method"]][row["head"]] = row
    bundled = []
    for case, source in sorted({key[:2] for key in found if (*key[:2], "auto, shared") in found}):
        heads = [list(found[case, source, method].values()) for method in ("auto", "auto, shared")]
        each, shared = (math.sqrt(sum((r["error"] * r["norm"]) ** 2 for r in group)) for group in heads)
        norm = math.sqrt(sum(r["norm"] ** 2 for r in heads[0]))
        kept = [sum(r["kept"] for r in group) / len(group) for group in heads]
        values = (*kept, each / norm, shared / norm, shared / each)
        if heads[0][0]["arena"] == "tiny":
            bundled.append(values)
        else:
            lines.append(_shared_line(case, source, values))
    if bundled:
        means = [math.exp(sum(map(math.log, column)) / len(bundled)) for column in zip(*bundled, strict=True)]
        lines.append(_shared_line(f"bundled model, mean of {len(bundled)}", "ours", means))
    return "\n".join(lines)


def _shared_line(name: str, source: str, values: Sequence[float]) -> str:
    digits = (3, 3, 4, 4, 2)
    cells = " | ".join(f"{value:.{n}f}" for value, n in zip(values, digits, strict=True))
    return f"| {name} | {source} | {cells} |"


def cost_table(rows: list[Row]) -> str:
    latest = {(row["length"], row["head_dim"]): row for row in rows}
    names = {
        "probing": "a call that probes",
        "amortised": "amortised over 10 steps",
        "for a target": "probing for a target",
        "of a shared budget": "probing for a shared budget",
        "of orders": "probing both orders",
        "clustering": "clustering",
        "sorted keys": "sorting keys",
        "slope": "slope",
    }
    lines = ["| L, D | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    for (length, head_dim), row in sorted(latest.items()):
        cells = [f"{row[name]:.1%}" for name in names]
        lines.append(f"| {length}, {head_dim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reuse_table(rows: list[Row]) -> str:
    """Choices at later steps: quotients of geometric means over layers and heads."""
    lines = [
        "| order | step | error ÷ with a choice of its own | worst head | error ÷ reported | layers probed by drift |",
        "|---|---|---|---|---|---|",
    ]
    for order, step in itertools.product(("Gilbert", "auto"), sorted({row["step"] for row in rows})):
        group = [row for row in rows if (row["order"], row["step"]) == (order, step)]
        own = [row["error"] / row["fresh"] for row in group]
        told = mean([row["error"] / row["reported"] for row in group])
        layers = {row["layer"]: row["probed by drift"] for row in group}
        cells = f"{mean(own):.2f} | {max(own):.2f} | {told:.2f} | {sum(layers.values())} of {len(layers)}"
        lines.append(f"| {order} | {step} | {cells} |")
    return "\n".join(lines)


def short_sequences_table(rows: list[Row]) -> str:
    """Dense time over PSA's; of rows with the same setting the last one counts."""
    latest = {(row["length"], row["heads"], row["head_dim"]): row for row in rows}
    layers = sorted({key[1:] for key in latest})
    names = " | ".join(f"{heads} × {head_dim}" for heads, head_dim in layers)
    lines = [f"| dense ÷ PSA, heads × D | {names} |", "|---" * (len(layers) + 1) + "|"]
    for kind, field in (("auto", "ten"), ("fixed setting", "fixed")):
        for length in sorted({key[0] for key in latest}):
            cells = " | ".join(f"{latest[length, *layer][field]:.2f}" for layer in layers)
            lines.append(f"| {kind}, {length} tokens | {cells} |")
    return "\n".join(lines)


def short_table(rows: list[Row]) -> str:
    """The README's table: the rivals, the default and the best, on the trained heads."""
    kept = (*((rival, "exact") for rival in RIVALS), ("binary", "exact"), ("p2 variance", "ours"), ("auto", "ours"))
    kept = (*kept, ("auto, order per head", "ours"))
    return methods_table([row for row in rows if (row.get("method"), row.get("importance")) in kept], "trained")


def cpu_table(rows: list[Row], contenders: tuple[str, ...] = ()) -> str:
    """Seconds against dense attention; of rows with the same setting the last one counts."""
    names = ("case", "length", "head_dim", "heads", "threads", "clock", "contender")
    latest = {tuple(row[name] for name in names): row for row in rows}
    lines = [
        "| case | L | D | heads | threads | clock | contender | dense s | s | speed-up | of ideal | other programs |",
        "|---" * 12 + "|",
    ]
    for key, row in sorted(latest.items(), key=lambda item: tuple(map(str, item[0]))):
        if contenders and row["contender"] not in contenders:
            continue
        numbers = f"{row['dense_seconds']:.3f} | {row['seconds']:.3f} | {row['ratio']:.2f}× | {row['of_ideal']:.2f}"
        others = "?" if row["others"] is None else f"{row['others']:.0%}"
        lines.append(f"| {' | '.join(map(str, key))} | {numbers} | {others} |")
    return "\n".join(lines)


def gpu_rows() -> list[Row]:
    """Rows of every file that `gpu_check.sh` wrote."""
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in load(path.stem)]
    return [row for row in rows if "kind" in row and "gpu" in row]


def tables() -> dict[str, str]:
    """Every table by the name that pages ask for it."""
    rows, cpu = load("quality"), load("cpu")
    return {
        "trained": methods_table(rows, "trained"),
        "synthetic": methods_table(rows, "synthetic"),
        "fields": fields_table(rows),
        "orders": orders_table(rows, "trained", "p2 variance", FIVE),
        "tiny-orders": orders_table(
            rows,
            "tiny",
            "p1 variance",
            (*FIVE, ("semantic", 0.15), ("hybrid", 0.15)),
            ("binary", "published thresholdbound", *RIVALS),
        ),
        "targets": targets_table(rows),
        "held-out": held_out_table(rows),
        "ablation": ablation_table(rows),
        "shared": shared_table(rows),
        "cost": cost_table(load("probe_cost")),
        "reuse": reuse_table(load("reuse")),
        "quality-short": short_table(rows),
        "cpu-short": cpu_table([row for row in cpu if row["case"] != "flex"], ("psa native",)),
        "cpu": cpu_table(cpu),
        "short": short_sequences_table(load("short")),
        "tiny-match": match_table(load("tiny")),
        "tiny-curves": likeness_table(load("tiny")),
        "tiny-heads": methods_table(rows, "tiny"),
        "tiny-training": training_table(TRAINING),
        "gpu": gpu_table(gpu_rows(), pictures=True),
        "aot": aot_table(load("aot")),
        "emulated": emulated_table(gpu_rows()),
        "executed": executed_table(load("executed")),
    }


def fill(text: str, found: dict[str, str]) -> str:
    """A page's text with its tables replaced."""
    for name, table in found.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    return text


PARTS = {
    "auto": "automatic mode",
    "auto, no slope": "without the slope correction",
    "auto, keys unsorted": "without sorting keys",
    "auto, one exponent": "exponent 1 only",
    "auto, no dropping": "without dropping",
    "auto, one cap": "variance capped at 1.5 only",
    "auto, coarse importance only": "without finer importance",
    "auto, importance 8x4": "finer importance for every head",
    "auto, no probes": "without probes: one setting for all",
    "auto, order per head": "a token order chosen per head",
    "auto, 24 probes": "24 probe rows",
    "auto, 1024 probes": "1024 probe rows",
}


def ablation_table(rows: list[Row]) -> str:
    """What each part of the automatic mode is worth: error over the whole mode's, and the worst head."""
    names = [f"{arena}{what}" for arena in ARENAS for what in ("", ", worst ÷ the better")]
    lines = ["| " + " | ".join(["automatic mode", *names]) + " |", "|---" * (len(names) + 1) + "|"]
    found = {arena: errors(rows, arena) for arena in ARENAS}
    for method, text in PARTS.items():
        cells = []
        for arena in ARENAS:
            ours, whole = found[arena][method, "ours"], found[arena]["auto", "ours"]
            rivals = [found[arena][rival, "exact"] for rival in RIVALS]
            worst = max(error / min(rival[head] for rival in rivals) for head, error in ours.items())
            cells += [f"{mean([error / whole[head] for head, error in ours.items()]):.3f}", f"{worst:.2f}"]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibration_picture(rows: list[Row]) -> None:
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = "psa"
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    group = [row for row in targets(rows) if row["kept"] < 1]
    for axis, name in zip(axes, ("target", "reported"), strict=True):
        for arena, marker in zip(ARENAS, "ox+", strict=True):
            points = [(row[name], row["error"]) for row in group if row["arena"] == arena]
            axis.scatter(*zip(*points, strict=True), marker=marker, s=18, label=arena)
        axis.plot([0.005, 0.2], [0.005, 0.2], color="grey", linewidth=0.8)
        axis.plot([0.005, 0.2], [0.006, 0.24], color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel=f"{name} error", ylabel="true error")
    axes[0].legend()
    figure.tight_layout()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / "calibration.svg", metadata={"Date": None})


def main() -> None:
    found = tables()
    for page in filter(Path.exists, PAGES):
        page.write_text(fill(page.read_text(), found))
    calibration_picture(load("quality"))
    tiny_picture(RESULTS / "tiny_frames.npz", PICTURES / "tiny.png")
    likeness_picture(load("tiny"), PICTURES / "tiny_curves.png")
    gpu_picture(gpu_rows(), PICTURES)


if __name__ == "__main__":
    main()

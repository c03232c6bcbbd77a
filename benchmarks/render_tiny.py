"""Tables and the picture of the bundled model's results."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tiny import CURVES, DENSE, MATCH, Setting, usual

from psa.pictures import pyplot
from psa.tiny.train import Stage

Row = dict


def average(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def match_table(rows: list[Row]) -> str:
    """How often the checker sees what the prompt says, of one thing, of two and in all, and how much rarer by PSA."""
    by = {
        setting: {row["seed"]: row for row in rows if Setting(row["method"], row["density"], row["order"]) == setting}
        for setting in MATCH
    }
    dense = by[DENSE]
    names = "| method | things | videos | attention work | colour | shape | motion | all | below dense by |"
    lines = [names, "|" + "---|" * 9]
    for things, (setting, found) in itertools.product(("one", "two", "all"), by.items()):
        group = [row for row in found.values() if things in ("all", "two" if " and " in row["prompt"] else "one")]
        if not group:
            continue
        rates = (f"{average(row[what] for row in group):.1%}" for what in ("colour", "shape", "motion", "all"))
        bound = below_dense([(dense[row["seed"]]["all"], row["all"]) for row in group])
        below = "" if setting == DENSE else f"≤ {100 * bound:.1f} points"
        name = setting.method
        work = average(row["measured_density"] for row in group)
        lines.append(f"| {name} | {things} | {len(group)} | {work:.3f} | {' | '.join(rates)} | {below} |")
    return "\n".join(lines)


def below_dense(pairs: list[tuple[bool, bool]]) -> float:
    """One-sided 95 % bound of how much rarer the second of each pair is true, as a share: the paired Wald interval with
    half a pair added to each of the four outcomes, which no chance agreement makes 0 (Agresti and Min 2005)."""
    count = len(pairs) + 2
    lost = sum(first and not second for first, second in pairs) + 0.5
    won = sum(second and not first for first, second in pairs) + 0.5
    return (lost - won + 1.645 * math.sqrt(lost + won - (lost - won) ** 2 / count)) / count


def likeness(rows: list[Row]) -> list[Row]:
    """The settings of the curves, averaged over the prompts that all of them were run on: "videos" of them."""
    by: dict[tuple, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        setting = Setting(row["method"], row["density"], row["order"])
        if setting != DENSE and setting in CURVES:
            by[row["order"], row["density"] or 0, row["method"]][row["seed"]] = row
    shared = set.intersection(*map(set, by.values())) if by else set()
    return [
        {"order": order, "density": density, "method": method, "videos": len(shared)}
        | {name: average(found[seed][name] for seed in shared) for name in ("measured_density", "psnr", "ssim", "all")}
        for (order, density, method), found in sorted(by.items())
    ]


def likeness_table(rows: list[Row]) -> str:
    """PSNR and SSIM to the dense clip by order, density and method."""
    lines = ["| order | density | method | kept | videos | PSNR | SSIM | all seen |", "|" + "---|" * 8]
    for row in likeness(rows):
        asked = f"{row['density']:g}" if row["density"] else "by threshold"
        cells = row["order"], asked, row["method"], f"{row['measured_density']:.3f}", row["videos"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['psnr']:.1f} dB | {row['ssim']:.3f} | {row['all']:.0%} |")
    return "\n".join(lines)


def likeness_picture(rows: list[Row], picture: Path) -> None:
    """SSIM to the dense clip over the density that was kept, a line per method, in its usual order."""
    figure, axis = pyplot().subplots(figsize=(8.5, 4.2), constrained_layout=True)
    by = defaultdict(list)
    for row in likeness(rows):
        if row["order"] == usual(row["method"], row["density"]).order:
            by[row["method"]].append((row["measured_density"], row["ssim"]))
    for method, points in by.items():
        axis.plot(
            *zip(*sorted(points), strict=True), marker="o", linewidth=2.5 if method == "psa" else 1.2, label=method
        )
    axis.set(xlabel="density kept", ylabel="SSIM to the dense clip", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, dpi=90, metadata={"Software": None})


def training_table(path: Path) -> str:
    """The stages of the training, from its record."""
    facts = json.loads(path.read_text())
    names = "| stage | pixels | frames | latent frames seen | tokens | batch | steps | clips | loss at the end |"
    lines = [names, "|" + "---|" * 9]
    for stage in (Stage(**stage) for stage in facts["stages"]):
        last = [loss for name, _, loss in facts["loss"] if name == stage.name][-5:]
        kinds = sorted({(part.tokens, part.seen or part.latents, part.batch) for part in stage.parts})
        tokens, seen, batch = (", ".join(map(str, values)) for values in zip(*kinds, strict=True))
        loss = f"{average(last):.3f}"
        cells = stage.name, stage.pixels, stage.frames, seen, tokens, batch, stage.steps, stage.pool, loss
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def tiny_picture(clips_file: Path, picture: Path) -> None:
    """Frames of one prompt by every method that ``benchmarks/tiny.py --frames`` kept, side by side."""
    import numpy as np

    with np.load(clips_file) as file:
        prompt, clips = str(file["prompt"]), {name: file[name] for name in file.files if name != "prompt"}
    count = len(next(iter(clips.values())))
    size = (1.7 * count, 1.75 * len(clips))
    figure, axes = pyplot().subplots(len(clips), count, figsize=size, constrained_layout=True)
    for row, (name, frames) in zip(axes, clips.items(), strict=True):
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    figure.suptitle(prompt, fontsize=10)
    figure.savefig(picture, dpi=90, metadata={"Software": None})

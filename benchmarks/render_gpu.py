"""Tables and a picture from what `gpu_check.sh`, `aot.py` and `executed.py` wrote; :mod:`render` fills pages."""

import re
from collections import defaultdict
from pathlib import Path

from psa.pictures import pyplot

Row = dict
KERNELS = (
    "_psa_fwd_kernel/wan", "_psa_fwd_kernel/wan-long", "_psa_fwd_kernel/every-option", "_psa_fwd_kernel/cogvideo",
    "_psa_fwd_kernel/qwen",
    "_psa_bwd_dq_kernel/wan", "_psa_bwd_dkv_kernel-pooled/wan", "_psa_bwd_dkv_kernel-tokens/wan", "_pool_kernel/wan",
    "_importance_kernel-keys/wan", "_importance_kernel-ranked/qwen", "_solve_kernel/wan", "_solve_kernel-variance/qwen",
    "_bias_kernel/every-option", "_select_kernel-proportional/wan", "_schedule_kernel/wan",
)  # fmt: skip
NAMES = {"HMMA": "mma", "HGMMA": "wgmma"}
NO_RUN = "No GPU run is recorded."


def aot_table(rows: list[Row]) -> str:
    """Registers, shared memory, blocks per multiprocessor and matrix instruction of the kernels of the default call."""
    archs = sorted({row["arch"] for row in rows})
    found = {row["name"]: row for row in rows}
    lines = ["| kernel / call | " + " | ".join(f"sm_{a}" for a in archs) + " |", "|---" * (len(archs) + 1) + "|"]
    for kernel in KERNELS:
        cells = []
        for arch in archs:
            row = found.get(f"{kernel}/sm_{arch}")
            if row is None:
                cells.append("–")
                continue
            cores = [NAMES.get(name, "tcgen05") for name in row["tensor_core"]]
            parts = [f"{row['registers']} r", f"{row['shared_bytes'] / 1024:.0f} K", f"{row['blocks_per_sm']}×", *cores]
            cells.append(", ".join(parts))
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    faults = sum(bool(row["faults"]) for row in rows)
    return "\n".join(
        [*lines, "", f"{len(rows)} compilations, {sum(r['spills'] for r in rows)} spills, {faults} faults."]
    )


def executed_table(rows: list[Row]) -> str:
    """Instructions per token and head that each kernel executes, by architecture and length; later rows win."""
    found = {(row["pass"], row["kernel"], row["arch"], row["length"]): row["instructions"] for row in rows}
    columns = sorted({(arch, length) for _, _, arch, length in found})
    lines = [
        "| pass, kernel | " + " | ".join(f"sm_{arch}, {length}" for arch, length in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for which, kernel in dict.fromkeys((which, kernel) for which, kernel, _, _ in found):
        counts = [found.get((which, kernel, *column)) for column in columns]
        cells = ["–" if number is None else f"{number:.0f}" for number in counts]
        lines.append(f"| {which}, `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def emulated_table(rows: list[Row]) -> str:
    """Checks on emulated GPUs by kind: how many passed, and the largest error of those that passed."""
    latest = {(row["gpu"], row["name"]): row for row in rows if row["kind"] == "check" and "emulated" in row["gpu"]}
    gpus = sorted({gpu for gpu, _ in latest}, key=lambda gpu: int(gpu.split("_")[1]))
    lines = ["| checks | " + " | ".join(gpu.split()[1] for gpu in gpus) + " |", "|---" * (len(gpus) + 1) + "|"]
    for kind in dict.fromkeys(name.split(",")[0] for _, name in latest):
        cells = []
        for gpu in gpus:
            group = [row for (at, name), row in latest.items() if at == gpu and name.split(",")[0] == kind]
            passed = [row for row in group if row["ok"]]
            errors = [
                float(e)
                for row in passed
                for e in re.findall(r"(?:out|d[qkv]|importance) ([\d.]+e[-+]\d+)", row["said"])
            ]
            cells.append(f"{len(passed)} of {len(group)}, {max(errors, default=0.0):.1e}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def timed(rows: list[Row]) -> dict[tuple, Row]:
    """The latest row of every contender."""
    return {(r["gpu"], r["case"], r["what"]): r for r in rows if r.get("kind") == "time" and "ms" in r}


def gpu_table(rows: list[Row], pictures: bool) -> str:
    latest = timed(rows)
    if not latest:
        return NO_RUN
    lines = [
        "| GPU | case | density | what | ms | TFLOP/s | of ideal | of attend | peak GiB |",
        "|---" * 9 + "|",
    ]
    for (gpu, case, what), row in latest.items():
        numbers = [row.get(name) for name in ("tflops", "of_ideal", "share", "peak_gib")]
        cells = ["–" if number is None else f"{number:.3g}" for number in numbers]
        density = "–" if row["density"] is None else f"{row['density']:.2f}"
        lines.append(f"| {gpu} | {case} | {density} | {what} | {row['ms']:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![effective TFLOP/s](../pictures/gpu.svg)"] if pictures else lines)


def gpu_picture(rows: list[Row], folder: Path) -> None:
    """Effective TFLOP/s of each contender over the cases, one panel per GPU; nothing where no run is recorded."""
    latest = timed(rows)
    if not latest:
        return
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = "psa"
    gpus = sorted({gpu for gpu, _, _ in latest})
    figure, axes = plt.subplots(len(gpus), 1, figsize=(10, 5 * len(gpus)), squeeze=False)
    for axis, gpu in zip(axes[:, 0], gpus, strict=True):
        lines = defaultdict(dict)
        for (at, case, what), row in latest.items():
            if at == gpu and row.get("tflops") and "backward" not in what:
                lines[what][case] = row["tflops"]
        cases = list(dict.fromkeys(case for line in lines.values() for case in line))
        for what, line in lines.items():
            axis.plot([cases.index(c) for c in line], list(line.values()), marker="o", linewidth=0.6, label=what)
        axis.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
        axis.set(title=gpu, ylabel="effective TFLOP/s", ylim=(0, None))
        axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gpu.svg", metadata={"Date": None})

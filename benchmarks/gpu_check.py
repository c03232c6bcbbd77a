"""One command for a machine with a GPU: verify every kernel on it, then time everything, and write rows as they come.

    benchmarks/gpu_check.sh [--quick | --part 1 | --part 2 | --emulate ARCH | --dry] [--only REGEX] [--out FILE] ...

Each row of benchmarks/results/<gpu>-<date>.jsonl says what ran, on what, and how it went; a case that fails is a row
too. What does not verify is not timed. A run that was cut short, or ran out of time, is continued by the same command:
checks that passed and cases that are complete in the file are not repeated. Exit status 1 when a check fails.

Checks run in several processes at once, and every timed case runs once in several processes beforehand, since most of
the time goes into compiling; what is timed has the GPU to itself.
"""

import argparse
import json
import os
import re
import sys
import time
from datetime import date
from pathlib import Path

BUDGETS = {"quick": 220.0, "part": 455.0, "dry": 600.0, "emulate": 3600.0}
"""Seconds after which nothing further is started."""


class Recorder:
    """Appends rows to a file, each as soon as it is known, with what identifies the machine.

    ``checked`` and ``timed``: checks that passed and cases that are complete in earlier rows of the same versions.
    """

    def __init__(self, out: Path | None, machine: dict, seconds: float, again: bool):
        self.machine, self.end, self.failed, self.rows = machine, time.monotonic() + seconds, 0, 0
        self.file, self.checked, self.timed = None, set(), set()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            before = out.read_text().splitlines() if out.exists() and not again else []
            for row in map(json.loads, before):
                if all(row.get(name) == machine[name] for name in ("gpu", "torch", "triton", "psa")):
                    self.checked |= {row["name"]} if row["kind"] == "check" and row["ok"] else set()
                    self.timed |= {row["case"]} if row["kind"] == "complete" else set()
            self.file = out.open("a")

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def add(self, **row) -> None:
        self.rows += 1
        self.failed += row.get("ok") is False
        if self.file is not None:
            self.file.write(json.dumps(row | self.machine) + "\n")
            self.file.flush()
        print(describe(row), flush=True)


def describe(row: dict) -> str:
    """One line for people."""
    if row["kind"] == "check":
        status = {True: "ok    ", False: "FAILED", None: "      "}[row["ok"]]
        return f"{status} {row['name']:60} {row.get('said') or ''}"
    if row["kind"] == "complete":
        return f"       {row['case']:28} complete after {row['seconds']:.0f} s"
    if "error" in row:
        return f"       {row['case']:28} {row['what']:24} {row['error'][:80]}"
    parts = [f"{row['ms']:9.3f} ms"]
    for name, unit in (("tflops", "TFLOP/s"), ("of_ideal", "of ideal"), ("share", "of attend"), ("peak_gib", "GiB")):
        if row.get(name) is not None:
            parts.append(f"{row[name]:.4g} {unit}")
    return f"       {row['case']:28} {row['what']:24} {'  '.join(parts)}"


def machine_facts(options: argparse.Namespace) -> dict:
    import torch
    import triton

    import psa

    with_gpu = not (options.dry or options.emulate)
    without = f"emulated sm_{options.emulate}" if options.emulate else "interpreter"
    gpu = torch.cuda.get_device_name() if with_gpu else without
    facts = {
        "date": date.today().isoformat(),
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "psa": psa.__version__,
    }
    if with_gpu:
        facts |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    return facts


def run(options: argparse.Namespace) -> int:
    import torch

    without = options.dry or options.emulate is not None
    if not without and not torch.cuda.is_available():
        print("no CUDA device; --emulate 90 checks on an emulated one, --dry on tiny shapes", file=sys.stderr)
        return 2
    import gpu_time
    import gpu_verify

    facts = machine_facts(options)
    name = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    default = Path(__file__).parent / "results" / f"{name}-{facts['date']}.jsonl"
    out = options.out or (None if without else default)
    mode = "dry" if options.dry else "emulate" if options.emulate else "part" if options.part else "quick"
    recorder = Recorder(out, facts, options.seconds or BUDGETS[mode], options.again)
    device = torch.device("cpu" if without else "cuda")
    workers = options.workers or (0 if without else max(1, min(8, (os.cpu_count() or 1) // 2)))
    if options.emulate:
        from emulator import emulated

        with emulated(options.emulate):
            gpu_verify.run(recorder, device, mode, options.only, workers=0)
    elif options.part != 2:
        gpu_verify.run(recorder, device, mode, options.only, workers)
    if options.emulate:
        print("nothing is timed on an emulated GPU")
    elif recorder.failed == 0 or options.force:
        gpu_time.run(recorder, device, mode, options.part, options.only, workers)
    else:
        print("not timed: a check failed (--force times all the same)")
    print(f"{recorder.rows} rows, {recorder.failed} failed checks" + (f", in {out}" if out else ""))
    return 1 if recorder.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="at most 4 minutes (the default)")
    mode.add_argument("--part", type=int, choices=(1, 2), help="one half of everything, at most 8 minutes")
    mode.add_argument("--dry", action="store_true", help="tiny shapes under the interpreter, without a GPU")
    executed = "the checks of kernels, without a GPU: what the compiler makes for sm_ARCH is executed"
    mode.add_argument("--emulate", type=int, choices=(80, 90, 120), metavar="ARCH", help=executed)
    parser.add_argument("--only", default="", help="regular expression on the names of checks and cases")
    parser.add_argument("--out", type=Path, help="file to append rows to")
    parser.add_argument("--seconds", type=float, help="start no case after this many")
    parser.add_argument("--again", action="store_true", help="repeat what the file has already")
    parser.add_argument("--workers", type=int, help="processes that check and compile (default: up to 8)")
    parser.add_argument("--force", action="store_true", help="time even where a check failed")
    options = parser.parse_args()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    return run(options)


if __name__ == "__main__":
    sys.exit(main())

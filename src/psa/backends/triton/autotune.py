"""A search for the launches that suit the GPU at hand, on request, and its memory on disk.

``PSA_AUTOTUNE=1`` times a few launches when a shape class is first met and writes the fastest to a file, per GPU and
versions; every later process reads it. Without the variable what was found is used and nothing is timed, so that a call
costs one look into a dictionary; ``PSA_AUTOTUNE=0`` leaves the table of :mod:`.tune` alone. Another tile adds in
another order: a tuned result differs from an untuned one in rounding, and repeats to the bit like it.
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from .tune import Launch, capability

LIMITS = {"num_stages": (1, 4), "num_warps": (4, 8), "WHOLE_N": (16, 128), "BLOCK_N": (16, 128), "BLOCK_M": (16, 128)}
"""What the search varies, in this order, and how far."""
GAIN = 0.98
"""A candidate replaces the best where it takes at most this share of its time: less is noise."""
REPEATS = 9

Run = Callable[[Launch], object]


def tuned(kernel: str, q: Tensor, constants: dict[str, Any], default: Launch, run: Run) -> Launch:
    """The launch for a call: what was found for its shape class, else, where asked for, what is found now.

    Args:
        kernel: "forward", "grad_queries" or "grad_rows".
        constants: constexpr arguments of the kernels (:meth:`.call.Call.constants`).
        run: launches the kernel, any number of times with the same result.
    """
    wish, path = os.environ.get("PSA_AUTOTUNE", ""), memory_path(q.device)
    if path is None or wish == "0":
        return default
    found, name = remembered(path), shape_class(kernel, q, constants)
    if name in found:
        return found[name]
    if wish != "1" or torch.cuda.is_current_stream_capturing():
        return default
    found[name] = search(default, run, constants["block_m"], unused={"WHOLE_N"} if kernel == "grad_rows" else set())
    remember(path, name, found[name])
    return found[name]


def shape_class(kernel: str, q: Tensor, constants: dict[str, Any]) -> str:
    """What a launch depends on: kernel, dtype, sizes of heads and blocks, options, and the length to a power of two."""
    options = [name.lower() for name in ("CAUSAL", "HAS_MASK", "ROW_BIAS", "PAIR_BIAS") if constants[name]]
    length = 1 << min(17, max(10, (q.shape[2] - 1).bit_length()))
    sizes = f"D{constants['D_PAD']} M{constants['block_m']} N{constants['block_n']} group{constants['GROUP']}"
    return " ".join([kernel, str(q.dtype).removeprefix("torch."), sizes, f"L{length}", *options])


def search(default: Launch, run: Run, block_m: int, unused: set[str]) -> Launch:
    """The fastest of the default and its neighbours, one setting after the other: about a dozen launches."""
    best, least = default, seconds(partial(run, default))
    for name in (name for name in LIMITS if name not in unused):
        for candidate in neighbours(best, name, block_m):
            taken = seconds(partial(run, candidate))
            if taken < GAIN * least:
                best, least = candidate, taken
    return best


def neighbours(launch: Launch, name: str, block_m: int) -> list[Launch]:
    """Launches that differ in one setting by one step."""
    value, (low, high) = getattr(launch, name), LIMITS[name]
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    found = [replace(launch, **{name: step}) for step in steps if low <= step <= high]
    return [candidate for candidate in found if block_m % candidate.BLOCK_M == 0]


def seconds(run: Callable[[], object]) -> float:
    """Median time on the device; infinite for a launch that does not compile or fit."""
    try:
        run()
        torch.cuda.synchronize()
    except Exception:
        return float("inf")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for before, after in pairs:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return 1e-3 * median(before.elapsed_time(after) for before, after in pairs)


@lru_cache
def memory_path(device: torch.device) -> Path | None:
    """The file for this GPU, its capability, and the versions of Triton and psa; None off the GPU.

    It lies in ``PSA_CACHE_DIR``, else in ``psa`` under ``XDG_CACHE_HOME``, else in ``~/.cache/psa``.
    """
    if device.type != "cuda":
        return None
    from ... import __version__

    words = f"{torch.cuda.get_device_name(device)} sm{capability(device)} triton {triton.__version__} psa {__version__}"
    return cache_folder() / f"launches-{re.sub(r'[^a-z0-9.]+', '-', words.lower())}.json"


def cache_folder() -> Path:
    """Where results are kept between processes."""
    given = os.environ.get("PSA_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psa"


@lru_cache
def remembered(path: Path) -> dict[str, Launch]:
    """What the file holds, read once per process. A file that cannot be understood is ignored, with a warning."""
    return _read(path)


def _read(path: Path) -> dict[str, Launch]:
    try:
        held = json.loads(path.read_text())
        names = {item.name for item in fields(Launch)}
        for launch in held.values():
            if launch.keys() != names or not all(type(value) is int and value > 0 for value in launch.values()):
                raise ValueError(f"{launch} is not a launch")
        return {name: Launch(**launch) for name, launch in held.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"{path} is ignored: {error}; delete it, or tune again with PSA_AUTOTUNE=1", stacklevel=2)
        return {}


def remember(path: Path, name: str, launch: Launch) -> None:
    """Adds an entry. Readers see the old file or the new one; a folder that cannot be written to is only warned of."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {other: asdict(found) for other, found in (_read(path) | {name: launch}).items()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(held, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        warnings.warn(f"the launch for {name!r} is not kept: {error}", stacklevel=2)

"""What single values of a configuration may be, with errors that name the value and the nearest valid one."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from .errors import ConfigError

MAX_LEVEL = 128
"""Levels are stored as uint8, so pooling stops at 128 whatever the block size."""

Ratios = dict[int, tuple[float, float]]


def nearest(name: object, valid: Any) -> str:
    """A hint such as ``; did you mean 'topk'? (topk, thresholdbound)``, for the end of an error message."""
    names = [str(item) for item in valid]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(names)}"


def is_power_of_two(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0


def check_density(density: float, max_level: int, keep_all: bool) -> None:
    """Raises ConfigError unless a density can be met: (0, 1], and at least 1/max_level when nothing is dropped."""
    finite("density", density, low=0.0)
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density: {density!r} is not in (0, 1]")
    if keep_all and density < 1.0 / max_level:
        raise ConfigError(
            f"density: {density!r} is below 1/{max_level}, the least without dropping; "
            "ask for more, or use larger blocks, or a config or preset that drops (keep_all false)"
        )


def check_ratios(ratios: object, block_n: int) -> Ratios:
    """Validates ``level -> (lo, hi)`` and returns it sorted by (lo, hi), level 0 last.

    Raises:
        ConfigError: for levels that are no power of two or exceed ``block_n``, bounds outside [0, 1], intervals that
            overlap, leave a gap, or are out of order.
    """
    if not isinstance(ratios, Mapping) or not ratios:
        raise ConfigError(f"mask_ratios: {ratios!r} is not a mapping of level to [lo, hi]")
    parsed: Ratios = {}
    for key, bounds in ratios.items():
        level = int(key) if isinstance(key, str) and key.isdecimal() else key
        skipped = isinstance(level, int) and level == 0 and level is not False
        if not skipped and not (is_power_of_two(level) and level <= min(block_n, MAX_LEVEL)):
            raise ConfigError(f"mask_ratios.{key}: level must be 0 or a power of two up to {min(block_n, MAX_LEVEL)}")
        if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
            raise ConfigError(f"mask_ratios.{key}: {bounds!r} is not [lo, hi]")
        lo, hi = (finite(f"mask_ratios.{key}", bound) for bound in bounds)
        if not 0.0 <= lo <= hi <= 1.0:
            raise ConfigError(f"mask_ratios.{key}: [{lo}, {hi}] is not an interval within [0, 1]")
        parsed[int(level)] = (lo, hi)
    ordered = sorted(parsed.items(), key=lambda item: (item[0] == 0, *item[1], item[0]))
    end, last = 0.0, 0
    for level, (lo, hi) in ordered:
        if abs(lo - end) > 1e-9:
            fault = "overlaps the one before" if lo < end else "leaves a gap after the one before"
            raise ConfigError(f"mask_ratios.{level}: [{lo}, {hi}] {fault}, which ends at {end}")
        if level and level < last:
            raise ConfigError(f"mask_ratios.{level}: finer than level {last}, which comes before it")
        end, last = hi, level or last
    return dict(ordered)


def level_name(key: object) -> object:
    text = str(key).lower().removeprefix("x")
    return int(text) if text.isdigit() else key


def check_thresholds(thresholds: object) -> dict[int, float]:
    if not isinstance(thresholds, Mapping):
        raise ConfigError(f"sim_thresholds: {thresholds!r} is not a mapping with x2, x4, x8")
    for level in thresholds:
        if level not in (2, 4, 8):
            raise ConfigError(f"sim_thresholds.{level}: unknown key{nearest(level, ('x2', 'x4', 'x8'))}")
    return {int(level): finite(f"sim_thresholds.x{level}", value) for level, value in sorted(thresholds.items())}


def check_tile(tile: object) -> tuple[int, int, int]:
    sizes = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ConfigError(f"tile_size: {tile!r} is not three positive whole numbers (t, h, w)")
    return sizes  # type: ignore[return-value]


def finite(name: str, value: object, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise ConfigError(f"{name}: {value!r} is not a finite number{bound}")
    return float(value)

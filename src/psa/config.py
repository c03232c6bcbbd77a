"""One frozen configuration for the whole method; the YAML files speak in its terms."""

import difflib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, TypeGuard

from .errors import ConfigError

MASK_MODES = ("topk", "thresholdbound", "proportional")
BIASES = ("count", "variance", "measured")
IMPORTANCES = ("pooled", "sampled", "antidiagonal")
REARRANGE_METHODS = ("Gilbert", "tile", "semantic", "hybrid")
MAX_LEVEL = 128
"""Levels are stored as uint8, so pooling stops at 128 whatever the block size."""

PUBLISHED_RATIOS = {1: (0.0, 0.10), 2: (0.10, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}
DEFAULT_DENSITY = 0.15
DEFAULT_CAPS = {"count": 0.0, "variance": 1.0, "measured": 20.0}

Ratios = dict[int, tuple[float, float]]


def nearest(name: object, valid: Any) -> str:
    """A hint such as ``; did you mean 'topk'? (topk, thresholdbound)``, for the end of an error message."""
    names = [str(item) for item in valid]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(names)}"


def is_power_of_two(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class PSAConfig:
    """Every choice of the method. Validated on construction; :meth:`replace` makes changed copies.

    Args:
        block_m, block_n: tokens per query block and per KV block (powers of two, at least 16).
        tile_n: KV rows a kernel handles at a time; must divide ``block_n``. Default ``min(32, block_n)``.
        mask_mode: how importance becomes levels: ``"topk"``, ``"thresholdbound"`` (the published modes, with
            ``mask_ratios``) or ``"proportional"`` (with ``density`` or ``tau``). Default: proportional when
            ``density`` or ``tau`` is given, else topk.
        mask_ratios: level -> (lo, hi), cumulative bounds in [0, 1]; level 0 is skipped.
        density: mean of 1/level over block pairs, in (0, 1].
        exponent: in proportional mode, rows are kept in proportion to importance ** exponent.
        keep_all: in proportional mode, never skip a block; ``False`` skips what would be coarser than one row.
        tau: fixed threshold of proportional mode; density then adapts to the input.
        share_heads: meet ``density`` over all heads of a layer instead of in each head.
        bias: mass correction of pooled rows: ``"count"`` (published), ``"variance"`` or ``"measured"``.
        bias_cap: upper bound of that correction, in nats. Default 1 (variance), 20 (measured).
        importance: ``"pooled"``, ``"sampled"`` or ``"antidiagonal"``.
        importance_rows, importance_cols: query rows and key rows averaged into one by pooled importance.
        importance_stride: stride of antidiagonal scoring.
        seed: of sampled importance and of semantic clustering.
        use_sim_mask, sim_thresholds: cap a block's level by the similarity of its neighbouring keys.
        use_rearrange, rearrange_method, tile_size: token order for a (T, H, W) grid.
        warmup_steps: first denoising steps that stay dense (used by the integrations).
        type: ``"psa"``, or ``"dense"`` for a baseline preset.

    Raises:
        ConfigError: naming the field, the value and what is valid.
    """

    block_m: int = 128
    block_n: int = 64
    tile_n: int | None = None
    mask_mode: str | None = None
    mask_ratios: Ratios | None = None
    density: float | None = None
    exponent: float = 1.0
    keep_all: bool = True
    tau: float | None = None
    share_heads: bool = False
    bias: str = "count"
    bias_cap: float | None = None
    importance: str = "pooled"
    importance_rows: int = 16
    importance_cols: int = 8
    importance_stride: int = 8
    seed: int = 0
    use_sim_mask: bool = False
    sim_thresholds: dict[int, float] = field(default_factory=lambda: {2: 0.7, 4: 0.65, 8: 0.6})
    use_rearrange: bool = True
    rearrange_method: str = "Gilbert"
    tile_size: tuple[int, int, int] = (2, 8, 8)
    warmup_steps: int = 0
    type: str = "psa"
    description: str = ""
    key: str = field(init=False, repr=False, compare=False, default="")
    """The configuration as one JSON string: its identity, and how it travels through compiled graphs."""

    def __post_init__(self) -> None:
        self._check_blocks()
        self._resolve_mode()
        self._check_choices()
        self._check_numbers()
        object.__setattr__(self, "key", json.dumps(self.to_dict(), sort_keys=True))

    def __hash__(self) -> int:
        return hash(self.key)

    def replace(self, **changes: Any) -> "PSAConfig":
        """A changed copy. Asking for ``density`` or ``tau`` switches to proportional mode unless told otherwise."""
        if ("density" in changes or "tau" in changes) and self.mask_mode != "proportional":
            changes = {"mask_mode": "proportional", "mask_ratios": None, **changes}
        if "tau" in changes:
            changes = {"density": None, **changes}
        elif "density" in changes:
            changes = {"tau": None, **changes}
        if "bias" in changes and "bias_cap" not in changes:
            changes = {"bias_cap": None, **changes}
        if "mask_mode" in changes and changes["mask_mode"] != "proportional":
            changes = {"density": None, "tau": None, **changes}
        if "block_n" in changes and "tile_n" not in changes:
            changes = {"tile_n": None, **changes}
        return replace(self, **changes)

    @property
    def max_level(self) -> int:
        return min(self.block_n, MAX_LEVEL)

    # -- checks ------------------------------------------------------------------------------------------------

    def _check_blocks(self) -> None:
        for name in ("block_m", "block_n"):
            value = getattr(self, name)
            if not is_power_of_two(value) or value < 16:
                raise ConfigError(f"{name}: {value!r} is not a power of two of at least 16")
        if self.tile_n is None:
            object.__setattr__(self, "tile_n", min(32, self.block_n))
        tile_n = self.tile_n
        if not isinstance(tile_n, int) or isinstance(tile_n, bool) or tile_n < 1 or self.block_n % tile_n:
            raise ConfigError(f"tile_n: {tile_n!r} does not divide block_n = {self.block_n}")

    def _resolve_mode(self) -> None:
        mode = self.mask_mode
        if mode is None:
            mode = "proportional" if self.density is not None or self.tau is not None else "topk"
        if mode not in MASK_MODES:
            raise ConfigError(f"mask_mode: {mode!r} is unknown{nearest(mode, MASK_MODES)}")
        object.__setattr__(self, "mask_mode", mode)
        if mode == "proportional":
            if self.mask_ratios is not None:
                raise ConfigError("mask_ratios: proportional mode takes density or tau, not mask_ratios")
            if self.density is not None and self.tau is not None:
                raise ConfigError("tau: a fixed tau and a density exclude each other; give one")
            if self.density is None and self.tau is None:
                object.__setattr__(self, "density", DEFAULT_DENSITY)
        else:
            for name in ("density", "tau"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}: mask_mode {mode!r} takes mask_ratios, not {name}; use proportional")
            ratios = PUBLISHED_RATIOS if self.mask_ratios is None else self.mask_ratios
            object.__setattr__(self, "mask_ratios", check_ratios(ratios, self.block_n))

    def _check_choices(self) -> None:
        choices = {"bias": BIASES, "importance": IMPORTANCES, "type": ("psa", "dense")}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is unknown{nearest(getattr(self, name), valid)}")
        method = {m.lower(): m for m in REARRANGE_METHODS}.get(str(self.rearrange_method).lower())
        if method is None:
            hint = nearest(self.rearrange_method, REARRANGE_METHODS)
            raise ConfigError(f"rearrange_method: {self.rearrange_method!r} is unknown{hint}")
        object.__setattr__(self, "rearrange_method", method)
        for name in ("keep_all", "share_heads", "use_sim_mask", "use_rearrange"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not true or false")
        if not isinstance(self.description, str):
            raise ConfigError(f"description: {self.description!r} is not text")

    def _check_numbers(self) -> None:
        if self.density is not None:
            check_density(self.density, self.max_level, self.keep_all)
        _finite("exponent", self.exponent, low=0.0)
        if self.tau is not None and _finite("tau", self.tau, low=0.0) == 0:
            raise ConfigError("tau: 0 is not positive")
        if self.bias_cap is None:
            object.__setattr__(self, "bias_cap", DEFAULT_CAPS[self.bias])
        _finite("bias_cap", self.bias_cap, low=0.0)
        limits = {"importance_rows": self.block_m, "importance_cols": self.block_n, "importance_stride": None}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not is_power_of_two(value) or (limit is not None and value > limit):
                raise ConfigError(f"{name}: {value!r} is not a power of two" + (f" up to {limit}" if limit else ""))
        smallest = min(self.block_m, self.block_n)
        if self.importance == "antidiagonal" and self.importance_stride > smallest:
            raise ConfigError(f"importance_stride: {self.importance_stride} is larger than a block ({smallest})")
        for name in ("seed", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise ConfigError(f"{name}: {value!r} is not a whole number from 0")
        object.__setattr__(self, "sim_thresholds", _check_thresholds(self.sim_thresholds))
        object.__setattr__(self, "tile_size", _check_tile(self.tile_size))

    # -- the YAML's terms --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a preset of the YAML schema (plain types only)."""
        out: dict[str, Any] = {"type": self.type, "description": self.description}
        out["block_size"] = {"m": self.block_m, "n": self.block_n, "tile_n": self.tile_n}
        if self.mask_ratios is not None:
            out["mask_ratios"] = {str(level): list(bounds) for level, bounds in self.mask_ratios.items()}
        out["sim_thresholds"] = {f"x{level}": value for level, value in self.sim_thresholds.items()}
        out["tile_size"] = list(self.tile_size)
        done = {"type", "description", "block_m", "block_n", "tile_n", "mask_ratios", "sim_thresholds", "tile_size"}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.init and item.name not in done and value is not None:
                out[item.name] = value
        return out

    @classmethod
    def from_dict(cls, preset: Mapping[str, Any]) -> "PSAConfig":
        """Reads one preset of the YAML schema. ``attn_impl`` of old files is ignored with one notice.

        Raises:
            ConfigError: for an unknown key or a value that is not valid.
        """
        if not isinstance(preset, Mapping):
            raise ConfigError(f"a preset must be a mapping, got {type(preset).__name__}")
        given = dict(preset)
        if given.pop("attn_impl", None) is not None:
            _notice_attn_impl()
        names = [item.name for item in fields(cls) if item.init and item.name not in ("block_m", "block_n", "tile_n")]
        for key in given:
            if key not in names and key != "block_size":
                raise ConfigError(f"{key}: unknown key{nearest(key, [*names, 'block_size'])}")
        blocks = given.pop("block_size", {})
        if not isinstance(blocks, Mapping):
            raise ConfigError(f"block_size: {blocks!r} is not a mapping with m, n, tile_n")
        for key, value in blocks.items():
            if key not in ("m", "n", "tile_n"):
                raise ConfigError(f"block_size.{key}: unknown key{nearest(key, ('m', 'n', 'tile_n'))}")
            given[{"m": "block_m", "n": "block_n"}.get(key, key)] = value
        if "sim_thresholds" in given and isinstance(given["sim_thresholds"], Mapping):
            given["sim_thresholds"] = {_level_name(key): value for key, value in given["sim_thresholds"].items()}
        if isinstance(given.get("tile_size"), list):
            given["tile_size"] = tuple(given["tile_size"])
        return cls(**given)

    @classmethod
    def from_key(cls, key: str) -> "PSAConfig":
        """The configuration that a :attr:`key` names."""
        return _from_key(key)


@lru_cache(maxsize=256)
def _from_key(key: str) -> PSAConfig:
    return PSAConfig.from_dict(json.loads(key))


@lru_cache(maxsize=1)
def _notice_attn_impl() -> None:
    warnings.warn("attn_impl is ignored: one kernel serves every option", UserWarning, stacklevel=4)


def check_density(density: float, max_level: int, keep_all: bool) -> None:
    """Raises ConfigError unless a density can be met: (0, 1], and at least 1/max_level when nothing is dropped."""
    _finite("density", density, low=0.0)
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density: {density!r} is not in (0, 1]")
    if keep_all and density < 1.0 / max_level:
        raise ConfigError(
            f"density: {density!r} is below 1/{max_level}, the least without dropping; "
            "use keep_all=False or larger blocks"
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
        lo, hi = (_finite(f"mask_ratios.{key}", bound) for bound in bounds)
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


def _level_name(key: object) -> object:
    text = str(key).lower().removeprefix("x")
    return int(text) if text.isdigit() else key


def _check_thresholds(thresholds: object) -> dict[int, float]:
    if not isinstance(thresholds, Mapping):
        raise ConfigError(f"sim_thresholds: {thresholds!r} is not a mapping with x2, x4, x8")
    for level in thresholds:
        if level not in (2, 4, 8):
            raise ConfigError(f"sim_thresholds.{level}: unknown key{nearest(level, ('x2', 'x4', 'x8'))}")
    return {int(level): _finite(f"sim_thresholds.x{level}", value) for level, value in sorted(thresholds.items())}


def _check_tile(tile: object) -> tuple[int, int, int]:
    sizes = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ConfigError(f"tile_size: {tile!r} is not three positive whole numbers (t, h, w)")
    return sizes  # type: ignore[return-value]


def _finite(name: str, value: object, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise ConfigError(f"{name}: {value!r} is not a finite number{bound}")
    return float(value)

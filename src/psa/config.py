"""One frozen configuration for the whole method; the YAML files speak in its terms."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from .errors import ConfigError
from .values import (
    MAX_LEVEL,
    Ratios,
    check_density,
    check_ratios,
    check_thresholds,
    check_tile,
    finite,
    is_power_of_two,
    level_name,
    nearest,
)

MASK_MODES = ("topk", "thresholdbound", "proportional", "auto")
BIASES = ("count", "variance", "measured")
IMPORTANCES = ("pooled", "sampled", "antidiagonal")
REARRANGE_METHODS = ("Gilbert", "tile", "semantic", "hybrid", "auto")

PUBLISHED_RATIOS = {1: (0.0, 0.10), 2: (0.10, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}
DEFAULT_DENSITY = 0.15
DEFAULT_CAPS = {"count": 0.0, "variance": 1.0, "measured": 20.0}
RANKED = ("topk", "thresholdbound")
USED_BY = {
    "mask_ratios": RANKED,
    "density": ("proportional", "auto"),
    "tau": ("proportional",),
    "exponent": ("proportional",),
    "rank_exponent": ("proportional",),
    "keep_all": ("proportional",),
    "share_heads": ("proportional", "auto"),
    "bias": (*RANKED, "proportional"),
    "bias_cap": (*RANKED, "proportional"),
    "target_error": ("auto",),
    "max_density": ("auto",),
    "probe_rows": ("auto",),
    "probe_every": ("auto",),
    "probe_drift": ("auto",),
    "published": ("auto",),
}
"""The modes that have a use for a field; elsewhere it must keep its default, so that nothing is silently ignored."""


@dataclass(frozen=True)
class PSAConfig:
    """Every choice of the method. Validated on construction; :meth:`replace` makes changed copies.

    Args:
        block_m, block_n: tokens per query block and per KV block (powers of two, at least 16).
        tile_n: KV rows a kernel handles at a time; must divide ``block_n``. Default ``min(32, block_n)``.
        mask_mode: how importance becomes levels: ``"topk"``, ``"thresholdbound"`` (the published modes, with
            ``mask_ratios``), ``"proportional"`` (with ``density`` or ``tau``) or ``"auto"``, which chooses exponent,
            keep_all, bias_cap and slope per head by probes. Default: topk with ``mask_ratios``, proportional with any
            of ``tau``, ``bias``, ``exponent`` and ``keep_all``, else auto.
        mask_ratios: level -> (lo, hi), cumulative bounds in [0, 1]; level 0 is skipped.
        density: mean of 1/level over block pairs, in (0, 1].
        exponent: in proportional mode, rows are kept in proportion to importance ** exponent.
        rank_exponent: in proportional mode, importance ** exponent is divided by rank ** rank_exponent, the rank among
            a query block's visible blocks that are not pinned. Cheap estimates get the order of a sharp head's blocks
            right, but not how far they are apart.
        keep_all: in proportional mode, never skip a block; ``False`` skips what would be coarser than one row.
        tau: fixed threshold of proportional mode; density then adapts to the input.
        share_heads: meet ``density`` over all heads of a layer instead of in each head.
        target_error: in auto mode, the relative error each head may have, instead of ``density``: the smallest density
            whose probed error meets it; heads that need more than ``max_density`` run dense.
        max_density: upper bound of what ``target_error`` may choose.
        probe_rows: query rows per head whose exact attention is computed in a call that probes; half as many more with
            ``target_error`` or ``share_heads``, where others choose than measure.
        probe_every, probe_drift: with a :class:`psa.ProbeState`, steps for which a choice is reused, and the relative
            change of the importance's concentration that ends it sooner.
        published: in auto mode, also try the published topk and thresholdbound, stretched to the density, on every
            head. Costs a sort of the importance in every call; benchmarks/quality.py found no head that gains.
        slope: add the first-order term of what averaging loses of the values, by torch operators. Default: True only in
            auto mode, where it is chosen per head.
        sort_keys: sort keys inside KV blocks so that pooled groups are tight (never when causal or with a key mask).
            Default: True only in auto mode.
        bias: mass correction of pooled rows: ``"count"`` (published), ``"variance"`` or ``"measured"`` (which torch
            operators compute, on a GPU too).
        bias_cap: upper bound of that correction, in nats. Default 1 (variance), 20 (measured).
        importance: ``"pooled"``, ``"sampled"`` or ``"antidiagonal"`` (the latter two by torch operators, on a GPU too).
        importance_rows, importance_cols: query rows and key rows averaged into one by pooled importance.
        importance_stride: stride of antidiagonal scoring.
        seed: of sampled importance and of semantic clustering.
        use_sim_mask, sim_thresholds: cap a block's level by the similarity of its neighbouring keys.
        use_rearrange, rearrange_method, tile_size: token order for a (T, H, W) grid. ``"auto"``, of auto mode only,
            probes Gilbert and hybrid order and gives every KV head the better one.
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
    rank_exponent: float = 0.0
    keep_all: bool = True
    tau: float | None = None
    share_heads: bool = False
    target_error: float | None = None
    max_density: float = 1.0
    probe_rows: int = 72
    probe_every: int = 10
    probe_drift: float = 0.25
    published: bool = False
    slope: bool | None = None
    sort_keys: bool | None = None
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
        """A changed copy. Asking for ``density`` or ``target_error`` switches to auto mode, for ``tau`` to proportional
        mode, unless told otherwise or there already. What belongs to a published mode stays behind, the similarity cap
        too: where nothing is dropped, it would overrule the density.

        Raises:
            ConfigError: for a density, error or tau of dense attention, which has none to choose.
        """
        asked = next((name for name in ("density", "target_error", "tau") if changes.get(name) is not None), None)
        if asked is not None and changes.get("type", self.type) == "dense":
            value = changes[asked]
            raise ConfigError(f"{asked}: {value!r} was asked of dense attention (such as preset 'baseline'); give one")
        for name, wanted in (("tau", "proportional"), ("target_error", "auto")):
            if name in changes and self.mask_mode != wanted:
                changes = {"mask_mode": wanted, **changes}
        fixed = {"bias", "exponent", "rank_exponent", "keep_all"} & changes.keys() or self.bias != "count"
        if fixed and self.mask_mode == "auto":
            changes = {"mask_mode": "proportional", **changes}
        if "density" in changes and self.mask_mode not in ("proportional", "auto"):
            changes = {"mask_mode": "proportional" if fixed else "auto", **changes}
        mode = changes.get("mask_mode", self.mask_mode)
        if mode != self.mask_mode:
            unused = {name: getattr(PSAConfig, name) for name, modes in USED_BY.items() if mode not in modes}
            unused |= {"rearrange_method": PSAConfig.rearrange_method} if self.rearrange_method == "auto" else {}
            if self.mask_mode in RANKED and mode not in RANKED:
                unused["use_sim_mask"] = False
            changes = {"slope": None, "sort_keys": None, **unused, **changes}
        if changes.get("tau") is not None or changes.get("target_error") is not None:
            changes = {"density": None, "share_heads": False, **changes}
        elif "density" in changes:
            changes = {"tau": None, "target_error": None, "max_density": 1.0, **changes}
        for name, follows in (("bias", "bias_cap"), ("block_n", "tile_n")):
            if name in changes:
                changes = {follows: None, **changes}
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
            choices = ("tau", "bias", "exponent", "rank_exponent", "keep_all")
            fixed = any(getattr(self, name) != getattr(PSAConfig, name) for name in choices)
            published = self.mask_ratios is not None and self.density is None
            mode = "topk" if published else "proportional" if fixed else "auto"
        if mode not in MASK_MODES:
            raise ConfigError(f"mask_mode: {mode!r} is unknown{nearest(mode, MASK_MODES)}")
        object.__setattr__(self, "mask_mode", mode)
        for name in ("slope", "sort_keys"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, mode == "auto")
        self._check_used(mode)
        if mode in RANKED:
            ratios = PUBLISHED_RATIOS if self.mask_ratios is None else self.mask_ratios
            object.__setattr__(self, "mask_ratios", check_ratios(ratios, self.block_n))
        elif self.density is None and self.tau is None and self.target_error is None:
            object.__setattr__(self, "density", DEFAULT_DENSITY)

    def _check_used(self, mode: str) -> None:
        """Every field that was given must have a use beside the others."""
        for name, modes in USED_BY.items():
            value = getattr(self, name)
            if mode not in modes and value != getattr(PSAConfig, name) and (name, value) != ("bias_cap", 0.0):
                decides = "chooses it per head; " if mode == "auto" and "proportional" in modes else ""
                valid = " or ".join(repr(mode) for mode in modes)
                raise ConfigError(f"{name}: {mode} mode {decides}has no use for {value!r}; it belongs to {valid}")
        if self.rearrange_method == "auto" and mode != "auto":
            raise ConfigError(f"rearrange_method: 'auto' is chosen by the probes of mask_mode 'auto', not {mode!r}")
        if self.tau is not None and (self.density is not None or self.share_heads):
            raise ConfigError("tau: a fixed tau excludes density and share_heads; give one")
        if self.bias == "count" and self.bias_cap not in (None, 0.0):
            raise ConfigError(f"bias_cap: bias 'count' has nothing to cap by {self.bias_cap!r}")
        if self.target_error is not None:
            if self.density is not None or self.share_heads:
                raise ConfigError("target_error: excludes density and share_heads; it sets each head's density itself")
            if finite("target_error", self.target_error, low=0.0) == 0:
                raise ConfigError("target_error: 0 is not positive; exact attention is type 'dense'")
        elif self.max_density != 1.0:
            raise ConfigError("max_density: bounds what target_error may choose; there is no target_error")

    def _check_choices(self) -> None:
        choices = {"bias": BIASES, "importance": IMPORTANCES, "type": ("psa", "dense")}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is unknown{nearest(getattr(self, name), valid)}")
        given, known = self.rearrange_method, {m.lower(): m for m in REARRANGE_METHODS}
        if (method := known.get(str(given).lower())) is None:
            raise ConfigError(f"rearrange_method: {given!r} is unknown{nearest(given, REARRANGE_METHODS)}")
        object.__setattr__(self, "rearrange_method", method)
        for name in ("keep_all", "share_heads", "use_sim_mask", "use_rearrange", "slope", "sort_keys", "published"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not true or false")
        if not isinstance(self.description, str):
            raise ConfigError(f"description: {self.description!r} is not text")

    def _check_numbers(self) -> None:
        if self.density is not None:
            check_density(self.density, self.max_level, self.keep_all)
        finite("exponent", self.exponent, low=0.0)
        finite("rank_exponent", self.rank_exponent, low=0.0)
        if self.tau is not None and finite("tau", self.tau, low=0.0) == 0:
            raise ConfigError("tau: 0 is not positive")
        if self.bias_cap is None:
            object.__setattr__(self, "bias_cap", DEFAULT_CAPS[self.bias])
        finite("bias_cap", self.bias_cap, low=0.0)
        limits = {"importance_rows": self.block_m, "importance_cols": self.block_n, "importance_stride": None}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not is_power_of_two(value) or (limit is not None and value > limit):
                raise ConfigError(f"{name}: {value!r} is not a power of two" + (f" up to {limit}" if limit else ""))
        smallest = min(self.block_m, self.block_n)
        if self.importance == "antidiagonal" and self.importance_stride > smallest:
            raise ConfigError(f"importance_stride: {self.importance_stride} is larger than a block ({smallest})")
        check_density(self.max_density, self.max_level, True)
        finite("probe_drift", self.probe_drift, low=0.0)
        for name in ("probe_rows", "probe_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**20:
                raise ConfigError(f"{name}: {value!r} is not a positive whole number")
        for name in ("seed", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise ConfigError(f"{name}: {value!r} is not a whole number from 0")
        object.__setattr__(self, "sim_thresholds", check_thresholds(self.sim_thresholds))
        object.__setattr__(self, "tile_size", check_tile(self.tile_size))

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
            given["sim_thresholds"] = {level_name(key): value for key, value in given["sim_thresholds"].items()}
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

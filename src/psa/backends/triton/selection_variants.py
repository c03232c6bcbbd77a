"""The selection kernels that we ship, as ahead-of-time compilation takes them (see :mod:`.variants`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .bias import bias_constants
from .budget import CHUNK, COUNT_CHUNK, NO_BIAS, NO_BIAS_CONSTANTS, SAMPLE, _solve_kernel, solve_options
from .importance import POOL_WARPS, WIDTHS, _importance_kernel, _pool_keys_kernel, tiling
from .schedule import CHUNK as LIST_CHUNK
from .schedule import LISTS, _schedule_kernel
from .score import level_exponent
from .select import _encode_kernel, _select_kernel, row_options
from .tune import padded
from .variants import ARCHITECTURES, FIXED_TYPES, Variant, describe, instruction_of

TYPES = FIXED_TYPES | {
    "mask_ptr": "*u8", "out_ptr": "*fp32", "sums_ptr": "*fp32", "peaks_ptr": "*fp32", "keys_ptr": "*fp32",
    "list_ptr": "*fp32", "list_caps_ptr": "*u8", "log_tau_ptr": "*fp32", "settings_ptr": "*fp32",
    "importance_ptr": "*fp32", "source_ptr": "*fp32", "wanted_ptr": "*u8", "exponent": "fp32",
    "rank_exponent": "fp32", "ranked": "fp32", "density": "fp32", "fixed_log_tau": "fp32",
}  # fmt: skip
NEEDS = {
    "mask_ptr": "MASKED", "first_real_ptr": "MASKED", "settings_ptr": "PER_HEAD", "caps_ptr": "CAPPED",
    "list_caps_ptr": "CAPPED", "log_tau_ptr": "SOLVED", "wanted_ptr": "CHOOSY",
}  # fmt: skip
"""Pointers that are there only with an option."""
BIAS_POINTERS = {name for name in NO_BIAS if name.endswith("_ptr")}
TOPK = {"EXPONENTS": (0, 1, 2, 3), "BOUNDS": (0.1, 0.15, 0.15, 0.35), "INTERVALS": 4, "MODE": "topk"}
MODES = {
    "proportional": {"EXPONENTS": (), "BOUNDS": (), "INTERVALS": 0, "MODE": "proportional"},
    "topk": TOPK,
    "thresholdbound": TOPK | {"MODE": "thresholdbound"},
}


@dataclass(frozen=True)
class Setting:
    """A call that we ship for.

    Attributes:
        width: KV blocks of a row, rounded up to a power of two.
        extras: also with the variance bias, and with ``rank_exponent``.
    """

    label: str
    dim: int = 128
    block_n: int = 64
    dtype: str = "bf16"
    group: int = 1
    causal: bool = False
    masked: bool = False
    capped: bool = False
    width: int = 2048
    extras: bool = False


SETTINGS = (
    Setting("wan"),
    Setting("wan-128", block_n=128, capped=True, width=1024),
    Setting("wan-32", block_n=32, width=4096),
    Setting("cogvideo", dim=64, width=512),
    Setting("qwen", block_n=128, group=7, causal=True, masked=True, extras=True),
    Setting("wide", dim=256, causal=True, width=1024, extras=True),
    Setting("single", dim=64, dtype="fp32", width=4096),
)


def selection_variants(
    archs: tuple[int, ...] = ARCHITECTURES, settings: tuple[Setting, ...] = SETTINGS
) -> Iterator[Variant]:
    """Every selection kernel for every setting and architecture."""
    for arch in archs:
        for setting in settings:
            yield from _kernels(setting, arch)


def _kernels(setting: Setting, arch: int) -> Iterator[Variant]:
    rules = {"BLOCK_M": 128, "BLOCK_N": setting.block_n, "CAUSAL": setting.causal}
    pins = {"MASKED": setting.masked, "TEXT_FIRST": False}
    budget = {"GROUPS": setting.group, "CAPPED": setting.capped, "COARSEST": level_exponent(setting.block_n)}
    shared, per_head = {"PER_HEAD": False}, {"PER_HEAD": True}
    row, unranked = {"WIDTH": setting.width}, {"RANKED": False}
    yield from _logits(setting, arch, rules | pins)
    pool = {"head_dim": setting.dim, "POOL": 8, "ROWS": 64, "BLOCK_D": padded(setting.dim), "MASKED": setting.masked}
    options = {"num_warps": POOL_WARPS}
    yield _variant("_pool_keys_kernel", _pool_keys_kernel, setting, arch, pool, options)
    sizes = budget | rules | shared | {"SAMPLE": SAMPLE, "CHUNK": CHUNK, "COUNT_CHUNK": COUNT_CHUNK, "SHARED": False}
    solve = sizes | NO_BIAS_CONSTANTS | {"VARIANCE": False}
    yield _variant("_solve_kernel", _solve_kernel, setting, arch, solve, solve_options(False), absent=BIAS_POINTERS)
    options = row_options(setting.width)
    if setting.extras:
        solve = sizes | bias_constants(setting.dim, setting.block_n, setting.group, sums=True) | {"VARIANCE": True}
        name, absent = "_solve_kernel-variance", {"cap_ptr"}
        yield _variant(name, _solve_kernel, setting, arch, solve, solve_options(True), absent=absent)
        constants = rules | pins | row | shared | {"RANKED": True}
        yield _variant("_encode_kernel-ranked", _encode_kernel, setting, arch, constants, options)
    yield _variant("_encode_kernel", _encode_kernel, setting, arch, rules | pins | row | per_head | unranked, options)
    for mode, choices in MODES.items():
        constants = rules | pins | budget | row | shared | choices | {"SOLVED": mode == "proportional"}
        yield _variant(f"_select_kernel-{mode}", _select_kernel, setting, arch, constants, options)
    lists = {"COUNT": budget["COARSEST"] + 1, "WIDTH": 8, "LISTS": LISTS, "CHUNK": LIST_CHUNK}
    yield _variant("_schedule_kernel", _schedule_kernel, setting, arch, lists, {"num_warps": 4})


def _logits(setting: Setting, arch: int, rules: dict[str, Any]) -> Iterator[Variant]:
    """Pooled importance: as it is, as keys, with the queries' power, and with each block's place in its row."""
    sizes = (128, setting.block_n, 16, 8, setting.dim, setting.dtype == "fp32")
    rows, keys, *_ = tiling(*sizes, extras=False)
    constants = rules | {
        "head_dim": setting.dim, "HEADS": 12, "GROUPS": setting.group, "POOL": 16, "COLS": 8, "ROWS": rows,
        "KEYS": keys, "WIDTH": WIDTHS[False], "BLOCK_D": padded(setting.dim), "POWER": False, "RANKED": 0,
        "ENCODE": True, "CHOOSY": False,
    }  # fmt: skip
    instruction = instruction_of(arch) if setting.dtype != "fp32" else "HMMA|HGMMA|UTC\\w*MMA"
    choices = {"": {"ENCODE": False}, "-keys": {}}
    if setting.extras:
        choices |= {"-power": {"POWER": True}, "-ranked": {"RANKED": setting.width, "WIDTH": WIDTHS[True]}}
    for suffix, changes in choices.items():
        name = f"_importance_kernel{suffix}"
        _, _, warps, stages = tiling(*sizes, extras=suffix in ("-power", "-ranked"))
        options = {"num_warps": warps, "num_stages": stages}
        yield _variant(
            name, _importance_kernel, setting, arch, constants | changes, options, instruction, True,
            set() if "POWER" in changes else {"power_ptr"},
        )  # fmt: skip


def _variant(
    name: str, kernel: Any, setting: Setting, arch: int, constants: dict[str, Any], options: dict[str, int],
    instruction: str = "", copies: bool = False, absent: set[str] | None = None,
) -> Variant:  # fmt: skip
    """``absent``: pointers that the call does not use, besides those that its constants rule out."""
    absent = set() if absent is None else set(absent)
    absent |= {pointer for pointer, constant in NEEDS.items() if constants.get(constant) is False}
    described = describe(kernel, constants, setting.dtype, absent, TYPES)
    return Variant(f"{name}/{setting.label}/sm_{arch}", arch, kernel, *described, options, instruction, copies)

"""The selection kernels that we ship, as ahead-of-time compilation takes them (see :mod:`.variants`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .budget import CHUNK, COUNT_CHUNK, SAMPLE, SOLVE_WARPS, _solve_kernel
from .importance import POOL_WARPS, WIDTH, _importance_kernel, _pool_keys_kernel, tiling
from .schedule import CHUNK as LIST_CHUNK
from .schedule import LISTS, _schedule_kernel
from .score import level_exponent
from .select import _encode_kernel, _select_kernel, row_options
from .tune import padded
from .variants import ARCHITECTURES, POINTERS, Variant, _instruction

TYPES = {
    "mask_ptr": "*u8", "first_real_ptr": "*i32", "out_ptr": "*fp32", "sums_ptr": "*fp32", "peaks_ptr": "*fp32",
    "keys_ptr": "*fp32", "caps_ptr": "*u8", "list_ptr": "*fp32", "log_tau_ptr": "*fp32", "settings_ptr": "*fp32",
    "importance_ptr": "*fp32", "wanted_ptr": "*u8",
    "source_ptr": "*fp32", "levels_ptr": "*u8", "blocks_ptr": "*i32", "ends_ptr": "*i32", "scale_log2": "fp32",
    "exponent": "fp32", "density": "fp32", "fixed_log_tau": "fp32",
}  # fmt: skip
TOPK = {"EXPONENTS": (0, 1, 2, 3), "BOUNDS": (0.1, 0.15, 0.15, 0.35), "INTERVALS": 4, "MODE": "topk"}
MODES = {
    "proportional": {"EXPONENTS": (), "BOUNDS": (), "INTERVALS": 0, "MODE": "proportional"},
    "topk": TOPK,
    "thresholdbound": TOPK | {"MODE": "thresholdbound"},
}


@dataclass(frozen=True)
class Setting:
    """A call that we ship for. ``width``: KV blocks of a row, rounded up to a power of two."""

    label: str
    dim: int = 128
    block_n: int = 64
    dtype: str = "bf16"
    group: int = 1
    causal: bool = False
    masked: bool = False
    capped: bool = False
    width: int = 2048


SETTINGS = (
    Setting("wan"),
    Setting("wan-128", block_n=128, capped=True, width=1024),
    Setting("wan-32", block_n=32, width=4096),
    Setting("cogvideo", dim=64, width=512),
    Setting("qwen", block_n=128, group=7, causal=True, masked=True),
    Setting("wide", dim=256, causal=True, width=1024),
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
    budget["PER_HEAD"] = False
    rows, keys, warps, stages = tiling(128, setting.block_n, 16, 8, setting.dim, setting.dtype == "fp32")
    logits = rules | pins | {
        "head_dim": setting.dim, "HEADS": 12, "GROUPS": setting.group, "POOL": 16, "COLS": 8, "ROWS": rows,
        "KEYS": keys, "WIDTH": WIDTH, "BLOCK_D": padded(setting.dim), "CHOOSY": False,
    }  # fmt: skip
    for encode in (True, False):
        instruction = _instruction(arch) if setting.dtype != "fp32" else "HMMA|HGMMA|UTC\\w*MMA"
        name = f"_importance_kernel{'-keys' if encode else ''}"
        options = {"num_warps": warps, "num_stages": stages}
        yield _variant(name, _importance_kernel, setting, arch, logits | {"ENCODE": encode}, options, instruction, True)
    pool = {"head_dim": setting.dim, "POOL": 8, "ROWS": 64, "BLOCK_D": padded(setting.dim), "MASKED": setting.masked}
    options = {"num_warps": POOL_WARPS}
    yield _variant("_pool_keys_kernel", _pool_keys_kernel, setting, arch, pool, options)
    sizes = {"SAMPLE": SAMPLE, "CHUNK": CHUNK, "COUNT_CHUNK": COUNT_CHUNK, "SHARED": False}
    options = {"num_warps": SOLVE_WARPS}
    yield _variant("_solve_kernel", _solve_kernel, setting, arch, rules | budget | sizes, options)
    options = row_options(setting.width)
    row = {"WIDTH": setting.width}
    yield _variant("_encode_kernel", _encode_kernel, setting, arch, rules | pins | row | {"PER_HEAD": True}, options)
    for mode, choices in MODES.items():
        constants = rules | pins | budget | row | choices | {"SOLVED": mode == "proportional"}
        yield _variant(f"_select_kernel-{mode}", _select_kernel, setting, arch, constants, options)
    lists = {"COUNT": budget["COARSEST"] + 1, "WIDTH": 8, "LISTS": LISTS, "CHUNK": LIST_CHUNK}
    yield _variant("_schedule_kernel", _schedule_kernel, setting, arch, lists, {"num_warps": 4})


def _variant(
    name: str, kernel: Any, setting: Setting, arch: int, constants: dict[str, Any], options: dict[str, int],
    instruction: str = "", copies: bool = False,
) -> Variant:  # fmt: skip
    signature, constexprs, attrs = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[argument] = constants[argument]
        elif argument.endswith("strides"):
            signature[argument] = ("i32", "i32", "i32", "constexpr")
            constexprs[position, 3] = 1
            attrs |= {(position, place): aligned for place in range(3)}
        elif argument.endswith("_ptr"):
            signature[argument] = TYPES.get(argument, POINTERS[setting.dtype])
            attrs[(position,)] = aligned
        else:
            signature[argument] = TYPES.get(argument, "i32")
    return Variant(
        f"{name}/{setting.label}/sm_{arch}", arch, kernel, signature, constexprs, attrs, options, instruction, copies
    )

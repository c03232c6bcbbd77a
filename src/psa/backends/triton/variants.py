"""What we ship, as ahead-of-time compilation takes it: kernels, signatures, constants and options per architecture."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .attend import _psa_fwd_kernel
from .bias import BIAS_OPTIONS, _bias_kernel, bias_constants
from .gradients import ROW_CONSTANTS, _psa_bwd_delta_kernel, _psa_bwd_dq_kernel
from .pool import PARTS, SCAN, _pool_kernel, pool_columns, pool_warps
from .rows import _psa_bwd_dkv_kernel
from .transposed import CHUNK, _readers_kernel
from .tune import LONG_TILES, Launch, default_launch, family, has_extras, padded

ARCHITECTURES = (80, 90, 100, 120)
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
FIXED_TYPES = {
    "mask_ptr": "*i1", "power_ptr": "*fp32", "cap_ptr": "*fp32", "counts_ptr": "*fp32", "bias_ptr": "*fp32",
    "caps_ptr": "*u8", "first_real_ptr": "*i32", "power_out_ptr": "*fp32", "cap_out_ptr": "*fp32",
    "blocks_ptr": "*i32", "ends_ptr": "*i32", "pair_ptr": "*fp16", "lse_ptr": "*fp32", "log2_lse_ptr": "*fp32",
    "delta_ptr": "*fp32", "grad_lse_ptr": "*fp32", "levels_ptr": "*u8", "lists_ptr": "*i16", "sizes_ptr": "*i32",
    "pooled_ptr": "*fp32", "scale_log2": "fp32", "half_scale_squared": "fp32", "share": "fp32", "limit": "fp32",
    "thresholds": ("fp32", "fp32", "fp32"), "mask_strides": ("i32", 1), "list_strides": ("i32", "i32"),
    "level_strides": ("i32", "i32"), "bias_strides": ("i32", "i32"), "pair_strides": ("i32", "i32"),
    "lse_strides": ("i32", "i32", 1), "power_strides": ("i32", "i32"), "cap_strides": ("i32", "i32"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One compilation: ``ASTSource(kernel, signature, constexprs, attrs)`` for ``sm_{arch}`` with ``options``.

    Attributes:
        attrs: argument positions that are multiples of 16, as launches with contiguous tensors have them.
        instruction: regular expression of the tensor-core instruction that its machine code must hold; empty: none.
        copies: whether it must hold asynchronous copies.
    """

    name: str
    arch: int
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, int]
    instruction: str = ""
    copies: bool = True


@dataclass(frozen=True)
class Shape:
    """A call that we ship for: what fixes the constants."""

    dim: int = 128
    block_m: int = 128
    block_n: int = 64
    dtype: str = "bf16"
    group: int = 1
    causal: bool = False
    masked: bool = False
    row_bias: bool = False
    pair_bias: bool = False
    long: bool = False
    label: str = field(default="", compare=False)

    def constants(self) -> dict[str, Any]:
        return {
            "GROUP": self.group, "D": self.dim, "D_PAD": padded(self.dim), "block_m": self.block_m,
            "block_n": self.block_n, "LOG2_BLOCK": self.block_n.bit_length() - 1,
            "LEVELS": min(self.block_n, 128).bit_length(), "CAUSAL": self.causal, "HAS_MASK": self.masked,
            "ROW_BIAS": self.row_bias, "PAIR_BIAS": self.pair_bias,
            "PRECISION": "tf32x3" if self.dtype == "fp32" else "tf32",
        }  # fmt: skip


SHAPES = (
    Shape(label="wan"),
    Shape(block_n=128, label="wan-128"),
    Shape(block_n=32, label="wan-32"),
    Shape(dim=64, label="cogvideo"),
    Shape(dim=64, block_n=128, label="cogvideo-128"),
    Shape(row_bias=True, label="tail-or-variance"),
    Shape(block_n=128, group=7, causal=True, label="qwen"),
    Shape(block_n=128, group=7, causal=True, masked=True, row_bias=True, label="qwen-padded"),
    Shape(row_bias=True, pair_bias=True, causal=True, label="every-option"),
    Shape(dim=64, row_bias=True, pair_bias=True, causal=True, label="every-option-64"),
    Shape(dim=256, label="wide"),
    Shape(dim=256, row_bias=True, pair_bias=True, causal=True, label="every-option-wide"),
    Shape(dim=64, dtype="fp16", label="half"),
    Shape(dim=64, dtype="fp32", label="single"),
    Shape(dtype="fp32", label="single-128"),
)


def describe(
    kernel: Any, constants: dict[str, Any], dtype: str, absent: set[str], types: dict[str, Any] = FIXED_TYPES
) -> tuple[dict, dict, dict]:
    """Signature, constants and alignment of a launch with contiguous channels and 16-byte aligned tensors."""
    signature, constexprs, attrs = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for position, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constexprs[name] = constants.get(name)
            continue
        kind = types.get(name)
        if kind is None and name.endswith("strides"):
            kind = ("i32", "i32", "i32", 1)
        elif kind is None:
            kind = POINTERS[dtype] if name.endswith("_ptr") else "i32"
        if isinstance(kind, tuple):
            signature[name] = tuple("constexpr" if part == 1 else part for part in kind)
            for place, part in enumerate(kind):
                if part == 1:
                    constexprs[position, place] = 1
                elif len(kind) == 4:
                    attrs[position, place] = aligned
            continue
        signature[name] = kind
        if kind.startswith("*"):
            attrs[(position,)] = aligned
    return signature, constexprs, attrs


def _variant(
    kernel: Any, shape: Shape, arch: int, constants: dict[str, Any], options: dict[str, int],
    instruction: str, **checks: bool,
) -> Variant:  # fmt: skip
    """One variant of a kernel; arguments that the shape does not use are absent."""
    absent = set() if shape.pair_bias else {"pair_ptr"}
    if not shape.masked:
        absent.add("mask_ptr")
    if not constants.get("SIMILARITY"):
        absent.add("caps_ptr")
    if not constants.get("FIRST_REAL"):
        absent.add("first_real_ptr")
    if "SUMS" in constants:
        absent |= {"power_out_ptr", "cap_out_ptr"}
    described = describe(kernel, constants, shape.dtype, absent)
    launch = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    pooled = {True: "-pooled", False: "-tokens"}.get(constants.get("POOLED"), "")
    name = f"{kernel.__name__}{pooled}/{shape.label}/sm_{arch}"
    return Variant(name, arch, kernel, *described, launch, instruction, **checks)


def instruction_of(arch: int, narrow: bool = False) -> str:
    """In SASS: HMMA is mma.sync, HGMMA wgmma, UTC*MMA tcgen05. The latter two need tiles of 64 rows."""
    if narrow:
        return "HMMA"
    return {9: "HGMMA", 10: r"UTC\w*MMA"}.get(arch // 10, "HMMA")


def _launch(table: str, shape: Shape, arch: int) -> Launch:
    itemsize = 4 if shape.dtype == "fp32" else 2
    extras = has_extras(table, shape.constants())
    return default_launch(table, shape.dim, itemsize, arch, shape.block_m, extras, shape.long)


def _only(kernel: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def shipped_variants(archs: tuple[int, ...] = ARCHITECTURES, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[Variant]:
    """Every kernel of attention and its gradients for every shape and architecture."""
    for arch in archs:
        for shape in shapes:
            yield _attention(_psa_fwd_kernel, "forward", shape, arch)
            yield _attention(_psa_bwd_dq_kernel, "grad_queries", shape, arch)
            launch = _launch("grad_rows", shape, arch).options()
            narrow = launch["BLOCK_N"] < 64
            constants = {name: shape.constants()[name] for name in ROW_CONSTANTS}
            for pooled in (True, False):
                values = _only(_psa_bwd_dkv_kernel, constants | launch) | {"POOLED": pooled}
                yield _variant(_psa_bwd_dkv_kernel, shape, arch, values, launch, instruction_of(arch, narrow))
            yield from _helpers(shape, arch)
        for shape in shapes:
            single_or_busy = shape.dtype == "fp32" or shape.causal or shape.pair_bias
            if ("forward", family(arch), padded(shape.dim)) in LONG_TILES and not single_or_busy:
                long = replace(shape, long=True, label=f"{shape.label}-long")
                yield _attention(_psa_fwd_kernel, "forward", long, arch)


def _attention(kernel: Any, table: str, shape: Shape, arch: int) -> Variant:
    launch = _launch(table, shape, arch)
    values = _only(kernel, shape.constants() | launch.options())
    if table == "forward":
        values["ROW_BIAS"] |= launch.reads_bias
    return _variant(kernel, shape, arch, values, launch.options(), instruction_of(arch, launch.BLOCK_M < 64))


def _helpers(shape: Shape, arch: int) -> Iterator[Variant]:
    """The kernels without matrix products."""
    plain = {"copies": False}
    tokens, wide = min(shape.block_n, 128), padded(shape.dim)
    pool = _only(_pool_kernel, shape.constants()) | {
        "COLS": pool_columns(shape.dim), "TOKENS": tokens, "SIMILARITY": shape.block_n == 128, "SCAN": SCAN,
        "FIRST_REAL": shape.masked and shape.causal, "PARTS": PARTS,
    }  # fmt: skip
    yield _variant(_pool_kernel, shape, arch, pool, {"num_warps": pool_warps(tokens, pool["COLS"])}, "", **plain)
    if shape.row_bias:
        bias = bias_constants(shape.dim, shape.block_n, shape.group, sums=False)
        yield _variant(_bias_kernel, shape, arch, bias, BIAS_OPTIONS, "", **plain)
    delta = {"HAS_GRAD_LSE": True, "D": shape.dim, "D_PAD": wide, "BLOCK_M": 64}
    yield _variant(_psa_bwd_delta_kernel, shape, arch, delta, {"num_warps": 4}, "", **plain)
    lists = _only(_readers_kernel, shape.constants()) | {"TILE": 64, "CHUNK": CHUNK}
    yield _variant(_readers_kernel, shape, arch, lists, {"num_warps": 4}, "", **plain)

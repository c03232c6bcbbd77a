"""Which tile shape, warps and pipeline depth each kernel uses: a table (:mod:`.autotune` can search for better)."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import interpreted


@dataclass(frozen=True)
class Launch:
    """Tile and launch options of one kernel.

    Attributes:
        BLOCK_M, BLOCK_N: query rows and pyramid rows per tile.
        WHOLE_N: rows per tile of whole level-1 blocks, which need fewer registers.
    """

    BLOCK_M: int
    BLOCK_N: int
    WHOLE_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return asdict(self)

    @property
    def reads_bias(self) -> bool:
        """Whether a row's bias is read even where it is its level alone: long tiles have no registers to make it in."""
        return self.BLOCK_N > 64


def padded(dim: int) -> int:
    """Head dimension as tiles have it: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


WIDTHS = (64, 128, 256)
"""Head dimensions, padded, that tables have a launch for."""


def by_width(*launches: tuple[int, int, int, int, int]) -> dict[int, Launch]:
    return {width: Launch(*launch) for width, launch in zip(WIDTHS, launches, strict=True)}


TABLES = {
    "forward": {
        "hopper": by_width((128, 64, 128, 8, 3), (128, 64, 128, 8, 2), (64, 32, 32, 8, 2)),
        "blackwell": by_width((128, 64, 128, 8, 2), (128, 64, 64, 8, 3), (64, 32, 32, 8, 2)),
        "mma": by_width((128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (64, 32, 32, 8, 2)),
        "float32": by_width((64, 32, 32, 8, 2), (32, 32, 32, 8, 2), (16, 16, 16, 8, 1)),
    },
    "grad_queries": {
        "hopper": by_width((128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (64, 32, 32, 8, 2)),
        "blackwell": by_width((128, 32, 32, 8, 2), (128, 64, 64, 8, 2), (64, 32, 32, 8, 2)),
        "mma": by_width((64, 32, 32, 8, 2), (64, 32, 64, 4, 2), (32, 32, 32, 4, 2)),
        "float32": by_width((16, 32, 32, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 8, 1)),
    },
    "grad_rows": {
        "hopper": by_width((64, 64, 64, 8, 2), (64, 64, 64, 8, 2), (32, 32, 32, 8, 2)),
        "blackwell": by_width((64, 64, 64, 8, 2), (64, 64, 64, 8, 2), (32, 32, 32, 8, 2)),
        "mma": by_width((32, 64, 64, 8, 2), (32, 64, 64, 8, 2), (32, 32, 32, 8, 2)),
        "float32": by_width((16, 32, 32, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 8, 1)),
    },
}
"""Kernel, matrix instructions of the GPU (:func:`family`) or float32 inputs, head dimension."""
EXTRAS = {
    ("forward", "mma", 64): Launch(64, 64, 64, 8, 2),
    ("forward", "mma", 128): Launch(64, 64, 64, 8, 2),
    ("grad_rows", "hopper", 128): Launch(32, 64, 64, 8, 2),
    ("grad_rows", "blackwell", 128): Launch(32, 64, 64, 8, 2),
    ("grad_rows", "mma", 64): Launch(32, 32, 32, 4, 2),
    ("grad_rows", "mma", 128): Launch(16, 64, 64, 8, 2),
}
"""Instead of the above where options take the registers that it leaves free (see :func:`has_extras`)."""
LONG = 16384
"""Keys from which these serve, where no causal mask or pair bias takes the registers: a longer tile takes fewer
instructions per row, but leaves more of each level's last one empty."""
LONG_TILES = {
    ("forward", "hopper", 64): Launch(128, 128, 128, 8, 3),
    ("forward", "hopper", 128): Launch(128, 128, 128, 8, 3),
}


def family(capability: int) -> str:
    """Which matrix instructions a GPU has: "mma" (8.x, 12.x), "hopper" (9.0: wgmma) or "blackwell" (10.x: tcgen05)."""
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(capability // 10, "mma")


def has_extras(kernel: str, constants: dict[str, Any]) -> bool:
    """Whether a call has options that take registers: causal masks, biases, for ``grad_rows`` several heads too."""
    if kernel == "grad_rows":
        return constants["CAUSAL"] or constants["GROUP"] > 1
    return constants["CAUSAL"] or constants["ROW_BIAS"] or constants["PAIR_BIAS"]


@lru_cache
def default_launch(
    kernel: str, dim: int, itemsize: int, capability: int, block_m: int, extras: bool, long: bool = False
) -> Launch:
    """The table, from registers, shared memory and spills of the compiled kernels.

    Args:
        kernel: "forward", "grad_queries" or "grad_rows".
        dim: head dimension. extras: what :func:`has_extras` says. long: whether LONG_TILES may serve.
    """
    wide, kind = max(64, padded(dim)), family(capability)
    if itemsize == 4:
        launch = TABLES[kernel]["float32"][wide]
    else:
        launch = TABLES[kernel][kind][wide]
        launch = EXTRAS.get((kernel, kind, wide), launch) if extras else launch
        launch = LONG_TILES.get((kernel, kind, wide), launch) if long else launch
    return replace(launch, BLOCK_M=min(launch.BLOCK_M, block_m & -block_m))


@lru_cache
def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; that too where no GPU is present (the interpreter)."""
    if device.type != "cuda" or torch.version.hip:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_for(kernel: str, q: Tensor, length_k: int, block_m: int, constants: dict[str, Any]) -> Launch:
    """The launch of a kernel for a call on the device of ``q``; interpreted, always that of half precision.

    Args:
        constants: constexpr arguments of the kernels (:meth:`.call.Call.constants`).
    """
    itemsize = 2 if interpreted() else q.element_size()
    long = length_k >= LONG and not (constants["CAUSAL"] or constants["PAIR_BIAS"])
    extras = has_extras(kernel, constants)
    return default_launch(kernel, q.shape[-1], itemsize, capability(q.device), block_m, extras, long)

"""A driver for Triton whose GPU is this processor: kernels are compiled for a real GPU, and their PTX is executed."""

import ctypes
import functools
import hashlib
import os
import platform
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from psa.backends.native import cache_directory

from . import ptx

SHARED = {80: 163, 90: 227, 120: 99}
"""KiB of shared memory that one block may use, by architecture."""
TIMINGS = ("early", "late", "mixed")
"""At once, when it is waited for, or either by chance."""
INTEGERS = ("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64")


@functools.cache
def machine() -> ctypes.CDLL:
    """The C program, compiled when first asked for."""
    text = b"".join(sorted(path.read_bytes() for path in ptx.HERE.glob("*.[ch]")))
    name = hashlib.sha256(text + platform.node().encode()).hexdigest()[:16]
    library = cache_directory() / f"emulator-{name}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", made, ptx.HERE / "machine.c", "-lm"], check=True)
        made.rename(library)
    return ctypes.CDLL(str(library))


class MachineError(RuntimeError):
    """What a kernel did that a GPU would not have survived, with its line of PTX."""


class Driver(DriverBase):
    """What Triton asks of a GPU.

    Attributes:
        timing: when asynchronous work happens: one of ``TIMINGS``.
        seed: of the order in which blocks and warps take turns.
        edit: changes the PTX before it is read, for tests of the machine itself.
        counts: instructions of warps that were executed, by kernel and name.
    """

    def __init__(self, arch: int, timing: str, seed: int):
        self.arch, self.timing, self.seed = arch, TIMINGS.index(timing), seed
        self.counts: dict[str, Counter] = {}
        self.utils = SimpleNamespace(
            load_binary=self.load, unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED[arch] << 10, "multiprocessor_count": 132, "warpSize": 32,
            },
        )  # fmt: skip
        self.launcher_cls = functools.partial(Launcher, self)
        self.edit: Callable[[str], str] = str
        self.waiting = ""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        return triton.testing.do_bench

    def about_to_load(self, module, function, name, metadata_group, hash) -> None:
        """Called before a kernel is loaded: where its PTX is."""
        self.waiting = next(path for file, path in metadata_group.items() if file.endswith(".ptx"))

    def load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        program = ptx.read(self.edit(Path(self.waiting).read_text()))
        return None, program, 0, 0, 1024


def flat(signature: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Type and value of everything that a launch passes."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def encoded(kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    if kind in INTEGERS:
        return int(value)
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    raise NotImplementedError(kind)


class Launcher:
    """Runs one compiled kernel."""

    def __init__(self, driver: Driver, source: Any, metadata: Any):
        self.driver, self.metadata = driver, metadata
        self.signature = tuple(source.signature.values())

    def __call__(self, x, y, z, stream, program, packed, launch_metadata, enter, leave, *args) -> None:
        values = list(flat(self.signature, args))
        tensors = [value for kind, value in values if kind.startswith("*") and value is not None]
        stores = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        ranges = np.array([(at, at + store.nbytes()) for at, store in stores.items()], np.uint64).reshape(-1)
        parameters = [encoded(*pair) for pair in values]
        parameters += [0] * (len(program.parameters) - len(parameters))
        initial = np.ascontiguousarray(program.initial(parameters, (x, y, z)))
        places = np.array([program.registers[name] for name in ptx.SPECIAL], np.int32)
        counts = np.zeros(len(program.code), np.uint64)
        message = ctypes.create_string_buffer(512)
        grid = np.array((x, y, z), np.int32)
        self.driver.seed += 1
        failed = machine().execute(
            *(pointer(array) for array in (program.code, program.operands, initial)), len(initial), pointer(places),
            pointer(grid), self.metadata.num_warps, self.metadata.shared, pointer(ranges), len(ranges) // 2,
            self.driver.timing, self.driver.seed, pointer(counts), message,
        )  # fmt: skip
        if failed:
            raise MachineError(f"{program.name}: {message.value.decode()}")
        names = list(ptx.kinds())
        found = self.driver.counts.setdefault(program.name, Counter())
        for row, times in zip(program.code, counts.tolist(), strict=True):
            found[names[row[0]]] += times


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

"""A GPU without a GPU: Triton compiles kernels for it as for the real one, and a small machine executes their PTX.

Triton's interpreter runs what the kernels say; this runs what the compiler made of it, with tensor-core instructions,
asynchronous copies, shared memory, barriers and bfloat16. ``ptx`` reads the text, ``machine.c`` executes it, ``driver``
stands where CUDA's would.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import triton
from triton import knobs
from triton.compiler.compiler import max_shared_mem

from psa.backends import triton as backend
from psa.backends.triton import tune

from .driver import Driver, MachineError

__all__ = ["Driver", "MachineError", "emulated", "reasons"]


def reasons() -> list[str]:
    """Why nothing can be emulated here; empty where it can."""
    found = ["on any machine interpreted kernels cannot be compiled: unset TRITON_INTERPRET"] * backend.interpreted()
    if shutil.which("cc") is None:
        found.append("the machine is a C program, with or without a GPU, and there is no C compiler")
    return found


@contextmanager
def emulated(arch: int, timing: str = "mixed", seed: int = 0) -> Iterator[Driver]:
    """The kernels run on tensors of the CPU as a GPU of this architecture would run them.

    Args:
        arch: 80 for Ampere, 90 for Hopper, 120 for Blackwell without tcgen05.
        timing, seed: as :class:`Driver` takes them.
    """
    if why := reasons():
        raise RuntimeError("; ".join(why))
    driver, config = Driver(arch, timing, seed), triton.runtime.driver
    with ExitStack() as stack:
        for target, name, value in (
            (config, "_active" if hasattr(config, "_active") else "active", driver),
            (knobs.runtime, "kernel_load_start_hook", driver.about_to_load),
            (tune, "capability", lambda device: arch),
            (backend, "_tensor_reasons", lambda q: []),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        _forget()
        stack.callback(_forget)
        yield driver


def _forget() -> None:
    """What is loaded, and what is known of the device, belongs to one driver."""
    max_shared_mem.cache_clear()
    for path in Path(str(backend.__file__)).parent.glob("*.py"):
        module = backend if path.stem == "__init__" else import_module(f"{backend.__name__}.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                value.device_caches.clear()

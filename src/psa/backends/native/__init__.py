"""The compiled engine of the `torch` backend: a few hundred lines of C, built on first use with the machine's compiler.

`library()` compiles `psa.c` once per (source, flags, compiler, CPU) into the user's cache directory and loads it with
ctypes; `unavailable_reasons()` says why that is not possible. Nothing happens at import. `PSA_NATIVE=0` turns the
engine off, `PSA_NATIVE_CFLAGS` adds compiler flags, `CC` names the compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from psa.errors import BackendError

SOURCES = ("psa.c", "backward.h", "rows.h", "pyramid.h", "args.h", "tiles.h")
# Not -ffast-math: masked scores are -inf, and exp2 relies on the order of its additions.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-w")
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler accepts
COMPILE_SECONDS = 120
SETTINGS = ("CC", "PATH", "HOME", "XDG_CACHE_HOME", "PSA_NATIVE_CFLAGS")


def unavailable_reasons() -> list[str]:
    """[] when the engine is (or can be) compiled here; may compile on the first call."""
    if os.environ.get("PSA_NATIVE", "1") == "0":
        return ["the native engine is turned off by PSA_NATIVE=0"]
    try:
        library()
    except BackendError as error:
        return [str(error)]
    return []


def library() -> ctypes.CDLL:
    """The loaded library with `psa_forward` and `psa_backward`.

    Raises:
        BackendError: with the reason when it cannot be built here. The outcome is remembered.
    """
    outcome = _outcome(tuple(os.environ.get(name) for name in SETTINGS))
    if isinstance(outcome, BackendError):
        raise outcome
    return outcome


@functools.cache
def _outcome(_settings: tuple[str | None, ...]) -> "ctypes.CDLL | BackendError":
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return BackendError("the native engine needs a C compiler: found none of $CC, cc, gcc, clang")
    try:
        return _load(_compiled(os.environ.get("PSA_NATIVE_CFLAGS", "").split(), compiler, cache_directory()))
    except BackendError as error:
        return error
    except (OSError, subprocess.SubprocessError) as error:
        return BackendError(f"the native engine cannot be built: {error}")


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/psa or ~/.cache/psa; where that cannot be written, a private temporary directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    wanted = (Path(base) if base else Path("~/.cache").expanduser()) / "psa"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        pass
    private = Path(tempfile.gettempdir()) / f"psa-{os.getuid() if hasattr(os, 'getuid') else 0}"
    private.mkdir(mode=0o700, exist_ok=True)
    return private


def _compiled(cflags: list[str], compiler: str, cache: Path) -> Path:
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [" ".join((*FLAGS, *cflags)).encode(), compiler.encode(), version, _cpu().encode()]
    target = cache / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if target.exists():
        return target
    # Built beside its final name and renamed: processes that compile at the same time each install a whole file.
    handle, scratch = tempfile.mkstemp(suffix=".so", prefix=".native-", dir=cache)
    os.close(handle)
    try:
        message = ""
        for native in NATIVE_FLAGS:
            command = [compiler, *FLAGS, *native, *cflags, str(here / "psa.c"), "-o", scratch, "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if result.returncode == 0:
                Path(scratch).replace(target)
                return target
            message = message or result.stderr.strip()
        raise BackendError(f"{compiler} cannot compile the native engine: {message[:400]}")
    finally:
        Path(scratch).unlink(missing_ok=True)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.psa_args_size.restype = ctypes.c_int64
    loaded.psa_vector_lanes.restype = ctypes.c_int64
    for entry in (loaded.psa_forward, loaded.psa_backward):
        entry.restype = ctypes.c_int
        entry.argtypes = [ctypes.c_void_p]
    return loaded


def _cpu() -> str:
    """What decides the instruction set: -march=native on another CPU must not find this one's file."""
    lines: set[str] = set()
    try:
        with Path("/proc/cpuinfo").open() as info:
            lines = {line for line in info if line.startswith(("model name", "flags", "Features", "CPU part"))}
    except OSError:
        pass
    return "|".join([platform.machine(), platform.processor(), *sorted(lines)])

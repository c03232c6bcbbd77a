"""The backends, and how one is chosen. A backend is a module with ``device_reasons``, ``unsupported_reasons``,
``forward`` and, unless autograd does it, ``backward``."""

import importlib
import logging
import warnings
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from ..config import PSAConfig
from ..errors import BackendError, PSAWarning
from .base import Selection

NAMES = ("triton", "torch", "reference")
"""In order of preference for ``backend="auto"``."""


def check_name(name: str) -> None:
    """Raises BackendError for a name that is neither a backend's nor ``"auto"``."""
    if name not in ("auto", *NAMES):
        raise BackendError(f"backend: {name!r} is unknown; valid: auto, {', '.join(NAMES)}")


def load(name: str) -> ModuleType:
    """The backend's module. Importing one never needs its optional packages."""
    check_name(name)
    return importlib.import_module(f".{name}", __name__)


def backends() -> dict[str, list[str]]:
    """Each backend with the reasons why it cannot be used on this machine; an empty list means it can."""
    return {name: load(name).device_reasons() for name in NAMES}


def choose(name: str, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> ModuleType:
    """The backend that serves a call. An explicit name never falls back.

    Raises:
        BackendError: when the named backend cannot serve the call, with every reason.
    """
    if name != "auto":
        reasons = load(name).unsupported_reasons(q, k, v, selection)
        if reasons:
            raise BackendError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
        return load(name)
    refused = ""
    for candidate in NAMES:
        if candidate == "triton" and not q.is_cuda:
            continue
        reasons = load(candidate).unsupported_reasons(q, k, v, selection)
        if not reasons:
            _announce(candidate, q.device.type, refused)
            return load(candidate)
        refused = refused or "; ".join(reasons)
    raise BackendError("no backend can serve this call")


def planner(q: Tensor, k: Tensor, config: PSAConfig) -> ModuleType | None:
    """The backend whose own kernels plan this call, on the device of q; None: torch does."""
    if not q.is_cuda:
        return None
    backend = load("triton")
    return None if backend.planning_reasons(q, k, config) else backend


@lru_cache
def _announce(name: str, device: str, refused: str) -> None:
    logging.getLogger("psa").info("backend %r serves tensors on %s", name, device)
    if device == "cuda" and refused:
        warnings.warn(f"backend {name!r} serves a GPU, slowly: {refused}", PSAWarning, stacklevel=2)

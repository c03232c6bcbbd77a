"""Switches PSA on in models of other libraries, through their own extension points."""

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, PSAError
from ..values import nearest

HOSTS = {"diffusers": "0.36", "transformers": "4.57"}
"""The libraries served, and the versions from which on they are."""


def enable(
    pipeline_or_model: Any, preset: str | None = None, config: Any = None, density: float | None = None, **options: Any
) -> Any:
    """Serves the self-attention of a diffusers pipeline or model, or of a transformers model, by PSA.

    Args:
        preset: a preset of the model's section, ``"section/preset"``, or ``"default"``.
        config: a :class:`psa.PSAConfig` instead. Without preset, config and density: the automatic mode for diffusers,
            the default preset of section ``Qwen2.5_VL`` (``psa_balanced``) for transformers.
        density: share of the work to keep, over whatever preset or config says.
        **options: see ``enable_model`` of :mod:`psa.integrations.diffusers` and :mod:`psa.integrations.transformers`.

    Returns:
        A handle: ``.disable()``, ``.stats``, and a context manager that disables on exit.

    Raises:
        ConfigError: for an object that neither library made, or settings that are not valid.
        PSAError: for a library that is too old.
    """
    too_old = None
    for host in HOSTS:
        # An object of a library that was never imported cannot be here.
        if host in sys.modules:
            try:
                module = importlib.import_module(f".{host}", __name__)
                served = module.supports(pipeline_or_model)
            except ImportError as error:
                too_old = PSAError(
                    f"enable: needs {host} {HOSTS[host]} or later, this is {_version(host)}; "
                    f"pip install -U {host} ({error})"
                )
                too_old.__cause__ = error
                continue
            if served:
                _check_options(host, module.enable_model, options)
                return module.enable_model(pipeline_or_model, preset=preset, config=config, density=density, **options)
    if too_old is not None:
        raise too_old
    raise ConfigError(
        "enable: expected a diffusers pipeline or model, or a transformers model, "
        f"got {type(pipeline_or_model).__name__}"
    )


def _version(host: str) -> str:
    return getattr(sys.modules[host], "__version__", "unknown")


def _check_options(host: str, enable_model: Any, given: Iterable[str]) -> None:
    known = [p.name for p in inspect.signature(enable_model).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            raise ConfigError(f"enable: {name}: no option for a model of {host}{nearest(name, known)}")

"""Switches PSA on in models of other libraries, through their own extension points."""

import importlib
import sys
from typing import Any

from ..errors import ConfigError

HOSTS = ("diffusers", "transformers")


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
    """
    for host in HOSTS:
        # An object of a library that was never imported cannot be here.
        if host in sys.modules:
            module = importlib.import_module(f".{host}", __name__)
            if module.supports(pipeline_or_model):
                return module.enable_model(pipeline_or_model, preset=preset, config=config, density=density, **options)
    raise ConfigError(
        "enable: expected a diffusers pipeline or model, or a transformers model, "
        f"got {type(pipeline_or_model).__name__}"
    )

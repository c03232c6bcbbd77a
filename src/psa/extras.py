"""Optional packages, imported when first needed, with an error that names the extra to install."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from .errors import PSAError


def need(module: str, extra: str) -> ModuleType:
    """Imports ``module``; PSAError naming ``extra`` where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise PSAError(
            f"{package} is needed for this ({error}); install it with: pip install 'pyramid-sparse-attention[{extra}]'"
        ) from error


@contextlib.contextmanager
def quiet_loading(*libraries: str) -> Iterator[None]:
    """Without the bars that diffusers or transformers draw for every part they load; warnings and downloads show."""
    loggers = [importlib.import_module(f"{library}.utils.logging") for library in libraries]
    enabled = [logger for logger in loggers if logger.is_progress_bar_enabled()]
    for logger in enabled:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in enabled:
            logger.enable_progress_bar()

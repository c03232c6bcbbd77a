"""Optional packages, imported when first needed, with an error that names the extra to install."""

import importlib
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

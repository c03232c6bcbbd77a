"""Pyramid Sparse Attention: attention that reads unimportant keys through averages instead of dropping them."""

from typing import TYPE_CHECKING, Any

from . import tiny as tiny
from .allocate import allocate_levels
from .backends import backends
from .caps import similarity_cap
from .config import PSAConfig
from .errors import BackendError, ConfigError, PSAError, PSAWarning, ShapeError
from .functional import attend, psa_attention
from .functional import make_plan as plan
from .integrations.layout import Layout
from .merging import merge
from .module import PSAAttention
from .plan import Plan
from .reorder import gilbert_order
from .state import ProbeState

if TYPE_CHECKING:
    from .integrations import enable as enable

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "ConfigError",
    "Layout",
    "PSAAttention",
    "PSAConfig",
    "PSAError",
    "PSAWarning",
    "Plan",
    "ProbeState",
    "ShapeError",
    "allocate_levels",
    "attend",
    "backends",
    "enable",
    "gilbert_order",
    "merge",
    "plan",
    "psa_attention",
    "similarity_cap",
]


def __getattr__(name: str) -> Any:
    if name != "enable":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations import enable

    return enable

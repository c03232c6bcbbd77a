"""Autocast: inputs are cast once, as those of ``scaled_dot_product_attention``; then every stage picks its dtypes."""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def cast(*tensors: Any) -> tuple[Any, ...]:
    """What autocast does to the inputs of ``scaled_dot_product_attention``."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors)


def unaffected(stage: Callable[..., Any]) -> Callable[..., Any]:
    """``stage``, whose first argument is a tensor, with its own dtypes under autocast too."""

    @wraps(stage)
    def plain(first: Tensor, *args: Any, **options: Any) -> Any:
        kind = first.device.type
        off = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if off else contextlib.nullcontext():
            return stage(first, *args, **options)

    return plain

"""Timing and errors, measured the same way everywhere."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def relative_error(out: Tensor, exact: Tensor) -> Tensor:
    """‖out − exact‖_F / ‖exact‖_F per (batch, head), float32 [B, H]; 0 where both are zero."""
    out, exact = out.float(), exact.float()
    distance, size = (out - exact).flatten(-2).norm(dim=-1), exact.flatten(-2).norm(dim=-1)
    return torch.where(distance == 0, 0.0, distance / size.clamp(min=torch.finfo(torch.float32).tiny))


def cosine(out: Tensor, exact: Tensor) -> float:
    """Mean cosine between output rows."""
    return float(torch.nn.functional.cosine_similarity(out.float(), exact.float(), dim=-1).mean())


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """The result of one call, and its seconds, on a CPU."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def seconds(function: Callable[[], Any], *, repeats: int = 3, device: torch.device | str = "cpu") -> float:
    """Median seconds of ``repeats`` calls after one that is not counted; the device is waited for."""
    wait = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else (lambda: None)
    function()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        taken.append(time.perf_counter() - start)
    return median(taken)

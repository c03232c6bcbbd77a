"""The GPU backend: Triton kernels for every option of the method. Importing this package never needs Triton.

pool → every level of K and V, in one launch
schedule → each query block's list, in one launch
select → levels from q and k, in four launches (pool, importance, budget, levels)
bias → the variance bias of the pyramid's rows, beside the budget or in one launch
forward, backward → attention over the listed rows, and its gradients
"""

import os
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from ...config import MAX_LEVEL, PSAConfig
from ..base import Selection

LARGEST_GRID = 65535
"""Batch items times heads: what CUDA launches along the second axis."""
LARGEST_ROW = 32768
LARGEST_SORTED = 2048
"""KV blocks of a row; of one that is sorted, for ``rank_exponent``."""
SHARED = 96 << 10
"""Bytes of shared memory that a program has on every GPU."""
OLDEST = (3, 4)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the GPU of its first tensor as the current one: Triton launches there, whatever it is given."""

    @wraps(run)
    def guarded(tensor: Tensor, *args: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return run(tensor, *args, **options)

    return guarded


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@lru_cache
def _package_reasons() -> tuple[str, ...]:
    if util.find_spec("triton") is None:
        return ("Triton is not installed (pip install triton; it comes with PyTorch for CUDA)",)
    version = metadata.version("triton")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return (f"Triton {version} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed",)
    return ()


def device_reasons() -> list[str]:
    """Why this machine cannot run the kernels; empty where it can."""
    reasons = list(_package_reasons())
    if not torch.cuda.is_available() and not interpreted():
        reasons.append("PyTorch sees no CUDA device")
    return reasons


def _tensor_reasons(q: Tensor) -> list[str]:
    if q.is_cuda or interpreted():
        return []
    return [f"the tensors are on {q.device.type}, its kernels run on CUDA devices only"]


def unsupported_reasons(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> list[str]:
    """Why this call cannot be served; empty where it can."""
    reasons = [*_package_reasons(), *_tensor_reasons(q)]
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is not one of float16, bfloat16, float32")
    if not (q.dtype == k.dtype == v.dtype):
        reasons.append(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] > 256:
        reasons.append(f"head dimension {q.shape[-1]} is above 256")
    if v.shape[-1] != q.shape[-1]:
        reasons.append(f"q and v must share a head dimension, got {q.shape[-1]} and {v.shape[-1]}")
    if selection.block_m % 16:
        reasons.append(f"block_m {selection.block_m} is not a multiple of 16")
    if selection.block_n < 16 or selection.block_n & (selection.block_n - 1):
        reasons.append(f"block_n {selection.block_n} is not a power of two from 16 on")
    if selection.scale <= 0:
        reasons.append(f"scale {selection.scale} is not positive")
    if 2 * (k.shape[-2] + selection.block_n) * k.shape[-1] >= 2**31:
        reasons.append(f"{k.shape[-2]} tokens of {k.shape[-1]} channels pass 2**30 elements in one head")
    return reasons + _grid_reasons(q)


def _grid_reasons(q: Tensor) -> list[str]:
    lines = q.shape[0] * q.shape[1]
    return [f"{lines} heads in all batch items are above {LARGEST_GRID}"] if lines > LARGEST_GRID else []


def planning_reasons(q: Tensor, k: Tensor, config: PSAConfig) -> list[str]:
    """Why the selection kernels cannot plan this call; empty where they can."""
    reasons = [*_package_reasons(), *_tensor_reasons(q)]
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("nothing to select from")
    if config.importance_cols > MAX_LEVEL:
        reasons.append(f"means over {config.importance_cols} keys are no level of the pyramid")
    if config.block_m // config.importance_rows > 128 or config.block_n // config.importance_cols > 128:
        reasons.append("more than 128 pooled rows per block")
    largest = LARGEST_SORTED if config.rank_exponent else LARGEST_ROW
    if -(-k.shape[2] // config.block_n) > largest:
        reasons.append(f"more than {largest} KV blocks")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is not one of float16, bfloat16, float32")
    if q.shape[-1] > 256:
        reasons.append(f"head dimension {q.shape[-1]} is above 256")
    if not reasons:
        from .importance import shared_bytes

        pooled = config.importance_rows, config.importance_cols
        if shared_bytes(config.block_m, config.block_n, *pooled, q.shape[-1], q.dtype == torch.float32) > SHARED:
            reasons.append("pooled rows of this width and dtype pass the shared memory that every GPU has")
    return reasons + _grid_reasons(q)


@on_its_device
def plan_importance(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    *,
    scale: float,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Pooled importance of tokens in the plan's order, as :func:`psa.importance.importance` gives it; two launches.

    wanted: bool [B, H], heads that are to be scored; the others get 0 at little cost.
    """
    from .importance import importance, pool_keys
    from .score import row_rules

    rules = row_rules(config.block_m, config.block_n, is_causal, 0, "last", None)
    pooled = {"rows": config.importance_rows, "cols": config.importance_cols, "wanted": wanted}
    pooled_k = pool_keys(k, config.importance_cols, key_mask)
    return importance(q, pooled_k, k.shape[2], rules, scale=scale, key_mask=key_mask, **pooled)


@on_its_device
def plan_levels(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    importance: Tensor,
    *,
    is_causal: bool = False,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
    caps: Tensor | None = None,
    settings: Tensor | None = None,
) -> Tensor:
    """Levels from importance [1|B, 1|H, M, N], as :func:`psa.allocate_levels` gives them; three launches at most.

    Args:
        caps: uint8 [B, Hkv, N] from :func:`psa.similarity_cap`.
        settings: float32 [B, H, 3], each head's own exponent, keep_all and density.
    """
    from .score import row_rules
    from .select import allocate, cap_indices

    rules = row_rules(config.block_m, config.block_n, is_causal, text_length, text_position, key_mask)
    source = importance.expand(*q.shape[:2], *importance.shape[2:])
    caps = None if caps is None else cap_indices(caps)
    return allocate(source, config, rules, (q.shape[2], k.shape[2]), caps=caps, settings=settings)[0]


@on_its_device
def plan_and_attend(
    q: Tensor, k: Tensor, v: Tensor, config: PSAConfig, **options: Any
) -> tuple[Tensor, Tensor, Selection]:
    """out, lse and the selection from tokens in the plan's order, in five launches: see :mod:`.whole`."""
    from .whole import forward as run

    return run(q, k, v, config, **options)


@on_its_device
def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """out [B, H, Lq, D] in the dtype of q, lse float32 [B, H, Lq] (natural log)."""
    from .attend import forward as run

    return run(q, k, v, selection)


@on_its_device
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v. Deterministic: no atomics."""
    from .gradients import backward as run

    return run(grad_out, grad_lse, q, k, v, out, lse, selection)

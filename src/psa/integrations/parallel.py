"""Context parallelism: diffusers moves the tokens between processes, PSA attends what each process holds.

Ulysses exchanges heads for tokens, so that each process attends the whole sequence with its share of the heads: the
same result as one process. Ring keeps the queries and merges attention over the keys of one process after another by
their lse: exact for dense attention; PSA then selects within each pair of chunks.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor

from ..config import PSAConfig
from ..errors import ConfigError


def distributed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, serve: Callable[..., Any], parallel: Any
) -> Tensor:
    """Attention of [B, L/processes, H, D] through diffusers' own exchange.

    Args:
        serve: (q, k, v, scale) -> out [B, L, H, D] of what an exchange brings together; with ring (out, lse [B, L, H]).
    """

    def forward_op(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **_: Any):
        return serve(query, key, value, scale)

    dispatch: Any = attention_dispatch
    return dispatch._templated_context_parallel_attention(
        q,
        k,
        v,
        None,
        0.0,
        False,
        scale,
        False,
        False,
        forward_op=forward_op,
        backward_op=None,
        _parallel_config=_Wrapped(parallel),
    )


class _Wrapped:
    """What diffusers reads of a ParallelConfig."""

    def __init__(self, context_parallel_config: Any) -> None:
        self.context_parallel_config = context_parallel_config


def join_processes() -> None:
    """Joins the processes of torchrun, each on its own GPU where there are any."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def split_sequence(pipe: Any, degrees: dict[str, int], device: str) -> str:
    """Splits the tokens of a pipeline's transformers over the processes of torchrun; returns this process's device."""
    join_processes()
    if device.startswith("cuda"):
        device = f"cuda:{torch.cuda.current_device()}"
    for name, model in pipe.components.items():
        if name.startswith("transformer") and model is not None:
            enable_parallelism(model, **degrees)
    return device


def enable_parallelism(model: Any, *, ulysses: int = 1, ring: int = 1) -> None:
    """diffusers' ``enable_parallelism``, for models of its plans and for CogVideoX, which brings none.

    Leaves a dense PSA session below, through which models that do not dispatch exchange their tokens on dense steps.
    Switch PSA on over it with ``psa.enable(..., replace=True)``.

    Raises:
        ConfigError: for a model that does not say how its tokens split.
    """
    from .diffusers import enable_model

    settings: dict[str, Any] = {"ulysses_degree": ulysses, "ring_degree": ring}
    if ring == 1 and "ulysses_anything" in {item.name for item in fields(ContextParallelConfig)}:
        settings["ulysses_anything"] = True  # token counts that the processes do not divide, such as 226 of text
    plan = getattr(model, "_cp_plan", None) or PLANS.get(type(model).__name__)
    if plan is None:
        raise ConfigError(f"context_parallel: {type(model).__name__} does not say how its tokens split")
    enable_model(model, config=PSAConfig(type="dense"))
    with _one_device_at_least():
        model.enable_parallelism(config=ContextParallelConfig(**settings), cp_plan=plan)


@contextlib.contextmanager
def _one_device_at_least():
    """diffusers divides the rank by the number of accelerators, which is 0 on CPUs."""
    if torch.accelerator.device_count():
        yield
        return
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        yield


def shares(count: int, processes: int) -> list[int]:
    """How many of ``count`` tokens each process holds: the first ones one more, as ``torch.tensor_split`` deals."""
    return [count // processes + (rank < count % processes) for rank in range(processes)]


_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
_ANGLES = ContextParallelInput(split_dim=0, expected_dims=2, split_output=False)
PLANS: dict[str, Any] = {
    "CogVideoXTransformer3DModel": {
        "": {"image_rotary_emb": [_ANGLES, _ANGLES]},
        "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
}
"""How the tokens of models split that say nothing themselves."""

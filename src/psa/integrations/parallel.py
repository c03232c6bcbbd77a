"""Context parallelism: diffusers moves the tokens between processes, PSA attends what each process holds.

Ulysses exchanges heads for tokens, so that each process attends the whole sequence with its share of the heads: the same
result as one process. Ring keeps the queries and merges attention over the keys of one process after another by their
lse: exact for dense attention; PSA then selects within each pair of chunks.
"""

from collections.abc import Callable
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor


def distributed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, serve: Callable[..., Any], parallel: Any
) -> Tensor:
    """Attention of [B, L/processes, H, D] through diffusers' own exchange.

    Args:
        serve: (q, k, v, scale) -> out [B, L, H, D] of what one exchange brings together; with ring (out, lse [B, L, H]).
    """

    def forward_op(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **_: Any):
        return serve(query, key, value, scale)

    return attention_dispatch._templated_context_parallel_attention(
        q, k, v, None, 0.0, False, scale, False, False, forward_op=forward_op, backward_op=None, _parallel_config=_Wrapped(parallel)
    )


class _Wrapped:
    """What diffusers reads of a ParallelConfig."""

    def __init__(self, context_parallel_config: Any) -> None:
        self.context_parallel_config = context_parallel_config

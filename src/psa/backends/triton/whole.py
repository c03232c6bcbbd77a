"""From q, k and v to out in five launches: pool, importance, budget, selection with schedule, attention.

Planning and attention share one pyramid and one schedule here, which a plan that is made apart cannot.
"""

import torch
from torch import Tensor

from ...allocate import similarity_cap
from ...config import PSAConfig
from ..base import Selection
from .attend import attend
from .call import Call
from .pool import build_pyramid
from .select import select


def pooled_rows(keys: Tensor, block_n: int, level: int) -> Tensor:
    """The rows of one level in a pyramid [B, Hkv, R, D], whole blocks: a view."""
    per_block = [block_n >> e for e in range(min(block_n, 128).bit_length())]
    exponent = level.bit_length() - 1
    blocks = keys.shape[2] // sum(per_block)
    return keys.narrow(2, blocks * sum(per_block[:exponent]), blocks * per_block[exponent])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: PSAConfig,
    *,
    scale: float,
    is_causal: bool = False,
    text_length: int = 0,
    text_position: str = "last",
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Selection]:
    """out [B, H, Lq, D], lse float32 [B, H, Lq] and the selection, from tokens in the plan's order.

    For calls without reasons in :func:`psa.backends.triton.planning_reasons` and ``unsupported_reasons``. The
    similarity cap and the variance bias add a few small launches of torch.
    """
    power = cap = None
    if config.bias == "variance":
        power, cap = (
            q.float().square().mean(2),
            q.new_full(q.shape[:2], float(config.bias_cap or 0.0), dtype=torch.float32),
        )
    mask = None if key_mask is None else key_mask.contiguous()
    pyramid = build_pyramid(k, v, config.block_n, key_mask=mask, query_power=power, bias_cap=cap, scale=scale)
    cols = config.importance_cols
    pooled_k = pooled_rows(pyramid.keys, config.block_n, cols).narrow(2, 0, -(-k.shape[2] // cols))
    levels, blocks, ends = select(
        q,
        k,
        config,
        scale=scale,
        is_causal=is_causal,
        text_length=text_length,
        text_position=text_position,
        key_mask=mask,
        pooled_k=pooled_k,
        caps=similarity_cap(k, config.block_n, config.sim_thresholds, mask) if config.use_sim_mask else None,
    )
    selection = Selection(levels, config.block_m, config.block_n, scale, is_causal, power, cap, None, mask)
    return *attend(Call(q, selection, pyramid, blocks, ends)), selection

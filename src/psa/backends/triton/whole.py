"""From q, k and v to out in five launches: pool, importance, budget, selection with schedule, attention.

Planning and attention share one pyramid and one schedule here, which a plan that is made apart cannot. What options add
rides along: similarity caps and a mask's first key in the pool, the queries' power in importance, and the variance bias
beside the budget; where there is no budget to meet (tau, topk, thresholdbound) it takes the budget's launch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...config import PSAConfig
from ..base import Selection
from .attend import attend
from .bias import bias_from_sums
from .call import Call
from .importance import power_parts
from .pool import Pyramid, build_pyramid
from .score import RowRules
from .select import select


def pooled_keys(pyramid: Pyramid, block_n: int, level: int) -> Tensor:
    """The keys of one level, [B, Hkv, ceil(length / level), D]: a view."""
    per_block = [block_n >> e for e in range(min(block_n, 128).bit_length())]
    exponent = level.bit_length() - 1
    blocks = pyramid.keys.shape[2] // sum(per_block)
    return pyramid.keys.narrow(2, blocks * sum(per_block[:exponent]), -(-pyramid.length // level))


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

    For pooled importance and no measured bias, and for calls without reasons in
    :func:`psa.backends.triton.planning_reasons` and ``unsupported_reasons``.
    """
    thresholds = config.sim_thresholds if config.use_sim_mask else None
    pyramid = build_pyramid(k, v, config.block_n, key_mask=key_mask, thresholds=thresholds, first_real=is_causal)
    first = text_position == "first"
    rules = RowRules(config.block_m, config.block_n, is_causal, text_length, first, pyramid.first_real)
    bias = power = None
    if config.bias == "variance":
        parts = power_parts(q.shape[2], config.block_m, config.importance_rows)
        power = q.new_empty(*q.shape[:2], parts, q.shape[3], dtype=torch.float32)
        bias = bias_from_sums(pyramid, config.block_n, power, q.shape[2], float(config.bias_cap or 0.0), scale)
        pyramid = bias.pyramid
    pooled_k = pooled_keys(pyramid, config.block_n, config.importance_cols)
    levels, blocks, ends = select(
        q, pooled_k, k.shape[2], config, rules, scale=scale, key_mask=key_mask, caps=pyramid.caps, power=power,
        bias=bias,
    )  # fmt: skip
    selection = Selection(levels, config.block_m, config.block_n, scale, is_causal, key_mask=key_mask)
    if bias is not None:
        selection = replace(selection, query_power=bias.power, bias_cap=bias.cap)
    return *attend(Call(q, selection, pyramid, blocks, ends)), selection

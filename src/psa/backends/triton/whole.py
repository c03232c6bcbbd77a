"""From q, k and v to out in five launches: pool, importance, budget, selection with schedule, attention.

Planning and attention share one pyramid and one schedule here, which a plan that is made apart cannot.
"""

import torch
from torch import Tensor

from ...allocate import similarity_cap
from ...config import MAX_LEVEL, PSAConfig
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


def caps_of(cosines: Tensor, thresholds: dict[int, float]) -> Tensor:
    """:func:`psa.allocate.similarity_cap` from the mean cosines [B, Hkv, N, 3] that pooling leaves."""
    caps = torch.ones(cosines.shape[:-1], dtype=torch.uint8, device=cosines.device)
    for level, threshold in sorted(thresholds.items()):
        caps.masked_fill_(cosines[..., level.bit_length() - 2] > threshold, level)
    return caps


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

    For calls without reasons in :func:`psa.backends.triton.planning_reasons` and ``unsupported_reasons``. Torch adds
    small launches of its own: for the variance bias (the power of the queries), a similarity cap (thresholds on one
    number per block; with a key mask all of it) and a causal key mask (its first real key).
    """
    power = cap = None
    if config.bias == "variance":
        power, cap = (
            q.float().square().mean(2),
            q.new_full(q.shape[:2], float(config.bias_cap or 0.0), dtype=torch.float32),
        )
    mask = None if key_mask is None else key_mask.contiguous()
    similarity = config.use_sim_mask and mask is None and config.block_n <= MAX_LEVEL
    options = {"query_power": power, "bias_cap": cap, "scale": scale, "similarity": similarity}
    pyramid = build_pyramid(k, v, config.block_n, key_mask=mask, **options)
    caps = None
    if pyramid.similarity is not None:
        caps = caps_of(pyramid.similarity, config.sim_thresholds)
    elif config.use_sim_mask:
        caps = similarity_cap(k, config.block_n, config.sim_thresholds, mask)
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
        caps=caps,
    )
    selection = Selection(levels, config.block_m, config.block_n, scale, is_causal, power, cap, None, mask)
    return *attend(Call(q, selection, pyramid, blocks, ends)), selection

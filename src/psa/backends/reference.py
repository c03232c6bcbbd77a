"""The specification: the pyramid attention of the method as plain dense algebra, in any precision, by autograd.

It scores every query against every row of every level and masks what the plan does not select, so it costs more than
dense attention. Nothing here is clever; every other backend is tested against it.
"""

import torch
from torch import Tensor

from ..pyramid import group_means, row_bias, row_layout
from .base import Selection


def device_reasons() -> list[str]:
    return []


def unsupported_reasons(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> list[str]:
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attention over the rows that ``selection.levels`` selects.

    ``s = scale · q·k̄ + b``, ``out = softmax(s) · v̄``, ``lse = logsumexp(s)``. A row that selects nothing returns 0 and
    -inf. Half precision is computed in float32.

    Returns:
        out [B, H, Lq, D] in the dtype of q, lse [B, H, Lq] in float32 (float64 for float64 inputs).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    scores, rows = [], []
    for level in row_layout(k.shape[-2], selection.block_n).levels:
        pooled_keys = group_means(keys, level, selection.key_mask).repeat_interleave(groups, dim=1)
        pooled_values = group_means(values, level, selection.key_mask).repeat_interleave(groups, dim=1)
        logits = selection.scale * queries @ pooled_keys.transpose(-1, -2)
        logits = logits + row_bias(keys, level, selection)[:, :, None, :]
        if selection.pair_bias is not None and level > 1:
            logits = logits + expand_pairs(selection.pair_bias.to(dtype), level, q, k, selection)
        hidden = ~selected_rows(level, q, k, selection)
        scores.append(logits.masked_fill(hidden, -torch.inf))
        rows.append(pooled_values)
    scores, rows = torch.cat(scores, dim=-1), torch.cat(rows, dim=-2)
    empty = scores.isneginf().all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return (weights @ rows).to(q.dtype), lse


def expand_pairs(pairs: Tensor, level: int, q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """[.., M, N] values of block pairs, repeated for every (query row, pyramid row) of one level."""
    per_row = pairs.repeat_interleave(selection.block_m, dim=-2)[..., : q.shape[-2], :]
    return per_row.repeat_interleave(selection.block_n // level, dim=-1)[..., : -(-k.shape[-2] // level)]


def selected_rows(level: int, q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """Which pyramid rows of one level each query row reads: bool [1|B, 1|H, Lq, ceil(Lk/level)]."""
    chosen = expand_pairs(selection.levels == level, level, q, k, selection)
    if selection.is_causal:
        length_q, length_k = q.shape[-2], k.shape[-2]
        position = torch.arange(length_q, device=q.device) + length_k - length_q
        last_token = (torch.arange(chosen.shape[-1], device=q.device) + 1).mul(level).clamp(max=length_k) - 1
        chosen = chosen & (last_token[None, :] <= position[:, None])
    return chosen

"""Probes: the exact attention of a few query rows, and the error on them of any number of selections.

A row's output under any selection is a sum over KV blocks of one of a few pieces: the block read at level 1, 2, 4, …
with one bias or another. The pieces of the sampled rows are computed once; every selection is then a choice among them,
a product of small matrices. Nothing here runs the attention kernel, nothing waits for the device, and memory is bounded
by ``CHUNK`` whatever the length.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .slope import slope_basis
from .values import MAX_LEVEL

CHUNK = 1 << 26
"""Elements held at a time (256 MB in float32)."""
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Rows:
    """Sampled query rows, stratified over query blocks.

    The same in every head and batch item, so that a process that holds some of the heads probes what one with all does.

    Attributes:
        blocks: int64 [H, S], query blocks, ascending. rows: int64 [H, S, R], rows within those blocks.
    """

    blocks: Tensor
    rows: Tensor


def sample_rows(length: int, block_m: int, heads: int, count: int, salt: int, device: torch.device) -> Rows:
    """About ``count`` rows per head at low-discrepancy places that depend on ``salt`` only."""
    blocks = -(-length // block_m)
    strata = min(blocks, count)
    each = -(-count // strata)
    stratum = torch.arange(strata, device=device, dtype=torch.float64).expand(heads, -1)
    place = ((stratum + 1) * GOLDEN + salt * math.sqrt(2)) % 1.0
    chosen = ((stratum + place) * blocks / strata).long().clamp(max=blocks - 1)
    size = (length - chosen * block_m).clamp(max=block_m)
    draw = torch.arange(each, device=device, dtype=torch.float64)
    place = (place[..., None] * 7919 * math.sqrt(3) + (draw + 0.5) * GOLDEN + salt * GOLDEN) % 1.0
    rows = chosen[..., None] * block_m + (place * size[..., None]).long()
    return Rows(chosen, rows)


@dataclass(frozen=True)
class Scored:
    """What is to be scored on the sampled rows, C selections for every head.

    Attributes:
        levels: uint8 [B, H, S, C, N]. caps: int64 [B, H, C], which of ``cap_values`` [B|1, H|1, K] bounds the variance
        bias. shares: float [B, H, S, C, N], of the slope correction, as in :func:`psa.slope.slope_correction`.
        pairs: float16 [B, H, S, C, N], measured bias of pooled rows, or None.
    """

    levels: Tensor
    caps: Tensor
    cap_values: Tensor
    shares: Tensor
    pairs: Tensor | None = None


@torch.no_grad()
def row_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    scored: Scored,
    *,
    block_n: int,
    scale: float,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared errors of every selection on the sampled rows, and the squared norm of the exact outputs.

    q [B, H, Lq, D], k, v [B, Hkv, Lk, D] in plan order, key_mask [B, Lk] in plan order.

    Returns, in units of the head's largest value:
        errors float32 [B, H, S, C], norms float32 [B, H, S], sums over the R rows of a query block.
    """
    batch, heads, _, dim = q.shape
    groups = heads // k.shape[1]
    strata, each = rows.rows.shape[1:]
    candidates = scored.levels.shape[3]
    errors = torch.zeros(batch, heads, strata, candidates, device=q.device)
    norms = torch.zeros(batch, heads, strata, device=q.device)
    levels_count = int(math.log2(min(block_n, MAX_LEVEL))) + 1
    sets = 1 + scored.cap_values.shape[-1] * (levels_count - 1) + 2
    row_cost = each * (k.shape[2] * 8 + -(-k.shape[2] // block_n) * (dim + 1) * 2 * sets)
    step = max(1, CHUNK // row_cost)
    power = q.float().square().mean(2)
    for b in range(batch):
        mask = None if key_mask is None else key_mask[b : b + 1]
        for h in range(heads):
            kv = slice(h // groups, h // groups + 1)
            pyramid = _Pyramid(k[b : b + 1, kv], v[b : b + 1, kv], block_n, levels_count, mask)
            cap_values = scored.cap_values.expand(batch, heads, -1)[b, h]
            bias = pyramid.variance_bias(power[b, h], scale, cap_values)
            for first in range(0, strata, step):
                part = slice(first, first + step)
                index = rows.rows[h, part]
                queries = q[b, h][index].float()
                pieces, exact = pyramid.pieces(queries, index, scale, bias, is_causal, q.shape[2])
                weights = _weights(scored, b, h, part, levels_count)
                out = weights @ pieces.flatten(0, 1).transpose(0, 1).flatten(2)
                out = out.unflatten(-1, (each, dim + 1))
                mass = out[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
                out = out[..., :-1] / mass + scale * pyramid.slope(queries, scored, b, h, part)
                errors[b, h, part] = (out - exact[:, None]).square().sum((2, 3))
                norms[b, h, part] = exact.square().sum((1, 2))
    return errors, norms


def _weights(scored: Scored, b: int, h: int, part: slice, count: int) -> Tensor:
    """How much of every piece a selection takes, [S, C, P * N]: one (times its pair bias), or none."""
    levels = scored.levels[b, h, part]
    index = (levels.float().clamp(min=1).log2()).long()
    piece = torch.where(index > 0, index + scored.caps[b, h][None, :, None] * (count - 1), 0)
    amount = (levels > 0).float()
    if scored.pairs is not None:
        amount = torch.where(index > 0, amount * scored.pairs[b, h, part].float().exp(), amount)
    sets = 1 + scored.cap_values.shape[-1] * (count - 1)
    weights = torch.zeros(*levels.shape[:2], sets, levels.shape[2], device=levels.device)
    return weights.scatter_(2, piece[:, :, None], amount[:, :, None]).flatten(2)


class _Pyramid:
    """One KV head's pooled keys and values in blocks, as probes need them."""

    def __init__(self, k: Tensor, v: Tensor, block_n: int, count: int, mask: Tensor | None) -> None:
        pad = (0, 0, 0, -k.shape[2] % block_n)
        real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask
        real = torch.nn.functional.pad(real, (0, pad[3]))
        keys, values = (torch.nn.functional.pad(x.float(), pad) for x in (k, v))
        values = values.masked_fill(~real[:, None, :, None], 0.0)
        values = values / values.abs().amax().clamp(min=1e-36)  # errors are relative; their squares must not overflow
        self.real, self.tokens, self.count = real[0], k.shape[2], count
        self.k, self.blocks = keys[0, 0], keys.shape[2] // block_n
        padded = mask is not None or bool(pad[3])
        self.moments, self.mix = slope_basis(keys, values, block_n, real if padded else None)
        self.counts = [real[0].float()]
        values = values[0, 0]
        self.values = [torch.nn.functional.pad(values, (0, 1), value=1.0).unflatten(0, (self.blocks, -1))]
        for _ in range(1, count):
            self.counts.append(self.counts[-1].unflatten(0, (-1, 2)).sum(-1))
            values = values.unflatten(0, (-1, 2)).sum(1)
            means = values / self.counts[-1].clamp(min=1)[:, None]
            self.values.append(torch.nn.functional.pad(means, (0, 1), value=1.0).unflatten(0, (self.blocks, -1)))

    def variance_bias(self, power: Tensor, scale: float, caps: Tensor) -> list[Tensor]:
        """The factor exp(bias) of every group, [K, groups], for every level above 1 and every cap."""
        top = self.k.shape[0] // self.counts[-1].shape[0]
        weight = self.counts[0][:, None]
        sums = self.k * weight
        centre = sums.unflatten(0, (-1, top)).sum(1) / self.counts[-1].clamp(min=1)[:, None]
        sums = (sums - centre.repeat_interleave(top, dim=0)) * weight
        energy = sums.square() @ power
        factors = []
        for counts in self.counts[1:]:
            sums, energy = sums.unflatten(0, (-1, 2)).sum(1), energy.unflatten(0, (-1, 2)).sum(1)
            spread = energy / counts.clamp(min=1) - sums.square() @ power / counts.clamp(min=1).square()
            factors.append(torch.minimum(0.5 * scale**2 * spread.clamp(min=0)[None, :], caps[:, None]).exp())
        return factors

    def pieces(
        self, queries: Tensor, index: Tensor, scale: float, factors: list[Tensor], is_causal: bool, length_q: int
    ) -> tuple[Tensor, Tensor]:
        """Unnormalised outputs with their mass as a last channel, [P, N, S, R, D + 1], and exact outputs [S, R, D]."""
        shape = queries.shape[:2]
        logits = (scale * queries).flatten(0, 1) @ self.k.mT
        position = (index + self.tokens - length_q).flatten()[:, None] if is_causal else None
        seen = self._hide(logits, 0, position)
        peak = seen.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        sets = 1 + len(factors[0]) * (self.count - 1)
        out = queries.new_empty(sets, self.blocks, logits.shape[0], queries.shape[-1] + 1)
        self._fill(out[0], (seen - peak).exp_(), 0)
        total = out[0].sum(0)
        exact = total[:, :-1] / total[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)
        pooled = logits * self.counts[0]
        for e in range(1, self.count):
            pooled = pooled.unflatten(-1, (-1, 2)).sum(-1)
            weight = (self._hide(pooled / self.counts[e].clamp(min=1), e, position) - peak).exp_() * self.counts[e]
            for number, factor in enumerate(factors[e - 1]):
                self._fill(out[number * (self.count - 1) + e], weight * factor, e)
        return out.unflatten(2, shape), exact.unflatten(0, shape)

    def _hide(self, logits: Tensor, e: int, position: Tensor | None) -> Tensor:
        hidden = self.counts[e] == 0
        if position is not None:
            last = ((torch.arange(logits.shape[-1], device=logits.device) + 1) << e).clamp(max=self.tokens) - 1
            hidden = hidden | (last > position)
        return logits.masked_fill(hidden, -torch.inf)

    def _fill(self, out: Tensor, weight: Tensor, e: int) -> None:
        """Σ over each block's groups of weight · (mean value, 1): weight [rows, groups] into out [N, rows, D + 1]."""
        torch.bmm(weight.unflatten(-1, (self.blocks, -1)).transpose(0, 1), self.values[e], out=out)

    def slope(self, queries: Tensor, scored: Scored, b: int, h: int, part: slice) -> Tensor:
        """q_i C_m of every selection: [S, C, R, D]."""
        shares, levels = scored.shares[b, h, part].float(), scored.levels[b, h, part]
        index = levels.float().clamp(min=1).log2().long()
        mix = self.mix[0, 0].transpose(0, 1)[None, None].expand(*index.shape[:2], -1, -1, -1)
        weight = mix.gather(2, index[:, :, None, :, None].expand(-1, -1, 1, -1, 2)).squeeze(2)
        weight = weight * (shares / self.blocks)[..., None]
        out = torch.zeros((), device=queries.device)
        for number, moment in enumerate(self.moments):
            turned = (queries.flatten(0, 1) @ moment[0, 0]).unflatten(1, queries.shape[:2]).transpose(0, 1)
            out = out + weight[..., number] @ turned.flatten(2)
        return out.unflatten(-1, queries.shape[1:])

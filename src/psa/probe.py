"""Probes: the exact attention of a few query rows, and the error on them of any number of selections.

A row's output under any selection is a sum over KV blocks of one of a few pieces: the block read at level 1, 2, 4, …
The pieces of the sampled rows are computed once, level by level; every selection is then a choice among them, a product
of small matrices. Nothing here runs the attention kernel, nothing waits for the device, and memory is bounded by
``CHUNK`` whatever the length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .memory import scratch_elements
from .schedule import level_index
from .slope import FINE, centred, slope_mix

CHUNK = 1 << 26
"""Elements held at a time on a CPU (256 MB in float32)."""
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


def sample_rows(
    length: int, block_m: int, heads: int, count: int, per_block: int, salt: int, device: torch.device
) -> Rows:
    """About ``count`` rows per head, ``per_block`` of a query block where there are enough of these, at low-discrepancy
    places that depend on ``salt`` only."""
    blocks = -(-length // block_m)
    strata = min(blocks, -(-count // per_block))
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
        levels: uint8 [B, H, S, C, N]. shares: float [B, H, S, C, N], of the slope correction, as in
        :func:`psa.slope.slope_correction`. caps: float32 [B, H, K], bounds of the variance bias, in nats, that each is
        scored with.
    """

    levels: Tensor
    shares: Tensor
    caps: Tensor


@torch.no_grad()
def row_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    scored: Scored,
    *,
    power: Tensor,
    block_n: int,
    scale: float,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors of every selection on the sampled rows, and the squared norm of the exact outputs.

    q [B, H, Lq, D], k, v [B, Hkv, Lk, D] in plan order, key_mask [B, Lk] in plan order; power: of q, see
    :func:`psa.memory.mean_square`.

    Returns:
        errors float32 [B, H, S, C, K, 2], by cap, with the slope correction and without, and norms float32 [B, H, S],
        sums over the R rows of a query block in units of the head's largest value; and that unit, float32 [B, H].
    """
    groups = q.shape[1] // k.shape[1]
    each, (count, blocks) = rows.rows.shape[2], scored.levels.shape[3:]
    per_block = each * (k.shape[2] * 8 + blocks * (q.shape[3] + 1) * 2) + blocks * count * 8
    together = scratch_elements(q, 0) // (per_block * rows.rows.shape[1] * groups)
    call = {
        "block_n": block_n,
        "scale": scale,
        "step": max(1, scratch_elements(q, CHUNK) // per_block),
        "shift": k.shape[2] - q.shape[2] if is_causal else None,
        "sparing": q.device.type == "cpu" and together <= 1,
    }
    results = []
    for b in range(q.shape[0]):
        of_group = partial(_group_errors, mask=None if key_mask is None else key_mask[b : b + 1], **call)
        of_heads = (rows.rows, q[b], power[b], scored.levels[b], scored.shares[b], scored.caps[b])
        shared = (x.unflatten(0, (-1, groups)) for x in of_heads)
        results.append(_over_heads(of_group, (k[b], v[b], *shared), together))
    errors, norms, unit = (torch.stack([x.flatten(0, 1) for x in parts]) for parts in zip(*results, strict=True))
    return errors, norms, unit


def _over_heads(function: Callable[..., Any], inputs: tuple[Tensor, ...], together: int) -> tuple[Tensor, ...]:
    """``function`` of every KV head: ``together`` of them in one go, or one by one, which caches of a CPU like."""
    if together > 1:
        return torch.func.vmap(function, chunk_size=together)(*inputs)
    each = [function(*(x[head] for x in inputs)) for head in range(inputs[0].shape[0])]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def _group_errors(
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    q: Tensor,
    power: Tensor,
    levels: Tensor,
    shares: Tensor,
    caps: Tensor,
    *,
    mask: Tensor | None,
    block_n: int,
    scale: float,
    step: int,
    shift: int | None,
    sparing: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`row_errors` for one KV head, k, v [Lk, D], and the G query heads that share it: errors [G, S, C, K, 2],
    norms [G, S], unit [G]. ``step`` query blocks at a time; causal attention sees key j from query i where
    j <= i + ``shift``; ``sparing`` looks at the shares, and spares the slope correction where they are all zero."""
    pyramid = _Pyramid(k[None, None], v[None, None], block_n, mask)
    every = []
    for head in range(q.shape[0]):
        bias = pyramid.variance_bias(power[head], scale, caps[head])
        parts = zip(*(x[head].split(step) for x in (rows, levels, shares)), strict=True)
        done = [
            _part_errors(
                pyramid,
                scale * q[head][some].float(),
                some,
                kept,
                None if sparing and not bool(share.any()) else share,
                bias,
                shift,
            )
            for some, kept, share in parts
        ]
        every.append([torch.cat(found) for found in zip(*done, strict=True)])
    errors, norms = (torch.stack(found) for found in zip(*every, strict=True))
    return errors, norms, pyramid.top.expand(q.shape[0])


def _part_errors(
    pyramid: "_Pyramid",
    queries: Tensor,
    rows: Tensor,
    levels: Tensor,
    shares: Tensor | None,
    bias: list[Tensor],
    shift: int | None,
) -> tuple[Tensor, Tensor]:
    """:func:`row_errors` for some query blocks of one head, queries [S, R, D]; shares None: all zero."""
    logits = queries.flatten(0, 1) @ pyramid.k.mT
    position = None if shift is None else (rows + shift).flatten()[:, None]
    out, exact = (found / pyramid.top for found in pyramid.outputs(logits, levels, bias, position))
    wrong = out - exact  # in units of the largest value: squares must not overflow
    plain = wrong.square().sum((-2, -1))
    if shares is not None:
        wrong = wrong + pyramid.slope(logits, levels, shares) / pyramid.top
    sloped = plain if shares is None else wrong.square().sum((-2, -1))
    return torch.stack([sloped, plain], dim=-1).movedim(0, 2), exact.square().sum((1, 2, 3))


class _Pyramid:
    """One KV head's pooled keys and values in blocks, as probes need them."""

    def __init__(self, k: Tensor, v: Tensor, block_n: int, mask: Tensor | None) -> None:
        missing = -k.shape[2] % block_n
        keys, values, real = k.float(), v.float(), None
        if missing or mask is not None:
            real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask
            real = functional.pad(real, (0, missing))
            keys, values = (functional.pad(x, (0, 0, 0, missing)) for x in (keys, values))
            keys, values = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (keys, values))
        self.real, self.tokens, self.k, self.blocks = real, k.shape[2], keys[0, 0], keys.shape[2] // block_n
        self.top = torch.stack(torch.aminmax(values)).abs().amax().clamp(min=1e-36)
        self.centred = centred(keys, block_n, real)
        self.mix = slope_mix(self.centred, real, block_n)[0, 0]
        self.counts = [keys.new_ones(keys.shape[2]) if real is None else real[0].float()]
        self.values = [values[0, 0]]
        for _ in range(1, self.mix.shape[1]):
            counts, values = self.counts[-1][:, None], self.values[-1]
            total = _pairs(values if real is None else counts * values, 0)
            self.counts.append(_pairs(self.counts[-1], 0))
            self.values.append(total.div_(2.0 if real is None else self.counts[-1][:, None].clamp(min=1)))

    def variance_bias(self, power: Tensor, scale: float, caps: Tensor) -> list[Tensor]:
        """The factors exp(bias) [K, groups] of every level above 1, for every cap [K]."""
        sums, factors = self.centred[0, 0], []
        energy = sums.square() @ power
        for counts in self.counts[1:]:
            sums, energy, size = _pairs(sums, 0), _pairs(energy, 0), counts.clamp(min=1)
            spread = energy / size - sums.square() @ power / size.square()
            spread = spread.nan_to_num(nan=torch.inf).clamp(min=0)  # the difference of two infinities
            factors.append(torch.minimum(0.5 * scale**2 * spread, caps[:, None]).exp())
        return factors

    def outputs(
        self, logits: Tensor, levels: Tensor, factors: list[Tensor], position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The outputs of every selection with every cap [K, S, C, R, D], and the exact ones [S, 1, R, D].

        logits [S * R, keys], levels [S, C, N], factors of :meth:`variance_bias`.
        """
        seen = self._hide(logits, 0, position)
        peak = seen.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight = (seen - peak).exp_()
        tiny = torch.finfo(torch.float32).tiny
        total = weight.sum(-1, keepdim=True).clamp(min=tiny)
        amount = functional.pad(levels == 1, (0, 0, 0, 1), value=True).float()
        out, mass = self._sum(weight.div_(total), 0, amount), self._mass(weight, amount)
        exact = out[:, -1:] / mass[:, -1:, :, None].clamp(min=tiny)
        out, mass = (x[:, :-1].repeat(len(factors[0]), *[1] * x.ndim) for x in (out, mass))
        shift, sums = peak + total.log(), logits if self.real is None else logits * self.counts[0]
        for e, (counts, factor) in enumerate(zip(self.counts[1:], factors, strict=True), start=1):
            sums = _pairs(sums, 1)
            weight = self._hide(sums / counts.clamp(min=1), e, position)
            weight = weight.sub_(shift).exp_().mul_(counts)
            amount = (levels == 1 << e).float()
            for cap in range(len(factor)):  # one at a time: pieces of two would leave a CPU's cache
                corrected = weight * factor[cap]
                out[cap] += self._sum(corrected, e, amount)
                mass[cap] += self._mass(corrected, amount)
        return out / mass[..., None].clamp(min=tiny), exact

    def slope(self, logits: Tensor, levels: Tensor, shares: Tensor) -> Tensor:
        """The slope correction of every selection, [S, C, R, D], by the logits' spread inside groups."""
        wanted = (shares.float() / self.blocks)[..., None] * self._mixture(levels)
        fine = FINE.bit_length() - 1  # FINE is 4: two sums of neighbours
        top = self.k.shape[0] // self.counts[-1].shape[0]
        spread = logits.unflatten(-1, (-1, top))
        if self.real is not None:
            real = self.counts[0].unflatten(0, (-1, top))
            means = (spread * real).sum(-1, keepdim=True) / self.counts[-1][:, None].clamp(min=1)
            spread = (spread - means) * real
        else:
            spread = spread - spread.mean(-1, keepdim=True)
        groups = _pairs(_pairs(spread.flatten(1), 1), 1)
        return self._sum(spread.flatten(1), 0, wanted[..., 0]) + self._sum(groups, fine, wanted[..., 1])

    def _mixture(self, levels: Tensor) -> Tensor:
        """What a level takes of the two moments, [S, C, N, 2]."""
        index = level_index(levels).clamp(min=0).long()
        return self.mix[torch.arange(self.blocks, device=index.device), index]

    def _hide(self, logits: Tensor, e: int, position: Tensor | None) -> Tensor:
        if self.real is not None:
            logits = logits.masked_fill(self.counts[e] == 0, -torch.inf)
        if position is None:
            return logits
        last = ((torch.arange(logits.shape[-1], device=logits.device) + 1) << e).clamp(max=self.tokens) - 1
        return logits.masked_fill(last > position, -torch.inf)

    def _sum(self, weight: Tensor, e: int, amount: Tensor) -> Tensor:
        """Σ over blocks of amount · Σ over each block's groups of weight · mean value: [S, C, R, D].

        weight [S * R, groups], amount [S, C, N]. What a block adds to a row is computed once for all selections; for
        one, or where a block is one group, it is less work to scale the weights.
        """
        weight = weight.unflatten(-1, (self.blocks, -1))
        if amount.shape[1] == 1 or weight.shape[-1] == 1:
            scaled = weight.unflatten(0, (amount.shape[0], 1, -1)) * amount[:, :, None, :, None]
            return scaled.flatten(3) @ self.values[e]
        values = self.values[e].unflatten(0, (self.blocks, -1))
        piece = torch.bmm(weight.transpose(0, 1), values)
        piece = piece.unflatten(1, (amount.shape[0], -1)).transpose(0, 1)
        return (amount @ piece.flatten(2)).unflatten(-1, piece.shape[2:])

    def _mass(self, weight: Tensor, amount: Tensor) -> Tensor:
        """What :meth:`_sum` gives for values of one, [S, C, R]."""
        blocks = weight.unflatten(-1, (self.blocks, -1)).sum(-1)
        return amount @ blocks.unflatten(0, (amount.shape[0], -1)).mT


def _pairs(x: Tensor, dim: int) -> Tensor:
    """Sums of neighbours along ``dim``, 0 or 1."""
    return x[::2] + x[1::2] if dim == 0 else x[:, ::2] + x[:, 1::2]

"""The automatic mode: every head gets the setting that probes find best, and the report says how wrong it is.

Candidates differ in how importance becomes levels (exponent, dropping or not, the published modes if asked), in how
coarsely importance is pooled, in the cap of the variance bias and in whether the slope correction is added. A head's
choice is a row of a table, so everything here stays on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocate import BlockMask
from .candidates import (
    CAPS,
    VARIANTS,
    Candidate,
    Choice,
    candidates,
    constant,
    levels_at,
    levels_of,
    levels_of_all,
)
from .caps import per_head
from .config import PSAConfig
from .curves import TINY, between, shared_densities, smallest_density
from .probe import Rows, Scored, row_errors, sample_rows

CAPPED_ERROR = 1e3
"""What stands for an error that is not finite."""
BARRED = 1e9
"""Handicap of what must not be chosen."""
FINE_HANDICAP = 1.1
"""Factor on the squared error of finer importance. Its time, spent on density instead, would gain more on average; but
the heads that gain by it err most, in rows that few probes see."""
UNLIKE, DISTRUST = 0.045, 1.25
"""Total variation between coarse and finer importance above which a head's coarse one is distrusted, and the factor on
its candidates' squared errors then: finer importance is nearly always better there, which few probes often miss."""
MARGIN = 1.25
"""Spreads by which a measured error has to stay below ``target_error``."""
CHOOSERS_SHARE = 1 / 3
"""How much the rows that chose count in how high a curve of errors lies; its shape is of fresh rows alone."""
CHOSEN_AT = 0.15
"""Density at which candidates are compared where no budget says it."""
LADDER = (1 / 128, 1 / 64, 1 / 32, 0.06, 0.11, 0.2, 0.35, 0.5, 0.7)
"""Densities at which error curves are measured."""
ROWS_THAT_CHOOSE, ROWS_THAT_MEASURE = 3, 2
"""Sampled rows of a query block. A further row costs a third of a further block and tells as much where errors of rows
are alike; what is promised asks for more blocks, as errors may sit in few."""


@dataclass(frozen=True)
class Layer:
    """One attention layer's inputs in plan order, as :func:`select_auto` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    power: Tensor
    """Mean over the queries of every channel's square, float32 [B, H, D]."""
    importance: Callable[..., Tensor]
    """``importance()`` of all query blocks, float32 [B, H, M, N], or of ``only`` some, int64 [S]."""
    mask: BlockMask
    cap: Tensor | None
    config: PSAConfig
    scale: float
    is_causal: bool
    key_mask: Tensor | None
    finer: Callable[..., Tensor] | None = None
    """Importance pooled half as coarsely; heads that are not ``wanted``, bool [B, H], may be left out."""
    device_levels: Callable[..., Tensor] | None = None
    """The device's own way from importance and ``settings`` [B, H, 3] (exponent, keep_all, density) to levels."""

    def errors(self, rows: Rows, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
        """Squared errors [B, H, S, C, K, 2], the exact output's squared norms [B, H, S] and their unit [B, H], see
        :func:`row_errors`."""
        assert self.v is not None
        return row_errors(
            self.q,
            self.k,
            self.v,
            rows,
            scored,
            power=self.power,
            block_n=self.config.block_n,
            scale=self.scale,
            is_causal=self.is_causal,
            key_mask=self.key_mask,
        )

    def sample(self, salt: int, count: int, per_block: int) -> Rows:
        return sample_rows(self.q.shape[2], self.config.block_m, self.q.shape[1], count, per_block, salt, self.q.device)


@torch.no_grad()
def select_auto(layer: Layer, given: Choice | None) -> tuple[Tensor, Tensor, Tensor, Choice]:
    """Levels for every head, by probes or by a choice made before.

    Returns:
        levels uint8 [B, H, M, N], bias_cap float32 [B, H], shares float16 [B, H, M, N] of the slope correction, and
        the choice, with the error that probes measured (the given one's, where a choice was given).
    """
    choice = given
    if given is None and layer.v is not None:
        choice = choose(layer)
        if needs_curve(layer.config):
            choice = settle(layer, choice)
    if choice is None:
        choice = unmeasured(layer)
    levels, shares = lay_out(layer, choice)
    return levels, constant(CAPS, levels.device)[choice.cap], shares, choice


def unmeasured(layer: Layer) -> Choice:
    """The first candidate that is allowed, for every head of a plan made without v."""
    zero = torch.zeros(layer.q.shape[:2], device=layer.q.device)
    first = next(n for n, c in enumerate(candidates(layer.config)) if handicap(c, layer) < BARRED)
    unknown = zero + torch.nan
    return Choice(zero.long() + first, zero + float(layer.config.density or 1.0), unknown, unknown)


def lay_out(layer: Layer, choice: Choice) -> tuple[Tensor, Tensor]:
    """Levels, and the shares of the slope correction, that a choice means for every head."""
    importance, fine = layer.importance(), choice.fine
    if layer.finer is not None and (fine.device.type != "cpu" or bool(fine.any())):
        importance = torch.where(fine[..., None, None], layer.finer(wanted=fine), importance)
    if layer.device_levels is None:
        levels = levels_of(choice, importance, layer.mask, layer.cap, layer.config)
    else:
        levels = layer.device_levels(importance, settings=choice.settings)
    return levels, slope_shares(importance, levels, choice.slope)


def slope_shares(importance: Tensor, levels: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Importance times N where a pooled block of a head is to be corrected, else 0: float16, shape of ``levels``."""
    rows = importance / importance.sum(-1, keepdim=True).clamp(min=TINY)
    rows = (rows * importance.shape[-1]).clamp(max=6e4).masked_fill(levels <= 1, 0.0)
    if wanted is not None:
        rows = rows * wanted[..., None, None]
    return rows.to(torch.float16)


def needs_curve(config: PSAConfig) -> bool:
    """Whether the density has to be found on a curve of errors: for a target or a shared budget."""
    return config.target_error is not None or config.share_heads


def one_density(config: PSAConfig) -> PSAConfig:
    """The settings without what takes a curve: every head at the density at which candidates are compared."""
    if not needs_curve(config):
        return config
    changes = {"density": compared_at(config), "share_heads": False}
    if torch.compiler.is_compiling():
        from .compiled import constant_config

        return constant_config(config.key, **changes)
    return config.replace(**changes)


def compared_at(config: PSAConfig) -> float:
    """The density at which candidates are compared."""
    return float(config.density or min(CHOSEN_AT, config.max_density))


def ladder(config: PSAConfig) -> tuple[float, ...]:
    """The densities of a curve: those that can be chosen, but for 1, where nothing is wrong."""
    top, coarsest = config.max_density, 1.0 / config.max_level
    below = tuple(d for d in (coarsest, *(d for d in LADDER if d > 1.1 * coarsest)) if d < top)
    return below if top == 1.0 else (*below, top)


def choose(layer: Layer) -> Choice:
    """The best candidate of every head by probes, at the budget.

    All sampled rows take part in the choice. Its error is measured crosswise: each half of the sampled query blocks
    measures what the other half would have chosen.
    """
    config = layer.config
    step, tried = compared_at(config), candidates(config)
    count = config.probe_rows if not needs_curve(config) else -(-config.probe_rows // 2)
    rows = layer.sample(0, count, ROWS_THAT_CHOOSE)
    coarse, fine = _sampled_importance(layer, rows)
    squared, norms, _ = layer.errors(rows, _scored(layer, rows, step, coarse, fine))
    squared = squared.nan_to_num(CAPPED_ERROR, CAPPED_ERROR).flatten(3)
    factors = constant(tuple(handicap(c, layer) for c in tried), squared.device)
    barred = factors >= BARRED  # whatever its error, even none
    coarsely = constant(tuple(not c.fine for c in tried), squared.device)
    factors = torch.where(unlike(coarse, fine)[..., None] & coarsely, DISTRUST * factors, factors)
    best = lambda errors: (errors.sum(2) * factors).masked_fill(barred, torch.inf).argmin(dim=-1)  # noqa: E731
    winner = best(squared)
    crosswise = torch.empty_like(norms)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - (half.start or 0), None, 2) if norms.shape[2] > 1 else half
        crosswise[:, :, half] = _of(best(squared[:, :, other]), squared[:, :, half])
    error, spread = error_and_spread(crosswise, norms)
    own = error_and_spread(_of(winner, squared), norms)[0]
    error = torch.minimum(error, 2 * own)  # a half may choose far worse than the whole
    return Choice(winner, torch.full_like(error, step), error, torch.minimum(spread, error))


def _of(number: Tensor, squared: Tensor) -> Tensor:
    """Each head's own selection, by its number [B, H], among squared errors [B, H, S, C]: [B, H, S]."""
    return squared.gather(-1, number[:, :, None, None].expand(*squared.shape[:3], 1)).squeeze(-1)


def settle(layer: Layer, choice: Choice) -> Choice:
    """A choice at the densities that ``target_error`` or a shared budget calls for.

    Rows of their own measure what the chosen candidates err on a ladder of densities; how high that curve lies, the
    rows that chose help to tell, by what each half of them measures of the other's choice. The density is read off the
    curve, and so is the error.
    """
    config, target = layer.config, layer.config.target_error
    densities = constant(ladder(config), choice.candidate.device)
    rows = layer.sample(1, config.probe_rows, ROWS_THAT_MEASURE)
    squared, norms, unit = layer.errors(rows, _on_ladder(layer, rows, choice, densities))
    squared = squared[..., 0, 0].nan_to_num(CAPPED_ERROR, CAPPED_ERROR)
    errors, spreads = error_and_spread(squared, norms[..., None])
    there = between(densities, errors, choice.density[..., None]).clamp(min=TINY)
    higher = (CHOOSERS_SHARE * (choice.error[..., None] / there).square() + 1 - CHOOSERS_SHARE).sqrt()
    errors, spreads = higher * errors, higher * spreads
    if target is not None:
        margin = (MARGIN * spreads).nan_to_num(0.0)  # of a single query block nearly every row was measured
        density = smallest_density(errors + margin, densities, torch.full_like(choice.error, target))
    else:
        assert config.density is not None
        in_one_unit = higher * (unit / unit.amax(1, keepdim=True))[..., None]
        total = in_one_unit.square() * squared.sum(2)
        density = shared_densities(total, densities, config.density, least_densities(layer))
    found = (between(densities, x, density[..., None]).squeeze(-1) for x in (errors, spreads))
    settled = Choice(choice.candidate, density, *found)
    return settled.dense_where((density == 1) & errors.isfinite().all(-1))


def handicap(candidate: Candidate, layer: Layer) -> float:
    """The factor on a candidate's squared error that makes up for its cost."""
    if (candidate.fine and layer.finer is None) or (candidate.slope and not layer.config.slope):
        return BARRED
    return FINE_HANDICAP if candidate.fine else 1.0


def unlike(coarse: Tensor, fine: Tensor) -> Tensor:
    """Heads whose importance [B, H, S, N] differs much between the two ways of pooling, bool [B, H]."""
    first, second = (x / x.sum(-1, keepdim=True).clamp(min=TINY) for x in (coarse, fine))
    return 0.5 * (first - second).abs().sum(-1).mean(-1) > UNLIKE


def error_and_spread(squared: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """The relative error by squared errors and norms [B, H, S, ...] of sampled query blocks, and its standard
    deviation.

    The deviation is that of a quotient of sums over S independent draws, by the delta method; NaN from a single block.
    It knows only what the sample holds: errors that sit in few rows make it too small as often as the error itself.
    """
    count, norm = squared.shape[2], norms.sum(2).clamp(min=TINY)
    ratio = squared.sum(2) / norm
    away = (squared - ratio[:, :, None] * norms).square().sum(2) * (count / max(count - 1, 1))
    spread = 0.5 * away.sqrt() / norm / ratio.sqrt().clamp(min=TINY)
    return ratio.sqrt(), spread if count > 1 else torch.full_like(spread, torch.nan)


def least_densities(layer: Layer) -> Tensor:
    """What pins and caps let a head keep at least, [1|B, 1|H]."""
    mask, coarsest = layer.mask, 1.0 / layer.config.max_level
    if mask.pinned is None and layer.cap is None:
        return layer.power.new_full((1, 1), coarsest)
    least = layer.power.new_full((1, 1, 1, 1), coarsest)
    if layer.cap is not None:
        least = 1.0 / per_head(layer.cap, layer.q.shape[1])[:, :, None].float()
    if mask.pinned is not None:
        least = torch.where(mask.pinned, 1.0, least)
    if mask.visible is None:
        return least.mean((2, 3))
    return (least * mask.visible).sum((2, 3)) / mask.visible.sum((2, 3))


def _sampled_importance(layer: Layer, rows: Rows, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Coarse and finer importance [B, H, S, N] of the sampled query blocks; the coarse twice where none is finer."""
    blocks = rows.blocks[0]  # the same in every head
    coarse = layer.importance(only=blocks)
    return coarse, coarse if layer.finer is None else layer.finer(only=blocks, wanted=wanted)


def _scored(layer: Layer, rows: Rows, density: float, importance: Tensor, fine: Tensor) -> Scored:
    """Every candidate's levels at a density, on the sampled query blocks."""
    every = levels_of_all(density, importance, fine, _mask_of(layer, rows), layer.cap, layer.config)
    levels = torch.stack(every, dim=3)
    is_fine = constant(tuple(c.fine for c in candidates(layer.config)[:: len(VARIANTS)]), levels.device)
    source = torch.where(is_fine[:, None], fine[:, :, :, None], importance[:, :, :, None])
    caps = constant(CAPS, levels.device).expand(*levels.shape[:2], -1)
    return Scored(levels, slope_shares(source, levels), caps)


def _on_ladder(layer: Layer, rows: Rows, choice: Choice, densities: Tensor) -> Scored:
    """The chosen candidates' levels at several densities, on the sampled query blocks."""
    coarse, fine = _sampled_importance(layer, rows, choice.fine)
    importance = torch.where(choice.fine[..., None, None], fine, coarse)
    found = levels_at(densities, choice, importance, _mask_of(layer, rows), layer.cap, layer.config)
    levels = found.permute(1, 2, 3, 0, 4)
    shares = slope_shares(importance[:, :, :, None], levels, choice.slope[..., None])
    return Scored(levels, shares, constant(CAPS, levels.device)[choice.cap][..., None])


def _mask_of(layer: Layer, rows: Rows) -> BlockMask:
    return BlockMask(*(None if m is None else _rows_of(m, rows) for m in (layer.mask.visible, layer.mask.pinned)))


def _rows_of(x: Tensor, rows: Rows) -> Tensor:
    """[B|1, H|1, M, N] -> [B|1, H, S, N], the sampled query blocks of every head."""
    heads = rows.blocks.shape[0]
    index = rows.blocks[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1])
    return x.expand(-1, heads, -1, -1).gather(2, index)

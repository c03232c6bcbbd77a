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
    CANDIDATES,
    CAPS,
    VARIANTS,
    Candidate,
    Choice,
    candidates,
    constant,
    levels_of,
    levels_of_all,
    table,
)
from .config import PSAConfig
from .probe import Rows, Scored, row_errors, sample_rows

CAPPED_ERROR = 1e3
"""What stands for an error that is not finite."""
BARRED = 1e9
"""Handicap of what must not be chosen."""
CORRECTIONS = (2, 3)
"""Salts of fresh rows that measure a ``target_error`` again, each after moving along the curve by what was missed."""
MISSED = 1.1
"""A head whose measured error is more than so many times ``target_error`` runs dense."""
FINE_HANDICAP = 1.1
"""Factor on the squared error of finer importance. Its time, spent on density instead, would gain more on average; but
the heads that gain by it err most, in rows that few probes see."""
UNLIKE, DISTRUST = 0.08, 1.5
"""Total variation between coarse and finer importance above which a head's coarse one is distrusted, and the factor on
its candidates' squared errors then: finer importance is nearly always better there, which few probes often miss."""
TINY = torch.finfo(torch.float32).tiny
LADDER = (1 / 128, 1 / 64, 1 / 32, 0.06, 0.11, 0.2, 0.35, 0.65)
"""Densities at which error curves are measured."""


@dataclass(frozen=True)
class Layer:
    """One attention layer's inputs in plan order, as :func:`select_auto` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    importance: Tensor
    mask: BlockMask
    cap: Tensor | None
    config: PSAConfig
    scale: float
    is_causal: bool
    key_mask: Tensor | None
    finer: Callable[..., Tensor] | None = None
    """Importance pooled half as coarsely, ``finer(only=..., wanted=...)`` as :func:`psa.importance.importance`."""
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
            block_n=self.config.block_n,
            scale=self.scale,
            is_causal=self.is_causal,
            key_mask=self.key_mask,
        )

    def sample(self, salt: int, count: int) -> Rows:
        return sample_rows(self.q.shape[2], self.config.block_m, self.q.shape[1], count, salt, self.q.device)


@torch.no_grad()
def select_auto(layer: Layer, given: Choice | None) -> tuple[Tensor, Tensor, Tensor, Choice]:
    """Levels for every head, by probes or by a choice made before.

    Returns:
        levels uint8 [B, H, M, N], bias_cap float32 [B, H], shares float16 [B, H, M, N] of the slope correction, and
        the choice, with the error that fresh probes measured (the given one's, where a choice was given).
    """
    target, choice, curve = layer.config.target_error, given, None
    if given is None and layer.v is not None:
        choice, curve = choose(layer)
    if choice is None:
        choice = unmeasured(layer)
    finer = None if curve is None else finer_where(layer, curve.fine)
    levels, shares = lay_out(layer, choice, finer)
    if curve is not None:
        error, spread = measure(layer, levels, shares, choice, salt=1)
        if target is not None:
            aim = torch.full_like(error, target)
            for salt in CORRECTIONS:
                aim = aim / (error / target).clamp(min=1.0)
                choice = curve.meeting(aim)
                levels, shares = lay_out(layer, choice, finer)
                error, spread = measure(layer, levels, shares, choice, salt)
        choice = Choice(choice.candidate, choice.density, error, spread)
        if target is not None:
            missed = ~(error <= MISSED * target)
            levels, shares = _dense_where(missed, layer, levels, shares)
            choice = choice.dense_where(missed)
    return levels, constant(CAPS, levels.device)[choice.cap], shares, choice


def _dense_where(missed: Tensor, layer: Layer, levels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.ones((), dtype=levels.dtype, device=levels.device)
    exact = exact if layer.mask.visible is None else exact * layer.mask.visible
    missed = missed[..., None, None]
    return torch.where(missed, exact, levels), shares.masked_fill(missed, 0.0)


def unmeasured(layer: Layer) -> Choice:
    """The first candidate that is allowed, for every head of a plan made without v."""
    zero = torch.zeros(layer.importance.shape[:2], device=layer.q.device)
    first = next(n for n, c in enumerate(candidates(layer.config)) if handicap(c, layer) < BARRED)
    unknown = zero + torch.nan
    return Choice(zero.long() + first, zero + float(layer.config.density or 1.0), unknown, unknown)


def finer_where(layer: Layer, wanted: Tensor) -> Tensor | None:
    """Importance [B, H, M, N] pooled half as coarsely, for the heads that want it (bool [B, H]); None if none does."""
    if layer.finer is None or (wanted.device.type == "cpu" and not bool(wanted.any())):
        return None
    return layer.finer(wanted=wanted)


def lay_out(layer: Layer, choice: Choice, finer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Levels, and the shares of the slope correction, that a choice means for every head. ``finer``: importance of
    :func:`finer_where`, where it has been estimated already."""
    importance = layer.importance
    finer = finer_where(layer, choice.fine) if finer is None else finer
    if finer is not None:
        importance = torch.where(choice.fine[..., None, None], finer, importance)
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


def ladder(config: PSAConfig) -> tuple[float, ...]:
    """The densities that have to be probed: the budget alone, or those of a curve."""
    if not needs_curve(config):
        return (float(config.density or config.max_density),)
    top = config.max_density if config.density is None else 1.0
    below = tuple(d for d in LADDER if 1.0 / config.max_level <= d < top)
    return below if top == 1.0 and config.target_error is not None else (*below, top)  # at density 1 nothing is wrong


@dataclass(frozen=True)
class Curve:
    """Errors [B, H, P] of the best candidates [B, H, P] at densities [P]."""

    densities: Tensor
    errors: Tensor
    candidates: Tensor

    def at(self, density: Tensor) -> Choice:
        """Each head's candidate of the nearest probed density; what it errs there is left to be measured."""
        nearest = (density[..., None].log() - self.densities.log()).abs().argmin(-1, keepdim=True)
        unknown = torch.full_like(density, torch.nan)
        return Choice(self.candidates.gather(-1, nearest).squeeze(-1), density, unknown, unknown)

    @property
    def fine(self) -> Tensor:
        """Heads that want finer importance at any of the densities, bool [B, H]."""
        return table([c.fine for c in CANDIDATES], self.candidates).any(-1)

    def meeting(self, target: Tensor) -> Choice:
        return self.at(smallest_density(self.errors, self.densities, target))


def choose(layer: Layer) -> tuple[Choice, Curve | None]:
    """The best candidate of every head by probes, at the densities that budget or target call for.

    All sampled rows take part in the choice. With one density the error is measured crosswise: each half of the sampled
    query blocks measures what the other half would have chosen. With several the error is left open (NaN), to be
    measured at the density that comes out, and the curve is returned too.
    """
    config = layer.config
    steps, tried, single = ladder(config), candidates(config), not needs_curve(config)
    rows = layer.sample(0, config.probe_rows if single else -(-2 * config.probe_rows // 3))
    coarse, fine = _sampled_importance(layer, rows)
    squared, norms, unit = layer.errors(rows, _scored(layer, rows, steps, coarse, fine))
    squared = squared.nan_to_num(CAPPED_ERROR, CAPPED_ERROR).flatten(3).unflatten(3, (len(steps), len(tried)))
    factors = constant(tuple(handicap(c, layer) for c in tried), squared.device)
    barred = factors >= BARRED  # whatever its error, even none
    coarsely = constant(tuple(not c.fine for c in tried), squared.device)
    factors = torch.where(unlike(coarse, fine)[..., None] & coarsely, DISTRUST * factors, factors)[:, :, None]
    best = lambda errors: (errors.sum(2) * factors).masked_fill(barred, torch.inf).argmin(dim=-1)  # noqa: E731
    winner = best(squared)
    densities = constant(steps, squared.device)
    if single:
        density = torch.zeros_like(norms[:, :, 0]) + steps[0]
        crosswise = torch.empty_like(norms)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            other = slice(1 - (half.start or 0), None, 2) if norms.shape[2] > 1 else half
            number = best(squared[:, :, other])[:, :, None, :, None]
            part = squared[:, :, half]
            crosswise[:, :, half] = part.gather(-1, number.expand(*part.shape[:-1], 1))[..., 0, 0]
        error, spread = error_and_spread(crosswise, norms)
        own = squared[:, :, :, 0].gather(-1, winner[:, :, None].expand(*norms.shape, 1)).squeeze(-1)
        error = torch.minimum(error, 2 * error_and_spread(own, norms)[0])  # a half may choose far worse than the whole
        return Choice(winner.squeeze(-1), density, error, torch.minimum(spread, error)), None
    total, norm = squared.sum(2).gather(-1, winner[..., None]).squeeze(-1), norms.sum(2)
    curve = Curve(densities, (total / norm[..., None].clamp(min=TINY)).sqrt(), winner)
    if config.target_error is not None:
        return curve.meeting(torch.full_like(norm, config.target_error)), curve
    total = total * (unit / unit.amax(1, keepdim=True)).square()[..., None]  # heads in one unit
    return curve.at(shared_densities(total, densities, float(config.density or config.max_density))), curve


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
    """The relative error by squared errors and norms [B, H, S] of sampled query blocks, and its standard deviation.

    The deviation is that of a quotient of sums over S independent draws, by the delta method; NaN from a single block.
    It knows only what the sample holds: errors that sit in few rows make it too small as often as the error itself.
    """
    count, norm = squared.shape[2], norms.sum(2).clamp(min=TINY)
    ratio = squared.sum(2) / norm
    away = (squared - ratio[..., None] * norms).square().sum(2) * (count / max(count - 1, 1))
    spread = 0.5 * away.sqrt() / norm / ratio.sqrt().clamp(min=TINY)
    return ratio.sqrt(), spread if count > 1 else torch.full_like(spread, torch.nan)


def measure(layer: Layer, levels: Tensor, shares: Tensor, choice: Choice, salt: int) -> tuple[Tensor, Tensor]:
    """The relative error of the plan itself on rows of its own (by ``salt``), and its spread, [B, H]."""
    rows = layer.sample(salt, layer.config.probe_rows)
    scored = Scored(_rows_of(levels, rows)[:, :, :, None], _rows_of(shares, rows)[:, :, :, None], CAPS)
    squared, norms, _ = layer.errors(rows, scored)
    cap = choice.cap[..., None, None].expand(*squared.shape[:3], 1)
    return error_and_spread(squared[:, :, :, 0, :, 0].gather(-1, cap).squeeze(-1), norms)


def smallest_density(errors: Tensor, densities: Tensor, target: Tensor) -> Tensor:
    """The smallest density on the curve through (densities, errors [B, H, P]) that meets ``target`` [B, H], else 1.

    Errors are made monotone from the right and interpolated linearly in logarithms; but not up to density 1, where
    the error falls to zero at once.
    """
    log_target = target[..., None].log()
    curve = errors.clamp(min=1e-9).flip(-1).cummax(-1).values.flip(-1).log()
    meets = curve <= log_target
    first = meets.float().argmax(-1, keepdim=True)
    before = (first - 1).clamp(min=0)
    x, y = densities.log().expand_as(curve), curve
    x0, x1, y0, y1 = (t.gather(-1, i) for t in (x, y) for i in (before, first))
    step = ((y0 - log_target) / (y0 - y1).clamp(min=1e-9)).clamp(0, 1)
    step = step.masked_fill(x1 == 0, 1.0)
    found = torch.where(first == 0, x1, x0 + step * (x1 - x0)).exp()
    return torch.where(meets.any(-1, keepdim=True), found, torch.ones_like(found)).squeeze(-1)


def shared_densities(squared: Tensor, densities: Tensor, budget: float, points: int = 256) -> Tensor:
    """Densities [B, H] with mean ``budget`` that minimise the sum of squared errors over the heads of a layer.

    Curves [B, H, P] are interpolated linearly in logarithms on ``points`` densities; the multiplier is found by
    bisection.
    """
    log_d = densities.log()
    x = log_d[0] + torch.linspace(0, 1, points, device=squared.device) * (log_d[-1] - log_d[0])
    right = torch.searchsorted(log_d, x.contiguous()).clamp(1, len(densities) - 1)
    part = ((x - log_d[right - 1]) / (log_d[right] - log_d[right - 1])).clamp(0, 1)
    curve = squared.clamp(min=1e-20).flip(-1).cummax(-1).values.flip(-1).log()
    curve = (curve[..., right - 1] * (1 - part) + curve[..., right] * part).exp()
    cost = x.exp()
    low = torch.full_like(squared[:, :1, 0], -60.0)
    high = torch.full_like(low, 60.0)
    for _ in range(48):
        middle = 0.5 * (low + high)
        spent = cost[(curve + middle.exp()[..., None] * cost).argmin(-1)].mean(1, keepdim=True)
        high, low = torch.where(spent <= budget, middle, high), torch.where(spent <= budget, low, middle)
    density = cost[(curve + high.exp()[..., None] * cost).argmin(-1)]
    spare = (budget - density.mean(1, keepdim=True)).clamp(min=0)
    return (density + spare).clamp(max=1.0)


def _sampled_importance(layer: Layer, rows: Rows) -> tuple[Tensor, Tensor]:
    """Coarse and finer importance [B, H, S, N] of the sampled query blocks; the coarse twice where none is finer."""
    coarse = _rows_of(layer.importance, rows)
    return coarse, coarse if layer.finer is None else layer.finer(only=rows.blocks[0])  # the same blocks in every head


def _scored(layer: Layer, rows: Rows, ladder: tuple[float, ...], importance: Tensor, fine: Tensor) -> Scored:
    """Every candidate's levels at every density of the ladder, on the sampled query blocks."""
    mask = BlockMask(*(None if m is None else _rows_of(m, rows) for m in (layer.mask.visible, layer.mask.pinned)))
    every = [levels_of_all(density, importance, fine, mask, layer.cap, layer.config) for density in ladder]
    levels = torch.stack([levels for step in every for levels in step], dim=3)
    is_fine = constant(tuple(c.fine for c in candidates(layer.config)[:: len(VARIANTS)]), levels.device)
    source = torch.where(is_fine[:, None], fine[:, :, :, None], importance[:, :, :, None])
    return Scored(levels, slope_shares(source.repeat(1, 1, 1, len(ladder), 1), levels), CAPS)


def _rows_of(x: Tensor, rows: Rows) -> Tensor:
    """[B|1, H|1, M, N] -> [B|1, H, S, N], the sampled query blocks of every head."""
    heads = rows.blocks.shape[0]
    index = rows.blocks[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1])
    return x.expand(-1, heads, -1, -1).gather(2, index)

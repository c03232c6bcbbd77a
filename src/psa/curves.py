"""Curves of error over density, known at a few densities, and the densities that are read off them."""

import torch
from torch import Tensor
from torch.nn import functional

STEEPEST = 4.0
"""Exponent of the density beyond which a curve's fall between two measured points is a cliff: a needle's, or an
outlier's. Nobody knows where between them it is, so the curve is flat up to the second."""
TINY = torch.finfo(torch.float32).tiny


def smallest_density(errors: Tensor, densities: Tensor, target: Tensor) -> Tensor:
    """The smallest density on the curve through (densities, errors [B, H, P]) that meets ``target`` [B, H], else 1.

    Errors are made monotone from the right and read as :func:`between` reads them; but not up to density 1, where the
    error falls to zero at once.
    """
    log_target = target[..., None].log()
    x, y = densities.log().expand_as(errors), _falling(errors)
    meets = y <= log_target
    first = meets.float().argmax(-1, keepdim=True)
    before = (first - 1).clamp(min=0)
    x0, x1, y0, y1 = (t.gather(-1, i) for t in (x, y) for i in (before, first))
    found = torch.minimum(x0 + (y0 - log_target).clamp(min=0) / _slope(x0, x1, y0, y1).clamp(min=1e-9), x1)
    found = torch.where(first == 0, x1, found).exp()
    return torch.where(meets.any(-1, keepdim=True), found, torch.ones_like(found)).squeeze(-1)


def between(densities: Tensor, values: Tensor, density: Tensor) -> Tensor:
    """Values [B, H, P] at ``densities`` [P], read at ``density`` [B, H, Q].

    Linearly in logarithms, but flat before a cliff (see ``STEEPEST``); beyond the ends as there.
    """
    x, y, at = densities.log(), values.clamp(min=TINY).log(), density.log()
    right = torch.searchsorted(x, at.contiguous()).clamp(max=len(densities) - 1)
    left = (right - 1).clamp(min=0)
    x0, x1, y0, y1 = x[left], x[right], y.gather(-1, left), y.gather(-1, right)
    found = y0 - _slope(x0, x1, y0, y1) * (at - x0)
    return torch.where(at < x1, found, y1).exp()


def _slope(x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
    """How fast y falls from one point to the next; not at all before a cliff."""
    slope = (y0 - y1) / (x1 - x0).clamp(min=1e-9)
    return slope.masked_fill(slope > STEEPEST, 0.0)


def _falling(errors: Tensor) -> Tensor:
    """Logarithms of errors [B, H, P], monotone from the right."""
    return errors.clamp(min=1e-20).flip(-1).cummax(-1).values.flip(-1).log()


def shared_densities(
    squared: Tensor, densities: Tensor, budget: float, least: Tensor | None = None, points: int = 256
) -> Tensor:
    """Densities [B, H] with mean ``budget`` that minimise the sum of squared errors over the heads of a layer.

    Curves [B, H, P] are made monotone and read on ``points`` densities, see :func:`between`, and fall to zero at
    density 1; the multiplier is found by bisection. No head keeps less than ``least`` [1|B, 1|H].
    """
    first, last = densities[0].log(), densities[-1].log()
    cost = (first + torch.linspace(0, 1, points, device=squared.device) * (last - first)).exp()
    errors = (0.5 * _falling(squared)).exp()
    curve = between(densities, errors, cost.expand(*squared.shape[:2], -1)).square()
    curve, cost = functional.pad(curve, (0, 1)), functional.pad(cost, (0, 1), value=1.0).expand(*squared.shape[:2], -1)
    cost = cost if least is None else torch.maximum(cost, least[..., None])
    low = torch.full_like(squared[:, :1, 0], -60.0)
    high = torch.full_like(low, 60.0)

    def spent(multiplier: Tensor) -> Tensor:
        return cost.gather(-1, (curve + multiplier.exp()[..., None] * cost).argmin(-1, keepdim=True)).squeeze(-1)

    for _ in range(48):
        middle = 0.5 * (low + high)
        enough = spent(middle).mean(1, keepdim=True) <= budget
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    density = spent(high)
    spare = (budget - density.mean(1, keepdim=True)).clamp(min=0)
    return (density + spare).clamp(max=1.0)

"""The settings that the automatic mode tries on every head, and how a table of choices becomes levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .allocate import BlockMask, allocate_levels
from .config import PSAConfig
from .published import stretched_levels

CAPS = (1.5, 4.0)
"""Upper bounds of the variance bias, in nats."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a head.

    mode: how importance becomes levels; exponent and keep_all are of proportional mode; fine: importance pooled half as
    coarsely in both directions; cap: index into ``CAPS``.
    """

    exponent: float = 1.0
    keep_all: bool = True
    fine: bool = False
    cap: int = 0
    slope: bool = True
    mode: str = "proportional"

    @property
    def name(self) -> str:
        kind = f"p{self.exponent:g}" + ("" if self.keep_all else " drop") if self.mode == "proportional" else self.mode
        return f"{kind} cap{CAPS[self.cap]:g}" + (" slope" if self.slope else "") + (" fine" if self.fine else "")


COARSE = ((1.0, True, False), (0.75, True, False), (1.5, True, False), (1.5, False, False), (3.0, False, False))
FINE = ((1.0, True, True), (1.5, False, True), (3.0, False, True))
ALLOCATIONS = COARSE + FINE
"""exponent, keep_all, fine."""
VARIANTS = tuple((cap, slope) for cap in range(len(CAPS)) for slope in (True, False))
PROPORTIONAL = tuple(Candidate(*allocation, *variant) for allocation in ALLOCATIONS for variant in VARIANTS)
"""The first is used where nothing could be measured (a plan made without v)."""
PUBLISHED = tuple(
    Candidate(1.0, False, False, *variant, mode) for mode in ("topk", "thresholdbound") for variant in VARIANTS
)
CANDIDATES = PROPORTIONAL + PUBLISHED


def candidates(config: PSAConfig) -> tuple[Candidate, ...]:
    """What a configuration tries: the first of ``CANDIDATES``, every allocation in all ``VARIANTS``."""
    return CANDIDATES if config.published else PROPORTIONAL


@dataclass(frozen=True)
class Choice:
    """What was chosen, as tensors [B, H] so that nothing waits for the device.

    candidate (index into ``CANDIDATES``), density, error (relative, measured crosswise or on fresh rows; NaN where
    nothing was measured), spread (standard deviation of that measurement, by how the sampled rows
    differ; NaN too).
    """

    candidate: Tensor
    density: Tensor
    error: Tensor
    spread: Tensor

    def pack(self) -> Tensor:
        """float32 [B, H, 4]."""
        return torch.stack([self.candidate.float(), self.density, self.error, self.spread], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "Choice":
        return cls(packed[..., 0].round().long(), *packed[..., 1:4].unbind(-1))

    def dense_where(self, where: Tensor) -> "Choice":
        """Density 1 and no error in some heads [B, H]."""
        exact = (x.masked_fill(where, 0.0) for x in (self.error, self.spread))
        return Choice(self.candidate, self.density.masked_fill(where, 1.0), *exact)

    @property
    def settings(self) -> Tensor:
        """exponent, keep_all and density, float32 [B, H, 3]."""
        exponents = table([c.exponent for c in CANDIDATES], self.candidate)
        keep = table([float(c.keep_all) for c in CANDIDATES], self.candidate)
        return torch.stack([exponents, keep, self.density.expand_as(exponents)], dim=-1)

    @property
    def fine(self) -> Tensor:
        """Where importance is pooled less coarsely, bool [B, H]."""
        return table([c.fine for c in CANDIDATES], self.candidate)

    @property
    def cap(self) -> Tensor:
        """Index into ``CAPS``, int64 [B, H]."""
        return table([c.cap for c in CANDIDATES], self.candidate)

    @property
    def slope(self) -> Tensor:
        """1 where the slope correction is added, float32 [B, H]."""
        return table([float(c.slope) for c in CANDIDATES], self.candidate)


def levels_of(choice: Choice, importance: Tensor, mask: BlockMask, cap: Tensor | None, config: PSAConfig) -> Tensor:
    """Levels [B, H, M, N] of each head by its own candidate and density."""
    density = choice.density[..., None, None]
    found = allocate_levels(
        importance,
        mask_mode="proportional",
        density=density,
        block_n=config.block_n,
        exponent=table([c.exponent for c in CANDIDATES], choice.candidate)[..., None, None],
        keep_all=table([c.keep_all for c in CANDIDATES], choice.candidate)[..., None, None],
        cap=cap,
        mask=mask,
    )
    for mode in ("topk", "thresholdbound") if config.published else ():
        is_mode = table([c.mode == mode for c in CANDIDATES], choice.candidate)[..., None, None]
        found = torch.where(is_mode, stretched_levels(importance, mode, density, config.block_n, cap, mask), found)
    return found


def levels_at(
    densities: Tensor, choice: Choice, importance: Tensor, mask: BlockMask, cap: Tensor | None, config: PSAConfig
) -> Tensor:
    """Levels [P, B, H, M, N] of each head by its own candidate at several densities [P]."""
    count, batch = len(densities), len(choice.candidate)
    candidate = choice.candidate.repeat(count, 1)
    density = densities.repeat_interleave(batch)[:, None].expand_as(candidate)
    several = Choice(candidate, density, density, density)
    mask = BlockMask(_repeated(mask.visible, count), _repeated(mask.pinned, count))
    found = levels_of(several, importance.repeat(count, 1, 1, 1), mask, _repeated(cap, count), config)
    return found.unflatten(0, (count, batch))


def _repeated(x: Tensor | None, count: int) -> Tensor | None:
    """``count`` times the batch; as it is where it broadcasts anyway."""
    return x if x is None or x.shape[0] == 1 else x.repeat(count, *[1] * (x.ndim - 1))


def levels_of_all(
    density: float, importance: Tensor, fine: Tensor, mask: BlockMask, cap: Tensor | None, config: PSAConfig
) -> list[Tensor]:
    """Levels [B, H, S, N] of every allocation that ``candidates(config)`` holds, in their order, at one density.

    importance, fine: [B, H, S, N], the estimates of the coarse and of the fine allocations.
    """
    batch, count = importance.shape[0], len(ALLOCATIONS)
    exponents = constant(tuple(exponent for exponent, _, _ in ALLOCATIONS), importance.device)
    keep = constant(tuple(keep for _, keep, _ in ALLOCATIONS), importance.device)
    found = allocate_levels(
        torch.cat([importance.repeat(len(COARSE), 1, 1, 1), fine.repeat(len(FINE), 1, 1, 1)]),
        mask_mode="proportional",
        density=density,
        block_n=config.block_n,
        exponent=exponents.repeat_interleave(batch)[:, None, None, None],
        keep_all=keep.repeat_interleave(batch)[:, None, None, None],
        cap=_repeated(cap, count),
        mask=BlockMask(_repeated(mask.visible, count), _repeated(mask.pinned, count)),
    )
    levels = list(found.unflatten(0, (count, batch)))
    for mode in ("topk", "thresholdbound") if config.published else ():
        levels.append(stretched_levels(importance, mode, density, config.block_n, cap, mask))
    return levels


def table(values: Sequence[float], index: Tensor) -> Tensor:
    """values[index], on the device of ``index``."""
    return constant(tuple(values), index.device)[index]


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return _made_once(values, type(values[0]), device)


@cache
def _made_once(values: tuple[float, ...], kind: type, device: torch.device) -> Tensor:
    """A small table on the device, so that captured graphs copy nothing from the host. kind: 1 and True hash alike."""
    return torch.tensor(values, device=device)

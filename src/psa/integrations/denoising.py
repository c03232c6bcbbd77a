"""Which denoising step a model call belongs to, and what each step gets.

The step is read from the timestep of the call: its place among the scheduler's timesteps. Nothing counts calls, so two
passes of guidance, two experts, cached, interrupted and repeated runs all read right.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import PSAConfig
from ..errors import ConfigError, PSAWarning

SHORT = 1536
"""Tokens up to which the automatic mode's choosing costs what it saves, or more: benchmarks/short.py."""
DensitySchedule = Callable[[int, int], float | None] | Sequence[float | None]
NEAR = 0.02
"""Share of the largest timestep by which a call's timestep may differ from the scheduler's, e.g. by rounding."""
READINGS = ((0.0, 1.0), (0.0, 1e-3), (1.0, -1e-3))
"""What models are sent for a scheduler's timestep t, as (a, b) of a + b t: t, a fraction, or (Lumina 2, Z-Image) its
complement to 1."""


@dataclass(frozen=True)
class Schedule:
    """What a layer gets at a step.

    Attributes:
        warmup_steps, dense_last_steps: first and last steps that stay dense.
        dense_layers: layers that always stay dense.
        density: of each step (None = dense): a function of (step, steps), or a list that is stretched over the steps.
        min_queries: calls with no more tokens than this stay dense; None: :data:`SHORT` in the automatic mode, else 0.
    """

    config: PSAConfig
    warmup_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: frozenset[int] = frozenset()
    density: DensitySchedule | None = None
    min_queries: int | None = None

    def at(self, step: int, steps: int | None, layer: int) -> PSAConfig | None:
        """The settings of a layer at a step; None means dense.

        Raises:
            ConfigError: where the number of steps is needed but not known (a model without its pipeline).
        """
        if self.config.type == "dense" or step < self.warmup_steps or layer in self.dense_layers:
            return None
        if self.dense_last_steps == 0 and self.density is None:
            return self.config
        if steps is None:
            raise ConfigError(
                "dense_last_steps and density_schedule need the number of steps; enable PSA on the pipeline, "
                "whose scheduler knows it, not on the bare model"
            )
        if step >= steps - self.dense_last_steps:
            return None
        if self.density is None:
            return self.config
        if callable(self.density):
            density = self.density(step, steps)
        else:
            density = self.density[min(step, steps - 1) * len(self.density) // steps]
        return None if density is None else self.config.replace(density=density)

    def longest_dense(self, config: PSAConfig) -> int:
        """The number of tokens up to which calls with these settings stay dense."""
        if self.min_queries is not None:
            return self.min_queries
        return SHORT if config.mask_mode == "auto" else 0

    def sparse_steps(self, first: int, steps: int | None) -> int | None:
        """How many of a run's steps from the ``first`` on may be sparse; None where that is not known."""
        return None if steps is None else max(1, steps - max(first, self.warmup_steps) - self.dense_last_steps)

    def warn_if_never_sparse(self, steps: int | None) -> None:
        if self.config.type == "psa" and steps is not None and steps <= self.warmup_steps + self.dense_last_steps:
            warnings.warn(
                f"PSA never ran: all {steps} steps are dense (warmup_steps={self.warmup_steps}, "
                f"dense_last_steps={self.dense_last_steps}); take more steps, or warmup_steps=0 (--no_warmup)",
                PSAWarning,
                stacklevel=2,
            )


@dataclass
class StepReader:
    """Reads the step from the timesteps of model calls; one for all models of a pipeline.

    Attributes:
        step: of the last call, from 0.
        steps: in the run; None when no scheduler tells.
        run: counts runs, so that measurements of the last one can be told apart.
    """

    step: int = 0
    steps: int | None = None
    run: int = 0
    _source: Tensor | None = field(default=None, repr=False)
    _table: list[float] = field(default_factory=list, repr=False)
    _reading: tuple[float, float] | None = field(default=None, repr=False)
    _seen: list[float] = field(default_factory=list, repr=False)

    def read(self, timestep: Any, scheduler: Any = None) -> int:
        """The step of a call.

        Args:
            timestep: number or tensor; of several the largest counts (image-to-video marks clean frames with 0).
            scheduler: diffusers scheduler with the ``timesteps`` of this run; None orders calls among themselves.
        """
        times = getattr(scheduler, "timesteps", None)
        if isinstance(times, Tensor) and times is not self._source and times.numel():
            self._source, self._reading = times, None
            self._table = list(dict.fromkeys(times.flatten().tolist()))
            self._begin()
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        dtype = timestep.dtype if isinstance(timestep, Tensor) and timestep.dtype.is_floating_point else torch.float32
        step = self._look_up(value, dtype, scheduler) if isinstance(times, Tensor) and self._table else None
        self.steps = None if step is None else len(self._table)
        if step is None:
            step = self._order(value)
        elif step < self.step:
            self._begin()
        self.step = step
        return step

    def _begin(self) -> None:
        self.run += 1
        self.step = 0
        self._seen = []

    def _look_up(self, value: float, dtype: torch.dtype, scheduler: Any) -> int | None:
        """Place among the scheduler's timesteps, as the pipeline may have rounded, divided or turned them."""
        found = []
        for reading in READINGS if self._reading is None else (self._reading,):
            start, factor = reading
            sent = (start + torch.tensor(self._table, dtype=torch.float64).to(dtype) * factor).double()
            distance = (sent - value).abs() / sent.abs().max().clamp(min=1e-12)
            nearest = float(distance.min())
            tied = (distance <= nearest + 2 * torch.finfo(dtype).eps * (factor != 1)).nonzero().flatten().tolist()
            if nearest <= NEAR:
                # Readings are settled by the first call of a run: the one that makes it the first step is believed.
                found.append(((tied[0] > 0, start != 0, nearest), reading, tied))
        if not found:
            self._reading = None
            return None
        _, self._reading, tied = min(found)
        if len(tied) == 1:
            return tied[0]
        # Rounding made neighbours equal: the scheduler's own counter tells which one it is.
        index = getattr(scheduler, "step_index", None) or 0
        return index if index in tied else min(max(self.step, tied[0]), tied[-1])

    def _order(self, value: float) -> int:
        """Without a scheduler: equal timesteps are one step, and a step back to where the run came from starts anew."""
        seen = self._seen
        turned = len(seen) > 1 and value != seen[-1] and (value > seen[-1]) != (seen[-1] > seen[-2])
        if turned:
            self._begin()
            seen = self._seen
        if not seen or value != seen[-1]:
            seen.append(value)
        return len(seen) - 1

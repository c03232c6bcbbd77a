"""One enabled diffusers model: what it knows of the current call, and how its attention calls are served."""

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PSAConfig
from ..errors import ConfigError, PSAWarning, ShapeError
from ..functional import plan_then_attend
from ..reorder import SemanticState
from ..state import ProbeState
from .denoising import Schedule, StepReader
from .layout import Layout, read_layout
from .stats import Stats

MASKED = -1e4
"""An additive mask of at most this hides a token; 0 shows it. Anything between is a bias, which stays dense."""

DENSE = PSAConfig(type="dense", use_rearrange=False)

CALLS = 4
"""Calls of one step that the automatic mode tells apart, such as the passes of guidance; later ones share a choice."""


@dataclass(eq=False)
class Session:
    """Settings and state of one enabled model; its processors and its hook share it, copies of the model copy it.

    Attributes:
        names: of the attention modules served, by layer index.
        dense_frames: first and last latent frames whose tokens read and are read in full, like text.
        layout: of the current call.
        arguments: names of what the model's forward takes.
        model: weak reference to the model.
        part: the model's name in its pipeline.
        probes: choices of the automatic mode in this run, by (layer and call of the step, step).
        call: which call of the current step this is, e.g. the second pass of guidance; begins anew with every step.
        closed: disabled; its processors then pass everything through.
    """

    schedule: Schedule
    reader: StepReader
    model_name: str
    names: list[str]
    text_position: str | None = None
    given_layout: Layout | None = None
    dense_frames: tuple[int, int] = (0, 0)
    backend: str = "auto"
    scheduler: Any = None
    pipeline: Any = None
    layout: Layout | None = None
    part: str = "transformer"
    arguments: tuple[str, ...] = ()
    model: Any = None
    stats: Stats = field(default_factory=Stats)
    probes: ProbeState = field(default_factory=ProbeState)
    closed: bool = False
    run: int = -1
    told: set[str] = field(default_factory=set)
    call: int = 0
    place: tuple[int, int] | None = None
    masks: dict[int, tuple[Tensor, Tensor | None, bool]] = field(default_factory=dict, repr=False)
    orders: dict[str, SemanticState] = field(default_factory=dict, repr=False)
    """Centroids of each layer's last clustering, where the next one starts."""
    processors: dict[int, Any] = field(default_factory=dict, repr=False)
    """By layer index, weakly: the processor that serves it."""

    def __post_init__(self) -> None:
        self.id = next(_IDS)
        SESSIONS[self.id] = self

    def __getstate__(self) -> dict[str, Any]:
        # The pipeline stays behind: a copied model reads its steps from the copied scheduler.
        fresh = {"pipeline": None, "model": None, "masks": {}, "orders": {}, "processors": {}, "stats": Stats()}
        return {**self.__dict__, **fresh, "probes": self.probes if self.probes.replay else ProbeState()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Session.__post_init__(self)

    # -- before each call of the model -------------------------------------------------------------------------

    def begin_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads step and token layout from the arguments of the model's forward."""
        self.masks.clear()
        layout, timestep = read_layout(model, args, kwargs, self.text_position)
        self.layout = self.given_layout or layout
        if any(self.dense_frames) and self.schedule.config.type == "psa" and not self.closed:
            self._check_frames(self.layout)
        pipeline = self.pipeline() if self.pipeline is not None else None
        if pipeline is not None:
            self.scheduler = pipeline.scheduler
        if timestep is None:
            raise ConfigError(f"{self.model_name}: called without a timestep, which tells the denoising step")
        self.reader.read(timestep, self.scheduler)
        place = (self.reader.run, self.reader.step)
        self.call = min(self.call + 1, CALLS - 1) if place == self.place else 0
        self.place = place
        if self.run != self.reader.run:
            self.run = self.reader.run
            self.stats.clear()
            self.probes.clear()
            self.orders.clear()
            self.probes.steps = self.schedule.sparse_steps(self.reader.step, self.reader.steps)
            self.schedule.warn_if_never_sparse(self.reader.steps)
        self.probes.settle()

    # -- each attention call -----------------------------------------------------------------------------------

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
        dense: Callable[[], Tensor], parallel: Any = None, exact_ring: bool = False,
    ) -> Tensor:  # fmt: skip
        """Attention of one layer, by PSA or by ``dense()``.

        Args:
            q, k, v: [B, L, H, D]; under context parallelism this process's share of L.
            mask: None, [B, L], [B, 1|H, 1, L] or [B, 1, L, L], bool or additive.
            parallel: diffusers' ContextParallelConfig, if the sequence is split over processes.
            exact_ring: with ring, dense calls go through PSA at level 1: the model's backend returns no lse.
        """
        step = self.reader.step
        config = self.schedule.at(step, self.reader.steps, layer)
        split = 1 if parallel is None else parallel.ring_degree * parallel.ulysses_degree
        if step < self.schedule.warmup_steps and self._sparse_later(layer) and mask is None and parallel is None:
            (self.layout or Layout(None)).text_in(q.shape[1], self.model_name)  # what is wrong is told at once
        if config is not None and (tokens := q.shape[1] * split) <= (least := self.schedule.longest_dense(config)):
            self._tell(
                f"calls of {tokens} tokens stay dense: up to {least}, choosing what to keep costs what it saves; "
                "min_queries=0 (--min_queries 0) runs PSA all the same"
            )
            config = None
        key_mask, plain = self._key_mask(mask, q.shape[0], k.shape[1]) if config is not None else (None, False)
        ring = parallel is not None and parallel.ring_degree > 1
        if not plain and config is not None:
            self._tell("an attention mask that says more than which tokens are padding; such calls stay dense")
        if config is None or self.closed or not plain:
            self.stats.count(layer, step)
            if not (ring and exact_ring):
                return dense()
            config, key_mask = DENSE, None
        if parallel is None:
            return self._sparse(layer, config, q, k, v, scale, key_mask)
        if key_mask is not None:
            raise ConfigError(
                f"{self.model_name}: context parallelism does not take padded tokens; pass prompts of one length"
            )
        from .parallel import distributed_attention

        serve = functools.partial(self._ring_chunk, itertools.count()) if ring else self._all_tokens
        return distributed_attention(q, k, v, scale, functools.partial(serve, layer, config, parallel), parallel)

    def _sparse_later(self, layer: int) -> bool:
        """Whether a layer that is dense in the first steps is meant to be sparse in others."""
        schedule, steps = self.schedule, self.reader.steps
        left = steps is None or steps > schedule.warmup_steps + schedule.dense_last_steps
        return left and schedule.config.type == "psa" and layer not in schedule.dense_layers and not self.closed

    def _sparse(
        self,
        layer: int,
        config: PSAConfig,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        key_mask: Tensor | None,
    ) -> Tensor:
        """PSA on the whole sequence, [B, L, H, D]."""
        layout = self.layout or Layout(None)
        length = q.shape[1]
        text = layout.text_in(length, self.model_name)
        grid, position = layout.grid, "last" if layout.text_position == "last" else "first"
        shift = 0
        if any(self.dense_frames):
            grid, text, position, shift = self._pin_frames(layout, text)
        if shift:
            q, k, v = (x.roll(shift, 1) for x in (q, k, v))
            key_mask = None if key_mask is None else key_mask.roll(shift, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa, name = q.shape[1] != k.shape[1], self._name(layer)
        out, plan = plan_then_attend(
            q, k, v, config, self.backend, scale=scale, grid=grid if config.use_rearrange else None, text_length=text,
            text_position=position, enable_gqa=gqa, key_mask=key_mask, probes=self.probes, layer=name,
            step=self.reader.step, state=self.orders.get(name),
        )  # fmt: skip
        if plan.reorder_state is not None:
            self.orders[name] = plan.reorder_state
        self.stats.count(layer, self.reader.step, plan.density_per_head.mean())
        out = out.transpose(1, 2)
        return out.roll(-shift, 1) if shift else out

    def _name(self, layer: int, chunk: int | None = None) -> str:
        """By which the automatic mode knows a layer in one of the calls of a step (and a chunk of ring's keys)."""
        name = f"{self.part}.{self.names[layer]}" + (f"#{self.call}" if self.call else "")
        return name if chunk is None else f"{name}@{chunk}"

    def _pin_frames(self, layout: Layout, text: int) -> tuple[tuple[int, int, int], int, str, int]:
        """Grid without the dense frames, and the roll that brings last frames, text, first frames together in front."""
        first, last = self.dense_frames
        t, h, w = self._check_frames(layout)
        shift = last * h * w + (text if layout.text_position == "last" else 0)
        return (t - first - last, h, w), text + (first + last) * h * w, "first", shift

    def _check_frames(self, layout: Layout) -> tuple[int, int, int]:
        """The grid. Raises ShapeError where the dense frames leave nothing of it."""
        if layout.grid is None:
            raise ShapeError(f"{self.model_name}: dense frames need a grid, which this model does not tell")
        (first, last), frames = self.dense_frames, layout.grid[0]
        if first + last >= frames:
            raise ShapeError(
                f"{self.model_name}: {first} first and {last} last dense frames leave none of the {frames} latent "
                "frames"
            )
        return layout.grid

    # -- over several processes --------------------------------------------------------------------------------

    def _all_tokens(
        self, layer: int, config: PSAConfig, parallel: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """Ulysses: every token of some heads, each process's share of text and of video one after the other."""
        from .parallel import shares

        layout, length = self.layout or Layout(None), q.shape[1]
        text = layout.text_in(length, self.model_name)
        if not text:
            return self._sparse(layer, config, q, k, v, scale, None)
        counts = (text, length - text) if layout.text_position == "first" else (length - text, text)
        parts = [shares(count, parallel.ulysses_degree) for count in counts]
        places = torch.arange(length, device=q.device).split([n for pair in zip(*parts, strict=True) for n in pair])
        order = torch.cat((*places[0::2], *places[1::2]))
        out = self._sparse(layer, config, q[:, order], k[:, order], v[:, order], scale, None)
        return out[:, order.argsort()]

    def _ring_chunk(
        self, chunks: Iterator[int], layer: int, config: PSAConfig, parallel: Any, q: Tensor, k: Tensor, v: Tensor,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Ring: this process's queries and one process's keys; blocks are selected within the chunk."""
        layout, world = self.layout or Layout(None), parallel.ring_degree
        if layout.text_in(q.shape[1] * world, self.model_name):
            raise ConfigError(f"{self.model_name}: text tokens in its self-attention; use ulysses, not ring")
        if any(self.dense_frames):
            raise ConfigError("dense_first_frames and dense_last_frames do not work with ring; use ulysses")
        grid = layout.grid
        # Whole frames per process: chunks are smaller grids. Otherwise tokens keep their order.
        chunk = (grid[0] // world, *grid[1:]) if grid is not None and grid[0] % world == 0 else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        name = self._name(layer, next(chunks))
        (out, lse), plan = plan_then_attend(
            q, k, v, config, self.backend, scale=scale, grid=chunk if config.use_rearrange else None, return_lse=True,
            probes=self.probes, layer=name, step=self.reader.step, state=self.orders.get(name),
        )  # fmt: skip
        if plan.reorder_state is not None:
            self.orders[name] = plan.reorder_state
        if config is not DENSE:
            self.stats.count(layer, self.reader.step, plan.density_per_head.mean())
        return out.transpose(1, 2), lse.transpose(1, 2)

    # -- masks -------------------------------------------------------------------------------------------------

    def _tell(self, text: str) -> None:
        """Warns, once for each text, of calls that stay dense."""
        if text not in self.told and not self.closed:
            self.told.add(text)
            warnings.warn(f"{self.model_name}: {text}", PSAWarning, stacklevel=2)

    def _key_mask(self, mask: Tensor | None, batch: int, length: int) -> tuple[Tensor | None, bool]:
        """(bool [B, L] or None where all tokens are real, whether the mask says no more than that)."""
        if mask is None:
            return None, True
        found = self.masks.get(id(mask))
        if found is None:
            found = self.masks[id(mask)] = (mask, *_read_mask(mask, batch, length))
        return found[1], found[2]


def _read_mask(mask: Any, batch: int, length: int) -> tuple[Tensor | None, bool]:
    if (
        not isinstance(mask, Tensor)
        or mask.ndim not in (2, 3, 4)
        or mask.shape[-1] != length
        or mask.shape[0] not in (1, batch)
    ):
        return None, False
    shown = mask if mask.dtype == torch.bool else mask > MASKED / 2
    if mask.dtype != torch.bool and bool((shown & (mask != 0)).any()):
        return None, False
    if bool(shown.all()):
        return None, True
    rows = shown.reshape(shown.shape[0], -1, length)
    key_mask = rows.any(1)
    # Queries that are padding may see nothing; all others must see the same keys.
    plain = bool(((rows == key_mask[:, None]).all(-1) | ~rows.any(-1)).all())
    return (key_mask.expand(batch, -1), True) if plain else (None, False)


_IDS = itertools.count()
SESSIONS: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()
"""Sessions by number: compiled graphs carry a tensor [session, layer] instead of Python objects."""

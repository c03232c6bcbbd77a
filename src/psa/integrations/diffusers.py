"""`psa.enable` for diffusers: each self-attention layer's own processor, run with PSA for its attention call.

Models that go through diffusers' dispatcher get a backend registered there. Processors that call
``scaled_dot_product_attention`` directly (CogVideoX, Mochi, Allegro) run as they are, with that one name bound to PSA.
No file, class or global setting of diffusers is changed; :meth:`Handle.disable` puts the processors back.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from .. import models, presets
from ..backends import check_name
from ..config import PSAConfig
from ..errors import ConfigError, PSAError
from ..functional import resolve_config
from ..plan import choice_notes
from ..state import ProbeState
from .denoising import DensitySchedule, Schedule, StepReader
from .hooks import ReadCall, attach, layers, unwrap
from .layout import Layout, parameters
from .processors import is_open, is_routed
from .session import Session
from .stats import measured, summary


def supports(target: object) -> bool:
    return isinstance(unwrap(target), (DiffusionPipeline, ModelMixin))


def enable_model(
    target: Any,
    preset: str | None = None,
    config: PSAConfig | None = None,
    density: float | None = None,
    *,
    warmup_steps: int | None = None,
    dense_last_steps: int = 0,
    dense_layers: Sequence[int] = (),
    dense_first_frames: int = 0,
    dense_last_frames: int = 0,
    density_schedule: DensitySchedule | None = None,
    min_queries: int | None = None,
    text_position: str | None = None,
    layout: Layout | None = None,
    attention_config: str | None = None,
    backend: str = "auto",
    replay: ProbeState | str | Path | None = None,
    replace: bool = False,
) -> "Handle":
    """Switches PSA on in a diffusers pipeline (all of its transformers) or model, until the handle disables it.

    Args:
        preset: of the model's section, ``"section/preset"``, or ``"default"``.
        config: settings instead of a preset; ``psa.PSAConfig()`` without either.
        density: share of the work to keep, over preset or config.
        warmup_steps, dense_last_steps: denoising steps that stay dense; the former defaults to the preset's.
        dense_layers: layer indices (negative from the end) that stay dense.
        dense_first_frames, dense_last_frames: latent frames that read and are read in full.
        density_schedule: density of each step: a function of (step, steps) or a list stretched over the steps.
        min_queries: calls with no more tokens than this stay dense. Default: 1536 in the automatic mode, where shorter
            sequences cost more to choose for than attention itself; else 0. Context parallelism counts all processes'.
        text_position: ``"first"`` or ``"last"``, for models that psa does not know.
        layout: how the tokens are made up, instead of reading it from the model.
        attention_config: a presets file laid over the built-in one.
        backend: as in :func:`psa.psa_attention`.
        replay: choices of the automatic mode from an earlier run (``handle.probe_state``, or the file it was saved to),
            to be used again instead of probing.
        replace: on an enabled model, take over until disabled instead of raising.

    Raises:
        ConfigError: settings that are not valid, or a model that is enabled already.
        PSAError: a model without attention layers that PSA can serve.
    """
    target_model = unwrap(target)
    settings = _settings(target_model, preset, config, density, attention_config)
    check_name(backend)
    found = {name: model for name, model in _transformers(target) if any(layers(unwrap(model)))}
    if not found:
        raise PSAError(f"enable: {type(target_model).__name__} has no transformer with self-attention layers")
    if not replace:
        for model in found.values():
            if any(is_open(attn.processor) for _, attn in layers(unwrap(model))):
                raise ConfigError("enable: PSA is on already; disable its handle first, or pass replace=True")
    _check(
        dense_first_frames=dense_first_frames, dense_last_frames=dense_last_frames, dense_last_steps=dense_last_steps
    )
    warmup = settings.warmup_steps if warmup_steps is None else warmup_steps
    _check(warmup_steps=warmup, min_queries=0 if min_queries is None else min_queries)
    if text_position not in (None, "first", "last", "none"):
        raise ConfigError(f"text_position: {text_position!r} is none of 'first', 'last', 'none'")
    pipeline = weakref.ref(target) if isinstance(target, DiffusionPipeline) else None
    reader = StepReader()
    sessions = {}
    for name, model in found.items():
        names = [layer for layer, _ in layers(unwrap(model))]
        dense = _indices(dense_layers, names)
        schedule = Schedule(settings, warmup, dense_last_steps, dense, density_schedule, min_queries)
        _check_schedule(schedule)
        sessions[name] = Session(
            schedule, reader, type(unwrap(model)).__name__, names, text_position, layout,
            (dense_first_frames, dense_last_frames), backend, getattr(target, "scheduler", None), pipeline, part=name,
            arguments=parameters(type(unwrap(model))), probes=_replaying(replay, settings, name),
        )  # fmt: skip
    return Handle(found, sessions)


class Handle:
    """An enabled pipeline or model: what it measured, and the way back. Handles of one model may end in any order."""

    def __init__(self, found: dict[str, Any], sessions: dict[str, Session]) -> None:
        self.sessions = sessions
        self._models = found
        self._hooks = []
        for name, model in found.items():
            attach(unwrap(model), sessions[name], stacked=True)
            self._hooks.append(model.register_forward_pre_hook(ReadCall(sessions[name]), with_kwargs=True))

    @property
    def config(self) -> PSAConfig:
        return next(iter(self.sessions.values())).schedule.config

    @property
    def stats(self) -> dict[str, Any]:
        """Of the last run: densities over all calls, per step and, in ``models``, per layer and step. Reads the device.

        ``density`` is that of the sparse calls, None before the first; ``overall_density`` counts dense calls as 1.
        With the automatic mode ``choices`` has one row per probe: layer (``#1``: in the second call of its step), step,
        the last step that used it (``until``), settings with the heads that got them, density, and the relative error
        that probes measured. ``notes`` says where heads run dense, as no density meets ``target_error``. ``error`` and
        ``worst_error`` are those of all calls, None where nothing was measured.
        """
        now = self._of_this_run()
        each = {name: s.stats.values() if s in now else {} for name, s in self.sessions.items()}
        whole = {(i * 10**6 + layer, step): v for i, vs in enumerate(each.values()) for (layer, step), v in vs.items()}
        total = summary(whole)
        del total["layers"]
        choices, errors = measured([s.probes for s in now])
        models = {name: summary(values) for name, values in each.items()}
        probed = [(s, layer, step) for s in now for layer, step in s.probes.probed]
        notes = [
            f"{layer}, step {step}: {note}"
            for s, layer, step in probed
            for note in choice_notes(s.schedule.config, s.probes.history[layer, step])
        ]
        return {**total, **errors, "models": models, "choices": choices, "notes": notes}

    @property
    def density(self) -> float | None:
        """``stats["overall_density"]``, without the rest."""
        counted = [value for s in self._of_this_run() for value in s.stats.values().values()]
        calls = sum(sparse + dense for _, sparse, dense in counted)
        return sum(density * sparse + dense for density, sparse, dense in counted) / calls if calls else None

    @property
    def probe_state(self) -> ProbeState:
        """What the automatic mode chose in the last run: ``.save(path)``, then ``psa.enable(..., replay=path)``."""
        state = ProbeState()
        for session in self._of_this_run():
            state.add(session.probes)
        return state

    def _of_this_run(self) -> list[Session]:
        return [s for s in self.sessions.values() if s.run == s.reader.run]

    @property
    def step(self) -> tuple[int, int | None]:
        """The denoising step of the last call, from 0, and how many there are."""
        reader = next(iter(self.sessions.values())).reader
        return reader.step, reader.steps

    def disable(self) -> None:
        """Puts the processors back as they were; a second call does nothing."""
        for session in self.sessions.values():
            session.closed = True
        for hook in self._hooks:
            hook.remove()
        for model in self._models.values():
            for _, attn in layers(unwrap(model)):
                processor = attn.processor
                while is_routed(processor) and processor.psa_session.closed:
                    processor = processor.psa_previous
                if processor is not attn.processor:
                    attn.processor = processor
        self._models, self._hooks = {}, []

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = ", ".join(f"{name}: {len(s.names)} layers" for name, s in self.sessions.items())
        return f"<psa on {state}>" if self._models else "<psa, disabled>"


# -- what is enabled -------------------------------------------------------------------------------------------------


def _transformers(target: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, DiffusionPipeline):
        for name, part in target.components.items():
            if name.startswith("transformer") and isinstance(part, nn.Module):
                yield name, part
    else:
        yield "transformer", target


def _settings(
    target: Any, preset: str | None, config: PSAConfig | None, density: float | None, file: str | None
) -> PSAConfig:
    if preset is None:
        return resolve_config(config, density)
    if config is not None:
        raise ConfigError("enable: preset and config exclude each other; give one")
    model = "" if "/" in preset else models.section_of(target)
    return resolve_config(presets.get(model, preset, file), density)


def _replaying(given: ProbeState | str | Path | None, settings: PSAConfig, part: str) -> ProbeState:
    """A state that repeats what was chosen for one of the transformers."""
    if given is None:
        return ProbeState()
    if settings.mask_mode != "auto":
        raise ConfigError(f"replay: only the automatic mode makes choices, not {settings.mask_mode!r}")
    state = given if isinstance(given, ProbeState) else ProbeState.load(given)
    replaying = ProbeState(replay=True)
    replaying.add(state, f"{part}.")
    return replaying


def _check(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name}: {value!r} is not a whole number from 0")


def _check_schedule(schedule: Schedule) -> None:
    """Makes every density of a list once, so that a wrong one is told now."""
    if schedule.density is not None and schedule.config.type == "dense":
        raise ConfigError("density_schedule: there is none to follow in dense attention (such as preset 'baseline')")
    if isinstance(schedule.density, Sequence):
        if not schedule.density:
            raise ConfigError("density_schedule: an empty list")
        for density in schedule.density:
            if density is not None:
                schedule.config.replace(density=density)
    elif schedule.density is not None and not callable(schedule.density):
        raise ConfigError(f"density_schedule: {schedule.density!r} is neither a list nor a function of (step, steps)")


def _indices(layers: Sequence[int], names: list[str]) -> frozenset[int]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(f"dense_layers: {layers!r} is no list of layer indices")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -len(names) <= layer < len(names):
            raise ConfigError(f"dense_layers: {layer!r} is no index into {len(names)} layers")
    return frozenset(layer % len(names) for layer in layers)

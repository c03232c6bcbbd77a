"""What the automatic mode carries from step to step: each layer's choice, until it is old or its input has drifted."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .candidates import CANDIDATES
from .config import PSAConfig
from .errors import ConfigError, PSAError
from .plan import Plan

if TYPE_CHECKING:
    from .order import Held

FACTS, CONCENTRATION, BY_CONTENT = 5, 4, 5
"""Columns of a choice; the one that holds the importance's concentration; and the further one where each head's order
is chosen too: 1 where its tokens go by content."""
ORDERS_PER_RUN = 12
"""How often an order by content is made anew, at least, in a run whose length is known."""
_NAMES = [candidate.name for candidate in CANDIDATES]
"""What the numbers of a saved choice stand for."""


@dataclass
class _Entry:
    """A layer's last probe: step and settings, the choice [B, H, 5], and the concentration seen in the latest call."""

    step: int
    settings: str
    choice: Tensor
    latest: Tensor
    lengths: tuple[int | None, int | None] | None
    """Of queries and keys; None where a file did not say."""
    seen: int
    """The latest step that used it."""
    moved: float | None = 0.0
    """Relative change of the concentration since the probe; None while it waits on the device."""

    def change(self) -> Tensor:
        return (self.latest / self.choice[..., CONCENTRATION].clamp(min=1e-30) - 1).abs().max()


class ProbeState:
    """Choices by (layer, step), both given by the caller and never counted here.

    Give both to :func:`psa.plan`, or to a :class:`psa.PSAAttention`, which holds a state of its own:

        state = psa.ProbeState()
        plan = psa.plan(q, k, config, v=v, probes=state, layer="blocks.3", step=7)
        out = attention(q, k, v, layer="blocks.3", step=7)  # attention.probe_state

    ``layer`` is anything whose ``str`` names the layer in every run (two calls of one layer in a step, as with
    guidance, need two names); ``step`` is the whole number of the denoising step, read from the scheduler. Steps go up;
    one before the latest begins a new run. A run that begins at the latest step cannot be told from it: ``clear()``.

    A choice is reused for ``probe_every`` steps, unless the importance's concentration (the mean sum of squared shares)
    has moved by more than ``probe_drift`` in any head since it was made; then the next call probes again: the one that
    drifted has used the old choice. New runs, other lengths and other settings are probed at once. Where ``steps`` says
    how many there are in a run, an order by content is held for a twelfth of them; else every call makes one. Every
    choice used is kept (a reused one once), and where orders were made, so that a run can be replayed bit for bit:

        state.save("choices.json");  replay = ProbeState.load("choices.json", replay=True)

    A replaying state never probes; a (layer, step) it does not know, or other settings than it was recorded with, is an
    error.
    """

    def __init__(self, *, replay: bool = False, steps: int | None = None) -> None:
        self.replay, self._steps = replay, _whole(steps)
        self.history: dict[tuple[str, int], Tensor] = {}
        self.settings: dict[tuple[str, int], str] = {}
        self.probed: list[tuple[str, int]] = []
        self.ordered: set[tuple[str, int]] = set()
        """Where orders by content were made."""
        self._last: dict[str, _Entry] = {}
        self._held: dict[str, tuple[int, Held]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}  # copies make orders of their own: these are large

    @property
    def steps(self) -> int | None:
        """Steps of a run that may be sparse, where it is known. ConfigError for what is no whole number above 0."""
        return self._steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self._steps = _whole(steps)

    def choice(self, layer: object, step: int, config: PSAConfig, q: Tensor, k: Tensor) -> Tensor | None:
        """The choice to reuse, on the device of q, or None when the layer has to be probed."""
        key = _key(layer, step)
        if self.replay:
            if key not in self.history:
                raise PSAError(f"replay: no choice was recorded for layer {key[0]!r} at step {step}")
            choice = self.history[key]
            if choice.shape[:2] != q.shape[:2]:
                shapes = f"{list(choice.shape[:2])}, not {list(q.shape[:2])}"
                raise PSAError(f"replay: layer {key[0]!r} was recorded with [batch, heads] = {shapes}")
            if self.settings[key] != config.key:
                raise PSAError(f"replay: layer {key[0]!r} was recorded with other settings: {self.settings[key]}")
            return choice.to(q.device)
        last = self._last.get(key[0])
        if last is None or step < last.seen or step - last.step >= config.probe_every:
            return None
        if last.choice.shape[:2] != q.shape[:2] or last.lengths not in (None, (q.shape[2], k.shape[2])):
            return None
        if last.settings != config.key:
            return None
        if last.moved is None:
            last.moved = float(last.change())
        return last.choice.to(q.device) if last.moved <= config.probe_drift else None

    def settle(self) -> None:
        """Reads how far every layer has drifted in one go; without, each :meth:`choice` waits for the device."""
        waiting = [entry for entry in self._last.values() if entry.moved is None]
        if waiting:
            device = waiting[0].latest.device
            for entry, moved in zip(
                waiting, torch.stack([e.change().to(device) for e in waiting]).tolist(), strict=True
            ):
                entry.moved = moved

    def clear(self) -> None:
        """Forgets everything, for a new run; a replaying state keeps what it repeats."""
        if not self.replay:
            self.history, self.settings, self.probed, self._last = {}, {}, [], {}
            self.ordered = set()
        self._held = {}

    def held(self, layer: object, step: int) -> "Held | None":
        """The order by content to go on with, if tokens are such as it was made for; None where one is to be made."""
        name, _ = key = _key(layer, step)
        if name not in self._held:
            return None
        made, held = self._held[name]
        if self.replay:
            return None if key in self.ordered else held
        return held if 0 < step - made < self._holding else None

    @property
    def _holding(self) -> int:
        """Steps that an order serves."""
        return 1 if self.steps is None else max(1, self.steps // ORDERS_PER_RUN)

    def record(self, layer: object, step: int, plan: Plan, reused: Tensor | None, held: "Held | None" = None) -> None:
        """Remembers what a plan with v chose, and the order it ``held``. ``reused`` is what :meth:`choice` gave for
        it."""
        if plan.choice is None:
            return
        name, _ = key = _key(layer, step)
        if held is not None or reused is None:
            self._held.pop(name, None)
        if held is not None and (self.replay or self._holding > 1):
            self._held[name] = step, held
        if self.replay:
            return
        if held is not None:
            self.ordered.add(key)
        if reused is None:
            assert plan.config is not None  # as of every plan with a choice
            facts, lengths = plan.choice[..., CONCENTRATION], (plan.length_q, plan.length_k)
            self._last[name] = _Entry(step, plan.config.key, plan.choice, facts, lengths, step)
            if key in self.history:
                self.probed = [other for other in self.probed if other != key]
            self.probed.append(key)
        else:
            last = self._last[name]
            last.latest, last.moved, last.seen = plan.choice[..., CONCENTRATION], None, step
        self.history[key], self.settings[key] = self._last[name].choice, self._last[name].settings

    def add(self, other: "ProbeState", prefix: str = "") -> None:
        """Takes over what another state recorded of layers whose names begin with ``prefix``."""
        some = {key: choice for key, choice in other.history.items() if key[0].startswith(prefix)}
        self.history |= some
        self.settings |= {key: other.settings[key] for key in some}
        self.probed += [key for key in other.probed if key in some]
        self.ordered |= {key for key in other.ordered if key in some}

    def stats(self) -> list[dict[str, Any]]:
        """One row per layer and step: how many heads chose each setting, mean density asked for, mean and worst
        measured error, and whether it probed."""
        probed, read = set(self.probed), {id(choice): choice for choice in self.history.values()}
        facts = {name: choice_facts(choice) for name, choice in read.items()}
        return [
            {"layer": layer, "step": step, **facts[id(choice)], "probed": (layer, step) in probed}
            for (layer, step), choice in sorted(self.history.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; float32 values survive exactly. NaN, where nothing was measured, becomes None."""
        used: dict[tuple[str, int], tuple[Tensor, str, list[int]]] = {}
        for (layer, step), choice in self.history.items():
            settings = self.settings[layer, step]
            used.setdefault((layer, id(choice)), (choice, settings, []))[2].append(step)
        settings = list(dict.fromkeys(self.settings.values()))
        choices = [
            {
                "layer": layer,
                "steps": steps,
                "settings": settings.index(key),
                "shape": list(choice.shape),
                "values": _plain(choice),
            }
            for (layer, _), (choice, key, steps) in used.items()
        ]
        probed = [list(key) for key in self.probed]
        return {
            "candidates": _NAMES,
            "settings": settings,
            "choices": choices,
            "probed": probed,
            "ordered": sorted(map(list, self.ordered)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, replay: bool = False) -> "ProbeState":
        """Reads what :meth:`to_dict` wrote; a state that does not replay goes on from each layer's last step."""
        state = cls(replay=replay)
        try:
            if data["candidates"] != _NAMES:
                raise PSAError("the saved choices are among other candidates than this version's; probe again")
            for item in data["choices"]:
                values = [math.nan if value is None else value for value in item["values"]]
                choice = torch.tensor(values, dtype=torch.float32).view(item["shape"])
                if choice.ndim != 3 or choice.shape[2] not in (FACTS, FACTS + 1):
                    raise ValueError(f"a choice of shape {item['shape']}")
                keys = [_key(item["layer"], step) for step in item["steps"]]
                state.history |= dict.fromkeys(keys, choice)
                state.settings.update(dict.fromkeys(keys, str(data["settings"][item["settings"]])))
            state.probed = [_key(*item) for item in data["probed"]]
            # Before there was such a list, every call made an order.
            state.ordered = {_key(*item) for item in data["ordered"]} if "ordered" in data else set(state.history)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise PSAError(f"not a saved probe state ({error!r})") from error
        for key in state.probed:
            if key in state.history:
                choice = state.history[key]
                used = max(step for (name, step), other in state.history.items() if name == key[0] and other is choice)
                entry = _Entry(key[1], state.settings[key], choice, choice[..., CONCENTRATION], None, used)
                state._last[key[0]] = entry
        return state

    def save(self, path: str | Path) -> None:
        """Writes JSON (to a temporary name first, then renamed)."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(self.to_dict()))
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path, *, replay: bool = False) -> "ProbeState":
        """Reads what :meth:`save` wrote. PSAError when the file holds none."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise PSAError(f"{path}: not a saved probe state ({error})") from error
        return cls.from_dict(data, replay=replay)


def choice_facts(choice: Tensor) -> dict[str, Any]:
    """How many heads of a choice [B, H, 5] got each setting, the mean density asked for, the mean and worst error; and
    how many have their tokens by content, where [B, H, 6] says."""
    candidates, densities, errors, _, _, *orders = choice.float().flatten(0, -2).cpu().unbind(-1)
    pairs = zip(candidates.tolist(), densities.tolist(), strict=True)
    settings = Counter("dense" if density >= 1 else CANDIDATES[round(number)].name for number, density in pairs)
    return {
        "settings": dict(settings),
        "density": float(densities.mean()),
        "error": float(errors.mean()),
        "worst_error": float(errors.max()),
        **({"by_content": int(orders[0].sum())} if orders else {}),
    }


def _key(layer: object, step: object) -> tuple[str, int]:
    if isinstance(step, bool) or not isinstance(step, int):
        raise ConfigError(f"step: {step!r} is not a whole number")
    return str(layer), step


def _whole(steps: int | None) -> int | None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"steps: {steps!r} is not a whole number above 0")
    return steps


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.flatten().tolist()]

"""What the automatic mode carries from step to step: each layer's choice, until it is old or its input has drifted."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, PSAError
from .plan import Plan


@dataclass
class _Entry:
    """A layer's last probe: the step, the choice [B, H, 4], and the concentration seen in the latest call."""

    step: int
    choice: Tensor
    latest: Tensor


class ProbeState:
    """Choices by (layer, step), both given by the caller and never counted here.

    A choice is reused for ``probe_every`` steps, unless the importance's concentration (the mean sum of squared shares)
    has moved by more than ``probe_drift`` in any head since it was made; then, and for a step before the last probe's,
    the next plan probes again. Every choice used is kept, so that a run can be replayed bit for bit:

        state.save("choices.json");  replay = ProbeState.load("choices.json", replay=True)

    A replaying state never probes; a (layer, step) it does not know is an error.
    """

    def __init__(self, *, replay: bool = False) -> None:
        self.replay = replay
        self.history: dict[tuple[str, int], Tensor] = {}
        self.probed: list[tuple[str, int]] = []
        self._last: dict[str, _Entry] = {}

    def choice(self, layer: object, step: int, config: Any, q: Tensor) -> Tensor | None:
        """The choice to reuse, on the device of q, or None when the layer has to be probed."""
        key = _key(layer, step)
        if self.replay:
            if key not in self.history:
                raise PSAError(f"replay: no choice was recorded for layer {key[0]!r} at step {step}")
            return self.history[key].to(q.device)
        last = self._last.get(key[0])
        if last is None or not 0 <= step - last.step < config.probe_every or last.choice.shape[:2] != q.shape[:2]:
            return None
        moved = (last.latest / last.choice[..., 3].clamp(min=1e-30) - 1).abs().max()
        if not float(moved) <= config.probe_drift:
            return None
        return last.choice.to(q.device)

    def record(self, layer: object, step: int, plan: Plan, reused: Tensor | None) -> None:
        """Remembers what a plan chose. ``reused`` is what :meth:`choice` gave for it."""
        if plan.choice is None or self.replay:
            return
        name, _ = key = _key(layer, step)
        if reused is None:
            self._last[name] = _Entry(step, plan.choice, plan.choice[..., 3])
            self.probed.append(key)
        else:
            self._last[name].latest = plan.choice[..., 3]
        self.history[key] = self._last[name].choice

    def stats(self) -> list[dict[str, Any]]:
        """One row per layer and step: mean density asked for, mean and worst measured error, and whether it probed."""
        probed = set(self.probed)
        rows = []
        for (layer, step), choice in sorted(self.history.items()):
            error = choice[..., 2].float()
            rows.append(
                {
                    "layer": layer,
                    "step": step,
                    "density": float(choice[..., 1].mean()),
                    "error": float(error.mean()),
                    "worst_error": float(error.max()),
                    "probed": (layer, step) in probed,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; float32 values survive exactly. NaN, where nothing was measured, becomes None."""
        choices = [
            {"layer": layer, "step": step, "shape": list(choice.shape), "values": _plain(choice)}
            for (layer, step), choice in self.history.items()
        ]
        return {"choices": choices, "probed": [list(key) for key in self.probed]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, replay: bool = False) -> "ProbeState":
        """Reads what :meth:`to_dict` wrote; a state that does not replay goes on from each layer's last step."""
        state = cls(replay=replay)
        try:
            for item in data["choices"]:
                values = [math.nan if value is None else value for value in item["values"]]
                choice = torch.tensor(values, dtype=torch.float32).view(item["shape"])
                state.history[_key(item["layer"], item["step"])] = choice
            state.probed = [_key(*item) for item in data["probed"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PSAError(f"not a saved probe state ({error!r})") from error
        for key in state.probed:
            if key in state.history:
                state._last[key[0]] = _Entry(key[1], state.history[key], state.history[key][..., 3])
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


def _key(layer: object, step: object) -> tuple[str, int]:
    if isinstance(step, bool) or not isinstance(step, int):
        raise ConfigError(f"step: {step!r} is not a whole number")
    return str(layer), step


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.flatten().tolist()]

"""What an enabled model measured in its last run: densities of every call, and the automatic mode's choices."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..state import ProbeState

Key = tuple[int, int]


@dataclass
class Stats:
    """Densities by (layer, step): 0-d tensors until they are read, so that counting never waits for the device."""

    waiting: list[tuple[Key, Tensor]] = field(default_factory=list)
    sparse: dict[Key, tuple[float, int]] = field(default_factory=dict)
    """Sum of densities, and calls."""
    dense: dict[Key, int] = field(default_factory=dict)

    def clear(self) -> None:
        self.waiting, self.sparse, self.dense = [], {}, {}

    def count(self, layer: int, step: int, density: Tensor | None = None) -> None:
        """One call; ``density`` None: dense."""
        if density is None:
            self.dense[layer, step] = self.dense.get((layer, step), 0) + 1
        else:
            self.waiting.append(((layer, step), density))

    def values(self) -> dict[Key, tuple[float, int, int]]:
        """(density of the sparse calls, sparse calls, dense calls) of each layer and step. Waits for the device."""
        if self.waiting:
            device = self.waiting[0][1].device
            densities = torch.stack([density.to(device) for _, density in self.waiting]).tolist()
            for (key, _), density in zip(self.waiting, densities, strict=True):
                total, calls = self.sparse.get(key, (0.0, 0))
                self.sparse[key] = (total + density, calls + 1)
            self.waiting = []
        out = {}
        for key in sorted({*self.sparse, *self.dense}):
            total, calls = self.sparse.get(key, (0.0, 0))
            out[key] = (total / calls if calls else 1.0, calls, self.dense.get(key, 0))
        return out


def summary(values: dict[Key, tuple[float, int, int]]) -> dict[str, Any]:
    """Counts and mean densities: over all sparse calls, over all calls (dense ones are 1), per layer, and per step."""
    sparse, dense = sum(v[1] for v in values.values()), sum(v[2] for v in values.values())
    kept = sum(v[0] * v[1] for v in values.values())
    layers: dict[int, dict[int, float]] = {}
    steps: dict[int, list[float]] = {}
    for (layer, step), (density, n_sparse, n_dense) in values.items():
        mixed = (density * n_sparse + n_dense) / (n_sparse + n_dense)
        layers.setdefault(layer, {})[step] = mixed
        steps.setdefault(step, []).append(mixed)
    return {
        "density": kept / sparse if sparse else None,
        "overall_density": (kept + dense) / (sparse + dense) if sparse + dense else None,
        "sparse_calls": sparse,
        "dense_calls": dense,
        "steps": {step: sum(found) / len(found) for step, found in sorted(steps.items())},
        "layers": layers,
    }


def measured(states: list[ProbeState]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices of the automatic mode, one row per probe with the last step that used it; and the errors over all."""
    rows: list[dict[str, Any]] = []
    used = [row for state in states for row in state.stats()]
    for row in used:
        if row.pop("probed") or not rows or rows[-1]["layer"] != row["layer"]:
            rows.append({**row, "until": row["step"]})
        else:
            rows[-1]["until"] = row["step"]
    errors = {
        "error": sum(row["error"] for row in used) / len(used) if used else None,
        "worst_error": max((row["worst_error"] for row in used), default=None),
    }
    return rows, errors

"""`psa inspect`: what a setting keeps of given q, k, v, and how wrong the result is."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .clips import clip_qkv, read_frames
from .config import PSAConfig
from .errors import PSAError, one_line
from .functional import attend, make_plan
from .measure import cosine, relative_error
from .pictures import level_matrices
from .plan import Plan

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Inspection:
    """A plan, its error against dense attention per (batch, head), and the picture of its levels."""

    plan: Plan
    error: Tensor
    cosine: float
    picture: Path | None

    def to_dict(self) -> dict:
        return {
            "density": self.plan.density,
            "density_per_head": self.plan.density_per_head.tolist(),
            "levels": {str(level): share for level, share in self.plan.histogram().items()},
            "error_per_head": self.error.tolist(),
            "cosine": self.cosine,
            "notes": self.plan.notes,
            "picture": str(self.picture) if self.picture else None,
        }


def load_qkv(path: str | Path, prefix: str = "") -> tuple[Tensor, Tensor, Tensor, Grid | None]:
    """q, k, v from a .safetensors file with tensors q, k, v (or PREFIX.q, …), or a video's patches.

    A ``grid_thw`` entry of the file's metadata, or of the JSON object under the prefix, gives the token grid.

    Raises:
        PSAError: when the file is missing, is neither, or holds no such tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise PSAError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix != ".safetensors":
        return clip_qkv(read_frames(path))
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = list(file.keys())
            prefixes = sorted({name[:-2] for name in names if name.endswith(".q")})
            lead = prefix or ("" if "q" in names else (prefixes[0] if prefixes else ""))
            wanted = [f"{lead}.{part}" if lead else part for part in "qkv"]
            missing = [name for name in wanted if name not in names]
            if missing:
                raise PSAError(f"{path}: no tensor {missing[0]!r}; it holds {', '.join(names[:12]) or 'nothing'}")
            q, k, v = (file.get_tensor(name) for name in wanted)
            facts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PSAError(f"{path}: not a safetensors file ({one_line(error)})") from error
    try:
        grid = json.loads(facts[lead])["grid_thw"] if lead in facts else json.loads(facts.get("grid_thw", "null"))
    except (json.JSONDecodeError, KeyError, TypeError):
        grid = None
    return q, k, v, tuple(grid) if grid else None


@torch.no_grad()
def inspect(
    q: Tensor, k: Tensor, v: Tensor, config: PSAConfig, *, grid: Grid | None = None, is_causal: bool = False,
    picture: str | Path | None = None,
) -> Inspection:  # fmt: skip
    """Plans and attends in float32, compares with dense attention, and draws the level maps to ``picture``."""
    q, k, v = q.float(), k.float(), v.float()
    plan = make_plan(q, k, config, v=v, grid=grid, is_causal=is_causal, enable_gqa=True)
    out = attend(q, k, v, plan, is_causal=is_causal, enable_gqa=True)
    dense = make_plan(q, k, config.replace(type="dense"), is_causal=is_causal, enable_gqa=True)
    exact = attend(q, k, v, dense, is_causal=is_causal, enable_gqa=True)
    drawn = level_matrices(plan, picture) if picture else None
    return Inspection(plan, relative_error(out, exact), cosine(out, exact), drawn)

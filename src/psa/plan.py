"""The one plan format: which level each query block reads of each KV block, and all that goes with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocate import BlockMask, block_mask
from .backends.base import Selection
from .config import PSAConfig
from .errors import ConfigError, PSAError, ShapeError
from .reorder import Permutation, SemanticState
from .schedule import build_schedule
from .values import MAX_LEVEL, is_power_of_two

FACTS = ("block_m", "block_n", "length_q", "length_k", "is_causal", "text")
TENSORS = ("levels", "query_power", "bias_cap", "pair_bias", "slope", "key_mask", "choice")


def choice_notes(config: PSAConfig, choice: Tensor) -> list[str]:
    """What the caller should know of the automatic mode's choice [B, H, 5]. Waits for the device."""
    notes, blind, heads = [], choice[..., 2].isnan(), choice[..., 2].numel()
    if bool(blind.any()):
        got = "dense attention" if config.target_error is not None else "one fixed setting"
        text = f"no error is known for {int(blind.sum())} of {heads} heads: the plan was made without v"
        notes.append(f"{text}, so nothing was probed and they got {got}; pass v to psa.plan")
    missed = int(((choice[..., 1] >= 1.0) & ~blind).sum())
    if missed and config.target_error is not None:
        text = f"{missed} of {heads} heads cannot meet error {config.target_error:g}"
        notes.append(f"{text} below density {config.max_density:g} and run dense")
    return notes


@dataclass(frozen=True)
class Plan:
    """A selection that can be reused, inspected and saved. Made by :func:`psa.plan` or :meth:`from_levels`.

    Attributes:
        levels: uint8 [1|B, 1|H, M, N] over blocks of the reordered sequence; 0 = skipped.
        block_m, block_n: tokens per query block and per KV block.
        length_q, length_k: tokens; None for a plan from bare levels, which fits any lengths with M and N blocks.
        is_causal: None for a plan from bare levels, which serves both.
        permutation: token order in which the blocks are cut; None keeps the caller's.
        query_power, bias_cap: float32 [B, H, D] and [1|B, 1|H]; with the variance bias.
        pair_bias: float16 [B, H, M, N]; with the measured bias.
        key_mask: bool [B, Lk] in the caller's order.
        slope: float16 [B, H, M, N], importance times N where :mod:`psa.slope` corrects pooled blocks, else 0.
        choice: float32 [B, H, 5], what the automatic mode chose: see :attr:`report` and :class:`psa.candidates.Choice`;
            [B, H, 6] where it chose each head's order too.
        config: what the plan was made from.
        text: text tokens (count, position) that were pinned.
        reorder_state: centroids for the next call, where tokens go by content; not saved.
    """

    levels: Tensor
    block_m: int
    block_n: int
    length_q: int | None = None
    length_k: int | None = None
    is_causal: bool | None = None
    permutation: Permutation | None = None
    query_power: Tensor | None = None
    bias_cap: Tensor | None = None
    pair_bias: Tensor | None = None
    key_mask: Tensor | None = None
    slope: Tensor | None = None
    choice: Tensor | None = None
    config: PSAConfig | None = field(default=None, repr=False)
    text: tuple[int, str] = (0, "last")
    reorder_state: SemanticState | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_levels(cls, levels: Tensor, *, block_m: int, block_n: int) -> "Plan":
        """A plan that uses ``levels`` exactly as given: integers [1|B, 1|H, M, N], 0 or powers of two up to block_n.

        Raises:
            ShapeError, ConfigError.
        """
        if not isinstance(levels, Tensor) or levels.ndim != 4:
            shape = list(levels.shape) if isinstance(levels, Tensor) else type(levels).__name__
            raise ShapeError(f"levels: expected integers [1|B, 1|H, M, N], got {shape}")
        if levels.dtype.is_floating_point or levels.dtype.is_complex or levels.dtype == torch.bool:
            raise ShapeError(f"levels: expected integers, got {levels.dtype}")
        for name, value in (("block_m", block_m), ("block_n", block_n)):
            if not is_power_of_two(value) or value < 16:
                raise ConfigError(f"{name}: {value!r} is not a power of two of at least 16")
        top = min(block_n, MAX_LEVEL)
        wide = levels.long()
        if bool(((wide < 0) | (wide > top) | (wide & (wide - 1) != 0)).any()):
            raise ConfigError(f"levels: every level must be 0 or a power of two up to {top}")
        return cls(levels.to(torch.uint8), block_m, block_n)

    # -- what was kept -----------------------------------------------------------------------------------------

    @property
    def density_per_head(self) -> Tensor:
        """Mean of 1/level over block pairs (those on or below the diagonal, if causal): float32 [1|B, 1|H]."""
        levels = self.levels
        if not self.is_causal:
            return _kept(levels) / max(1, levels.shape[-1] * levels.shape[-2])
        visible = self._mask().visible
        assert visible is not None
        return _kept(levels * visible) / visible.sum((-1, -2)).clamp(min=1)

    @property
    def density(self) -> float:
        """Share of dense attention's work that remains, after caps and pins; a partial tail block counts as a whole."""
        return float(self.density_per_head.mean()) if self.levels.numel() else 0.0

    @property
    def error(self) -> Tensor | None:
        """The relative error of each head as probes measured it, float32 [B, H]; None where none were taken.

        NaN for heads of a plan whose automatic mode had no v to probe with. A reused choice carries the error of the
        call that probed.
        """
        return None if self.choice is None else self.choice[..., 2]

    @property
    def report(self) -> list[dict[str, Any]]:
        """One row per batch item and head: setting, density kept, measured error and its standard deviation; and the
        order (``"place"`` or ``"content"``), where it was chosen per head."""
        from .candidates import CANDIDATES, Choice
        from .state import BY_CONTENT

        if self.choice is None:
            return []
        choice = Choice.unpack(self.choice)
        kept = self.density_per_head.expand(choice.density.shape)
        chosen = self.choice[..., BY_CONTENT:].flatten(1)  # nothing, or a column
        orders = [["content" if x else "place" for x in row] for row in chosen.tolist()] if chosen.numel() else []
        return [
            {
                "batch": b,
                "head": h,
                "setting": "dense" if float(kept[b, h]) >= 1.0 else CANDIDATES[int(choice.candidate[b, h])].name,
                "density": float(kept[b, h]),
                "error": float(choice.error[b, h]),
                "error_spread": float(choice.spread[b, h]),
                **({"order": orders[b][h]} if orders else {}),
            }
            for b in range(kept.shape[0])
            for h in range(kept.shape[1])
        ]

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def pinned_density(self) -> float:
        """The part of the density that pinned blocks take."""
        mask = self._mask()
        if mask.pinned is None:
            return 0.0
        pairs = mask.pinned.numel() if mask.visible is None else int(mask.visible.sum()) * mask.pinned.shape[0]
        return float(mask.pinned.sum() / max(1, pairs))

    @property
    def notes(self) -> list[str]:
        """What the caller should know: heads that run dense or were not measured, a density that pins exceed."""
        config = self.config
        if config is None:
            return []
        notes = [] if self.choice is None else choice_notes(config, self.choice)
        kept, asked = self.density if config.share_heads else float(self.density_per_head.max()), config.density
        if config.target_error is not None:
            sparse = self.density_per_head[self.density_per_head < 1]
            kept, asked = float(sparse.max()) if sparse.numel() else 0.0, config.max_density
        if asked is not None and kept > asked * 1.02:
            rest = f", above the {asked:g} asked for" if asked == config.density else f", above max_density {asked:g}"
            if self.pinned_density > asked:
                notes.append(f"pinned blocks alone take density {self.pinned_density:.3f}{rest}")
            else:
                notes.append(f"pins and caps allow no less than density {kept:.3f}{rest}")
        return notes

    def histogram(self) -> dict[int, float]:
        """Share of block pairs at each level, skipped (0) included."""
        counts = torch.bincount(self.levels.flatten().long(), minlength=1).tolist()
        total = max(1, self.levels.numel())
        return {level: count / total for level, count in enumerate(counts) if count}

    def _mask(self) -> BlockMask:
        if self.length_q is None or self.length_k is None:
            raise PSAError("a plan from bare levels has no lengths; make one with psa.plan")
        text_length, text_position = self.text
        return block_mask(
            self.length_q,
            self.length_k,
            self.block_m,
            self.block_n,
            is_causal=bool(self.is_causal),
            text_length=text_length,
            text_position=text_position,
            key_mask=self.key_mask,
            device=self.levels.device,
        )

    # -- how it is used ----------------------------------------------------------------------------------------

    def selection(self, scale: float, is_causal: bool) -> Selection:
        """The tensors a backend needs, with the key mask in the plan's token order."""
        key_mask = self.key_mask
        if key_mask is not None and self.permutation is not None:
            key_mask = self.permutation.apply_k_mask(key_mask)
        return Selection(
            self.levels,
            self.block_m,
            self.block_n,
            scale,
            is_causal,
            self.query_power,
            self.bias_cap,
            self.pair_bias,
            key_mask,
        )

    def schedule(self) -> tuple[Tensor, Tensor]:
        """``(blocks, ends)`` of :func:`psa.schedule.build_schedule`: the list of blocks that each query block reads."""
        return build_schedule(self.levels, min(self.block_n, MAX_LEVEL).bit_length())

    def to(self, device: torch.device | str) -> "Plan":
        """A copy with every tensor on ``device``."""
        moved = {name: _to(getattr(self, name), device) for name in (*TENSORS, "permutation")}
        rest = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in moved}
        return Plan(**moved, **rest)

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the plan to one .safetensors file (to a temporary name first, then renamed)."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in TENSORS if getattr(self, name) is not None}
        if self.permutation is not None:
            tensors |= {f"permutation.{name}": t.contiguous() for name, t in self.permutation.to_dict().items()}
        facts = {name: getattr(self, name) for name in FACTS}
        facts["config"] = self.config.to_dict() if self.config else None
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        save_file(tensors, partial, metadata={"psa.plan": json.dumps(facts)})
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads what :meth:`save` wrote.

        Raises:
            PSAError: when the file holds no plan.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                facts: Mapping[str, Any] = json.loads((file.metadata() or {})["psa.plan"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise PSAError(f"{path}: not a saved plan ({error})") from error
        order = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith("permutation.")}
        config = PSAConfig.from_dict(facts["config"]) if facts["config"] else None
        rest = {name: facts[name] for name in FACTS} | {"text": tuple(facts["text"])}
        return cls(
            **{name: tensors.get(name) for name in TENSORS},  # type: ignore[arg-type]
            **rest,
            permutation=Permutation.from_dict(order) if order else None,
            config=config,
        )


def _kept(levels: Tensor) -> Tensor:
    """Sum of 1/level over block pairs: float32 [1|B, 1|H]. Level by level: a long plan has room for one byte a pair."""
    counts = [(levels == (1 << e)).sum((-1, -2)) * 0.5**e for e in range(MAX_LEVEL.bit_length())]
    return torch.stack(counts).sum(0)


def _to(value: Any, device: torch.device | str) -> Any:
    return None if value is None else value.to(device)

"""The presets of `attention_config.yaml`: finding the file, reading it, and saying what a preset does."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from .allocate import allocate_by
from .config import PSAConfig
from .errors import ConfigError
from .values import nearest

FILE_NAME = "attention_config.yaml"
SECTION_KEYS = ("default_attention", "video_scale", "text_length", "attention_configs")
SCALE_KEYS = ("width_divisor", "height_divisor", "depth_divisor")

SECTIONS = {
    "wan21_1.3b": "Wan2.1_1.3b",
    "wan21_14b": "Wan2.1_14b",
    "wan22_5b": "Wan2.2_5B",
    "wan22_a14b": "Wan2.2_A14B",
    "cogvideo1.5_5b": "CogVideo1.5_5b",
    "cogvideo_5b": "CogVideo_5b",
    "cogvideo_5b_lora": "CogVideo_5b",
    "qwen2.5-vl": "Qwen2.5_VL",
    "tiny": "Tiny",
}
"""Model names of the command line -> sections of the file."""
SECTION_DEFAULTS = {"cogvideo_5b_lora": "psa_4steps"}


@dataclass(frozen=True)
class ModelSection:
    """One model's section: its presets, and how its video becomes tokens.

    Attributes:
        divisors: pixels (w, h) and frames (t) per token; None when the section gives none.
        text_length: text tokens beside the video.
        presets: name -> settings.
        source: the file it was read from last.
    """

    name: str
    default: str
    presets: Mapping[str, PSAConfig]
    text_length: int = 0
    divisors: tuple[int, int, int] | None = None
    source: str = field(default="", compare=False)

    def get(self, preset: str | None = None) -> PSAConfig:
        """A preset's settings; the section's default without a name.

        Raises:
            ConfigError: naming file, model, preset and the nearest valid name.
        """
        name = preset or self.default
        if name not in self.presets:
            hint = nearest(name, self.presets)
            raise ConfigError(f"{self.source}: {self.name}: preset {name!r} does not exist{hint}")
        return self.presets[name]


def builtin_file() -> Path:
    """The presets that ship with the package: one file, beside the code in a wheel, in configs/ in a checkout."""
    packaged = Path(__file__).with_name(FILE_NAME)
    return packaged if packaged.exists() else Path(__file__).parents[2] / "configs" / FILE_NAME


def user_file(path: str | Path | None = None) -> Path | None:
    """A user's file: ``path``, else $PSA_CONFIG, else ./configs/attention_config.yaml where it exists.

    Raises:
        ConfigError: when a file that was asked for does not exist.
    """
    asked = path or os.environ.get("PSA_CONFIG")
    if asked:
        if not Path(asked).is_file():
            origin = "--attention_config" if path else "$PSA_CONFIG"
            raise ConfigError(f"{asked}: no such file ({origin})")
        return Path(asked)
    local = Path("configs") / FILE_NAME
    return local if local.is_file() and local.resolve() != builtin_file().resolve() else None


def load(path: str | Path | None = None) -> dict[str, ModelSection]:
    """Every section, the user's file laid over the built-in one, model by model and preset by preset.

    Raises:
        ConfigError: one line naming file, model, preset, key, value and the nearest valid name.
    """
    sections = dict(_builtin())
    user = user_file(path)
    if user is not None:
        sections |= _read(user, sections)
    return sections


def section(model: str, path: str | Path | None = None) -> ModelSection:
    """The section of a model, by its name on the command line or in the file."""
    sections = load(path)
    name = SECTIONS.get(model, SECTIONS.get(model.lower(), model))
    if name not in sections:
        raise ConfigError(f"model {model!r} has no presets{nearest(model, [*sections, *SECTIONS])}")
    return sections[name]


def get(model: str, preset: str | None = None, path: str | Path | None = None) -> PSAConfig:
    """The settings of one preset, e.g. ``get("wan21_1.3b", "psa_topk")``.

    Args:
        preset: of the model's section, ``"section/preset"`` of any, ``"default"`` or ``"section/default"``; None is the
            model's default.
    """
    other, _, name = (preset or "").rpartition("/")
    model = other or model
    found = section(model, path)
    if name in ("", "default"):
        own = SECTION_DEFAULTS.get(model)
        return found.get(own if own in found.presets else None)
    return found.get(name)


def explain(config: PSAConfig, blocks: int = 512) -> dict[str, float | None]:
    """The density that a preset gives on a row of ``blocks`` blocks, by the shape of the row's importance.

    ``uniform``: every block matters equally. ``peaked``: importance falls as 1/rank², as in a sharp head. None with
    ``target_error``, where the density follows from the error that each head makes.
    """
    ranks = torch.arange(1, blocks + 1, dtype=torch.float32)
    rows = {"uniform": torch.ones(blocks), "peaked": ranks.pow(-2)}
    out: dict[str, float | None] = {}
    for name, row in rows.items():
        if config.type == "dense":
            out[name] = 1.0
            continue
        if config.target_error is not None:
            out[name] = None
            continue
        levels = allocate_by(config, row.expand(1, 1, 8, blocks)).float()
        out[name] = float(torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0).mean())
    return out


@lru_cache(maxsize=1)
def _builtin() -> dict[str, ModelSection]:
    return _read(builtin_file(), {})


def _read(path: Path, base: Mapping[str, ModelSection]) -> dict[str, ModelSection]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected model sections, got {type(content).__name__}")
    return {str(name): _section(path, str(name), body, base.get(str(name))) for name, body in content.items()}


def _section(path: Path, name: str, body: Any, base: ModelSection | None) -> ModelSection:
    where = f"{path}: {name}"
    body = _mapping(where, body, SECTION_KEYS)
    presets = dict(base.presets) if base else {}
    for preset, settings in _mapping(f"{where}: attention_configs", body.get("attention_configs", {})).items():
        try:
            presets[str(preset)] = PSAConfig.from_dict(settings)
        except ConfigError as error:
            raise ConfigError(f"{where}: {preset}: {error}") from error
    default = body.get("default_attention", base.default if base else next(iter(presets), ""))
    if default not in presets:
        hint = nearest(default, presets)
        raise ConfigError(f"{where}: default_attention: {default!r} is not one of its presets{hint}")
    divisors = base.divisors if base else None
    if "video_scale" in body:
        scale = _mapping(f"{where}: video_scale", body["video_scale"], SCALE_KEYS)
        missing = [key for key in SCALE_KEYS if key not in scale]
        if missing:
            raise ConfigError(f"{where}: video_scale.{missing[0]}: missing")
        divisors = tuple(_whole(f"{where}: video_scale.{key}", scale[key], 1) for key in SCALE_KEYS)
    text = _whole(f"{where}: text_length", body["text_length"], 0) if "text_length" in body else None
    text = text if text is not None else (base.text_length if base else 0)
    return ModelSection(name, str(default), presets, text, divisors, str(path))  # type: ignore[arg-type]


def _mapping(where: str, value: Any, keys: Iterable[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            raise ConfigError(f"{where}: {key}: unknown key{nearest(key, keys)}")
    return value


def _whole(where: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{where}: {value!r} is not a whole number from {low}")
    return value

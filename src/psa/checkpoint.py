"""Finding a video model's files, checking a request against them, and loading the pipeline."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ConfigError, PSAError
from .extras import need, quiet_loading
from .models import VideoModel

WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers checkpoint: a folder, or a repository on the Hub.

    Attributes:
        known: settings of the model it is an instance of; None for a model that psa has no table entry for.
    """

    source: str
    known: VideoModel | None = None

    @property
    def folder(self) -> Path | None:
        path = Path(self.source)
        return path if path.is_dir() else None

    def check(self) -> None:
        """Raises unless this is a folder with a pipeline, or looks like a hub id."""
        if self.folder is not None:
            if not (self.folder / "model_index.json").is_file():
                raise ConfigError(
                    f"{self.source}: no model_index.json there; expected a folder saved by save_pretrained"
                )
        elif self.source.count("/") != 1 or self.source.startswith((".", "/", "~")):
            raise ConfigError(f"{self.source}: no such folder")

    def read(self, name: str) -> dict[str, Any]:
        """A configuration file of the checkpoint; empty where the repository has none.

        Raises:
            PSAError: when the repository cannot be reached and the file is not in the cache.
        """
        if self.folder is not None:
            path = self.folder / name
        else:
            hub = need("huggingface_hub", "diffusers")
            try:
                path = Path(hub.hf_hub_download(self.source, name))
            except hub.errors.LocalEntryNotFoundError as error:
                raise self.missing(error) from error
            except hub.errors.EntryNotFoundError:
                return {}
            except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
                raise self.missing(error) from error
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a JSON file ({error})") from error

    def missing(self, error: Exception) -> PSAError:
        reason = str(error).strip().split("\n")[0].split(". ")[0][:160]
        if self.folder is not None:
            return PSAError(f"{self.source}: cannot be loaded ({reason})")
        return PSAError(
            f"{self.source}: not in the cache and not reachable ({reason}); fetch it with: hf download {self.source}"
        )

    @cached_property
    def class_name(self) -> str:
        name = self.read("model_index.json").get("_class_name", "")
        return name if isinstance(name, str) else name[-1]

    @cached_property
    def steps_in(self) -> tuple[int, int]:
        """(multiple that width and height must be of, frames between valid frame counts), from the configurations."""
        if self.known and self.folder is None:
            return self.known.multiple, self.known.frame_step
        vae, transformer = self.read("vae/config.json"), self.read("transformer/config.json")
        if not vae or not transformer:
            return (self.known.multiple, self.known.frame_step) if self.known else (16, 4)
        stages = len(vae.get("block_out_channels") or vae.get("dim_mult") or [1, 1, 1, 1])
        spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or 2 ** (stages - 1)
        patch = transformer.get("patch_size") or 1
        patch = patch[-1] if isinstance(patch, list) else patch
        frames = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
        multiple = int(spatial) * int(patch)
        return math.lcm(multiple, 16) if self.class_name.startswith("Wan") else multiple, int(frames)

    def check_size(self, width: int | None, height: int | None, num_frames: int | None) -> None:
        """Raises ConfigError, naming the nearest valid value, for a size or frame count that the model cannot take."""
        multiple, step = self.steps_in
        for name, value in (("width", width), ("height", height)):
            if value is not None and (value <= 0 or value % multiple):
                nearest = max(multiple, round(value / multiple) * multiple)
                raise ConfigError(f"{name}: {value} is not a positive multiple of {multiple}; nearest: {nearest}")
        if num_frames is not None and (num_frames <= 0 or num_frames % step != 1 % step):
            nearest = max(0, round((num_frames - 1) / step)) * step + 1
            raise ConfigError(f"num_frames: {num_frames} is not 1 more than a multiple of {step}; nearest: {nearest}")

    def weight_bytes(self) -> int:
        """Size of the weights, as far as they lie on this machine."""
        folder = self.folder
        if folder is None:
            hub = need("huggingface_hub", "diffusers")
            try:
                folder = Path(hub.snapshot_download(self.source, local_files_only=True))
            except Exception:  # not downloaded yet: its size is not known
                return 0
        return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.rglob(pattern))

    def load(self, dtype: str, image: bool) -> Any:
        """The pipeline, its VAE in float32 (as the known models are published).

        Raises:
            PSAError: when files are missing, with the command that fetches them.
        """
        import torch

        diffusers = need("diffusers", "diffusers")
        name = self.class_name
        if image and "ImageToVideo" not in name:
            name = name.replace("Pipeline", "ImageToVideoPipeline")
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise PSAError(f"{self.source}: diffusers {diffusers.__version__} has no {name}")
        kinds = {"default": getattr(torch, dtype), "vae": torch.float32 if "Wan" in name else getattr(torch, dtype)}
        try:
            with quiet_loading("diffusers", "transformers"):
                return cls.from_pretrained(self.source, **{_dtype_argument(): kinds})
        except (OSError, ValueError) as error:
            raise self.missing(error) from error


def _dtype_argument() -> str:
    """``torch_dtype`` until diffusers 0.41, ``dtype`` since."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"


def lora_file(path: str | None, lora: tuple[str, str] | None) -> str | None:
    """Where LoRA weights lie: ``path`` (a file or folder), else ./weights, else the Hub's cache.

    Raises:
        PSAError: with the command that fetches them.
    """
    if path:
        if not Path(path).exists():
            hint = f"; fetch it with: hf download {lora[0]} {lora[1]} --local-dir ./weights" if lora else ""
            raise PSAError(f"lora_path: {path}: no such file{hint}")
        found = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        if not found:
            raise PSAError(f"lora_path: {path}: no .safetensors file in this folder")
        return str(found[0])
    if lora is None:
        return None
    local = Path("weights") / lora[1]
    if local.is_file():
        return str(local)
    hub = need("huggingface_hub", "diffusers")
    try:
        return hub.hf_hub_download(*lora)
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        command = f"hf download {lora[0]} {lora[1]} --local-dir ./weights"
        raise PSAError(f"{lora[1]}: not found; fetch it with: {command}") from error

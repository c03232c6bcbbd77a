"""What `psa generate` is asked to make, and everything that can be wrong with it before any weights load."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import presets
from .checkpoint import Checkpoint, lora_file
from .config import PSAConfig, nearest
from .devices import pick_device
from .errors import ConfigError, one_line
from .extras import need
from .functional import resolve_config
from .models import MODELS, VideoModel, name_at

DTYPES = ("bfloat16", "float16", "float32")
OFFLOADS = ("model", "sequential")
PROMPT_LINES = "a text file with one prompt on each line"


@dataclass(frozen=True)
class GenerateRequest:
    """What to make. None means the model's own default.

    Attributes:
        model: a name of :data:`psa.models.MODELS`, a checkpoint folder, or a hub id.
        prompts: one video each.
        image: first frame, for image-to-video.
        model_path: folder or hub id to take a known model's weights from.
        preset, attention_config, density, warmup_steps: see :func:`psa.enable`; ``dense`` turns PSA off.
        min_queries: videos of no more tokens stay dense, see :func:`psa.enable`.
        seed: of the first video; the i-th takes ``seed + i``.
        output_dir: videos go right there, and a second run resumes; None makes ``outputs/{model}/{timestamp}``.
        offload: None, ``"model"`` or ``"sequential"``: keep weights on the CPU until needed.
        context_parallel: ``{"ulysses": n}`` and/or ``{"ring": n}``: one video over n processes of torchrun.
        compare: also run dense from the same seed; side-by-side video and metrics.
    """

    model: str
    prompts: tuple[str, ...]
    image: str | None = None
    negative_prompt: str | None = None
    model_path: str | None = None
    lora_path: str | None = None
    preset: str | None = None
    attention_config: str | None = None
    density: float | None = None
    warmup_steps: int | None = None
    min_queries: int | None = None
    dense: bool = False
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    fps: int | None = None
    seed: int = 42
    output_dir: str | None = None
    dtype: str | None = None
    device: str | None = None
    offload: str | None = None
    vae_tiling: bool = False
    context_parallel: dict[str, int] = field(default_factory=dict)
    compare: bool = False

    @property
    def known(self) -> VideoModel | None:
        return MODELS.get(self.name)

    @property
    def name(self) -> str:
        """Of the known model, by its name or a hub id; else what was given."""
        return name_at(self.model) or self.model

    def with_defaults(self) -> "GenerateRequest":
        """The request with the model table's settings where it gives none."""
        if self.known is None:
            return self
        k = self.known
        table = {
            "width": k.width, "height": k.height, "num_frames": k.num_frames, "num_inference_steps": k.steps,
            "guidance_scale": k.guidance, "guidance_scale_2": k.guidance_2, "fps": k.fps,
        }  # fmt: skip
        return replace(self, **{name: value for name, value in table.items() if getattr(self, name) is None})

    def checkpoint(self) -> Checkpoint:
        known, source = self.known, self.model
        if known is not None:
            source = known.image if known.image and (self.image or self.asks_for_image) else known.hub_id
        return Checkpoint(self.model_path or source, known)

    @property
    def asks_for_image(self) -> bool:
        """Whether the model was given by the hub id of weights that start from an image."""
        known = self.known
        ids = (known.hub_id.lower(), (known.image or "").lower()) if known is not None else ("", "")
        return self.model.lower() == ids[1] != ids[0]

    @property
    def place(self) -> str:
        """The device to run on."""
        return pick_device(self.device)

    def config(self) -> PSAConfig | None:
        """PSA's settings; None when dense."""
        if self.known or self.preset:
            config = resolve_config(presets.get(self.name, self.preset, self.attention_config), self.density)
        else:
            config = resolve_config(None, self.density)
        if self.warmup_steps is not None:
            config = config.replace(warmup_steps=self.warmup_steps)
        return None if self.dense else config


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines are left out.

    Raises:
        ConfigError: when the file cannot be read or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompt_file: {path}: cannot be read ({one_line(error)}); expected {PROMPT_LINES}"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"prompt_file: {path}: empty; expected {PROMPT_LINES}")
    return prompts


def check(request: GenerateRequest) -> None:
    """Everything that can be wrong without the weights.

    Raises:
        PSAError: one line.
    """
    if request.known is None and not Path(request.model).is_dir() and "/" not in request.model:
        raise ConfigError(
            f"model: {request.model!r} is not known{nearest(request.model, MODELS)}; or a folder, or a hub id"
        )
    if not request.prompts or not all(isinstance(p, str) and p.strip() for p in request.prompts):
        raise ConfigError("prompt: empty; give --prompt or --prompt_file")
    for name in ("num_inference_steps", "fps"):
        value = getattr(request, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: {value} is not positive")
    for name, valid in (("dtype", DTYPES), ("offload", OFFLOADS)):
        value = getattr(request, name)
        if value is not None and value not in valid:
            raise ConfigError(f"{name}: {value!r} is unknown{nearest(value, valid)}")
    for name, degree in request.context_parallel.items():
        if name not in ("ulysses", "ring") or degree < 1:
            raise ConfigError(f"context_parallel: {name}={degree}; expected ulysses=N and/or ring=N")
    check_offload(request)
    if request.image and not Path(request.image).is_file():
        raise ConfigError(f"image: {request.image}: no such file")
    if request.image and request.known and not request.known.image and not request.model_path:
        raise ConfigError(
            f"image: {request.model} has no image-to-video weights; take another model, or such weights by --model_path"
        )
    if request.asks_for_image and not request.image:
        raise ConfigError(f"image: {request.model} starts from a first frame; give --image")
    if request.compare and request.dense:
        raise ConfigError("compare: compares PSA with dense; leave --dense out")
    request.config()
    checkpoint = request.checkpoint()
    checkpoint.check()
    checkpoint.check_size(request.width, request.height, request.num_frames)
    if not checkpoint.class_name:
        raise ConfigError(f"{checkpoint.source}: its model_index.json names no pipeline")
    lora_file(request.lora_path, request.known.lora if request.known else None)
    check_processes(request)
    check_packages(request)


def check_offload(request: GenerateRequest) -> None:
    if request.place.startswith("cpu") and request.offload:
        raise ConfigError(
            "offload: keeps weights on the CPU until a GPU needs them, and this runs on the CPU; leave it out"
        )


def check_packages(request: GenerateRequest) -> None:
    """Raises now what would otherwise be raised when the video is made and cannot be written or compared."""
    need("diffusers", "diffusers")
    need("av", "diffusers")
    if request.compare:
        need("skimage.metrics", "report")


def check_processes(request: GenerateRequest) -> None:
    asked = 1
    for degree in request.context_parallel.values():
        asked *= degree
    if asked > 1 and asked != world():
        raise ConfigError(
            f"context_parallel: {asked} processes are needed, {world()} run; start with: "
            f"torchrun --nproc_per_node {asked} --no_python psa generate …"
        )


def world() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))

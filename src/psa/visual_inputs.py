"""From a prompt and pictures to a model's inputs: by its own processor, or, for two Qwen models, without torchvision.

transformers builds a video processor only where torchvision can be imported. The two Qwen models need so little of it
that their inputs are made here when it is missing; other models then get an error that names the package.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import PSAError, one_line
from .media import Clip

QWEN = ("qwen2_vl", "qwen2_5_vl")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class Vision:
    """What to look at: pictures, or the frames of one video."""

    images: Sequence[Any] = ()
    clip: Clip | None = None


class Preparer:
    """Makes inputs for one model, and turns tokens back into text.

    Raises:
        PSAError: where the model's processor needs a package that is missing.
    """

    def __init__(self, model: str, config: Any) -> None:
        from transformers import AutoProcessor, AutoTokenizer

        self.config = config
        self.model = model
        self.processor: Any = None
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.tokenizer = self.processor.tokenizer
            return
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
            reason = one_line(error)
        if config.model_type not in QWEN:
            needed = "torchvision" in reason.lower() or not _torchvision()
            hint = "; it needs torchvision: pip install torchvision" if needed else ""
            raise PSAError(f"{model}: its processor cannot be loaded ({reason}){hint}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise PSAError(f"{model}: its tokenizer cannot be loaded ({one_line(error)})") from error

    def __call__(self, prompt: str, vision: Vision) -> dict[str, Any]:
        """Tensors for ``model.generate``, batch of one."""
        if self.processor is not None:
            return self._by_processor(prompt, vision)
        return qwen_inputs(prompt, vision, self.tokenizer, self.config, _preprocessor(self.model))

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _by_processor(self, prompt: str, vision: Vision) -> dict[str, Any]:
        kinds = ["video"] if vision.clip else ["image"] * len(vision.images)
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
        try:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except ValueError as error:
            raise PSAError(f"{self.model}: has no chat template ({one_line(error)})") from error
        call: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if vision.clip:
            call |= {"videos": [_frames(vision.clip)], "video_metadata": [_metadata(vision.clip)]}
            call["do_sample_frames"] = False
        elif vision.images:
            call["images"] = list(vision.images)
        return dict(self.processor(**call))


def _torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def _frames(clip: Clip) -> Any:
    import numpy

    return numpy.stack([numpy.asarray(frame) for frame in clip.frames])


def _metadata(clip: Clip) -> Any:
    from transformers.video_utils import VideoMetadata

    width, height = clip.frames[0].size
    return VideoMetadata(
        total_num_frames=clip.total,
        fps=clip.native_fps,
        width=width,
        height=height,
        duration=clip.total / clip.native_fps,
        video_backend="pyav",
        frames_indices=list(clip.indices),
    )


def _preprocessor(model: str) -> dict[str, Any]:
    """The image settings beside a model: mean, standard deviation and pixel bounds."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = cached_file(model, name)
        except OSError:
            continue
        if found:
            settings = json.loads(Path(found).read_text(encoding="utf-8"))
            return settings.get("image_processor", settings)
    return {}


# -- Qwen2-VL and Qwen2.5-VL without torchvision ---------------------------------------------------------------------


def qwen_inputs(prompt: str, vision: Vision, tokenizer: Any, config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What the Qwen processors make of a chat with one user message: placeholders, patches, grids, token types."""
    tower = config.vision_config
    patch, merge = tower.patch_size, tower.spatial_merge_size
    together = tower.temporal_patch_size
    mean, std = settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD
    stacks = [vision.clip.frames] if vision.clip else [[image] for image in vision.images]
    marker = config.video_token_id if vision.clip else config.image_token_id
    start, end = config.vision_start_token_id, config.vision_end_token_id
    patches, grids = [], []
    ids: list[int] = tokenizer(CHAT[0], add_special_tokens=False)["input_ids"]
    for frames in stacks:
        pixels = _pixels(frames, patch * merge, mean, std, settings)
        flat, grid = patchify(pixels, patch, merge, together)
        patches.append(flat)
        grids.append(grid)
        ids = [*ids, start, *[marker] * (math.prod(grid) // merge**2), end]
    ids = [*ids, *tokenizer(prompt + CHAT[1], add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor([ids])
    types = torch.where(tokens == config.image_token_id, 1, torch.where(tokens == config.video_token_id, 2, 0))
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": types,
    }
    if grids:
        names = ("pixel_values_videos", "video_grid_thw") if vision.clip else ("pixel_values", "image_grid_thw")
        inputs |= {names[0]: torch.cat(patches), names[1]: torch.tensor(grids)}
    if vision.clip and config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([together / vision.clip.fps])
    return inputs


def patchify(pixels: Tensor, patch: int, merge: int, together: int) -> tuple[Tensor, tuple[int, int, int]]:
    """[F, 3, H, W] -> patches [t·h·w, 3·together·patch²] and (t, h, w): time, then merged cells, then their patches."""
    missing = -len(pixels) % together
    pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
    count, channels, height, width = pixels.shape
    t, h, w = count // together, height // patch, width // patch
    cells = pixels.view(t, together, channels, h // merge, merge, patch, w // merge, merge, patch)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def fit(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of ``factor`` and whose area lies within the bounds."""
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if tall * wide > max_pixels:
        shrunk = math.sqrt(height * width / max_pixels)
        tall, wide = (max(factor, math.floor(side / shrunk / factor) * factor) for side in (height, width))
    elif tall * wide < min_pixels:
        grown = math.sqrt(min_pixels / (height * width))
        tall, wide = (math.ceil(side * grown / factor) * factor for side in (height, width))
    return tall, wide


def _pixels(frames: Sequence[Any], factor: int, mean: Any, std: Any, settings: dict[str, Any]) -> Tensor:
    """Frames resized to whole patches and standardised: float32 [F, 3, H, W]."""
    import numpy

    size = settings.get("size") or {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    high = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    width, height = frames[0].size
    tall, wide = fit(height, width, factor, low, high)
    arrays = [numpy.asarray(frame.resize((wide, tall), resample=3), dtype=numpy.float32) for frame in frames]
    pixels = torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

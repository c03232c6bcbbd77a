"""The video models that `psa generate` knows by name, and how an unnamed one is recognised."""

from dataclasses import dataclass
from typing import Any

from . import tiny
from .config import nearest
from .errors import ConfigError


@dataclass(frozen=True)
class VideoModel:
    """Settings of one known model.

    Attributes:
        hub_id: on the Hugging Face Hub; a folder for the bundled model.
        width, height, num_frames, fps: of the video by default.
        guidance_2: of the low-noise expert, where there are two.
        flow_shift: of the flow-matching scheduler; None keeps the checkpoint's.
        multiple: width and height must be multiples of this.
        frame_step: frames must be 1 more than a multiple of this.
        image: the image-to-video checkpoint of the same model, if any.
        lora: repository and file of LoRA weights.
    """

    hub_id: str
    width: int
    height: int
    num_frames: int
    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    fps: int = 16
    flow_shift: float | None = None
    multiple: int = 16
    frame_step: int = 4
    image: str | None = None
    lora: tuple[str, str] | None = None


BLADE = ("GYP666/BLADE", "cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors")

MODELS = {
    "tiny": VideoModel(
        str(tiny.path()), tiny.WIDTH, tiny.HEIGHT, tiny.FRAMES,
        steps=tiny.STEPS, guidance=tiny.GUIDANCE, fps=tiny.FPS, multiple=16, frame_step=2,
    ),
    "wan21_1.3b": VideoModel("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1280, 720, 69, flow_shift=5.0),
    "wan21_14b": VideoModel(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers", 1280, 720, 69, flow_shift=5.0,
        image="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    ),
    "wan22_5b": VideoModel(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", 1280, 704, 121, fps=24, multiple=32,
        image="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ),
    "wan22_a14b": VideoModel(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 1280, 768, 69, steps=40, guidance=4.0, guidance_2=3.0,
        image="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    ),
    "cogvideo1.5_5b": VideoModel(
        "zai-org/CogVideoX1.5-5B", 1360, 768, 81, guidance=6.0, image="zai-org/CogVideoX1.5-5B-I2V"
    ),
    "cogvideo_5b": VideoModel(
        "zai-org/CogVideoX-5b", 720, 480, 49, guidance=6.0, fps=8, image="zai-org/CogVideoX-5b-I2V"
    ),
    "cogvideo_5b_lora": VideoModel(
        "zai-org/CogVideoX-5b", 720, 480, 49, steps=4, guidance=1.0, fps=8, lora=BLADE
    ),
}  # fmt: skip


def known(name: str) -> VideoModel:
    """A known model's settings.

    Raises:
        ConfigError: naming the nearest known model.
    """
    if name not in MODELS:
        raise ConfigError(
            f"model: {name!r} is not known{nearest(name, MODELS)}; or a folder, or a hub id such as org/name"
        )
    return MODELS[name]


def name_at(source: str) -> str | None:
    """The known model that a name, or a hub id of its text-to-video or image-to-video weights, stands for."""
    if source in MODELS:
        return source
    asked = source.lower()
    return next((n for n, m in MODELS.items() if asked in (m.hub_id.lower(), (m.image or "").lower())), None)


def name_of(target: Any) -> str | None:
    """The known model that a diffusers pipeline or transformer is an instance of, by its structure; None for others."""
    transformer = getattr(target, "transformer", target)
    transformer = getattr(transformer, "_orig_mod", transformer)
    config, kind = getattr(transformer, "config", {}), type(transformer).__name__
    if kind == "CogVideoXTransformer3DModel":
        return "cogvideo1.5_5b" if config.get("patch_size_t") else "cogvideo_5b"
    if kind != "WanTransformer3DModel":
        return None
    if getattr(target, "transformer_2", None) is not None:
        return "wan22_a14b"
    if config.get("patch_size") and tuple(config["patch_size"]) == (1, 1, 1) and config.get("num_layers") == 6:
        return "tiny"
    if config.get("in_channels") == 48 or getattr(getattr(target, "config", None), "expand_timesteps", False):
        return "wan22_5b"
    return "wan21_14b" if config.get("num_attention_heads", 0) >= 40 else "wan21_1.3b"


def section_of(target: Any) -> str:
    """The presets section of a diffusers pipeline or transformer.

    Raises:
        ConfigError: for a model without presets.
    """
    name = name_of(target)
    if name is None:
        kind = type(target).__name__
        raise ConfigError(
            f"preset: {kind} has no presets of its own; give density= or config=, or a preset as 'section/name', "
            "e.g. 'Wan2.1_14b/psa_balanced'"
        )
    return name

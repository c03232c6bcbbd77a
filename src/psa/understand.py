"""Questions about images and videos, answered by any vision-language model of transformers, dense or with PSA."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import media
from .config import PSAConfig
from .devices import pick_device
from .errors import PSAError, one_line
from .extras import need, quiet_loading
from .integrations.transformers import choose_config, enable_model
from .visual_inputs import Preparer, Vision

DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPARED = 16
"""Answer tokens whose distributions are kept for a comparison."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    Attributes:
        mode: ``"dense"`` or ``"psa"``.
        tokens: answer tokens. prompt_tokens: tokens of prompt and vision.
        first_token_seconds: from the call to the first token, vision tower included. seconds: to the last one.
        density: share of the lower triangle's work that the sparse calls kept; None where none was made.
        layers: the same per layer.
        token_ids, logits: of the answer; float32 [at most 16, vocabulary]. Not part of :meth:`to_dict`.
    """

    mode: str
    text: str
    tokens: int
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
    density: float | None = None
    layers: dict[int, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    logits: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(Answer(**{**self.__dict__, "logits": None}))
        return {name: value for name, value in facts.items() if name not in ("token_ids", "logits")}


@dataclass(frozen=True)
class Comparison:
    """How far two answers agree, over the tokens for which both models had read the same text.

    Attributes:
        kl_first: KL(dense ‖ psa) of the first token's distribution, in nats. kl_mean: over ``compared`` tokens.
        top1: share of compared tokens whose most likely token is the same.
        same_text: whether the answers are equal.
        first_token_speedup: dense time to the first token over that with PSA.
    """

    compared: int
    kl_first: float
    kl_mean: float
    top1: float
    same_text: bool
    first_token_speedup: float


@dataclass(frozen=True)
class Loaded:
    """A model, ready to answer."""

    name: str
    model: Any
    prepare: Preparer


# -- before weights load ---------------------------------------------------------------------------------------------


def look(
    inputs: Sequence[str | Path],
    kind: str | None = None,
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
    on_frame: media.OnFrame | None = None,
) -> Vision:
    """Reads what the question is about: one video, or one or several images.

    Args:
        kind: ``"image"``, ``"video"`` or None: by the files' names (a folder of pictures counts as a video).
        frames, fps: which frames of a video; see :func:`psa.media.frame_indices`.

    Raises:
        PSAError: for files that are missing, unreadable or empty, and for more frames than exist.
    """
    kind, paths = check_inputs(inputs, kind, frames=frames, fps=fps, max_pixels=max_pixels)
    if kind == "image":
        return Vision(images=media.read_images(paths, max_pixels=max_pixels or media.IMAGE_PIXELS))
    pixels = max_pixels or media.VIDEO_PIXELS
    return Vision(clip=media.read_video(paths[0], frames=frames, fps=fps, max_pixels=pixels, on_frame=on_frame))


def check_inputs(
    inputs: Sequence[str | Path],
    kind: str | None = None,
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
) -> tuple[str, list[Path]]:
    """``"image"`` or ``"video"``, and the files. Raises what :func:`look` raises, as far as headers tell."""
    paths = [Path(path).expanduser() for path in inputs]
    if not paths:
        raise PSAError("--input: give an image, several images, or a video")
    if max_pixels is not None and max_pixels < 28 * 28:
        raise PSAError(f"--max_pixels: {max_pixels} is less than one token's 28×28")
    pictures = all(path.suffix.lower() in media.IMAGE_SUFFIXES for path in paths)
    kind = kind or ("image" if pictures else "video")
    if kind not in ("image", "video"):
        raise PSAError(f"--type: {kind!r} is neither image nor video")
    if kind == "image":
        if frames is not None or fps is not None:
            raise PSAError("--frames and --fps belong to a video; the input is read as images")
        files = [file for path in paths for file in (media.image_files(path) if path.is_dir() else [path])]
        media.check_images(files)
        return kind, files
    if len(paths) > 1:
        raise PSAError(f"--input: one video at a time, got {len(paths)} files; several images need --type image")
    media.choose_frames(paths[0], frames=frames, fps=fps)
    return kind, paths


def check_prompt(prompt: str) -> str:
    if not prompt or not prompt.strip():
        raise PSAError("--prompt: has no text; ask a question")
    return prompt


def check_settings(
    *, use_psa: bool, preset: str | None, density: float | None, attention_config: str | None
) -> PSAConfig | None:
    """The settings that PSA would run with, None for a dense answer; so that mistakes show before weights load."""
    if not use_psa:
        if preset or density is not None:
            raise PSAError("--preset and --density need --use_psa or --compare")
        return None
    return choose_config(preset, None, density, attention_config)


def check_model(name: str) -> Any:
    """The model's configuration, read before its weights.

    Raises:
        PSAError: for a folder that holds no model, an unknown hub id, or a model that takes no images.
    """
    transformers = need("transformers", "transformers")
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise PSAError(f"{name}: not a model folder (no config.json)")
    elif local.exists() or name.startswith((".", "/", "~")):
        raise PSAError(f"{name}: not a model folder")
    try:
        config = transformers.AutoConfig.from_pretrained(str(local) if local.is_dir() else name)
    except (OSError, ValueError, KeyError) as error:
        raise PSAError(f"{name}: no such model here or on the hub ({one_line(error)})") from error
    if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
        raise PSAError(f"{name}: a {config.model_type} model takes no images or videos")
    return config


def load(name: str, *, config: Any = None, dtype: str = "auto", device: str | None = None) -> Loaded:
    """Loads processor and weights of a local folder or hub id.

    Args:
        config: from :func:`check_model`.
        dtype: ``"auto"`` is the checkpoint's own. device: default cuda where there is one.

    Raises:
        PSAError: one line saying what is missing.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise PSAError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    config = check_model(name) if config is None else config
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    prepare = Preparer(source, config)
    device = pick_device(device)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    placed = {} if device == "cpu" else {"device_map": device}
    try:
        with quiet_loading("transformers"):
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=kind, **placed)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise PSAError(f"{name}: its weights cannot be loaded ({one_line(error)})") from error
    return Loaded(name, model.eval(), prepare)


# -- answers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer(
    loaded: Loaded,
    prompt: str,
    vision: Vision,
    *,
    use_psa: bool = False,
    preset: str | None = None,
    config: PSAConfig | None = None,
    density: float | None = None,
    attention_config: str | None = None,
    min_queries: int = 256,
    max_new_tokens: int = 128,
    prefill_chunk: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Answer:
    """Answers greedily. Arguments from ``preset`` to ``min_queries`` as in :func:`psa.enable`, with ``use_psa``."""
    if max_new_tokens < 1:
        raise PSAError(f"--max_new_tokens: {max_new_tokens} is not a whole number from 1")
    if prefill_chunk and int(need("transformers", "transformers").__version__.split(".")[0]) < 5:
        raise PSAError("--prefill_chunk: needs transformers 5; version 4 hands every chunk all of the pictures")
    inputs = _for_model(loaded, loaded.prepare(check_prompt(prompt), vision))
    settings = {"preset": preset, "config": config, "density": density, "attention_config": attention_config}
    with _attention(loaded.model, use_psa, min_queries, settings) as handle:
        watch = _Watch(max_new_tokens, on_token, loaded.model.device)
        chunked = {"prefill_chunk_size": prefill_chunk} if prefill_chunk else {}
        out = loaded.model.generate(
            **inputs,
            **chunked,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[watch],
            output_logits=True,
            return_dict_in_generate=True,
        )
        seconds = watch.elapsed()
        stats = handle.stats if handle else {"density": None, "layers": {}}
    length = inputs["input_ids"].shape[1]
    tokens = out.sequences[0, length:]
    notes = ()
    if use_psa and stats["density"] is None:
        notes = (f"psa never ran: {length} tokens, and prefills of up to {min_queries} stay dense",)
    return Answer(
        mode="psa" if use_psa else "dense",
        text=loaded.prepare.decode(tokens),
        tokens=len(tokens),
        prompt_tokens=length,
        first_token_seconds=watch.first or seconds,
        seconds=seconds,
        density=stats["density"],
        layers={i: layer["density"] for i, layer in stats["layers"].items()},
        notes=notes,
        token_ids=tuple(tokens.tolist()),
        logits=torch.stack([step[0].float().cpu() for step in out.logits[:COMPARED]]),
    )


def compare(dense: Answer, sparse: Answer) -> Comparison:
    """Agreement of the first tokens' distributions, up to and including the first place where the answers part."""
    assert dense.logits is not None and sparse.logits is not None
    count = min(len(dense.logits), len(sparse.logits))
    same = [a == b for a, b in zip(dense.token_ids[:count], sparse.token_ids[:count], strict=True)]
    compared = same.index(False) + 1 if False in same else count
    a, b = (x.logits[:compared].log_softmax(-1) for x in (dense, sparse))  # type: ignore[index]
    kl = (a.exp() * (a - b)).nan_to_num(0.0).sum(-1).clamp(min=0)
    return Comparison(
        compared=compared,
        kl_first=float(kl[0]),
        kl_mean=float(kl.mean()),
        top1=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        same_text=dense.text == sparse.text,
        first_token_speedup=dense.first_token_seconds / max(1e-9, sparse.first_token_seconds),
    )


class _Watch:
    """A logits processor that changes nothing: it times the first token and reports progress."""

    def __init__(self, total: int, on_token: Callable[[int, int], None] | None, device: torch.device) -> None:
        self.total, self.on_token, self.device = total, on_token, device
        self.start, self.first, self.count = time.perf_counter(), 0.0, 0

    def elapsed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        self.first = self.first or self.elapsed()
        if self.on_token:
            self.on_token(self.count, self.total)
        return scores


@contextmanager
def _attention(model: Any, use_psa: bool, min_queries: int, settings: dict[str, Any]) -> Iterator[Any]:
    if not use_psa:
        yield None
        return
    with enable_model(model, **settings, min_queries=min_queries) as handle:
        yield handle


def _for_model(loaded: Loaded, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the model's device, pixels in its dtype, without what its version of transformers does not know."""
    known = inspect.signature(loaded.model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    kept = {}
    for name, value in inputs.items():
        if name not in known and (name == "mm_token_type_ids" or not open_ended):
            continue
        if isinstance(value, Tensor):
            value = value.to(loaded.model.device)
            value = value.to(loaded.model.dtype) if value.is_floating_point() and "pixel" in name else value
        kept[name] = value
    return kept

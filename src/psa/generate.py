"""`psa generate`: prompts to videos, resumable, each with a record of how it was made. Prints nothing."""

import contextlib
import hashlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import __version__, presets
from .checkpoint import Checkpoint, lora_file
from .config import PSAConfig, nearest
from .errors import ConfigError, PSAError
from .functional import resolve_config
from .models import MODELS, VideoModel
from .video import likeness, to_uint8, write_video

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
        return MODELS.get(self.model)

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
        hub_id = self.known and ((self.image and self.known.image) or self.known.hub_id)
        return Checkpoint(self.model_path or hub_id or self.model, self.known)

    def config(self) -> PSAConfig | None:
        """PSA's settings; None when dense."""
        if self.known or self.preset:
            section, _, name = (self.preset or "").rpartition("/")
            config = presets.get(section or self.model, name or None, self.attention_config)
            config = config if self.density is None else config.replace(density=self.density)
        else:
            config = resolve_config(None, self.density)
        if self.warmup_steps is not None:
            config = config.replace(warmup_steps=self.warmup_steps)
        return None if self.dense else config


@dataclass(frozen=True)
class Event:
    """Progress: ``kind`` is load, advice, start, step, done, skip or fail; the rest as far as it is known."""

    kind: str
    index: int = 0
    count: int = 0
    text: str = ""
    step: int = 0
    steps: int = 0
    density: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """One video: its file, or the error that prevented it. ``skipped``: an earlier run had finished it."""

    index: int
    prompt: str
    path: Path
    error: str | None = None
    skipped: bool = False
    record: dict[str, Any] = field(default_factory=dict, repr=False)


Progress = Callable[[Event], None]


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines are left out.

    Raises:
        ConfigError: when the file cannot be read or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file: {path}: cannot be read ({error}); expected {PROMPT_LINES}") from error
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
        raise ConfigError(f"model: {request.model!r} is not known{nearest(request.model, MODELS)}; or a folder, or a hub id")
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
    if request.image and not Path(request.image).is_file():
        raise ConfigError(f"image: {request.image}: no such file")
    if request.compare and request.dense:
        raise ConfigError("compare: compares PSA with dense; leave --dense out")
    request.config()
    checkpoint = request.checkpoint()
    checkpoint.check()
    checkpoint.check_size(request.width, request.height, request.num_frames)
    lora_file(request.lora_path, request.known.lora if request.known else None)
    _check_processes(request)


def generate(request: GenerateRequest, progress: Progress | None = None) -> list[Result]:
    """Makes the videos of a request, as H.264 with a JSON record beside each.

    A failure does not stop the others. Finished videos of the same request are left as they are.

    Raises:
        PSAError: before any weight loads, for a request that cannot be served.
    """
    tell = progress or (lambda event: None)
    request = request.with_defaults()
    check(request)
    folder = output_folder(request)
    jobs = [(i, prompt, folder / f"video_{i:04d}.mp4") for i, prompt in enumerate(request.prompts)]
    done = [Result(i, prompt, path, skipped=True, record=_finished(request, i, path) or {}) for i, prompt, path in jobs]
    for result in done:
        if result.record:
            tell(Event("skip", result.index, len(jobs), str(result.path)))
    todo = [job for job, result in zip(jobs, done, strict=True) if not result.record]
    results = {result.index: result for result in done if result.record}
    if not todo:
        return list(results.values())
    if advice := memory_advice(request):
        tell(Event("advice", text=advice))
    tell(Event("load", count=len(jobs), text=request.checkpoint().source))
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load(request)
    for index, prompt, path in _share(request, todo):
        tell(Event("start", index, len(jobs), prompt))
        try:
            record = _make(pipe, request, index, path, tell)
            results[index] = Result(index, prompt, path, record=record)
            tell(Event("done", index, len(jobs), str(path)))
        except Exception as error:  # whatever one video runs into, the others are still made
            reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            results[index] = Result(index, prompt, path, error=reason + _memory_hint(error))
            tell(Event("fail", index, len(jobs), results[index].error or ""))
    return [results[index] for index in sorted(results)]


def load(request: GenerateRequest) -> Any:
    """The pipeline, as the model table and the request want it; on its device, or offloaded."""
    import torch

    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = request.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipe = request.checkpoint().load(dtype, bool(request.image))
    known = request.known
    if known and known.flow_shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=known.flow_shift)
    weights = lora_file(request.lora_path, known.lora if known else None)
    if weights:
        pipe.load_lora_weights(weights, adapter_name="psa")
    if known and known.lora:
        from diffusers import CogVideoXDPMScheduler

        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if request.vae_tiling:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    if request.context_parallel:
        from .integrations.parallel import split_sequence

        device = split_sequence(pipe, request.context_parallel, device)
    elif _world() > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if request.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif request.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


# -- one video -------------------------------------------------------------------------------------------------------


def _make(pipe: Any, request: GenerateRequest, index: int, path: Path, tell: Progress) -> dict[str, Any]:
    config = request.config()
    frames, facts = _run(pipe, request, config, index, tell)
    record = {"request": _identity(request, index), "versions": versions(), **facts}
    if request.compare and config is not None:
        dense, dense_facts = _run(pipe, request, None, index, tell)
        fps = request.fps or 16
        if _rank() == 0:
            write_video(path.with_suffix(".dense.mp4"), dense, fps)
            import numpy as np

            write_video(path.with_suffix(".compare.mp4"), np.concatenate((dense, frames), axis=2), fps)
        record["compare"] = {
            "seconds_dense": dense_facts["seconds"], "seconds_psa": facts["seconds"],
            "speedup": dense_facts["seconds"] / facts["seconds"], "density": facts["density"], **likeness(dense, frames),
        }  # fmt: skip
    if _rank() == 0 or not request.context_parallel:
        write_video(path, frames, request.fps or 16)
        _write_json(path.with_suffix(".json"), record)
    return record


def _run(pipe: Any, request: GenerateRequest, config: PSAConfig | None, index: int, tell: Progress) -> tuple[Any, dict[str, Any]]:
    """uint8 frames [F, H, W, 3] and what was measured."""
    import torch

    from .integrations import enable

    count = len(request.prompts)
    with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        handle = stack.enter_context(enable(pipe, config=config, replace=True)) if config is not None and config.type == "psa" else None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

        def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            density = handle.stats["overall_density"] if handle else 1.0
            tell(Event("step", index, count, "", step + 1, _steps(pipe, request), density, _peak()))
            return tensors

        began = time.perf_counter()
        output = pipe(**_arguments(pipe, request, index, on_step))
        seconds = time.perf_counter() - began
        stats = handle.stats if handle else None
    for note in dict.fromkeys(str(w.message) for w in caught if "PSA never ran" in str(w.message)):
        tell(Event("advice", index, count, note))
    if not hasattr(output, "frames"):
        raise PSAError(f"{type(pipe).__name__} makes no video")
    measured = {"seconds": seconds, "peak_bytes": _peak(), "density": stats["density"] if stats else 1.0, "stats": stats}
    return to_uint8(output.frames[0]), measured


def _arguments(pipe: Any, request: GenerateRequest, index: int, on_step: Any) -> dict[str, Any]:
    """What this pipeline's call takes of the request."""
    import torch

    given = {
        "prompt": request.prompts[index], "negative_prompt": request.negative_prompt, "width": request.width,
        "height": request.height, "num_frames": request.num_frames, "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale, "guidance_scale_2": request.guidance_scale_2,
    }  # fmt: skip
    if request.guidance_scale_2 is not None and getattr(pipe, "transformer_2", None) is None:
        del given["guidance_scale_2"]
    if request.image:
        from diffusers.utils import load_image

        given["image"] = load_image(request.image)
    given = {name: value for name, value in given.items() if value is not None}
    given["generator"] = torch.Generator("cpu").manual_seed(request.seed + index)
    given["output_type"], given["callback_on_step_end"] = "np", on_step
    names = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in given.items() if name in names}


def _steps(pipe: Any, request: GenerateRequest) -> int:
    return getattr(pipe, "num_timesteps", None) or request.num_inference_steps or 0


# -- records and folders ---------------------------------------------------------------------------------------------


def _identity(request: GenerateRequest, index: int) -> dict[str, Any]:
    """What decides how a video looks: two videos with the same identity are the same."""
    config = request.config()
    own = asdict(request)
    for name in ("prompts", "output_dir", "offload", "context_parallel", "compare", "attention_config", "device"):
        del own[name]
    return {
        **own, "prompt": request.prompts[index], "seed": request.seed + index, "weights": request.checkpoint().source,
        "preset": request.preset, "psa": config.to_dict() if config else None,
    }  # fmt: skip


def _finished(request: GenerateRequest, index: int, path: Path) -> dict[str, Any] | None:
    """The record of an earlier run that finished this video.

    Raises:
        ConfigError: when the file is another request's.
    """
    beside = path.with_suffix(".json")
    if not path.is_file() or not beside.is_file():
        return None
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return None
    expected = json.loads(json.dumps(_identity(request, index)))
    other = [name for name, value in expected.items() if record.get("request", {}).get(name) != value]
    if other:
        raise ConfigError(f"{path}: made with another {other[0]}; choose another --output_dir, or move it away")
    return None if request.compare and "compare" not in record else record


def output_folder(request: GenerateRequest) -> Path:
    """Where the videos go; without ``output_dir`` an unfinished folder of the same request, else a new one."""
    if request.output_dir:
        return Path(request.output_dir)
    base = Path("outputs") / Path(request.model).name
    key = {"request": [_identity(request, i) for i in range(len(request.prompts))], "compare": request.compare}
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    for folder in sorted(base.glob(f"*/.{mark}"), reverse=True):
        if not all((folder.parent / f"video_{i:04d}.json").is_file() for i in range(len(request.prompts))):
            return folder.parent
    folder = base / _agree(time.strftime("%Y%m%d_%H%M%S"))
    number = 1
    while folder.exists() and _world() == 1:
        folder, number = folder.with_name(f"{folder.name.split('-')[0]}-{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{mark}").touch()
    return folder


def _write_json(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    partial.replace(path)


def versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "psa": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "device": device,
    }  # fmt: skip


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_advice(request: GenerateRequest) -> str | None:
    """What to do when the weights alone will not fit, said before they load."""
    import torch

    if request.offload:
        return None
    if torch.cuda.is_available() and not (request.device or "cuda").startswith("cpu"):
        free, place = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        free, place = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"
    need_bytes = request.checkpoint().weight_bytes()
    if need_bytes < 0.85 * free:
        return None
    return (
        f"weights take {need_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of {place} are free: "
        "add --offload model (or sequential), --vae_tiling, or fewer frames"
    )


def _memory_hint(error: Exception) -> str:
    return "; add --offload model, --vae_tiling, or fewer frames" if "out of memory" in str(error).lower() else ""


def _peak() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


# -- several processes -----------------------------------------------------------------------------------------------


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _agree(text: str) -> str:
    """One process's text for all of them: the start time of the launcher."""
    return text if _world() == 1 else os.environ.get("TORCHELASTIC_RUN_ID", "run").replace("none", "run") + text[:8]


def _check_processes(request: GenerateRequest) -> None:
    asked = 1
    for degree in request.context_parallel.values():
        asked *= degree
    if asked > 1 and asked != _world():
        raise ConfigError(
            f"context_parallel: {asked} processes are needed, {_world()} run; start with: torchrun --nproc_per_node {asked} --no_python psa generate …"
        )


def _share(request: GenerateRequest, jobs: list[Any]) -> Iterator[Any]:
    """This process's videos: all of them under context parallelism, else a share that accelerate deals out."""
    if _world() == 1 or request.context_parallel:
        yield from jobs
        return
    from accelerate import PartialState

    with PartialState().split_between_processes(jobs) as mine:
        yield from mine

"""`psa generate`: prompts to videos, resumable, each with a record of how it was made. Prints nothing."""

import contextlib
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import lora_file
from .config import PSAConfig
from .errors import PSAError, PSAWarning
from .records import (
    finished,
    identity,
    memory_advice,
    memory_hint,
    output_folder,
    peak_bytes,
    share,
    versions,
    write_json,
)
from .request import GenerateRequest, check, rank, read_prompts, world
from .video import likeness, to_uint8, write_video

__all__ = ["Event", "GenerateRequest", "Result", "check", "generate", "load", "read_prompts"]


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


def generate(request: GenerateRequest, progress: Progress | None = None) -> list[Result]:
    """Makes the videos of a request, as H.264 with a JSON record beside each.

    A failure does not stop the others. Finished videos of the same request are left as they are.

    Raises:
        PSAError: before any weight loads, for a request that cannot be served.
    """
    tell = progress or (lambda event: None)
    request = request.with_defaults()
    check(request)
    _enter_device(request)
    folder = output_folder(request)
    jobs = [(i, prompt, folder / f"video_{i:04d}.mp4") for i, prompt in enumerate(request.prompts)]
    done = [Result(i, prompt, path, skipped=True, record=finished(request, i, path) or {}) for i, prompt, path in jobs]
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
    for index, prompt, path in share(request, todo):
        tell(Event("start", index, len(jobs), prompt))
        try:
            record = _make(pipe, request, index, path, tell)
            results[index] = Result(index, prompt, path, record=record)
            tell(Event("done", index, len(jobs), str(path)))
        except Exception as error:  # whatever one video runs into, the others are still made
            reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            results[index] = Result(index, prompt, path, error=reason + memory_hint(error))
            tell(Event("fail", index, len(jobs), results[index].error or ""))
    return [results[index] for index in sorted(results)]


def _enter_device(request: GenerateRequest) -> None:
    """Makes the request's GPU the current one, of which names and memory are read."""
    import torch

    device = torch.device(request.place)
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None and world() > 1 else device.index
    if device.type == "cuda" and index is not None:
        torch.cuda.set_device(index)


def load(request: GenerateRequest) -> Any:
    """The pipeline, as the model table and the request want it; on its device, or offloaded."""
    device = request.place
    dtype = request.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipe = request.checkpoint().load(dtype, bool(request.image))
    known = request.known
    if known and known.flow_shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=known.flow_shift)
    weights = lora_file(request.lora_path, known.lora if known else None)
    if weights:
        # By name: without one, diffusers 0.36 refuses even a local file when it is told to stay offline.
        file = Path(weights)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="psa")
    if known and known.lora:
        from diffusers import CogVideoXDPMScheduler

        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if request.vae_tiling:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    if request.context_parallel:
        from .integrations.parallel import split_sequence

        device = split_sequence(pipe, request.context_parallel, device)
    elif device == "cuda":
        import torch

        device = f"cuda:{torch.cuda.current_device()}"
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
    if request.compare and config is not None and request.place.startswith("cuda"):
        _warm_up(pipe, request, config, index)
    frames, facts = _run(pipe, request, config, index, tell)
    record = {"request": identity(request, index), "versions": versions(), **facts}
    fps, writes = request.fps or 16, rank() == 0 or not request.context_parallel
    if writes:
        write_video(path, frames, fps)
    if request.compare and config is not None:
        dense, dense_facts = _run(pipe, request, None, index, tell)
        if writes:
            write_video(path.with_suffix(".dense.mp4"), dense, fps)
            write_video(path.with_suffix(".compare.mp4"), np.concatenate((dense, frames), axis=2), fps)
        record["compare"] = {
            "seconds_dense": dense_facts["seconds"], "seconds_psa": facts["seconds"],
            "speedup": dense_facts["seconds"] / facts["seconds"], "density": facts["density"],
            **likeness(dense, frames),
        }  # fmt: skip
    if writes:
        write_json(path.with_suffix(".json"), record)
    return record


def _warm_up(pipe: Any, request: GenerateRequest, config: PSAConfig, index: int) -> None:
    """One step by PSA and one densely, unmeasured: the first on a GPU pays for compiling and for its start."""
    from .integrations import enable

    def stop(pipe: Any, _: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    call = _arguments(pipe, request, index, stop) | {"output_type": "latent"}
    for settings in (config, None):
        sparse = settings is not None and settings.type == "psa"
        options = {"config": settings, "min_queries": request.min_queries, "replace": True}
        with enable(pipe, **options) if sparse else contextlib.nullcontext():
            pipe(**call)


def _run(
    pipe: Any, request: GenerateRequest, config: PSAConfig | None, index: int, tell: Progress
) -> tuple[Any, dict[str, Any]]:
    """uint8 frames [F, H, W, 3] and what was measured."""
    import torch

    from .integrations import enable

    count = len(request.prompts)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_noting(notes))
        handle = (
            stack.enter_context(enable(pipe, config=config, min_queries=request.min_queries, replace=True))
            if config is not None and config.type == "psa"
            else None
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

        def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            density = handle.density if handle else 1.0
            tell(Event("step", index, count, "", step + 1, _steps(pipe, request), density, peak_bytes()))
            return tensors

        began = time.perf_counter()
        output = pipe(**_arguments(pipe, request, index, on_step))
        seconds = time.perf_counter() - began
        stats = handle.stats if handle else None
    for note in dict.fromkeys(notes):
        tell(Event("advice", index, count, note))
    if not hasattr(output, "frames"):
        raise PSAError(f"{type(pipe).__name__} makes no video")
    measured = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "density": stats["density"] or 1.0 if stats else 1.0,
        "stats": stats,
    }
    return to_uint8(output.frames[0]), measured


@contextlib.contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collects the warnings of psa, which are shown as notes; those of others show as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PSAWarning)
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, PSAWarning):
                notes.append(str(message))
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = note
        yield


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

"""Where generated videos lie, the record beside each, and how several runs or processes share the work."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ConfigError
from .request import GenerateRequest, rank, world


def identity(request: GenerateRequest, index: int) -> dict[str, Any]:
    """What decides how a video looks: two videos with the same identity are the same."""
    config = request.config()
    own = asdict(request)
    for name in ("prompts", "output_dir", "offload", "context_parallel", "compare", "attention_config", "device"):
        del own[name]
    return {
        **own, "prompt": request.prompts[index], "seed": request.seed + index, "weights": request.checkpoint().source,
        "preset": request.preset, "psa": config.to_dict() if config else None,
    }  # fmt: skip


def finished(request: GenerateRequest, index: int, path: Path) -> dict[str, Any] | None:
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
    expected = json.loads(json.dumps(identity(request, index)))
    other = [name for name, value in expected.items() if record.get("request", {}).get(name) != value]
    if other:
        raise ConfigError(f"{path}: made with another {other[0]}; choose another --output_dir, or move it away")
    return None if request.compare and "compare" not in record else record


def output_folder(request: GenerateRequest) -> Path:
    """Where the videos go; without ``output_dir`` an unfinished folder of the same request, else a new one."""
    if request.output_dir:
        return Path(request.output_dir)
    return Path(from_first_process(lambda: str(_new_or_unfinished(request))))


def _new_or_unfinished(request: GenerateRequest) -> Path:
    base = Path("outputs") / Path(request.model).name
    key = {"request": [identity(request, i) for i in range(len(request.prompts))], "compare": request.compare}
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    for folder in sorted(base.glob(f"*/.{mark}"), reverse=True):
        if not all((folder.parent / f"video_{i:04d}.json").is_file() for i in range(len(request.prompts))):
            return folder.parent
    folder, number = base / time.strftime("%Y%m%d_%H%M%S"), 1
    while folder.exists():
        folder, number = folder.with_name(f"{folder.name.split('-')[0]}-{number}"), number + 1
    folder.mkdir(parents=True)
    (folder / f".{mark}").touch()
    return folder


def write_json(path: Path, record: dict[str, Any]) -> None:
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
    if request.place.startswith("cuda"):
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


def memory_hint(error: Exception) -> str:
    return "; add --offload model, --vae_tiling, or fewer frames" if "out of memory" in str(error).lower() else ""


def peak_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


# -- several processes -----------------------------------------------------------------------------------------------


def from_first_process(make: Callable[[], str]) -> str:
    """What the first process of torchrun makes, in all of them."""
    if world() == 1:
        return make()
    import torch.distributed as dist

    from .integrations.parallel import join_processes

    join_processes()
    made = [make() if rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return made[0]


def share(request: GenerateRequest, jobs: list[Any]) -> Iterator[Any]:
    """This process's videos: all of them under context parallelism, else a share that accelerate deals out."""
    if world() == 1 or request.context_parallel:
        yield from jobs
        return
    from accelerate import PartialState

    with PartialState().split_between_processes(jobs) as mine:
        yield from mine

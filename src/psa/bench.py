"""`psa bench`: verify, then time, then record, against dense attention in the same run."""

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from .config import PSAConfig
from .devices import pick_device
from .errors import PSAError
from .functional import attend, make_plan, psa_attention
from .measure import relative_error, seconds

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class BenchRow:
    """Medians of one case. Times in seconds; ``ideal`` is dense time × density; ``of_ideal`` the share reached."""

    date: str
    device: str
    torch: str
    threads: int
    backend: str
    dtype: str
    batch: int
    heads: int
    length: int
    head_dim: int
    is_causal: bool
    density: float
    dense: float
    plan: float
    attend: float
    total: float
    speedup: float
    of_ideal: float
    verified_error: float


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def verify(backend: str, dtype: torch.dtype, head_dim: int, is_causal: bool, device: torch.device) -> float:
    """The backend's relative error against the float64 reference on a small odd case.

    Raises:
        PSAError: when it is above the dtype's tolerance; what is wrong is not timed.
    """
    q, k, v = smooth_inputs(1, 2, 777, head_dim, dtype, device, seed=1)
    config = PSAConfig(mask_mode="proportional", density=0.3)
    plan = make_plan(q, k, config, is_causal=is_causal)
    out = attend(q, k, v, plan, is_causal=is_causal, backend=backend)
    exact = attend(q.double(), k.double(), v.double(), plan, is_causal=is_causal, backend="reference")
    error = float(relative_error(out, exact).max())
    if not error <= TOLERANCE[dtype]:
        raise PSAError(f"backend {backend!r} is off by {error:.2e} in {dtype}; not timed")
    return error


def smooth_inputs(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Smooth sequences, since with white noise nothing is worth averaging: a random walk of knots every 64 tokens."""
    g = torch.Generator().manual_seed(seed)
    knots = torch.randn(3, batch * heads, head_dim, length // 64 + 2, generator=g, device="cpu")
    smooth = torch.nn.functional.interpolate(knots.flatten(0, 1), size=length, mode="linear")
    noise = torch.randn(smooth.shape, generator=g, device="cpu")
    mixed = (smooth * 2 + noise).unflatten(0, (3, batch, heads)).transpose(-1, -2)
    return [part.contiguous().to(device, dtype) for part in mixed]


def bench(
    lengths: Iterable[int], head_dims: Iterable[int], densities: Iterable[float], *,
    backends: Iterable[str] = ("auto",), heads: int = 4, batch: int = 1, dtype: torch.dtype | None = None,
    is_causal: bool = False, device: str | None = None, repeats: int = 3,
) -> Iterator[BenchRow]:  # fmt: skip
    """Yields one row for each combination as soon as it is measured. Dense is ``scaled_dot_product_attention``.

    dtype: default bfloat16 on a GPU, where dense float32 attention has no fast kernel, and float32 on a CPU.
    """
    place = torch.device(pick_device(device))
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    chosen, lengths, densities = list(backends), list(lengths), list(densities)
    for head_dim in head_dims:
        errors = {backend: verify(backend, dtype, head_dim, is_causal, place) for backend in chosen}
        for length in lengths:
            q, k, v = smooth_inputs(batch, heads, length, head_dim, dtype, place, seed=0)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            dense = seconds(lambda: sdpa(q, k, v, is_causal=is_causal), repeats=repeats, device=place)  # noqa: B023
            for density in densities:
                for backend in chosen:
                    yield _row(q, k, v, density, backend, is_causal, repeats, dense, errors[backend])


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: float,
    backend: str,
    is_causal: bool,
    repeats: int,
    dense: float,
    error: float,
) -> BenchRow:
    config = PSAConfig(mask_mode="proportional", density=density)
    timed = {"repeats": repeats, "device": q.device}
    planning = seconds(lambda: make_plan(q, k, config, is_causal=is_causal), **timed)
    plan = make_plan(q, k, config, is_causal=is_causal)
    attending = seconds(lambda: attend(q, k, v, plan, is_causal=is_causal, backend=backend), **timed)
    total = seconds(lambda: psa_attention(q, k, v, config=config, is_causal=is_causal, backend=backend), **timed)
    batch, heads, length, head_dim = q.shape
    return BenchRow(
        date.today().isoformat(), device_name(q.device), torch.__version__, torch.get_num_threads(), backend,
        str(q.dtype).removeprefix("torch."), batch, heads, length, head_dim, is_causal, plan.density, dense, planning,
        attending, total, dense / total, dense * plan.density / total, error,
    )  # fmt: skip


def write_rows(rows: Iterable[BenchRow], path: str | Path) -> None:
    """Appends rows to a .jsonl file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")


def plot(rows: Iterable[BenchRow], path: str | Path) -> Path:
    """Speed-up over dense against length, one line for each head size and density."""
    from .pictures import pyplot, save

    figure, axes = pyplot().subplots(figsize=(6.5, 4.2))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(f"D={row.head_dim}, density {row.density:.2f}, {row.backend}", []).append(
            (row.length, row.speedup)
        )
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("dense time / PSA time")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, path)

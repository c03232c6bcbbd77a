"""Pyramid attention against dense attention on a CPU: verify, then time, then record.

    python benchmarks/cpu.py                                  # everything, a few minutes
    python benchmarks/cpu.py --only forward --lengths 16384 --head_dims 64
    python benchmarks/cpu.py --only flex                      # compiled FlexAttention with a binary block mask

Every contender of a case is timed once per round, and a ratio is the median over rounds of (dense / contender), so that
a busy machine slows both sides alike; where that is not enough, `--threads 1 --clock cpu` counts processor seconds.
Contenders: ``attend`` takes a given plan, ``psa`` is the whole call with selection.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import psa
from psa.backends import torch as torch_backend
from psa.bench import device_name
from psa.measure import relative_error

CASES = ("forward", "causal", "train", "flex")
ENGINES = ("native", "blocks")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One contender of one case. Seconds are medians; ratio = dense / seconds; of_ideal = ratio * density; others = the
    share of the machine's processors that other programs used while the case was timed."""

    date: str
    cpu: str
    torch: str
    threads: int
    clock: str
    case: str
    contender: str
    batch: int
    heads: int
    length: int
    head_dim: int
    density: float
    dense_seconds: float
    seconds: float
    ratio: float
    of_ideal: float
    verified_error: float | None
    others: float | None


def inputs(heads: int, length: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    """q, k, v float32 [1, H, L, D]: smooth walks with noise, so that importance differs between blocks."""
    g = torch.Generator().manual_seed(seed)
    knots = torch.randn(3 * heads, head_dim, length // 64 + 2, generator=g)
    smooth = F.interpolate(knots, size=length, mode="linear")
    mixed = 2 * smooth + torch.randn(smooth.shape, generator=g)
    return list(mixed.unflatten(0, (3, 1, heads)).transpose(-1, -2).contiguous())


def select_engine(name: str) -> bool:
    """Makes the torch backend use one engine; False when it is not available here."""
    os.environ["PSA_NATIVE"] = "1" if name == "native" else "0"
    return name == "blocks" or not torch_backend.native_reasons()


def verify(head_dim: int, is_causal: bool, config: psa.PSAConfig) -> float:
    """Relative error of out and gradients against the float64 reference; too large a one ends the program."""
    q, k, v = inputs(2, 777, head_dim, seed=1)
    plan = psa.plan(q, k, config, is_causal=is_causal)
    results = []
    for dtype, backend in ((torch.float32, "torch"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = psa.attend(*leaves, plan, is_causal=is_causal, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append([out.detach(), *grads])
    error = max(float(relative_error(a, b).max()) for a, b in zip(*results, strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong by {error:.2e} at D={head_dim}, causal={is_causal}: not timed")
    return error


def busy_seconds() -> float | None:
    """Processor seconds that all programs together have used since the machine started; None where it is not told."""
    if not Path("/proc/stat").exists():
        return None
    user, nice, system, _idle, _wait, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def timed(contenders: dict[str, Callable[[], object]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round that is not counted."""
    now = time.perf_counter if clock == "wall" else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, function in contenders.items():
            select_engine(name.rsplit(" ", 1)[-1])
            start = now()
            function()
            taken[name].append(now() - start)
    return {name: times[1:] for name, times in taken.items()}


def training_step(function: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def flex_contender(tensors: list[Tensor], density: float) -> Callable[[], object]:
    """FlexAttention with a random binary 128 x 128 block mask of the same density, blocks full (no mask function)."""
    q, k, v = tensors
    blocks = q.shape[2] // 128
    kept = max(1, round(density * blocks))
    order = torch.rand(1, q.shape[1], blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1).int()
    order[..., :kept] = order[..., :kept].sort(-1).values
    counts = torch.full(order.shape[:3], kept, dtype=torch.int32)
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(order), counts, order, BLOCK_SIZE=128)
    compiled = torch.compile(flex_attention)
    rows = (order[0, 0, 0, :kept, None] * 128 + torch.arange(128)).flatten()
    expected = F.scaled_dot_product_attention(q[:1, :1, :128], k[:1, :1, rows], v[:1, :1, rows])
    error = float(relative_error(compiled(q, k, v, block_mask=mask)[:1, :1, :128], expected).max())
    if not error <= TOLERANCE:
        raise SystemExit(f"FlexAttention is off by {error:.2e}: not timed")
    return lambda: compiled(q, k, v, block_mask=mask)


def run_case(case: str, length: int, head_dim: int, args: argparse.Namespace) -> list[Row]:
    causal, train = case == "causal", case == "train"
    config = psa.PSAConfig(mask_mode="proportional", density=args.density, importance="pooled")
    tensors = inputs(args.heads, length, head_dim)
    plan = psa.plan(*tensors[:2], config, is_causal=causal)

    def dense(*x):
        return F.scaled_dot_product_attention(*x, is_causal=causal)

    def attend(*x):
        return psa.attend(*x, plan, is_causal=causal, backend="torch")

    def whole(*x):
        return psa.psa_attention(*x, config=config, is_causal=causal, backend="torch")

    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2))
    wrap = (lambda f: training_step(f, tensors, upstream)) if train else (lambda f: lambda: f(*tensors))
    contenders, errors = {"dense": wrap(dense)}, {}
    if case == "flex":
        contenders["flex"] = flex_contender(tensors, args.density)
    for engine in args.engines if case != "flex" else args.engines[:1]:
        if select_engine(engine):
            errors[engine] = verify(head_dim, causal, config)
            contenders[f"attend {engine}"], contenders[f"psa {engine}"] = wrap(attend), wrap(whole)
    wall, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    taken = timed(contenders, args.rounds, args.clock)
    wall, own, others = time.perf_counter() - wall, time.process_time() - own, None
    if busy is not None:
        others = max(0.0, ((busy_seconds() or 0.0) - busy - own) / wall / (os.cpu_count() or 1))
    rows = []
    for name in list(contenders)[1:]:
        ratio = median(d / t for d, t in zip(taken["dense"], taken[name], strict=True))
        rows.append(
            Row(
                date.today().isoformat(),
                device_name(torch.device("cpu")),
                torch.__version__,
                torch.get_num_threads(),
                args.clock,
                case,
                name,
                1,
                args.heads,
                length,
                head_dim,
                plan.density,
                median(taken["dense"]),
                median(taken[name]),
                ratio,
                ratio * plan.density,
                errors.get(name.rsplit(" ", 1)[-1]),
                others,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 16384 32768; train 8192; causal, flex 16384")
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "cpu.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"forward": [16384, 32768], "train": [8192], "causal": [16384], "flex": [16384]}
    print("case     contender           L    D density  dense s        s  ratio of ideal others")
    for case in args.only:
        for length in args.lengths or defaults[case]:
            for head_dim in args.head_dims:
                for row in run_case(case, length, head_dim, args):
                    print(
                        f"{row.case:8} {row.contender:14} {row.length:6} {row.head_dim:4} {row.density:7.3f} "
                        f"{row.dense_seconds:8.3f} {row.seconds:8.3f} {row.ratio:6.2f} {row.of_ideal:8.2f} "
                        f"{'?' if row.others is None else format(row.others, '6.0%')}",
                        flush=True,
                    )
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()

"""Times attention, selection and both, forward and backward, beside dense peers and sparse ones: medians of events."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workers import device_works, spread

from psa.backends.base import Selection
from psa.backends.triton import gradients, whole
from psa.backends.triton.attend import attend
from psa.backends.triton.call import Call, prepare
from psa.backends.triton.pool import Pyramid, build_pyramid
from psa.backends.triton.score import RowRules
from psa.backends.triton.select import select
from psa.config import PSAConfig
from psa.plan import Plan

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One shape. part: which run of the two takes it; quick and full: whether it is in those."""

    name: str
    length: int
    heads: int = 12
    kv_heads: int | None = None
    dim: int = 128
    density: float = 0.15
    causal: bool = False
    block_n: int = 64
    part: int = 1
    quick: bool = False
    peers: bool = True
    backward: bool = False
    flex: bool = False
    mode: str = "proportional"


CASES = (
    Case("wan 32k", 32768, quick=True, backward=True, flex=True),
    Case("wan2.1-1.3b 1280x768x69", 69120, quick=True),
    Case("qwen2.5-vl 32k", 32768, heads=28, kv_heads=4, causal=True, block_n=128, quick=True, density=0.3),
    Case("cogvideox 48 heads", 17776, heads=48, dim=64, quick=True, backward=True),
    Case("wan 128k", 131072, quick=True),
    Case("wan 8k", 8192, quick=True),
    Case("wan 16k", 16384, flex=True),
    Case("wan 64k", 65536),
    Case("wan 32k topk", 32768, mode="topk", peers=False),
    Case("wan 32k thresholdbound", 32768, mode="thresholdbound", peers=False),
    Case("wan 32k, blocks of 128", 32768, block_n=128, peers=False),
    Case("wan 32k, blocks of 32", 32768, block_n=32, peers=False),
    Case("wan2.1-14b 1280x768x69", 69120, heads=40, part=2),
    Case("wan 32k causal", 32768, causal=True, part=2, backward=True, flex=True),
    Case("wan 128k causal", 131072, causal=True, part=2),
    Case("64 channels 32k", 32768, heads=24, dim=64, part=2, backward=True),
    Case("64 channels 128k", 131072, dim=64, part=2),
    Case("64 channels 16k causal", 16384, heads=24, dim=64, causal=True, part=2),
    *(
        Case(f"wan 32k density {density}", 32768, density=density, part=2, peers=False, backward=density == 0.05)
        for density in (0.05, 0.1, 0.25, 0.35, 0.5)
    ),
    Case("qwen2.5-vl 8k", 8192, heads=28, kv_heads=4, causal=True, block_n=128, part=2, density=0.3),
    Case("qwen2.5-vl 128k", 131072, heads=28, kv_heads=4, causal=True, block_n=128, part=2, density=0.15),
)
DRY = (
    Case("dry", 256, heads=2, dim=32, density=0.3, backward=True),
    Case("dry causal", 200, heads=2, kv_heads=1, dim=32, density=0.4, causal=True, mode="topk"),
)


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens along a smooth path plus noise, so that blocks differ in importance as they do in video."""
    draw = torch.Generator().manual_seed(0)

    def path(heads: int, noise: float) -> Tensor:
        knots = torch.randn(heads, case.dim, case.length // 256 + 2, generator=draw).to(device)
        smooth = F.interpolate(knots, size=case.length, mode="linear").transpose(1, 2)
        smooth = smooth + noise * torch.randn(smooth.shape, device=device)
        return F.normalize(smooth, dim=-1).mul(case.dim**0.5 * 1.2).to(dtype)[None].contiguous()

    kv_heads = case.kv_heads or case.heads
    k = path(kv_heads, 0.5)
    near = k.repeat_interleave(case.heads // kv_heads, dim=1)
    return (0.6 * near + 0.8 * path(case.heads, 0.5)).to(dtype), k, path(kv_heads, 1.0)


def settings(case: Case) -> PSAConfig:
    if case.mode == "proportional":
        return PSAConfig(block_n=case.block_n, mask_mode="proportional", density=case.density)
    return PSAConfig(block_n=case.block_n, mask_mode=case.mode)


def milliseconds(call: Callable[[], object], device: torch.device, least: int = 5, budget: float = 0.5) -> dict:
    """Median and deciles of single calls, by CUDA events; the first two calls are not counted."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return {"ms": 1e3 * (time.perf_counter() - start), "repeats": 1}
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(least, min(100, int(budget / max(1e-4, time.perf_counter() - start))))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    taken = [before.elapsed_time(after) for before, after in pairs]
    deciles = quantiles(taken, n=10)
    return {"ms": median(taken), "p10_ms": deciles[0], "p90_ms": deciles[-1], "repeats": repeats}


def kept(levels: Tensor, case: Case, block_m: int) -> float:
    """Density as :attr:`psa.Plan.density` counts it."""
    plan = Plan(levels, block_m, case.block_n, case.length, case.length, case.causal)
    return plan.density


class Bench:
    """Measures one case and writes its rows; without a recorder everything of ours runs once, to be compiled."""

    def __init__(self, case: Case, device: torch.device, recorder):
        self.case, self.device, self.recorder = case, device, recorder
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.q, self.k, self.v = inputs(case, device, self.dtype)
        self.config = settings(case)
        self.scale = case.dim**-0.5
        self.flops = 4.0 * case.heads * case.length**2 * case.dim * (0.5 if case.causal else 1.0)
        self.dense_ms = self.dense_backward_ms = None

    def row(self, what: str, call: Callable[[], object], density: float | None, factor: float = 1.0, **more) -> float:
        """Times ``call``; ``factor``: its work over the forward's. A failure is a row as well, and infinitely slow."""
        if self.recorder is None:
            with suppress(Exception):
                call()
            return 1.0
        facts = {"kind": "time", "case": self.case.name, "what": what, "length": self.case.length}
        facts |= {"heads": self.case.heads, "kv_heads": self.case.kv_heads or self.case.heads, "dim": self.case.dim}
        facts |= {"causal": self.case.causal, "block_n": self.case.block_n, "mode": self.case.mode, "density": density}
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                facts["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            taken = milliseconds(call, self.device)
        except Exception as error:
            self.recorder.add(**facts, error=f"{type(error).__name__}: {error}"[:300])
            return float("inf")
        if density is not None:
            facts["tflops"] = factor * self.flops * density / taken["ms"] * 1e-9
        dense = self.dense_ms if factor == 1.0 else self.dense_backward_ms
        if dense and density is not None and not what.startswith("dense"):
            facts["of_ideal"] = dense * density / taken["ms"]
            facts["speedup"] = dense / taken["ms"]
        if "of" in more:
            facts["share"] = taken["ms"] / more["of"]
        self.recorder.add(**facts, **taken)
        return taken["ms"]

    def dense(self) -> None:
        peers = DENSE if self.device.type == "cuda" else {"math": SDPBackend.MATH}
        forward, backward = [], []
        for name, kind in peers.items():
            call = partial(self._sdpa, kind, self.q, self.k, self.v)
            forward.append(self.row(f"dense {name}", call, 1.0))
            if self.case.backward and forward[-1] < float("inf"):
                backward.append(self._dense_backward(name, kind))
        self.dense_ms = min(forward) if min(forward) < float("inf") else None
        self.dense_backward_ms = min(backward) if backward and min(backward) < float("inf") else None

    def _sdpa(self, kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.case.causal, enable_gqa=grouped)

    def _dense_backward(self, name: str, kind: SDPBackend) -> float:
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        try:
            out = self._sdpa(kind, *leaves)
        except Exception as error:
            facts = {"kind": "time", "case": self.case.name, "what": f"dense {name} backward"}
            self.recorder.add(**facts, error=f"{type(error).__name__}: {error}"[:300])
            return float("inf")
        grad = torch.randn_like(out)
        call = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
        return self.row(f"dense {name} backward", call, 1.0, factor=2.5)

    def ours(self) -> None:
        q, k, v, config, case = self.q, self.k, self.v, self.config, self.case
        options = {"scale": self.scale, "is_causal": case.causal}
        out, lse, selection = whole.forward(q, k, v, config, **options)
        density = kept(selection.levels, case, config.block_m)
        call = prepare(q, k, v, selection)
        attend_ms = self.row("attend", partial(attend, call), density)
        self.row("pool", partial(build_pyramid, k, v, case.block_n), None, of=attend_ms)
        self.row("select", partial(self._select, config, call.pyramid), None, of=attend_ms)
        self.row("whole call", partial(whole.forward, q, k, v, config, **options), density)
        self._others(selection, attend_ms)
        if case.backward:
            grad = torch.randn_like(out)
            backward = partial(gradients.backward, grad, None, q, k, v, out, lse, selection)
            self.row("backward", backward, density, factor=2.5)
        if self.device.type == "cuda" and self.recorder is not None:
            self._graph(options, density)

    def _select(self, config: PSAConfig, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Levels and their lists, from pooled keys that are there."""
        rules = RowRules(config.block_m, config.block_n, self.case.causal)
        pooled = whole.pooled_keys(pyramid, config.block_n, config.importance_cols)
        return select(self.q, pooled, self.case.length, config, rules, scale=self.scale)

    def _others(self, chosen: Selection, attend_ms: float) -> None:
        """Our kernel on what others do at the same density: exact blocks and dropping, or one mean for all the rest."""
        coarsest = min(self.case.block_n, 128)
        share = (self.case.density - 1 / coarsest) / (1 - 1 / coarsest)
        ratios = {
            "attend, binary": {1: (0.0, self.case.density), 0: (self.case.density, 1.0)},
            "attend, one mean": {1: (0.0, share), coarsest: (share, 1.0)},
        }
        for what, bounds in ratios.items():
            config = PSAConfig(block_n=self.case.block_n, mask_mode="topk", mask_ratios=bounds)
            pyramid = build_pyramid(self.k, self.v, config.block_n)
            levels, blocks, ends = self._select(config, pyramid)
            selection = Selection(levels, config.block_m, config.block_n, self.scale, self.case.causal)
            call = Call(self.q, selection, pyramid, blocks, ends)
            self.row(what, partial(attend, call), kept(levels, self.case, config.block_m), of=attend_ms)
            if what == "attend, binary" and self.case.flex and self.device.type == "cuda":
                self._flex(levels, config.block_m)

    def _flex(self, levels: Tensor, block_m: int) -> None:
        """FlexAttention, compiled, over the same binary blocks."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        keep = levels > 0
        counts = keep.sum(-1, dtype=torch.int32)
        order = keep.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        size = (block_m, self.case.block_n)
        if self.case.causal:
            first_q = torch.arange(levels.shape[2], device=self.device)[:, None] * block_m
            last_k = (torch.arange(levels.shape[3], device=self.device)[None, :] + 1) * self.case.block_n - 1
            whole_block = keep & (last_k <= first_q)
            part = keep & ~whole_block
            lists = [
                (x.sum(-1, dtype=torch.int32), x.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32))
                for x in (part, whole_block)
            ]
            mask = BlockMask.from_kv_blocks(
                *lists[0], *lists[1], BLOCK_SIZE=size, mask_mod=lambda b, h, i, j: j <= i,
                seq_lengths=(self.case.length, self.case.length),
            )  # fmt: skip
        else:
            none = torch.zeros_like(counts), torch.zeros_like(order)
            lengths = (self.case.length, self.case.length)
            mask = BlockMask.from_kv_blocks(*none, counts, order, BLOCK_SIZE=size, seq_lengths=lengths)
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = self.q.shape[1] != self.k.shape[1]
        call = partial(compiled, self.q, self.k, self.v, block_mask=mask, enable_gqa=grouped)
        self.row("flex, binary", call, kept(levels, self.case, block_m))

    def _graph(self, options: dict, density: float) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept_alive = whole.forward(self.q, self.k, self.v, self.config, **options)
        except Exception as error:
            torch.cuda.synchronize()
            self.recorder.add(kind="time", case=self.case.name, what="whole call, graph", error=str(error)[:300])
            return
        self.row("whole call, graph", graph.replay, density)
        del kept_alive


def cases(mode: str, part: int | None) -> Iterator[Case]:
    for case in DRY if mode == "dry" else CASES:
        if mode == "dry" or (mode == "quick" and case.quick) or (mode == "part" and case.part == part):
            yield case


def warm(case: Case, device: torch.device) -> bool:
    """Compiles what a case needs: Triton and Inductor keep it on disk, where the process that times finds it."""
    with suppress(Exception):
        Bench(case, device, None).ours()
    return True


def run(recorder, device: torch.device, mode: str, part: int | None, only: str, workers: int) -> None:
    """One row per contender of each case, until the time is up."""
    chosen = [c for c in cases(mode, part) if re.search(only, c.name) and c.name not in recorder.timed]
    if workers > 1:
        for _ in spread(warm, [(case, device) for case in chosen], workers, recorder.seconds_left / 3):
            pass
    for case in chosen:
        if recorder.seconds_left < 15:
            recorder.add(kind="time", case=case.name, what="all", error="left out: the time is up")
            continue
        start = time.monotonic()
        try:
            bench = Bench(case, device, recorder)
            if case.peers:
                bench.dense()
            bench.ours()
            recorder.add(kind="complete", case=case.name, seconds=round(time.monotonic() - start, 1))
        except Exception as error:
            recorder.add(kind="time", case=case.name, what="all", error=f"{type(error).__name__}: {error}"[:300])
        if not device_works():
            recorder.add(kind="time", case=case.name, what="all", error="the device faulted: the rest is not timed")
            recorder.failed += 1
            return

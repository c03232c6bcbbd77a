"""Every check on fresh random inputs, with outputs poisoned by NaN before they are written."""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from cases import make
from gpu_kernels import (
    CASES,
    HALF,
    MODES,
    TOLERANCE,
    case,
    check_attention,
    check_selection,
    check_whole,
    distance,
    poisoned,
)  # fmt: skip
from torch import Tensor
from workers import LATE, spread

import psa
from psa.backends import triton as backend
from psa.backends.triton import autotune, whole
from psa.config import PSAConfig

PUBLIC = {
    "automatic, video": None,
    "variance, video": PSAConfig(mask_mode="proportional", density=0.2, bias="variance"),
    "capped, masked": PSAConfig(mask_mode="thresholdbound", use_sim_mask=True),
    "ranked, causal": PSAConfig(mask_mode="proportional", rank_exponent=0.5),
    "measured, video": PSAConfig(mask_mode="proportional", bias="measured"),
    "automatic, causal": None,
}


def check_public(name: str, device: torch.device, seed: int, small: bool) -> tuple[bool, str]:
    """psa_attention, planning included, against the reference on the plan that it made; and the same once more."""
    grid, text, dim, dtype = ((3, 6, 8), 10, 32, torch.float32) if small else ((6, 20, 24), 226, 64, torch.bfloat16)
    length = text + grid[0] * grid[1] * grid[2]
    q, k, v, _ = make(case(kv_heads=1, length_q=length, length_k=length, head_dim=dim), seed, dtype, device)
    options = {
        "video": {"grid": grid, "text_length": text},
        "masked": {"key_mask": torch.arange(length, device=device)[None] < 0.8 * length},
        "causal": {"is_causal": True},
    }[name.split(", ")[1]]
    config, backend_name = PUBLIC[name], "auto" if device.type == "cuda" else "triton"
    call = partial(psa.psa_attention, q, k, v, config=config, backend=backend_name, return_plan=True, **options)
    with poisoned():
        out, plan = call(enable_gqa=True)
        again, _ = call(enable_gqa=True)
    exact = [x.double() for x in (q, k, v)]
    causal = options.get("is_causal", False)
    error = distance(out, psa.attend(*exact, plan, is_causal=causal, enable_gqa=True, backend="reference"))
    said = f"out {error:.1e}, density {plan.density:.3f}" + ("" if torch.equal(out, again) else " NOT REPEATABLE")
    return error <= TOLERANCE[dtype] and torch.equal(out, again), said


def check_compiled(device: torch.device, seed: int) -> tuple[bool, str]:
    """torch.compile(fullgraph=True), gradients included, gives what eager mode gives."""
    config = PSAConfig(mask_mode="proportional", density=0.2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return psa.psa_attention(q, k, v, config=config)

    pairs = []
    for function in (call, torch.compile(call, fullgraph=True)):
        q, k, v, _ = make(case(length_q=1500, length_k=1500, strided=True), seed, HALF, device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        pairs.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)))
    errors = [distance(a, b) for a, b in zip(*pairs, strict=True)]
    return max(errors) <= 1e-3, " ".join(f"{error:.1e}" for error in errors)


def check_waits(device: torch.device, seed: int) -> tuple[bool, str]:
    """PyTorch raises where the host waits for the device: the whole call, attention with a plan, and gradients."""
    q, k, v, selection = make(case(length_q=1500, length_k=1500), seed, HALF, device)
    config = PSAConfig(mask_mode="proportional", density=0.2, bias="variance")

    def calls() -> None:
        whole.forward(q, k, v, config, scale=0.1)
        out, lse = backend.forward(q, k, v, selection)
        backend.backward(out, None, q, k, v, out, lse, selection)

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, "forward, whole call, backward"


def check_tuned(device: torch.device, seed: int) -> tuple[bool, str]:
    """PSA_AUTOTUNE=1 finds a launch that gives the right result, and writes it."""
    q, k, v, selection = make(case(length_q=8192, length_k=8192, heads=8, kv_heads=8), seed, HALF, device)
    want, _ = backend.forward(q, k, v, selection)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PSA_AUTOTUNE": "1", "PSA_CACHE_DIR": folder}
        autotune.memory_path.cache_clear()
        try:
            out, _ = backend.forward(q, k, v, selection)
            (file,) = Path(folder).iterdir()
            (found,) = json.loads(file.read_text()).items()
        finally:
            del os.environ["PSA_AUTOTUNE"], os.environ["PSA_CACHE_DIR"]
            autotune.memory_path.cache_clear()
    return distance(out, want) <= TOLERANCE[q.dtype], f"{found[0]}: {found[1]}"


def check_graph(device: torch.device) -> tuple[bool, str]:
    """The whole call, captured in a CUDA graph and replayed on other inputs, gives what it gives outside."""
    q, k, v, _ = make(case(length_q=2000, length_k=2000), 0, HALF, device)
    config = PSAConfig(mask_mode="proportional", density=0.2)

    def call() -> Tensor:
        return whole.forward(q, k, v, config, scale=128**-0.5)[0]

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for tensor in (q, k, v):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(out, call()), "replayed on new inputs, equal bits"


def check_far(device: torch.device) -> tuple[bool, str]:
    """Tensors of more than 2**31 elements: the last head is what it is alone."""
    free = torch.cuda.mem_get_info(device)[0]
    if free < 60 << 30:
        return True, f"left out: {free >> 30} GiB free, 60 needed"
    length, heads = 110592, 160
    q, k, v = (torch.randn(1, heads, length, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    config = PSAConfig(mask_mode="topk", mask_ratios={1: (0.0, 0.01), 8: (0.01, 0.05), 0: (0.05, 1.0)})
    out, _, _ = whole.forward(q, k, v, config, scale=0.1)
    alone, _, _ = whole.forward(q[:, -1:], k[:, -1:], v[:, -1:], config, scale=0.1)
    return torch.equal(out[:, -1:], alone), f"{q.numel():.2e} elements"


def checks(device: torch.device, mode: str, seed: int) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """Every check of a mode by its name; the long ones first."""
    if mode == "part" and device.type == "cuda":
        yield "tuned launches", lambda: check_tuned(device, seed)
    for name in PUBLIC:
        if mode != "dry" or name == "variance, video":
            yield f"public call, {name}", lambda name=name: check_public(name, device, seed, small=mode == "dry")
    for name, (call, dtype) in CASES.items():
        if mode == "dry" and name not in ("single precision", "causal, grouped"):
            continue
        if mode == "dry":
            small = {"length_q": min(call.length_q, 70), "length_k": min(call.length_k, 90), "block_m": 64}
            call, dtype = replace(call, **small, head_dim=32, block_n=32, heads=2, kv_heads=1), torch.float32
        yield f"attention, {name}", partial(check_attention, call, dtype, device, seed)
    for chosen in MODES:
        for causal in (False, True):
            if mode == "dry" and (chosen not in ("topk", "proportional") or causal):
                continue
            length = 200 if mode == "dry" else 6000
            name = f"selection, {chosen}{', causal' if causal else ''}"
            yield (
                name,
                lambda chosen=chosen, causal=causal, length=length: check_selection(
                    chosen, causal, length, device, seed
                ),
            )
    for causal in (False, True):
        length = 150 if mode == "dry" else 4001
        name = f"whole call{', causal' if causal else ''}"
        yield name, lambda causal=causal, length=length: check_whole(length, causal, device, seed)
    if device.type == "cuda":
        yield "compiled", lambda: check_compiled(device, seed)
        yield "no waiting", lambda: check_waits(device, seed)
        yield "CUDA graph", lambda: check_graph(device)
        if mode == "part":
            yield "beyond 2**31 elements", lambda: check_far(device)


ALONE = ("beyond 2**31 elements",)
"""Checks that take most of the memory."""


def check(name: str, mode: str, device: torch.device, seed: int) -> dict:
    """The row of one check, by name. What raises has failed."""
    start = time.monotonic()
    try:
        ok, said = dict(checks(device, mode, seed))[name]()
    except Exception as error:
        ok, said = False, f"{type(error).__name__}: {error}"[:300]
    seconds = round(time.monotonic() - start, 2)
    return {"kind": "check", "name": name, "ok": bool(ok), "said": said, "seed": seed, "seconds": seconds}


def run(recorder, device: torch.device, mode: str, only: str, workers: int) -> None:
    """One row per check, in at most two thirds of the time; fresh random inputs each time."""
    seed = int(time.time()) if mode != "dry" else 0
    names = [name for name, _ in checks(device, mode, seed) if re.search(only, name) and name not in recorder.checked]
    alone = [name for name in names if name in ALONE]
    for chosen, count in (([n for n in names if n not in ALONE], workers), (alone, min(1, workers))):
        tasks = [(name, mode, device, seed) for name in chosen]
        for (name, *_), row, trouble in spread(check, tasks, count, 2 / 3 * recorder.seconds_left):
            ok = None if trouble == LATE else False
            recorder.add(**(row or {"kind": "check", "name": name, "ok": ok, "said": trouble, "seed": seed}))

"""Kernels against the reference: attention with its gradients, selection, and both in one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cases import Case, make
from torch import Tensor

from psa.allocate import allocate_by, allocate_levels, block_mask
from psa.backends import reference
from psa.backends import triton as backend
from psa.backends.triton import schedule, select, whole
from psa.backends.triton.score import row_rules
from psa.config import PSAConfig
from psa.importance import importance
from psa.plan import Plan
from psa.schedule import build_schedule

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative Frobenius error; of gradients four times that."""


def case(**changes: object) -> Case:
    """A call of common size, changed."""
    sizes = {"length_q": 1000, "length_k": 1000, "head_dim": 128, "block_m": 128, "block_n": 64}
    return Case(**(sizes | changes))


EVERYTHING = {"is_causal": True, "masked": True, "variance": True, "pairs": True}
HALF = torch.bfloat16
CASES = {
    "plain": (case(), HALF),
    "half precision": (case(head_dim=64), torch.float16),
    "single precision": (case(head_dim=64, length_q=500, length_k=500), torch.float32),
    "causal, grouped": (case(is_causal=True, heads=8, kv_heads=2, block_n=128), HALF),
    "causal, fewer queries": (case(is_causal=True, length_q=333, length_k=1100), HALF),
    "causal, fewer keys": (case(is_causal=True, length_q=1100, length_k=333), HALF),
    "masked": (case(batch=2, masked=True, length_q=700, length_k=900), HALF),
    "variance": (case(variance=True, head_dim=64), HALF),
    "pairs": (case(pairs=True, block_n=32), HALF),
    "every option": (Case(2, 4, 2, 500, 777, 96, 64, 32, **EVERYTHING), HALF),
    "wide heads": (case(head_dim=256, length_q=400, length_k=600), HALF),
    "narrow heads": (case(head_dim=16, block_n=16), HALF),
    "shared levels, strided": (case(shared_levels=True, strided=True, batch=2), HALF),
    "one token": (case(length_q=1, length_k=1), HALF),
    "blocks of 128": (case(block_n=128, length_q=2048, length_k=2048), HALF),
}
"""Calls with every level present, and their dtype."""


def distance(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; infinite where something is not finite that should be."""
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = (torch.nan_to_num(x.double(), nan=0.0, posinf=0.0, neginf=0.0) for x in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN in here."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_attention(call: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[bool, str]:
    q, k, v, selection = make(call, seed, dtype, device)
    with poisoned():
        out, lse = backend.forward(q, k, v, selection)
        again, _ = backend.forward(q, k, v, selection)
        grad = torch.randn(out.shape, device=device).to(dtype)
        grad_lse = torch.rand(lse.shape, device=device)
        grads = backend.backward(grad, grad_lse, q, k, v, out, lse, selection)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference.forward(*exact, selection)
    some = (want * grad.double()).sum() + torch.where(want_lse.isfinite(), want_lse * grad_lse, 0.0).sum()
    want_grads = torch.autograd.grad(some, exact)
    errors = [distance(out, want.detach()), distance(lse, want_lse.detach())]
    slopes = [distance(got, expected) for got, expected in zip(grads, want_grads, strict=True)]
    limit = TOLERANCE[dtype]
    ok = max(errors) <= limit and max(slopes) <= 4 * limit and torch.equal(out, again)
    names = ("out", "lse", "dq", "dk", "dv")
    said = " ".join(f"{name} {value:.1e}" for name, value in zip(names, errors + slopes, strict=True))
    return ok, said + ("" if torch.equal(out, again) else " NOT REPEATABLE")


MODES = {
    "topk": {"mask_mode": "topk"},
    "thresholdbound": {"mask_mode": "thresholdbound"},
    "proportional": {"mask_mode": "proportional", "density": 0.15},
    "dropping": {"density": 0.07, "exponent": 2.0, "keep_all": False},
    "shared": {"mask_mode": "proportional", "density": 0.2, "share_heads": True},
}


def check_selection(mode: str, causal: bool, length: int, device: torch.device, seed: int) -> tuple[bool, str]:
    """Importance from q and k; levels and schedule from given importance, which must agree almost everywhere."""
    draw = torch.Generator().manual_seed(seed)
    q = (torch.randn(2, 4, length, 64, generator=draw) * 2).to(device=device, dtype=torch.float16)
    k = torch.randn(2, 2, length + 77, 64, generator=draw).to(device=device, dtype=torch.float16)
    config = PSAConfig(**MODES[mode])
    lengths = (q.shape[2], k.shape[2])
    want = importance(q, k, config, scale=0.125, is_causal=causal)
    with poisoned():
        got = backend.plan_importance(q, k, config, scale=0.125, is_causal=causal)
    error = distance(got, want)
    rules = row_rules(config.block_m, config.block_n, causal, 50, "last", None)
    with poisoned():
        levels, blocks, ends = select.allocate(want, config, rules, lengths)
    mask = block_mask(
        *lengths, config.block_m, config.block_n, is_causal=causal, text_length=50, text_position="last", device=device
    )
    exact = allocate_levels(
        want,
        mask_mode=str(config.mask_mode),
        mask_ratios=config.mask_ratios,
        density=config.density,
        block_n=config.block_n,
        exponent=config.exponent,
        keep_all=config.keep_all,
        share_heads=config.share_heads,
        mask=mask,
    )
    differing = float((levels != exact).float().mean())
    fine = all(same_lists((blocks, ends), build_schedule(levels, ends.shape[-1])))
    with poisoned():
        other = schedule.build_schedule(levels.transpose(-1, -2), ends.shape[-1])
    fine &= all(same_lists(other, build_schedule(levels.transpose(-1, -2), ends.shape[-1])))
    said = f"importance {error:.1e}, levels that differ {differing:.1e}, schedules {'equal' if fine else 'DIFFER'}"
    return error <= 4e-3 and differing <= 2e-3 and fine, said


def same_lists(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[bool, bool]:
    defined = torch.arange(want[0].shape[-1], device=want[0].device) < want[1][..., -1:]
    return torch.equal(got[1], want[1]), torch.equal(got[0][defined], want[0][defined])


def check_whole(length: int, causal: bool, device: torch.device, seed: int) -> tuple[bool, str]:
    """Five launches against the reference on the levels that they chose, and these against levels made step by step."""
    # The interpreter's products of bfloat16 are wrong.
    dtype = torch.float32 if backend.interpreted() else torch.bfloat16
    q, k, v, _ = make(case(heads=4, length_q=length, length_k=length), seed, dtype, device)
    config = PSAConfig(mask_mode="proportional", density=0.2)
    with poisoned():
        out, lse, selection = whole.forward(q, k, v, config, scale=128**-0.5, is_causal=causal)
    want, want_lse = reference.forward(q, k, v, selection)
    errors = distance(out, want), distance(lse, want_lse)
    scores = importance(q, k, config, scale=128**-0.5, is_causal=causal)
    mask = block_mask(length, length, config.block_m, config.block_n, is_causal=causal, device=device)
    levels = allocate_by(config, scores, None, mask)
    differing = float((selection.levels != levels).float().mean())
    plans = (Plan(x, config.block_m, config.block_n, length, length, causal) for x in (selection.levels, levels))
    kept, expected = (plan.density for plan in plans)
    ok = max(errors) <= TOLERANCE[q.dtype] and differing <= 0.05 and abs(kept - expected) <= 0.02 * expected
    said = f"out {errors[0]:.1e} lse {errors[1]:.1e}, levels that differ {differing:.1e}, density {kept:.3f}"
    return ok, said

"""The attention kernels under Triton's interpreter, against the specification in float64."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Case, check_layouts, make

import psa
from psa.backends import reference
from psa.backends import triton as backend
from psa.backends.triton.pool import build_pyramid
from psa.backends.triton.transposed import readers
from psa.caps import similarity_cap
from psa.pyramid import group_means

CASES = {
    "one_token": Case(length_q=1, length_k=1, head_dim=16, block_m=64, block_n=16),
    "one_query": Case(length_q=1, length_k=500, head_dim=64, block_m=128, block_n=64, is_causal=True),
    "odd_63": Case(batch=2, length_q=63, length_k=63, head_dim=40, block_m=64, block_n=16, is_causal=True),
    "whole_blocks": Case(length_q=256, length_k=256, head_dim=64, block_m=128, block_n=64),
    "odd_500": Case(heads=1, kv_heads=1, length_q=300, length_k=500, head_dim=128, block_m=128, block_n=64),
    "causal": Case(heads=1, kv_heads=1, length_q=320, length_k=320, head_dim=64, block_n=64, is_causal=True),
    "causal_128": Case(heads=1, kv_heads=1, length_q=256, length_k=300, block_m=128, block_n=128, is_causal=True),
    "dim_17": Case(length_q=70, length_k=90, head_dim=17, block_m=32, block_n=16),
    "grouped": Case(heads=4, kv_heads=2, length_q=64, length_k=130, head_dim=40, is_causal=True),
    "more_queries_than_keys": Case(heads=1, kv_heads=1, length_q=200, length_k=70, is_causal=True),
    "masked": Case(batch=2, heads=1, kv_heads=1, length_q=90, length_k=150, head_dim=64, masked=True),
    "pairs": Case(heads=2, pairs=True, length_q=130, length_k=130, is_causal=True, block_n=16),
    "variance": Case(batch=1, heads=2, kv_heads=1, variance=True, length_q=100, length_k=200, block_n=64),
    "all_biases": Case(
        batch=2, heads=2, kv_heads=1, length_q=70, length_k=100, variance=True, masked=True, pairs=True, is_causal=True
    ),
    "shared_levels": Case(batch=2, heads=2, length_q=130, length_k=130, shared_levels=True, pairs=True),
    "empty_rows": Case(batch=1, empty_rows=True, masked=True),
    "small_tiles": Case(length_q=100, length_k=100, block_m=16, block_n=16),
    "uneven_block_m": Case(length_q=150, length_k=100, block_m=48, block_n=32),
}
LARGE = {
    "wide_head": Case(length_q=130, length_k=300, head_dim=256, block_m=64, block_n=32),
    "large_blocks": Case(length_q=600, length_k=600, block_m=512, block_n=256),
    "odd_1000": Case(heads=1, kv_heads=1, length_q=1000, length_k=1000, head_dim=80, block_m=128, block_n=128),
    "causal_1000": Case(length_q=1000, length_k=1000, head_dim=128, block_m=128, block_n=64, is_causal=True),
    **{
        f"{block_n}_{dim}_{causal}_{extra}": Case(
            heads=2, kv_heads=1, length_q=200, length_k=300, head_dim=dim, block_m=128, block_n=block_n,
            is_causal=causal, variance=extra, pairs=extra,
        )
        for block_n in (16, 32, 64, 128) for dim in (16, 64, 128) for causal in (False, True) for extra in (False, True)
    },
}  # fmt: skip


def run(module, q, k, v, selection, grad_out, grad_lse):
    """out, lse, dq, dk, dv from the kernels."""
    out, lse = module.forward(q, k, v, selection)
    return out, lse, *module.backward(grad_out, grad_lse, q, k, v, out, lse, selection)


def expected(q, k, v, selection, grad_out, grad_lse):
    """The same from the specification, in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.forward(*leaves, selection)
    seen = ~lse.isneginf()
    loss = (out * grad_out.double()).sum() + (lse * grad_lse.double())[seen].sum()
    grads = torch.autograd.grad(loss, leaves) if loss.requires_grad else [torch.zeros_like(x) for x in leaves]
    return out.detach(), lse.detach(), *grads


def check(case: Case, dtype: torch.dtype, tolerance: float, seed: int = 0) -> None:
    """Errors relative to the largest entry of each result."""
    q, k, v, selection = make(case, seed, dtype)
    g = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(q.shape, generator=g).to(dtype)
    grad_lse = torch.randn(q.shape[:-1], generator=g)
    assert backend.unsupported_reasons(q, k, v, selection) == []
    got = run(backend, q, k, v, selection, grad_out, grad_lse)
    want = expected(q, k, v, selection, grad_out, grad_lse)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == (torch.float32 if name == "lse" else dtype), name
        assert torch.equal(a.isneginf(), b.isneginf()), name
        error = (a.double() - b).masked_fill(b.isneginf(), 0.0).abs().max()
        scale = b.masked_fill(b.isneginf(), 0.0).abs().max().clamp(min=1.0)
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32(case):
    check(case, torch.float32, 1e-5)


@pytest.mark.parametrize("name", ["whole_blocks", "causal", "all_biases"])
def test_float16(name):
    """float16 stores the pooled rows, the weights and ds: each relative 2**-11, a few of them in a chain."""
    check(CASES[name], torch.float16, 8 * 2.0**-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_larger_matrix(case, dtype):
    check(case, dtype, 1e-5 if dtype == torch.float32 else 8 * 2.0**-11, seed=3)


def test_level_one_is_dense_attention():
    q, k, v, selection = make(Case(length_q=130, length_k=200, head_dim=64))
    selection = replace(selection, levels=torch.ones_like(selection.levels))
    out, _ = backend.forward(q, k, v, selection)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=1e-5)


def test_any_strides():
    """[B, L, H, D] storage, channels last but one, and a gradient of yet another layout."""
    q, k, v, selection = make(Case(heads=1, kv_heads=1, length_q=70, length_k=100, is_causal=True, block_n=16))
    g = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(q.shape, generator=g), torch.randn(q.shape[:-1], generator=g)
    want = run(backend, q, k, v, selection, grad_out, grad_lse)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    v = torch.stack([v, torch.full_like(v, torch.nan)], dim=-1)[..., 0]
    expanded = grad_lse[..., :1].expand_as(grad_lse)
    for a, b in zip(run(backend, q, k, v, selection, grad_out.mT.contiguous().mT, grad_lse), want, strict=True):
        assert torch.equal(a, b)
    full = run(backend, q, k, v, selection, grad_out, expanded.contiguous())
    assert torch.equal(run(backend, q, k, v, selection, grad_out, expanded)[2], full[2])


def test_gradients_repeat_to_the_bit_and_lse_gradient_is_optional():
    q, k, v, selection = make(CASES["grouped"])
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(q.shape[:-1])
    first, second = (run(backend, q, k, v, selection, grad_out, grad_lse) for grad_lse in (zero, None))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masked_tokens_may_hold_anything():
    q, k, v, selection = make(CASES["masked"])
    want = backend.forward(q, k, v, selection)
    hole = ~selection.key_mask[:, None, :, None]
    got = backend.forward(q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.inf), selection)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_through_the_public_functions():
    q, k, v, selection = make(CASES["whole_blocks"])
    plan = psa.Plan.from_levels(selection.levels, block_m=128, block_n=64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = psa.attend(*leaves, plan, backend="triton")
    want = psa.attend(*leaves, plan, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_pyramid_rows():
    _, k, v, selection = make(Case(length_k=150, masked=True, block_n=32))
    pyramid = build_pyramid(k, v, 32, key_mask=selection.key_mask)
    blocks = 5
    for e in range(6):
        first = blocks * (64 - (64 >> e))
        want = group_means(k, 1 << e, selection.key_mask)
        torch.testing.assert_close(pyramid.keys[:, :, first : first + want.shape[2]], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "block_n"), [(150, 32), (600, 256)])
def test_similarity_caps_are_those_of_torch(length, block_n, masked):
    _, k, v, selection = make(Case(batch=2, length_k=length, masked=True, block_n=32))
    k += 0.3
    mask = selection.key_mask if masked else None
    if mask is not None:
        mask[0, :40], mask[1, 80:] = False, False
    seen = set()
    for thresholds in ({2: 0.0, 4: 0.08, 8: 0.09}, {8: 0.05}, {2: 0.3, 4: 0.4, 8: 0.5}, {2: 0.9}):
        pyramid = build_pyramid(k, v, block_n, key_mask=mask, thresholds=thresholds, first_real=True)
        want = similarity_cap(k, block_n, thresholds, mask)
        assert torch.equal(2 ** pyramid.caps.long(), want.long())
        seen |= set(want.flatten().tolist())
    assert len(seen) > 1
    if mask is not None:
        assert pyramid.first_real.tolist() == (mask.to(torch.uint8).argmax(-1) // block_n).tolist()


def test_a_mask_may_have_any_strides_and_hide_everything():
    _, k, v, selection = make(Case(batch=2, length_k=150, masked=True, block_n=32))
    mask = selection.key_mask
    mask[1] = False
    want = build_pyramid(k, v, 32, key_mask=mask, first_real=True)
    got = build_pyramid(k, v, 32, key_mask=mask.t().contiguous().t(), first_real=True)
    assert torch.equal(got.keys, want.keys) and torch.equal(got.counts, want.counts)
    assert got.first_real.tolist()[1] == 0 == want.first_real.tolist()[1]


def test_readers_are_the_transpose():
    levels = make(Case(length_q=300, length_k=300))[3].levels
    lists, sizes = readers(levels, 32, 64, 6)
    tile = 0
    for e in range(6):
        for first in range(0, 10 * (32 >> e), 64):
            touched = sorted({min(9, row // (32 >> e)) for row in range(first, min(first + 64, 10 * (32 >> e)))})
            for head in range(2):
                want = (levels[0, head][:, touched] == 1 << e).any(-1).nonzero().flatten().tolist()
                assert lists[0, head, tile, : sizes[0, head, tile]].tolist() == want
            tile += 1


def test_reasons():
    q, k, v, selection = make(Case())
    assert backend.unsupported_reasons(q.double(), k.double(), v.double(), selection)
    assert backend.unsupported_reasons(q, k, v, replace(selection, block_m=40))
    assert backend.unsupported_reasons(q, k, v, replace(selection, scale=0.0))
    wide = torch.zeros(1, 2, 200, 288)
    assert "288" in backend.unsupported_reasons(wide, wide, wide, selection)[0]


@pytest.mark.parametrize("hidden", [True, False])
def test_reasons_without_the_interpreter_or_triton(hidden):
    """Without Triton the backend imports and says so; with it, tensors on the CPU are refused by name."""
    program = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
if {hidden}:
    sys.modules["triton"] = None
import torch, psa
from psa.backends import triton as backend
x = torch.zeros(1, 1, 64, 32)
try:
    psa.psa_attention(x, x, x, backend="triton")
except psa.BackendError as error:
    print(error)
assert "psa.backends.triton.attend" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("not installed" in ran.stdout) == hidden
    assert "the tensors are on cpu" in ran.stdout


def test_compiled_graphs_know_the_layout_of_results():
    check_layouts("triton")


def test_launches_follow_the_tensors_to_their_device(monkeypatch):
    """Triton launches on the current device, which need not be the tensors'."""
    q, k, v, selection = make(Case(length_q=64, length_k=64))
    config = psa.PSAConfig(block_m=64, block_n=32, mask_mode="topk")
    entered = []

    class Recorded(torch.cuda.device_of):
        def __init__(self, tensor):
            entered.append(tensor)
            super().__init__(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    out, lse = backend.forward(q, k, v, selection)
    backend.backward(out, None, q, k, v, out, lse, selection)
    scores = backend.plan_importance(q, k, config, scale=0.2)
    backend.plan_levels(q, k, config, scores)
    backend.plan_and_attend(q, k, v, config, scale=0.2)
    assert [tensor is given for tensor, given in zip(entered, (q, out, q, q, q), strict=True)] == [True] * 5


def test_more_heads_than_a_grid_holds_are_refused():
    q, k, v, selection = make(Case(heads=1, kv_heads=1, length_q=16, length_k=16, head_dim=16, block_m=16, block_n=16))
    many = [x.expand(70_000, 1, 16, 16) for x in (q, k, v)]
    assert any("70000 heads" in reason for reason in backend.unsupported_reasons(*many, selection))
    assert any("70000 heads" in reason for reason in backend.planning_reasons(*many[:2], psa.PSAConfig()))

"""Both engines of the torch backend against the specification in float64, and what they promise beyond it."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Case, check_layouts, make

import psa
from psa.backends import reference
from psa.backends import torch as backend
from psa.backends.native import calls

CASES = {
    "one_token": Case(length_q=1, length_k=1, head_dim=16, block_m=64, block_n=16),
    "one_query": Case(length_q=1, length_k=500, head_dim=64, block_m=128, block_n=64, is_causal=True),
    "odd_63": Case(batch=2, length_q=63, length_k=63, head_dim=40, block_m=64, block_n=16, is_causal=True),
    "odd_500": Case(length_q=500, length_k=500, head_dim=64, block_m=128, block_n=64),
    "odd_1000": Case(heads=1, kv_heads=1, length_q=1000, length_k=1000, head_dim=80, block_m=128, block_n=128),
    "causal_1000": Case(heads=1, kv_heads=1, length_q=1000, length_k=1000, head_dim=64, block_n=64, is_causal=True),
    "wide_head": Case(length_q=130, length_k=300, head_dim=256, block_m=64, block_n=32),
    "dim_128": Case(length_q=257, length_k=400, head_dim=128, block_m=128, block_n=64, is_causal=True, masked=True),
    "dim_17": Case(length_q=70, length_k=90, head_dim=17, block_m=32, block_n=16),
    "grouped": Case(batch=2, heads=6, kv_heads=2, length_q=200, length_k=333, head_dim=40, is_causal=True),
    "more_queries_than_keys": Case(length_q=300, length_k=100, is_causal=True),
    "masked": Case(batch=2, length_q=190, length_k=250, head_dim=64, masked=True),
    "pairs": Case(batch=2, heads=4, pairs=True, is_causal=True, block_n=16),
    "variance": Case(batch=2, heads=4, kv_heads=2, variance=True, length_k=333, block_n=64),
    "all_biases": Case(batch=2, heads=4, kv_heads=1, variance=True, masked=True, pairs=True, is_causal=True),
    "shared_levels": Case(batch=2, heads=3, kv_heads=3, shared_levels=True, pairs=True),
    "empty_rows": Case(batch=2, empty_rows=True, masked=True),
    "tiny_blocks": Case(length_q=100, length_k=100, block_m=16, block_n=16),
    "large_blocks": Case(length_q=600, length_k=600, block_m=512, block_n=256),
}


@pytest.fixture(scope="session")
def compiler():
    if backend.native_reasons():
        pytest.skip("the engine is compiled where it runs, with or without a GPU: " + backend.native_reasons()[0])


@pytest.fixture(params=["native", "blocks"])
def engine(request, monkeypatch):
    if request.param == "blocks":
        monkeypatch.setenv("PSA_NATIVE", "0")
    else:
        request.getfixturevalue("compiler")
    return request.param


def gradients(q, k, v, selection, grad_out, grad_lse):
    """out, lse and the three gradients from the backend."""
    out, lse = backend.forward(q, k, v, selection)
    return out, lse, *backend.backward(grad_out, grad_lse, q, k, v, out, lse, selection)


def expected(q, k, v, selection, grad_out, grad_lse):
    """The same from the specification, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.forward(*leaves, selection)
    seen = ~lse.isneginf()
    loss = (out * grad_out.double()).sum() + (lse * grad_lse.double())[seen].sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return out, lse, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def upstream(q, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(q.shape, generator=g, dtype=torch.float64), torch.randn(
        q.shape[:-1], generator=g, dtype=torch.float64
    )


def check(ours, theirs, atol):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_specification(engine, name):
    q, k, v, selection = make(CASES[name])
    assert backend.engine_for(q) == engine
    grad_out, grad_lse = upstream(q)
    ours = gradients(q, k, v, selection, grad_out.float(), grad_lse.float())
    check(ours, expected(q, k, v, selection, grad_out, grad_lse), 2e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
def test_half_precision(engine, dtype, atol):
    q, k, v, selection = make(CASES["grouped"], dtype=dtype)
    grad_out, grad_lse = (x.to(dtype) for x in upstream(q))
    ours = gradients(q, k, v, selection, grad_out, grad_lse.float())
    assert {x.dtype for x in (ours[0], *ours[2:])} == {dtype} and ours[1].dtype == torch.float32
    check(ours, expected(q, k, v, selection, grad_out, grad_lse), atol)


def test_compiled_graphs_know_the_layout_of_results(engine):
    check_layouts("torch")


def test_double_precision_takes_the_portable_engine():
    q, k, v, selection = make(CASES["all_biases"], dtype=torch.float64)
    assert backend.engine_for(q) == "blocks"
    check(gradients(q, k, v, selection, *upstream(q)), expected(q, k, v, selection, *upstream(q)), 1e-9)


def test_gradcheck_in_double_precision():
    case = Case(heads=2, kv_heads=1, length_q=18, length_k=21, head_dim=4, block_m=16, block_n=16, is_causal=True)
    q, k, v, selection = make(case, seed=3, dtype=torch.float64)
    selection = replace(selection, levels=selection.levels.clamp(min=1))
    plan = psa.Plan.from_levels(selection.levels, block_m=16, block_n=16)

    def attend(q, k, v):
        return psa.attend(q, k, v, plan, is_causal=True, scale=0.5, enable_gqa=True, return_lse=True, backend="torch")

    lse = attend(q, k, v)[1]
    if lse.isneginf().any():  # numeric differences of -inf are undefined
        q = q[:, :, ~lse.isneginf().any(1)[0]]
        plan = psa.Plan.from_levels(selection.levels[:, :, : -(-q.shape[2] // 16)], block_m=16, block_n=16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_through_the_public_function(engine, threads):
    q, k, v, selection = make(CASES["odd_500"])
    plan = psa.Plan.from_levels(selection.levels, block_m=selection.block_m, block_n=selection.block_n)
    before, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        for name in ("torch", "reference"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            psa.attend(*leaves, plan, backend=name).square().sum().backward()
            results.append([x.grad for x in leaves])
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_without_gradient_of_lse(engine):
    q, k, v, selection = make(CASES["odd_63"])
    grad_out, grad_lse = upstream(q)
    ours = gradients(q, k, v, selection, grad_out.float(), None)
    check(ours, expected(q, k, v, selection, grad_out, grad_lse * 0), 2e-5)


def test_level_one_everywhere_is_dense_attention(engine):
    q, k, v, selection = make(Case(batch=2, heads=4, kv_heads=2, head_dim=64))
    out, _ = backend.forward(q, k, v, replace(selection, levels=torch.ones_like(selection.levels)))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=2e-6, rtol=1e-5)


def test_large_logits_neither_overflow_nor_vanish(engine):
    q, k, v, selection = make(CASES["odd_500"])
    ours = backend.forward(40 * q, k, v, selection)
    theirs = reference.forward(40 * q.double(), k.double(), v.double(), selection)
    torch.testing.assert_close(ours[0].double(), theirs[0], atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(ours[1].double(), theirs[1], atol=1e-3, rtol=1e-5)


def test_any_strides(engine):
    q, k, v, selection = make(CASES["odd_63"])
    grad_out, grad_lse = (x.float() for x in upstream(q))
    plain = gradients(q, k, v, selection, grad_out, grad_lse)
    sequence_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_out)]
    channels_apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad_out)]
    gappy = [torch.cat([x, x], -1)[:, :, :, : x.shape[-1]] for x in (q, k, v, grad_out)]
    for *inputs, upstream_grad in (sequence_first, channels_apart, gappy):
        for a, b in zip(gradients(*inputs, selection, upstream_grad, grad_lse), plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_what_a_mask_hides_may_be_anything(engine):
    q, k, v, selection = make(replace(CASES["all_biases"], empty_rows=True))
    grad_out, grad_lse = (x.float() for x in upstream(q))
    clean = gradients(q, k, v, selection, grad_out, grad_lse)
    hidden = ~selection.key_mask[:, None, :, None]
    ours = gradients(
        q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), selection, grad_out, grad_lse
    )
    for a, b in zip(ours, clean, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    assert not ours[3].masked_select(hidden).any() and not ours[4].masked_select(hidden).any()


def test_a_plan_that_keeps_nothing(engine):
    q, k, v, selection = make(CASES["odd_63"])
    grad_out, grad_lse = (x.float() for x in upstream(q))
    out, lse, *grads = gradients(
        q, k, v, replace(selection, levels=torch.zeros_like(selection.levels)), grad_out, grad_lse
    )
    assert lse.isneginf().all() and not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("empty", ["batch", "length_q", "length_k"])
def test_nothing_to_do(engine, empty):
    q, k, v, selection = make(replace(CASES["grouped"], **{empty: 0}))
    out, lse, *grads = gradients(q, k, v, selection, torch.ones_like(q), torch.ones_like(q[..., 0]))
    assert out.shape == q.shape and not out.any() and lse.isneginf().all()
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)


def test_a_poisoned_query_shows(engine):
    q, k, v, selection = make(CASES["odd_63"])
    q[0, 0, 40, 3] = torch.nan
    out, _ = backend.forward(q, k, v, replace(selection, levels=selection.levels.clamp(min=1)))
    assert out[0, 0, 40].isnan().all() and out.isnan().sum() == q.shape[-1]


@pytest.mark.parametrize("name", ["grouped", "all_biases"])
def test_same_bits_again_with_any_number_of_threads(engine, name):
    q, k, v, selection = make(CASES[name])
    grad_out, grad_lse = (x.float() for x in upstream(q))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(q, k, v, selection, grad_out, grad_lse))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    same = results[1:] if engine == "native" else results[2:3]
    base = results[0] if engine == "native" else results[1]
    assert all(torch.equal(a, b) for other in same for a, b in zip(base, other, strict=True))


@pytest.mark.parametrize("name", ["grouped", "all_biases"])
def test_an_item_alone_gives_the_bits_it_has_in_a_batch(engine, name):
    q, k, v, selection = make(CASES[name])
    grad_out, grad_lse = (x.float() for x in upstream(q))
    together = gradients(q, k, v, selection, grad_out, grad_lse)
    pick = slice(1, 2)
    fields = ("levels", "query_power", "pair_bias", "key_mask")
    parts = {f: getattr(selection, f)[pick] for f in fields if getattr(selection, f) is not None}
    one = gradients(q[pick], k[pick], v[pick], replace(selection, **parts), grad_out[pick], grad_lse[pick])
    assert all(torch.equal(a, b[pick]) for a, b in zip(one, together, strict=True))


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86, GPU or not")
def test_narrower_vectors(flags, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PSA_NATIVE_CFLAGS", f"{flags} -O1")
    assert not backend.native_reasons()
    assert calls.library().psa_vector_lanes() == (8 if flags == "-mno-avx512f" else 4)
    for name in ("all_biases", "wide_head", "dim_17"):
        q, k, v, selection = make(CASES[name])
        grad_out, grad_lse = upstream(q)
        ours = gradients(q, k, v, selection, grad_out.float(), grad_lse.float())
        check(ours, expected(q, k, v, selection, grad_out, grad_lse), 2e-5)


def test_no_compiler_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "compiler" in backend.native_reasons()[0]
    q, k, v, selection = make(CASES["odd_63"])
    assert backend.engine_for(q) == "blocks" and backend.unsupported_reasons(q, k, v, selection) == []
    assert not backend.forward(q, k, v, selection)[0].isnan().any()


def test_a_compiler_that_fails_is_a_reason(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(broken))
    assert "out of order" in backend.native_reasons()[0]
    assert backend.engine_for(torch.zeros(1)) == "blocks"


def test_processes_that_compile_at_once_share_one_file(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PSA_NATIVE_CFLAGS", "-O1")
    code = "from psa.backends.native import library; library()"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    files = list((tmp_path / "psa").iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"


def test_other_dtypes_are_refused_with_a_reason():
    q, k, v, selection = make(CASES["odd_63"])
    assert "int32" in backend.unsupported_reasons(q.int(), k.int(), v.int(), selection)[0]

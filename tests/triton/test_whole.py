"""From q, k and v to out by one operator: the same results as a plan made apart, gradients, and graphs."""

import pytest
import torch
from cases import same_layout
from launches import watched
from triton.runtime.interpreter import GridExecutor

import psa
from psa.backends import triton as backend
from psa.backends.triton import whole
from psa.backends.triton.attend import prepare

MODES = {
    "topk": {"mask_mode": "topk"},
    "thresholdbound": {"mask_mode": "thresholdbound"},
    "proportional": {"mask_mode": "proportional", "density": 0.3},
    "tau": {"mask_mode": "proportional", "tau": 0.04},
    "variance": {"bias": "variance", "density": 0.3},
    "ranked": {"rank_exponent": 2.0, "density": 0.3},
    "capped": {"mask_mode": "topk", "use_sim_mask": True, "sim_thresholds": {2: 0.0, 4: 0.05, 8: 0.02}},
}


def tensors(length_q=130, length_k=205, heads=2, kv_heads=1, dim=32, seed=4):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, length_q, dim, generator=g)
    return q, *torch.randn(2, 1, kv_heads, length_k, dim, generator=g)


@pytest.mark.parametrize("bias", ["count", "variance"])
def test_attention_and_gradients_of_a_plan(bias, monkeypatch):
    """Three launches and seven, one more each with the variance bias; nothing waits."""
    q, k, v = tensors()
    config = psa.PSAConfig(block_m=64, block_n=32, mask_mode="topk", bias=bias)
    _, _, selection = whole.forward(q, k, v, config, scale=0.2)
    extra = ["_bias_kernel"] if bias == "variance" else []
    with watched(monkeypatch) as watch:
        out, lse = backend.forward(q, k, v, selection)
    assert watch.launches == ["_pool_kernel", *extra, "_schedule_kernel", "_psa_fwd_kernel"]
    with watched(monkeypatch) as watch:
        backend.backward(out, lse, q, k, v, out, lse, selection)
    assert len(watch.launches) == 7 + len(extra)


@pytest.fixture
def on_gpu(monkeypatch):
    """What a tensor on a GPU would take: one operator, and the device's kernels inside."""
    monkeypatch.setattr(psa.whole, "on_gpu", lambda q: True)
    monkeypatch.setattr(psa.whole, "planner", lambda *call: backend)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "video": {"grid": (3, 7, 9), "text_length": 16, "text_position": "first"},
    "masked": {"key_mask": torch.arange(205)[None] < 150},
}


@pytest.mark.parametrize(
    ("mode", "options"),
    [("topk", "plain"), ("variance", "causal"), ("variance", "video"), ("capped", "masked"), ("ranked", "causal")],
)
def test_one_operator_is_plan_and_attend(mode, options, on_gpu):
    q, k, v = tensors(205)
    config = psa.PSAConfig(block_m=64, block_n=32, **MODES[mode])
    call = OPTIONS[options] | {"enable_gqa": True, "config": config, "return_lse": True, "return_plan": True}
    first = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, plan = psa.psa_attention(*first, **call, backend="triton")
    second = [x.clone().requires_grad_() for x in (q, k, v)]
    causal = call.get("is_causal", False)
    want, want_lse = psa.attend(*second, plan, is_causal=causal, enable_gqa=True, return_lse=True, backend="reference")
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-4)
    loss = lambda out, lse: out.square().sum() + lse.sum()  # noqa: E731
    for a, b in zip(
        torch.autograd.grad(loss(out, lse), first), torch.autograd.grad(loss(want, want_lse), second), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    apart = psa.plan(
        q, k, config, **{name: x for name, x in call.items() if name not in ("config", "return_lse", "return_plan")}
    )
    assert (plan.levels != apart.levels).float().mean() <= 0.02
    assert plan.density == pytest.approx(apart.density, rel=0.02) and plan.text == apart.text


def test_one_operator_in_a_compiled_graph(on_gpu, monkeypatch):
    q, k, v = tensors(205, 205)
    config = psa.PSAConfig(block_m=64, block_n=32, density=0.3, bias="variance")

    def call(q, k, v):
        return psa.psa_attention(q, k, v, config=config, enable_gqa=True, backend="triton").square()

    eager, traced = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(*traced), call(*eager)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), traced), torch.autograd.grad(want.sum(), eager), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_passes_opcheck(on_gpu):
    q, k, v = (x.requires_grad_() for x in tensors(64, 64, dim=16))
    key = psa.PSAConfig(block_m=64, block_n=32, density=0.3, bias="variance").key
    settings = (None, key, 0.2, False, 0, "last", "triton")
    torch.library.opcheck(torch.ops.psa.plan_and_attend, (q, k, v, *settings))
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    same_layout(torch.ops.psa.plan_and_attend, *strided, *settings)


def test_what_the_kernels_do_not_cover_goes_another_way(on_gpu, monkeypatch):
    q, k, v = tensors(65, 65)
    monkeypatch.setattr(psa.whole, "planner", lambda *call: None)
    config = psa.PSAConfig(block_m=64, block_n=32, density=0.3, bias="variance")
    out, plan = psa.psa_attention(q, k, v, config=config, enable_gqa=True, return_plan=True)
    torch.testing.assert_close(
        out, psa.attend(q, k, v, plan, enable_gqa=True, backend="reference"), atol=2e-5, rtol=1e-4
    )
    for changes in ({"importance": "antidiagonal"}, {"importance": "sampled"}, {"slope": True}):
        assert not psa.whole.at_once(q, k, config.replace(**changes), "auto")
    for changes in ({"bias": "measured"}, {"density": 0.3, "mask_mode": "auto", "bias": "count"}, {"type": "dense"}):
        assert not psa.whole.at_once(q, k, config.replace(**changes), "auto")
    assert not psa.whole.at_once(q, k, config, "torch")


def test_the_schedule_takes_at_most_four_bytes_per_pair():
    """Lists of int32, one entry per pair, and 4 bytes per level and query block; nothing else is kept."""
    q, k, v = tensors(1000, 4000)
    config = psa.PSAConfig(block_m=64, block_n=32, mask_mode="topk")
    _, _, selection = whole.forward(q, k, v, config, scale=0.2)
    call = prepare(q, k, v, selection)
    pairs = selection.levels.numel()
    assert call.blocks.numel() * call.blocks.element_size() <= 4 * pairs
    assert call.ends.numel() == selection.levels.shape[1] * 16 * 6
    assert int(call.blocks[..., 0].min()) >= 0


@pytest.mark.slow
def test_heads_that_lie_far_apart(monkeypatch):
    """Offsets beyond 2**31 elements: four heads 2**30 apart, in memory that is reserved and hardly touched."""
    torch.use_deterministic_algorithms(False)  # would fill it
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)  # would copy it onto itself
    room = torch.empty(3 * 2**30 + 2**20, dtype=torch.float16)
    near = [x.half() for x in tensors(70, 90, heads=4, kv_heads=4, dim=16)]
    far = [room.as_strided(x.shape, (0, 2**30, 16, 1), 2**18 * i) for i, x in enumerate(near)]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    config = psa.PSAConfig(block_m=64, block_n=32, mask_mode="topk", mask_ratios={1: (0, 0.4), 4: (0.4, 1.0)})
    results = []
    for q, k, v in (near, far):
        out, lse, selection = whole.forward(q, k, v, config, scale=0.2)
        results.append((out, lse, *backend.backward(out, None, q, k, v, out, lse, selection)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].abs().sum() > 0

"""Five launches from q, k and v to out, for every option of a fixed setting, counted: our kernels and torch's."""

from itertools import product

import pytest
import torch
from launches import watched

import psa
from psa.backends import triton as backend

MODES = {
    "topk": {"mask_mode": "topk"},
    "thresholdbound": {"mask_mode": "thresholdbound"},
    "proportional": {"density": 0.4},
    "dropping": {"density": 0.2, "keep_all": False, "exponent": 2.0},
    "ranked": {"density": 0.4, "rank_exponent": 3.0},
    "shared": {"density": 0.4, "share_heads": True},
    "tau": {"tau": 0.04},
    "tau, ranked": {"tau": 0.004, "rank_exponent": 0.5},
}
BIAS = {"bias": "variance", "bias_cap": 0.5}
CAPS = {"use_sim_mask": True, "sim_thresholds": {2: 0.2, 8: 0.05}}
GROUPED = {"heads": 2, "kv_heads": 1, "length_q": 70, "length_k": 90}


def tensors(batch=2, heads=1, kv_heads=1, length_q=70, length_k=90, dim=16, dtype=torch.float32):
    """Neighbouring keys alike, laid out as [B, L, H, D]; the mask hides both ends of the second item."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(batch, n, h, dim, generator=g).to(dtype).transpose(1, 2)
        for n, h in ((length_q, heads), (length_k, kv_heads), (length_k, kv_heads))
    )
    token = torch.arange(length_k)
    mask = torch.stack([token >= 0, (token > length_k // 2) & (token < length_k - 3)])[:batch]
    return q, k + k.roll(1, 2), v, mask.t().contiguous().t()


def check(monkeypatch, settings, *, causal=False, masked=False, text=0, position="last", **shape):
    """One public call: what it launches, and that its result is the reference's on the same plan."""
    q, k, v, mask = tensors(**shape)
    block_n = settings.get("block_n", 32)
    config = psa.PSAConfig(**{"block_m": 32, "block_n": block_n, "mask_mode": "proportional", **settings})
    monkeypatch.setattr(psa.whole, "on_gpu", lambda q: True)
    monkeypatch.setattr(psa.whole, "planner", lambda *call: backend)
    monkeypatch.setattr(psa.functional, "plan_and_attend", psa.whole.plan_and_attend._init_fn)
    call = {"is_causal": causal, "enable_gqa": True, "scale": 0.3, "return_lse": True}
    text = {"text_length": text, "text_position": position, "key_mask": mask if masked else None}
    with watched(monkeypatch) as watch:
        out, lse, plan = psa.psa_attention(q, k, v, config=config, **call, **text, return_plan=True, backend="triton")
    assert watch.operators == [], watch.operators
    assert len(watch.kernels) <= 5, watch.kernels
    want, want_lse = psa.attend(q.double(), k.double(), v.double(), plan, **call, backend="reference")
    tolerance = {"atol": 5e-3, "rtol": 5e-3} if q.dtype == torch.float16 else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(lse.double(), want_lse, **tolerance)
    apart = psa.plan(q, k, config, is_causal=causal, enable_gqa=True, scale=0.3, **text)
    assert (plan.levels != apart.levels).float().mean() <= 0.05
    if apart.query_power is not None:
        torch.testing.assert_close(plan.query_power, apart.query_power)
        torch.testing.assert_close(plan.bias_cap, apart.bias_cap)
    return watch.kernels


@pytest.mark.parametrize("mode", MODES)
def test_every_option_at_once_takes_five_launches(mode, monkeypatch):
    kernels = check(monkeypatch, MODES[mode] | BIAS | CAPS, causal=True, masked=True)
    budget = ["_bias_kernel"] if "density" not in MODES[mode] else ["_solve_kernel"]
    assert kernels == ["_pool_kernel", "_importance_kernel", *budget, "_select_kernel", "_psa_fwd_kernel"]


OPTIONS = {
    "variance, grouped": ({"density": 0.4} | BIAS, {**GROUPED, "batch": 1}),
    "variance, ranked mode": ({"mask_mode": "topk"} | BIAS, {"length_q": 300, "batch": 1}),
    "caps": ({"mask_mode": "topk"} | CAPS, {}),
    "caps, masked": ({"density": 0.4} | CAPS, {"masked": True}),
    "caps, dropping": (MODES["dropping"] | CAPS, GROUPED),
    "causal": ({"density": 0.4}, {"causal": True, "batch": 1}),
    "causal, masked": ({"mask_mode": "thresholdbound"}, {"causal": True, "masked": True}),
    "text": ({"density": 0.5}, {"text": 9, "position": "first", "batch": 1}),
    "half precision": ({"density": 0.4} | BIAS | CAPS, {"dtype": torch.float16, "batch": 1}),
    "small means": ({"density": 0.4, "importance_rows": 4, "importance_cols": 2}, {"batch": 1}),
    "large blocks": ({"density": 0.4, "block_n": 256} | BIAS | CAPS, {"length_k": 400, "masked": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_takes_five_launches(name, monkeypatch):
    settings, call = OPTIONS[name]
    check(monkeypatch, settings, **call)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_combination_takes_five_launches(mode, monkeypatch):
    for bias, caps, causal, masked in product(({}, BIAS), ({}, CAPS), (False, True), (False, True)):
        check(monkeypatch, MODES[mode] | bias | caps, causal=causal, masked=masked, **GROUPED)


def test_launches_are_seen(monkeypatch):
    """The count is of use: an operator counts, a view and an allocation do not, a wait raises."""
    x = torch.ones(4, 4)
    with watched(monkeypatch) as watch:
        torch.empty_like(x.t()[1:].view(torch.int32).expand(2, 3, 4))
        assert watch.launches == []
        (x + 1).float().square().mean(1)
        x.t().contiguous()
        x.fill_(2.0)
    assert watch.operators == ["add", "pow", "mean", "clone", "fill_"]
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match=r"waits|mask"), watched(monkeypatch):
            waits()

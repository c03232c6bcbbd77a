"""What runs on a GPU besides its kernels, on tensors of the meta device: operators refuse to mix it with the CPU, and
what would make the host wait for a value raises, since there is none."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import psa
from psa import candidates, functional, importance, planning
from psa.reorder import keys, spatial

CONFIGS = {
    "auto": psa.PSAConfig(density=0.3),
    "target": psa.PSAConfig(target_error=0.1),
    "shared": psa.PSAConfig(density=0.3, share_heads=True),
    "published": psa.PSAConfig(density=0.3, published=True),
    "semantic": psa.PSAConfig(density=0.3, rearrange_method="semantic"),
    "hybrid": psa.PSAConfig(density=0.3, rearrange_method="hybrid"),
    "tile": psa.PSAConfig(density=0.3, rearrange_method="tile"),
    "order per head": psa.PSAConfig(density=0.3, rearrange_method="auto"),
    "capped": psa.PSAConfig(mask_mode="topk", use_sim_mask=True),
    "thresholdbound": psa.PSAConfig(mask_mode="thresholdbound"),
    "proportional": psa.PSAConfig(mask_mode="proportional", density=0.2, bias="variance", slope=True),
    "ranked": psa.PSAConfig(mask_mode="proportional", density=0.2, rank_exponent=2.0),
    "dropping": psa.PSAConfig(mask_mode="proportional", density=0.2, keep_all=False),
    "measured": psa.PSAConfig(mask_mode="proportional", density=0.2, bias="measured"),
    "sampled": psa.PSAConfig(mask_mode="topk", importance="sampled"),
    "antidiagonal": psa.PSAConfig(mask_mode="topk", importance="antidiagonal"),
}


class Kernels:
    """Stands for the GPU's own planner."""

    @staticmethod
    def plan_importance(q, k, config, **_):
        return q.new_empty(*q.shape[:2], -(-q.shape[2] // config.block_m), -(-k.shape[2] // config.block_n)).float()

    @staticmethod
    def plan_levels(q, k, config, importance, **_):
        return importance.expand(*q.shape[:2], -1, -1).to(torch.uint8)


@pytest.fixture
def gpu(monkeypatch):
    """Operators' own bodies instead of their fake kernels, and no cache that would keep their results."""
    monkeypatch.setattr(planning, "select", planning.select._init_fn)
    monkeypatch.setattr(planning, "probe", planning.probe._init_fn)
    monkeypatch.setattr("psa.order.key_order", keys.key_order._init_fn)
    monkeypatch.setattr(candidates, "_made_once", candidates._made_once.__wrapped__)
    monkeypatch.setattr(importance, "_sample", importance._sample.__wrapped__)
    monkeypatch.setattr(spatial, "cached_permutation", spatial.cached_permutation.__wrapped__)
    return torch.device("meta")


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("call", ["video", "causal", "grouped", "masked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_and_no_devices_mix(name, call, kernels, gpu, monkeypatch):
    monkeypatch.setattr(planning, "planner", lambda *_: Kernels if kernels else None)
    q = torch.empty(1, 2, 310, 64, device=gpu, dtype=torch.bfloat16)
    k, v = (torch.empty(1, 1 if call == "grouped" else 2, 310, 64, device=gpu, dtype=torch.bfloat16) for _ in "kv")
    options = {
        "video": {"grid": (3, 10, 10), "text_length": 10},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
        "masked": {"key_mask": torch.empty(1, 310, device=gpu, dtype=torch.bool), "grid": (1, 31, 10)},
    }[call]
    out, plan = functional.plan_then_attend(q, k, v, CONFIGS[name], "auto", **options)
    assert out.is_meta and out.dtype == q.dtype
    assert plan.levels.is_meta
    if CONFIGS[name].mask_mode == "auto":
        probes = psa.ProbeState()
        probes.record(0, 0, plan, None)
        functional.plan_then_attend(q, k, v, CONFIGS[name], "auto", **options, probes=probes, step=1)


class Count(TorchDispatchMode):
    """Counts what a GPU would be asked for: operators that are neither views nor allocations."""

    launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function._schema.returns
        view = bool(results) and all(x.alias_info is not None and not x.alias_info.is_write for x in results)
        self.launches += not view and "empty" not in function.__name__
        return function(*args, **(kwargs or {}))


def test_the_automatic_mode_asks_for_few_launches(gpu, monkeypatch):
    """At Wan 2.1 1.3B's size, as docs/en/performance.md says: a few hundred a layer, not thousands."""
    monkeypatch.setattr(planning, "planner", lambda *_: Kernels)
    q, k, v = (torch.empty(1, 12, 32760, 128, device=gpu, dtype=torch.bfloat16) for _ in "qkv")
    probes, counts = psa.ProbeState(), []
    for step in range(2):
        with Count() as count:
            functional.plan_then_attend(
                q, k, v, CONFIGS["auto"], "auto", grid=(21, 30, 52), probes=probes, layer=0, step=step
            )
        counts.append(count.launches)
    assert 300 < counts[1] < 500 and 1500 < counts[0] < 3000, counts

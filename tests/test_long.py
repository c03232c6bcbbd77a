"""Planning for long sequences: head by head, in scratch memory that does not grow with L×L or with the heads."""

import subprocess
import sys

import pytest
import torch

import psa
from psa import presets

CONFIGS = {
    "preset": presets.get("qwen2.5-vl"),
    "proportional": psa.PSAConfig(density=0.3),
    "topk": psa.PSAConfig(),
    "measured": psa.PSAConfig(density=0.3, bias="measured"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_planned_one_by_one_get_what_they_get_together(name, monkeypatch):
    config = CONFIGS[name]
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 700, 32, generator=g), torch.randn(2, 2, 900, 32, generator=g)
    mask = torch.ones(2, 900, dtype=torch.bool)
    mask[1, :130] = False
    call = {"is_causal": True, "enable_gqa": True, "key_mask": mask, "text_length": 20}
    together = psa.plan(q, k, config, **call)
    monkeypatch.setattr("psa.planning.SELECT_AT_ONCE", 1)
    apart = psa.plan(q, k, config, **call)
    same = (together.levels == apart.levels).float().mean()
    assert same > 0.99 if name in ("proportional", "measured") else same == 1  # ties are broken by head
    assert apart.density == pytest.approx(together.density, abs=2e-3)
    if together.pair_bias is not None:
        assert apart.pair_bias.shape == together.pair_bias.shape


@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_a_gpu_plans_groups_of_heads(together):
    """As many heads as fit, in whole groups of those that share keys; the last group may be smaller."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 32, generator=g) for heads in (6, 3, 3))
    settings = (psa.PSAConfig(density=0.3).key, 0.2, False, 0, "last")
    want = torch.ops.psa.select(q, k, v, None, None, None, *settings)
    select = lambda *some: torch.ops.psa.select(*some, *settings)  # noqa: E731
    got = psa.planning._in_groups(select, q, k, v, None, None, None, together)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_given_importance_head_by_head(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, scores = torch.randn(1, 3, 512, 32, generator=g), torch.rand(1, 1, 4, 8, generator=g)
    together = psa.plan(q, q, importance=scores)
    monkeypatch.setattr("psa.planning.SELECT_AT_ONCE", 1)
    assert torch.equal(psa.plan(q, q, importance=scores).levels, together.levels)


MEASURE = """
import resource, torch, psa
from psa import presets
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
config = {config}
q, k = (torch.rand(1, 1, {length}, {dim}).bfloat16().expand(1, heads, -1, -1) for heads in ({heads}, 1))
call = dict(is_causal={causal}, enable_gqa=True)
short = [x[:, :, :2048] for x in (q, k)]
psa.plan(*short, config, v=short[1], **call)
before = peak()
plan = psa.plan(q, k, config, v=k, **call)
plan.density
held = [plan.levels, plan.slope, plan.pair_bias]
print(peak() - before, sum(x.numel() * x.element_size() for x in held if x is not None) / 2**30 / {heads})
"""


RANKED = "psa.integrations.transformers.choose_config(None, None, 0.15)"
EVERY = {
    "ranked": RANKED,
    "preset": "presets.get('qwen2.5-vl', 'psa_balanced')",
    "pooled": "psa.PSAConfig(mask_mode='proportional', density=0.3)",
    "antidiagonal": "psa.PSAConfig(mask_mode='proportional', density=0.3, importance='antidiagonal')",
    "stride 16": "psa.PSAConfig(mask_mode='topk', importance='antidiagonal', importance_stride=16)",
    "sampled": "psa.PSAConfig(mask_mode='topk', importance='sampled')",
    "variance": "psa.PSAConfig(density=0.3, bias='variance')",
    "measured": "psa.PSAConfig(density=0.3, bias='measured')",
    "auto": "psa.PSAConfig(density=0.15)",
    "target": "psa.PSAConfig(target_error=0.05)",
}


def planning_memory(config: str, heads: int, length: int, dim: int, causal: bool = True) -> tuple[float, float]:
    """GiB that planning takes at its peak beyond inputs, and what the plan itself holds for each head."""
    script = MEASURE.format(config=config, heads=heads, length=length, dim=dim, causal=causal)
    script = script.replace("import resource, torch, psa", "import resource, torch, psa, psa.integrations.transformers")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, held = map(float, done.stdout.split())
    return peak, held


def test_planning_memory():
    """65k tokens × 10 heads × 64 channels: at most 0.25 GiB, where 128k × 28 × 128 may take 1 GB."""
    assert planning_memory(RANKED, 10, 65536, 64)[0] < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_planning_memory_at_128k(name, causal):
    """Every importance and mode: scratch of one head, as heads follow each other, and the plan of 28: 1 GB."""
    peak, held = planning_memory(EVERY[name], 3, 1 << 17, 128, causal)
    assert peak + 25 * held < 1e9 / 2**30

"""Selection kernels against the torch specification: importance, levels in every mode, schedules."""

import pytest
import torch

import psa
from psa.allocate import allocate_levels, block_mask
from psa.backends import reference, triton
from psa.backends.triton import schedule, select, whole
from psa.backends.triton.importance import importance, pool_keys
from psa.backends.triton.score import row_rules
from psa.importance import importance as torch_importance
from psa.pyramid import group_means
from psa.schedule import build_schedule


def listed(blocks, ends):
    """The defined part of ``blocks``; the rest set to -1."""
    return torch.where(torch.arange(blocks.shape[-1], device=blocks.device) < ends[..., -1:], blocks, -1)


def scores(kind, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "noise": lambda: torch.rand(shape, generator=g),
        "peaked": lambda: torch.randn(shape, generator=g).mul(4).exp(),
        "ties": lambda: torch.randint(0, 3, shape, generator=g).float(),
        "constant": lambda: torch.full(shape, 0.3),
        "zero": lambda: torch.zeros(shape),
    }[kind]()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "rows", "cols", "masked"),
    [
        ((500, 437), (2, 1), 32, 16, 8, False),
        ((77, 300), (1, 1), 48, 8, 16, True),
        ((300, 77), (4, 2), 16, 16, 8, False),
        ((1, 1), (1, 1), 16, 16, 8, False),
        ((260, 333), (1, 1), 64, 1, 1, True),
        ((200, 700), (1, 1), 96, 64, 32, False),
    ],
)
def test_importance_is_that_of_torch(lengths, heads, dim, rows, cols, masked, causal):
    g = torch.Generator().manual_seed(1)
    batch = 2 if masked else 1
    q = torch.randn(batch, lengths[0], heads[0], dim, generator=g).transpose(1, 2) * 2
    k = torch.randn(batch, heads[1], lengths[1], dim, generator=g)
    mask = torch.rand(batch, lengths[1], generator=g) > 0.4 if masked else None
    if mask is not None:
        mask[1, lengths[1] // 3 :] = False
    config = psa.PSAConfig(block_m=64, block_n=32, importance_rows=rows, importance_cols=cols)
    rules = row_rules(64, 32, causal, 0, "last", mask)
    pooled = group_means(k, cols, mask)
    got = importance(q, pooled, lengths[1], rules, rows=rows, cols=cols, scale=dim**-0.5, key_mask=mask)
    want = torch_importance(q, k, config, scale=dim**-0.5, is_causal=causal, key_mask=mask)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_nobody_wants_get_no_importance(causal):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 300, 32, generator=g), torch.randn(2, 2, 300, 32, generator=g)
    config = psa.PSAConfig(block_m=64, block_n=32, importance_rows=8, importance_cols=4)
    wanted = torch.tensor([[True, False, False, True], [False, False, True, False]])
    got = triton.plan_importance(q, k, config, scale=32**-0.5, is_causal=causal, wanted=wanted)
    want = torch_importance(q, k, config, scale=32**-0.5, is_causal=causal)
    torch.testing.assert_close(got, want * wanted[..., None, None], atol=1e-5, rtol=1e-4)


FOUR = {1: (0.0, 0.4), 2: (0.4, 0.5), 4: (0.5, 0.6), 8: (0.6, 0.8)}
MODES = {
    "topk": {"mask_mode": "topk"},
    "topk, wide": {"mask_mode": "topk", "mask_ratios": {1: (0.0, 0.33), 4: (0.33, 0.5), 32: (0.5, 1.0)}},
    "thresholdbound": {"mask_mode": "thresholdbound", "mask_ratios": FOUR},
    "thresholdbound, all": {"mask_mode": "thresholdbound", "mask_ratios": {1: (0, 0.7), 2: (0.7, 1.0)}},
    "proportional": {"density": 0.2, "exponent": 1.0},
    "proportional, dropping": {"density": 0.07, "keep_all": False, "exponent": 2.0},
    "proportional, shared": {"density": 0.3, "share_heads": True, "exponent": 0.5},
    "proportional, everything": {"density": 1.0, "exponent": 1.0},
    "proportional, least": {"density": 1 / 32, "exponent": 1.0},
    "proportional, by rank": {"density": 0.2, "exponent": 1.0, "rank_exponent": 3.0},
    "tau": {"tau": 0.04},
    "tau, by rank": {"tau": 0.004, "rank_exponent": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["noise", "peaked", "ties", "zero"])
def test_levels_and_schedule_are_those_of_torch(mode, kind):
    for causal, lengths, text, position, capped in [
        (False, (120, 700), 0, "last", False),
        (False, (100, 333), 7, "last", True),
        (True, (150, 300), 0, "last", False),
        (True, (190, 100), 5, "first", True),
    ]:
        config = psa.PSAConfig(block_m=64, block_n=32, **MODES[mode])
        m, n = -(-lengths[0] // 64), -(-lengths[1] // 32)
        given = scores(kind, (1, 2, m, n), seed=m)
        own = 2 if causal else 1  # caps of query heads, as outliers', or of KV heads
        exponents = torch.randint(0, 6, (1, own, n), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
        assert torch.equal(select.cap_indices(2**exponents), exponents)
        caps = exponents if capped else None
        want = allocate_levels(
            given,
            mask_mode=config.mask_mode,
            mask_ratios=config.mask_ratios,
            density=config.density,
            block_n=32,
            tau=config.tau,
            exponent=config.exponent,
            rank_exponent=config.rank_exponent,
            keep_all=config.keep_all,
            share_heads=config.share_heads,
            cap=2**exponents if capped else None,
            mask=block_mask(*lengths, 64, 32, is_causal=causal, text_length=text, text_position=position),
        )
        rules = row_rules(64, 32, causal, text, position, None)
        levels, blocks, ends = select.allocate(given, config, rules, lengths, caps=caps)
        assert torch.equal(levels, want), (mode, kind, causal, lengths, (levels != want).sum())
        want_blocks, want_ends = build_schedule(want, 6)
        assert torch.equal(ends, want_ends)
        assert torch.equal(listed(blocks, ends), listed(want_blocks, want_ends))


@pytest.mark.parametrize("n", [1, 2, 15, 17, 1000])
@pytest.mark.parametrize("mode", ["topk", "thresholdbound", "proportional"])
def test_odd_and_long_rows(n, mode):
    config = psa.PSAConfig(mask_mode=mode, **({"density": 0.15} if mode == "proportional" else {}))
    given = scores("peaked", (1, 1, 3, n))
    rules = row_rules(128, 64, False, 0, "last", None)
    levels, blocks, ends = select.allocate(given, config, rules, (300, n * 64), caps=None)
    extra = {"density": config.density} if mode == "proportional" else {"mask_ratios": config.mask_ratios}
    want = allocate_levels(given, mask_mode=mode, block_n=64, **extra)
    assert torch.equal(levels, want)
    assert torch.equal(listed(blocks, ends), listed(*build_schedule(want, 7)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 150), (1, 2, 130, 40)])
def test_schedule_and_its_transpose(shape):
    g = torch.Generator().manual_seed(2)
    exponents = torch.randint(-1, 8, shape, generator=g)
    levels = torch.where(exponents < 0, 0, 2 ** exponents.clamp(min=0)).to(torch.uint8)
    for given in (levels, levels.transpose(-1, -2)):
        blocks, ends = schedule.build_schedule(given, 8)
        want_blocks, want_ends = build_schedule(given, 8)
        assert torch.equal(ends, want_ends)
        assert torch.equal(listed(blocks, ends), listed(want_blocks, want_ends))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mode", ["topk", "thresholdbound", "proportional", "proportional, dropping", "proportional, by rank"]
)
def test_selection_from_q_and_k_is_that_of_the_plan(mode, causal):
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 130, 32, generator=g) * 2, torch.randn(2, 1, 430, 32, generator=g)
    mask = torch.ones(2, 430, dtype=torch.bool)
    mask[1, :40] = False
    config = psa.PSAConfig(block_m=64, block_n=32, **MODES[mode])
    text = 0 if causal else 20
    plan = psa.plan(q, k, config, is_causal=causal, enable_gqa=True, key_mask=mask, text_length=text)
    rules = row_rules(64, 32, causal, text, "last", mask)
    levels, _, _ = select.select(q, pool_keys(k, 8, mask), 430, config, rules, scale=32**-0.5, key_mask=mask)
    differing = (levels != plan.levels).float().mean()
    assert differing <= 0.005  # sums in another order may move a pair that lies on a boundary


def test_each_head_may_have_its_own_setting():
    given = scores("peaked", (2, 2, 3, 20))
    exponent = torch.tensor([[1.0, 0.75], [1.5, 1.0]])
    keep = torch.tensor([[True, True], [True, False]])
    density = torch.tensor([[0.1, 0.2], [0.3, 0.05]])
    want = allocate_levels(
        given, mask_mode="proportional", block_n=32, exponent=exponent[..., None, None],
        keep_all=keep[..., None, None], density=density[..., None, None],
    )  # fmt: skip
    table = torch.stack([exponent, keep.float(), density], dim=-1)
    rules = row_rules(64, 32, False, 0, "last", None)
    config = psa.PSAConfig(block_m=64, block_n=32)
    levels, _, _ = select.allocate(given, config, rules, (192, 640), settings=table)
    assert torch.equal(levels, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["topk", "proportional", "variance"])
def test_the_whole_call_is_plan_and_reference(mode, causal):
    g = torch.Generator().manual_seed(4)
    q = torch.randn(1, 2, 130, 32, generator=g)
    k, v = torch.randn(2, 1, 1, 205, 32, generator=g)
    config = psa.PSAConfig(block_m=64, block_n=32, **(MODES.get(mode) or {"density": 0.3, "bias": "variance"}))
    out, lse, selection = whole.forward(q, k, v, config, scale=0.2, is_causal=causal)
    want, want_lse = reference.forward(q, k, v, selection)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-4)
    plan = psa.plan(q, k, config, is_causal=causal, enable_gqa=True, scale=0.2)
    assert (selection.levels != plan.levels).float().mean() <= 0.02


BY_TORCH = {
    "auto": {"density": 0.2},
    "antidiagonal": {"density": 0.2, "mask_mode": "proportional", "importance": "antidiagonal"},
    "measured": {"density": 0.2, "bias": "measured"},
}
"""What torch adds to the kernels: probes, other importances, and the measured bias."""


@pytest.mark.parametrize("mode", ["topk", "proportional, dropping", "antidiagonal", "measured", "auto"])
def test_plans_are_the_same_through_the_device_kernels(mode, monkeypatch):
    g = torch.Generator().manual_seed(5)
    q = torch.randn(1, 2, 260, 32, generator=g) * 2
    k, v = torch.randn(2, 1, 2, 330, 32, generator=g)
    config = psa.PSAConfig(block_m=64, block_n=32, **(BY_TORCH.get(mode) or MODES[mode]))
    want = psa.plan(q, k, config, v=v, text_length=9)
    called = []
    monkeypatch.setattr(psa.planning, "planner", lambda *args: called.append(args) or triton)
    got = psa.plan(q, k, config, v=v, text_length=9)
    assert called
    assert (got.levels != want.levels).float().mean() <= 0.02
    assert got.density == pytest.approx(want.density, rel=0.02)


def test_what_the_kernels_do_not_cover_is_said():
    q = torch.zeros(1, 1, 8, 16)
    assert triton.planning_reasons(q, q, psa.PSAConfig(density=0.2, rank_exponent=0.5)) == []
    long = torch.zeros(1, 1, 1, 16).expand(1, 1, 64 * 5000, 16)
    assert triton.planning_reasons(q, long, psa.PSAConfig(density=0.2, exponent=1.0)) == []
    assert "2048" in triton.planning_reasons(q, long, psa.PSAConfig(density=0.2, rank_exponent=0.5))[0]
    assert triton.planning_reasons(q.double(), q.double(), psa.PSAConfig(density=0.2))


def test_what_no_small_gpu_can_hold_is_planned_another_way():
    """float32 of 256 channels takes 136 KiB a tile as compiled for sm_120, which has 99; 128 channels take 68."""
    q = torch.zeros(1, 1, 256, 256)
    config = psa.PSAConfig(mask_mode="topk")
    assert any("shared memory" in reason for reason in triton.planning_reasons(q, q, config))
    assert not triton.planning_reasons(q[..., :128], q[..., :128], config)
    assert not triton.planning_reasons(q.bfloat16(), q.bfloat16(), config)
    single = config.replace(importance_rows=1, importance_cols=1)
    assert any("shared memory" in reason for reason in triton.planning_reasons(q.bfloat16(), q.bfloat16(), single))

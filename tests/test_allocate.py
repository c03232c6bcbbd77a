"""Levels: budgets, quotas, pins, caps, ties, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import psa
from psa.allocate import BlockMask, allocate_levels, block_mask
from psa.caps import similarity_cap
from psa.errors import ConfigError, PSAError, ShapeError

RATIOS = {1: (0.0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}


def density(levels, visible=None):
    kept = torch.where(levels > 0, 1.0 / levels.float().clamp(min=1), 0.0)
    if visible is None:
        return kept.mean((-1, -2))
    return (kept * visible).sum((-1, -2)) / visible.sum((-1, -2))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(20, 60), st.integers(60, 130), st.sampled_from([0.05, 0.15, 0.4, 0.9, 1.0]),
    st.sampled_from([0.5, 1.0, 2.0]), st.booleans(), st.booleans(),
    st.sampled_from(["noise", "constant", "peaked", "zero"]), st.integers(0, 1000),
)  # fmt: skip
def test_proportional_meets_its_budget(heads, m, n, target, exponent, keep_all, share, kind, seed):
    g = torch.Generator().manual_seed(seed)
    importance = {
        "noise": lambda: torch.rand(2, heads, m, n, generator=g),
        "constant": lambda: torch.full((2, heads, m, n), 0.3),
        "peaked": lambda: torch.randn(2, heads, m, n, generator=g).mul(4).exp(),
        "zero": lambda: torch.zeros(2, heads, m, n),
    }[kind]()
    levels = allocate_levels(
        importance, mask_mode="proportional", density=target, block_n=64, exponent=exponent, keep_all=keep_all,
        share_heads=share,
    )  # fmt: skip
    got = density(levels).mean(1) if share else density(levels)
    assert (got <= target + 1e-6).all() and (got >= 0.98 * target).all()
    assert not keep_all or (levels > 0).all()


def test_proportional_is_monotone_in_importance(rng):
    importance = torch.rand(1, 1, 40, 100, generator=rng)
    levels = allocate_levels(importance, mask_mode="proportional", density=0.2, block_n=64)[0, 0].float()
    row = importance[0, 0] / importance[0, 0].sum(-1, keepdim=True)
    order = row.flatten().argsort(descending=True)
    sorted_levels = levels.flatten()[order]
    clear = row.flatten()[order][:-200] > 1.02 * row.flatten()[order][200:]
    assert (sorted_levels[:-200][clear] <= sorted_levels[200:][clear]).all()


def test_fixed_tau_is_the_formula(rng):
    importance = torch.rand(1, 2, 30, 50, generator=rng)
    levels = allocate_levels(importance, mask_mode="proportional", tau=0.03, block_n=32, exponent=1.0)
    share = importance / importance.sum(-1, keepdim=True)
    exact = torch.log2(torch.clamp(0.03 / share, 1, 32))
    assert ((exact - levels.float().log2()).abs() <= 0.5 + 1 / 64).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 99), st.booleans())
def test_topk_quotas_are_exact(n, seed, ties):
    g = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 3, (1, 2, 5, n), generator=g).float() if ties else torch.rand(1, 2, 5, n, generator=g)
    levels = allocate_levels(importance, mask_mode="topk", mask_ratios=RATIOS, block_n=64)
    ends = [int(n * hi) for hi in (0.1, 0.15, 0.15, 0.35)]
    for level, start, end in zip((1, 2, 4, 8), [0, *ends], ends, strict=False):
        assert ((levels == level).sum(-1) == end - start).all()
    kept_least = importance.masked_fill(levels == 0, torch.inf).amin(-1)
    dropped_most = importance.masked_fill(levels > 0, -torch.inf).amax(-1)
    assert (kept_least >= dropped_most).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_thresholdbound_covers_its_share(n, seed, bound):
    importance = torch.rand(1, 1, 6, n, generator=torch.Generator().manual_seed(seed)) ** 4
    levels = allocate_levels(importance, mask_mode="thresholdbound", mask_ratios={1: (0, bound)}, block_n=64)
    covered = (importance * (levels == 1)).sum(-1) / importance.sum(-1)
    first = importance.argmax(-1, keepdim=True)
    kept_any = (importance.amax(-1) / importance.sum(-1)) <= bound
    assert (covered >= bound - 1e-4)[kept_any].all()
    assert (levels.gather(-1, first) == 1).all()  # int(0.06 N) + 1 blocks at least


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 600), st.booleans(), st.integers(0, 40), st.sampled_from(["first", "last"]),
    st.sampled_from(["topk", "thresholdbound", "proportional"]), st.integers(0, 99),
)  # fmt: skip
def test_pins_and_visibility_hold_in_every_mode(lq, lk, causal, text, position, mode, seed):
    text = min(text, lq, lk)
    mask = block_mask(lq, lk, 64, 32, is_causal=causal, text_length=text, text_position=position)
    m, n = -(-lq // 64), -(-lk // 32)
    importance = torch.rand(1, 2, m, n, generator=torch.Generator().manual_seed(seed))
    extra = {"density": 0.3} if mode == "proportional" else {"mask_ratios": RATIOS}
    levels = allocate_levels(importance, mask_mode=mode, block_n=32, mask=mask, **extra)
    q_pos = torch.arange(lq) + lk - lq
    for i in range(m):
        rows = range(i * 64, min(lq, (i + 1) * 64))
        for j in range(n):
            keys = range(j * 32, min(lk, (j + 1) * 32))
            seen = not causal or keys[0] <= q_pos[rows[-1]]
            diagonal = causal and keys[-1] > q_pos[rows[0]]
            spans = [range(text), range(text)] if position == "first" else [range(lq - text, lq), range(lk - text, lk)]
            is_text = text and (
                max(rows[0], spans[0][0]) <= min(rows[-1], spans[0][-1])
                or max(keys[0], spans[1][0]) <= min(keys[-1], spans[1][-1])
            )
            if not seen:
                assert (levels[0, :, i, j] == 0).all()
            elif diagonal or is_text or (causal and j == 0):
                assert (levels[0, :, i, j] == 1).all()


def test_causal_budget_counts_visible_pairs(rng):
    mask = block_mask(8192, 8192, 128, 64, is_causal=True)
    importance = torch.rand(1, 2, 64, 128, generator=rng)
    levels = allocate_levels(importance, mask_mode="proportional", density=0.2, block_n=64, mask=mask)
    got = density(levels, mask.visible)
    assert (got <= 0.2).all() and (got > 0.196).all()


def test_caps_hold_and_leave_the_budget_met(rng):
    importance = torch.rand(1, 4, 64, 128, generator=rng)
    cap = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)[torch.randint(1, 4, (1, 2, 128), generator=rng)]
    cap[..., :5] = 1
    levels = allocate_levels(importance, mask_mode="proportional", density=0.5, block_n=64, cap=cap)
    assert (levels <= cap.repeat_interleave(2, 1)[:, :, None]).all()
    assert ((density(levels) > 0.49) & (density(levels) <= 0.5)).all()
    published = allocate_levels(importance, mask_mode="topk", mask_ratios=RATIOS, block_n=64, cap=cap)
    free = allocate_levels(importance, mask_mode="topk", mask_ratios=RATIOS, block_n=64)
    assert torch.equal(published, torch.minimum(free, cap.repeat_interleave(2, 1)[:, :, None]))


def test_rows_are_normalised_first(rng):
    importance = torch.rand(1, 1, 30, 64, generator=rng)
    scaled = importance * torch.rand(1, 1, 30, 1, generator=rng) * 2.0**40
    topk = {"mask_mode": "topk", "mask_ratios": RATIOS, "block_n": 64}
    assert torch.equal(allocate_levels(importance, **topk), allocate_levels(scaled, **topk))
    proportional = {"mask_mode": "proportional", "density": 0.2, "block_n": 64}
    same = allocate_levels(scaled, **proportional) == allocate_levels(importance, **proportional)
    assert same.float().mean() > 0.999  # rounding may move a pair that sits on a boundary


def test_batch_items_do_not_influence_each_other(rng):
    importance = torch.rand(3, 2, 16, 70, generator=rng) ** 3
    for extra in ({"mask_mode": "proportional", "density": 0.2}, {"mask_mode": "topk", "mask_ratios": RATIOS}):
        together = allocate_levels(importance, block_n=64, **extra)
        alone = torch.cat([allocate_levels(importance[b : b + 1], block_n=64, **extra) for b in range(3)])
        assert torch.equal(together, alone)


def test_similarity_cap_of_equal_and_random_keys(rng):
    same = torch.randn(1, 2, 1, 32, generator=rng).expand(1, 2, 200, 32)
    assert (similarity_cap(same, 64) == 8).all()
    assert (similarity_cap(torch.randn(1, 2, 640, 32, generator=rng), 64) == 1).all()
    pairs = torch.randn(1, 1, 100, 32, generator=rng).repeat_interleave(2, 2)
    assert (similarity_cap(pairs, 32)[..., :6] == 2).all()


def test_similarity_cap_completes_the_tail_with_its_last_token(rng):
    k = torch.randn(2, 1, 75, 16, generator=rng)
    full = torch.cat([k, k[:, :, -1:].expand(-1, -1, 21, -1)], 2)
    assert torch.equal(similarity_cap(k, 32), similarity_cap(full, 32))
    masked = torch.cat([k, torch.randn(2, 1, 21, 16, generator=rng)], 2)
    real = torch.arange(96).expand(2, 96) < 75
    assert torch.equal(similarity_cap(k, 32), similarity_cap(masked, 32, key_mask=real))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask_mode": "proportional", "density": 0.01},
        {"mask_mode": "proportional", "density": 0.2, "mask_ratios": RATIOS},
        {"mask_mode": "proportional"},
        {"mask_mode": "proportional", "density": 1.5},
        {"mask_mode": "topk"},
        {"mask_mode": "topkk", "mask_ratios": RATIOS},
        {"mask_mode": "topk", "mask_ratios": {1: (0.2, 0.1)}},
        {"mask_mode": "topk", "mask_ratios": {1: (0.0, 0.5), 2: (0.4, 0.6)}},
        {"mask_mode": "topk", "mask_ratios": {8: (0.0, 0.5), 2: (0.5, 0.6)}},
        {"mask_mode": "topk", "mask_ratios": {3: (0.0, 0.5)}},
        {"mask_mode": "topk", "mask_ratios": {128: (0.0, 0.5)}},
        {"mask_mode": "topk", "mask_ratios": RATIOS, "block_n": 48},
    ],
)
def test_what_cannot_be_allocated_is_refused(arguments):
    with pytest.raises(ConfigError):
        allocate_levels(torch.rand(1, 1, 4, 40), **{"block_n": 64, **arguments})


def test_wrong_importance_is_refused():
    for bad in (torch.rand(4, 40), torch.ones(1, 1, 4, 40, dtype=torch.int32)):
        with pytest.raises(ShapeError):
            allocate_levels(bad, mask_mode="topk", mask_ratios=RATIOS, block_n=64)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from(["topk", "thresholdbound", "proportional"])
)
def test_any_values_give_levels_or_a_clear_error(values, mode):
    importance = torch.tensor(values).expand(1, 1, 3, -1)
    extra = {"density": 0.3} if mode == "proportional" else {"mask_ratios": RATIOS}
    try:
        levels = allocate_levels(importance, mask_mode=mode, block_n=64, **extra)
    except PSAError:
        return
    assert ((levels == 0) | (levels & (levels - 1) == 0)).all() and (levels <= 64).all()


def test_pins_without_importance_are_counted_in_the_plan():
    q = torch.randn(1, 1, 256, 16, generator=torch.Generator().manual_seed(0))
    plan = psa.plan(q, q, density=0.05, is_causal=True)
    assert plan.density > 0.05 and "pinned blocks alone" in plan.notes[-1]
    assert BlockMask().visible is None

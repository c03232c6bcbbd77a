"""Probes, the automatic mode, the slope correction, sorted keys, and what is carried over steps."""

import dataclasses

import pytest
import torch

import psa
import psa.auto
from psa import planning
from psa.allocate import BlockMask, allocate_levels, block_mask
from psa.auto import error_and_spread, ladder, unlike
from psa.candidates import CANDIDATES, PROPORTIONAL, Choice
from psa.config import PUBLISHED_RATIOS
from psa.curves import between, shared_densities, smallest_density
from psa.errors import ConfigError, PSAError
from psa.importance import importance
from psa.probe import Rows, Scored, row_errors, sample_rows
from psa.published import stretched_levels
from psa.reorder.keys import key_order
from psa.slope import slope_correction


def tensors(batch=1, heads=2, kv_heads=2, length_q=512, length_k=512, dim=32, seed=0):
    """Smooth q, k, v: neighbours resemble each other, so that pooling has something to gain."""
    g = torch.Generator().manual_seed(seed)

    def make(h, n):
        steps = torch.randn(batch, h, n, dim, generator=g)
        return (0.95 * steps.cumsum(2) / torch.arange(1, n + 1).sqrt()[:, None] + 0.3 * steps)  # fmt: skip

    return make(heads, length_q), make(kv_heads, length_k), make(kv_heads, length_k)


def relative(out, true):
    return (out - true).flatten(2).norm(dim=-1) / true.flatten(2).norm(dim=-1)


def dense(q, k, v, **call):
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **call)


def test_rows_are_stratified_deterministic_and_differ_by_salt():
    rows = sample_rows(1000, 128, 3, 64, 3, 0, torch.device("cpu"))
    assert rows.blocks.shape == (3, 8) and rows.rows.shape == (3, 8, 8)
    assert torch.equal(rows.rows // 128, rows.blocks[..., None].expand_as(rows.rows)) and int(rows.rows.max()) < 1000
    again, other = (sample_rows(1000, 128, 3, 64, 3, salt, torch.device("cpu")) for salt in (0, 1))
    assert torch.equal(again.rows, rows.rows) and not torch.equal(other.rows, rows.rows)
    assert torch.equal(rows.rows[0], rows.rows[1])  # a process with some of the heads probes what one with all does
    many = sample_rows(128 * 500, 128, 2, 64, 3, 0, torch.device("cpu")).blocks
    assert many.shape == (2, 22) and bool((many.diff() > 0).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(512, 512), (200, 333)])
@pytest.mark.parametrize("masked", [False, True])
def test_errors_of_all_rows_are_those_of_attention(causal, lengths, masked):
    """Sampling every row gives the very error of `attend`, with drops, caps, slope, GQA and masks."""
    q, k, v = tensors(2, 4, 2, *lengths)
    mask = None
    if masked:
        mask = torch.rand(2, lengths[1], generator=torch.Generator().manual_seed(1)) > 0.2
        mask[:, 0] = True
    levels = torch.tensor([0, 1, 2, 4, 8, 16, 32], dtype=torch.uint8)
    shape = (2, 4, -(-lengths[0] // 64), -(-lengths[1] // 32))
    draw = torch.Generator().manual_seed(2)
    levels = levels[torch.randint(0, 7, shape, generator=draw)]
    levels[..., 0] = 1
    if causal:
        pairs = block_mask(*lengths, 64, 32, is_causal=True)
        levels = levels.masked_fill(pairs.pinned, 1).masked_fill(~pairs.visible, 0)
        assert bool((levels > 1).any())
    share = torch.rand(shape, generator=draw).half().masked_fill(levels <= 1, 0.0)
    cap, power = 0.2 + torch.rand(2, 4, generator=draw), q.square().mean(2)
    corrected = psa.Plan(
        levels, 64, 32, *lengths, causal, query_power=power, bias_cap=cap,
        slope=share, key_mask=mask,
    )  # fmt: skip
    plain = dataclasses.replace(corrected, slope=None)
    call = {"is_causal": causal, "enable_gqa": True, "backend": "reference"}
    outs = [psa.attend(q, k, v, plan, **call) for plan in (corrected, plain)]
    ones = psa.Plan.from_levels(torch.ones(shape, dtype=torch.uint8), block_m=64, block_n=32)
    true = psa.attend(q, k, v, dataclasses.replace(ones, key_mask=mask), **call)
    for m in range(shape[2]):
        last = min((m + 1) * 64, lengths[0])
        index = torch.arange(m * 64, last).expand(4, 1, -1)
        column = lambda x, m=m: x[:, :, m : m + 1, None]  # noqa: E731
        scored = Scored(column(levels), column(share), torch.stack([cap + 1, cap], dim=-1))
        rows = Rows(torch.full((4, 1), m), index)
        call = {"block_n": 32, "scale": 32**-0.5, "is_causal": causal, "key_mask": mask, "power": power}
        squared, norms, unit = row_errors(q, k, v, rows, scored, **call)
        part = slice(m * 64, last)
        norm = true[:, :, part].square().sum((2, 3))
        torch.testing.assert_close(norms[:, :, 0] * unit.square(), norm, rtol=1e-3, atol=1e-6)
        for place, out in enumerate(outs):
            want = (out - true)[:, :, part].square().sum((2, 3))
            found = squared[:, :, 0, 0, 1, place] / norms[:, :, 0]
            torch.testing.assert_close(found, want / norm, rtol=2e-3, atol=1e-5)


def test_automatic_plans_keep_the_budget_report_their_error_and_repeat():
    q, k, v = tensors(2, 4, 2, 1024, 1024)
    call = {"density": 0.15, "enable_gqa": True, "return_plan": True}
    out, plan = psa.psa_attention(q, k, v, **call)
    again, _ = psa.psa_attention(q, k, v, **call)
    assert torch.equal(out, again)
    assert float(plan.density_per_head.max()) <= 0.15 * 1.02
    assert plan.error is not None and plan.error.shape == (2, 4)
    true = relative(out, dense(q, k, v, enable_gqa=True))
    assert float((plan.error / true).log().abs().median()) < 0.4
    assert [row["head"] for row in plan.report] == [0, 1, 2, 3] * 2
    assert {row["setting"] for row in plan.report} <= {candidate.name for candidate in CANDIDATES}
    alone, _ = psa.psa_attention(q[1:], k[1:], v[1:], **call)
    assert torch.equal(alone, out[1:])


def test_the_default_is_automatic_and_without_v_a_fixed_setting():
    q, k, v = tensors()
    assert psa.PSAConfig().mask_mode == "auto" and psa.PSAConfig().density == 0.15
    _, plan = psa.psa_attention(q, k, v, return_plan=True)
    assert plan.config.mask_mode == "auto" and bool(plan.error.isfinite().all())
    blind = psa.plan(q, k)
    assert bool(blind.error.isnan().all()) and blind.report[0]["setting"] == CANDIDATES[0].name
    assert bool(psa.attend(q, k, v, blind).isfinite().all())
    assert len(blind.notes) == 1 and "2 of 2 heads" in blind.notes[0] and "without v" in blind.notes[0]
    assert plan.notes == [], "where everything was measured there is nothing to say"


def test_a_target_that_nothing_can_be_measured_against_means_dense():
    q, k, v = tensors()
    plan = psa.plan(q, k, psa.PSAConfig(target_error=0.1, max_density=0.5))
    assert plan.density == 1.0 and len(plan.notes) == 1 and "dense attention" in plan.notes[0]
    assert float(relative(psa.attend(q, k, v, plan), dense(q, k, v)).max()) < 1e-5


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["topk", "thresholdbound"])
def test_the_published_modes_stretch_to_a_density(mode, causal, density):
    """At the density of the published intervals topk is the published topk; at others the budget holds."""
    importance = torch.rand(1, 2, 40, 200, generator=torch.Generator().manual_seed(0)) ** 4
    mask = block_mask(40 * 128, 200 * 64, 128, 64, is_causal=causal)
    levels = stretched_levels(importance, mode, density, 64, None, mask)
    cost = torch.where(levels > 0, 1 / levels.float().clamp(min=1), 0.0)
    visible = torch.ones(40, 200) if mask.visible is None else mask.visible[0, 0]
    pinned = 0.0 if mask.pinned is None else float(mask.pinned.sum() / visible.sum())
    kept = cost.sum((-1, -2)) / visible.sum()
    assert float(kept.max()) <= max(density, pinned) + 1e-6 and float(kept.min()) > 0.97 * density
    order = importance.masked_fill(mask.pinned, 2.0) if mask.pinned is not None else importance
    if not causal:
        assert bool((cost.gather(-1, order.argsort(-1, descending=True)).diff(dim=-1) <= 0).all())


def test_topk_stretched_to_its_own_density_is_the_published_topk():
    importance = torch.rand(1, 2, 40, 200, generator=torch.Generator().manual_seed(0))
    want = allocate_levels(importance, mask_mode="topk", mask_ratios=PUBLISHED_RATIOS, block_n=64)
    density = float(torch.where(want > 0, 1 / want.float().clamp(min=1), 0.0).mean()) + 1e-4
    assert torch.equal(stretched_levels(importance, "topk", density, 64, None, BlockMask()), want)


def test_published_modes_are_tried_on_request_and_every_candidate_keeps_the_budget():
    q, k, v = tensors(1, 2, 2, 2048, 2048)
    plans = [psa.plan(q, k, psa.PSAConfig(density=0.2, published=flag), v=v) for flag in (False, True)]
    assert float(plans[1].error.mean()) <= 1.2 * float(plans[0].error.mean())
    for number, candidate in enumerate(CANDIDATES):
        given = torch.tensor([[[number, 0.2, 0.1, 0.01]] * 2])
        chosen = planning.select(q, k, v, None, None, given, plans[1].config.key, 32**-0.5, False, 0, "last")
        density = torch.where(chosen[0] > 0, 1 / chosen[0].float().clamp(min=1), 0.0).mean((-1, -2))
        assert float(density.min()) > 0.15 and float(density.max()) <= 0.2 * 1.02, candidate.name
        assert bool((chosen[4] > 0).any()) == candidate.slope


def test_fine_candidates_take_their_levels_from_finer_importance():
    q, k, v = tensors(1, 2, 1, 1024, 1024)
    config = psa.PSAConfig(density=0.2)
    finer = importance(q, k, config.replace(importance_rows=8, importance_cols=4), scale=32**-0.5)
    coarse = importance(q, k, config, scale=32**-0.5)
    for number, candidate in enumerate(PROPORTIONAL):
        given = torch.tensor([[[0, 0.2, 0.1, 0.01], [number, 0.2, 0.1, 0.01]]])
        levels = planning.select(q, k, v, None, None, given, config.key, 32**-0.5, False, 0, "last")[0]
        settings = {"exponent": candidate.exponent, "keep_all": candidate.keep_all}
        source = finer if candidate.fine else coarse
        want = allocate_levels(source, mask_mode="proportional", density=0.2, block_n=64, **settings)
        assert torch.equal(levels[:, 1], want[:, 1]), candidate.name
        assert torch.equal(
            levels[:, 0], allocate_levels(coarse, mask_mode="proportional", density=0.2, block_n=64)[:, 0]
        )


def test_finer_importance_has_to_pay_and_barred_parts_are_never_chosen():
    q, k, v = tensors(1, 2, 2, 2048, 2048)
    plan = psa.plan(q, k, psa.PSAConfig(density=0.2, slope=False), v=v)
    assert plan.slope is None and not any("slope" in row["setting"] for row in plan.report)
    given = torch.rand(1, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    plan = psa.plan(q, k, psa.PSAConfig(density=0.2), v=v, importance=given)
    assert not any("fine" in row["setting"] for row in plan.report), "there is nothing finer than what was given"


def test_the_errors_spread_is_that_of_repeated_samples():
    g = torch.Generator().manual_seed(0)
    norms = 1 + torch.rand(1, 4000, 24, generator=g)
    squared = norms * 0.01 * torch.rand(1, 4000, 24, generator=g)
    error, spread = error_and_spread(squared, norms)
    assert float(error.mean()) == pytest.approx(0.005**0.5, rel=0.01)
    assert float(spread.mean()) == pytest.approx(float(error.std()), rel=0.05)
    assert bool(error_and_spread(squared[..., :1], norms[..., :1])[1].isnan().all()), "one block tells no spread"


@pytest.mark.parametrize("settings", [
    {"target_error": 0.1, "density": 0.2}, {"target_error": 0.0}, {"target_error": 0.1, "share_heads": True},
    {"target_error": 0.1, "mask_mode": "topk"}, {"mask_mode": "auto", "bias": "variance"}, {"probe_rows": 0},
    {"mask_mode": "auto", "exponent": 2.0}, {"max_density": 0.0}, {"probe_every": 1.5}, {"probe_drift": -1.0},
])  # fmt: skip
def test_settings_that_contradict_the_automatic_mode_are_refused(settings):
    with pytest.raises(ConfigError):
        psa.PSAConfig(**settings)


def test_modes_follow_from_what_is_given():
    mode = lambda **settings: psa.PSAConfig(**settings).mask_mode  # noqa: E731
    assert mode(density=0.2) == mode(target_error=0.1) == mode(share_heads=True) == "auto"
    assert mode(tau=0.1) == mode(density=0.2, bias="variance") == "proportional"
    assert psa.PSAConfig(tau=0.1).replace(target_error=0.1).mask_mode == "auto"
    assert psa.PSAConfig(target_error=0.1).replace(density=0.3).target_error is None


# -- target and shared budgets -----------------------------------------------------------------------------------------


def test_smallest_density_reads_a_curve():
    density = torch.tensor([0.1, 0.2, 0.4])
    curve = torch.tensor([[[0.4, 0.2, 0.1], [0.05, 0.04, 0.03], [0.5, 0.4, 0.3], [0.1, 0.3, 0.05]]])
    found = smallest_density(curve, density, torch.full((1, 4), 0.2))[0]
    assert found[:3].tolist() == pytest.approx([0.2, 0.1, 1.0])
    assert 0.2 < float(found[3]) < 0.4, "a curve that dips and rises again counts from its last bad density"


def test_a_curve_that_falls_off_a_cliff_is_not_believed_between_its_points():
    density = torch.tensor([0.1, 0.2, 0.4])
    cliff, smooth = [0.5, 1e-9, 1e-9], [0.5, 0.25, 0.125]
    curve = torch.tensor([[cliff, smooth]])
    found = smallest_density(curve, density, torch.full((1, 2), 0.02))[0]
    assert found.tolist() == pytest.approx([0.2, 1.0])
    at = torch.tensor([0.05, 0.1, 0.14142, 0.199, 0.2, 0.9]).expand(1, 2, -1)
    read = between(density, curve, at)[0]
    assert read[1].tolist() == pytest.approx([0.5, 0.5, 0.35355, 0.2513, 0.25, 0.125], rel=1e-3)
    assert read[0, :4].tolist() == pytest.approx([0.5] * 4), "flat before a cliff"
    assert read[0, 4:].tolist() == pytest.approx([1e-9, 1e-9])
    assert float(between(density, curve.flip(-1), torch.full((1, 2, 1), 0.3))[0, 1]) > 0.25, "rising curves rise"


def test_shared_densities_spend_the_budget_where_it_helps():
    density = torch.tensor([0.05, 0.1, 0.2, 0.4])
    hard, easy = 1.0 / density, 0.01 / density
    found = shared_densities(torch.stack([hard, easy])[None], density, 0.2)
    assert float(found.mean()) == pytest.approx(0.2, rel=0.02) and float(found[0, 0]) > 2 * float(found[0, 1])


def test_a_shared_budget_makes_a_head_exact_or_stops_where_errors_were_measured():
    density = torch.tensor([0.05, 0.1, 0.2, 0.4])
    stubborn, easy = torch.ones(4), 1e-6 / density
    found = shared_densities(torch.stack([stubborn, easy])[None], density, 0.6)[0]
    assert float(found[0]) == 1.0 and float(found.mean()) == pytest.approx(0.6, rel=0.02)


def test_a_target_leaves_room_for_the_spread_of_the_measurement(monkeypatch):
    q, k, v = tensors(1, 3, 3, 2048, 2048)
    config = psa.PSAConfig(target_error=0.05)
    careful = psa.plan(q, k, config, v=v)
    monkeypatch.setattr(psa.auto, "MARGIN", 0.0)
    assert careful.density > psa.plan(q, k, config, v=v).density
    assert all(row["error"] + row["error_spread"] <= 0.05 * 1.01 for row in careful.report)


def test_target_error_is_met_or_the_head_runs_dense():
    q, k, v = tensors(1, 3, 3, 2048, 2048)
    out, plan = psa.psa_attention(q, k, v, target_error=0.05, return_plan=True)
    true = relative(out, dense(q, k, v))
    assert float(true.max()) <= 0.05 * 1.3 and plan.density < 1.0
    tight = psa.PSAConfig(target_error=1e-5, max_density=0.2)
    out, plan = psa.psa_attention(q, k, v, config=tight, return_plan=True)
    assert plan.density == 1.0 and "cannot meet" in plan.notes[0] and plan.report[0]["setting"] == "dense"
    torch.testing.assert_close(out.double(), dense(q, k, v), atol=1e-5, rtol=0)


def test_a_single_query_block_has_a_target_too():
    q, k, v = tensors(1, 2, 2, 64, 4096)
    plan = psa.plan(q, k, psa.PSAConfig(target_error=0.2), v=v)
    assert plan.density < 0.7 and not plan.notes
    out, true = psa.attend(q, k, v, plan), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = (out - true).flatten(2).norm(dim=-1) / true.flatten(2).norm(dim=-1)
    assert float(error.max()) <= 1.2 * 0.2


def test_pins_above_max_density_are_told():
    q, k, v = tensors(1, 2, 2, 512, 512)
    plan = psa.plan(q, k, psa.PSAConfig(target_error=2.0, max_density=0.3), v=v, is_causal=True)
    assert plan.density > 0.3 and any("above max_density 0.3" in note for note in plan.notes)


@pytest.mark.parametrize(("block_n", "least"), [(16, 1 / 16), (64, 1 / 64), (128, 1 / 128)])
def test_the_ladder_begins_at_the_coarsest_plan(block_n, least):
    densities = ladder(psa.PSAConfig(target_error=0.1, block_n=block_n))
    assert densities[0] == least and list(densities) == sorted(set(densities))
    assert ladder(psa.PSAConfig(target_error=0.1, block_n=block_n, max_density=least)) == (least,)


@pytest.mark.parametrize("max_density", [1 / 64, 1 / 32])
def test_a_bound_below_every_probed_density_runs_dense_too(max_density):
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    config = psa.PSAConfig(target_error=1e-4, max_density=max_density)
    plan = psa.plan(q, k, config, v=v)
    assert plan.density == 1.0 and "cannot meet" in plan.notes[0]
    easy = psa.PSAConfig(target_error=10.0, max_density=max_density)
    assert psa.plan(q, k, easy, v=v).density <= max_density * 1.02, "what any error allows is the coarsest plan"


def test_a_shared_budget_counts_heads_in_one_unit():
    """The layer's error is a sum over heads: values ten times as large are worth more of the density."""
    q, k, v = tensors(1, 2, 2, 2048, 2048)
    q, k, v = (x[:, :1].repeat(1, 2, 1, 1) for x in (q, k, v))
    v = v * torch.tensor([10.0, 1.0])[:, None, None]
    plan = psa.plan(q, k, psa.PSAConfig(density=0.15, share_heads=True), v=v)
    large, small = plan.density_per_head.flatten().tolist()
    assert large > 1.5 * small and plan.density <= 0.15 * 1.02


@pytest.mark.parametrize("call", [{"is_causal": True}, {"text_length": 200}], ids=["causal", "text"])
def test_a_shared_budget_counts_what_is_pinned(call):
    """A head that is given next to nothing still keeps its pins."""
    q, k, v = tensors(1, 2, 2, 4096, 4096)
    q, k, v = (x[:, :1].repeat(1, 2, 1, 1) for x in (q, k, v))
    v = v * torch.tensor([30.0, 1.0])[:, None, None]
    plan = psa.plan(q, k, psa.PSAConfig(density=0.15, share_heads=True), v=v, **call)
    large, small = plan.density_per_head.flatten().tolist()
    assert plan.density <= 0.15 * 1.02 and not plan.notes
    assert large > small > plan.pinned_density > 0.05


def test_a_shared_budget_may_be_small():
    q, k, v = tensors(1, 3, 3, 2048, 2048)
    plan = psa.plan(q, k, psa.PSAConfig(density=0.02, share_heads=True), v=v)
    assert plan.density <= 0.02 * 1.02


def test_what_is_ruled_out_is_not_chosen_even_without_any_error():
    q, k, v = tensors(1, 2, 2, 512, 512)
    without = psa.PSAConfig(density=0.15, slope=False)
    for values in (None, torch.ones_like(v)):
        assert all("slope" not in row["setting"] for row in psa.plan(q, k, without, v=values).report)


def test_importance_that_pooling_changes_much_is_not_trusted(monkeypatch):
    """Whatever the probed rows say of it, short of a large difference."""
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])[None, :, None]
    assert unlike(rows, rows.roll(1, -1)).tolist() == [[True, False]]
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    config = psa.PSAConfig(density=0.15)
    assert not all("fine" in row["setting"] for row in psa.plan(q, k, config, v=v).report)
    monkeypatch.setattr(psa.auto, "UNLIKE", -1.0)
    monkeypatch.setattr(psa.auto, "DISTRUST", 100.0)
    assert all("fine" in row["setting"] for row in psa.plan(q, k, config, v=v).report)
    pooled = config.replace(importance="sampled")  # nothing is finer
    assert not any("fine" in row["setting"] for row in psa.plan(q, k, pooled, v=v).report)


def test_a_note_tells_of_a_single_head_above_its_density():
    """The mean over heads may hide it."""
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    plan = psa.plan(q, k, psa.PSAConfig(density=0.25), v=v)
    assert plan.notes == []
    levels = torch.full_like(plan.levels, 8)
    levels[:, 0, :, ::4] = 1
    uneven = dataclasses.replace(plan, levels=levels)
    assert uneven.density < 0.25 and "no less than density 0.34" in uneven.notes[0]


def test_a_replay_refuses_other_settings_and_other_candidates():
    q, k, v = tensors(1, 2, 2, 512, 512)
    state, config = psa.ProbeState(), psa.PSAConfig(density=0.2)
    psa.plan(q, k, config, v=v, probes=state, layer="a", step=0)
    saved = state.to_dict()
    replay = psa.ProbeState.from_dict(saved, replay=True)
    psa.plan(q, k, config, v=v, probes=replay, layer="a", step=0)
    with pytest.raises(psa.PSAError, match="other settings"):
        psa.plan(q, k, config.replace(target_error=0.1), v=v, probes=replay, layer="a", step=0)
    resumed = psa.ProbeState.from_dict(saved)
    psa.plan(q, k, config.replace(target_error=0.1), v=v, probes=resumed, layer="a", step=1)
    assert ("a", 1) in resumed.probed, "what was chosen under other settings is not gone on with"
    with pytest.raises(psa.PSAError, match="other candidates"):
        psa.ProbeState.from_dict(saved | {"candidates": saved["candidates"][::-1]})


# -- slope and sorted keys ---------------------------------------------------------------------------------------------


def test_slope_is_the_first_order_term():
    """With everything pooled and even weights the error falls with the square of the logits, not linearly."""
    q, k, v = tensors(1, 2, 1, 256, 256, dim=16)
    levels = torch.full((1, 2, 2, 4), 64, dtype=torch.uint8)
    errors = []
    for size in (0.1, 0.01):
        plan = psa.Plan(levels, 128, 64, slope=torch.ones(1, 2, 2, 4).half())
        true = dense(size * q, k, v, enable_gqa=True)
        without = psa.attend(size * q, k, v, dataclasses.replace(plan, slope=None), enable_gqa=True) - true
        errors.append((without + slope_correction(size * q, k, v, levels, plan.slope, 128, 64, 0.25), without))
    ratio = [float(a.norm() / b.norm()) for a, b in errors]
    assert ratio[1] < 0.02 and ratio[1] < ratio[0] * 0.3


@pytest.mark.parametrize("masked", [False, True])
def test_slope_gradients_and_masks(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 4, generator=g).double().requires_grad_() for h, n in ((2, 40), (1, 70), (1, 70)))
    levels = torch.tensor([1, 2, 4, 8, 16], dtype=torch.uint8).expand(1, 2, 3, 5)
    share = torch.rand(1, 2, 3, 5, generator=g).half()
    mask = torch.rand(1, 70, generator=g) > 0.3 if masked else None
    call = lambda q, k, v: slope_correction(q, k, v, levels, share, 16, 16, 0.5, mask)  # noqa: E731
    torch.autograd.gradcheck(lambda q, v: call(q, k.detach(), v), (q, v))
    out = call(q, k, v)
    if masked:
        poisoned = [torch.where(mask[:, None, :, None], t, 7.0) for t in (k, v)]
        torch.testing.assert_close(call(q, *poisoned), out)
    (gradient,) = torch.autograd.grad(out.sum(), k)
    assert bool(gradient.isfinite().all())


def test_sorting_keys_permutes_within_blocks_and_makes_groups_tight():
    q, k, _ = tensors(2, 4, 2, 300, 300)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[:, 70] = False
    order = key_order(q, k, mask, 64)
    assert torch.equal(order.sort(-1).values, torch.arange(300).expand(2, 2, -1))
    assert torch.equal(order[..., :256] // 64, (torch.arange(256) // 64).expand(2, 2, -1))
    assert torch.equal(order[..., 64:128], torch.arange(64, 128).expand(2, 2, -1)), "holds a masked token"
    assert torch.equal(order[..., 256:], torch.arange(256, 300).expand(2, 2, -1)), "the tail"
    noise = torch.randn(1, 2, 256, 32, generator=torch.Generator().manual_seed(7))
    rank = key_order(noise, noise, None, 64)[..., None].expand_as(noise)
    spread = lambda x: x.unflatten(2, (-1, 4)).var(3).sum()  # noqa: E731
    assert float(spread(noise.gather(2, rank))) < 0.9 * float(spread(noise))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_flow_through_an_automatic_plan(backend):
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 2, 256, 256))
    out = psa.psa_attention(q, k, v, density=0.8, backend=backend)
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(dense(q, k, v).square().sum(), (q, k, v)),
        strict=True,
    ):
        assert float((got - want).norm() / want.norm()) < 0.3


# -- over steps --------------------------------------------------------------------------------------------------------


def test_choices_are_reused_reprobed_and_replayed(tmp_path):
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    attention = psa.PSAAttention(density=0.2, probe_every=3)
    outs = {step: attention(q * (1 + 0.01 * step), k, v, step=step, layer="a") for step in range(5)}
    state = attention.probe_state
    assert state.probed == [("a", 0), ("a", 3)] and len(state.history) == 5
    assert [row["probed"] for row in state.stats()] == [True, False, False, True, False]
    attention(q, k, v, step=0, layer="b")
    assert state.probed[-1] == ("b", 0), "layers are apart"
    attention(q, k, v, step=0, layer="a")
    assert state.probed[-1] == ("a", 0), "a new run begins again"
    state.save(tmp_path / "choices.json")
    attention.probe_state = psa.ProbeState.load(tmp_path / "choices.json", replay=True)
    for step in range(1, 5):
        assert torch.equal(attention(q * (1 + 0.01 * step), k, v, step=step, layer="a"), outs[step])
    with pytest.raises(PSAError, match="replay"):
        attention(q, k, v, step=9, layer="a")


def test_a_choice_is_not_reused_in_another_run_or_for_other_lengths_or_unmeasured(tmp_path):
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    config, state = psa.PSAConfig(density=0.2), psa.ProbeState()

    def plan(step, length=1024, v=v):
        return psa.plan(q[:, :, :length], k, config, v=v, probes=state, layer="a", step=step)

    for step in range(4):
        plan(step)
    assert state.probed == [("a", 0)]
    state.save(tmp_path / "choices.json")
    plan(0)
    assert state.probed == [("a", 0)] and state.history["a", 0] is not state.history["a", 1], "a run shorter than ten"
    state = psa.ProbeState.load(tmp_path / "choices.json")
    plan(2)
    assert state.probed == [("a", 0), ("a", 2)], "the file tells the latest step too"
    plan(3, 512)
    assert state.probed[-1] == ("a", 3)
    state.clear()
    assert plan(0, v=None).error is not None and not state.history, "nothing was measured, nothing is recorded"
    assert bool(plan(1).error.isfinite().all()) and state.probed == [("a", 1)]


def test_drift_ends_a_choice_early_and_calls_without_a_step_always_probe():
    q, k, v = tensors(1, 2, 2, 1024, 1024)
    attention = psa.PSAAttention(density=0.2, probe_every=100)
    for step, factor in enumerate((1.0, 1.0, 6.0, 6.0, 6.0)):
        attention(factor * q, k, v, step=step)
    assert attention.probe_state.probed == [("0", 0), ("0", 3)], "noticed at step 2, acted on at the next"
    _, plan = attention(q, k, v, return_plan=True)
    assert len(attention.probe_state.history) == 5 and bool(plan.error.isfinite().all())


@pytest.mark.parametrize("damage", [{"choices": [{}]}, {"probed": [3]}, {"settings": []}, {"candidates": None}])
def test_a_broken_state_is_an_error(damage, tmp_path):
    q, k, v = tensors(1, 2, 2, 512, 512)
    state = psa.ProbeState()
    psa.plan(q, k, psa.PSAConfig(density=0.2), v=v, probes=state, layer="a", step=0)
    with pytest.raises(PSAError):
        psa.ProbeState.from_dict(state.to_dict() | damage)
    with pytest.raises(PSAError, match="not a saved probe state"):
        psa.ProbeState.from_dict({})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(PSAError, match=r"x\.json"):
        psa.ProbeState.load(tmp_path / "x.json")


def test_plans_with_a_choice_survive_saving(tmp_path):
    q, k, v = tensors()
    plan = psa.plan(q, k, v=v, density=0.3)
    plan.save(tmp_path / "plan.safetensors")
    loaded = psa.Plan.load(tmp_path / "plan.safetensors")
    assert torch.equal(psa.attend(q, k, v, loaded), psa.attend(q, k, v, plan)) and loaded.report == plan.report


def test_choices_pack_and_unpack():
    choice = Choice(*(torch.tensor([[value]]) for value in (3, 0.15, 0.01, 0.001)))
    again = Choice.unpack(choice.pack())
    assert again.candidate.item() == 3 and torch.equal(again.density, choice.density)

"""The order that every head has chosen for it: place on the grid or content, by probes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import psa
from psa.errors import ConfigError, PSAError
from psa.measure import relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import arenas

GRID, TEXT = (4, 16, 16), 10
AUTO = psa.PSAConfig(density=0.2, rearrange_method="auto", block_m=64, block_n=32)


def heads(groups=1, seed=0):
    """Two KV heads of 64 channels: a smooth field over the grid, and keys and values of forty kinds that lie anywhere;
    a few text tokens behind. q has ``groups`` heads for each."""
    generator = torch.Generator().manual_seed(seed)
    field = arenas.synthetic(2.0, 0.3, seed, GRID)
    length = field.k.shape[2]
    kinds = torch.randint(40, (length,), generator=generator)
    tables = torch.randn(3, 40, 64, generator=generator)
    scattered = [table[kinds] + 0.1 * torch.randn(length, 64, generator=generator) for table in tables]
    text = torch.randn(3, 1, 2, TEXT, 64, generator=generator)
    q, k, v = (
        torch.cat([torch.cat([place, content[None, None]], dim=1), words], dim=2)
        for place, content, words in zip((field.q, field.k, field.v), scattered, text, strict=True)
    )
    noise = 0.01 * torch.randn(1, 2 * groups, *q.shape[2:], generator=generator)
    return q.repeat_interleave(groups, dim=1) + noise, k, v


CALL = {"grid": GRID, "text_length": TEXT}


@pytest.mark.parametrize("groups", [1, 3])
def test_every_head_gets_the_order_that_serves_it_better(groups):
    q, k, v = heads(groups)
    call = {**CALL, "enable_gqa": groups > 1, "return_plan": True}
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)
    outs, errors = {}, {}
    for order in ("Gilbert", "hybrid", "auto"):
        outs[order], plan = psa.psa_attention(q, k, v, config=AUTO.replace(rearrange_method=order), **call)
        errors[order] = relative_error(outs[order], dense)[0]
    place, content = slice(0, groups), slice(groups, None)
    assert (errors["Gilbert"][place] < errors["hybrid"][place]).all()
    assert (errors["hybrid"][content] < errors["Gilbert"][content]).all()
    assert [row["order"] for row in plan.report] == ["place"] * groups + ["content"] * groups
    assert torch.equal(outs["auto"][:, place], outs["Gilbert"][:, place])
    assert torch.equal(outs["auto"][:, content], outs["hybrid"][:, content])


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("masked", [0, 90])
@pytest.mark.parametrize("grid", [GRID, None])
def test_all_of_everything_is_dense_attention(position, masked, grid):
    q, k, v = (t.double().requires_grad_() for t in heads(2))
    mask = torch.ones(1, k.shape[2], dtype=torch.bool)
    mask[:, torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:masked] + 12] = False
    text = {"text_length": TEXT, "text_position": position} if grid else {}
    out, plan = psa.psa_attention(
        q, k, v, config=AUTO.replace(density=1.0), key_mask=mask, grid=grid, enable_gqa=True, return_plan=True, **text
    )
    assert plan.permutation.k_order.shape[:2] == (1, 2) and len({row["order"] for row in plan.report}) <= 2
    dense = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
    got, want = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, dense))
    for a, b in zip((out, *got), (dense, *want), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_heads_of_both_orders_agree_where_masked_keys_are():
    q, k, v = heads()
    mask = torch.rand(1, k.shape[2], generator=torch.Generator().manual_seed(2)) < 0.8
    out, plan = psa.psa_attention(q, k, v, config=AUTO, key_mask=mask, **CALL, return_plan=True)
    assert {row["order"] for row in plan.report} == {"place", "content"}
    moved = mask[:, None].expand(-1, 2, -1).gather(2, plan.permutation.k_order)
    assert torch.equal(moved[:, 0], moved[:, 1])
    other = (t.masked_fill(~mask[:, None, :, None], 7.0) for t in (k, v))
    assert torch.equal(out, psa.psa_attention(q, *other, plan=plan)), "masked keys and values play no part"


def test_unequal_lengths_need_no_grid():
    q, k, v = heads()
    plan = psa.plan(q[:, :, :700], k, AUTO, v=v)
    dense = F.scaled_dot_product_attention(q[:, :, :700], k, v)
    error = relative_error(psa.attend(q[:, :, :700], k, v, plan), dense)
    assert plan.permutation.q_order.shape[-1] == 700 and (error < 0.5).all()
    assert plan.report[1]["order"] == "content"


@pytest.mark.parametrize("settings", [{}, {"target_error": 0.1}, {"share_heads": True}])
def test_a_choice_is_reused_saved_and_replayed(settings, tmp_path):
    q, k, v = heads()
    config, state = AUTO.replace(**settings), psa.ProbeState()
    first = psa.plan(q, k, config, v=v, probes=state, layer="a", step=0, **CALL)
    again = psa.plan(q, k, config, v=v, probes=state, layer="a", step=1, **CALL, state=first.reorder_state)
    assert state.probed == [("a", 0)] and torch.equal(first.choice[..., [0, 1, 5]], again.choice[..., [0, 1, 5]])
    assert first.choice[0, :, 5].tolist() == [0.0, 1.0]
    assert [row["by_content"] for row in state.stats()] == [1, 1]
    state.save(tmp_path / "choices.json")
    replay = psa.ProbeState.load(tmp_path / "choices.json", replay=True)
    repeated = psa.plan(q, k, config, v=v, probes=replay, layer="a", step=0, **CALL)
    assert torch.equal(repeated.levels, first.levels)
    first.save(tmp_path / "plan.safetensors")
    assert psa.Plan.load(tmp_path / "plan.safetensors").report == first.report
    if settings.get("share_heads"):
        assert abs(first.density - 0.2) < 0.01
    if settings.get("target_error"):
        error = relative_error(psa.attend(q, k, v, first), F.scaled_dot_product_attention(q, k, v))
        assert (error < 0.12).all() and first.density < 0.5


def test_a_choice_of_another_shape_is_no_saved_state():
    q, k, v = heads()
    state = psa.ProbeState()
    psa.plan(q, k, AUTO, v=v, probes=state, step=0, **CALL)
    saved = state.to_dict()
    broken = copy.deepcopy(saved)
    broken["choices"][0]["shape"] = [1, 3, 4]
    with pytest.raises(PSAError, match="shape"):
        psa.ProbeState.from_dict(broken)
    assert torch.equal(psa.ProbeState.from_dict(saved).history["0", 0], state.history["0", 0])


@pytest.mark.parametrize("method", ["auto", "hybrid", "semantic"])
def test_an_order_is_held_for_a_twelfth_of_a_run_and_replayed(method, tmp_path):
    settings = {"rearrange_method": method, "probe_drift": 9.0, "probe_every": 6}
    steps = {step: heads(seed=step) for step in (0, 1, 2, 6)}

    def run(module):
        plans = []
        for step, (q, k, v) in steps.items():
            out, plan = module(q, k, v, **CALL, step=step, return_plan=True)
            plans.append((plan.permutation, out, module.reorder_states["0"]))
        return plans

    module = psa.PSAAttention(AUTO, **settings)
    module.probe_state.steps = 24
    first, held, anew, probed = run(module)
    assert module.probe_state.probed == [("0", 0), ("0", 6)]
    assert torch.equal(held[0].q_order, first[0].q_order) and held[2] is first[2]
    blocks = lambda order: order.k_order[..., :1024].unflatten(-1, (-1, 32)).sort(-1).values  # noqa: E731
    assert torch.equal(blocks(held[0]), blocks(first[0])), "keys are sorted anew, within their blocks"
    assert not torch.equal(held[0].k_order, first[0].k_order)
    for before, later in ((held, anew), (anew, probed)):
        assert not torch.equal(later[0].q_order, before[0].q_order) and later[2] is not before[2]
    module.probe_state.save(tmp_path / "choices.json")
    replay = psa.PSAAttention(AUTO, **settings)
    replay.probe_state = psa.ProbeState.load(tmp_path / "choices.json", replay=True)
    for one, other in zip(run(replay), (first, held, anew, probed), strict=True):
        assert torch.equal(one[1], other[1])


def test_an_order_is_held_for_tokens_like_its_own_only():
    q, k, v = heads()
    mask = torch.arange(k.shape[2])[None] < 1000
    state = psa.ProbeState(steps=24)
    call = {"v": v, "probes": state, "layer": "a"}
    psa.plan(q, k, AUTO, **call, step=0, **CALL, key_mask=mask)
    held = state.held("a", 1)
    assert held is not None and held.q_order.dtype == torch.int32
    asked = psa.order.Tokens(False, GRID, TEXT, "last", mask)
    assert held.order_of(q, k, asked) is not None
    for other in (
        asked._replace(grid=(16, 16, 4)),
        asked._replace(text_length=0),
    ):
        assert held.order_of(q, k, other) is None
    assert held.order_of(q[:, :, 1:], k, asked) is None and held.order_of(q[:, :1], k[:, :1], asked) is None
    state.clear()
    assert state.held("a", 1) is None


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_held_order_follows_a_mask_that_changes(groups, position):
    (q, k, v), config = heads(groups), AUTO.replace(sort_keys=False)  # sorting moves text within a block
    draw = torch.Generator().manual_seed(3)
    mask = torch.rand(1, k.shape[2], generator=draw) < 0.9
    state = psa.ProbeState(steps=48)
    call = {"probes": state, "grid": GRID, "text_length": TEXT, "text_position": position, "enable_gqa": groups > 1}
    first = psa.plan(q, k, config, v=v, step=0, key_mask=mask, **call)
    same = psa.plan(q, k, config, v=v, step=1, key_mask=mask, **call)
    assert torch.equal(same.permutation.k_order, first.permutation.k_order)
    mask.copy_(torch.rand(1, k.shape[2], generator=draw) < 0.8)
    loud = v.masked_fill(~mask[:, None, :, None], 1e4)
    plan = psa.plan(q, k, config, v=loud, step=2, key_mask=mask, **call)
    assert torch.equal(plan.permutation.q_order, first.permutation.q_order) and state.ordered == {("0", 0)}
    text = slice(0, TEXT) if position == "first" else slice(-TEXT, None)
    unmoved = torch.arange(k.shape[2])[text].expand(1, 2, -1)
    assert torch.equal(plan.permutation.k_order[..., text], unmoved)
    out = psa.attend(q, k, loud, plan, enable_gqa=groups > 1)
    dense = F.scaled_dot_product_attention(q, k, loud, mask[:, None, None], enable_gqa=groups > 1)
    assert (relative_error(out, dense) < 0.5).all()


def test_a_replay_makes_orders_where_the_run_did(tmp_path):
    """Two calls of a layer in one step, and a run that was interrupted and went on from its file."""
    calls = [(step, heads(seed=3 * step + again)) for step in range(5) for again in range(2)]

    def outputs(state, calls):
        for step, (q, k, v) in calls:
            plan = psa.plan(q, k, AUTO.replace(probe_drift=9.0), v=v, probes=state, step=step, **CALL)
            yield psa.attend(q, k, v, plan)

    state = psa.ProbeState(steps=48)
    want = list(outputs(state, calls[:6]))
    state.save(tmp_path / "half.json")
    state = psa.ProbeState.load(tmp_path / "half.json")
    state.steps = 48
    want += outputs(state, calls[6:])
    assert state.ordered == {("0", 0), ("0", 3)}
    kept = psa.ProbeState()
    kept.add(state)
    kept.save(tmp_path / "all.json")
    replay = psa.ProbeState.load(tmp_path / "all.json", replay=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(replay, calls), want, strict=True))
    assert not copy.deepcopy(replay)._held, "copies do not carry orders"


def test_a_choice_file_without_a_list_of_orders_made_one_in_every_call():
    q, k, v = heads()
    state = psa.ProbeState(steps=48)
    for step in range(2):
        psa.plan(q, k, AUTO, v=v, probes=state, step=step, **CALL)
    saved = state.to_dict()
    assert saved.pop("ordered") == [["0", 0]]
    assert psa.ProbeState.from_dict(saved, replay=True).ordered == {("0", 0), ("0", 1)}


@pytest.mark.parametrize("steps", [0, -3, 2.5, "12", True])
def test_steps_of_a_run_are_a_whole_number(steps):
    with pytest.raises(ConfigError, match="steps"):
        psa.ProbeState(steps=steps)
    with pytest.raises(ConfigError, match="steps"):
        psa.ProbeState().steps = steps


@pytest.mark.parametrize("config", [AUTO, AUTO.replace(importance="sampled"), AUTO.replace(use_sim_mask=True)])
@pytest.mark.parametrize("length, at_once", [(1034, 1), (1034, 1 << 25), (1007, 1 << 25)])
def test_a_probe_chooses_what_a_plan_chooses(config, length, at_once, monkeypatch):
    q, k, v = heads(3)
    q = q[:, :, :length]
    plain = config.replace(rearrange_method="Gilbert", use_rearrange=False, sort_keys=False)
    want = psa.plan(q, k, plain, v=v, enable_gqa=True).choice[..., :4]
    monkeypatch.setattr("psa.planning.SELECT_AT_ONCE", at_once)
    arguments = (q, k, v, None, plain.key, 0.125, False, 0, "last")
    torch.testing.assert_close(torch.ops.psa.probe(*arguments), want)
    torch.library.opcheck(torch.ops.psa.probe, arguments)


def test_without_values_to_probe_the_place_decides():
    q, k, _ = heads()
    plan, fixed = (psa.plan(q, k, AUTO.replace(rearrange_method=order), **CALL) for order in ("auto", "Gilbert"))
    assert torch.equal(plan.levels, fixed.levels) and "order" not in plan.report[0]
    causal = psa.plan(q, k, AUTO, is_causal=True)
    assert causal.permutation is None


def test_it_belongs_to_the_automatic_mode():
    with pytest.raises(ConfigError, match="rearrange_method: 'auto'"):
        psa.PSAConfig(mask_mode="topk", rearrange_method="auto")
    assert AUTO.replace(tau=1.0).rearrange_method == "Gilbert"
    q, k, v = heads()
    with pytest.raises(ConfigError, match="importance"):
        psa.plan(q, k, AUTO, v=v, importance=torch.ones(1, 1, 17, 33), **CALL)
    with pytest.raises(ConfigError, match="must be one of"):
        psa.reorder.reorder("auto", q, k, GRID, text_length=TEXT)


def test_it_is_one_compiled_graph_and_a_vmap():
    q, k, v = heads()
    attention = lambda q, k, v: psa.psa_attention(q, k, v, config=AUTO, **CALL)  # noqa: E731
    out = attention(q, k, v)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), out, atol=1e-5, rtol=0)
    pairs = [torch.stack([t, t.flip(2)]) for t in (q, k, v)]
    together = torch.func.vmap(attention)(*pairs)
    assert torch.equal(together, torch.stack([attention(*x) for x in zip(*pairs, strict=True)]))

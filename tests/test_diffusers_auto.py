"""The automatic mode in pipelines: choices kept over steps, apart for each pass and expert, reported and replayed."""

import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import run
from tiny_models import build

import psa
from psa.errors import ConfigError, PSAError
from psa.reorder import semantic

pytestmark = pytest.mark.usefixtures("inference")
AUTO = psa.PSAConfig(density=0.3, probe_every=2, probe_drift=1e9)


def rows(handle):
    """(layer, pass, first step, last step) of every probe."""
    found = ((row["layer"].partition("#"), row["step"], row["until"]) for row in handle.stats["choices"])
    return sorted((name, int(call or 0), first, last) for (name, _, call), first, last in found)


def test_the_default_is_the_automatic_mode_and_reports_what_it_chose(wan):
    with psa.enable(wan) as handle:
        assert handle.config.mask_mode == "auto" and handle.stats["error"] is None
        run(wan, steps=2)
        stats = handle.stats
    assert 0 < stats["error"] <= stats["worst_error"] < 2
    for row in stats["choices"]:
        assert sum(row["settings"].values()) == 2, "both heads have a setting"
        assert row["density"] == pytest.approx(0.15) and 0 < row["error"] <= row["worst_error"]
    assert stats["density"] == pytest.approx(0.15, rel=0.02)


def test_choices_are_reused_over_steps_apart_for_passes_and_begin_anew_with_a_run(wan):
    layers = [f"transformer.blocks.{i}.attn1" for i in range(2)]
    with psa.enable(wan, config=AUTO, warmup_steps=1) as handle:
        first = run(wan, steps=6)
        spans = [(1, 2), (3, 4), (5, 5)]
        expected = [(layer, call, *span) for layer in layers for call in range(2) for span in spans]
        assert rows(handle) == expected
        other = run(wan, steps=6, prompt="a dog", generator=torch.Generator().manual_seed(1))
        assert rows(handle) == expected and not torch.equal(other, first)
        assert torch.equal(run(wan, steps=6), first), "what an earlier run chose changes nothing"
        assert len(handle.probe_state.history) == 2 * 2 * 5, "one run is kept"


def test_drift_and_a_change_of_density_probe_again(wan):
    with psa.enable(wan, config=AUTO.replace(probe_drift=0.0, probe_every=10)) as handle:
        run(wan, steps=3)
        assert [row[2] for row in rows(handle)] == [0, 2] * 4, "seen at step 1, acted on at step 2"
    with psa.enable(wan, config=AUTO, density_schedule=[0.6, 0.3]) as handle:
        run(wan, steps=4)
        assert [(row["step"], round(row["density"], 2)) for row in handle.stats["choices"][:2]] == [(0, 0.6), (2, 0.3)]
    with psa.enable(wan, config=AUTO, density_schedule=[0.6, 0.3, 0.2]) as handle:
        run(wan, steps=3)
        assert handle.stats["steps"] == pytest.approx({0: 0.6, 1: 0.3, 2: 0.2}, rel=0.05)


def test_two_experts_replay_bit_for_bit(tmp_path):
    pipe = tiny.make("wan22_a14b")
    with psa.enable(pipe, config=AUTO) as handle:
        expected = run(pipe, steps=5)
        stats, parts = handle.stats, {row[0].partition(".")[0] for row in rows(handle)}
        handle.probe_state.save(tmp_path / "choices.json")
    assert parts == {"transformer", "transformer_2"}
    for replay in (tmp_path / "choices.json", handle.probe_state):
        with psa.enable(pipe, config=AUTO, replay=replay) as handle:
            for _ in range(2):
                assert torch.equal(run(pipe, steps=5), expected)
            assert handle.stats == stats
    with (
        psa.enable(pipe, config=AUTO, replay=handle.probe_state),
        pytest.raises(PSAError, match="no choice was recorded"),
    ):
        run(pipe, steps=6)
    with pytest.raises(ConfigError, match="replay: only the automatic mode"):
        psa.enable(pipe, preset="psa_balanced", replay=handle.probe_state)


def test_a_target_error_is_probed_for(wan):
    with psa.enable(wan, config=psa.PSAConfig(target_error=0.2)) as handle:
        run(wan, steps=1)
        assert handle.stats["error"] < 0.5
        assert 0.15 < handle.stats["density"] <= 1.0


def test_state_stays_bounded_without_a_scheduler_and_copies_have_their_own():
    import copy

    model, call = build("wan")
    with psa.enable(model, config=AUTO) as handle:
        for _ in range(12):  # calls of one timestep: more than a step has
            model(**call)
        assert len(handle.probe_state.history) == 2 * 4
        twin = copy.deepcopy(model)
        same = torch.equal(twin(**call, return_dict=False)[0], model(**call, return_dict=False)[0])
    assert same and len(handle.probe_state.history) == 2 * 4


def test_the_automatic_mode_inside_a_compiled_graph():
    model, call = build("wan")
    torch._dynamo.reset()
    with psa.enable(model, config=AUTO) as handle:
        expected = model(**call, return_dict=False)[0]
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(**call, return_dict=False)[0]
        assert torch.allclose(out, expected, atol=1e-5)
        assert handle.stats["sparse_calls"] == 4 and len(handle.stats["choices"]) == 4


def test_semantic_orders_start_from_the_last_steps_centroids(wan, monkeypatch):
    seeded = []
    seed_centroids = semantic._seed_centroids
    monkeypatch.setattr(semantic, "_seed_centroids", lambda *args: seeded.append(args) or seed_centroids(*args))
    config = AUTO.replace(rearrange_method="semantic")
    with psa.enable(wan, config=config):
        first = run(wan, steps=3)
        once = len(seeded)
        assert torch.equal(run(wan, steps=3), first), "another run begins anew"
    assert len(seeded) == 2 * once
    with psa.enable(wan, config=config):
        run(wan, steps=1)
    assert len(seeded) == 3 * once, "further steps seed nothing"


def test_stats_say_which_heads_run_dense(wan):
    with psa.enable(wan, config=psa.PSAConfig(target_error=1e-6, max_density=0.5)) as handle:
        run(wan, steps=1)
        assert "step 0: 2 of 2 heads cannot meet error 1e-06" in handle.stats["notes"][0]
    with psa.enable(wan, config=AUTO) as handle:
        run(wan, steps=1)
        assert handle.stats["notes"] == []

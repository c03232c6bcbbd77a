"""The quality aims of the automatic mode, in both arenas, against published topk and one mean per dropped block."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import arenas
import quality

SETTINGS = [(*setting, seed) for seed, setting in enumerate(arenas.SETTINGS)]


def scored(case):
    """Errors per head: ours with our importance; published and one-mean with the exact one."""
    bench = quality.open_case(case, "Gilbert")
    plan = quality.METHODS["auto"](bench, None, 0.15)
    assert float(plan.density_per_head.max()) <= 0.15 * 1.02
    published = quality.published_topk(bench, bench.mass, 0.15)
    one_mean = bench.ranked(bench.mass, 0.15, quality.BLOCK_N)
    ours, topk, mean = (bench.errors(p).tolist() for p in (plan, published, one_mean))
    return bench, plan, list(zip(ours, topk, mean, strict=True))


@pytest.fixture(scope="module")
def trained():
    return [scored(case) for case in arenas.trained()]


def test_trained_heads_beat_both_rivals_that_are_given_exact_importance(trained):
    heads = [head for _, _, rows in trained for head in rows]
    by_topk = math.prod(ours / topk for ours, topk, _ in heads) ** (1 / len(heads))
    by_mean = math.prod(ours / mean for ours, _, mean in heads) ** (1 / len(heads))
    assert by_topk <= 0.4 and by_mean <= 0.5
    assert all(ours <= 0.75 * min(topk, mean) for ours, topk, mean in heads)


def test_an_order_for_every_head_errs_less_still(trained):
    ratios = []
    for bench, _, rows in trained:
        plan = quality.METHODS["auto, order per head"](bench, None, 0.15)
        assert float(plan.density_per_head.max()) <= 0.15 * 1.02
        ratios += [error / ours for error, (ours, _, _) in zip(bench.errors(plan).tolist(), rows, strict=True)]
    assert math.prod(ratios) ** (1 / len(ratios)) <= 0.75 and max(ratios) <= 1.05


@pytest.mark.parametrize("setting", SETTINGS)
def test_fields_beat_both_rivals(setting):
    _, plan, rows = scored(arenas.synthetic(*setting))
    ours, topk, mean = rows[0]
    assert ours <= 0.5 * topk and ours <= 0.5 * mean
    assert plan.error.item() == pytest.approx(ours, rel=0.4)


@pytest.mark.parametrize(("seed", "grid"), [(108, (8, 32, 32)), (109, (6, 24, 40))])
def test_sharp_held_out_fields_beat_both_rivals(seed, grid):
    """Temperature 3, noise .5: few rows hold most of the error, and importance has to be fine."""
    _, _, rows = scored(arenas.synthetic(3.0, 0.5, seed, grid))
    ours, topk, mean = rows[0]
    assert ours <= 0.7 * min(topk, mean)


def test_the_reported_error_is_near_the_true_one(trained):
    pairs = [pair for _, plan, rows in trained for pair in zip(plan.error[0].tolist(), rows, strict=True)]
    ratios = [abs(reported / head[0] - 1) for reported, head in pairs]
    assert sorted(ratios)[len(ratios) // 2] <= 0.2 and max(ratios) < 0.5


def test_sharing_the_budget_lowers_the_layers_error(trained):
    for bench, plan, rows in trained:
        norms = bench.out[0].flatten(1).norm(dim=-1)
        shared = bench.plan(None, density=0.15, share_heads=True)
        assert shared.density <= 0.15 * 1.02 and plan.density == pytest.approx(shared.density, rel=0.03)
        layer = lambda errors, norms=norms: float((torch.tensor(errors) * norms).square().sum().sqrt())  # noqa: E731
        assert layer(bench.errors(shared).tolist()) <= 0.9 * layer([head[0] for head in rows])


def test_target_error_holds_on_trained_heads(trained):
    pairs = []
    for bench, _, _ in trained:
        for target in (0.03, 0.06):
            plan = bench.plan(None, target_error=target)
            errors = bench.errors(plan).tolist()
            pairs += [(error / target, fact["density"]) for error, fact in zip(errors, plan.report, strict=True)]
    assert sum(ratio <= 1.2 for ratio, _ in pairs) >= len(pairs) - 1 and max(ratio for ratio, _ in pairs) < 1.4
    assert all(ratio > 0.5 or density < 0.06 for ratio, density in pairs), "no denser than it has to be"


def test_prototype_numbers_of_the_method_reproduce(trained):
    """METHOD's table on these four heads: binary 1.50, one mean .79, p1 .70, p2 .665, p2 + capped variance .574."""
    want = {"binary": 1.50, "one mean per block": 0.79, "p1": 0.70, "p2": 0.665, "p2 variance": 0.574}
    for name, expected in want.items():
        ratios = []
        for bench, _, rows in trained:
            errors = bench.errors(quality.METHODS[name](bench, bench.mass, 0.15)).tolist()
            ratios += [error / head[1] for error, head in zip(errors, rows, strict=True)]
        assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(expected, rel=0.02), name

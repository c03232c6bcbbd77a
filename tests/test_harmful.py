"""Inputs that mean harm: nothing is NaN, and the report shows the error, or its docs say why it cannot."""

import itertools
import math

import pytest
import torch
from harmful import DTYPES, HARMFUL, needle, smooth

import psa
from psa.auto import ROWS_THAT_CHOOSE
from psa.probe import sample_rows


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())


def relative(out, true):
    return (out - true).flatten(2).norm(dim=-1) / true.flatten(2).norm(dim=-1).clamp(min=1e-9)


def assert_honest(plan, out, true):
    """The report says at least 40 % of the true error, give or take 2 %, and not more than 3 times as much."""
    assert bool(out.isfinite().all()) and bool(plan.error.isfinite().all())
    reported, seen = plan.error[0].double(), relative(out, true)[0]
    assert bool((reported >= 0.4 * seen - 0.005).all()), f"reported {reported.tolist()}, true {seen.tolist()}"
    assert bool((reported <= 3 * seen + 0.02).all()), f"reported {reported.tolist()}, true {seen.tolist()}"


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(HARMFUL, DTYPES)))
def test_harmful_inputs_give_finite_outputs_and_an_honest_report(name, dtype, backend):
    q, k, v = smooth()
    HARMFUL[name](q, k, v)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, plan = psa.psa_attention(q, k, v, density=0.15, return_plan=True, backend=backend)
    assert_honest(plan, out, dense(q, k, v))


@pytest.mark.parametrize("name", HARMFUL)
def test_a_target_is_kept_on_harmful_inputs(name):
    """Where pooling cannot meet the target the head runs dense and the notes say so."""
    q, k, v = smooth()
    HARMFUL[name](q, k, v)
    config = psa.PSAConfig(target_error=0.02, max_density=0.5)
    out, plan = psa.psa_attention(q, k, v, config=config, return_plan=True)
    true = relative(out, dense(q, k, v))[0]
    kept = plan.density_per_head[0]
    assert bool(((true <= 1.2 * 0.02) | (plan.error[0] > 0.02)).all()), f"true {true.tolist()}, {plan.report}"
    assert bool(((kept <= 0.5 * 1.02) | (kept == 1.0)).all())
    assert bool((kept == 1.0).any()) == any("run dense" in note for note in plan.notes)


@pytest.mark.parametrize("factor", [100.0, 1e3, 1e4])
def test_an_outlier_key_is_never_averaged(factor):
    """A mean of keys with a giant among them resembles none of them, and pooled importance does not see that."""
    for seed in range(4):
        q, k, v = smooth(2, 2048, 2048, seed=seed)
        k[:, 0, 100 + 450 * seed] *= factor
        true = dense(q, k, v)
        out, plan = psa.psa_attention(q, k, v, density=0.15, return_plan=True)
        assert_honest(plan, out, true)
        assert plan.density <= 0.15 * 1.02 and float(relative(out, true)[0, 0]) < 0.05
        assert float(relative(psa.psa_attention(q, k, v, target_error=0.05), true).max()) <= 1.2 * 0.05


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_needle_in_one_block_among_thousands_is_found(backend):
    q, k, v = smooth(1, 256, 16 * 2048, 16)
    needle(q, k, v)
    config = psa.PSAConfig(block_n=16, density=0.1)
    out, plan = psa.psa_attention(q, k, v, config=config, return_plan=True, backend=backend)
    assert plan.levels.shape[-1] == 2048 and float((plan.levels[..., 32768 * 2 // 3 // 16] == 1).float().mean()) == 1.0
    assert_honest(plan, out, dense(q, k, v))
    assert float(relative(out, dense(q, k, v)).max()) < 0.05


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("extreme", [1e-30, 6e4, 1e36])
def test_extreme_values_of_bfloat16_stay_finite_and_are_reported(extreme, backend):
    q, k, v = (t.bfloat16() for t in smooth(1, 512, 512))
    out, plan = psa.psa_attention(q, k, v * extreme, return_plan=True, backend=backend)
    assert 1e-4 < float(plan.error.max()) < 1.0
    assert_honest(plan, out.double() / extreme, dense(q, k, (v * extreme).double() / extreme))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("extreme", [1e-30, 1e8, 1e15])
def test_extreme_logits_of_bfloat16_stay_finite_and_are_reported(extreme, backend):
    q, k, v = (t.bfloat16() for t in smooth(1, 512, 512))
    q, k = q * extreme, k * extreme
    out, plan = psa.psa_attention(q, k, v, return_plan=True, backend=backend)
    assert_honest(plan, out, dense(q, k, v))


@pytest.mark.parametrize("asked", [{"density": 0.15}, {"target_error": 0.05}])
def test_no_error_is_reported_where_there_is_no_number(asked):
    q, k, v = smooth(2, 512, 512)
    k[:, 1, 77] = math.nan
    out, plan = psa.psa_attention(q, k, v, return_plan=True, **asked)
    assert plan.error[0].isnan().tolist() == [False, True] and bool(out[:, 0].isfinite().all())


def test_what_the_report_does_not_see():
    """The guarantee is statistical: it is about rows like those sampled. Rows that no probe lands on can be wrong.

    A handful of queries that look for one needle each, none of them sampled, come out wrong while the report is calm.
    """
    q, k, v = smooth(1, 4096, 4096, seed=2)
    config = psa.PSAConfig(density=0.05, sort_keys=False)
    sampled = set(sample_rows(4096, 128, 1, config.probe_rows, ROWS_THAT_CHOOSE, 0, q.device).rows.flatten().tolist())
    hidden = [row for row in range(5, 4096, 1024) if row not in sampled]
    for place, row in enumerate(hidden):
        q[0, 0, row] = 0
        q[0, 0, row, 0] = 30.0
        k[0, 0, 777 + 900 * place, 0] += 12.0
        v[0, 0, 777 + 900 * place] = 50.0 * torch.randn(32, generator=torch.Generator().manual_seed(row))
    out, plan = psa.psa_attention(q, k, v, config=config, return_plan=True)
    true = relative(out, dense(q, k, v)).item()
    on_hidden = relative(out[:, :, hidden], dense(q, k, v)[:, :, hidden]).item()
    assert math.isfinite(true) and true > 1.5 * plan.error.item() and on_hidden > 0.3
    more = psa.psa_attention(
        q, k, v, config=psa.PSAConfig(density=0.05, sort_keys=False, probe_rows=4096), return_plan=True
    )
    assert more[1].error.item() > 2 * plan.error.item(), "probing every row sees them"

"""The public functions: every option together, drop-in behaviour, bad input, compile, autocast, vmap, checkpoint."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import psa
from psa import memory, slope
from psa.errors import BackendError, ConfigError, PSAError, ShapeError

MODES = {
    "topk": {"mask_mode": "topk"},
    "thresholdbound": {"mask_mode": "thresholdbound", "mask_ratios": {1: (0, 0.3), 2: (0.3, 0.6), 16: (0.6, 0.9)}},
    "proportional": {"mask_mode": "proportional", "density": 0.3},
    "auto": {"density": 0.3},
    "dropping": {"density": 0.2, "keep_all": False, "exponent": 2.0},
}
FIXED = psa.PSAConfig(mask_mode="proportional", density=0.3)
BIASES = ["count", "variance", "measured"]
ORDERS = ["Gilbert", "tile", "semantic", "hybrid", None]


def tensors(batch=1, heads=4, kv_heads=2, length_q=300, length_k=300, dim=32, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda h, n: torch.randn(batch, h, n, dim, generator=g).to(dtype)  # noqa: E731
    return make(heads, length_q), make(kv_heads, length_k), make(kv_heads, length_k)


@pytest.mark.parametrize(("mode", "bias", "order"), list(itertools.product(MODES, BIASES, ORDERS)))
def test_every_option_together_agrees_with_the_reference(mode, bias, order):
    """Similarity cap, text, masks, small blocks, any intervals, gradients, with every order, mode and bias."""
    config = psa.PSAConfig(
        **MODES[mode], bias=bias, block_m=64, block_n=16, use_sim_mask=True, sim_thresholds={2: 0.05, 4: 0.0, 8: 0.2}
    )
    grid, text = ((5, 6, 9), 30) if order else (None, 0)
    if order:
        config = config.replace(rearrange_method=order)
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[:, -7:] = False
    results = []
    for backend in ("reference", "torch"):
        q, k, v = (t.requires_grad_() for t in tensors())
        out, lse, plan = psa.psa_attention(
            q, k, v, config=config, enable_gqa=True, grid=grid, text_length=text, key_mask=mask, backend=backend,
            return_lse=True, return_plan=True,
        )  # fmt: skip
        grads = torch.autograd.grad((out * v.detach().mean()).sum() + lse.square().mean(), (q, k, v))
        results.append((out, lse, *grads, plan.levels))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("mode", "bias"), list(itertools.product(MODES, BIASES)))
@pytest.mark.parametrize("lengths", [(300, 300), (129, 400), (400, 129)])
def test_causal_with_every_mode_agrees_with_the_reference(mode, bias, lengths):
    config = psa.PSAConfig(**MODES[mode], bias=bias, block_m=64, block_n=32)
    results = []
    for backend in ("reference", "torch"):
        q, k, v = (t.requires_grad_() for t in tensors(2, length_q=lengths[0], length_k=lengths[1]))
        out = psa.psa_attention(q, k, v, config=config, enable_gqa=True, is_causal=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


def test_density_one_is_scaled_dot_product_attention():
    for causal, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16, torch.float16)):
        q, k, v = tensors(2, length_q=257, length_k=257, dtype=dtype)
        out = psa.psa_attention(q, k, v, density=1.0, is_causal=causal, enable_gqa=True)
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert out.dtype == dtype
        torch.testing.assert_close(out, dense, atol=tolerance, rtol=0)


def test_causal_is_bottom_right_aligned():
    q, k, v = tensors(heads=2, kv_heads=2, length_q=40, length_k=100)
    out = psa.psa_attention(q, k, v, density=1.0, is_causal=True)
    mask = torch.arange(100)[None] <= torch.arange(40)[:, None] + 60
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5, rtol=0)
    out, lse = psa.psa_attention(k, q, q, density=1.0, is_causal=True, return_lse=True)
    assert (out[:, :, :60] == 0).all() and lse[:, :, :60].isneginf().all() and out[:, :, 60:].isfinite().all()


@pytest.mark.parametrize("length", [1, 63, 500, 1000])
def test_odd_lengths_and_strided_inputs(length):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(length_q=length, length_k=length))
    a = psa.psa_attention(q, k, v, density=0.2, enable_gqa=True)
    b = psa.psa_attention(*(t.contiguous() for t in (q, k, v)), density=0.2, enable_gqa=True)
    assert torch.equal(a, b) and a.isfinite().all()


def test_run_to_run_and_batch_item_bits_are_the_same():
    q, k, v = tensors(3, 4, 4)
    config = psa.PSAConfig(density=0.2, bias="variance")
    first, again = (psa.psa_attention(q, k, v, config=config, grid=(3, 10, 10)) for _ in range(2))
    alone = psa.psa_attention(q[1:2], k[1:2], v[1:2], config=config, grid=(3, 10, 10))
    assert torch.equal(first, again) and torch.equal(first[1:2], alone)


def test_padding_on_the_right_gives_what_no_padding_gives():
    q, k, v = tensors(1, 2, 2, 200, 150)
    padded = [torch.cat([t, torch.full_like(t[:, :, :42], 9.0)], 2) for t in (k, v)]
    mask = torch.arange(192)[None] < 150
    levels = psa.plan(q, k, config=FIXED).levels
    plan = psa.Plan.from_levels(levels, block_m=128, block_n=64)
    masked = psa.plan(q, padded[0], config=FIXED, key_mask=mask)
    out = psa.attend(q, *padded, dataclasses.replace(masked, levels=levels))
    torch.testing.assert_close(out, psa.attend(q, k, v, plan), atol=1e-5, rtol=0)


def test_plans_are_reusable_and_return_order_is_out_lse_plan():
    q, k, v = tensors(heads=2, kv_heads=2)
    out, lse, plan = psa.psa_attention(q, k, v, density=0.2, grid=(3, 10, 10), return_lse=True, return_plan=True)
    again, lse_again = psa.psa_attention(q, k, v, plan=plan, return_lse=True)
    assert torch.equal(out, again) and torch.equal(lse, lse_again) and lse.shape == q.shape[:3]
    for fixed in ({"density": 0.2}, {"grid": (3, 10, 10)}, {"text_length": 4}, {"text_position": "first"}):
        with pytest.raises(ConfigError, match="plan: a given plan fixes"):
            psa.psa_attention(q, k, v, plan=plan, **fixed)
    with pytest.raises(ConfigError, match="is_causal"):
        psa.attend(q, k, v, plan, is_causal=True)


def test_importance_of_ones_own_decides_the_levels():
    q, k, _ = tensors(heads=2, kv_heads=2, length_q=256, length_k=640)
    scores = torch.zeros(1, 1, 2, 10)
    scores[..., 3] = 1.0
    plan = psa.plan(q, k, psa.PSAConfig(mask_ratios={1: (0, 0.1)}), importance=scores)
    assert (plan.levels[..., 3] == 1).all() and plan.levels.sum() == 4


def test_merge_of_two_halves_is_the_whole():
    q, k, v = (t.double().requires_grad_() for t in tensors(heads=2, kv_heads=2, length_q=90, length_k=256))
    levels = torch.tensor([1, 2, 0, 4, 8, 1, 16, 2])[None, None, None].expand(1, 1, 1, 8)
    whole = psa.attend(q, k, v, psa.Plan.from_levels(levels, block_m=128, block_n=32), return_lse=True)
    halves = []
    for part in (slice(0, 128), slice(128, 256)):
        plan = psa.Plan.from_levels(levels[..., part.start // 32 : part.stop // 32], block_m=128, block_n=32)
        halves += psa.attend(q, k[:, :, part], v[:, :, part], plan, return_lse=True)
    merged = psa.merge(*halves)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(o.square().sum() + l.sum(), (q, k, v)) for o, l in (merged, whole)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_merging_with_nothing_changes_nothing():
    q, k, v = tensors(heads=2, kv_heads=2)
    out, lse = psa.psa_attention(q, k, v, density=0.3, return_lse=True)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (psa.merge(out, lse, *nothing), psa.merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    out, lse = psa.merge(*nothing, *nothing)
    assert (out == 0).all() and lse.isneginf().all()


BAD = [
    ({"q": torch.zeros(2, 3, 4)}, ShapeError, "q: expected"),
    ({"k": torch.zeros(1, 2, 300, 16)}, ShapeError, "head_dim"),
    ({"k": torch.zeros(2, 2, 300, 32)}, ShapeError, "batch"),
    ({"v": torch.zeros(1, 2, 299, 32)}, ShapeError, "v: expected the shape of k"),
    ({"v": torch.zeros(1, 2, 300, 32, dtype=torch.float16)}, ShapeError, "float16"),
    ({"q": torch.zeros(1, 4, 300, 32, dtype=torch.int32)}, ShapeError, "floating"),
    ({"q": torch.zeros(1, 3, 300, 32)}, ShapeError, "do not divide"),
    ({"q": torch.zeros(1, 4, 300, 32, device="meta")}, ShapeError, "meta"),
    ({"enable_gqa": False}, ShapeError, "enable_gqa=True"),
    ({"scale": 0.0}, ConfigError, "scale"),
    ({"scale": float("nan")}, ConfigError, "scale"),
    ({"scale": -1}, ConfigError, "scale"),
    ({"density": 2.0}, ConfigError, "density"),
    ({"config": {"density": 0.1}}, ConfigError, "PSAConfig"),
    ({"grid": (3, 10, 11)}, ShapeError, "3×10×11 video \\+ 0 text tokens = 330"),
    ({"grid": (3, 10, 10), "is_causal": True}, ConfigError, "grid"),
    ({"grid": (0, 10, 10)}, ShapeError, "grid"),
    ({"text_length": -1}, ConfigError, "text_length"),
    ({"text_length": 301}, ShapeError, "text_length"),
    ({"text_position": "middle"}, ConfigError, "text_position"),
    ({"key_mask": torch.ones(1, 299, dtype=torch.bool)}, ShapeError, "key_mask"),
    ({"key_mask": torch.ones(1, 300)}, ShapeError, "key_mask"),
    ({"attn_mask": torch.ones(1)}, ConfigError, "attn_mask"),
    ({"dropout_p": 0.1}, ConfigError, "dropout"),
    ({"backend": "cuda"}, BackendError, "unknown"),
    ({"backend": "triton"}, BackendError, "triton"),
    ({"plan": "x"}, ConfigError, "plan"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_gets_a_clear_error(change, error, message):
    q, k, v = tensors()
    call = {"q": q, "k": k, "v": v, "enable_gqa": True, **change}
    with pytest.raises(error, match=message):
        psa.psa_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_plans_for_other_shapes_are_refused():
    q, k, v = tensors()
    for levels in (
        torch.ones(1, 1, 2, 5),
        torch.ones(1, 1, 3, 6, dtype=torch.int),
        torch.ones(1, 3, 3, 5, dtype=torch.int),
    ):
        with pytest.raises(ShapeError):
            psa.attend(q, k, v, psa.Plan.from_levels(levels, block_m=128, block_n=64), enable_gqa=True)
    for level in (3, 128, -1):
        with pytest.raises(ConfigError):
            psa.Plan.from_levels(torch.full((1, 1, 3, 5), level), block_m=128, block_n=64)


def test_a_plan_for_another_head_dim_is_refused_where_its_bias_depends_on_it():
    q, k, _ = tensors(heads=2, kv_heads=2)
    wide = tensors(heads=2, kv_heads=2, dim=64)
    with pytest.raises(ShapeError, match="plan: made for head_dim 32, used with q"):
        psa.attend(*wide, psa.plan(q, k, FIXED.replace(bias="variance")))
    assert psa.attend(*wide, psa.plan(q, k, FIXED)).shape == wide[0].shape, "levels alone fit any"


def test_values_in_the_place_of_a_config_are_named():
    with pytest.raises(ConfigError, match="pass v="):
        psa.plan(*tensors(heads=2, kv_heads=2))


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=3, max_size=5), st.lists(st.integers(0, 70), min_size=3, max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.complex64]), st.booleans(),
    st.one_of(st.none(), st.floats(), st.integers(-1, 2)), st.one_of(st.none(), st.floats(), st.text(max_size=3)),
    st.one_of(st.none(), st.tuples(*[st.integers(-1, 5)] * 3)), st.integers(-1, 80),
)  # fmt: skip
def test_any_call_gives_a_result_or_a_psa_error(shape_q, shape_k, dtype, causal, density, scale, grid, text):
    q, k = torch.ones(shape_q, dtype=dtype), torch.ones(shape_k, dtype=dtype)
    try:
        out = psa.psa_attention(
            q, k, k, is_causal=causal, density=density, scale=scale, grid=grid, text_length=text, enable_gqa=True
        )
    except PSAError as error:
        assert str(error)
    else:
        assert out.shape == q.shape and out.isfinite().all()


def test_empty_sequences_and_batches():
    for lq, lk, batch in ((0, 64, 1), (64, 0, 1), (0, 0, 1), (64, 64, 0)):
        q, k, v = tensors(batch, 2, 2, lq, lk)
        out, lse = psa.psa_attention(q, k, v, density=0.5, return_lse=True)
        assert out.shape == q.shape and (out == 0).all() and (lk > 0 or lse.isneginf().all())


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_fullgraph_equals_eager(causal):
    q, k, v = tensors(1, 2, 2, 260, 260)
    config = psa.PSAConfig(density=0.3, bias="variance")
    grid = None if causal else (2, 10, 13)

    def call(q, k, v):
        return psa.psa_attention(q, k, v, config=config, is_causal=causal, grid=grid).square()

    def by_density(q, k, v):
        return psa.psa_attention(q, k, v, density=0.25, is_causal=causal)

    for function in (call, by_density):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        eager_in, compiled_in = ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
        eager, got = function(*eager_in), compiled(*compiled_in)
        torch.testing.assert_close(got, eager)
        for a, b in zip(
            torch.autograd.grad(got.sum(), compiled_in), torch.autograd.grad(eager.sum(), eager_in), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_operators_pass_opcheck():
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 2, 130, 140, 16))
    key = psa.PSAConfig(density=0.3, bias="variance").key
    arguments = (q.detach(), k.detach(), None, None, None, None, key, 0.25, False, 0, "last")
    torch.library.opcheck(torch.ops.psa.select, arguments)
    levels, power, *_ = torch.ops.psa.select(*arguments)
    arguments = (q, k, v, levels, power, torch.ones(1, 1), None, None, 128, 64, 0.25, False, "torch")
    torch.library.opcheck(torch.ops.psa.attend, arguments)


def test_autocast_and_checkpoint():
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert psa.psa_attention(q, k, v, density=0.3).dtype == torch.bfloat16
    module = psa.PSAAttention(density=0.3)
    direct = torch.autograd.grad(module(q, k, v).sum(), (q, k, v))
    saved = torch.utils.checkpoint.checkpoint(module, q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(saved.sum(), (q, k, v)), direct, strict=True):
        assert torch.equal(a, b)


def test_the_module_takes_what_the_function_takes():
    q, k, v = tensors(1, 2, 2)
    for order in ("Gilbert", "semantic"):
        module = psa.PSAAttention(FIXED, rearrange_method=order)
        out, plan = module(q, k, v, config=None, plan=None, return_plan=True)
        assert plan.config == module.config
        again = module(q, k, v, plan=plan, layer="a", step=0)
        assert torch.equal(again, out) and not module.probe_state.history
        with pytest.raises(ConfigError, match="PSAConfig"):
            module(q, k, v, config={"density": 0.3})


def test_the_module_clusters_each_layer_by_itself():
    both, alone = (psa.PSAAttention(FIXED, rearrange_method="semantic") for _ in range(2))
    first, second = tensors(1, 2, 2, seed=0), tensors(1, 2, 2, seed=1)
    for _ in range(2):
        both(*first, layer="a")
        out = both(*second, layer="b")
        assert torch.equal(out, alone(*second, layer="b")), "layer a's centroids stay out of layer b's"
    assert set(both.reorder_states) == {"a", "b"}


def test_vmap_is_a_loop():
    q, k, v = (torch.stack([t, t.flip(2)]) for t in tensors(1, 2, 2))
    attention = lambda q, k, v: psa.psa_attention(q, k, v, density=0.3)  # noqa: E731
    together = torch.func.vmap(attention)(q, k, v)
    assert torch.equal(together, torch.stack([attention(*x) for x in zip(q, k, v, strict=True)]))
    shared = torch.func.vmap(attention, in_dims=(0, None, None))(q, k[0], v[0])
    assert torch.equal(shared, torch.stack([attention(x, k[0], v[0]) for x in q]))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    batched = torch.autograd.grad(torch.func.vmap(attention)(*leaves).square().sum(), leaves)
    single = torch.autograd.grad(attention(*(t[0] for t in leaves)).square().sum(), leaves)
    for a, b in zip(batched, single, strict=True):
        torch.testing.assert_close(a[0], b[0])


def test_the_callers_config_and_tensors_stay_as_they_were():
    q, k, v = tensors(heads=2, kv_heads=2)
    copies = [t.clone() for t in (q, k, v)]
    config = psa.PSAConfig(use_sim_mask=True)
    key = config.key
    psa.psa_attention(q, k, v, config=config, grid=(3, 10, 10), density=0.2)
    assert config.key == key and config == psa.PSAConfig(use_sim_mask=True)
    assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True))


def test_plan_saves_and_loads(tmp_path):
    q, k, v = tensors(heads=2, kv_heads=2)
    mask = torch.ones(1, 300, dtype=torch.bool)
    config = psa.PSAConfig(density=0.3, bias="measured")
    plan = psa.plan(q, k, config, grid=(3, 10, 10), key_mask=mask)
    plan.save(tmp_path / "plan.safetensors")
    loaded = psa.Plan.load(tmp_path / "plan.safetensors")
    assert torch.equal(psa.attend(q, k, v, loaded), psa.attend(q, k, v, plan)) and loaded.config == config
    assert loaded.density == plan.density and sum(loaded.histogram().values()) == pytest.approx(1)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for path in ("no.safetensors", "missing.safetensors"):
        with pytest.raises(PSAError, match="not a saved plan"):
            psa.Plan.load(tmp_path / path)


def test_plan_reports_density_by_its_definition():
    levels = torch.tensor([[1, 0, 2, 8], [4, 4, 0, 0]])[None, None]
    plan = psa.Plan.from_levels(levels, block_m=64, block_n=64)
    assert plan.density == pytest.approx((1 + 0.5 + 0.125 + 0.5) / 8) and plan.sparsity == 1 - plan.density
    q, k, _ = tensors(1, 2, 2, 512, 512)
    causal = psa.plan(q, k, density=0.7, is_causal=True)
    below = torch.arange(8)[None] * 64 <= torch.arange(4)[:, None] * 128 + 127
    kept = torch.where(causal.levels > 0, 1 / causal.levels.float(), 0.0)[..., below].mean(-1)
    torch.testing.assert_close(causal.density_per_head, kept)


def test_importing_psa_loads_no_optional_package():
    code = "import sys, psa; sys.exit(any(m in sys.modules for m in ('triton', 'diffusers', 'transformers', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gpus_scratch_changes_no_result(monkeypatch):
    """On a GPU more is worked on at a time, and squares are averaged by a reduction that makes no copy."""
    q, k, v = tensors(2, 4, 2, 300, 300)
    auto = psa.PSAConfig(density=0.3)
    calls = [
        {"config": config}
        for config in (auto, FIXED.replace(importance="antidiagonal"), FIXED.replace(bias="measured"))
    ]
    calls += [
        {"config": auto, "is_causal": True},
        {"config": auto, "key_mask": torch.arange(300)[None].expand(2, -1) < 250},
    ]
    make = lambda call: psa.psa_attention(q, k, v, enable_gqa=True, return_plan=True, **call)  # noqa: E731
    want = [make(call) for call in calls]
    for elements in (1, 1 << 14, 1 << 28):
        for module in ("slope", "probe", "importance", "reorder.keys"):
            monkeypatch.setattr(f"psa.{module}.scratch_elements", lambda like, on_cpu: elements)  # noqa: B023
        for call, (out, plan) in zip(calls, want, strict=True):
            again, its_plan = make(call)
            torch.testing.assert_close(again, out)
            assert torch.equal(its_plan.levels, plan.levels)
    meta = memory.mean_square(q.to("meta"))
    assert meta.dtype == torch.float32 and meta.shape == memory.mean_square(q).shape


def test_autocast_reaches_no_stage():
    """Inputs are cast once; sorting keys, importance and the slope correction keep their precision."""
    q, k, v = tensors(1, 2, 2)
    half = [x.bfloat16() for x in (q, k, v)]
    want, plan = psa.psa_attention(*half, density=0.3, return_plan=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, its_plan = psa.psa_attention(q, k, v, density=0.3, return_plan=True)
    assert torch.equal(its_plan.levels, plan.levels)
    assert torch.equal(its_plan.permutation.k_order, plan.permutation.k_order)
    assert torch.equal(out, want)


def test_slope_moments_survive_large_means():
    """In half precision, too, as on a GPU: means are taken off before rounding, where their error would decide."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 256, 32, generator=g) + 30 * torch.randn(32, generator=g) for _ in range(2))
    for mask in (None, torch.arange(256)[None] < 200):
        exact, _ = slope.slope_basis(k.double(), v.double(), 64, mask, torch.float64)
        half, _ = slope.slope_basis(k, v, 64, mask, torch.bfloat16)
        for a, b in zip(half, exact, strict=True):
            assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("asked", [{"density": 0.2}, {"target_error": 0.1}])
def test_dense_attention_has_no_density_to_choose(asked):
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(psa.ConfigError, match="dense attention"):
        psa.psa_attention(q, q, q, config=psa.PSAConfig(type="dense"), **asked)

"""`psa.enable` on diffusers models and pipelines: exact where it must be, reversible, step and layout read."""

import warnings

import diffusers
import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import run, same
from tiny_models import MODELS, build

import psa
from psa.errors import BackendError, ConfigError, PSAError, PSAWarning, ShapeError
from psa.integrations.denoising import Schedule, StepReader

pytestmark = pytest.mark.usefixtures("inference")


# -- exact at density 1, sparse below, dense before and after --------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_exact_at_density_1_and_sparse_below(name):
    model, call = build(name)
    dense = model(**call, return_dict=False)[0]
    with psa.enable(model, density=1.0) as handle:
        same(model(**call, return_dict=False)[0], dense)
        layers = len(handle.sessions["transformer"].names)
        assert layers >= 2
        assert handle.stats["dense_calls"] == 0 and handle.stats["density"] == 1.0
        assert len(handle.stats["models"]["transformer"]["layers"]) == layers
    with psa.enable(model, density=0.3) as handle:
        sparse = model(**call, return_dict=False)[0]
        assert sparse.isfinite().all() and (sparse - dense).abs().max() > 0
        assert handle.stats["density"] < 0.9
        assert handle.stats["dense_calls"] == 0
    assert torch.equal(model(**call, return_dict=False)[0], dense)


def test_warmup_dense_last_steps_and_layers(wan):
    options = dict(density=0.3, warmup_steps=1, dense_last_steps=2, dense_layers=[-1])
    with psa.enable(wan, **options) as handle:
        run(wan, steps=5)
        stats = handle.stats
    layers = stats["models"]["transformer"]["layers"]
    assert [layers[0][s] < 1 for s in range(5)] == [False, True, True, False, False]
    assert all(density == 1 for density in layers[1].values())
    assert stats["sparse_calls"] == 2 * 2  # two steps, two passes of guidance
    assert stats["dense_calls"] == 5 * 2 * 2 - 4


def test_short_sequences_stay_dense_in_the_automatic_mode(wan, monkeypatch):
    monkeypatch.setattr("psa.integrations.denoising.SHORT", 10_000)
    dense = run(wan, steps=1)
    with psa.enable(wan, density=0.2) as handle, pytest.warns(PSAWarning, match="stay dense: up to 10000"):
        assert torch.equal(run(wan, steps=1), dense)
        stats = handle.stats
    assert stats["sparse_calls"] == 0 < stats["dense_calls"] and stats["choices"] == []
    assert stats["density"] is None and stats["overall_density"] == 1.0
    fixed = psa.PSAConfig(mask_mode="proportional", density=0.2)
    for options, sparse in (
        ({"density": 0.2, "min_queries": 0}, True),
        ({"config": fixed}, True),
        ({"config": fixed, "min_queries": 10_000}, False),
    ):
        with warnings.catch_warnings(), psa.enable(wan, **options) as handle:
            warnings.simplefilter("error" if sparse else "ignore", PSAWarning)
            run(wan, steps=1)
            assert (handle.stats["sparse_calls"] > 0) == sparse
    with pytest.raises(ConfigError, match="min_queries"):
        psa.enable(wan, min_queries=-1)


@pytest.mark.parametrize(
    ("pipe", "settings"), [("wan", {"mask_mode": "topk"}), ("cogvideo", {"tau": 0.02, "bias": "variance"})]
)
def test_fixed_settings_are_one_operator_on_a_gpu(pipe, settings, request, monkeypatch):
    """Five launches instead of planning and attention apart; the kernels themselves are tested in tests/triton."""
    pipe, config, served = request.getfixturevalue(pipe), psa.PSAConfig(**settings), []
    with psa.enable(pipe, config=config) as handle:
        apart = run(pipe, steps=2)
        stats = handle.stats
    operator = psa.functional.plan_and_attend
    monkeypatch.setattr("psa.whole.on_gpu", lambda q: True)
    monkeypatch.setattr("psa.functional.plan_and_attend", lambda *call: served.append(call) or operator(*call))
    with psa.enable(pipe, config=config) as handle:
        same(run(pipe, steps=2), apart)
        assert handle.stats["steps"] == stats["steps"]
    assert len(served) == stats["sparse_calls"] > 0


def test_density_schedule(wan):
    with psa.enable(wan, density_schedule=[None, 0.6, 0.3]) as handle:
        run(wan, steps=3)
        steps = handle.stats["steps"]
    assert steps[0] == 1.0
    assert steps[1] == pytest.approx(0.6, abs=0.1) and steps[2] == pytest.approx(0.3, abs=0.1)
    with psa.enable(wan, density_schedule=lambda step, steps: 1 - step / steps * 0.6) as handle:
        run(wan, steps=3)
        assert sorted(handle.stats["steps"].values(), reverse=True) == list(handle.stats["steps"].values())
    with pytest.raises(ConfigError, match="density"):
        psa.enable(wan, density_schedule=[0.5, 7])


def test_dense_frames_are_read_in_full(wan, cogvideo):
    for pipe in (wan, cogvideo):
        with psa.enable(pipe, density=0.2) as handle:
            run(pipe, steps=1)
            plain = handle.stats["density"]
        with psa.enable(pipe, density=0.2, dense_first_frames=1, dense_last_frames=1) as handle:
            run(pipe, steps=1)
            assert handle.stats["density"] > max(plain, 0.5)
        with psa.enable(pipe, density=1.0, dense_first_frames=1, dense_last_frames=1):
            exact = run(pipe, steps=1)
        same(exact, run(pipe, steps=1))
    calls = []
    count = wan.transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"warmup_steps": 1, "dense_first_frames": 5}
    with psa.enable(wan, density=0.2, **options), pytest.raises(ShapeError, match="5 latent frames"):
        run(wan, steps=2)
    count.remove()
    assert not calls, "told before the first layer of a dense step"


def test_a_wrong_layout_is_told_in_the_first_dense_step(wan):
    from psa.integrations.layout import Layout

    wrong, steps = Layout((5, 12, 14), "none"), []
    with psa.enable(wan, density=0.2, warmup_steps=1, layout=wrong) as handle:
        with pytest.raises(ShapeError, match="does not make the sequence"):
            run(wan, steps=2)
        steps.append(handle.step[0])
    assert steps == [0]
    with psa.enable(wan, density=0.2, warmup_steps=1, dense_layers=range(2), layout=wrong):
        run(wan, steps=2)


# -- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "section"),
    [("wan21_1.3b", "Wan2.1_1.3b"), ("wan22_a14b", "Wan2.2_A14B"), ("cogvideo1.5_5b", "CogVideo1.5_5b")],
)
def test_presets_follow_the_model(kind, section):
    pipe = tiny.make(kind)
    with psa.enable(pipe, preset="psa_balanced") as handle:
        assert handle.config == psa.presets.get(section, "psa_balanced")
    with psa.enable(pipe, preset="Wan2.1_1.3b/psa_topk", density=0.5) as handle:
        assert handle.config.density == 0.5 and handle.config.block_n == 32
    with psa.enable(pipe, preset="default") as handle:
        assert handle.config == psa.presets.get(section)
    for wrong in ({"density": 0.3}, {"density_schedule": [0.3]}):
        with pytest.raises(ConfigError, match="dense attention"):
            psa.enable(pipe, preset="baseline", **wrong)
    with psa.enable(pipe, preset="baseline") as handle:
        run(pipe, steps=1)
        assert handle.stats["sparse_calls"] == 0
    with pytest.raises(ConfigError, match="psa_balanced"):
        psa.enable(pipe, preset="psa_balnced")


def test_fewer_steps_than_warmup_warns(wan):
    with psa.enable(wan, preset="default"), pytest.warns(UserWarning, match="PSA never ran"):
        run(wan, steps=2)


# -- steps -----------------------------------------------------------------------------------------------------------


def test_steps_of_two_experts_repeated_and_interrupted_runs():
    pipe = tiny.make("wan22_a14b")

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with psa.enable(pipe, density=0.3, warmup_steps=2) as handle:
        for steps in (5, 4):
            run(pipe, steps=steps)
            models = handle.stats["models"]
            seen = sorted(s for m in models.values() for s in m["steps"])
            assert seen == list(range(steps))
            assert models["transformer"]["steps"] and models["transformer_2"]["steps"]
            assert handle.stats["dense_calls"] == 2 * 2 * 2
            run(pipe, steps=5, callback_on_step_end=stop)
            assert handle.stats["steps"] == {0: 1.0, 1: 1.0}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DPMSolverMultistepScheduler"])
def test_steps_for_any_spacing(cogvideo, name, spacing):
    old = cogvideo.scheduler
    cogvideo.scheduler = getattr(diffusers, name).from_config(old.config, timestep_spacing=spacing)
    try:
        with psa.enable(cogvideo, density=0.3, warmup_steps=1) as handle:
            run(cogvideo, steps=3)
            steps = handle.stats["steps"]
    finally:
        cogvideo.scheduler = old
    assert list(steps) == [0, 1, 2] and steps[0] == 1.0 > steps[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_steps_survive_rounding_and_scaling(dtype, factor):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(50)
    reader = StepReader()
    for _ in range(2):
        scheduler.set_timesteps(50)
        sample = torch.zeros(1)
        for i, t in enumerate(scheduler.timesteps):
            sent = t.expand(2).to(dtype) * factor
            for _ in range(2):
                assert reader.read(sent, scheduler) == i
            sample = scheduler.step(torch.zeros(1), t, sample).prev_sample
    assert reader.steps == 50 and reader.run == 2


def test_steps_of_models_that_count_from_noise_to_picture():
    """Lumina 2 and Z-Image are sent one minus the fraction."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    reader = StepReader()
    for count in (30, 7):
        scheduler.set_timesteps(count)
        for i, t in enumerate(scheduler.timesteps):
            assert reader.read((1 - t / 1000).expand(2), scheduler) == i
    assert reader.run == 2


def test_steps_without_a_scheduler():
    reader = StepReader()
    times = [torch.tensor(t) for t in (999, 999, 500, 500, 1, 1, 999, 500, 999, 999, 500)]
    assert [reader.read(t) for t in times] == [0, 0, 1, 1, 2, 2, 0, 1, 0, 0, 1]
    assert reader.steps is None
    # Image-to-video marks the tokens of a clean first frame with 0.
    assert reader.read(torch.tensor([[0, 0, 500, 500]])) == 1


def test_dense_last_steps_need_the_pipeline(wan):
    model, call = build("wan")
    with psa.enable(model, density=0.3, dense_last_steps=1), pytest.raises(ConfigError, match="on the pipeline"):
        model(**call)
    assert Schedule(psa.PSAConfig(), dense_last_steps=1).at(3, 4, 0) is None


# -- layout ----------------------------------------------------------------------------------------------------------


def test_layout_is_read_and_checked():
    from psa.integrations.layout import Layout

    expected = {
        "wan": ((4, 12, 13), 0), "cogvideox": ((4, 12, 13), 16), "cogvideox1.5": ((3, 12, 13), 16),
        "kandinsky": ((4, 12, 13), 0), "sd3": ((1, 24, 26), 16), "lumina2": ((1, 24, 26), 16),
        "hunyuan": ((4, 12, 13), 16), "ltx": ((4, 12, 13), 0), "flux": ((1, 24, 26), 16), "qwen": ((1, 24, 26), 16),
    }  # fmt: skip
    for name, (grid, text) in expected.items():
        model, call = build(name)
        with psa.enable(model, density=0.4) as handle:
            model(**call)
            layout = handle.sessions["transformer"].layout
        length = grid[0] * grid[1] * grid[2] + text
        assert layout.grid == grid and layout.text_in(length, name) == text, name
    with pytest.raises(ShapeError, match=r"4×12×13 = 624 video \+ 16 text tokens .* sequence of 700"):
        Layout((4, 12, 13), "first", 16).text_in(700, "Model")
    with pytest.raises(ShapeError, match="text_position='first' or 'last'"):
        Layout((4, 12, 13), None, 16).text_in(640, "Model")


def test_cross_attention_stays_dense_even_at_equal_lengths(wan):
    with psa.enable(wan, density=0.3) as handle:
        assert all("attn2" not in name for name in handle.sessions["transformer"].names)


def test_masks_that_are_more_than_padding_stay_dense_and_are_told_of(wan):
    q, mask = torch.randn(1, 64, 2, 24), torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    with psa.enable(wan, density=0.3) as handle:
        session = handle.sessions["transformer"]
        with pytest.warns(UserWarning, match="more than which tokens are padding; such calls stay dense"):
            assert session.attend(0, q, q, q, mask, None, lambda: q) is q


def _sana():
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=24, caption_channels=32,
        num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48, sample_size=32, patch_size=1,
    )  # fmt: skip


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match="expected a diffusers pipeline"):
        psa.enable(torch.nn.Linear(2, 2))
    model, _ = build("wan")
    for options in ({"warmup_steps": -1}, {"dense_layers": [9]}, {"text_position": "middle"}, {"density": 2.0}):
        with pytest.raises(ConfigError):
            psa.enable(model, **options)
    for options, message in (
        ({"dense_layers": 5}, "dense_layers: 5 is no list"),
        ({"warmup_step": 5}, "warmup_step: no option for a model of diffusers; did you mean 'warmup_steps'"),
        ({"text_length": 5}, "text_length: no option for a model of diffusers"),
    ):
        with pytest.raises(ConfigError, match=message):
            psa.enable(model, **options)
    with pytest.raises(BackendError, match="backend: 'trition' is unknown"):
        psa.enable(model, backend="trition")
    with pytest.raises(PSAError, match="SanaLinearAttnProcessor2_0 neither"):
        psa.enable(_sana(), density=0.5)
    with pytest.raises(PSAError, match="no transformer"):
        psa.enable(tiny.make("wan21_1.3b").vae, density=0.5)


def test_an_old_diffusers_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "psa.integrations.diffusers", None)
    with pytest.raises(PSAError, match=r"needs diffusers 0\.36 or later, this is \d"):
        psa.enable(build("wan")[0])


def test_import_stays_light():
    import subprocess
    import sys

    code = "import psa, sys; assert not {'diffusers', 'transformers'} & set(sys.modules); psa.enable"
    subprocess.run([sys.executable, "-c", code], check=True)

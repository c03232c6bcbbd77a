"""An enabled model lives on in diffusers: nested, copied, saved, fused, offloaded, quantised, compiled, trained."""

import copy
import io
import pickle

import diffusers
import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import run, same
from tiny_models import build

import psa
from psa.errors import ConfigError

pytestmark = pytest.mark.usefixtures("inference")
NO_TORCHAO = (
    "diffusers 0.36, the oldest tested, cannot be imported beside torchao 0.18; `make test` lays it over the newest"
)


def test_second_enable_needs_replace_and_nests(wan):
    dense = run(wan, steps=2)
    with psa.enable(wan, density=0.2) as outer:
        sparse = run(wan, steps=2)
        with pytest.raises(ConfigError, match="replace=True"):
            psa.enable(wan, density=0.4)
        with psa.enable(wan, density=1.0, replace=True):
            same(run(wan, steps=2), dense)
        assert torch.equal(run(wan, steps=2), sparse)
        assert outer.stats["sparse_calls"] == 2 * 2 * 2
    assert torch.equal(run(wan, steps=2), dense)
    # Any order of ends works.
    first = psa.enable(wan, density=0.2)
    second = psa.enable(wan, density=1.0, replace=True)
    first.disable()
    same(run(wan, steps=2), dense)
    second.disable()
    second.disable()
    assert type(wan.transformer.blocks[0].attn1.processor) is type(wan.transformer.blocks[0].attn2.processor)


def test_two_pipelines_at_once(wan, cogvideo):
    a, b = run(wan, steps=1), run(cogvideo, steps=1)
    with psa.enable(wan, density=1.0) as one, psa.enable(cogvideo, density=0.3) as other:
        same(run(wan, steps=1), a)
        assert not torch.equal(run(cogvideo, steps=1), b)
        assert one.stats["density"] == 1.0 > other.stats["density"]
    assert torch.equal(run(wan, steps=1), a) and torch.equal(run(cogvideo, steps=1), b)


@pytest.mark.parametrize("kind", ["wan21_1.3b", "cogvideo_5b"])
def test_enabled_pipelines_can_be_copied_pickled_and_saved(kind, tmp_path):
    pipe = tiny.make(kind)
    plain = run(pipe, steps=2)
    with psa.enable(pipe, density=0.3, warmup_steps=1):
        expected = run(pipe, steps=2)
        twin = copy.deepcopy(pipe)
        thawed = pickle.loads(pickle.dumps(pipe.transformer))
        buffer = io.BytesIO()
        torch.save(pipe.transformer, buffer)
        pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(pipe, steps=2), plain)
    assert torch.equal(run(twin, steps=2), expected)  # a copy keeps its own PSA
    pipe.transformer = thawed
    with psa.enable(pipe, density=1.0, replace=True):
        same(run(pipe, steps=2), plain)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    same(run(loaded, steps=2), plain)


def test_an_enabled_pipeline_is_freed_when_dropped():
    import gc
    import weakref

    pipe = tiny.make("wan21_1.3b")
    psa.enable(pipe, density=0.3)
    run(pipe, steps=1)
    gc.collect()
    gone = weakref.ref(pipe.transformer)
    pipe = None
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["wan21_1.3b", "cogvideo_5b"])
def test_fused_projections_before_and_after(kind):
    pipe = tiny.make(kind)
    dense = run(pipe, steps=1)
    with psa.enable(pipe, density=1.0) as handle:
        pipe.transformer.fuse_qkv_projections()
        same(run(pipe, steps=1), dense)
        assert handle.stats["sparse_calls"] > 0
    same(run(pipe, steps=1), dense)
    with psa.enable(pipe, density=1.0) as handle:
        same(run(pipe, steps=1), dense)
        assert handle.stats["sparse_calls"] > 0


def test_set_attention_backend_chooses_the_dense_steps(wan):
    plain = run(wan, steps=2)
    fixed = psa.PSAConfig(mask_mode="proportional", density=0.3)  # probes would choose anew after another rounding
    with psa.enable(wan, config=fixed, warmup_steps=1) as handle:
        expected = run(wan, steps=2)
        wan.transformer.set_attention_backend("_native_math")
        same(run(wan, steps=2), expected)
        assert handle.stats["sparse_calls"] == 4
        wan.transformer.reset_attention_backend()
    dispatch = diffusers.models.attention_dispatch
    dispatch._AttentionBackendRegistry._active_backend = (
        dispatch.AttentionBackendName.NATIVE
    )  # which reset leaves behind
    assert torch.equal(run(wan, steps=2), plain)


def test_cpu_offload_hooks():
    pipe = tiny.make("wan21_1.3b")
    dense = run(pipe, steps=1)
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
    with psa.enable(pipe, density=1.0) as handle:
        same(run(pipe, steps=1), dense)
        assert handle.stats["sparse_calls"] > 0


@pytest.mark.parametrize("how", ["float8 storage", "torchao", "optimum.quanto"])
@pytest.mark.parametrize("kind", ["wan21_1.3b", "cogvideo_5b"])
def test_quantised_weights(kind, how):
    """Weights are quantised, q, k and v are not: PSA gets what the pipeline's own attention gets."""
    pipe = tiny.make(kind)
    plain, model = run(pipe, steps=1), pipe.transformer
    if how == "float8 storage":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif how == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason=NO_TORCHAO)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        from optimum import quanto

        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    dense = run(pipe, steps=1)
    assert not torch.equal(dense, plain)
    with psa.enable(pipe, density=1.0) as handle:
        same(run(pipe, steps=1), dense)
        assert handle.stats["sparse_calls"] > 0
    with psa.enable(pipe, density=0.3) as handle:
        sparse = run(pipe, steps=1)
        assert sparse.isfinite().all() and not torch.equal(sparse, dense) and handle.stats["density"] < 0.5
    assert torch.equal(run(pipe, steps=1), dense)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
def test_compiled_transformers_in_one_graph(name, how):
    model, call = build(name)
    torch._dynamo.reset()
    calls = [{**call, "timestep": torch.full_like(call["timestep"], time)} for time in (500, 400)]
    with psa.enable(model, density=0.4) as handle:
        expected = [model(**call, return_dict=False)[0] for call in calls]
        compiled = model
        if how == "wrapper":
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        elif how == "in place":
            model.compile(fullgraph=True, backend="aot_eager")
        else:
            # diffusers lists no repeated blocks for CogVideoX.
            model._repeated_blocks = model._repeated_blocks or ["CogVideoXBlock"]
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        for step, call in enumerate(calls):
            same(compiled(**call, return_dict=False)[0], expected[step])
            assert handle.step[0] == step, "read in every call, not when the graph was made"
    if how == "wrapper":
        with psa.enable(compiled, density=0.4) as handle:
            out = compiled(**call, return_dict=False)[0]
            assert handle.stats["sparse_calls"] > 0 and out.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_flow_through_an_enabled_model(compiled):
    with torch.inference_mode(False):
        torch._dynamo.reset()
        model, call = build("wan")
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager")
        call["hidden_states"] = call["hidden_states"].clone().requires_grad_()
        with psa.enable(model, density=1.0):
            model(**call, return_dict=False)[0].square().sum().backward()
        grad, call["hidden_states"].grad = call["hidden_states"].grad, None
        model(**call, return_dict=False)[0].square().sum().backward()
    same(grad, call["hidden_states"].grad, 1e-3)

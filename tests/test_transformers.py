"""PSA behind transformers' attention interface: exact where everything is kept, off where it does not belong."""

import copy
import inspect

import pytest
import tiny_lm
import torch
from prefill_cases import EXACT, SMALL, SPARSE, close, logits, tokens, watched
from tiny_lm import text_model

import psa
from psa.integrations import transformers as integration
from psa.integrations.prefill import Prefill
from psa.integrations.transformers import enable_model, supports

VLMS = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision", "internvl")
TEXT = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "deepseek", "gpt2")
LOCAL = ("mistral", "gemma2", "gemma3", "gpt_oss")


@pytest.fixture(scope="module")
def llama():
    return text_model("llama")


# -- exact where everything is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT)
def test_density_one_equals_dense_with_padding(kind):
    model, ids = text_model(kind), tokens(3, 150)
    mask = torch.ones_like(ids)
    mask[0, :37], mask[1, -20:] = 0, 0
    mask[2, 40:60] = 0  # padding inside a row
    dense = logits(model, input_ids=ids, attention_mask=mask)
    with enable_model(model, config=EXACT, min_queries=32) as handle:
        close(logits(model, input_ids=ids, attention_mask=mask)[mask.bool()], dense[mask.bool()])
        assert handle.stats["density"] == pytest.approx(1.0)
        assert all(layer["sparse_calls"] == 3 for layer in handle.stats["layers"].values())
    assert torch.equal(logits(model, input_ids=ids, attention_mask=mask), dense)


@pytest.mark.parametrize("kind", VLMS)
def test_vision_language_models(kind):
    model, inputs = tiny_lm.vision_language(kind)
    dense = logits(model, **inputs)
    with enable_model(model, config=EXACT, min_queries=32) as handle:
        assert model.config.text_config._attn_implementation == "psa"
        assert model.config.vision_config._attn_implementation == "sdpa"
        close(logits(model, **inputs), dense)
        assert set(handle.stats["layers"]) == {0, 1} and handle.stats["density"] == pytest.approx(1.0)
    with enable_model(model, config=SPARSE, min_queries=32) as handle:
        assert (logits(model, **inputs) - dense).abs().max() > 1e-3
        assert handle.stats["density"] < 0.7
        known = {k: v for k, v in inputs.items() if k in inspect.signature(model.forward).parameters}
        model.generate(**known, max_new_tokens=3, do_sample=False)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, **inputs), dense)


@pytest.mark.parametrize("kind", LOCAL)
def test_what_psa_does_not_compute_stays_exactly_as_it_was(kind):
    """Sliding windows, soft caps and attention sinks."""
    model, ids = text_model(kind), tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    dense = logits(model, input_ids=ids, attention_mask=mask)
    with enable_model(model, config=SPARSE, min_queries=32) as handle:
        assert torch.equal(logits(model, input_ids=ids, attention_mask=mask)[mask.bool()], dense[mask.bool()])
        assert handle.stats["density"] is None


def test_full_layers_between_sliding_ones_are_sparse():
    kinds = ["sliding_attention", "full_attention"]
    model, ids = text_model("gemma3", layer_types=kinds), tokens(1, 150)
    dense = logits(model, input_ids=ids)
    with enable_model(model, config=EXACT, min_queries=32) as handle:
        close(logits(model, input_ids=ids), dense)
        calls = [(layer["sparse_calls"], layer["dense_calls"]) for layer in handle.stats["layers"].values()]
        assert calls == [(0, 1), (1, 0)]


def test_packed_sequences_and_own_masks_stay_dense(llama):
    ids = tokens(1, 120)
    positions = torch.cat((torch.arange(50), torch.arange(70)))[None]
    lower = torch.ones(1, 1, 120, 120, dtype=torch.bool).tril(3)
    for inputs in ({"position_ids": positions, "use_cache": False}, {"attention_mask": lower}):
        dense = logits(llama, input_ids=ids, **inputs)
        with enable_model(llama, config=SPARSE, min_queries=32):
            assert torch.equal(logits(llama, input_ids=ids, **inputs), dense)


# -- trailing text and vision ----------------------------------------------------------------------------------------


def test_trailing_text_reads_everything():
    model, inputs = tiny_lm.qwen_vl(), tiny_lm.qwen_inputs((2, 16, 16), after=40)
    with enable_model(model, config=SPARSE, min_queries=32):
        _, (plan, *_) = watched(model, **inputs)
    total = inputs["input_ids"].shape[1]
    assert plan.text == (41, "last")
    first_text_block = (total - 41) // 16
    visible = torch.ones(plan.levels.shape[-2:], dtype=torch.bool).tril()
    assert bool((plan.levels[..., first_text_block:, :][..., visible[first_text_block:]] == 1).all())
    assert bool((plan.levels[..., 0] == 1).all())
    assert bool((plan.levels.diagonal(dim1=-2, dim2=-1) == 1).all())
    assert bool((plan.levels > 1).any())


def test_without_known_text_the_last_tokens_are_text_for_a_density_alone(llama):
    for settings, tail in (({"density": 0.3}, 16), ({"density": 0.3, "text_length": 5}, 5), ({"config": SPARSE}, 0)):
        with enable_model(llama, min_queries=32, **settings) as handle:
            _, plans = watched(llama, input_ids=tokens(2, 100))
            assert [plan.text for plan in plans] == [(tail, "last")] * 2 and handle.stats["density"] < 0.9


def test_text_behind_an_earlier_chunks_video_is_trailing_too():
    prefill = Prefill(SPARSE, min_queries=4)
    hook = integration.TrailingText(prefill, (tiny_lm.VIDEO,))
    video, text = torch.tensor([[5, *[tiny_lm.VIDEO] * 6, 7]]), torch.tensor([[8] * 6])

    class Cache:
        length = 0

        def get_seq_length(self):
            return self.length

    cache, module = Cache(), torch.nn.Identity()
    hook(module, (), {"input_ids": text, "past_key_values": cache})
    assert prefill.trailing == [None]
    hook(module, (), {"input_ids": video, "past_key_values": cache})
    assert prefill.trailing == [1]
    cache.length = 8
    hook(module, (), {"input_ids": text, "past_key_values": cache})
    assert prefill.trailing == [6]


def test_vision_tower_on_request():
    model, inputs = tiny_lm.qwen_vl(), tiny_lm.qwen_inputs((1, 16, 16))
    dense = logits(model, **inputs)
    with enable_model(model, config=EXACT, min_queries=32, vision=True) as handle:
        assert model.config.vision_config._attn_implementation == "psa"
        close(logits(model, **inputs), dense)
        assert any(layer["sparse_calls"] for layer in handle.stats["layers"].values())
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_the_automatic_mode_probes_every_call_and_reports_its_error(llama):
    """A prefill is one shot, so no choice is carried over: chunks probe like prompts, and may choose otherwise."""
    ids, config = tokens(2, 256), psa.PSAConfig(**SMALL, density=0.5)
    assert config.mask_mode == "auto"
    with enable_model(llama, config=config, min_queries=32) as handle:
        one, again = logits(llama, input_ids=ids), logits(llama, input_ids=ids)
        assert torch.equal(one, again)
        whole = handle.stats["layers"][0]
        assert 0 < whole["error"] < 1 and whole["density"] == pytest.approx(0.5, abs=0.05)
        handle.reset_stats()
        llama.generate(input_ids=ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=128)
        assert handle.stats["layers"][0]["sparse_calls"] == 2 and handle.stats["layers"][0]["error"] < 1
    strict = psa.PSAConfig(**SMALL, target_error=1e-6, max_density=0.5)
    with enable_model(llama, config=strict, min_queries=32) as handle:
        logits(llama, input_ids=ids)
        layer = handle.stats["layers"][0]
        assert "cannot meet error 1e-06 below density 0.5 and run dense" in layer["notes"][0]
        assert layer["settings"]["dense"] == sum(layer["settings"].values())
    with enable_model(llama, config=SPARSE.replace(mask_mode="proportional"), min_queries=32) as handle:
        logits(llama, input_ids=ids)
        assert handle.stats["layers"][0]["error"] is None
    dense = logits(llama, input_ids=ids)
    with enable_model(llama, config=config.replace(density=1.0), min_queries=32) as handle:
        close(logits(llama, input_ids=ids), dense)


def test_gradients_through_a_sparse_prefill(llama):
    ids = tokens(1, 96)
    with enable_model(llama, config=EXACT, min_queries=32):
        embeddings = llama.get_input_embeddings()(ids).detach().requires_grad_()
        llama(inputs_embeds=embeddings).logits.square().mean().backward()
    sparse, embeddings.grad = embeddings.grad, None
    embeddings = embeddings.detach().requires_grad_()
    llama(inputs_embeds=embeddings).logits.square().mean().backward()
    llama.zero_grad()
    close(sparse, embeddings.grad, 1e-4)


# -- the handle ------------------------------------------------------------------------------------------------------


def test_presets_density_and_errors(llama):
    with enable_model(llama) as handle:
        assert handle.config == psa.presets.get("qwen2.5-vl", "psa_balanced")
    for preset in ("default", "Qwen2.5_VL/default", "Qwen2.5_VL/psa_balanced"):
        with enable_model(llama, preset=preset) as handle:
            assert handle.config == psa.presets.get("qwen2.5-vl", "psa_balanced")
    with enable_model(llama, density=0.3) as handle:
        assert handle.config.density == 0.3 and handle.config.mask_mode == "proportional"
    with enable_model(llama, preset="psa_balanced", density=0.3) as handle:
        assert handle.config.importance == "antidiagonal" and handle.config.density == 0.3
        assert handle.config.mask_mode == "proportional" and handle.config.rank_exponent > 0
        assert not handle.config.use_sim_mask
    dense = logits(llama, input_ids=tokens(1, 300))
    with enable_model(llama, preset="baseline") as handle:
        assert torch.equal(logits(llama, input_ids=tokens(1, 300)), dense) and handle.stats["density"] is None
    for wrong in (
        {"preset": "psa_balance"},
        {"min_queries": 0},
        {"text_length": -1},
        {"preset": "psa_balanced", "config": SPARSE},
        {"density": 2.0},
        {"preset": "baseline", "density": 0.3},
    ):
        with pytest.raises(psa.ConfigError):
            enable_model(llama, **wrong)
    with pytest.raises(psa.ConfigError, match="Linear"):
        enable_model(torch.nn.Linear(2, 2))
    assert llama.config._attn_implementation == "sdpa"
    assert supports(llama) and not supports(torch.nn.Linear(2, 2)) and not supports("text")


def test_options_and_versions_are_checked(llama, monkeypatch):
    with pytest.raises(psa.ConfigError, match="warmup_steps: no option for a model of transformers"):
        psa.enable(llama, density=0.3, warmup_steps=5)
    with pytest.raises(psa.BackendError, match="backend: 'trition' is unknown"):
        psa.enable(llama, density=0.3, backend="trition")
    monkeypatch.delattr("transformers.PreTrainedModel._can_set_attn_implementation")
    with pytest.raises(psa.PSAError, match=r"needs transformers 4\.57 or later, this is \d"):
        psa.enable(llama, density=0.3)


@pytest.mark.parametrize("wrapper", ["peft", "compile"])
def test_wrapped_models(wrapper):
    model, inputs = tiny_lm.qwen_vl(), tiny_lm.qwen_inputs((2, 16, 16), after=40)
    if wrapper == "peft":
        import peft  # of the extra that brings the tests' tools

        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        wrapped = torch.compile(model, backend="eager")
    with psa.enable(wrapped, config=SPARSE, min_queries=32) as handle:
        _, (plan, *_) = watched(wrapped if wrapper == "peft" else model, **inputs)
        assert plan.text == (41, "last") and handle.stats["density"] < 0.9
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not wrapped._forward_pre_hooks and not model._forward_pre_hooks


def test_nested_handles_and_two_models(llama):
    other, ids = text_model("qwen2"), tokens(1, 100)
    dense, other_dense = logits(llama, input_ids=ids), logits(other, input_ids=ids)
    with enable_model(llama, config=SPARSE, min_queries=32):
        sparse = logits(llama, input_ids=ids)
        assert torch.equal(logits(other, input_ids=ids), other_dense)
        with enable_model(llama, config=EXACT, min_queries=32) as inner, enable_model(other, config=EXACT):
            close(logits(llama, input_ids=ids), dense)
            assert "LlamaForCausalLM: 2 layers" in repr(inner)
        assert torch.equal(logits(llama, input_ids=ids), sparse)
    assert torch.equal(logits(llama, input_ids=ids), dense)
    assert not any(hasattr(module, "_psa") for module in llama.modules()) and not llama._forward_pre_hooks


def test_selected_by_name_alone():
    """``attn_implementation="psa"`` without a handle runs the default preset."""
    integration.register()
    model = text_model("llama", attn_implementation="psa")
    model.set_attn_implementation("psa")
    assert logits(model, input_ids=tokens(1, 300)).isfinite().all()


def test_enabled_models_can_be_copied_and_saved(llama, tmp_path):
    ids = tokens(1, 100)
    with enable_model(llama, config=SPARSE, min_queries=32) as handle:
        sparse = logits(llama, input_ids=ids)
        twin = copy.deepcopy(llama)
        handle.disable()
        assert torch.equal(logits(twin, input_ids=ids), sparse)
        torch.save(twin, tmp_path / "model.pt")
        twin.save_pretrained(tmp_path)
    assert "psa" not in (tmp_path / "config.json").read_text()


def test_half_precision(llama):
    model, ids = copy.deepcopy(llama).to(torch.bfloat16), tokens(1, 100)
    with enable_model(model, config=EXACT, min_queries=32):
        out = logits(model, input_ids=ids)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()

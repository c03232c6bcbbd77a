"""Padding, caches and generation: each row what it gets alone, each chunk what one prefill gives it."""

import copy
import inspect

import pytest
import tiny_lm
import torch
from prefill_cases import AUTO, EXACT, SPARSE, TOPK, close, logits, tokens
from tiny_lm import text_model

from psa.integrations.masks import RealTokens, psa_mask
from psa.integrations.transformers import enable_model


@pytest.fixture(scope="module")
def llama():
    return text_model("llama")


# -- each row what it gets alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", (SPARSE, AUTO, TOPK), ids=("proportional", "auto", "topk"))
@pytest.mark.parametrize("side", ("left", "right", "both"))
def test_padded_rows_equal_rows_alone(llama, config, side):
    lengths, total = (150, 97, 33, 20), 160
    ids, mask = torch.zeros(4, total, dtype=torch.long), torch.zeros(4, total, dtype=torch.long)
    for b, n in enumerate(lengths):
        start = {"left": total - n, "right": 0, "both": (total - n) // 2}[side]
        ids[b, start : start + n], mask[b, start : start + n] = tokens(1, n, seed=b)[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with enable_model(llama, config=config, min_queries=32):
        together = logits(llama, input_ids=ids, attention_mask=mask, position_ids=positions)
        for b, n in enumerate(lengths):
            alone = logits(llama, input_ids=tokens(1, n, seed=b))[0]
            close(together[b, mask[b].bool()], alone)


def test_batch_of_videos_with_padding_equals_each_alone():
    model = tiny_lm.qwen_vl()
    short, long = tiny_lm.qwen_inputs((2, 16, 16), before=3, after=4), tiny_lm.qwen_inputs((2, 16, 16), after=21)
    total = long["input_ids"].shape[1]
    batch = {}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        fill = torch.zeros(1, total - short[key].shape[1], dtype=torch.long)
        batch[key] = torch.cat((torch.cat((fill, short[key]), 1), long[key]))
    for key in ("pixel_values_videos", "video_grid_thw"):
        batch[key] = torch.cat((short[key], long[key]))
    with enable_model(model, config=SPARSE, min_queries=32) as handle:
        together = logits(model, **batch)
        assert handle.prefill.trailing == [5, 22]  # the end-of-vision token is text too
        close(together[0, -short["input_ids"].shape[1] :], logits(model, **short)[0])
        close(together[1], logits(model, **long)[0])


@pytest.mark.parametrize("side", ("right", "left", "short"))
def test_generation_from_padded_prompts_starts_as_dense_does(llama, side):
    """Right padding too, where generate() takes the first token from the padding's last row."""
    ids, mask = tokens(3, 120), torch.ones(3, 120, dtype=torch.long)
    if side == "short":
        mask[0, :110], mask[1, 4:] = 0, 0
    else:
        mask[0, slice(-30, None) if side == "right" else slice(30)] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    dense = [llama.generate(**call, **chunks) for chunks in ({}, {"prefill_chunk_size": 48})]
    with enable_model(llama, config=EXACT, min_queries=32):
        assert torch.equal(llama.generate(**call), dense[0])
        assert torch.equal(llama.generate(**call, prefill_chunk_size=48), dense[1])


def test_real_tokens_are_runs_or_indices():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    rows = RealTokens.read(mask).rows
    assert rows[0] == slice(1, 3) and rows[1].tolist() == [0, 2, 3] and rows[2] == slice(0, 0)
    assert RealTokens.read(mask).padded_end == [True, False, True]
    assert RealTokens.read(torch.ones(2, 5, dtype=torch.bool)).rows is None


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", (EXACT, TOPK), ids=("exact", "topk"))
def test_chunked_prefill_equals_one_shot(llama, config):
    ids = tokens(2, 256)
    with enable_model(llama, config=config, min_queries=32):
        whole = logits(llama, input_ids=ids)
        cache, parts = None, []
        for chunk in ids.split(64, dim=1):
            with torch.no_grad():
                out = llama(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)


def test_chunked_prefill_with_padding(llama):
    ids, mask = tokens(2, 192), torch.ones(2, 192, dtype=torch.long)
    mask[0, :70] = 0
    dense = logits(llama, input_ids=ids, attention_mask=mask)
    with enable_model(llama, config=EXACT, min_queries=32):
        cache, parts = None, []
        for start in range(0, 192, 64):
            stop = start + 64
            with torch.no_grad():
                out = llama(
                    input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
                )
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1)[mask.bool()], dense[mask.bool()], 1e-4)


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "chunks": {"do_sample": False, "prefill_chunk_size": 48},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4, "eos_token_id": 159},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_generate(llama, mode):
    batch = 1 if mode == "lookup" else 2
    ids = tokens(batch, 120)
    mask = torch.ones_like(ids)
    if batch == 2:
        mask[0, :30] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, **GENERATION[mode]}
    torch.manual_seed(0)
    dense = llama.generate(**call)
    with enable_model(llama, config=EXACT, min_queries=32) as handle:
        torch.manual_seed(0)
        assert torch.equal(llama.generate(**call), dense)
        assert handle.stats["density"] == pytest.approx(1.0)
        assert handle.stats["layers"][0]["dense_calls"] > 0


def test_static_cache_holds_more_than_the_prompt(llama):
    from transformers import StaticCache

    ids = tokens(1, 100)
    dense = logits(llama, input_ids=ids)
    with enable_model(llama, config=EXACT, min_queries=32):
        cache = StaticCache(config=llama.config, max_cache_len=160)
        steps = []
        for start, stop in ((0, 50), (50, 99), (99, 100)):
            with torch.no_grad():
                steps.append(llama(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    close(torch.cat(steps, 1), dense, 1e-4)


@pytest.mark.slow
def test_compiled_decoding_on_a_static_cache(llama):
    model = copy.deepcopy(llama)
    ids = tokens(1, 100)
    call = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
    dense = model.generate(**call)
    with enable_model(model, config=EXACT, min_queries=32):
        model.forward = torch.compile(model.forward)
        assert torch.equal(model.generate(**call, cache_implementation="static", disable_compile=True), dense)


def test_mask_keeps_two_dimensions():
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    def call(length_q, length_k, offset=0, function=causal_mask_function, mask=None, **rest):
        call = {"batch_size": 2, "kv_length": length_k, "kv_offset": 0, "mask_function": function}
        if "cache_position" in _mask_arguments():
            call["cache_position"] = torch.arange(offset, offset + length_q)
        else:
            call |= {"q_length": length_q, "q_offset": offset}
        return psa_mask(**call, **rest, attention_mask=mask)

    full = torch.ones(2, 40, dtype=torch.bool)
    assert call(40, 40) is None and call(40, 40, mask=full) is None and call(10, 40, 30, mask=full) is None
    assert call(40, 64, mask=full).shape == (2, 40)
    padded = full.clone()
    padded[0, :3] = False
    assert torch.equal(call(40, 40, mask=padded), padded)
    assert call(40, 40, function=sliding_window_causal_mask_function(8), local_size=8).shape == (2, 1, 40, 40)


def _mask_arguments():
    from transformers.masking_utils import sdpa_mask

    return inspect.signature(sdpa_mask).parameters

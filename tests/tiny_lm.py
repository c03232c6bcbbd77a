"""Tiny language and vision-language models of transformers, with inputs, for the tests of the integration."""

import torch

SHARED = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
IMAGE, VIDEO, VISION_START, VISION_END = 150, 151, 152, 153


def rope(sections: bool = True) -> dict:
    scaling = {"rope_type": "default", "rope_theta": 10000.0}
    if sections:
        scaling |= {"mrope_section": [2, 2, 4], "type": "default"}
    return {"rope_scaling": dict(scaling), "rope_parameters": dict(scaling)}


def text_model(kind: str = "llama", **changes):
    """A causal language model with random weights."""
    import transformers as t

    names = {
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "qwen3": ("Qwen3Config", {"head_dim": 16}),
        "mistral": ("MistralConfig", {"sliding_window": 64}),
        "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 20.0}),
        "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64}),
        "gpt_oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": 64, "num_local_experts": 4}),
        "phi3": ("Phi3Config", {}),
        "gpt_neox": ("GPTNeoXConfig", {}),
        "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        "deepseek": (
            "DeepseekV3Config",
            {
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "moe_intermediate_size": 32,
                "first_k_dense_replace": 1,
                "num_key_value_heads": 4,
            },
        ),
    }
    name, extra = names[kind]
    torch.manual_seed(0)
    config = getattr(t, name)(**{**SHARED, **extra, **changes})
    return t.AutoModelForCausalLM.from_config(config).eval()


def qwen_vl(kind: str = "qwen2_5_vl"):
    import transformers as t

    torch.manual_seed(0)
    special = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    text = {**SHARED, **rope()}
    if kind == "qwen2_5_vl":
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
        return t.Qwen2_5_VLForConditionalGeneration(config).eval()
    if kind == "qwen2_vl":
        vision = {
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        config = t.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
        return t.Qwen2VLForConditionalGeneration(config).eval()
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = t.Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=vision, **special)
    return t.Qwen3VLForConditionalGeneration(config).eval()


def qwen_inputs(grid=(2, 16, 16), batch: int = 1, before: int = 5, after: int = 9, video: bool = True) -> dict:
    """A prompt with one image or video of ``grid`` patches (T, H, W); T*H*W/4 tokens."""
    g = torch.Generator().manual_seed(1)
    t, h, w = grid
    count, marker = t * h * w // 4, VIDEO if video else IMAGE
    row = [*range(2, 2 + before), VISION_START, *[marker] * count, VISION_END, *range(30, 30 + after)]
    ids = torch.tensor([row] * batch)
    types = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    pixels = torch.randn(batch * t * h * w, 3 * 2 * 4 * 4, generator=g)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        names[0]: pixels,
        names[1]: torch.tensor([[t, h, w]] * batch),
    }


def llava_onevision():
    import transformers as t

    torch.manual_seed(0)
    vision = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = t.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=t.Qwen2Config(**SHARED),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    )
    return t.LlavaOnevisionForConditionalGeneration(config).eval()


def llava_inputs(frames: int = 10) -> dict:
    count = frames * 16 + 1  # 8×8 patches pooled to 4×4, and one newline
    ids = torch.tensor([[2, 3, 4, *[VIDEO] * count, 40, 41, 42, 43]])
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, frames, 3, 32, 32, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def internvl():
    import transformers as t

    torch.manual_seed(0)
    vision = t.InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32],
        patch_size=[4, 4],
    )  # fmt: skip
    config = t.InternVLConfig(
        vision_config=vision, text_config=t.Qwen2Config(**SHARED), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return t.InternVLForConditionalGeneration(config).eval()


def internvl_inputs(tiles: int = 10) -> dict:
    ids = torch.tensor([[2, 3, 4, *[IMAGE] * (16 * tiles), 40, 41, 42, 43]])
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(tiles, 3, 32, 32, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def vision_language(kind: str):
    """(model, inputs) of one of the vision-language kinds."""
    if kind == "llava_onevision":
        return llava_onevision(), llava_inputs()
    if kind == "internvl":
        return internvl(), internvl_inputs()
    if kind == "qwen3_vl":  # its videos are one image span per frame
        return qwen_vl(kind), qwen_inputs((1, 16, 32), video=False)
    return qwen_vl(kind), qwen_inputs()


def save_qwen_folder(path, kind: str = "qwen2_5_vl"):
    """A model folder as on the hub: tiny weights, byte-level tokenizer, image settings. Returns the path."""
    import json

    import transformers as t
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    ids = {name: tokenizer.token_to_id(name) for name in specials}
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    SHARED["vocab_size"], before = len(alphabet) + len(specials), SHARED["vocab_size"]
    model = qwen_vl(kind)
    SHARED["vocab_size"] = before
    config = model.config
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    model.save_pretrained(path)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if kind == "qwen2_5_vl" else "Qwen2VLProcessor",
        "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 256, "max_pixels": 8192,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

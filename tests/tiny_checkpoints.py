"""Tiny checkpoints of the true diffusers classes, with random weights: what `psa generate` loads in tests."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

KINDS = ("wan21_1.3b", "wan21_14b", "wan22_5b", "wan22_a14b", "cogvideo1.5_5b", "cogvideo_5b", "cogvideo_5b_lora")
SIZES = {"wan22_5b": (352, 320)}
"""Width, height: with 17 frames at least 4 query blocks and 8 KV blocks of each model's presets."""
SIZE, FRAMES = (224, 208), 17


def make(kind: str, *, image: bool = False, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline with the structure of a known model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _cogvideo(kind, image) if kind.startswith("cogvideo") else _wan(kind, image)


def save(kind: str, folder: Path, **options) -> Path:
    make(kind, **options).save_pretrained(folder)
    return folder


def run(pipe, steps=4, **changes):
    """The latents that a pipeline makes of one prompt and seed."""
    pipe.set_progress_bar_config(disable=True)
    settings = dict(
        prompt="a cat", guidance_scale=5.0, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(0), width=SIZE[0], height=SIZE[1], num_frames=FRAMES,
    )  # fmt: skip
    return pipe(**{**settings, **changes}).frames


def same(a, b, tolerance=1e-4):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()


def lora(folder: Path) -> Path:
    """LoRA weights for the tiny CogVideoX, in diffusers' names."""
    weights = {}
    for layer in range(2):
        for name in ("to_q", "to_k", "to_v"):
            key = f"transformer.transformer_blocks.{layer}.attn1.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, 64) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(64, 4) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def tokenizer() -> PreTrainedTokenizerFast:
    characters = {chr(code): number for number, code in enumerate(range(32, 127), 3)}
    model = models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **characters}, unk_token="<unk>")
    tokens = Tokenizer(model)
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _text(kind):
    config, encoder = (UMT5Config, UMT5EncoderModel) if kind.startswith("wan") else (T5Config, T5EncoderModel)
    return encoder(config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).eval()


def wan_transformer(kind: str = "wan21_1.3b", channels: int = 16, **changes) -> WanTransformer3DModel:
    settings = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=channels, out_channels=channels,
        text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return sharpen(WanTransformer3DModel(**{**settings, **changes}).eval())


def sharpen(model):
    """Larger query projections, so that attention is peaked enough for its approximation to show."""
    for name, weight in model.named_parameters():
        if name.endswith(("attn1.norm_q.weight", "attn1.to_q.weight")):
            weight.data.mul_(3)
    return model


def _wan(kind, image):
    five = kind == "wan22_5b"
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=48 if five else 16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **(dict(latents_mean=[0.0] * 48, latents_std=[1.0] * 48, is_residual=True, patch_size=2, in_channels=12,
                out_channels=12, scale_factor_spatial=16) if five else {}),
    ).eval()  # fmt: skip
    channels = 48 if five else 16
    wide = {"in_channels": channels * 2 + 4} if image and not five else {}
    two = kind == "wan22_a14b"
    parts = dict(
        tokenizer=tokenizer(), text_encoder=_text(kind), vae=vae,
        transformer=wan_transformer(kind, channels, **wide),
        transformer_2=wan_transformer(kind, channels, **wide) if two else None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.875 if two else None, expand_timesteps=five,
    )  # fmt: skip
    if image:
        return WanImageToVideoPipeline(image_encoder=None, image_processor=None, **parts)
    return WanPipeline(**parts)


def _cogvideo(kind, image):
    newer = kind == "cogvideo1.5_5b"
    text_length = 226
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32,
        in_channels=32 if image else 16, out_channels=16, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=SIZE[0] // 8, sample_height=SIZE[1] // 8, sample_frames=FRAMES,
        patch_size=2, patch_size_t=2 if newer else None, max_text_seq_length=text_length,
        use_rotary_positional_embeddings=True, patch_bias=not newer,
        **(dict(use_learned_positional_embeddings=False)),
    ).eval()  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=16, layers_per_block=1, norm_num_groups=2,
        sample_height=SIZE[1], sample_width=SIZE[0],
    ).eval()  # fmt: skip
    pipeline = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    return pipeline(
        tokenizer=tokenizer(), text_encoder=_text(kind), vae=vae, transformer=sharpen(transformer),
        scheduler=CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
    )  # fmt: skip

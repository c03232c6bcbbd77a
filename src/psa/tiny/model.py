"""The parts of the tiny model: Wan's own classes at a small size, with a tokenizer for the grammar's words."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .scenes import BACKDROPS, COLOURS, MOTIONS, SHAPES, SIZES

CHANNELS = 16  # of a latent
SPATIAL, TEMPORAL = 8, 2  # pixels and frames per latent


def vocabulary() -> dict[str, int]:
    """The grammar's words, after padding, end and unknown."""
    phrases = ["a and over", *SIZES, *COLOURS, *SHAPES, *MOTIONS, *BACKDROPS]
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    return {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}


def make_tokenizer() -> Any:
    """A transformers tokenizer of lower-case words that ends every text with ``</s>``, as UMT5's does."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_text_encoder() -> Any:
    """A two-layer UMT5 encoder, 64 wide."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(vocabulary()), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> Any:
    """Wan's causal VAE on 4 × 4 patches: 8 × 8 pixels and 2 frames to a latent of 16 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=32, z_dim=CHANNELS, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], patch_size=4,
        in_channels=48, out_channels=48, scale_factor_spatial=SPATIAL, scale_factor_temporal=TEMPORAL,
        latents_mean=mean or [0.0] * CHANNELS, latents_std=std or [1.0] * CHANNELS,
    )  # fmt: skip


def make_transformer() -> Any:
    """Wan's transformer: 6 layers of 2 heads of 64, one token per latent."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=64, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=64, freq_dim=128, ffn_dim=512, num_layers=6, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )  # fmt: skip


def encode(vae: Any, video: Tensor) -> Tensor:
    """Normalised latents ``[batch, 16, 1 + (frames - 1) / 2, height / 8, width / 8]`` of a video
    ``[batch, frames, 3, height, width]`` in 0…1."""
    latents = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return (latents - spread(vae.config.latents_mean, latents)) / spread(vae.config.latents_std, latents)


def spread(values: list[float], like: Tensor) -> Tensor:
    """One value per channel, shaped to go with ``like`` ``[batch, 16, frames, height, width]``."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)


def save(
    folder: str | Path, vae: nn.Module, text_encoder: nn.Module, transformer: nn.Module, *, flow_shift: float
) -> None:
    """Writes a checkpoint that ``WanPipeline.from_pretrained`` loads; weights as float16."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    for part in (text_encoder, vae, transformer):
        nn.Module.to(
            part, torch.float16
        )  # diffusers' own warns that some layers compute in float32; loading restores it
    pipe = WanPipeline(make_tokenizer(), text_encoder, vae, scheduler, transformer)  # type: ignore[reportArgumentType]
    pipe.save_pretrained(folder)

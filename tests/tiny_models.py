"""Tiny diffusers transformers, each with the arguments of one call: a 4×12×13 grid, 16 text tokens."""

import inspect

import diffusers
import torch
from tiny_checkpoints import sharpen

T, H, W, TEXT = 4, 12, 13, 16
NARROW = dict(num_attention_heads=2, attention_head_dim=24)


def build(name):
    """(model, keyword arguments of its forward); the same for the same name."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        model, call = MODELS[name]()
        return sharpen(model.eval()), call


def _text(width=32, batch=2, length=TEXT):
    return torch.randn(batch, length, width)


def _latents(*shape, batch=2):
    return torch.randn(batch, *shape)


def _time(batch=2):
    return torch.full((batch,), 500.0)


def _mask(length=TEXT):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return mask


def _like_wan(name, **changes):
    settings = dict(
        patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32, **NARROW,
    )  # fmt: skip
    model = getattr(diffusers, name)(**{**settings, **changes})
    return model, dict(hidden_states=_latents(16, T, 2 * H, 2 * W), timestep=_time(), encoder_hidden_states=_text())


def _vace():
    model, call = _like_wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=16)
    return model, {**call, "control_hidden_states": _latents(16, T, 2 * H, 2 * W)}


def _cogvideox(patch_size_t=None):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, time_embed_dim=8, text_embed_dim=32, num_layers=2,
        sample_width=2 * W, sample_height=2 * H, patch_size_t=patch_size_t, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    frames = 6 if patch_size_t else T
    grid = frames // (patch_size_t or 1) * H * W
    angles = torch.rand(grid, 16).repeat_interleave(2, 1)
    call = dict(
        hidden_states=_latents(frames, 16, 2 * H, 2 * W), timestep=_time().long(), encoder_hidden_states=_text()
    )
    return model, {**call, "image_rotary_emb": (angles.cos(), angles.sin())}


def _hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32,
        pooled_projection_dim=8, rope_axes_dim=(4, 10, 10), **NARROW,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(4, T, 2 * H, 2 * W), timestep=_time(), encoder_hidden_states=_text(),
        encoder_attention_mask=_mask(), pooled_projections=torch.randn(2, 8), guidance=torch.full((2,), 6000.0),
    )  # fmt: skip


def _hunyuan15():
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=24,
        image_embed_dim=8, rope_axes_dim=(4, 10, 10), target_size=16, task_type="t2v", **NARROW,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(4, T, H, W), timestep=_time(), encoder_hidden_states=_text(),
        encoder_attention_mask=_mask(), encoder_hidden_states_2=_text(24, length=8),
        encoder_attention_mask_2=_mask(8), image_embeds=torch.zeros(2, 4, 8),
    )  # fmt: skip


def _ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(T * H * W, 8), encoder_hidden_states=_text(), timestep=_time(),
        encoder_attention_mask=_mask(), num_frames=T, height=H, width=W,
    )  # fmt: skip


def _flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=8,
        axes_dims_rope=(4, 10, 10), **NARROW,
    )  # fmt: skip
    height, width = 2 * H, 2 * W
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
    return model, dict(
        hidden_states=_latents(height * width, 4), encoder_hidden_states=_text(), pooled_projections=torch.randn(2, 8),
        timestep=_time() / 1000, img_ids=ids.flatten(0, 1), txt_ids=torch.zeros(TEXT, 3),
    )  # fmt: skip


def _qwen():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 10, 10), **NARROW
    )
    height, width = 2 * H, 2 * W
    call = dict(
        hidden_states=_latents(height * width, 4), encoder_hidden_states=_text(), timestep=_time() / 1000,
        encoder_hidden_states_mask=torch.ones(2, TEXT, dtype=torch.long), img_shapes=[[(1, height, width)]] * 2,
    )  # fmt: skip
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # until diffusers 0.37
        call["txt_seq_lens"] = [TEXT] * 2
    return model, call


def _mochi():
    model = diffusers.MochiTransformer3DModel(
        num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=32, time_embed_dim=8, **NARROW
    )
    return model, dict(
        hidden_states=_latents(4, T, 2 * H, 2 * W), encoder_hidden_states=_text(), timestep=_time(),
        encoder_attention_mask=_mask().bool(),
    )  # fmt: skip


def _allegro():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = diffusers.AllegroTransformer3DModel(
        num_layers=2, cross_attention_dim=48, sample_height=2 * H, sample_width=2 * W, sample_frames=T,
        caption_channels=32, **NARROW,
    )  # fmt: skip
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        24, crops_coords=((0, 0), (H, W)), grid_size=(H, W), temporal_size=T, interpolation_scale=(1, 1, 1)
    )
    places = torch.cartesian_prod(*(torch.as_tensor(g).long() for g in (grid_t, grid_h, grid_w)))
    places = places.T.reshape(3, 1, -1)
    return model, dict(
        hidden_states=_latents(4, T, 2 * H, 2 * W), encoder_hidden_states=_text(), timestep=_time(),
        encoder_attention_mask=_mask(), image_rotary_emb=(tuple(freqs), places),
    )  # fmt: skip


def _cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(T, 32, 32),
        rope_scale=(1.0, 1.0, 1.0), extra_pos_embed_type=None, concat_padding_mask=False, num_attention_heads=2,
        attention_head_dim=24,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(4, T, 2 * H, 2 * W), encoder_hidden_states=_text(), timestep=_time(), fps=16
    )


def _ltx2():
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=12,
        audio_cross_attention_dim=24, num_layers=2, caption_channels=32, rope_double_precision=False,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(T * H * W, 8), audio_hidden_states=_latents(9, 4), encoder_hidden_states=_text(),
        audio_encoder_hidden_states=_text(), timestep=torch.full((2, T * H * W), 500.0),
        audio_timestep=torch.full((2, 9), 500.0), num_frames=T, height=H, width=W, fps=25.0, audio_num_frames=9,
    )  # fmt: skip


def _kandinsky():
    """Channels last, one video at a time."""
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=48, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 8, 8), visual_cond=False,
        attention_type="regular",
    )  # fmt: skip
    for weight in model.parameters():
        if not weight.any():  # as its modulations begin
            torch.nn.init.normal_(weight, std=0.2)
    return model, dict(
        hidden_states=_latents(T, 2 * H, 2 * W, 4, batch=1), encoder_hidden_states=_text(batch=1), timestep=_time(1),
        pooled_projections=torch.randn(1, 8), visual_rope_pos=[torch.arange(n) for n in (T, H, W)],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip


def _sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=8, pos_embed_max_size=48,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(4, 4 * H, 4 * W), encoder_hidden_states=_text(), pooled_projections=torch.randn(2, 8),
        timestep=_time(),
    )  # fmt: skip


def _lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=32, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(8, 8, 8), axes_lens=(64, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    return model, dict(
        hidden_states=_latents(4, 4 * H, 4 * W), encoder_hidden_states=_text(), timestep=_time() / 1000,
        encoder_attention_mask=_mask().bool(),
    )  # fmt: skip


MODELS = {
    "wan": lambda: _like_wan("WanTransformer3DModel", qk_norm="rms_norm_across_heads"),
    "wan vace": _vace,
    "skyreels": lambda: _like_wan("SkyReelsV2Transformer3DModel"),
    "cogvideox": _cogvideox,
    "cogvideox1.5": lambda: _cogvideox(2),
    "hunyuan": _hunyuan,
    "hunyuan1.5": _hunyuan15,
    "ltx": _ltx,
    "flux": _flux,
    "qwen": _qwen,
    "mochi": _mochi,
    "allegro": _allegro,
    "cosmos": _cosmos,
    "kandinsky": _kandinsky,
    "sd3": _sd3,
    "lumina2": _lumina2,
}
if hasattr(diffusers, "LTX2VideoTransformer3DModel"):  # since diffusers 0.37
    MODELS["ltx2"] = _ltx2

"""PSA for any model of transformers whose decoder uses its attention interface: causal prefill over long inputs.

    handle = psa.enable(model, preset="psa_balanced")     # or density=0.35
    model.generate(...)
    handle.stats                                          # density per layer
    handle.disable()                                      # or: with psa.enable(model, density=0.35): ...

Nothing is replaced or patched: the implementation ``"psa"`` is registered with transformers and selected for the text
decoder. Decoding, short prompts, sliding-window layers, masks of a model's own and the vision tower stay as they were.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import presets
from ..backends import check_name
from ..config import PSAConfig
from ..errors import ConfigError
from ..functional import resolve_config
from .masks import psa_mask
from .prefill import NAME, Layer, Prefill, psa_attention_forward

RETRIEVAL = PSAConfig(mask_mode="proportional", rank_exponent=3.0)
"""What ``density=`` alone changes: proportional by importance and rank (see benchmarks/long_context.py)."""
SECTION = "qwen2.5-vl"
"""The section of the presets file that serves every model of transformers."""


def register() -> None:
    """Makes ``attn_implementation="psa"`` known to transformers. :func:`enable_model` does so too."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, psa_attention_forward)
    AttentionMaskInterface.register(NAME, psa_mask)


def supports(model: object) -> bool:
    """Whether ``model`` is a transformers model with causal layers behind its attention interface."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return False
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        return False
    if not hasattr(PreTrainedModel, "_can_set_attn_implementation"):
        raise ImportError("no _can_set_attn_implementation")
    return bool(_owners(base, list(_decoder_layers(base))))


def unwrap(model: Any) -> Any:
    """The model inside the wrappers of torch.compile and of PEFT."""
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def _inside(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return model
    if "_orig_mod" in model._modules:
        return model._orig_mod
    # transformers' own models have a method of PEFT's name, for adapters that they loaded themselves.
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def enable_model(
    model: Any,
    preset: str | None = None,
    config: PSAConfig | None = None,
    density: float | None = None,
    *,
    attention_config: str | None = None,
    min_queries: int = 256,
    text_length: int | None = None,
    vision: bool = False,
    backend: str = "auto",
) -> "Handle":
    """Selects causal PSA for the prefill of a model's text decoder.

    Args:
        model: a transformers ``PreTrainedModel`` (4.57 or later), also inside torch.compile or PEFT.
        preset: of section ``Qwen2.5_VL``, ``"section/preset"``, or ``"default"``, which it is without ``config`` and
            ``density``. Dense for ``"baseline"``.
        config: settings of your own, instead of a preset.
        density: share of the lower triangle to keep, proportional by importance and rank. With a preset, in its blocks
            and with its importance; with a config, as in :func:`psa.psa_attention`. Alone, it also fits the blocks to
            the context: 128×64 from 16k tokens, down to 16×16 below 4k.
        attention_config: a presets file laid over the built-in one.
        min_queries: prefills, and chunks of one, with no more queries than this stay dense.
        text_length: trailing tokens that always read, and are read, in full. Default: those behind the last image or
            video token of the input; without such a token the last 16 with ``density`` alone, else none.
        vision: also use bidirectional PSA in the vision tower, for images or windows of more than ``min_queries``.
        backend: see :func:`psa.psa_attention`.

    Raises:
        ConfigError: for a model, preset or option that cannot be used.
    """
    if isinstance(min_queries, bool) or not isinstance(min_queries, int) or min_queries < 1:
        raise ConfigError(f"min_queries: {min_queries!r} is not a whole number from 1")
    if text_length is not None and (
        isinstance(text_length, bool) or not isinstance(text_length, int) or text_length < 0
    ):
        raise ConfigError(f"text_length: {text_length!r} is not a whole number from 0")
    settings = choose_config(preset, config, density, attention_config)
    check_name(backend)
    if not supports(model):
        raise ConfigError(
            f"{type(model).__name__} has no causal layers behind transformers' attention interface; "
            "psa.enable needs a PreTrainedModel (transformers 4.57 or later) with a text decoder"
        )
    register()
    by_density = density is not None and preset is None and config is None
    return Handle(model, Prefill(settings, min_queries, text_length, vision, backend, by_density))


def choose_config(
    preset: str | None, config: PSAConfig | None, density: float | None, attention_config: str | None = None
) -> PSAConfig:
    """The settings that :func:`enable_model` makes of its arguments."""
    if config is not None and preset is not None:
        raise ConfigError("preset: config and preset exclude each other; give one")
    if config is not None:
        return resolve_config(config, density)
    if preset is None and density is not None:
        return RETRIEVAL.replace(density=density)
    found = presets.get(SECTION, preset, attention_config)
    if density is None:
        return found
    ranked = {"mask_mode": "proportional", "rank_exponent": RETRIEVAL.rank_exponent, "density": density}
    return found.replace(**ranked, use_sim_mask=False)  # where nothing is dropped, a cap would overrule the density


class Handle:
    """An enabled model: what it measured, and the way back. Nested handles end in reverse order."""

    def __init__(self, model: Any, prefill: Prefill) -> None:
        self.model = model
        self.prefill = prefill
        called, model = model, unwrap(model)
        decoder = list(_decoder_layers(model))
        chosen: list[Any] = decoder + (list(_vision_layers(model, decoder)) if prefill.vision else [])
        self._layers = [(module, getattr(module, "_psa", None)) for module in chosen]
        self._owners = [(owner, owner.config._attn_implementation) for owner in _owners(model, chosen)]
        for i, (module, before) in enumerate(self._layers):
            dense = before.dense if before else module.config._attn_implementation
            index = getattr(module, "layer_idx", None)
            module._psa = Layer(prefill, index if isinstance(index, int) else i, dense or "eager")
        for owner, _ in self._owners:
            _select(owner, NAME)
        # A wrapper may call the forward of its model past the hooks; reading the same call twice does no harm.
        read, modules = TrailingText(prefill, _visual_ids(model)), {id(m): m for m in (called, model)}
        self._hooks = [m.register_forward_pre_hook(read, with_kwargs=True) for m in modules.values()]

    @property
    def config(self) -> PSAConfig:
        return self.prefill.config

    @property
    def stats(self) -> dict[str, Any]:
        """``{"density", "layers": {index: {"density", "error", "sparse_calls", "dense_calls", "settings", "notes"}}}``.

        Over sparse calls; reading it waits for the device. ``density`` is None before the first; ``error`` is the
        relative error that the automatic mode measured, None in other modes. ``settings`` (with the number of heads)
        and ``notes``, such as heads that run dense as no density meets ``target_error``, are those of the last call.
        """
        layers = {i: layer.summary() for i, layer in sorted(self.prefill.stats.items())}
        offered = sum(s.offered for s in self.prefill.stats.values())
        kept = sum(float(s.kept) for s in self.prefill.stats.values())
        return {"density": kept / offered if offered else None, "layers": layers}

    def reset_stats(self) -> None:
        self.prefill.stats.clear()

    def disable(self) -> None:
        """Puts everything back as it was; a second call does nothing."""
        for owner, name in self._owners:
            _select(owner, name)
        for module, before in self._layers:
            if before is None:
                module.__dict__.pop("_psa", None)
            else:
                module._psa = before
        for hook in self._hooks:
            hook.remove()
        self._owners, self._layers = [], []

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = f"{len(self._layers)} layers" if self._layers else "disabled"
        return f"<psa on {type(self.model).__name__}: {state}>"


class TrailingText:
    """A forward pre-hook: counts each row's real tokens behind its last image or video token, before a long prefill.

    Later chunks of a prefill that hold no such token are text throughout, once an earlier chunk held one.
    """

    def __init__(self, prefill: Prefill, visual_ids: tuple[int, ...]) -> None:
        self.prefill = prefill
        self.visual_ids = visual_ids

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = next((x for x in args if isinstance(x, Tensor) and x.ndim == 2), None)
        self.prefill.trailing = None
        if ids is not None and ids.shape[1] <= self.prefill.min_queries:
            return  # before anything is read from the device: this is every decoded token
        visual = self._visual(ids, kwargs.get("mm_token_type_ids"))
        if visual is None or visual.shape[1] <= self.prefill.min_queries:
            return
        real = torch.ones_like(visual)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= visual.shape[1]:
            real = mask[:, -visual.shape[1] :].to(visual.device).bool()
        behind = visual.flip(-1).cumsum(-1).flip(-1) == 0
        counts = torch.stack(((behind & real).sum(-1), visual.sum(-1)), -1).tolist()
        cache = kwargs.get("past_key_values")
        started = cache is not None and int(cache.get_seq_length()) > 0
        seen = self.prefill.seen_visual if started and len(self.prefill.seen_visual) == len(counts) else None
        seen = seen or [False] * len(counts)
        self.prefill.seen_visual = [before or here > 0 for before, (_, here) in zip(seen, counts, strict=True)]
        known = zip(counts, self.prefill.seen_visual, strict=True)
        self.prefill.trailing = [text if visual_seen else None for (text, _), visual_seen in known]

    def _visual(self, ids: Tensor | None, types: Tensor | None) -> Tensor | None:
        if isinstance(types, Tensor) and types.ndim == 2 and (ids is None or types.shape == ids.shape):
            return types != 0
        if ids is None or not self.visual_ids:
            return None
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))


# -- a model's parts -------------------------------------------------------------------------------------------------


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that choose their attention by ``self.config._attn_implementation``."""
    for module in model.modules():
        if hasattr(module, "is_causal") and hasattr(getattr(module, "config", None), "_attn_implementation"):
            yield module


def _decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in _attention_modules(model):
        if getattr(module, "is_causal", False) is True and getattr(module, "layer_idx", None) is not None:
            yield module


def _vision_layers(model: nn.Module, decoder: list[nn.Module]) -> Iterator[nn.Module]:
    configs = {id(module.config) for module in decoder}
    for module in _attention_modules(model):
        if getattr(module, "is_causal", True) is False and id(module.config) not in configs:
            yield module


def _owners(model: nn.Module, layers: list[nn.Module]) -> list[Any]:
    """The outermost pretrained submodel that holds each config of ``layers``, where its implementation can be set."""
    from transformers import PreTrainedModel

    wanted = {id(module.config) for module in layers}
    owners: dict[int, Any] = {}
    for module in model.modules():
        if (
            isinstance(module, PreTrainedModel)
            and id(module.config) in wanted
            and module._can_set_attn_implementation()
        ):
            owners.setdefault(id(module.config), module)
    return list(owners.values())


def _select(owner: Any, name: str) -> None:
    """``set_attn_implementation`` for this submodel's own config; its other sub-configs keep theirs."""
    others = {key: getattr(owner.config, key)._attn_implementation for key in _sub_configs(owner.config)}
    owner.set_attn_implementation({**others, "": name} if others else name)


def _sub_configs(config: Any) -> list[str]:
    return [key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is not None]


def _visual_ids(model: Any) -> tuple[int, ...]:
    """The ids of image and video placeholders, by whatever name the model's config has for them."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    configs = [model.config, *(getattr(model.config, key) for key in _sub_configs(model.config))]
    found = (getattr(config, name, None) for config in configs for name in names)
    return tuple(sorted({value for value in found if isinstance(value, int)}))

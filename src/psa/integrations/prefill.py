"""What transformers calls: the attention function of the implementation named ``"psa"``.

It runs PSA on long queries, each row of a padded batch on its real tokens alone, and gives all other calls to the
attention that the model had before: short ones, and those whose mask says more than *causal, these tokens are real*.
"""

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..config import PSAConfig
from ..errors import BackendError
from ..functional import psa_attention
from ..plan import Plan, choice_notes
from ..state import choice_facts
from .masks import RealTokens, bottom_right

NAME = "psa"
TAIL = 16
"""Last tokens of a call that count as trailing text where none is known and the density is all that was asked for."""
UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "sliding_window",
    "cache",
    "output_attentions",
    "head_mask",
)
"""Keyword arguments of a model's attention that, where set, mean something PSA does not compute."""
EAGER_ONLY = ("softcap", "s_aux", "sinks")
"""Those that SDPA does not compute either."""


@dataclass
class LayerStats:
    """What one layer did: calls, and the work kept and offered (query-key pairs). Tensors: read without a sync.

    probed, lost: pairs of calls that were probed, and those times the relative error measured (mean over heads).
    config, choice: of the last sparse call, where the automatic mode made one.
    """

    sparse_calls: int = 0
    dense_calls: int = 0
    kept: Tensor | float = 0.0
    offered: float = 0.0
    probed: float = 0.0
    lost: Tensor | float = 0.0
    config: PSAConfig | None = None
    choice: Tensor | None = None

    def add(self, plan: Plan, pairs: float) -> None:
        self.sparse_calls += 1
        self.kept = self.kept + plan.density_per_head.mean().double() * pairs
        self.offered += pairs
        if plan.error is not None:
            self.lost = self.lost + plan.error.mean().double() * pairs
            self.probed += pairs
        self.config, self.choice = plan.config, plan.choice

    def summary(self) -> dict[str, Any]:
        return {
            "density": float(self.kept) / self.offered if self.offered else None,
            "error": float(self.lost) / self.probed if self.probed else None,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "settings": {} if self.choice is None else choice_facts(self.choice)["settings"],
            "notes": [] if self.choice is None or self.config is None else choice_notes(self.config, self.choice),
        }


@dataclass
class Prefill:
    """The settings that the layers of one enabled model share, and what the current forward pass knows.

    Attributes:
        min_queries: calls with no more queries than this stay dense: decoding, short prompts.
        text_length: trailing text tokens that are always read in full; None finds them in the model's inputs.
        vision: also bidirectional calls without a mask, as vision towers make.
        by_density: nothing but a density was asked for: blocks are fitted to the context, as pinned blocks would take
            most of a low density in a short one, and the last ``TAIL`` tokens count as text where none is known.
        trailing: real text tokens behind the last image or video token, per row of the current forward pass; None for
            rows without such a token.
    """

    config: PSAConfig
    min_queries: int = 256
    text_length: int | None = None
    vision: bool = False
    backend: str = "auto"
    by_density: bool = False
    trailing: list[int | None] | None = None
    seen_visual: list[bool] = field(default_factory=list)
    stats: dict[int, LayerStats] = field(default_factory=dict)
    rows: RealTokens | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "trailing": None}

    def trailing_text(self, batch: int, length_q: int) -> list[int]:
        unknown = TAIL if self.by_density else 0
        found: list[int | None] = [None] * batch
        if self.text_length is not None:
            found = [self.text_length] * batch
        elif self.trailing is not None and len(self.trailing) == batch:
            found = self.trailing
        return [min(unknown if count is None else count, length_q) for count in found]


@lru_cache(maxsize=64)
def fitted(config: PSAConfig, length: int) -> PSAConfig:
    """``config`` with blocks of a 128th of the context (a power of two of at least 16, at most its own).

    Where one mean per block would take more than a quarter of the density, the least important blocks are dropped.
    """
    side = 1 << max(4, (max(1, length) // 128).bit_length() - 1)
    block_m, block_n = min(config.block_m, side), min(config.block_n, side)
    rows, cols = max(2, min(config.importance_rows, block_m // 8)), max(2, min(config.importance_cols, block_n // 8))
    keep_all = config.density is None or config.density * block_n >= 4
    return config.replace(
        block_m=block_m, block_n=block_n, importance_rows=rows, importance_cols=cols, keep_all=keep_all
    )


@dataclass(frozen=True)
class Layer:
    """One attention module: where its settings are, and what it used before."""

    prefill: Prefill
    index: int
    dense: str = "sdpa"


def psa_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' interface asks for it.

    Args:
        query: [B, H, Lq, D]. key, value: [B, Hkv, Lk, D], not repeated; the value's D may differ.
        attention_mask: None, or what :func:`psa_mask` returned, or a model's own 4-D mask (then dense).

    Returns:
        out [B, Lq, H, D], and the weights where a dense eager implementation gives them.
    """
    layer: Layer = getattr(module, "_psa", None) or _default_layer()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.ndim == 2:
        causal = True  # psa_mask says so, where models that expect causality in their mask pass False
    if attention_mask is not None and attention_mask.ndim == 2 and key.shape[2] > attention_mask.shape[1]:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    if _serves(layer.prefill, module, query, key, attention_mask, causal, dropout, kwargs):
        out = _sparse(layer, query, key, value, attention_mask, scaling, causal)
        return out.transpose(1, 2).contiguous(), None
    if not torch.compiler.is_compiling():
        layer.prefill.stats.setdefault(layer.index, LayerStats()).dense_calls += 1
    call = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return _dense(layer.dense, module, query, key, value, attention_mask, causal, call)


def _serves(
    prefill: Prefill,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    kwargs: dict[str, Any],
) -> bool:
    """Whether a call is a long prefill that PSA computes."""
    if query.shape[2] <= prefill.min_queries or prefill.config.type == "dense" or dropout:
        return False
    if _is_local(module) or any(kwargs.get(name) is not None and kwargs[name] is not False for name in UNSUPPORTED):
        return False
    if causal:
        return key.shape[2] >= query.shape[2] and (mask is None or mask.ndim == 2)
    return prefill.vision and mask is None and key.shape[2] == query.shape[2]


def _is_local(module: torch.nn.Module) -> bool:
    """A sliding-window or chunked layer, whatever its mask says for a short sequence."""
    if getattr(module, "sliding_window", None) or getattr(module, "is_sliding", False):
        return True
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not types or not isinstance(index, int) or index >= len(types):
        return False
    return types[index] in ("sliding_attention", "chunked_attention")


# -- PSA -------------------------------------------------------------------------------------------------------------


def _sparse(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """PSA over [B, H, Lq, D]: the whole batch at once, or row by row where padding or trailing text differ."""
    prefill, batch, length_q = layer.prefill, q.shape[0], q.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    width = v.shape[-1]
    if width != q.shape[-1]:  # some models' values are narrower than their keys; zeros change nothing
        wide = max(width, q.shape[-1])
        q, k, v = (pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    padding = _real_tokens(prefill, mask)
    rows = None if padding is None else padding.rows
    texts = prefill.trailing_text(batch, length_q) if causal else [0] * batch
    if rows is None and len(set(texts)) == 1:
        return _attend(layer, q, k, v, factor, causal, texts[0])[..., :width]
    out = torch.zeros_like(q)
    shift = k.shape[2] - length_q
    for b, text in enumerate(texts):
        keys = slice(0, k.shape[2]) if rows is None else rows[b]
        if isinstance(keys, slice):
            queries: slice | Tensor = slice(max(keys.start, shift) - shift, max(keys.stop, shift) - shift)
        else:
            queries = keys[keys >= shift] - shift
        q_row, k_row, v_row = q[b : b + 1, :, queries], k[b : b + 1, :, keys], v[b : b + 1, :, keys]
        if q_row.shape[2]:
            out[b : b + 1, :, queries] = _attend(layer, q_row, k_row, v_row, factor, causal, min(text, q_row.shape[2]))
        if padding is not None and padding.padded_end[b] and k_row.shape[2]:  # generate() reads this row all the same
            last = q[b : b + 1, :, -1:]
            out[b : b + 1, :, -1:] = scaled_dot_product_attention(last, k_row, v_row, scale=factor, enable_gqa=True)
    return out[..., :width]


def _attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, text: int) -> Tensor:
    prefill = layer.prefill
    if q.shape[2] <= prefill.min_queries:
        visible = None if not causal or q.shape[2] == k.shape[2] else bottom_right(q.shape[2], k.shape[2], q.device)
        whole = causal and visible is None
        return scaled_dot_product_attention(q, k, v, visible, is_causal=whole, scale=scale, enable_gqa=True)
    out, plan = psa_attention(
        q,
        k,
        v,
        config=fitted(prefill.config, k.shape[2]) if prefill.by_density else prefill.config,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
        text_length=text,
        return_plan=True,
        backend=prefill.backend,
    )
    if not torch.compiler.is_compiling():
        pairs = q.shape[0] * q.shape[2] * (k.shape[2] - (q.shape[2] / 2 if causal else 0))
        prefill.stats.setdefault(layer.index, LayerStats()).add(plan, pairs)
    return out


def _real_tokens(prefill: Prefill, mask: Tensor | None) -> RealTokens | None:
    if mask is None:
        return None
    if prefill.rows is None or prefill.rows.mask() is not mask:
        prefill.rows = RealTokens.read(mask)
    return prefill.rows


# -- the model's own attention ---------------------------------------------------------------------------------------


def _dense(
    name: str,
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    from transformers import AttentionInterface

    flash = "flash" in name
    if flash and (mask is None or mask.ndim == 2):
        return AttentionInterface()[name](module, q, k, v, mask, **call)
    if flash:  # flash takes no 4-D mask
        name = "eager" if any(call.get(key) is not None for key in EAGER_ONLY) else "sdpa"
    if mask is not None and mask.ndim == 2:
        visible = mask[:, None, None, :]
        mask = visible & bottom_right(q.shape[2], k.shape[2], q.device) if causal else visible
    elif mask is None and causal and q.shape[2] > 1 and (q.shape[2] != k.shape[2] or name == "eager"):
        mask = bottom_right(q.shape[2], k.shape[2], q.device)[None, None]
    if name != "eager":
        return AttentionInterface()[name](module, q, k, v, mask, **call)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise BackendError(
            f"{type(module).__name__} has no eager attention to serve {sorted(call)}; disable psa for it"
        )
    return eager(module, q, k, v, mask, **call)


@lru_cache(maxsize=1)
def _default_layer() -> Layer:
    """For a model that was loaded with ``attn_implementation="psa"`` and never passed to ``psa.enable``."""
    from .. import presets

    return Layer(Prefill(presets.get("qwen2.5-vl")), -1)

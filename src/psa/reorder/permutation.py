"""A reordering of tokens: applied to q, k and v before attention, undone on its output."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psa.errors import ConfigError, ShapeError

TEXT_POSITIONS = ("first", "last")


@dataclass(frozen=True, eq=False)
class Permutation:
    """Where every token goes: position i of the reordered sequence holds token ``order[i]`` of the caller's.

    ``q_order`` and ``k_order`` are int64, either one order for everybody, [L], or one per head, [B|1, H, L] for queries
    and [B|1, Hkv, L] for keys and values. ``k_order`` may be the very same tensor as ``q_order``; then it is stored,
    moved and inverted once. The two lengths may differ. Inverses are computed when first needed and kept. ``key_mask``
    [B, Lk], if any, is one about whose masked tokens all heads agree, as the order was made so.

    Every method raises ShapeError when the data's batch, head or token count does not fit the order.
    """

    q_order: Tensor
    k_order: Tensor
    key_mask: Tensor | None = field(default=None, repr=False)
    _inverses: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, order in (("q_order", self.q_order), ("k_order", self.k_order)):
            if order.ndim not in (1, 3) or order.dtype != torch.int64:
                raise ShapeError(
                    f"{name} must be an int64 tensor [L] or [B|1, H, L]; got {order.dtype} {list(order.shape)}."
                )

    @property
    def q_inverse(self) -> Tensor:
        """Position of each of the caller's query tokens in the reordered sequence; shaped as ``q_order``."""
        return self._inverse("q", self.q_order)

    @property
    def k_inverse(self) -> Tensor:
        """Position of each of the caller's key tokens in the reordered sequence; shaped as ``k_order``."""
        return self.q_inverse if self.k_order is self.q_order else self._inverse("k", self.k_order)

    def _inverse(self, name: str, order: Tensor) -> Tensor:
        if name in self._inverses:
            return self._inverses[name]
        if torch.compiler.is_compiling():  # not kept: a compiled graph may reuse the memory of what it computes
            return _invert(order)
        with torch.inference_mode(False):  # what is kept here may serve a backward pass later
            self._inverses[name] = _invert(order)
        return self._inverses[name]

    @property
    def per_head(self) -> bool:
        """Whether heads (or batch items) have orders of their own."""
        return self.q_order.ndim == 3 or self.k_order.ndim == 3

    def apply_q(self, x: Tensor) -> Tensor:
        """Per-token data of the queries, [B, H, L] or [B, H, L, D], in the new order. One gather, differentiable."""
        _check_fits(x, self.q_order, "q")
        return _permute(x, self.q_order, self.q_inverse if x.requires_grad else None)

    def apply_k(self, x: Tensor) -> Tensor:
        """Per-token data of the keys, [B, Hkv, L] or [B, Hkv, L, D], in the new order. One gather, differentiable."""
        _check_fits(x, self.k_order, "k")
        return _permute(x, self.k_order, self.k_inverse if x.requires_grad else None)

    def restore_q(self, x: Tensor) -> Tensor:
        """Inverse of ``apply_q``: output [B, H, L, D] or lse [B, H, L] back in the caller's order. Differentiable."""
        _check_fits(x, self.q_order, "out")
        return _permute(x, self.q_inverse, self.q_order if x.requires_grad else None)

    def apply_k_mask(self, mask: Tensor) -> Tensor:
        """A per-key mask [B, L] in the new order, [B, L].

        With per-head orders this needs all heads to agree where the masked tokens went, as
        ``semantic_permutation(..., key_mask=mask)`` arranges; ShapeError otherwise. (For another mask than the order
        was made with, the check waits for the device.)
        """
        heads = self.k_order.shape[1] if self.k_order.ndim == 3 else 1
        per_head = mask[:, None].expand(-1, heads, -1)
        _check_fits(per_head, self.k_order, "key_mask")
        moved = _take(per_head, self.k_order)
        if heads > 1 and mask is not self.key_mask and bool((moved != moved[:, :1]).any()):
            raise ShapeError(
                "key_mask [B, L] cannot follow these per-head orders: heads put masked tokens at different places. "
                "Build the permutation with this key_mask, or use one order for all heads (Gilbert, tile)."
            )
        return moved[:, 0]

    def where(self, heads: Tensor, other: "Permutation") -> "Permutation":
        """This order, and ``other`` in some heads, bool [B, H]; those that share keys and values have to agree."""
        kv_heads = max(order.shape[1] if order.ndim == 3 else 1 for order in (self.k_order, other.k_order))
        of_keys = heads[:, :: heads.shape[1] // kv_heads, None]
        q_order = torch.where(heads[..., None], other.q_order, self.q_order)
        return Permutation(q_order, torch.where(of_keys, other.k_order, self.k_order), other.key_mask)

    def to(self, device: torch.device | str) -> "Permutation":
        """The same permutation with its tensors on ``device``; itself where they already are."""
        q_order = self.q_order.to(device)
        k_order = q_order if self.k_order is self.q_order else self.k_order.to(device)
        if q_order is self.q_order and k_order is self.k_order:
            return self
        moved = Permutation(q_order, k_order, self.key_mask)
        moved._inverses.update((name, inverse.to(device)) for name, inverse in self._inverses.items())
        return moved

    def to_dict(self) -> dict[str, Tensor]:
        """Its tensors by name; ``k_order`` only where it differs from ``q_order``."""
        tensors = {"q_order": self.q_order}
        return tensors if self.k_order is self.q_order else {**tensors, "k_order": self.k_order}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> "Permutation":
        """Inverse of ``to_dict``. ShapeError if an order does not hold every token exactly once."""
        if "q_order" not in tensors:
            raise ShapeError(f"a stored permutation needs 'q_order' (and maybe 'k_order'); got {sorted(tensors)}.")
        permutation = cls(tensors["q_order"], tensors.get("k_order", tensors["q_order"]))
        for name in ("q_order", "k_order"):
            order = getattr(permutation, name)
            every_token = torch.arange(order.shape[-1], device=order.device).expand_as(order)
            if not torch.equal(order.sort(dim=-1).values, every_token):
                raise ShapeError(f"stored {name} {list(order.shape)} does not hold every token exactly once.")
        return permutation


def check_text(text_length: int, text_position: str) -> None:
    """ConfigError unless ``text_length`` >= 0 and ``text_position`` is "first" or "last"."""
    if text_position not in TEXT_POSITIONS:
        raise ConfigError(f"text_position must be 'first' or 'last'; got {text_position!r}.")
    if text_length < 0:
        raise ConfigError(f"text_length must be 0 or more; got {text_length}.")


def with_text(order: Tensor, text_length: int, text_position: str) -> Tensor:
    """Extend an order of the video tokens, [..., V], by text tokens that keep their places: [..., V + text_length]."""
    check_text(text_length, text_position)
    if text_length == 0:
        return order
    text = torch.arange(text_length, device=order.device).expand(*order.shape[:-1], -1)
    if text_position == "first":
        return torch.cat([text, order + text_length], dim=-1)
    return torch.cat([order, text + order.shape[-1]], dim=-1)


class _Permute(torch.autograd.Function):
    """Gather along the tokens whose gradient is a gather too: no atomic additions, so the same bits in every run."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _take(x, order)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


def _permute(x: Tensor, order: Tensor, inverse: Tensor | None) -> Tensor:
    return _take(x, order) if inverse is None else _Permute.apply(x, order, inverse)


def _take(x: Tensor, order: Tensor) -> Tensor:
    if order.ndim == 1:
        return x.index_select(2, order)
    if x.ndim != 4:
        return x.gather(2, order.reshape(*order.shape, *(1,) * (x.ndim - 3)).expand(x.shape))
    # Whole rows at once: on a CPU a tenth of the time of a gather, which looks every element up.
    batch, heads, length, _ = x.shape
    item = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[:, None]
    if x.transpose(1, 2).is_contiguous():
        rows, index = x.transpose(1, 2).flatten(0, 2), (item * length + order) * heads + head
    else:
        rows, index = x.flatten(0, 2), (item * heads + head) * length + order
    return rows.index_select(0, index.flatten()).view(x.shape)


def _invert(order: Tensor) -> Tensor:
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, positions)


def _check_fits(x: Tensor, order: Tensor, name: str) -> None:
    fits = x.ndim >= 3 and x.shape[2] == order.shape[-1]
    if fits and order.ndim == 3:
        fits = order.shape[0] in (1, x.shape[0]) and order.shape[1] in (1, x.shape[1])
    if not fits:
        batch, heads = ("B", "H") if order.ndim == 1 else order.shape[:2]
        expected = f"[{batch}, {heads}, {order.shape[-1]}] or [{batch}, {heads}, {order.shape[-1]}, D]"
        raise ShapeError(
            f"{name} {list(x.shape)} does not fit the permutation's order {list(order.shape)}: {expected}."
        )

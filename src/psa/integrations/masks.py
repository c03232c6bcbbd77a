"""Masks of a causal prefill, in two dimensions wherever that is the whole truth, so that no L×L tensor is made."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of each row of one padding mask, read back once for all layers of a forward pass.

    rows: per batch row a slice (one run of tokens) or an index; None when every token is real.
    padded_end: per batch row whether the last token is padding.
    """

    mask: "weakref.ref[Tensor]"
    rows: Sequence[slice | Tensor] | None
    padded_end: Sequence[bool]

    @classmethod
    def read(cls, mask: Tensor) -> "RealTokens":
        length = mask.shape[1]
        count = mask.sum(-1)
        first = mask.to(torch.uint8).argmax(-1)
        last = length - 1 - mask.flip(-1).to(torch.uint8).argmax(-1)
        rows: list[slice | Tensor] = []
        padded_end = []
        for b, (n, start, stop) in enumerate(torch.stack((count, first, last), -1).tolist()):
            run = slice(start, stop + 1) if n else slice(0, 0)
            rows.append(run if run.stop - run.start == n else mask[b].nonzero()[:, 0])
            padded_end.append(run.stop < length)
        whole = all(isinstance(row, slice) and row == slice(0, length) for row in rows)
        return cls(weakref.ref(mask), None if whole else rows, padded_end)


def psa_mask(**call: Any) -> Tensor | None:
    """The mask that layers get: None or bool [B, K] (True = real token) for plain causal attention, else SDPA's.

    A [B, K] shorter than the cache says how much of a static cache is filled.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    position = call.get("cache_position")  # transformers 4; later versions pass a length and an offset
    length_q = call["q_length"] if position is None else position.shape[0]
    start = call.get("q_offset", 0) if position is None else position[0]
    compiling = torch.compiler.is_compiling()
    plain = call.get("mask_function") is causal_mask_function and call.get("kv_offset", 0) == 0
    if not plain or length_q == 1 or (compiling and isinstance(start, Tensor)):
        return sdpa_mask(**call)
    filled, length_k = int(start) + length_q, call["kv_length"]
    mask = call.get("attention_mask")
    if filled > length_k or (mask is not None and mask.shape[1] < filled):
        return sdpa_mask(**call)
    if mask is not None:
        mask = mask[:, :filled].bool()
        if not compiling and bool(mask.all()):
            mask = None
    if mask is None and filled < length_k:
        return torch.ones(call["batch_size"], filled, dtype=torch.bool, device=call.get("device"))
    return mask


def bottom_right(length_q: int, length_k: int, device: torch.device) -> Tensor:
    """The causal mask of the last ``length_q`` of ``length_k`` tokens: bool [Lq, Lk]."""
    position = torch.arange(length_q, device=device) + length_k - length_q
    return torch.arange(length_k, device=device)[None, :] <= position[:, None]

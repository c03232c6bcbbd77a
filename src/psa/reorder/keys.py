"""Sorts the keys inside every KV block, so that the groups that pooling averages hold keys that resemble each other.

The order of tokens inside a block changes nothing for exact attention and nothing for which blocks matter; it decides
how much an average of 2, 4, … 32 neighbours loses.
"""

import torch
from torch import Tensor

from psa.autocast import unaffected
from psa.memory import mean_square, scratch_elements
from psa.pyramid import group_sums
from psa.vmap import batched

DIRECTIONS = 8
"""Coordinates in which keys are compared: the head's main directions of spread inside blocks."""


JUDGED = 4
"""Group size by whose tightness a head's sorted order is kept or left."""


@torch.library.custom_op("psa::key_order", mutates_args=())
@unaffected
def key_order(q: Tensor, k: Tensor, key_mask: Tensor | None, block_n: int) -> Tensor:
    """The order of keys within blocks: int64 [B, Hkv, Lk], a permutation of each block. A block that is cut by the end
    of the sequence or holds a masked token stays as it is, so that all heads agree where the masked tokens are.

    Each block is halved again and again along the coordinate in which its part spreads most (a k-d tree), so that at
    every level neighbours are close. Channels count by the queries' mean square. q [B, H, Lq, D], k [B, Hkv, Lk, D],
    key_mask bool [B, Lk]. A head whose groups of ``JUDGED`` keys sorting does not make tighter keeps its order: its
    neighbours in place resemble each other more than the main directions can tell.
    """
    batch, kv_heads, length, _ = k.shape
    whole = length // block_n * block_n
    order = torch.arange(length, device=k.device).expand(batch, kv_heads, length)
    if whole == 0 or q.shape[2] == 0:
        return order.clone()
    weight = mean_square(q).unflatten(1, (kv_heads, -1)).mean(2).sqrt()
    stays = None if key_mask is None else ~key_mask[:, :whole].unflatten(1, (-1, block_n)).all(-1)
    heads = max(1, scratch_elements(k, k.numel()) // max(1, k[:, 0].numel()))
    parts = [
        _sorted(k[:, some, :whole], weight[:, some], stays, order[:, some, :whole], block_n)
        for some in (slice(first, first + heads) for first in range(0, kv_heads, heads))
    ]
    return torch.cat([torch.cat(parts, dim=1), order[..., whole:]], dim=-1)


def _sorted(k: Tensor, weight: Tensor, stays: Tensor | None, order: Tensor, block_n: int) -> Tensor:
    """The order of some heads' keys in whole blocks. weight [B, H, D] of channels; stays bool [B, N]: as they are."""
    blocks = (k.float() * weight[:, :, None]).unflatten(2, (-1, block_n))
    blocks = torch.nan_to_num(blocks - blocks.mean(3, keepdim=True), posinf=0.0, neginf=0.0)
    if stays is not None:
        blocks = blocks.masked_fill(stays[:, None, :, None, None], 0.0)
    keys = blocks.flatten(2, 3)
    points = (keys @ _main_directions(blocks)).mT.contiguous()
    local, size = order, block_n
    while size > 1:
        parts = points.unflatten(3, (-1, size))
        spread = parts.square().mean(-1) - parts.mean(-1).square()
        axis = spread.argmax(2, keepdim=True)[..., None]
        along = parts.gather(2, axis.expand(-1, -1, -1, -1, size)).squeeze(2)
        rank = along.sort(dim=-1, stable=True).indices
        local = local.unflatten(2, (-1, size)).gather(-1, rank).flatten(2)
        points = parts.gather(4, rank[:, :, None].expand_as(parts)).flatten(3)
        size //= 2
    tighter = _tightness(keys.gather(2, local[..., None].expand_as(keys))) > _tightness(keys)
    return torch.where(tighter[..., None], local, order)


@key_order.register_fake
def _(q, k, key_mask, block_n):
    return k.new_empty(k.shape[:3], dtype=torch.int64)


def _tightness(keys: Tensor) -> Tensor:
    """Energy of the means of groups of JUDGED keys, [B, Hkv]: what is not lost within groups."""
    return group_sums(keys, JUDGED).square().sum((2, 3))


def _main_directions(blocks: Tensor, steps: int = 2) -> Tensor:
    """The leading directions of spread, float32 [B, Hkv, D, DIRECTIONS], by orthogonal iteration from fixed vectors."""
    rows = blocks.flatten(2, 3)
    spread = rows.mT @ rows
    spread = spread / spread.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)[..., None, None]
    size, count = spread.shape[-1], min(DIRECTIONS, spread.shape[-1])
    channel, column = torch.arange(size, device=rows.device), torch.arange(count, device=rows.device)
    basis = torch.cos((channel[:, None] + 0.5) * (column[None, :] * 7 + 1) * 1.7).expand(*spread.shape[:2], -1, -1)
    for _ in range(steps):
        basis = spread @ (spread @ basis)
        for index in range(count):  # Gram-Schmidt: `count` is small, and this needs no solver and no host
            vector, done = basis[..., index : index + 1], basis[..., :index]
            vector = vector - done @ (done.mT @ vector)
            basis[..., index : index + 1] = vector / vector.norm(dim=-2, keepdim=True).clamp(min=1e-30)
    return basis


torch.library.register_vmap(key_order, batched(key_order, 0))

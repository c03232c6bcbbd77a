"""How much each KV block matters to each query block, at a small fraction of the cost of attention.

Every estimate scores a few query rows against a few key rows, takes a softmax per query row and adds (or takes the
maximum of) the result over each block pair. Memory stays linear: query rows are processed in chunks.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .config import PSAConfig
from .memory import scratch_elements
from .pyramid import group_counts, group_means, group_sums

CHUNK = 1 << 20
"""Logits held at a time on a CPU (4 MB in float32)."""


@dataclass(frozen=True)
class ScoreRows:
    """Query rows and key rows to score.

    Attributes:
        queries: [B, H, Rq, d], scaled. keys: [B, Hkv, Rk, d].
        bias: [1|B, Rk] added to the logits; -inf hides a row.
        query_position, key_position: a key row is visible unless its position is after the query row's. None: all are.
        per_block_q, per_block_k: rows that make up one block.
        largest: a block pair counts by its largest share, not by their sum.
        real: bool [Rq], query rows that count; None: all do.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor
    query_position: Tensor | None
    key_position: Tensor | None
    per_block_q: int
    per_block_k: int
    largest: bool = False
    real: Tensor | None = None

    def of_blocks(self, blocks: Tensor) -> "ScoreRows":
        """Those of some query blocks, int64 [S], ascending; rows that a partial last one lacks do not count."""
        place, count = torch.arange(self.per_block_q, device=blocks.device), self.queries.shape[2]
        index = (blocks[:, None] * self.per_block_q + place).flatten()
        real, index = index < count, index.clamp(max=count - 1)
        position = None if self.query_position is None else self.query_position[index]
        return replace(self, queries=self.queries[:, :, index], query_position=position, real=real)


@torch.no_grad()
def importance(
    q: Tensor,
    k: Tensor,
    config: PSAConfig,
    *,
    scale: float,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Importance by ``config.importance``: float32 [B, H, M, N]; rows sum to one, or to zero where nothing is seen.

    q [B, H, Lq, D], k [B, Hkv, Lk, D]. Deterministic: the sampled estimate draws its offsets from ``config.seed``.
    """
    return block_scores(score_rows(q, k, config, scale=scale, is_causal=is_causal, key_mask=key_mask))


def score_rows(
    q: Tensor, k: Tensor, config: PSAConfig, *, scale: float, is_causal: bool = False, key_mask: Tensor | None = None
) -> ScoreRows:
    """The rows that ``config.importance`` scores."""
    gather = {"pooled": pooled_rows, "sampled": sampled_rows, "antidiagonal": antidiagonal_rows}[config.importance]
    return gather(q, k, config, scale, is_causal, key_mask)


def pooled_rows(
    q: Tensor, k: Tensor, config: PSAConfig, scale: float, is_causal: bool, key_mask: Tensor | None
) -> ScoreRows:
    """Means over ``importance_rows`` queries against means over ``importance_cols`` keys, weighted by their counts."""
    rows, cols = config.importance_rows, config.importance_cols
    keys = k.float()
    bias = group_counts(k.shape[2], cols, key_mask, like=keys).log()
    positions = _positions(q, k, rows, cols, is_causal, last_key=True)
    queries = group_means(q.float(), rows) * scale
    pooled = group_means(keys, cols, key_mask)
    return ScoreRows(queries, pooled, bias, *positions, config.block_m // rows, config.block_n // cols)


def antidiagonal_rows(
    q: Tensor, k: Tensor, config: PSAConfig, scale: float, is_causal: bool, key_mask: Tensor | None
) -> ScoreRows:
    """The mean logit of the antidiagonal of each stride × stride tile, as one product of long rows (METHOD §3).

    A tile's queries in reverse order, laid end to end, times its keys laid end to end is the sum over the antidiagonal.
    Tiles cut by the end of the sequence average over what is real; the corner tile, cut both ways, scales by both cuts.
    """
    stride = config.importance_stride
    keys = k.float()
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask[:, None, :, None], 0.0)
    queries = _tiles(q.float(), stride).flip(-2).flatten(-2)
    queries = queries * (scale / group_counts(q.shape[2], stride, None, like=queries))[:, None, :, None]
    real = torch.ones(1, k.shape[2], device=k.device) if key_mask is None else key_mask.float()
    count = group_sums(real[..., None], stride)[..., 0]
    keys = _tiles(keys, stride).flatten(-2) * (stride / count.clamp(min=1))[:, None, :, None]
    bias = torch.zeros_like(count).masked_fill_(count == 0, -torch.inf)
    positions = _positions(q, k, stride, stride, is_causal, last_key=False)
    return ScoreRows(queries, keys, bias, *positions, config.block_m // stride, config.block_n // stride)


def sampled_rows(
    q: Tensor, k: Tensor, config: PSAConfig, scale: float, is_causal: bool, key_mask: Tensor | None
) -> ScoreRows:
    """A quarter of each block's tokens; which, is drawn once per seed and is the same for every block."""
    index_q = _sample(q.shape[2], config.block_m, config.seed, q.device)
    index_k = _sample(k.shape[2], config.block_n, config.seed + 1, k.device)
    bias = torch.zeros(1, index_k.numel(), device=k.device)
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, index_k], -torch.inf)
    shift = k.shape[2] - q.shape[2]
    positions = (index_q + shift, index_k) if is_causal else (None, None)
    queries, keys = q[:, :, index_q].float() * scale, k[:, :, index_k].float()
    return ScoreRows(queries, keys, bias, *positions, config.block_m // 4, config.block_n // 4, largest=True)


def block_scores(rows: ScoreRows, wanted: Tensor | None = None) -> Tensor:
    """Softmax of each query row, summed (or maximised) over block pairs, rows normalised: float32 [B, H, M, N].

    wanted: bool [B, H]; the CPU leaves out KV heads that nobody wants, their importance is 0.

    Key rows are laid out place by place, not block by block, so that sums over a block run along whole vectors: on the
    CPU more than twice as fast as short sums along the last dimension.
    """
    (batch, heads, count, _), kv_heads = rows.queries.shape, rows.keys.shape[1]
    blocks_q, blocks_k = -(-count // rows.per_block_q), -(-rows.keys.shape[2] // rows.per_block_k)
    out = torch.zeros(batch, heads, blocks_q, blocks_k, device=rows.queries.device)
    tiny = torch.finfo(torch.float32).tiny
    missing = blocks_k * rows.per_block_k - rows.keys.shape[2]
    keys = torch.nn.functional.pad(rows.keys, (0, 0, 0, missing)).transpose(-1, -2)
    keys = keys.unflatten(-1, (blocks_k, -1)).transpose(-1, -2).contiguous()
    bias = torch.nn.functional.pad(rows.bias, (0, missing), value=-torch.inf)
    bias = bias.unflatten(-1, (blocks_k, -1)).mT.contiguous()
    position = rows.key_position
    if position is not None:
        position = torch.nn.functional.pad(position, (0, missing)).unflatten(-1, (blocks_k, -1)).mT.contiguous()
    together = 1 if keys.device.type == "cpu" else kv_heads  # a product of one pair of matrices is faster on the CPU
    groups = heads // kv_heads * together
    step = (
        max(1, scratch_elements(keys, CHUNK) // max(1, groups * keys[0, 0, 0].numel()) // rows.per_block_q)
        * rows.per_block_q
    )
    for b, first, start in itertools.product(range(batch), range(0, kv_heads, together), range(0, count, step)):
        of = slice(first * (heads // kv_heads), first * (heads // kv_heads) + groups)
        if wanted is not None and wanted.device.type == "cpu" and not bool(wanted[b, of].any()):
            continue
        width = _visible_blocks(rows, min(start + step, count), blocks_k)
        part = keys[b, first : first + together, ..., :width].flatten(2)
        logits = _grouped_product(rows.queries[b, of, start : start + step], part).float().unflatten(-1, (-1, width))
        logits += bias[b if bias.shape[0] > 1 else 0, :, :width]
        if rows.query_position is not None and position is not None:
            seen = position[None, :, :width] <= rows.query_position[start : start + step, None, None]
            logits.masked_fill_(~seen, -torch.inf)
        peak = logits.flatten(2).amax(-1).clamp_(min=torch.finfo(torch.float32).min)
        mass = logits.sub_(peak[..., None, None]).exp_()
        total = mass.sum(2)
        mass = (mass.amax(2) if rows.largest else total) / total.sum(-1, keepdim=True).clamp(min=tiny)
        if rows.real is not None:
            mass = mass * rows.real[start : start + step, None]
        mass = _pad_rows(mass, rows.per_block_q).unflatten(1, (-1, rows.per_block_q))
        block = start // rows.per_block_q
        out[b, of, block : block + mass.shape[1], :width] = mass.amax(2) if rows.largest else mass.sum(2)
    return out / out.sum(-1, keepdim=True).clamp(min=tiny)


@torch.no_grad()
def measured_mass(
    q: Tensor, k: Tensor, config: PSAConfig, *, scale: float, is_causal: bool = False, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Block importance, and what pooling would lose of it, from pooled queries against all keys (METHOD §4b).

    Costs 1/importance_rows of Q·Kᵀ. A mean of logits is the logit of a mean key, so one product serves all levels.

    Returns:
        importance: float32 [B, H, M, N].
        log_ratio: float16 [B, H, M, N, E], ln(mass of the block / mass of its form at level 2**e), in
            [0, ``config.bias_cap``]; zero for level 1.
    """
    rows, block_m, block_n = config.importance_rows, config.block_m, config.block_n
    queries = group_means(q.float(), rows) * scale
    batch, heads, count, _ = queries.shape
    blocks_q, blocks_k = -(-q.shape[2] // block_m), -(-k.shape[2] // block_n)
    missing = blocks_k * block_n - k.shape[2]
    keys = torch.nn.functional.pad(k.float(), (0, 0, 0, missing)).transpose(-1, -2)
    real = torch.ones(1, k.shape[2], device=k.device) if key_mask is None else key_mask.float()
    real = torch.nn.functional.pad(real, (0, missing))
    position_q, position_k = _positions(q, k, rows, 1, is_causal, last_key=True)
    exponents = range(config.max_level.bit_length())
    mass = torch.zeros(batch, heads, blocks_q, blocks_k, device=q.device)
    ratio = torch.zeros(batch, heads, blocks_q, blocks_k, len(exponents), dtype=torch.float16, device=q.device)
    per_block = block_m // rows
    step = max(1, scratch_elements(keys, CHUNK) // max(1, heads * keys.shape[-1]) // per_block) * per_block
    for b in range(batch):
        weight = real[b if real.shape[0] > 1 else 0]
        for start in range(0, count, step):
            logits = _grouped_product(queries[b, :, start : start + step], keys[b])
            hidden = weight == 0
            if position_q is not None and position_k is not None:
                late = position_k[None, :] > position_q[start : start + step, None]
                hidden = hidden | torch.nn.functional.pad(late, (0, missing), value=True)
            peak = logits.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
            logits = logits - peak.clamp(min=torch.finfo(torch.float32).min)
            exact = logits.masked_fill(hidden, -torch.inf).exp_().unflatten(-1, (blocks_k, block_n)).sum(-1)
            total = exact.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            first = start // per_block

            def per_query_block(share: Tensor, total: Tensor = total) -> Tensor:
                return _pad_rows(share / total, per_block).unflatten(1, (-1, per_block)).sum(2)

            block_mass = per_query_block(exact)
            last = first + block_mass.shape[1]
            mass[b, :, first:last] = block_mass
            group_logits, group_count = logits * weight, weight
            for e in exponents[1:]:
                group_logits = group_logits.unflatten(-1, (-1, 2)).sum(-1)
                group_count = group_count.unflatten(-1, (-1, 2)).sum(-1)
                pooled = (group_logits / group_count.clamp(min=1)).clamp(max=80).exp_() * group_count
                pooled = per_query_block(pooled.unflatten(-1, (blocks_k, -1)).sum(-1))
                lost = (block_mass.clamp(min=1e-30) / pooled.clamp(min=1e-30)).log_()
                ratio[b, :, first:last, :, e] = lost.clamp_(0.0, config.bias_cap).to(torch.float16)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny), ratio


def _grouped_product(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, R, d] × [Hkv, d, C] -> [H, R, C] without repeating keys."""
    kv_heads = keys.shape[0]
    grouped = queries.reshape(kv_heads, -1, queries.shape[-1])
    if kv_heads == 1:
        return (grouped[0] @ keys[0]).view(*queries.shape[:2], keys.shape[-1])
    return (grouped @ keys).view(*queries.shape[:2], keys.shape[-1])


def _visible_blocks(rows: ScoreRows, stop: int, blocks: int) -> int:
    """KV blocks that query rows before ``stop`` can see. Off the CPU all: counting them would wait."""
    if rows.query_position is None or rows.key_position is None or rows.keys.device.type != "cpu":
        return blocks
    seen = int((rows.key_position <= rows.query_position[stop - 1]).sum())
    return min(blocks, max(1, -(-seen // rows.per_block_k)))


def _positions(
    q: Tensor, k: Tensor, rows: int, cols: int, is_causal: bool, *, last_key: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not is_causal:
        return None, None
    length_q, length_k = q.shape[2], k.shape[2]
    last_q = torch.arange(rows, length_q + rows, rows, device=q.device).clamp(max=length_q) - 1
    first_k = torch.arange(0, length_k, cols, device=k.device)
    key = (first_k + cols).clamp(max=length_k) - 1 if last_key else first_k
    return last_q + length_k - length_q, key


def _tiles(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple))


@lru_cache(maxsize=16)
def _sample(length: int, block: int, seed: int, device: torch.device) -> Tensor:
    """Sampled tokens of every block, kept on the device: a call copies nothing from the host."""
    generator = torch.Generator("cpu").manual_seed(seed)
    offsets = torch.randperm(block, generator=generator, device="cpu")[: block // 4].sort().values
    starts = torch.arange(0, length, block, device="cpu")
    return (starts[:, None] + offsets[None, :]).clamp(max=length - 1).flatten().to(device)

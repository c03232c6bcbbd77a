"""The portable engine of the `torch` backend: gather, multiply, normalise, multiply, one query block at a time.

Works on any device and in float64. On a CPU the (batch, kv head) pairs and, going forward, spans of query blocks are
shared among as many Python threads as torch may use; torch releases the interpreter lock inside its operators.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..pyramid import RowLayout, group_counts, group_means, row_bias, row_layout
from .base import Selection

SPAN = 8  # query blocks whose row lists are made together
LOWEST = -1e30  # finite: a row that sees nothing keeps weights exp(-inf - LOWEST) = 0


@dataclass(frozen=True)
class Problem:
    """A call in its compute dtype, with the pyramid laid out as one buffer of rows."""

    q: Tensor  # [B, H, Lq, D]
    keys: Tensor  # [B, Hkv, R, D]
    values: Tensor  # [B, Hkv, R, D]
    bias: Tensor  # [1|B, 1|H, R]
    last: Tensor  # [R], position of each row's last token
    layout: RowLayout
    selection: Selection

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> "Problem":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        layout, mask = row_layout(k.shape[-2], selection.block_n), selection.key_mask
        bias = [row_bias(k, level, selection) for level in layout.levels]
        shape = torch.broadcast_shapes(*(b.shape[:2] for b in bias))
        ends = [torch.arange(1, n + 1) * level for n, level in zip(layout.rows, layout.levels, strict=True)]
        return cls(
            q,
            torch.cat([group_means(k, level, mask) for level in layout.levels], dim=-2),
            torch.cat([group_means(v, level, mask) for level in layout.levels], dim=-2),
            torch.cat([b.expand(*shape, -1) for b in bias], dim=-1),
            torch.cat(ends).clamp(max=layout.length).sub(1).to(q.device),
            layout,
            selection,
        )

    @property
    def blocks(self) -> int:
        return -(-self.q.shape[-2] // self.selection.block_m)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.keys.shape[1]

    def first_position(self, block: int) -> int:
        return block * self.selection.block_m + self.layout.length - self.q.shape[-2]


@dataclass(frozen=True)
class BlockRows:
    """What one query block reads: row ids [n], their bias [n], and the rows that not all of its queries may see."""

    queries: slice
    ids: Tensor
    bias: Tensor
    cut: Tensor | None  # columns whose last token lies after the first query
    hidden: Tensor | None  # bool [queries, len(cut)]


def _plane(x: Tensor, b: int, h: int) -> Tensor:
    """x[b, h], for dimensions that may be broadcast."""
    return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]


def block_rows(problem: Problem, b: int, h: int, first: int, stop: int) -> list[BlockRows]:
    """The row lists of query blocks first..stop of one head, made together so that few operators serve many blocks."""
    selection, layout = problem.selection, problem.layout
    levels = _plane(selection.levels, b, h)[first:stop]
    at, block = levels.nonzero(as_tuple=True)
    level = levels[at, block].long()
    index = level.log2().long() if level.is_cuda else torch.frexp(level.float())[1].long() - 1
    size = selection.block_n // level
    limit = torch.tensor(layout.rows, device=level.device)[index]
    size = torch.minimum(size, limit - block * size).clamp(min=0)
    start = torch.tensor(layout.offsets, device=level.device)[index] + block * (selection.block_n // level)
    before = size.cumsum(0) - size
    ids = torch.repeat_interleave(start - before, size)
    ids += torch.arange(ids.shape[0], device=ids.device)
    bias = _plane(problem.bias, b, h)[ids]
    if selection.pair_bias is not None:
        pair = _plane(selection.pair_bias, b, h)[first:stop][at, block].to(bias.dtype)
        bias = bias + torch.repeat_interleave(torch.where(level > 1, pair, 0.0), size)
    counts = torch.zeros(stop - first, dtype=torch.long, device=at.device).index_add_(0, at, size).tolist()
    return [
        _cut(problem, first + i, block_ids, block_bias)
        for i, (block_ids, block_bias) in enumerate(zip(ids.split(counts), bias.split(counts), strict=True))
    ]


def _cut(problem: Problem, block: int, ids: Tensor, bias: Tensor) -> BlockRows:
    size = problem.selection.block_m
    queries = slice(block * size, min((block + 1) * size, problem.q.shape[-2]))
    if not problem.selection.is_causal:
        return BlockRows(queries, ids, bias, None, None)
    first = problem.first_position(block)
    position = torch.arange(first, first + queries.stop - queries.start, device=ids.device)
    last = problem.last[ids]
    seen = last <= first + position.shape[0] - 1
    ids, bias, last = ids[seen], bias[seen], last[seen]
    cut = (last > first).nonzero().squeeze(-1)
    return BlockRows(queries, ids, bias, cut, last[cut] > position[:, None])


def _scores(problem: Problem, b: int, h: int, rows: BlockRows, keys: Tensor) -> Tensor:
    """scale · q·k̄ + bias, -inf where causality hides a row: [queries, rows]."""
    q = problem.q[b, h, rows.queries]
    scores = torch.addmm(rows.bias, q, keys.T, alpha=problem.selection.scale)
    if rows.cut is not None and rows.hidden is not None and rows.cut.numel():
        scores[:, rows.cut] = scores[:, rows.cut].masked_fill_(rows.hidden, -torch.inf)
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """out [B, H, Lq, D] and lse [B, H, Lq] in the compute dtype."""
    problem = Problem.of(q, k, v, selection)
    out, lse = problem.q.new_empty(q.shape), problem.q.new_empty(q.shape[:-1])

    def work(b: int, h: int, first: int) -> None:
        for rows in block_rows(problem, b, h, first, min(first + SPAN, problem.blocks)):
            keys = problem.keys[b, h // problem.group].index_select(0, rows.ids)
            values = problem.values[b, h // problem.group].index_select(0, rows.ids)
            weights = _scores(problem, b, h, rows, keys)
            top = weights.amax(-1, keepdim=True).clamp_(min=LOWEST) if rows.ids.numel() else weights.new_zeros(1)
            total = weights.sub_(top).exp_().sum(-1, keepdim=True)
            empty = total == 0
            mean = (weights @ values).div_(total.masked_fill(empty, 1.0))
            out[b, h, rows.queries] = mean
            lse[b, h, rows.queries] = (top + total.log()).squeeze(-1)

    spans = range(0, problem.blocks, SPAN)
    _run(
        [partial(work, b, h, first) for b in range(q.shape[0]) for h in range(q.shape[1]) for first in spans], q.device
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the compute dtype. One thread owns a kv head, so that its sums have one order."""
    problem = Problem.of(q, k, v, selection)
    grad_out = grad_out.to(problem.q.dtype)
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    empty = lse.isneginf()
    delta, lse = delta.masked_fill(empty, 0.0)[..., None], lse.masked_fill(empty, torch.inf)[..., None]
    dq = torch.empty_like(problem.q)
    row_grads = problem.keys.new_zeros(*problem.keys.shape[:3], k.shape[-1] + v.shape[-1])

    def work(b: int, h_kv: int) -> None:
        for h in range(h_kv * problem.group, (h_kv + 1) * problem.group):
            for first in range(0, problem.blocks, SPAN):
                for rows in block_rows(problem, b, h, first, min(first + SPAN, problem.blocks)):
                    keys = problem.keys[b, h_kv].index_select(0, rows.ids)
                    values = problem.values[b, h_kv].index_select(0, rows.ids)
                    upstream = grad_out[b, h, rows.queries]
                    weights = _scores(problem, b, h, rows, keys).sub_(lse[b, h, rows.queries]).exp_()
                    dscores = (upstream @ values.T).sub_(delta[b, h, rows.queries]).mul_(weights)
                    dq[b, h, rows.queries] = (dscores @ keys).mul_(selection.scale)
                    shared = row_grads[b, h_kv]
                    sums = shared.index_select(0, rows.ids)
                    sums[:, : k.shape[-1]].addmm_(dscores.T, problem.q[b, h, rows.queries])
                    sums[:, k.shape[-1] :].addmm_(weights.T, upstream)
                    shared[rows.ids] = sums  # a block reads each row once

    _run([partial(work, b, h) for b in range(k.shape[0]) for h in range(k.shape[1])], q.device)
    tokens = _unpool(problem, row_grads)
    dk, dv = tokens.split([q.shape[-1], v.shape[-1]], dim=-1)
    return dq, dk * selection.scale, dv.contiguous()


def _unpool(problem: Problem, row_grads: Tensor) -> Tensor:
    """Each row's gradient, divided by its count, handed to its real tokens: [B, Hkv, R, ·] -> [B, Hkv, Lk, ·]."""
    layout, mask = problem.layout, problem.selection.key_mask
    tokens = row_grads[..., : layout.length, :].clone()
    for e, level in enumerate(layout.levels[1:], start=1):
        counts = group_counts(layout.length, level, mask, like=tokens).clamp(min=1)[:, None, :, None]
        grads = row_grads[..., layout.offsets[e] : layout.offsets[e] + layout.rows[e], :] / counts
        tokens += grads.repeat_interleave(level, dim=-2)[..., : layout.length, :]
    return tokens if mask is None else tokens.masked_fill_(~mask[:, None, :, None], 0.0)


def _run(work: list[Callable[[], None]], device: torch.device) -> None:
    """Runs independent pieces of work, on a CPU spread over torch's threads."""
    threads = torch.get_num_threads()
    workers = min(threads, len(work)) if device.type == "cpu" else 1
    if workers <= 1:
        for piece in work:
            piece()
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            for future in [pool.submit(piece) for piece in work]:
                future.result()
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads to come

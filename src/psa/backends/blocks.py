"""The portable engine of the `torch` backend: gather, multiply, normalise, multiply, one query block at a time.

Works on any device and in float64. On a CPU the (batch, kv head) pairs and, going forward, spans of query blocks are
shared among as many Python threads as torch may use; torch releases the interpreter lock inside its operators.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..pyramid import RowLayout, group_counts, group_means, row_bias, row_layout
from .base import Selection

SPAN = 8  # query blocks whose row lists are made together


@dataclass(frozen=True)
class Problem:
    """A call in its compute dtype, with the pyramid laid out as one buffer of rows."""

    q: Tensor  # [B, H, Lq, D]
    keys: Tensor  # [B, Hkv, R, D]
    values: Tensor  # [B, Hkv, R, D]
    bias: Tensor  # [1|B, 1|H, R]
    last: Tensor  # [R], position of each row's last token
    rows: Tensor  # [E], rows of each level
    offsets: Tensor  # [E], the first of them
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
            torch.tensor(layout.rows, device=q.device),
            torch.tensor(layout.offsets, device=q.device),
            layout,
            selection,
        )

    @property
    def blocks(self) -> int:
        return -(-self.q.shape[-2] // self.selection.block_m)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.keys.shape[1]

    def queries(self, block: int) -> slice:
        return slice(block * self.selection.block_m, min((block + 1) * self.selection.block_m, self.q.shape[-2]))

    def position(self, block: Any) -> Any:
        """Position of the first query of a block, or of many blocks: the last query stands on the last key."""
        return block * self.selection.block_m + self.layout.length - self.q.shape[-2]


@dataclass(frozen=True)
class BlockRows:
    """What one query block reads: row ids [n], their bias [n], and which of the last `c` rows causality hides."""

    queries: slice
    ids: Tensor
    bias: Tensor
    hidden: Tensor | None  # bool [queries, c]


class Scratch:
    """Buffers that a thread reuses from block to block: fresh pages cost as much as the arithmetic on them."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffers = like, {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised [rows, columns] matrix, valid until the same name is taken again."""
        if name not in self.buffers or self.buffers[name].numel() < rows * columns:
            self.buffers[name] = self.like.new_empty(rows * columns + rows * columns // 4)
        return self.buffers[name][: rows * columns].view(rows, columns)


def _plane(x: Tensor, b: int, h: int) -> Tensor:
    """x[b, h], for dimensions that may be broadcast."""
    return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]


def block_rows(problem: Problem, b: int, h: int, first: int) -> list[BlockRows]:
    """The row lists of SPAN query blocks of one head from `first` on, made together: few operators serve many blocks.

    A list is in ascending order of its rows' last tokens, so that causality cuts its end.
    """
    selection, stop = problem.selection, min(first + SPAN, problem.blocks)
    at, block = _plane(selection.levels, b, h)[first:stop].nonzero(as_tuple=True)
    level = _plane(selection.levels, b, h)[first:stop][at, block].long()
    index = torch.frexp(level.float())[1].long() - 1
    groups = selection.block_n // level
    size = torch.minimum(groups, problem.rows[index] - block * groups).clamp(min=0)
    start = problem.offsets[index] + block * groups
    ids = torch.repeat_interleave(start - size.cumsum(0) + size, size)
    ids += torch.arange(ids.shape[0], device=ids.device)
    bias = _plane(problem.bias, b, h)[ids]
    if selection.pair_bias is not None:
        pair = _plane(selection.pair_bias, b, h)[first:stop][at, block].to(bias.dtype)
        bias = bias + torch.repeat_interleave(torch.where(level > 1, pair, 0.0), size)
    query_block = first + torch.repeat_interleave(at, size)
    last, position = None, None
    if selection.is_causal:
        last, position = problem.last[ids], problem.position(query_block)
        seen = last < position + selection.block_m
        ids, bias, last, query_block, position = (x[seen] for x in (ids, bias, last, query_block, position))
    counts = torch.bincount(query_block - first, minlength=stop - first).tolist()
    parts = list(zip(ids.split(counts), bias.split(counts), strict=True))
    hidden: list[Tensor | None] = [None] * len(parts)
    if last is not None and position is not None:
        cut = torch.bincount(query_block[last > position] - first, minlength=stop - first).tolist()
        hidden = [_hidden(problem, first + i, x[len(x) - cut[i] :]) for i, x in enumerate(last.split(counts))]
    return [BlockRows(problem.queries(first + i), *part, hidden[i]) for i, part in enumerate(parts)]


def _hidden(problem: Problem, block: int, last: Tensor) -> Tensor:
    """Which rows, by their last tokens, each query of a block may not see: bool [queries, rows]."""
    queries = problem.queries(block)
    first = problem.position(block)
    return last > torch.arange(first, first + queries.stop - queries.start, device=last.device)[:, None]


def _scores(problem: Problem, b: int, h: int, rows: BlockRows, keys: Tensor, out: Tensor) -> Tensor:
    """scale · q·k̄ + bias, -inf where causality hides a row: [queries, rows]."""
    torch.addmm(rows.bias, problem.q[b, h, rows.queries], keys.T, alpha=problem.selection.scale, out=out)
    if rows.hidden is not None:
        out[:, out.shape[1] - rows.hidden.shape[1] :].masked_fill_(rows.hidden, -torch.inf)
    return out


def _gather(rows: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(rows, 0, ids, out=out)


def forward(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """out [B, H, Lq, D] and lse [B, H, Lq] in the compute dtype."""
    problem = Problem.of(q, k, v, selection)
    out, lse = problem.q.new_empty(q.shape), problem.q.new_empty(q.shape[:-1])

    def work(scratch: Scratch, b: int, h: int, first: int) -> None:
        h_kv, dim = h // problem.group, q.shape[-1]
        for rows in block_rows(problem, b, h, first):
            n, count = rows.ids.shape[0], rows.queries.stop - rows.queries.start
            if n == 0:
                out[b, h, rows.queries], lse[b, h, rows.queries] = 0.0, -torch.inf
                continue
            keys = _gather(problem.keys[b, h_kv], rows.ids, scratch.take("keys", n, dim))
            scores = _scores(problem, b, h, rows, keys, scratch.take("scores", count, n))
            weights = torch.softmax(scores, -1, out=scratch.take("weights", count, n))
            top = scores.amax(-1, keepdim=True)
            empty = top.isneginf()
            # The largest weight is exp(0) / Σ exp(s - top): this is cheaper than another pass of exponentials.
            log_total = weights.amax(-1, keepdim=True).log_().neg_()
            lse[b, h, rows.queries, None] = (top + log_total).masked_fill_(empty, -torch.inf)
            values = _gather(problem.values[b, h_kv], rows.ids, scratch.take("values", n, dim))
            torch.mm(weights, values, out=out[b, h, rows.queries]).masked_fill_(empty, 0.0)

    _run(work, list(product(range(q.shape[0]), range(q.shape[1]), range(0, problem.blocks, SPAN))), problem.q)
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
    dq = problem.q.new_empty(q.shape)
    dk_rows, dv_rows, dim = torch.zeros_like(problem.keys), torch.zeros_like(problem.values), q.shape[-1]

    def add_block(scratch: Scratch, b: int, h: int, rows: BlockRows) -> None:
        h_kv, n, count = h // problem.group, rows.ids.shape[0], rows.queries.stop - rows.queries.start
        queries, upstream = problem.q[b, h, rows.queries], grad_out[b, h, rows.queries]
        keys = _gather(problem.keys[b, h_kv], rows.ids, scratch.take("keys", n, dim))
        values = _gather(problem.values[b, h_kv], rows.ids, scratch.take("values", n, dim))
        weights = _scores(problem, b, h, rows, keys, scratch.take("weights", count, n))
        weights.sub_(lse[b, h, rows.queries]).exp_()
        dscores = torch.mm(upstream, values.T, out=scratch.take("dscores", count, n))
        dscores.sub_(delta[b, h, rows.queries]).mul_(weights)
        torch.mm(dscores, keys, out=dq[b, h, rows.queries]).mul_(selection.scale)
        for shared, left, right in ((dk_rows, dscores, queries), (dv_rows, weights, upstream)):
            sums = _gather(shared[b, h_kv], rows.ids, scratch.take("keys", n, dim))
            shared[b, h_kv][rows.ids] = sums.addmm_(left.T, right)  # a block reads each row once

    def work(scratch: Scratch, b: int, h_kv: int) -> None:
        for h in range(h_kv * problem.group, (h_kv + 1) * problem.group):
            for first in range(0, problem.blocks, SPAN):
                for rows in block_rows(problem, b, h, first):
                    add_block(scratch, b, h, rows)

    _run(work, list(product(range(k.shape[0]), range(k.shape[1]))), problem.q)
    return dq, _unpool(problem, dk_rows) * selection.scale, _unpool(problem, dv_rows)


def _unpool(problem: Problem, row_grads: Tensor) -> Tensor:
    """Each row's gradient, divided by its count, handed to its real tokens: [B, Hkv, R, ·] -> [B, Hkv, Lk, ·]."""
    layout, mask = problem.layout, problem.selection.key_mask
    tokens = row_grads[..., : layout.length, :].clone()
    for e, level in enumerate(layout.levels[1:], start=1):
        counts = group_counts(layout.length, level, mask, like=tokens).clamp(min=1)[:, None, :, None]
        grads = row_grads[..., layout.offsets[e] : layout.offsets[e] + layout.rows[e], :] / counts
        tokens += grads.repeat_interleave(level, dim=-2)[..., : layout.length, :]
    return tokens if mask is None else tokens.masked_fill_(~mask[:, None, :, None], 0.0)


def _run(work: Callable[..., None], items: list[tuple[int, ...]], like: Tensor) -> None:
    """Runs work(scratch, *item) for independent items, on a CPU spread over torch's threads."""
    threads = torch.get_num_threads()
    workers = min(threads, len(items)) if like.device.type == "cpu" else 1
    queue = iter(items)

    def drain() -> None:
        scratch = Scratch(like)
        while (item := next(queue, None)) is not None:
            work(scratch, *item)

    def drain_in_thread() -> None:
        torch.set_num_threads(threads // workers)
        with torch.no_grad():  # grad mode belongs to the thread
            drain()

    if workers <= 1:
        return drain()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(drain_in_thread) for _ in range(workers)]:
                future.result()
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads to come

"""Needles and copies in long contexts: what sparse prefill loses of a causal decoder's exact retrieval.

    python benchmarks/long_context.py [--lengths 1024 4096 16384] [--seeds 20] [--output FILE.jsonl]

The decoder has two layers whose heads are set by hand, so nothing is left to training: a previous-token head (by
position: sums of cosines, so its reach is gradual, as learned positional heads' is) and an induction head (the current
token looks for itself among previous tokens, and reads what followed). Token and position vectors are random or
sinusoidal in 64 channels. Tasks, each over `length` tokens:

- copy: after a prefix of random length, the second half repeats the first; every token of it must be predicted.
- needle: one pair (key, value) at a random depth among random tokens; the last token is the key. The question (8
  tokens) is trailing text, as in `psa.enable`.
- stream: as needle, in a redundant stream of slowly changing tokens, as a video's are.
- needle_unpinned: as needle, with no trailing text known. The row that asks is one of 128 in its block. PSA alone reads
  the last 16 tokens in full all the same, as `psa.enable(model, density=...)` does.

Every method sees the same density of the lower triangle; published and binary quotas are found by bisection, as pinned
blocks count. At short lengths the pins alone exceed a density of .15: the row says what was kept.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import psa
from psa.integrations.prefill import TAIL, fitted
from psa.integrations.transformers import choose_config

DIM = 64
VOCABULARY = 1 << 15
QUESTION = 8
SHARPNESS = 20.0
TASKS = ("copy", "needle", "stream", "needle_unpinned")
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Task:
    """embedded [L, D]: the tokens; the rows to read, and the right answers there; how much trailing text is known."""

    embedded: Tensor
    rows: Tensor
    answers: Tensor
    text_length: int


class Decoder:
    """Two layers of hand-set heads over residual slots (token, position, previous token, answer)."""

    def __init__(self, length: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCABULARY, DIM, generator=g)
        self.table = table / table.norm(dim=-1, keepdim=True)
        frequency = torch.logspace(0.3, -4.2, DIM // 2, base=10, dtype=torch.float64)
        place = torch.arange(-1, length, dtype=torch.float64)[:, None] * frequency
        waves = torch.cat((place.cos(), place.sin()), -1).float()
        self.before, self.position = waves[:-1], waves[1:]

    def logits(self, task: Task, attention: Attention) -> Tensor:
        """[rows, vocabulary] at the positions the task asks about."""
        token = task.embedded
        previous = _attend(self.before, self.position, token, 6.0, attention)
        previous = previous / previous.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        answer = _attend(token, previous, token, SHARPNESS, attention)
        return answer[task.rows] @ self.table.T

    def accuracy(self, task: Task, attention: Attention) -> float:
        return float((self.logits(task, attention).argmax(-1) == task.answers).float().mean())


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, attention: Attention) -> Tensor:
    return attention(q[None, None], k[None, None], v[None, None], scale)[0, 0]


def make_task(name: str, decoder: Decoder, length: int, seed: int) -> Task:
    g = torch.Generator().manual_seed(1000 + seed)
    table = decoder.table
    if name == "copy":
        before = int(torch.randint(1, length // 8, (), generator=g))
        count = (length - before) // 2
        fresh = torch.randperm(VOCABULARY, generator=g)[: length - count]
        copied = fresh[-count:]
        return Task(table[torch.cat((fresh, copied))], torch.arange(length - count, length - 1), copied[1:], 0)
    tokens = torch.randperm(VOCABULARY, generator=g)[:length]
    embedded = table[tokens].clone()
    if name == "stream":
        embedded = _stream(torch.randn(length, DIM, generator=g), g)
    place = int(torch.randint(1, length - 2 * QUESTION, (), generator=g))
    embedded[place], embedded[place + 1] = table[tokens[place]], table[tokens[place + 1]]
    embedded[-QUESTION:] = table[tokens[-QUESTION:]]
    embedded[-1] = embedded[place]
    pinned = 0 if name == "needle_unpinned" else QUESTION
    return Task(embedded, torch.tensor([length - 1]), tokens[place + 1 : place + 2], pinned)


def _stream(noise: Tensor, g: torch.Generator, width: int = 64, keep: float = 0.97) -> Tensor:
    """Frames of ``width`` tokens, each like the one before: correlation ``keep`` in time, .9 within a frame."""
    frames = noise.view(-1, width, noise.shape[-1]).clone()
    for i in range(1, width):
        frames[:, i] = 0.9 * frames[:, i - 1] + (1 - 0.9**2) ** 0.5 * frames[:, i]
    for t in range(1, len(frames)):
        frames[t] = keep * frames[t - 1] + (1 - keep**2) ** 0.5 * frames[t]
    flat = frames.view(noise.shape)
    return flat / flat.norm(dim=-1, keepdim=True)


# -- methods at one density ------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class Sparse:
    """One method at one density; remembers what each layer kept."""

    def __init__(self, settings: Callable[[float], psa.PSAConfig], density: float, text_length: int) -> None:
        self.settings, self.density, self.text_length = settings, density, text_length
        self.kept: list[float] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        plan = self._plan(q, k, scale)
        self.kept.append(plan.density)
        return psa.attend(q, k, v, plan, is_causal=True, scale=scale)

    def _plan(self, q: Tensor, k: Tensor, scale: float) -> psa.Plan:
        def plan(quota: float) -> psa.Plan:
            config = self.settings(quota)
            text = self.text_length
            if self.settings is ours:
                config, text = fitted(config, k.shape[2]), text or TAIL
            return psa.plan(q, k, config, is_causal=True, scale=scale, text_length=text)

        found = plan(self.density)
        if found.density <= self.density * 1.01 or self.settings(self.density).mask_mode == "proportional":
            return found
        low, high, best = 0.0, self.density, plan(0.0)
        for _ in range(7):
            middle = 0.5 * (low + high)
            found = plan(middle)
            low, high, best = (middle, high, found) if found.density <= self.density else (low, middle, best)
        return best


def published(quota: float) -> psa.PSAConfig:
    """The published topk quotas (.10, .05, 0, .20 at density .15), scaled; antidiagonal importance."""
    a, b, c, d = (min(1.0, quota / 0.15 * x) for x in (0.10, 0.15, 0.15, 0.35))
    ratios = {1: (0.0, a), 2: (a, b), 4: (b, c), 8: (c, d)}
    return psa.PSAConfig(mask_mode="topk", mask_ratios=ratios, importance="antidiagonal")


def binary(quota: float) -> psa.PSAConfig:
    return psa.PSAConfig(mask_mode="topk", mask_ratios={1: (0.0, quota), 0: (quota, 1.0)})


def one_mean(quota: float) -> psa.PSAConfig:
    exact = max(0.0, (quota - 1 / 64) / (1 - 1 / 64))
    return psa.PSAConfig(mask_mode="topk", mask_ratios={1: (0.0, exact), 64: (exact, 1.0)})


def ours(density: float) -> psa.PSAConfig:
    """What ``psa.enable(model, density=...)`` uses; blocks are fitted to the length there and in :class:`Sparse`."""
    return choose_config(None, None, density)


METHODS = {"psa": ours, "published": published, "binary": binary, "one_mean": one_mean}


# -- the record ------------------------------------------------------------------------------------------------------


def measure(name: str, length: int, density: float, seeds: int, methods: Sequence[str] = tuple(METHODS)) -> list[dict]:
    """One row for each method: mean accuracy over seeds, beside dense, and the density that was kept."""
    runs: dict[str, list[tuple[float, float]]] = {method: [] for method in ("dense", *methods)}
    for seed in range(seeds):
        decoder = Decoder(length, seed)
        task = make_task(name, decoder, length, seed)
        runs["dense"].append((decoder.accuracy(task, dense), 1.0))
        for method in methods:
            sparse = Sparse(METHODS[method], density, task.text_length)
            runs[method].append((decoder.accuracy(task, sparse), sum(sparse.kept) / len(sparse.kept)))
    means = {method: [sum(column) / seeds for column in zip(*found, strict=True)] for method, found in runs.items()}
    full = means.pop("dense")[0]
    shared = {"bench": "long_context", "task": name, "length": length, "asked_density": density, "seeds": seeds}
    return [
        {**shared, "method": method, "density": round(kept, 4), "accuracy": round(accuracy, 4),
         "dense_accuracy": round(full, 4), "of_dense": round(accuracy / full, 4) if full else None}
        for method, (accuracy, kept) in means.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.35])
    parser.add_argument(
        "--seeds", type=int, default=20, help="of one-answer tasks; copies, with many answers, take a fifth"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_context.jsonl"))
    args = parser.parse_args()
    where = {"torch": torch.__version__, "machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a", encoding="utf-8") as file:
        for length in args.lengths:
            for name in args.tasks:
                for density in args.densities:
                    seeds = max(1, args.seeds // 5) if name == "copy" else args.seeds
                    for row in measure(name, length, density, seeds, args.methods):
                        file.write(json.dumps({**row, **where}) + "\n")
                        print(*(f"{row[key]:>9}" for key in ("length", "task", "method", "density", "of_dense")))
                    file.flush()


if __name__ == "__main__":
    main()

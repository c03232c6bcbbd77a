"""Trains the tiny text-to-video model: ``python -m psa.tiny.train --output runs/tiny``.

The autoencoder comes first, then transformer and text encoder together by flow matching, from small clips to native
ones. A run that is interrupted continues where it was when started again with the same ``--output``; ``--from``
continues from a finished checkpoint, such as the shipped one, with ``--from-stage`` naming where.

Processes on several cores share every batch: ``torchrun --nproc-per-node 2 -m psa.tiny.train --output runs/tiny``.
"""

import contextlib
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..config import PSAConfig
from ..integrations import enable
from . import path
from .autoencoder import clips, train_autoencoder, write
from .model import SPATIAL, TEMPORAL, encode, make_text_encoder, make_tokenizer, make_transformer, save
from .processes import Processes
from .student import WORDS, Student

Told = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Stage:
    """A part of the training: ``steps`` of ``batch`` clips drawn from ``pool`` rendered ones."""

    name: str
    pixels: int
    frames: int
    batch: int
    steps: int
    pool: int
    rate: float
    pairs: float = 0.25
    density: float = 1.0  # of self-attention; below 1 it is PSA's, forward and backward
    seen: int = 0  # latent frames of each clip that a step sees, evenly spaced and at their own times; 0: all
    turns: tuple[tuple[int, int], ...] = ()  # (seen, batch) that successive steps take in turn, instead of these two
    noise: float = 0.5  # exponent of the tokens in the shift of the noise levels
    cools: bool = False  # the rate falls to a tenth, not to the next stage's

    @property
    def latents(self) -> int:
        """Latent frames of a whole clip."""
        return 1 + (self.frames - 1) // TEMPORAL

    @property
    def tokens(self) -> int:
        return (self.seen or self.latents) * (self.pixels // SPATIAL) ** 2

    @property
    def parts(self) -> "tuple[Stage, ...]":
        """The kinds of step that take turns, each as a stage of its own; those that see part of a clip are dense."""
        if not self.turns:
            return (self,)
        kinds = ((seen, batch, 1.0 if seen else self.density) for seen, batch in self.turns)
        return tuple(replace(self, seen=seen, batch=batch, density=density, turns=()) for seen, batch, density in kinds)

    @property
    def shift(self) -> float:
        """Of the noise levels: longer clips need more noise to lose their content (Esser et al. 2024, §5.3.2, with the
        square root)."""
        return (self.tokens / 256) ** self.noise


MIXED = ((3, 24), (0, 4), (5, 12), (0, 4), (9, 6), (0, 4))
STAGES = (
    Stage("parts", 64, 9, 24, 7000, 8192, 2e-3, pairs=0.1),
    Stage("pairs", 96, 9, 12, 1900, 4096, 1.4e-3, pairs=0.6),
    Stage("wide", 128, 17, 4, 150, 1024, 1e-3, pairs=0.5, density=0.25),
    Stage("native", 128, 33, 2, 660, 1024, 8e-4, pairs=0.4, density=0.2),
    Stage("three", 128, 33, 24, 650, 3072, 1.6e-3, pairs=0.5, seen=3),
    Stage("five", 128, 33, 12, 700, 3072, 1.3e-3, pairs=0.5, seen=5),
    Stage("mixed", 128, 33, 24, 1700, 5208, 1.3e-3, pairs=0.55, density=0.2, turns=MIXED, cools=True),
    Stage("whole", 128, 33, 4, 600, 5208, 7e-4, pairs=0.55, density=0.2, turns=((0, 4), (0, 4), (9, 6)), cools=True),
    Stage("noisy", 128, 33, 4, 1700, 5208, 5e-4, pairs=0.55, density=0.2, noise=0.73, cools=True),
    Stage("beside", 128, 33, 24, 1400, 5208, 1.2e-3, pairs=0.6, density=0.2, turns=MIXED, noise=0.65, cools=True),
    Stage("close", 128, 33, 12, 700, 5208, 7e-4, pairs=0.65, density=0.2, turns=MIXED[1:5], noise=0.65, cools=True),
    Stage("calm", 128, 33, 12, 1700, 5208, 1.1e-3, pairs=0.65, density=0.2, turns=MIXED[1:5], noise=0.65, cools=True),
    Stage("lit", 128, 33, 12, 680, 2560, 1.1e-3, pairs=0.7, density=0.2, turns=MIXED[1:5], noise=0.75, cools=True),
    Stage("clear", 128, 33, 12, 2200, 2560, 1.1e-3, pairs=0.7, density=0.2, turns=MIXED[1:5], noise=0.7, cools=True),
    Stage("sure", 128, 33, 12, 1200, 2560, 9e-4, pairs=0.6, density=0.2, turns=MIXED[1:5], noise=0.67, cools=True),
)
FLOW_SHIFT = 6.0  # of the shipped scheduler: about that of the last stage's noise levels on whole clips


class Optimizers:
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for all else, with one learning rate."""

    def __init__(self, student: Student):
        def hidden(name: str, value: Tensor) -> bool:
            return value.ndim == 2 and ".blocks." in f".{name}" and "relative_attention_bias" not in name

        named = [(name, value) for name, value in student.named_parameters() if value.requires_grad]
        matrices = [value for name, value in named if hidden(name, value)]
        others = [value for name, value in named if not hidden(name, value)]
        self.parts = [
            torch.optim.Muon(matrices, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def pick(stage: Stage, generator: torch.Generator) -> Tensor:
    """The latent frames that a step sees, int64: evenly spaced, near or far, early or late."""
    seen = stage.seen or stage.latents
    widest = max(1, (stage.latents - 1) // max(1, seen - 1))
    step = int(torch.randint(1, widest + 1, (1,), generator=generator))
    first = int(torch.randint(stage.latents - step * (seen - 1), (1,), generator=generator))
    return first + step * torch.arange(seen)


def make_pool(vae: Any, stage: Stage, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Latents (float16) and token ids of ``stage.pool`` rendered clips, fixed by the seed and kept in ``folder``, for
    all stages that want the same."""
    kind = f"{seed}_{stage.pool}_{stage.pixels}_{stage.frames}_{stage.pairs}"
    path = folder / f"pool_{kind}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    rng, tokenizer, latents, texts = random.Random(kind), make_tokenizer(), [], []
    with torch.no_grad():
        for start in range(0, stage.pool, 32):
            video, captions = clips(min(32, stage.pool - start), stage.frames, stage.pixels, rng, pairs=stage.pairs)
            latents.append(encode(vae, video).half())
            texts += captions
    ids = tokenizer(texts, padding="max_length", max_length=WORDS, return_tensors="pt").input_ids
    pool = (torch.cat(latents), ids)
    write(path, pool)
    return pool


class Run:
    """One training run in a folder: what it has learnt, where it is, and its record of losses."""

    def __init__(self, folder: Path, seed: int, stages: tuple[Stage, ...] = STAGES, processes: Processes | None = None):
        self.folder, self.seed, self.stages = folder, seed, stages
        self.processes = processes or Processes()
        for part in (part for stage in stages for part in stage.parts):
            self.processes.share(part.batch)  # a batch that cannot be shared is an error now, not hours later
        torch.manual_seed(seed)
        self.student = Student(make_transformer(), make_text_encoder())
        self.optimizers = Optimizers(self.student)
        self.average = [value.detach().clone() for value in self.student.parameters()]
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.losses: list[tuple[str, int, float]] = []
        if (folder / "run.pt").exists():
            self._load(torch.load(folder / "run.pt", weights_only=True))

    def _load(self, saved: dict[str, Any]) -> None:
        self.student.load_state_dict(saved["weights"])
        self.optimizers.load_state_dict(saved["optimizers"])
        self.average = saved["average"]
        self.stage, self.step, self.seconds, self.losses = (
            saved[key] for key in ("stage", "step", "seconds", "losses")
        )

    def save(self) -> None:
        """Everything that the next start needs."""
        if not self.processes.is_first:
            return
        body = {"weights": self.student.state_dict(), "optimizers": self.optimizers.state_dict()}
        body |= {"average": self.average, "stage": self.stage, "step": self.step}
        write(self.folder / "run.pt", body | {"seconds": self.seconds, "losses": self.losses})

    def train(self, vae: Any, *, compiled: bool = True, every: int = 100, on_step: Told = lambda *told: None) -> None:
        """Trains what is left of the stages; ``on_step(stage name, step, loss)`` after every step."""
        if compiled:
            transformer: Any = self.student.transformer
            transformer.compile_repeated_blocks(dynamic=False)
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            pool = self.processes.first_then_others(functools.partial(make_pool, vae, stage, self.seed, self.folder))
            self._train_stage(stage, pool, every, on_step)
            self.stage, self.step = self.stage + 1, 0
            self.save()

    @contextlib.contextmanager
    def _attention(self, stage: Stage) -> Iterator[None]:
        transformer: Any = self.student.transformer
        if stage.density == 1:
            # Short sequences: three plain products are faster than the fused kernel, whose backward is slow on CPUs.
            transformer.set_attention_backend("_native_math" if stage.tokens < 1500 else "native")
            yield
            return
        sparse = PSAConfig(density=stage.density, mask_mode="proportional", exponent=1.0, bias="variance")
        with enable(transformer, config=sparse), torch.compiler.set_stance("force_eager"):
            yield

    def _train_stage(self, stage: Stage, pool: tuple[Tensor, Tensor], every: int, on_step: Told) -> None:
        latents, ids = pool
        empty = torch.zeros(WORDS, dtype=torch.long)
        empty[0] = 1
        while self.step < stage.steps:
            began = time.perf_counter()
            part = stage.parts[self.step % len(stage.parts)]
            generator = torch.Generator().manual_seed((self.seed * 64 + self.stage) * 1_000_003 + self.step)
            chosen = torch.randint(stage.pool, (part.batch,), generator=generator)
            blank = torch.rand(part.batch, 1, generator=generator) < 0.12  # for classifier-free guidance
            texts = torch.where(blank, empty, ids[chosen])
            times = pick(part, generator)
            self.student.rope.times = times
            clean, share = latents[chosen][:, :, times].float(), self.processes.share(part.batch)
            with self._attention(part):
                loss = self.student.loss(clean, texts, part.shift, generator, share)
                loss.backward()
            loss = loss.detach()
            gradients = [value.grad for value in self.student.parameters() if value.grad is not None]
            self.processes.average([*gradients, loss])
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizers.step(self._rate(stage))
            self._follow()
            self.step += 1
            self.seconds += time.perf_counter() - began
            self.losses.append((stage.name, self.step, loss.item()))
            if self.step % every == 0:
                self.save()
            on_step(stage.name, self.step, loss.item())

    def _rate(self, stage: Stage) -> float:
        """Warm-up at the very start; within a stage, down to the next stage's rate or to a tenth (the last too)."""
        cools = stage.cools or self.stage + 1 == len(self.stages)
        after = 0.1 * stage.rate if cools else self.stages[self.stage + 1].rate
        warm = min(1.0, (self.step + 1) / 100) if self.stage == 0 else 1.0
        return warm * (stage.rate + (after - stage.rate) * self.step / stage.steps)

    def _follow(self, memory: float = 0.997) -> None:
        """The running average of the weights is what is shipped."""
        memory = min(memory, 1 - 1 / (1 + self.step + 1000 * self.stage))
        torch._foreach_lerp_(self.average, [value.detach() for value in self.student.parameters()], 1 - memory)

    def export(self, vae: Any, folder: Path) -> None:
        """Writes the averaged model as a pipeline folder, with the record of its training."""
        student = Student(make_transformer(), make_text_encoder())
        with torch.no_grad():
            for value, mean in zip(student.parameters(), self.average, strict=True):
                value.copy_(mean)
        save(folder, vae, student.text_encoder, student.transformer, flow_shift=FLOW_SHIFT)
        curve = [(name, step, round(loss, 4)) for name, step, loss in self.losses if step % 20 == 0]
        body = {"seed": self.seed, "seconds": round(self.seconds), "processes": self.processes.count}
        body |= {"stages": [stage.__dict__ for stage in self.stages], "loss": curve, "torch": torch.__version__}
        (folder / "training.json").write_text(json.dumps(body))


def start_from(run: Run, folder: Path, stage: str) -> None:
    """Puts a finished checkpoint's weights and autoencoder into a fresh run, at the beginning of ``stage``."""
    from diffusers import WanPipeline

    names = [each.name for each in run.stages]
    if stage not in names:
        raise typer.BadParameter(f"from-stage: {stage!r} is not one of {', '.join(names)}")
    pipe = WanPipeline.from_pretrained(folder)
    finished = Student(pipe.transformer, pipe.text_encoder)
    run.student.load_state_dict(finished.state_dict())
    run.average = [value.detach().clone() for value in run.student.parameters()]
    run.stage = names.index(stage)
    if run.processes.is_first:
        weights, config = pipe.vae.state_dict(), pipe.vae.config
        write(run.folder / "vae.pt", {"weights": weights, "mean": config.latents_mean, "std": config.latents_std})
    run.save()


def _progress(shown: bool) -> Progress:
    count, loss = MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}")
    return Progress(
        TextColumn("{task.description}"), BarColumn(), count, loss, TimeRemainingColumn(), disable=not shown
    )


def main(
    output: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run in it is continued.")],
    seed: int = 0,
    vae_steps: Annotated[tuple[int, int], typer.Option(help="Of the autoencoder: compact, then sharp.")] = (1400, 1200),
    scale: Annotated[float, typer.Option(help="Multiplies every stage's steps and clips.", min=0.001)] = 1.0,
    start: Annotated[
        str, typer.Option("--from", help="'shipped' or a finished checkpoint's folder to go on from.")
    ] = "",
    from_stage: Annotated[str, typer.Option(help="With --from: the stage to begin.")] = "sure",
    compiled: Annotated[bool, typer.Option(help="Compile the transformer's blocks.")] = True,
) -> None:
    """Train the tiny text-to-video model from clips that it draws itself, and write it to OUTPUT/model."""
    stages = tuple(
        replace(stage, steps=max(1, round(stage.steps * scale)), pool=max(stage.batch, round(stage.pool * scale)))
        for stage in STAGES
    )
    processes = Processes.join()
    run = Run(output, seed, stages, processes)
    if start and run.stage == run.step == 0:
        start_from(run, path() if start == "shipped" else Path(start), from_stage)
    with _progress(processes.is_first) as progress:
        lengths = dict(zip(("autoencoder", "sharpening"), vae_steps, strict=True)) | {
            stage.name: stage.steps for stage in stages
        }
        bars = {name: progress.add_task(name, total=steps, loss=float("nan")) for name, steps in lengths.items()}

        def on_step(name: str, step: int, loss: float) -> None:
            progress.update(bars[name], completed=step, loss=loss)

        vae = processes.first_then_others(
            lambda: train_autoencoder(output, steps=vae_steps, seed=seed, on_step=on_step)
        )
        run.train(vae, compiled=compiled, on_step=on_step)
    if processes.is_first:
        run.export(vae, output / "model")
        typer.echo(f"wrote {output / 'model'} after {run.seconds:.0f} s of training")


if __name__ == "__main__":
    typer.run(main)

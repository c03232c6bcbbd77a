"""`psa evaluate`: benchmarks over data and weights that the user has."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import PSAError
from .progress import progress

evaluate = typer.Typer(no_args_is_help=True, help="Benchmarks, for those who have the data and the weights.")
out = Console()


@evaluate.callback()
def benchmarks() -> None:
    """Benchmarks, for those who have the data and the weights."""


@evaluate.command("video-mme")
def video_mme(
    data: Annotated[Path, typer.Option("--data", help="Folder with questions.jsonl and videos/.")],
    model: Annotated[str, typer.Option("--model", help="A local folder or a hub id.")] = "Qwen/Qwen2.5-VL-7B-Instruct",
    mode: Annotated[str, typer.Option("--mode", help="dense, psa or both.")] = "both",
    preset: Annotated[str | None, typer.Option("--preset", "--attention_preset", help="Of section Qwen2.5_VL.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of the work to keep, in (0, 1].")] = None,
    attention_config: Annotated[Path | None, typer.Option("--attention_config", help="YAML file of presets.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", help="Frames of each video.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames per second of each video.")] = None,
    max_pixels: Annotated[int | None, typer.Option("--max_pixels", help="Largest area of one frame.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many questions.")] = None,
    duration: Annotated[str | None, typer.Option("--duration", help="Only short, medium or long.")] = None,
    output: Annotated[Path, typer.Option("--output", help="One JSON row per question and mode; resumed.")] = Path(
        "outputs/video-mme.jsonl"
    ),
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as one JSON document.")] = False,
) -> None:
    """Video-MME: accuracy by duration, dense and with PSA. Stop and start again as you like."""
    from .. import evaluate as room
    from .. import understand
    from ..devices import pick_device

    device = pick_device(device)
    modes = {"dense": ("dense",), "psa": ("psa",), "both": ("dense", "psa")}.get(mode)
    if modes is None:
        raise PSAError(f"--mode: {mode!r} is not one of dense, psa, both")
    questions = [q for q in room.read_questions(data) if duration in (None, q.duration)][:limit]
    if not questions:
        raise PSAError(f"--duration: no question is {duration!r}")
    path = str(attention_config) if attention_config else None
    settings = {"preset": preset, "density": density, "attention_config": path}
    understand.check_settings(use_psa="psa" in modes, **settings)
    checked = understand.check_model(model)
    loaded = understand.load(model, config=checked, dtype=dtype, device=device)
    sampling = {"frames": frames, "fps": fps, "max_pixels": max_pixels}
    with progress() as bar:
        task = bar.add_task("answering", total=len(questions) * len(modes))

        def step(row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=f"{row['question_id']} {row['mode']}")

        rows = room.evaluate(loaded, questions, output, modes=modes, on_row=step, **sampling, **settings)
    if as_json:
        sys.stdout.write(json.dumps({"model": model, "scores": room.summary(rows)}, indent=1) + "\n")
        return
    table = Table("mode", "duration", "questions", "accuracy", "density", "first token")
    for score in room.scores(rows):
        kept = "" if score.density is None else f"{score.density:.3f}"
        first = "" if score.first_token_seconds is None else f"{score.first_token_seconds:.2f} s"
        table.add_row(score.mode, score.duration, str(score.questions), f"{score.accuracy:.3f}", kept, first)
    out.print(table)
    failed = sum("error" in row for row in rows)
    if failed:
        out.print(f"[yellow]{failed} answers are missing, as their videos could not be read; see {output}[/yellow]")
    out.print(f"rows {output}")

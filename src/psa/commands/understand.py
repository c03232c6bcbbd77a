"""`psa understand`: a question about images or a video, dense, with PSA, or both side by side."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .progress import progress

if TYPE_CHECKING:
    from ..understand import Answer, Comparison

out = Console()
Inputs = Annotated[list[Path], typer.Option("--input", help="An image, a video, or a folder of pictures; repeatable.")]


def understand(
    inputs: Inputs,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    model: Annotated[str, typer.Option("--model", help="A local folder or a hub id.")] = "Qwen/Qwen2.5-VL-7B-Instruct",
    kind: Annotated[str | None, typer.Option("--type", help="image or video; default: by the file's name.")] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Frames to take from the video, evenly spread.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", help="Frames to take per second (default 2, at most 768).")
    ] = None,
    use_psa: Annotated[bool, typer.Option("--use_psa", help="Prefill with pyramid sparse attention.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer dense and with PSA, and compare.")] = False,
    preset: Annotated[str | None, typer.Option("--preset", "--attention_preset", help="Of section Qwen2.5_VL.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of the work to keep, in (0, 1].")] = None,
    attention_config: Annotated[Path | None, typer.Option("--attention_config", help="YAML file of presets.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1)] = 128,
    max_pixels: Annotated[int | None, typer.Option("--max_pixels", help="Largest area of one image or frame.")] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill_chunk", min=1, help="Prefill in chunks of so many tokens, to save memory.")
    ] = None,
    min_queries: Annotated[int, typer.Option("--min_queries", min=1, help="Shorter prefills stay dense.")] = 256,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the answers to this JSON file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Ask about images or a video; see time to first token, density, and how far PSA's answer agrees."""
    from .. import understand as room
    from ..devices import pick_device

    room.check_prompt(prompt)
    device = pick_device(device)
    sampling = {"frames": frames, "fps": fps, "max_pixels": max_pixels}
    room.check_inputs(inputs, kind, **sampling)
    sparse = {"preset": preset, "density": density, "attention_config": str(attention_config or "") or None}
    room.check_settings(use_psa=use_psa or compare, **sparse)
    checked = room.check_model(model)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        vision = room.look(inputs, kind, **sampling, on_frame=show)
        bar.update(task, description="loading the model", completed=0, total=None)
        loaded = room.load(model, config=checked, dtype=dtype, device=device)
        answers: list[Answer] = []
        for sparse_now in [False, True] if compare else [use_psa]:
            bar.update(task, description="answering with psa" if sparse_now else "answering", completed=0, total=None)
            answers.append(
                room.answer(
                    loaded,
                    prompt,
                    vision,
                    use_psa=sparse_now,
                    **(sparse if sparse_now else {}),
                    min_queries=min_queries,
                    max_new_tokens=max_new_tokens,
                    prefill_chunk=prefill_chunk,
                    on_token=show,
                )
            )
    agreement = room.compare(*answers) if compare else None
    document = {
        "model": model,
        "prompt": prompt,
        "input": [str(path) for path in inputs],
        "frames": len(vision.clip.frames) if vision.clip else None,
        "images": len(vision.images) or None,
        "answers": [answer.to_dict() for answer in answers],
        "agreement": asdict(agreement) if agreement else None,
    }
    if output:
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        _show(answers, agreement)


def _show(answers: "list[Answer]", agreement: "Comparison | None") -> None:
    for answer in answers:
        if len(answers) > 1:
            out.print(f"[bold]{answer.mode}[/bold]")
        out.print(answer.text, markup=False, highlight=False)
        for note in answer.notes:
            out.print(f"[yellow]{note}[/yellow]")
    table = Table("", "prompt tokens", "answer tokens", "first token", "total", "density")
    for answer in answers:
        kept = "" if answer.density is None else f"{answer.density:.3f}"
        cells = (answer.mode, str(answer.prompt_tokens), str(answer.tokens))
        table.add_row(*cells, f"{answer.first_token_seconds:.2f} s", f"{answer.seconds:.2f} s", kept)
    out.print(table)
    if agreement:
        out.print(_agreement(agreement))


def _agreement(found: Any) -> str:
    same = "the same answer" if found.same_text else "different answers"
    return (
        f"{same}; over {found.compared} tokens: KL {found.kl_mean:.4f} nats (first {found.kl_first:.4f}), "
        f"top-1 agrees {found.top1:.0%}; first token {found.first_token_speedup:.2f}× as fast"
    )

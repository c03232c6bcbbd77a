"""The `psa` command: argument parsing and printing, nothing else."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .commands import run_app
from .commands.evaluate import evaluate
from .commands.generate import generate_command as generate
from .commands.progress import progress
from .commands.understand import understand
from .errors import PSAError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    help="Pyramid Sparse Attention: see what it keeps, what it costs and what it saves.",
)  # fmt: skip
out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--attention_config", help="YAML file of presets; else $PSA_CONFIG, else ./configs/.")
]
Device = Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one.")]
Density = Annotated[float | None, typer.Option("--density", help="Share of dense attention's work to keep, in (0, 1].")]


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, default=str) + "\n")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, GPU, and each backend: usable, or every reason why not."""
    from .doctor import diagnose

    facts = diagnose()
    if as_json:
        return print_json(facts)
    table = Table(show_header=False, box=None)
    for name in ("psa", "python", "platform", "cpu", "threads"):
        table.add_row(name, str(facts[name]))
    for name, version in facts["packages"].items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    for gpu in facts["gpus"] or [None]:
        table.add_row(
            "gpu", f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gib']} GiB" if gpu else "[dim]none[/dim]"
        )
    out.print(table)
    for name, reasons in facts["backends"].items():
        out.print(f"backend [bold]{name}[/bold]: " + ("[green]usable[/green]" if not reasons else "; ".join(reasons)))
    native = facts["native_engine"]
    engine = "compiled engine" if not native else f"portable engine, since {'; '.join(native)}"
    out.print(f"the torch backend uses its {engine}")


@app.command(name="presets")
def list_presets(
    model: Annotated[str | None, typer.Argument(help="A model or section, e.g. wan21_1.3b.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="The intervals, and the density each preset gives.")
    ] = False,
    attention_config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The presets of every model, or of one."""
    from . import presets

    sections = [presets.section(model, attention_config)] if model else list(presets.load(attention_config).values())
    if as_json:
        described = {
            s.name: {n: {**c.to_dict(), "explained": presets.explain(c)} for n, c in s.presets.items()}
            for s in sections
        }
        return print_json(described)
    for section in sections:
        out.print(_explained(section) if explain else _listed(section))
    note = "* default."
    if explain:
        note += " 1, 2, 4, 8: cumulative bounds of a row's blocks (topk) or importance (thresholdbound) at each level;"
        note += " the rest is skipped. uniform, peaked: the density on a row of equal and of 1/rank² importance."
    out.print(f"[dim]{note}[/dim]")


def _narrow(title: str, *columns: Column) -> Table:
    """Without lines between columns: 80 characters hold every name."""
    style = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 1, 0, 0)}
    return Table(*columns, title=f"\n{title}", **style)


def _listed(section: Any) -> Table:
    names = [Column(name, no_wrap=True) for name in ("preset", "mode", "block", "order")]
    rest = [Column(name, overflow="fold") for name in ("dense steps", "description")]
    table = _narrow(section.name, *names, *rest)
    for name, config in section.presets.items():
        order = config.rearrange_method if config.use_rearrange else "as is"
        row = [config.mask_mode, f"{config.block_m}×{config.block_n}", order, str(config.warmup_steps)]
        row = ["dense", "", "", ""] if config.type == "dense" else row
        table.add_row(name + ("*" if name == section.default else ""), *row, config.description)
    return table


def _explained(section: Any) -> Table:
    from .presets import explain

    names = ("preset", "mode", "1", "2", "4", "8", "uniform", "peaked")
    table = _narrow(section.name, *(Column(name, no_wrap=True) for name in names))
    for name, config in section.presets.items():
        if config.type == "dense":
            continue
        ratios = config.mask_ratios or {}
        bounds = [f"{ratios[level][0]:g}–{ratios[level][1]:g}" if level in ratios else "" for level in (1, 2, 4, 8)]
        densities = ["by error" if value is None else f"{value:.3f}" for value in explain(config).values()]
        table.add_row(name + ("*" if name == section.default else ""), str(config.mask_mode), *bounds, *densities)
    return table


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="A .safetensors file with q, k, v [B, H, L, D], or a video.")],
    model: Annotated[str | None, typer.Option("--model", help="Take the preset from this model's section.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", "--attention_preset")] = None,
    density: Density = None,
    grid: Annotated[tuple[int, int, int] | None, typer.Option("--grid", help="T H W of the tokens.")] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="Tensors are PREFIX.q, PREFIX.k, PREFIX.v.")] = "",
    causal: Annotated[bool, typer.Option("--causal")] = False,
    output: Annotated[Path, typer.Option("--output", help="The picture of the level maps.")] = Path(
        "outputs/inspect.png"
    ),
    attention_config: ConfigFile = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Level map, density per head, level histogram, and error against dense attention."""
    from . import presets
    from .devices import pick_device
    from .functional import resolve_config
    from .inspect import inspect as run
    from .inspect import load_qkv

    if preset and not model and "/" not in preset:
        raise PSAError("--preset: say of which model with --model, or give section/preset")
    chosen = presets.get(model or "", preset, attention_config) if model or preset else None
    config, place = resolve_config(chosen, density), pick_device(device)
    q, k, v, found = load_qkv(source, prefix)
    q, k, v = (tensor.to(place) for tensor in (q, k, v))
    result = run(q, k, v, config, grid=grid or (None if causal else found), is_causal=causal, picture=output)
    if as_json:
        return print_json(result.to_dict())
    table = Table("head", "density", "relative error")
    for head, (kept, error) in enumerate(
        zip(result.plan.density_per_head[0].tolist(), result.error[0].tolist(), strict=True)
    ):
        table.add_row(str(head), f"{kept:.4f}", f"{error:.4f}")
    out.print(table)
    shares = ", ".join(f"{level or 'skip'}: {share:.1%}" for level, share in result.plan.histogram().items())
    out.print(f"levels  {shares}")
    out.print(f"density {result.plan.density:.4f}, cosine {result.cosine:.5f}")
    for note in result.plan.notes:
        out.print(f"[yellow]{note}[/yellow]")
    out.print(f"picture {result.picture}")


@app.command()
def bench(
    lengths: Annotated[list[int], typer.Option("--length", min=1)] = [4096, 16384],  # noqa: B006
    head_dims: Annotated[list[int], typer.Option("--head_dim", min=1)] = [64, 128],  # noqa: B006
    densities: Annotated[list[float], typer.Option("--density")] = [0.15],  # noqa: B006
    backends: Annotated[list[str], typer.Option("--backend")] = ["auto"],  # noqa: B006
    heads: Annotated[int, typer.Option("--heads", min=1)] = 4,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16; default bfloat16 on a GPU, else float32.")
    ] = "",
    causal: Annotated[bool, typer.Option("--causal")] = False,
    device: Device = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", help="Append rows to this .jsonl file; a plot goes beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sizes and backends against dense attention: verified, then timed."""
    import torch

    from . import bench as room

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype and dtype not in kinds:
        raise PSAError(f"--dtype: {dtype!r} is not one of {', '.join(kinds)}")
    rows, table = (
        [],
        Table("backend", "L", "D", "density", "dense ms", "plan ms", "attend ms", "total ms", "speed-up", "of ideal"),
    )
    cases = len(lengths) * len(head_dims) * len(densities) * len(backends)
    with progress() as bar:
        task = bar.add_task("verifying", total=cases)
        found = room.bench(
            lengths,
            head_dims,
            densities,
            backends=backends,
            heads=heads,
            dtype=kinds[dtype] if dtype else None,
            is_causal=causal,
            device=device,
            repeats=repeats,
        )
        for row in found:
            rows.append(row)
            bar.update(task, advance=1, description=f"L={row.length} D={row.head_dim} density {row.density:.2f}")
            if output:
                room.write_rows([row], output)
            times = (f"{1e3 * value:.4g}" for value in (row.dense, row.plan, row.attend, row.total))
            table.add_row(
                row.backend,
                str(row.length),
                str(row.head_dim),
                f"{row.density:.3f}",
                *times,
                f"{row.speedup:.2f}×",
                f"{row.of_ideal:.2f}",
            )
    if as_json:
        from dataclasses import asdict

        return print_json([asdict(row) for row in rows])
    out.print(table)
    first = rows[0]
    where = f"{first.device}, {first.threads} threads, torch {first.torch}, {first.dtype}"
    out.print(f"[dim]{where}. of ideal: speed-up × density[/dim]")
    if output:
        out.print(f"rows {output}, plot {room.plot(rows, output.with_suffix('.png'))}")


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option("--prompt", help="A caption of the tiny model's grammar.")] = None,
    density: Annotated[float, typer.Option("--density", help="Share of dense attention's work that PSA keeps.")] = 0.15,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    output_dir: Annotated[Path, typer.Option("--output_dir")] = Path("outputs/demo"),
    device: Annotated[str, typer.Option("--device", help="Where to make it.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """A clip by the bundled text-to-video model, with dense attention and with PSA, side by side and in numbers."""
    from dataclasses import asdict

    from . import demo as room
    from .tiny.scenes import GRAMMAR

    with progress() as bar:
        tasks = {name: bar.add_task(name, total=room.STEPS) for name in ("dense", "psa")}
        result = room.run(
            prompt or room.PROMPT, output_dir, density=density, seed=seed, device=device,
            on_step=lambda method, step: bar.update(tasks[method], completed=step),
        )  # fmt: skip
    if as_json:
        return print_json(asdict(result))
    out.print(f"[bold]{result.prompt}[/bold], {result.tokens} video tokens, {room.STEPS} steps")
    table = Table("", "attention work", "seconds", "shows the prompt")
    table.add_row("dense", "100 %", f"{result.seconds_dense:.1f}", "yes" if result.seen_dense else "no")
    table.add_row("PSA", f"{result.density:.1%}", f"{result.seconds_psa:.1f}", "yes" if result.seen_psa else "no")
    out.print(table)
    out.print(f"{result.speedup:.2f}× as fast; PSNR {result.psnr:.1f} dB and SSIM {result.ssim:.3f} to the dense clip")
    out.print(f"video {result.video}\npicture {result.picture}\nnumbers {result.record}", highlight=False)
    out.print(f"[dim]Other prompts: psa demo --prompt '…', of the grammar\n{escape(GRAMMAR)}[/dim]", highlight=False)


app.command("generate")(generate)
app.command("understand")(understand)
app.add_typer(evaluate, name="evaluate")


def main() -> None:
    """Entry point of `psa`."""
    run_app(app)


if __name__ == "__main__":
    main()

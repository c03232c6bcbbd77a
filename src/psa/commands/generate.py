"""`psa generate`, and the scripts under examples/inference that call it with the published flags."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn

from ..errors import ConfigError
from ..generate import Event, GenerateRequest, Result, generate, read_prompts
from . import run_app
from .progress import progress

console = Console(stderr=True, soft_wrap=True)
Option = typer.Option
WORDS = {
    "load": "loading",
    "skip": "finished before:",
    "done": "wrote",
    "fail": "[red]failed[/red]",
    "advice": "[yellow]note[/yellow]",
}
MODEL = "A known model (see examples/README.md), a checkpoint folder, or a hub id."


def generate_command(
    model: Annotated[str, Option("--model", help=MODEL)] = "wan21_1.3b",
    prompt: Annotated[list[str] | None, Option("--prompt", help="May be given several times.")] = None,
    prompt_file: Annotated[Path | None, Option("--prompt_file", help="One prompt a line.")] = None,
    negative_prompt: Annotated[str | None, Option("--negative_prompt")] = None,
    image: Annotated[str | None, Option("--image", help="First frame, for image-to-video.")] = None,
    model_path: Annotated[
        str | None, Option("--model_path", help="Take the known model's weights from this folder.")
    ] = None,
    lora_path: Annotated[
        str | None, Option("--lora_path", help="LoRA weights: a .safetensors file or its folder.")
    ] = None,
    use_psa: Annotated[bool | None, Option("--use_psa/--dense", help="PSA, or dense attention.")] = None,
    preset: Annotated[str | None, Option("--preset", "--attention_preset", help="See `psa presets`.")] = None,
    attention_config: Annotated[str | None, Option("--attention_config", help="YAML file of presets.")] = None,
    density: Annotated[float | None, Option("--density", help="Share of dense attention's work, in (0, 1].")] = None,
    no_warmup: Annotated[bool, Option("--no_warmup", help="No dense first steps.")] = False,
    warmup_steps: Annotated[int | None, Option("--warmup_steps", min=0, help="Dense first steps.")] = None,
    min_queries: Annotated[int | None, Option("--min_queries", min=0, help="Up to so many tokens stay dense.")] = None,
    width: Annotated[int | None, Option("--width")] = None,
    height: Annotated[int | None, Option("--height")] = None,
    num_frames: Annotated[int | None, Option("--num_frames")] = None,
    num_inference_steps: Annotated[int | None, Option("--num_inference_steps")] = None,
    guidance_scale: Annotated[float | None, Option("--guidance_scale")] = None,
    guidance_scale_2: Annotated[float | None, Option("--guidance_scale_2", help="Of the low-noise expert.")] = None,
    fps: Annotated[int | None, Option("--fps")] = None,
    seed: Annotated[int, Option("--seed", help="Of the first video; the next ones count on.")] = 42,
    output_dir: Annotated[str | None, Option("--output_dir", help="Default: outputs/{model}/{timestamp}.")] = None,
    dtype: Annotated[str | None, Option("--dtype", help="bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, Option("--device")] = None,
    offload: Annotated[str | None, Option("--offload", help="model or sequential: weights wait on the CPU.")] = None,
    vae_tiling: Annotated[bool, Option("--vae_tiling", help="Decode in tiles.")] = False,
    context_parallel: Annotated[str | None, Option("--context_parallel", help="ulysses=4, ring=2, or both.")] = None,
    compare: Annotated[bool, Option("--compare", help="Also run dense; side-by-side video and metrics.")] = False,
    verbose: Annotated[bool, Option("--verbose", help="Settings and density per layer; tracebacks.")] = False,
) -> None:
    """Videos from prompts, by PSA."""
    run(locals())


def run(given: dict[str, Any]) -> None:
    """Makes the videos that parsed options ask for; exits with 1 when any failed.

    Raises:
        PSAError: before any weight loads.
    """
    if given.get("prompt") and given.get("prompt_file"):
        raise ConfigError("prompt_file: give --prompt or --prompt_file, not both")
    prompts = read_prompts(given["prompt_file"]) if given.get("prompt_file") else tuple(given.get("prompt") or ())
    names = {item.name for item in fields(GenerateRequest)}
    settings = {name: value for name, value in given.items() if name in names and name != "context_parallel"}
    use_psa = given.get("use_psa")
    request = GenerateRequest(
        **{
            **settings,
            "prompts": prompts,
            "dense": use_psa is False,
            "warmup_steps": 0 if given.get("no_warmup") else given.get("warmup_steps"),
            "context_parallel": parse_degrees(given.get("context_parallel")),
        }
    )
    if given.get("verbose"):
        config = request.config()
        console.print(f"attention: {'dense' if config is None else config.to_dict()}", markup=False)
    with ProgressView() as view:
        results = generate(request, view)
    report(results, bool(given.get("verbose")))


def parse_degrees(text: str | None) -> dict[str, int]:
    """``"ulysses=4,ring=2"`` -> {"ulysses": 4, "ring": 2}."""
    degrees = {}
    for part in (text or "").replace(",", " ").split():
        name, _, number = part.partition("=")
        if not number.isdigit():
            raise ConfigError(f"context_parallel: {part!r}; expected ulysses=N and/or ring=N")
        degrees[name] = int(number)
    return degrees


class ProgressView:
    """Shows the events of :func:`psa.generate.generate`: step, s/it, density so far, ETA, peak memory."""

    def __init__(self) -> None:
        self.bar = progress(TextColumn("{task.fields[facts]}"), console=console)
        self.task: Any = None

    def __enter__(self) -> "ProgressView":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "start":
            self._close()
            self.bar.start()
            title = f"{event.index + 1}/{event.count} {event.text[:40]}"
            self.task = self.bar.add_task(title, total=None, facts="")
        elif event.kind == "step" and self.task is not None:
            task = next(t for t in self.bar.tasks if t.id == self.task)
            facts = f"{(task.elapsed or 0) / max(1, event.step):.2f} s/it  density {event.density or 1:.3f}"
            if event.peak_bytes:
                facts += f"  {event.peak_bytes / 2**30:.1f} GiB"
            self.bar.update(self.task, completed=event.step, total=event.steps or None, facts=facts)
        elif event.kind in WORDS:
            if event.kind != "advice":
                self._close()
            where = f" {event.index + 1}/{event.count}" if event.kind == "fail" else ""
            console.print(f"{WORDS[event.kind]}{where}", end=" ")
            console.print(event.text, markup=False, highlight=False)

    def _close(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


def report(results: list[Result], verbose: bool) -> None:
    """What was made, and the failures by name; exits with 1 where there are any."""
    for result in results:
        if result.error is None and result.record:
            facts = result.record
            line = f"{result.path}  {facts.get('seconds', 0):.1f} s  density {facts.get('density') or 1:.3f}"
            if compared := facts.get("compare"):
                likeness = (f"  {name} {compared[name]:.3f}" for name in ("psnr", "ssim", "lpips") if name in compared)
                line += f"  dense {compared['seconds_dense']:.1f} s, {compared['speedup']:.2f}×" + "".join(likeness)
            console.print(line, markup=False, highlight=False)
            if verbose and facts.get("stats"):
                console.print({name: part["layers"] for name, part in facts["stats"]["models"].items()})
    failed = [result for result in results if result.error]
    if failed:
        for result in failed:
            console.print(
                f"failed: {result.path.name} ({result.prompt[:60]!r}): {result.error}", markup=False, highlight=False
            )
        raise typer.Exit(1)


def script(models: tuple[str, ...], configs: dict[str, dict[str, Any]] | None = None) -> None:
    """The published scripts: ``--model`` one of ``models``, PSA only with ``--use_psa``, settings from ``configs``."""

    def command(context: typer.Context, **given: Any) -> None:
        if given["model"] not in models:
            raise ConfigError(f"model: {given['model']!r} is not one of {', '.join(models)}; `psa generate` takes any")
        edited = {name: value for name, value in (configs or {}).get(given["model"], {}).items() if value is not None}
        chosen = {name: value for name, value in given.items() if value not in (None, [])}
        run({**edited, **chosen, "use_psa": bool(given["use_psa"])})

    import inspect

    parameters = dict(inspect.signature(generate_command).parameters)
    parameters["model"] = parameters["model"].replace(default=models[0])
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    command.__signature__ = inspect.Signature([context, *keyword])  # type: ignore[attr-defined]
    command.__doc__ = generate_command.__doc__
    command.__annotations__ = {**generate_command.__annotations__, "context": typer.Context, "return": None}
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    )
    app.command()(command)
    run_app(app)

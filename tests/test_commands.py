"""`psa inspect`, `bench`, `doctor` and `presets`, and that every command line in the pages is one that `psa` takes."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import psa
from psa import presets
from psa.backends import NAMES
from psa.bench import BenchRow
from psa.cli import app
from psa.devices import pick_device
from psa.video import write_video

ROOT = Path(__file__).parents[1]
PAGES = [page for page in ROOT.rglob("*.md") if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)]
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(*given):
    return CliRunner().invoke(app, [str(part) for part in given])


def document(*given):
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def qkv(tmp_path):
    """A file with two heads of q, k, v under a prefix that states its grid."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"layer.{name}": torch.randn(1, 2, 4 * 12 * 16, 32, generator=g) for name in "qkv"}
    path = tmp_path / "qkv.safetensors"
    save_file(tensors, path, metadata={"layer": json.dumps({"grid_thw": [4, 12, 16]})})
    return path


def test_inspect_says_what_is_kept_and_how_wrong_it_is(qkv, tmp_path):
    picture = tmp_path / "new" / "levels.png"
    coarse, fine = (
        document("inspect", qkv, "--density", density, "--output", picture, "--device", "cpu")
        for density in (0.15, 0.5)
    )
    assert picture.stat().st_size > 10_000
    assert coarse["density"] <= 0.16 < fine["density"] <= 0.51
    assert [len(values) for values in coarse["density_per_head"]] == [2]
    for rough, close in zip(coarse["error_per_head"][0], fine["error_per_head"][0], strict=True):
        assert 0.1 < close < rough < 1.2  # random keys: most of the softmax lies everywhere
    assert abs(sum(coarse["levels"].values()) - 1) < 1e-6
    done = run("inspect", qkv, "--density", 0.15, "--output", picture, "--prefix", "layer")
    assert done.exit_code == 0 and "relative error" in done.output and f"{coarse['density']:.4f}" in done.output


def test_inspect_reads_videos_with_a_models_preset(tmp_path):
    clip = tmp_path / "clip.mp4"
    write_video(clip, (torch.rand(16, 64, 64, 3) * 255).to(torch.uint8).numpy(), 8)
    found = document("inspect", clip, "--model", "wan21_1.3b", "--preset", "psa_topk", "--output", tmp_path / "a.png")
    assert 0 < found["density"] < 1 and len(found["error_per_head"][0]) >= 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("inspect", "gone.mp4"), "gone.mp4: no such file"),
        (("inspect", "QKV", "--prefix", "other"), "no tensor 'other.q'; it holds layer.k"),
        (("inspect", "QKV", "--preset", "psa_topk"), "say of which model"),
        (("inspect", "QKV", "--density", "1.5"), "density"),
        (("inspect", "QKV", "--grid", "4", "12", "12"), "grid"),
        (("inspect", "QKV", "--device", "gpu"), "'gpu' is no device"),
        (("inspect", "QKV", "--device", "xpu"), "'xpu' is not available"),
        (("bench", "--device", "xpu"), "'xpu' is not available"),
        (("bench", "--dtype", "int8"), "'int8' is not one of float32"),
        (("bench", "--backend", "gpu"), "gpu"),
        (("demo", "--device", "xpu"), "'xpu' is not available"),
        (("demo", "--prompt", "a cat"), "grammar|of the form|a \\{small"),
        (("presets", "wan99"), "wan99"),
    ],
)
def test_mistakes_are_told_before_work_starts(given, told, qkv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*(qkv if part == "QKV" else part for part in given))
    assert isinstance(done.exception, psa.PSAError), done.output
    assert re.search(told, str(done.exception)), done.exception
    assert not (tmp_path / "outputs").exists()


def test_a_device_is_one_of_this_machine(monkeypatch):
    with monkeypatch.context() as machine:
        machine.setattr(torch.accelerator, "is_available", lambda: True)
        machine.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        machine.setattr(torch.accelerator, "device_count", lambda: 2)
        assert [pick_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
        for name in ("cuda:2", "xpu"):
            with pytest.raises(psa.ConfigError, match=f"'{name}' is not available; this machine has cuda"):
                pick_device(name)


def test_bench_prints_appends_and_plots(tmp_path):
    rows = tmp_path / "rows.jsonl"
    sizes = ("--length", 2048, "--head_dim", 32, "--heads", 1, "--repeats", 1, "--density", 0.2, "--density", 0.5)
    found = document("bench", *sizes, "--output", rows)
    assert [json.loads(line) for line in rows.read_text().splitlines()] == found
    for row, density in zip(found, (0.2, 0.5), strict=True):
        assert abs(row["density"] - density) < 0.02
        assert row["speedup"] == pytest.approx(row["dense"] / row["total"])
    done = run("bench", *sizes, "--causal", "--dtype", "bfloat16", "--output", rows)
    assert done.exit_code == 0 and "speed-up" in done.output and "bfloat16" in done.output
    kept = [BenchRow(**json.loads(line)) for line in rows.read_text().splitlines()]
    assert [row.is_causal for row in kept] == [False, False, True, True] and rows.with_suffix(
        ".png"
    ).stat().st_size > 5_000


def test_doctor_explains_every_backend():
    facts = document("doctor")
    assert facts["backends"].keys() == set(NAMES) and facts["packages"]["torch"] == torch.__version__
    done = run("doctor")
    for name, reasons in facts["backends"].items():
        assert f"backend {name}: {'; '.join(reasons) or 'usable'}"[:60] in done.output.replace("\n", " ")
    assert facts["backends"]["reference"] == []


def test_presets_are_listed_and_explained():
    everything = document("presets")
    assert everything.keys() == presets.load().keys()
    one = document("presets", "wan21_1.3b")
    ((name, described),) = one.items()
    assert described == everything[name] and "psa_balanced" in described
    for told in (run("presets", "wan21_1.3b"), run("presets", "wan21_1.3b", "--explain")):
        assert told.exit_code == 0 and all(preset in told.output for preset in described if preset != "baseline")


def command_lines():
    """Every line of the pages' shell blocks that calls `psa`, without what starts it."""
    for page in PAGES:
        for block in BASH.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "psa" in words and "install" not in words:
                    yield page, words[words.index("psa") + 1 :]


def test_command_lines_in_the_pages_are_taken():
    group, seen = typer.main.get_command(app), set()
    for page, (name, *words) in command_lines():
        command = group.commands[name]
        if name == "evaluate":
            command, words = command.commands[words[0]], words[1:]
        try:
            with command.make_context(name, words):
                seen.add(name)
        except Exception as error:
            pytest.fail(f"{page.relative_to(ROOT)}: psa {name} {shlex.join(words)}: {error}")
    assert seen == group.commands.keys()

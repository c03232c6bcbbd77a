"""The pages of examples/qwen2.5-vl-example: both languages alike, their code runs, their numbers are on record."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

import psa
from psa.commands.evaluate import evaluate
from psa.commands.understand import understand

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "qwen2.5-vl-example"
PAGES = (FOLDER / "README.md", FOLDER / "README_zh.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[\d.]+")


def code(language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(PAGES[0].read_text(encoding="utf-8")) if kind == language]


def test_both_languages_have_the_same_headings_and_code():
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    depths = [re.findall(r"^#+(?= )", FENCE.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert depths[0] == depths[1] and len(depths[0]) > 3
    assert FENCE.findall(english) == FENCE.findall(chinese)


def test_python_runs(monkeypatch, capsys):
    import tiny_lm
    import transformers

    model = tiny_lm.qwen_vl()
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    (text,) = code("python")
    exec(text.replace("max_new_tokens=128", "max_new_tokens=2"), {"inputs": tiny_lm.qwen_inputs((2, 32, 32))})
    assert "'sparse_calls': 1" in capsys.readouterr().out
    assert model.config.text_config._attn_implementation == "sdpa"


def test_commands_have_the_options_that_the_page_gives_them():
    apps = {}
    for name, command in (("understand", understand), ("evaluate", evaluate)):
        if isinstance(command, typer.Typer):
            app = command
        else:
            app = typer.Typer()
            app.command()(command)
        apps[name] = typer.main.get_command(app)
    known = {option for p in apps["understand"].params for option in p.opts}
    video_mme = {option for p in apps["evaluate"].commands["video-mme"].params for option in p.opts}
    called = [shlex.split(line, comments=True) for text in code("bash") for line in text.splitlines()]
    asked = {"understand": set(), "evaluate": set()}
    for line in called:
        if line[0] == "psa" or line[-1].startswith("--use"):
            asked["evaluate" if "evaluate" in line else "understand"] |= {word for word in line if word[:2] == "--"}
    assert asked["understand"] and asked["understand"] <= known
    assert asked["evaluate"] and asked["evaluate"] <= video_mme
    for page in PAGES:
        table = re.findall(r"^\| (`--.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(re.findall(r"`(--\w+)", " ".join(table))) <= known


def test_numbers_are_those_on_record():
    record = ROOT / "benchmarks" / "results" / "long_context.jsonl"
    found = {}
    for row in map(json.loads, record.read_text(encoding="utf-8").splitlines()):
        if row["task"] == "copy":
            found[row["asked_density"], row["length"], row["method"]] = row["of_dense"]
    for page in PAGES:
        rows = re.findall(r"^\| (0\.\d+ \| \d+ \|.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(rows) == 10
        for row in rows:
            density, length, *shares = (float(NUMBER.findall(cell)[0]) for cell in row.split("|"))
            for method, share in zip(("psa", "published", "binary", "one_mean"), shares, strict=True):
                assert share == pytest.approx(found[density, int(length), method], abs=6e-4)


def test_the_script_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qwen2.5_vl.py", "--input", "gone.mp4", "--prompt", "What?"])
    text = (FOLDER / "qwen2.5_vl.py").read_text(encoding="utf-8")
    with pytest.raises((SystemExit, psa.PSAError)) as caught:
        exec(compile(text, "qwen2.5_vl.py", "exec"), {"__name__": "__main__"})
    assert getattr(caught.value, "code", 2) == 2

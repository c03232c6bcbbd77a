"""`psa generate` and the published scripts as commands, with the flags of the seeds."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from psa.presets import get
from psa.video import read_video

pytestmark = pytest.mark.usefixtures("short")
ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "inference"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a script, or ``psa``, with flags, in an empty folder and in this process: (exit code, what it printed)."""

    def call(program, *given):
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            if program == "psa":
                from psa.cli import main

                main()
            else:
                runpy.run_path(str(program), run_name="__main__")
        return ended.value.code or 0, capsys.readouterr().err

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return call


def flags(kind, folder, steps=2):
    width, height = tiny.SIZES.get(kind, tiny.SIZE)
    given = {"model_path": folder, "width": width, "height": height, "num_frames": 17, "num_inference_steps": steps}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


SEEDS = [
    ("cogvideo/cogvideo_5b.py", "cogvideo_5b_lora", "--model cogvideo_5b_lora --use_psa --attention_preset psa_4steps"),
    ("wan21/wan21_1.3b.py", "wan21_1.3b", "--use_psa --no_warmup"),
    ("wan21/wan21_14b.py", "wan21_14b", "--use_psa"),
    ("wan22/wan22_5b.py", "wan22_5b", "--use_psa"),
    ("wan22/wan22_a14b.py", "wan22_a14b", "--use_psa"),
    pytest.param(
        "cogvideo/cogvideo_5b.py", "cogvideo1.5_5b", "--model cogvideo1.5_5b --use_psa", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("script", "kind", "given"), SEEDS)
def test_seed_commands(script, kind, given, checkpoints, command, tmp_path):
    """As printed in the seeds, with a size and steps that suit the tiny checkpoints: two steps beyond the warm-up."""
    if kind == "cogvideo_5b_lora":
        tiny.lora(tmp_path / "weights" / "cogvideox-5b-psa-lora")
    preset = "psa_4steps" if "psa_4steps" in given else None
    steps = 2 if "--no_warmup" in given else get(kind, preset).warmup_steps + 2
    folder = checkpoints(kind.removesuffix("_lora"))
    code, said = command(SCRIPTS / script, "--prompt", "a garden", *given.split(), *flags(kind, folder, steps))
    assert code == 0, said
    (video,) = tmp_path.glob(f"outputs/{kind}/*/video_0000.mp4")
    assert len(read_video(video)) == 17
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["request"]["preset"] == preset and 0 < record["density"] < 1
    assert [density < 1 for density in record["stats"]["steps"].values()][-2:] == [True, True]


def test_scripts_are_dense_without_use_psa_and_take_hyphens(checkpoints, command, tmp_path):
    given = flags("wan21_1.3b", checkpoints("wan21_1.3b"))
    code, said = command(SCRIPTS / "wan21/wan21_1.3b.py", "--prompt", "a cat", "--output-dir", "dense", *given)
    assert code == 0, said
    assert json.loads((tmp_path / "dense/video_0000.json").read_text())["request"]["psa"] is None


def test_errors_of_the_commands_are_one_line(command):
    for program, name in ((SCRIPTS / "wan22/wan22_5b.py", ()), ("psa", ("generate", "--model", "wan22_5b"))):
        code, said = command(program, *name, "--prompt", "a cat", "--preset", "psa")
        assert code == 2 and said.strip().count("\n") == 0 and "psa_balanced" in said


def test_the_command_names_failures_and_exits_with_1(checkpoints, command, tmp_path, monkeypatch):
    import psa.generate as room

    run_one = room._run

    def flaky(pipe, request, config, index, tell):
        if index == 1:
            raise RuntimeError("no luck")
        return run_one(pipe, request, config, index, tell)

    monkeypatch.setattr(room, "_run", flaky)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fish\n")
    given = flags("wan21_1.3b", checkpoints("wan21_1.3b"), steps=1)
    code, said = command(
        "psa", "generate", "--prompt_file", "prompts.txt", "--no_warmup", "--output_dir", "out", *given
    )
    assert code == 1
    assert "video_0001.mp4" in said.splitlines()[-1] and "a dog" in said and "no luck" in said
    assert sorted(p.name for p in (tmp_path / "out").glob("*.mp4")) == ["video_0000.mp4", "video_0002.mp4"]


def test_killed_batch_resumes(checkpoints, tmp_path):
    """kill -9 in the middle; the same command again finishes without redoing what was finished."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    command = [
        SCRIPTS / "wan21/wan21_1.3b.py", "--prompt_file", "prompts.txt", "--use_psa", "--no_warmup",
        *flags("wan21_1.3b", checkpoints("wan21_1.3b")),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    first = None
    deadline = time.monotonic() + 900  # a busy machine takes minutes to import what is needed
    while time.monotonic() < deadline:
        first = next(tmp_path.glob("outputs/*/*/video_0000.json"), None)
        if first or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first, "the first video never came"
    before = first.stat().st_mtime_ns
    subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=env, check=True, capture_output=True)
    videos = sorted(tmp_path.glob("outputs/*/*/*.mp4"))
    assert [v.name for v in videos] == ["video_0000.mp4", "video_0001.mp4", "video_0002.mp4"]
    assert first.stat().st_mtime_ns == before
    assert all(len(read_video(v)) == 17 for v in videos)

"""`psa generate` and the published scripts, end to end on tiny checkpoints of the true classes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
av = pytest.importorskip("av")
import tiny_checkpoints as tiny  # noqa: E402

from psa.errors import PSAError  # noqa: E402
from psa.generate import Event, GenerateRequest, generate, read_prompts  # noqa: E402
from psa.presets import section  # noqa: E402
from psa.video import read_video, write_video  # noqa: E402

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "inference"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """kind -> folder of a tiny checkpoint, made when first asked for."""
    base, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(kind, **options):
        name = kind + "".join(f"-{o}" for o in options)
        if name not in made:
            made[name] = str(tiny.save(kind, base / name, **options))
        return made[name]

    return get


def request(kind, folder, **changes):
    width, height = tiny.SIZES.get(kind, tiny.SIZE)
    settings = dict(
        model=kind, prompts=("a cat",), model_path=folder, width=width, height=height, num_frames=tiny.FRAMES,
        num_inference_steps=4,
    )  # fmt: skip
    return GenerateRequest(**{**settings, **changes})


def lora(folder: Path) -> Path:
    """LoRA weights for the tiny CogVideoX, in diffusers' names."""
    import torch
    from safetensors.torch import save_file

    weights = {}
    for layer in range(2):
        for name in ("to_q", "to_k", "to_v"):
            key = f"transformer.transformer_blocks.{layer}.attn1.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, 64) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(64, 4) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def options(kind, tmp_path):
    return {"lora_path": str(lora(tmp_path / "lora"))} if kind == "cogvideo_5b_lora" else {}


QUICK = ("wan21_1.3b", "wan22_a14b", "cogvideo1.5_5b")
"""In `make test`; the others, of the same classes, in `make test-all`."""


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in tiny.KINDS])
def test_every_model_setting_end_to_end(kind, checkpoints, tmp_path, monkeypatch):
    """Dense, PSA at density 1 (the same video) and every preset, from disk to an mp4 with all frames."""
    written = {}

    def write_and_keep(path, frames, fps):
        written[path] = frames
        write_video(path, frames, fps)

    monkeypatch.setattr("psa.generate.write_video", write_and_keep)
    folder, extra = checkpoints(kind), options(kind, tmp_path)
    dense = make(request(kind, folder, dense=True, output_dir=str(tmp_path / "dense"), **extra))
    full = make(request(kind, folder, density=1.0, warmup_steps=0, output_dir=str(tmp_path / "full"), **extra))
    assert full.record["density"] == 1.0 and full.record["stats"]["dense_calls"] == 0
    assert read_video(dense.path).shape == (tiny.FRAMES, *reversed(tiny.SIZES.get(kind, tiny.SIZE)), 3)
    a, b = (written[r.path].astype(int) for r in (dense, full))
    assert abs(a - b).max() <= 2  # before H.264, which makes more of a difference in rounding
    for name, preset in section(kind).presets.items():
        out = str(tmp_path / name)
        result = make(request(kind, folder, preset=name, warmup_steps=2, output_dir=out, **extra))
        assert len(read_video(result.path)) == tiny.FRAMES
        if preset.type == "psa":
            steps = result.record["stats"]["steps"]
            assert [steps[i] for i in (0, 1)] == [1.0, 1.0]
            assert all(0 < steps[i] < 1 for i in (2, 3)), steps
            assert 0 < result.record["density"] < 1


def make(request, progress=None):
    results = generate(request, progress)
    assert [r.error for r in results] == [None] * len(request.prompts)
    return results[0]


IMAGE = [pytest.param(k, marks=pytest.mark.slow) for k in ("wan22_5b", "wan22_a14b", "cogvideo_5b")]


@pytest.mark.parametrize("kind", ["wan21_14b", "cogvideo1.5_5b", *IMAGE])
def test_image_to_video(kind, checkpoints, tmp_path):
    from PIL import Image

    image = tmp_path / "first.png"
    Image.linear_gradient("L").convert("RGB").save(image)
    folder = checkpoints(kind, image=True)
    result = make(request(kind, folder, image=str(image), warmup_steps=1, output_dir=str(tmp_path / "out")))
    assert len(read_video(result.path)) == tiny.FRAMES
    assert result.record["stats"]["sparse_calls"] > 0


def test_record_says_how_to_make_it_again(checkpoints, tmp_path):
    events: list[Event] = []
    out = str(tmp_path / "out")
    settings = dict(density=0.3, seed=7, output_dir=out, warmup_steps=1)
    result = make(request("wan21_1.3b", checkpoints("wan21_1.3b"), **settings), events.append)
    record = json.loads(result.path.with_suffix(".json").read_text())
    made = record["request"]
    assert made["seed"] == 7 and made["psa"]["density"] == 0.3 and made["num_inference_steps"] == 4
    assert {"psa", "torch", "diffusers", "transformers"} <= set(record["versions"])
    assert record["seconds"] > 0
    assert set(record["stats"]["models"]["transformer"]["layers"]["0"]) == {"0", "1", "2", "3"}
    assert [e.kind for e in events] == ["load", "start", "step", "step", "step", "step", "done"]
    assert [(e.step, e.steps) for e in events if e.kind == "step"] == [(i, 4) for i in range(1, 5)]
    assert events[2].density == 1.0 > events[-2].density > 0.3


def test_a_model_psa_has_no_entry_for(checkpoints, tmp_path):
    folder = checkpoints("wan21_1.3b")
    out = str(tmp_path / "out")
    result = make(request(folder, None, width=224, height=208, density=0.4, output_dir=out))
    assert result.record["density"] == pytest.approx(0.4, abs=0.08)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames: 0 is not 1 more than a multiple of 4; nearest: 1"),
        ({"num_frames": 16}, "num_frames: 16 .* nearest: 17"),
        ({"width": 225}, "width: 225 is not a positive multiple of 16; nearest: 224"),
        ({"height": -1}, "height: -1"),
        ({"preset": "psa_balnced"}, "psa_balanced"),
        ({"model": "wan21_13b"}, "did you mean 'wan21_1.3b'"),
        ({"density": 0.0}, "density"),
        ({"prompts": ()}, "prompt: empty"),
        ({"prompts": ("",)}, "prompt: empty"),
        ({"image": "missing.png"}, "image: missing.png: no such file"),
        ({"model_path": "/nowhere"}, "/nowhere: no such folder"),
        ({"lora_path": "/nowhere.safetensors"}, "lora_path"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not positive"),
        ({"dtype": "float8"}, "dtype"),
        ({"offload": "disk"}, "offload"),
        ({"context_parallel": {"ulysses": 4}}, "4 processes are needed, 1 run; start with: torchrun"),
        ({"compare": True, "dense": True}, "compare"),
    ],
)
def test_errors_before_any_weight_loads(changes, message, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("psa.generate.load", lambda request: pytest.fail("weights were loaded"))
    with pytest.raises(PSAError, match=message) as caught:
        generate(request("wan21_1.3b", checkpoints("wan21_1.3b"), **{"output_dir": str(tmp_path / "o"), **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_missing_weights_name_the_command_that_fetches_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PSAError, match=r"hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers$"):
        generate(GenerateRequest("wan21_1.3b", ("a cat",)))
    with pytest.raises(
        PSAError, match=r"hf download GYP666/BLADE .*pytorch_lora_weights.safetensors --local-dir ./weights$"
    ):
        generate(
            GenerateRequest("cogvideo_5b_lora", ("a cat",), model_path=str(tiny.save("cogvideo_5b", tmp_path / "c")))
        )


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  ein Hündchen \n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "ein Hündchen")
    for content in (b"", b"\n\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(PSAError, match="prompt_file"):
            read_prompts(path)
    with pytest.raises(PSAError, match="prompt_file"):
        read_prompts(tmp_path)


def test_a_batch_goes_on_after_a_failure_and_resumes(checkpoints, tmp_path, monkeypatch):
    import psa.generate as room

    folder, out = checkpoints("wan21_1.3b"), str(tmp_path / "out")
    batch = request("wan21_1.3b", folder, prompts=("one", "two", "three"), output_dir=out, num_inference_steps=2)
    make_one, made = room._make, []

    def flaky(pipe, request, index, path, tell):
        made.append(index)
        if index == 1 and len(made) <= 3:
            raise RuntimeError("CUDA out of memory\nlong story")
        return make_one(pipe, request, index, path, tell)

    monkeypatch.setattr(room, "_make", flaky)
    results = generate(batch)
    assert [bool(r.error) for r in results] == [False, True, False]
    assert results[1].error == "RuntimeError: CUDA out of memory; add --offload model, --vae_tiling, or fewer frames"
    before = results[0].path.stat().st_mtime_ns
    results = generate(batch)
    assert made == [0, 1, 2, 1]
    assert [r.skipped for r in results] == [True, False, True] and not any(r.error for r in results)
    assert results[0].path.stat().st_mtime_ns == before
    with pytest.raises(PSAError, match="made with another seed"):
        generate(request("wan21_1.3b", folder, prompts=("one",), output_dir=out, num_inference_steps=2, seed=1))


def test_compare(checkpoints, tmp_path):
    out = str(tmp_path / "out")
    result = make(
        request("wan21_1.3b", checkpoints("wan21_1.3b"), density=0.3, compare=True, warmup_steps=0, output_dir=out)
    )
    facts = result.record["compare"]
    assert {"psnr", "ssim", "speedup", "density", "seconds_dense", "seconds_psa"} <= set(facts)
    assert 5 < facts["psnr"] < 100 and 0 < facts["ssim"] <= 1
    side = read_video(result.path.with_suffix(".compare.mp4"))
    assert side.shape == (tiny.FRAMES, 208, 448, 3)


# -- the commands ----------------------------------------------------------------------------------------------------


def run(*command, cwd, check=True, **changes):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def flags(kind, folder):
    width, height = tiny.SIZES.get(kind, tiny.SIZE)
    given = {"model_path": folder, "width": width, "height": height, "num_frames": 17, "num_inference_steps": 2}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_seed_command_with_lora(checkpoints, tmp_path):
    """examples/inference/cogvideo/cogvideo_5b.py --model cogvideo_5b_lora --use_psa --attention_preset psa_4steps"""
    lora(tmp_path / "weights" / "cogvideox-5b-psa-lora")
    done = run(
        SCRIPTS / "cogvideo/cogvideo_5b.py", "--model", "cogvideo_5b_lora", "--prompt", "a garden", "--use_psa",
        "--attention_preset", "psa_4steps", *flags("cogvideo_5b", checkpoints("cogvideo_5b")), cwd=tmp_path,
    )  # fmt: skip
    (video,) = tmp_path.glob("outputs/cogvideo_5b_lora/*/video_0000.mp4")
    assert len(read_video(video)) == 17, done.stderr
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["request"]["preset"] == "psa_4steps" and record["density"] < 1


def test_seed_command_wan_without_warmup_and_hyphens(checkpoints, tmp_path):
    """examples/inference/wan21/wan21_1.3b.py --prompt … --use_psa --no_warmup"""
    given = flags("wan21_1.3b", checkpoints("wan21_1.3b"))
    run(SCRIPTS / "wan21/wan21_1.3b.py", "--prompt", "a cat", "--use-psa", "--no-warmup", *given, cwd=tmp_path)
    run(SCRIPTS / "wan21/wan21_1.3b.py", "--prompt", "a cat", *given, "--output_dir", "dense", cwd=tmp_path)
    (video,) = tmp_path.glob("outputs/wan21_1.3b/*/video_0000.json")
    assert json.loads(video.read_text())["density"] < 1
    assert json.loads((tmp_path / "dense/video_0000.json").read_text())["request"]["psa"] is None


def test_errors_of_the_commands_are_one_line(tmp_path):
    done = run(SCRIPTS / "wan22/wan22_5b.py", "--prompt", "a cat", "--preset", "psa", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "psa_balanced" in done.stderr


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
    for _ in range(1200):
        first = next(tmp_path.glob("outputs/*/*/video_0000.json"), None)
        if first or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first, "the first video never came"
    before = first.stat().st_mtime_ns
    run(*command, cwd=tmp_path)
    videos = sorted(tmp_path.glob("outputs/*/*/*.mp4"))
    assert [v.name for v in videos] == ["video_0000.mp4", "video_0001.mp4", "video_0002.mp4"]
    assert first.stat().st_mtime_ns == before
    assert all(len(read_video(v)) == 17 for v in videos)

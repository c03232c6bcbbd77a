"""`psa generate` and the published scripts, end to end on tiny checkpoints of the true classes."""

import json
import sys
from dataclasses import replace

import pytest
import tiny_checkpoints as tiny

from psa.errors import PSAError
from psa.generate import Event, GenerateRequest, generate, read_prompts
from psa.presets import section
from psa.video import read_video, write_video

pytestmark = pytest.mark.usefixtures("short")


def request(kind, folder, **changes):
    width, height = tiny.SIZES.get(kind, tiny.SIZE)
    settings = dict(
        model=kind, prompts=("a cat",), model_path=folder, width=width, height=height, num_frames=tiny.FRAMES,
        num_inference_steps=4,
    )  # fmt: skip
    return GenerateRequest(**{**settings, **changes})


def options(kind, tmp_path):
    return {"lora_path": str(tiny.lora(tmp_path / "lora"))} if kind == "cogvideo_5b_lora" else {}


@pytest.fixture
def frames(monkeypatch):
    """path -> frames as they were before H.264, which makes more of a difference in rounding."""
    written = {}

    def write_and_keep(path, pictures, fps):
        written[path] = pictures
        write_video(path, pictures, fps)

    monkeypatch.setattr("psa.generate.write_video", write_and_keep)
    return written


QUICK = ("wan21_1.3b", "wan22_a14b", "cogvideo1.5_5b")
"""In `make test`; the others, of the same classes, in `make test-all`."""


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in tiny.KINDS])
def test_every_model_setting_end_to_end(kind, checkpoints, tmp_path, frames):
    """Dense, PSA at density 1 (the same video) and every preset, from disk to an mp4 with all frames."""
    folder, extra = checkpoints(kind), options(kind, tmp_path)
    dense = make(request(kind, folder, dense=True, output_dir=str(tmp_path / "dense"), **extra))
    full = make(request(kind, folder, density=1.0, warmup_steps=0, output_dir=str(tmp_path / "full"), **extra))
    assert full.record["density"] == 1.0 and full.record["stats"]["dense_calls"] == 0
    assert read_video(dense.path).shape == (tiny.FRAMES, *reversed(tiny.SIZES.get(kind, tiny.SIZE)), 3)
    a, b = (frames[r.path].astype(int) for r in (dense, full))
    assert abs(a - b).max() <= 2
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


def test_a_preset_by_default_and_at_a_density(checkpoints, tmp_path):
    """A preset that caps levels by similarity keeps no more than the density asked for."""
    asked = request("wan21_1.3b", checkpoints("wan21_1.3b"), preset="default", warmup_steps=0, min_queries=0)
    assert asked.config() == section("wan21_1.3b").get().replace(warmup_steps=0)
    assert asked.config().use_sim_mask
    sparse = replace(asked, density=0.3, output_dir=str(tmp_path), num_inference_steps=2)
    assert make(sparse).record["density"] == pytest.approx(0.3, rel=0.05)


def test_a_model_psa_has_no_entry_for(checkpoints, tmp_path):
    folder = checkpoints("wan21_1.3b")
    out = str(tmp_path / "out")
    result = make(request(folder, None, width=224, height=208, density=0.4, output_dir=out))
    assert result.record["density"] == pytest.approx(0.4, abs=0.08)


def test_offload_makes_the_same_video(checkpoints, tmp_path, monkeypatch, frames):
    monkeypatch.setattr("psa.request.check_offload", lambda request: None)  # diffusers offloads to a CPU as well
    folder, made = checkpoints("wan22_a14b"), []
    for offload in (None, "model"):
        out = {"output_dir": str(tmp_path / str(offload)), "device": "cpu", "offload": offload}
        made.append(make(request("wan22_a14b", folder, density=0.3, warmup_steps=1, vae_tiling=bool(offload), **out)))
    assert made[0].record["stats"] == made[1].record["stats"]
    assert (frames[made[0].path] == frames[made[1].path]).all()


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
        ({"density": 0.005}, "preset that drops"),
        ({"preset": "baseline", "density": 0.3}, "density: 0.3 was asked of dense attention"),
        ({"prompts": ()}, "prompt: empty"),
        ({"prompts": ("",)}, "prompt: empty"),
        ({"image": "missing.png"}, "image: missing.png: no such file"),
        ({"model_path": "/nowhere"}, "/nowhere: no such folder"),
        ({"lora_path": "/nowhere.safetensors"}, "lora_path"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not positive"),
        ({"dtype": "float8"}, "dtype"),
        ({"offload": "disk"}, "offload"),
        ({"offload": "model", "device": "cpu"}, "offload: .* this runs on the CPU"),
        ({"device": "gpu"}, "device: 'gpu' is no device"),
        ({"device": "xpu"}, "device: 'xpu' is not available"),
        ({"context_parallel": {"ulysses": 4}}, "4 processes are needed, 1 run; start with: torchrun"),
        ({"compare": True, "dense": True}, "compare"),
        ({"image": __file__, "model_path": None}, "image: wan21_1.3b has no image-to-video weights"),
        ({"model": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"}, "starts from a first frame; give --image"),
    ],
)
def test_errors_before_any_weight_loads(changes, message, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("psa.generate.load", lambda request: pytest.fail("weights were loaded"))
    with pytest.raises(PSAError, match=message) as caught:
        generate(request("wan21_1.3b", checkpoints("wan21_1.3b"), **{"output_dir": str(tmp_path / "o"), **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_packages_for_comparing_are_looked_for_before_weights_load(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("psa.generate.load", lambda request: pytest.fail("weights were loaded"))
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    asked = request("wan21_1.3b", checkpoints("wan21_1.3b"), compare=True, output_dir=str(tmp_path / "out"))
    with pytest.raises(PSAError, match=r"skimage is needed .*pyramid-sparse-attention\[report\]"):
        generate(asked)


def test_a_known_model_by_its_hub_ids():
    by_name, by_id = (GenerateRequest(m, ("a cat",)) for m in ("wan22_5b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"))
    assert by_id.known is by_name.known and by_id.config() == by_name.config()
    assert by_id.with_defaults().height == 704 and by_id.checkpoint() == by_name.checkpoint()
    image = GenerateRequest("wan-ai/Wan2.2-I2V-A14B-Diffusers", ("a cat",), image="first.png")
    assert image.name == "wan22_a14b" and image.checkpoint().source == "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    assert GenerateRequest("zai-org/CogVideoX-5b", ("a cat",)).name == "cogvideo_5b"
    assert GenerateRequest("someone/else", ("a cat",)).known is None


def test_missing_weights_name_the_command_that_fetches_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PSAError, match=r"hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers$"):
        generate(GenerateRequest("wan21_1.3b", ("a cat",)))
    with pytest.raises(PSAError, match="num_frames: 0 is not"):  # what needs no files is told first
        generate(GenerateRequest("wan21_1.3b", ("a cat",), num_frames=0))
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


def test_a_comparison_that_fails_leaves_the_video(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("psa.generate.likeness", lambda a, b: 1 / 0)
    out, steps = str(tmp_path / "out"), {"warmup_steps": 0, "num_inference_steps": 1}
    asked = request("wan21_1.3b", checkpoints("wan21_1.3b"), density=0.3, compare=True, output_dir=out, **steps)
    (result,) = generate(asked)
    assert "ZeroDivisionError" in result.error and len(read_video(result.path)) == tiny.FRAMES
    assert not result.path.with_suffix(".json").exists(), "it is made again"


def test_what_is_compared_on_a_gpu_is_warmed_up(checkpoints, tmp_path):
    """One step of each kind, nothing kept, and the pipeline as it was."""
    import psa.generate as room

    asked = request("wan21_1.3b", checkpoints("wan21_1.3b"), density=0.3, warmup_steps=0, output_dir=str(tmp_path))
    asked = asked.with_defaults()
    pipe, calls = room.load(asked), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    room._warm_up(pipe, asked, asked.config(), 0)
    warm = len(calls)
    room._run(pipe, asked, asked.config(), 0, lambda event: None)
    assert warm == 2 * (len(calls) - warm) / asked.num_inference_steps

"""Questions about images and videos: what is read, what is refused before weights load, and how answers compare."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import tiny_lm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import psa
from psa import media, understand
from psa.clips import CLIP
from psa.commands.understand import understand as command
from psa.errors import one_line
from psa.visual_inputs import Vision, fit, patchify, qwen_inputs

FRAMES = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save_qwen_folder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def loaded(folder):
    return understand.load(str(folder), device="cpu")


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, size in enumerate(((40, 24), (64, 64))):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", size, (40 * i, 80, 120)).save(paths[-1])
    return paths


def run(*args) -> object:
    """``psa understand`` as the command line calls it; a PSAError is the result's exception."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(arg) for arg in args])


# -- reading ---------------------------------------------------------------------------------------------------------


def test_frames_are_spread_over_the_whole_video():
    clip = media.read_video(CLIP, frames=5)
    assert clip.indices == [0, 12, 24, 35, 47] and clip.total == FRAMES and len(clip.frames) == 5
    assert clip.frames[0].mode == "RGB" and clip.fps == pytest.approx(clip.native_fps * 5 / FRAMES)
    assert media.read_video(CLIP, frames=FRAMES).indices == list(range(FRAMES))
    assert media.read_video(CLIP, frames=1).indices == [24]
    seconds = FRAMES / clip.native_fps
    assert len(media.read_video(CLIP).frames) == max(2, round(2 * seconds))
    assert len(media.read_video(CLIP, fps=5).frames) == round(5 * seconds)
    small = media.read_video(CLIP, frames=1, max_pixels=1000).frames[0]
    assert small.width * small.height <= 1000


def test_folders_and_images(pictures):
    folder = pictures[0].parent
    vision = understand.look([folder])
    assert vision.clip and [frame.size for frame in vision.clip.frames] == [(40, 24)] * 2
    assert len(understand.look([folder], "image").images) == 2
    assert [image.size for image in understand.look(pictures).images] == [(40, 24), (64, 64)]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("missing.mp4", {}, "no such file"),
        ("text.mp4", {}, "cannot be read as a video"),
        ("empty.mp4", {}, "the file is empty"),
        ("text.png", {}, "cannot be read as a picture"),
        ("missing.png", {}, "no such file"),
        ("void", {}, "holds no pictures"),
        (CLIP, {"frames": FRAMES + 1}, "has 48 frames"),
        (CLIP, {"frames": 0}, "--frames"),
        (CLIP, {"fps": 1000.0}, "frames per second"),
        (CLIP, {"fps": 0.0}, "asks for none"),
        (CLIP, {"frames": 2, "fps": 1.0}, "exclude"),
        (CLIP, {"kind": "film"}, "neither image nor video"),
        (CLIP, {"kind": "image"}, "cannot be read as a picture"),
        (CLIP, {"max_pixels": 3}, "max_pixels"),
        ("picture.png", {"frames": 2}, "belong to a video"),
    ],
)
def test_bad_inputs_are_one_line_errors(tmp_path, path, options, message):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "void").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    with pytest.raises(psa.PSAError, match=message) as caught:
        understand.look([tmp_path / path], **options)
    assert "\n" not in str(caught.value)


def test_videos_without_pictures_or_two_at_once(tmp_path):
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        container.add_stream("pcm_s16le", rate=8000)
    with pytest.raises(psa.PSAError):
        understand.look([path], "video")
    with pytest.raises(psa.PSAError, match="one video at a time"):
        understand.look([CLIP, CLIP])
    with pytest.raises(psa.PSAError, match="--input"):
        understand.look([])


def test_inputs_are_checked_before_the_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(understand, "check_model", lambda _: pytest.fail("looked for the model"))
    (tmp_path / "text.png").write_text("not a picture")
    for path, extra in ((tmp_path / "gone.mp4", ()), (CLIP, ("--frames", 99)), (tmp_path / "text.png", ())):
        done = run("--model", "no-such/model", "--input", path, "--prompt", "a", *extra)
        assert isinstance(done.exception, psa.PSAError), done.output


def test_errors_of_others_end_with_a_whole_sentence():
    text = "We looked in the cache.\nCheck your connection or see how to run the library offline at 'https://a.b/c'."
    assert one_line(text) == " ".join(text.split()).rstrip(".")
    assert one_line(text, 60) == "We looked in the cache"
    assert one_line("a" * 10 + " " + "b" * 10, 15) == "a" * 10 + " …" and one_line(KeyError()) == "KeyError"


def test_bad_models_and_prompts(tmp_path, folder):
    (tmp_path / "file").touch()
    for name in (str(tmp_path), str(tmp_path / "file"), "./nowhere", "no-such/model-on-the-hub"):
        with pytest.raises(psa.PSAError, match=r"model") as caught:
            understand.check_model(name)
        assert "\n" not in str(caught.value)
    tiny_lm.text_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(psa.PSAError, match="takes no images"):
        understand.check_model(str(tmp_path))
    with pytest.raises(psa.PSAError, match="--dtype"):
        understand.load(str(folder), dtype="int3")
    for prompt in ("", "  \n"):
        with pytest.raises(psa.PSAError, match="--prompt"):
            understand.check_prompt(prompt)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(psa.PSAError, match="weights cannot be loaded"):
        understand.load(str(tmp_path))


# -- inputs without torchvision --------------------------------------------------------------------------------------


def test_patches_are_merged_cells_of_one_time():
    pixels = torch.arange(3 * 3 * 8 * 16, dtype=torch.float32).view(3, 3, 8, 16)
    flat, grid = patchify(pixels, patch=4, merge=2, together=2)
    assert grid == (2, 2, 4) and flat.shape == (16, 3 * 2 * 16)
    first = pixels[:2, :, :4, :4].permute(1, 0, 2, 3).flatten()
    assert torch.equal(flat[0], first)
    assert torch.equal(flat[1], pixels[:2, :, :4, 4:8].permute(1, 0, 2, 3).flatten())
    assert torch.equal(flat[2], pixels[:2, :, 4:, :4].permute(1, 0, 2, 3).flatten())
    last = flat[8].view(3, 2, 4, 4)
    assert torch.equal(last[:, 0], last[:, 1]), "an odd number of frames repeats the last"


def test_sizes_are_whole_cells_within_bounds():
    assert fit(100, 200, 28, 56 * 56, 10**6) == (112, 196)
    tall, wide = fit(1000, 3000, 28, 56 * 56, 100_000)
    assert tall % 28 == wide % 28 == 0 and tall * wide <= 100_000
    tall, wide = fit(10, 10, 28, 56 * 56, 100_000)
    assert tall * wide >= 56 * 56


def test_qwen_inputs_have_one_placeholder_per_merged_patch(loaded):
    config, tokenizer = loaded.model.config, loaded.prepare.tokenizer
    clip = media.read_video(CLIP, frames=6, max_pixels=4096)
    settings = {"min_pixels": 256, "max_pixels": 8192}
    inputs = qwen_inputs("What?", Vision(clip=clip), tokenizer, config, settings)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert t == 3 and (inputs["input_ids"] == config.video_token_id).sum() == t * h * w // 4
    assert inputs["pixel_values_videos"].shape == (t * h * w, 3 * 2 * 16)
    assert inputs["second_per_grid_ts"].item() == pytest.approx(2 / clip.fps)
    assert torch.equal(inputs["mm_token_type_ids"] == 2, inputs["input_ids"] == config.video_token_id)
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>system") and text.endswith("What?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("command", ["understand", "evaluate"])
def test_without_transformers_the_commands_name_the_extra(command, pictures, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    question = {"question_id": "1", "videoID": "a", "duration": "short", "question": "?", "answer": "A"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question | {"options": ["A. a", "B. b", "C. c", "D. d"]}))
    said = ["understand", "--input", str(pictures[0]), "--prompt", "?"]
    argv = {"understand": said, "evaluate": ["evaluate", "video-mme", "--data", str(tmp_path)]}[command]
    blocked = f"import sys; sys.modules['transformers'] = None; sys.argv = {['psa', *argv]}; "
    blocked += "import psa.cli; psa.cli.main()"
    ran = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and "pyramid-sparse-attention[transformers]" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_other_models_say_which_package_is_missing(tmp_path, monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise ImportError("LlavaOnevisionVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    tiny_lm.llava_onevision().config.save_pretrained(tmp_path)
    with pytest.raises(psa.PSAError, match="pip install torchvision"):
        understand.load(str(tmp_path))


# -- answers ---------------------------------------------------------------------------------------------------------


def test_answers_and_their_agreement(loaded):
    vision = understand.look([CLIP], frames=12)
    steps = []
    dense = understand.answer(
        loaded, "What is it?", vision, max_new_tokens=4, on_token=lambda *step: steps.append(step)
    )
    exact = psa.PSAConfig(mask_mode="topk", mask_ratios={1: (0.0, 1.0)})
    same = understand.answer(loaded, "What is it?", vision, max_new_tokens=4, use_psa=True, config=exact)
    sparse = understand.answer(loaded, "What is it?", vision, max_new_tokens=4, use_psa=True, density=0.3)
    assert steps == [(i + 1, 4) for i in range(dense.tokens)]
    assert dense.density is None and same.density == pytest.approx(1.0) and sparse.density < 0.7
    assert same.text == dense.text and same.prompt_tokens == dense.prompt_tokens > 256
    assert 0 < dense.first_token_seconds <= dense.seconds
    agreement = understand.compare(dense, same)
    assert agreement.same_text and agreement.top1 == 1 and agreement.kl_mean < 1e-5 and agreement.compared == 4
    apart = understand.compare(dense, sparse)
    assert apart.kl_first > agreement.kl_first and 1 <= apart.compared <= 4
    assert not json.dumps(sparse.to_dict()).count("logits")
    assert loaded.model.config.text_config._attn_implementation == "sdpa"


def test_chunked_prefill_answers_alike(loaded):
    vision = understand.look([CLIP], frames=12)
    whole = understand.answer(loaded, "What?", vision, max_new_tokens=3)
    config = psa.PSAConfig(mask_mode="topk", mask_ratios={1: (0.0, 1.0)})
    if version("transformers").startswith("4."):
        with pytest.raises(psa.PSAError, match="needs transformers 5"):
            understand.answer(loaded, "What?", vision, max_new_tokens=3, prefill_chunk=128)
        return
    chunks = understand.answer(
        loaded, "What?", vision, max_new_tokens=3, use_psa=True, config=config, min_queries=64, prefill_chunk=128
    )
    assert chunks.text == whole.text and chunks.density == pytest.approx(1.0)


def test_short_prompts_say_that_psa_never_ran(loaded, pictures):
    vision = understand.look(pictures)
    found = understand.answer(loaded, "What?", vision, max_new_tokens=2, use_psa=True)
    assert found.density is None and "never ran" in found.notes[0]


def test_command(folder, tmp_path):
    record = tmp_path / "deep" / "answers.json"
    call = ("--model", folder, "--input", CLIP, "--prompt", "What?", "--frames", 12, "--max_new_tokens", 2)
    done = run(*call, "--compare", "--density", 0.4, "--output", record, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(record.read_text())
    assert [a["mode"] for a in document["answers"]] == ["dense", "psa"] and document["frames"] == 12
    assert document["agreement"]["compared"] >= 1 and document["answers"][1]["density"] < 1
    assert {"text", "tokens", "prompt_tokens", "first_token_seconds", "seconds"} <= set(document["answers"][0])
    assert json.loads(done.stdout)["answers"] == document["answers"]
    done = run(*call)
    assert done.exit_code == 0 and "first token" in done.output


def test_command_fails_before_weights_load(folder, monkeypatch):
    monkeypatch.setattr(understand, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    call = ("--model", folder, "--input", CLIP)
    for extra in (
        ("--prompt", " "),
        ("--prompt", "a", "--frames", 99),
        ("--prompt", "a", "--density", 0.3),
        ("--prompt", "a", "--use_psa", "--preset", "nothing"),
        ("--prompt", "a", "--model", "./nowhere"),
    ):
        done = run(*call, *extra)
        assert isinstance(done.exception, psa.PSAError), done.output

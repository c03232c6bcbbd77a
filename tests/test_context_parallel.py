"""One video over two processes (gloo, CPU): Ulysses equals one process; ring is exact at density 1."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from packaging.version import Version

import psa
from psa.errors import ConfigError

ROOT = Path(__file__).parents[1]


def build(name):
    """In float64: a level is a threshold, which rounding in another order of summation can cross."""
    from tiny_models import build as build_single

    model, call = build_single(name)
    return model.double(), {k: double(v) for k, v in call.items()}


def double(value):
    if isinstance(value, tuple):
        return tuple(double(item) for item in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def work(rank, port, cases, results):
    """In each process: every case on the split model."""
    import torch.distributed as dist

    sys.path.insert(0, str(ROOT / "tests"))
    from psa.integrations.parallel import enable_parallelism

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with torch.inference_mode():
        for number, (name, degrees, options) in enumerate(cases):
            model, call = build(name)
            enable_parallelism(model, **degrees)
            with psa.enable(model, replace=True, min_queries=0, **options) as handle:
                out = model(**call, return_dict=False)[0]
                stats = handle.stats
            if rank == 0:
                results[number] = (out.numpy(), stats["sparse_calls"], stats["density"])
    dist.destroy_process_group()


ULYSSES, RING = {"ulysses": 2}, {"ring": 2}
CASES = [
    ("wan", ULYSSES, {"density": 0.3}),
    ("cogvideox", ULYSSES, {"density": 0.3}),
    ("flux", ULYSSES, {"density": 0.3}),
    ("wan", ULYSSES, {"density": 0.3, "warmup_steps": 5}),
    ("cogvideox", ULYSSES, {"density": 0.3, "warmup_steps": 5}),
    ("wan", ULYSSES, {"config": psa.PSAConfig(density=0.3, rearrange_method="auto")}),
]
if Version(diffusers.__version__) >= Version("0.37"):
    # 0.36 also sends Wan's cross-attention around the ring, which its native backend refuses.
    CASES += [
        ("wan", RING, {"density": 1.0}),
        ("wan", RING, {"config": psa.PSAConfig(density=1.0, rearrange_method="auto")}),
        ("wan", RING, {"density": 0.3, "warmup_steps": 5}),
        ("wan", RING, {"density": 0.4}),
    ]


@pytest.fixture(scope="module")
def split():
    """case number -> (output, sparse calls, density) of two processes."""
    import torch.multiprocessing as mp

    manager = mp.get_context("spawn").Manager()
    results = manager.dict()
    port = 29500 + os.getpid() % 2000
    mp.spawn(work, (port, CASES, results), nprocs=2)
    return dict(results)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_make_what_one_makes(number, split):
    name, degrees, options = CASES[number]
    out, sparse_calls, density = split[number]
    model, call = build(name)
    with torch.inference_mode(), psa.enable(model, min_queries=0, **options) as handle:
        expected = model(**call, return_dict=False)[0]
        calls = handle.stats["sparse_calls"]
    error = (torch.from_numpy(out) - expected).norm() / expected.norm()
    if degrees == RING and options.get("density", 1) < 1 and "warmup_steps" not in options:
        # Blocks are chosen within each pair of chunks: not the same choice, but the same budget.
        assert sparse_calls == 2 * calls
        assert density == pytest.approx(0.4, abs=0.1)
        assert error < 0.2
    else:
        assert error < 1e-5, error
        assert sparse_calls == (2 * calls if degrees == RING else calls)


def test_models_that_do_not_split_are_refused():
    from psa.integrations.parallel import enable_parallelism

    model, _ = build("mochi")
    with pytest.raises(ConfigError, match="does not say how its tokens split"):
        enable_parallelism(model, ulysses=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan21_1.3b", "cogvideo_5b"])
def test_torchrun_makes_one_video(kind, tmp_path):
    """torchrun --nproc_per_node 2 psa generate … --context_parallel ulysses=2 gives the video of one process."""
    import json

    import tiny_checkpoints as tiny

    folder = tiny.save(kind, tmp_path / "checkpoint")
    script = (
        ROOT / "examples/inference" / ("wan21/wan21_1.3b.py" if kind.startswith("wan") else "cogvideo/cogvideo_5b.py")
    )
    flags = f"--model {kind} --prompt cat --use_psa --no_warmup --width 224 --height 208 --num_frames 17"
    given = [str(script), *flags.split(), "--num_inference_steps", "2", "--model_path", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    split = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {"one": [], "two": split}
    for name, launcher in commands.items():
        extra = ["--context_parallel", "ulysses=2"] if launcher else []
        command = [sys.executable, *launcher, *given, *extra]
        (tmp_path / name).mkdir()
        done = subprocess.run(command, cwd=tmp_path / name, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    from psa.video import likeness, read_video

    videos = [next((tmp_path / name).glob("outputs/*/*/video_0000.mp4")) for name in commands]
    assert likeness(*map(read_video, videos))["psnr"] > 30
    record = json.loads(videos[1].with_suffix(".json").read_text())
    assert record["stats"]["dense_calls"] == 0


@pytest.mark.slow
def test_accelerate_splits_prompts_over_processes(tmp_path):
    import tiny_checkpoints as tiny

    folder = tiny.save("wan21_1.3b", tmp_path / "checkpoint")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    flags = "--prompt_file prompts.txt --use_psa --no_warmup --width 224 --height 208 --num_frames 17"
    given = [str(ROOT / "examples/inference/wan21/wan21_1.3b.py"), *flags.split(), "--num_inference_steps", "1"]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *given,
        "--model_path",
        str(folder),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/*/*/video_000?.mp4"))) == 3
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1

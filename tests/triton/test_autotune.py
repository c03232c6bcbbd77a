"""The search for launches with a clock of our own, and its memory on disk."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from cases import Case, make

from psa.backends import reference
from psa.backends import triton as backend
from psa.backends.triton import autotune
from psa.backends.triton.tune import Launch

DEFAULT = Launch(128, 64, 64, 8, 2)
CONSTANTS = {
    "D_PAD": 64, "block_m": 128, "block_n": 64, "GROUP": 1, "CAUSAL": False, "HAS_MASK": False, "ROW_BIAS": False,
    "PAIR_BIAS": False,
}  # fmt: skip
Q = torch.empty(1, 1, 20000, 64)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The memory of a GPU that is not there."""
    path = tmp_path / "deep" / "launches.json"
    monkeypatch.setattr(autotune, "memory_path", lambda device: path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("PSA_AUTOTUNE", raising=False)
    return path


@pytest.fixture
def clock(monkeypatch):
    """Fastest with 3 stages, 4 warps and tiles of 32 rows; what has 16 rows fails. Notes what was timed."""
    timed = []

    def seconds(run):
        (launch,) = run.args
        timed.append(launch)
        slow = abs(launch.num_stages - 3) + abs(launch.num_warps - 4) / 4 + abs(launch.BLOCK_N - 32) / 32
        return float("inf") if 16 in (launch.BLOCK_M, launch.BLOCK_N, launch.WHOLE_N) else 1.0 + slow

    monkeypatch.setattr(autotune, "seconds", seconds)
    return timed


def choose(kernel="forward", q=Q, **changes):
    return autotune.tuned(kernel, q, CONSTANTS | changes, DEFAULT, lambda launch: None)


def another_process():
    autotune.remembered.cache_clear()


def test_the_fastest_is_found_once_and_remembered(path, clock, monkeypatch):
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    best = Launch(128, 32, 64, 4, 3)
    assert choose() == best and clock[0] == DEFAULT and len(clock) <= 12
    count = len(clock)
    assert choose() == best and choose(q=Q[:, :, :17000]) == best
    another_process()
    assert choose() == best
    monkeypatch.delenv("PSA_AUTOTUNE")
    another_process()
    assert choose() == best and len(clock) == count
    monkeypatch.setenv("PSA_AUTOTUNE", "0")
    assert choose() == DEFAULT
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half-written is left


def test_nothing_is_timed_unless_asked(path, clock):
    assert choose() == DEFAULT
    assert clock == [] and not path.exists()


def test_nothing_is_timed_inside_a_cuda_graph(path, clock, monkeypatch):
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == DEFAULT and clock == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() != DEFAULT


def test_every_shape_class_has_its_own(path, clock, monkeypatch):
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    choose()
    for changed in ({"CAUSAL": True}, {"D_PAD": 128}, {"kernel": "grad_rows"}, {"q": Q.half()}, {"q": Q[:, :, :9000]}):
        count = len(clock)
        choose(**changed)
        assert len(clock) > count, changed
    assert len(json.loads(path.read_text())) == 6


def test_processes_keep_what_others_found(path, clock, monkeypatch):
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    another_process()
    choose()
    held = dict(autotune.remembered(path))
    autotune.remember(path, "found elsewhere", DEFAULT)
    assert "found elsewhere" not in held
    choose("grad_queries")
    another_process()
    mine = autotune.shape_class("grad_queries", Q, CONSTANTS)
    assert autotune.remembered(path).keys() == {*held, "found elsewhere", mine}


LAUNCH = asdict(DEFAULT)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": 1}', json.dumps({"a": LAUNCH | {"BLOCK_M": 0}}), json.dumps({"a": LAUNCH | {"extra": 1}})],
)
def test_a_corrupt_file_is_ignored_and_replaced(path, clock, monkeypatch, text):
    path.parent.mkdir()
    path.write_text(text)
    another_process()
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose() == DEFAULT
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    with pytest.warns(UserWarning, match="is ignored"):
        best = choose()
    another_process()
    assert choose() == best and len(json.loads(path.read_text())) == 1


def test_a_folder_that_cannot_be_made_is_only_warned_of(path, clock, monkeypatch):
    monkeypatch.setenv("PSA_AUTOTUNE", "1")
    path.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="is not kept"), pytest.warns(UserWarning, match="is ignored"):
        assert choose() != DEFAULT


def test_tiles_divide_the_query_block():
    for name in autotune.LIMITS:
        for candidate in autotune.neighbours(replace(DEFAULT, BLOCK_M=16), name, 48):
            assert 48 % candidate.BLOCK_M == 0


def test_the_folder_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PSA_CACHE_DIR", raising=False)
    assert autotune.cache_folder() == tmp_path / "xdg" / "psa"
    monkeypatch.setenv("PSA_CACHE_DIR", str(tmp_path / "own"))
    assert autotune.cache_folder() == tmp_path / "own"


def test_kernels_run_with_what_was_remembered(path, monkeypatch):
    """Forward and gradients, with tiles that no table has."""
    q, k, v, selection = make(Case(heads=1, kv_heads=1, length_q=70, length_k=90, is_causal=True))
    used = []

    class Any(dict):
        def __contains__(self, name):
            return used.append(name.split()[0]) is None

        def __missing__(self, name):
            return Launch(32, 16, 32, 4, 1)

    monkeypatch.setattr(autotune, "remembered", lambda path: Any())
    out, lse = backend.forward(q, k, v, selection)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, _ = reference.forward(*leaves, selection)
    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-4)
    grads = backend.backward(torch.ones_like(out), None, q, k, v, out, lse, selection)
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(got, exact.float(), atol=1e-5, rtol=1e-4)
    assert used == ["forward", "grad_queries", "grad_rows"]

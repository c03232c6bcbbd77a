"""Shared by every test: new memory is poisoned, so that what is read before it is written shows as NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    """Long tests first, so that no worker waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` returns NaN while a test runs (PyTorch fills it in deterministic mode)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """kind -> folder of a tiny checkpoint, made when first asked for."""
    import tiny_checkpoints as tiny

    base, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(kind, **options):
        name = kind + "".join(f"-{o}" for o in options)
        if name not in made:
            made[name] = str(tiny.save(kind, base / name, **options))
        return made[name]

    return get


@pytest.fixture
def short(monkeypatch):
    """Tiny models make short sequences; with this the automatic mode serves them all the same."""
    monkeypatch.setattr("psa.integrations.denoising.SHORT", 0)


@pytest.fixture
def inference(short):
    """Asked for by every test of pipelines: they run without gradients."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def wan():
    import tiny_checkpoints as tiny

    return tiny.make("wan21_1.3b")


@pytest.fixture(scope="module")
def cogvideo():
    import tiny_checkpoints as tiny

    return tiny.make("cogvideo_5b")

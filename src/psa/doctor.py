"""`psa doctor`: what is installed, what the machine has, and which backends serve here."""

import importlib.metadata
import platform
import sys

import torch

from . import __version__
from .backends import backends
from .backends.torch import native_reasons
from .bench import device_name

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "av", "matplotlib")


def diagnose() -> dict:
    """Versions, devices, and the reasons why not of every backend and of the torch backend's compiled engine.

    An empty list of reasons means usable.
    """
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "psa": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "gpus": gpus,
        "backends": backends(),
        "native_engine": native_reasons(),
    }

"""The device a command runs on."""

import torch

from .errors import ConfigError


def pick_device(name: str | None = None) -> str:
    """``name``, by default cuda where there is one and the CPU elsewhere.

    Raises:
        ConfigError: for what is no device, or is not in this machine.
    """
    place = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(place)
    except RuntimeError as error:
        raise ConfigError(f"device: {place!r} is no device; expected cuda, cuda:N or cpu") from error
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = device.type == "cpu" or (
        found is not None and device.type == found.type and (device.index or 0) < torch.accelerator.device_count()
    )
    if not there:
        raise ConfigError(f"device: {place!r} is not available; this machine has {found or 'only its CPU'}")
    return place

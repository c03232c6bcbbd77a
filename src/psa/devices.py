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
        kind = torch.device(place).type
    except RuntimeError as error:
        raise ConfigError(f"device: {place!r} is no device; expected cuda, cuda:N or cpu") from error
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind not in ("cpu", found.type if found is not None else "cpu"):
        raise ConfigError(f"device: {place!r} is not available; this machine has {found or 'only its CPU'}")
    return place

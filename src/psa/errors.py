"""What `psa` raises: every message says what was expected, what came, and what to do."""


class PSAError(Exception):
    """Base of every error this library raises on purpose. Its message is always one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(str(message).split()))


class ConfigError(PSAError, ValueError):
    """A setting, preset or configuration file that cannot be used."""


class ShapeError(PSAError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class BackendError(PSAError, RuntimeError):
    """A backend that was asked for by name and cannot serve the call."""

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


class PSAWarning(UserWarning):
    """What psa does other than the caller may expect, such as calls that stay dense."""


def one_line(error: object, limit: int = 200) -> str:
    """What another library's error says, on one line: whole sentences of at most ``limit`` characters, else words."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    if len(text) <= limit:
        return text.rstrip(".")
    head = text[: limit + 1]
    sentence = head.rfind(". ")
    return head[:sentence] if sentence > 0 else head[: max(1, head.rfind(" "))].rstrip(",;:") + " …"

"""Writes the API pages from the docstrings of what `psa` exports, and of what `psa.enable` leads to.

python docs/build_api.py
"""

import importlib
import inspect
import re
from pathlib import Path

import psa

ROOT = Path(__file__).parent
HOSTS = ("psa.integrations.diffusers", "psa.integrations.transformers")
HEADS = {
    "en": "# API\n\nWritten from the docstrings by `python docs/build_api.py`.",
    "zh": "# API\n\n由 `python docs/build_api.py` 根据文档字符串生成;文档字符串为英文。",
}


def signature(name: str, item: object) -> str:
    """``name(arguments)``, one argument a line where that is long."""
    try:
        found = inspect.signature(item)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name
    text = re.sub(r"<factory>", "...", f"{name}{found}")
    if len(text) <= 100:
        return text
    arguments, star = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            arguments.append("*")
        arguments.append(re.sub(r"<factory>", "...", str(parameter)))
    after = text.rsplit(")", 1)[1]
    return f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){after}"


def members(item: type) -> list[tuple[str, object]]:
    """Public methods and properties that the class itself defines and documents, in source order."""
    found = []
    for name, value in vars(item).items():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and inner.__doc__ and (callable(inner) or isinstance(inner, property)):
            found.append((name, inner))
    return found


def block(title: str, code: str, item: object) -> str:
    doc = inspect.getdoc(item) or ""
    return f"{title}\n\n```text\n{code}\n\n{doc}\n```"


def entry(module: str, name: str) -> str:
    item = getattr(importlib.import_module(module), name)
    parts = [block(f"## {module}.{name}", signature(name, item), item)]
    if inspect.isclass(item) and not issubclass(item, Exception):
        for member, value in members(item):
            code = member if isinstance(value, property) else signature(member, value)
            parts.append(block(f"### {module}.{name}.{member}", code, value))
    return "\n\n".join(parts)


def build() -> dict[Path, str]:
    """The text of every API page."""
    exported = [("psa", name) for name in psa.__all__]
    enabled = [(host, name) for host in HOSTS for name in ("enable_model", "Handle")]
    body = "\n\n".join(entry(module, name) for module, name in exported + enabled)
    return {ROOT / language / "api.md": f"{head}\n\n{body}\n" for language, head in HEADS.items()}


if __name__ == "__main__":
    for page, text in build().items():
        page.write_text(text, encoding="utf-8")

"""The pages: their code runs, their tables and API are current, and both languages say the same."""

import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

import psa
from psa import candidates, presets

ROOT = Path(__file__).parents[1]
PAIRS = [
    (ROOT / "README.md", ROOT / "README_zh.md"),
    (ROOT / "configs" / "README.md", ROOT / "configs" / "README_zh.md"),
    *((page, ROOT / "docs" / "zh" / page.name) for page in sorted((ROOT / "docs" / "en").glob("*.md"))),
]
ENGLISH = [english for english, _ in PAIRS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = re.compile(r"(<!-- needs weights -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEED = re.compile(r"""need\("[\w.]+", "(\w+)"\)""")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def headings(text: str) -> list[int]:
    """The depth of every heading outside of code."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)]


def given() -> dict[str, object]:
    """What a page's code may use without making it: see docs/en/plug-and-play.md."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 384, 64, generator=g, requires_grad=True) for _ in range(3))
    shape = (2, 12, 16)
    return {"torch": torch, "psa": psa, "q": q, "k": k, "v": v, "grid": shape, "step": 0} | dict(
        zip("THW", shape, strict=True)
    )


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the repository by folder and name."""

    def load(folder: str, name: str):
        monkeypatch.syspath_prepend(str(ROOT / folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def test_api_pages_are_current(script):
    for page, text in script("docs", "build_api").build().items():
        assert page.read_text(encoding="utf-8") == text, "run `python docs/build_api.py`"


def test_what_errors_and_options_name_is_in_the_api_pages():
    text = (ROOT / "docs" / "en" / "api.md").read_text(encoding="utf-8")
    hosts = [f"psa.integrations.{host}" for host in ("diffusers", "transformers")]
    for name in (
        "psa.Layout",
        "psa.PSAWarning",
        *(f"{host}.{item}" for host in hosts for item in ("enable_model", "Handle")),
    ):
        assert f"\n## {name}\n" in text
    assert issubclass(psa.PSAWarning, UserWarning) and psa.Layout((2, 3, 4)).grid == (2, 3, 4)


def test_tables_are_rendered_from_the_result_files(script):
    render = script("benchmarks", "render")
    tables, asked = render.tables(), set()
    for page in render.PAGES:
        text = page.read_text(encoding="utf-8")
        asked |= set(re.findall(r"<!-- table: (\S+) -->", text))
        assert render.fill(text, tables) == text, f"{name_of(page)}: run `make docs`"
    assert asked == tables.keys()
    assert not [name for name, table in tables.items() if re.search(r"\bnan\b|nan%", table)]


@pytest.mark.parametrize("page", ENGLISH, ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, text = given(), page.read_text(encoding="utf-8")
    for found in RUNNABLE.finditer(text):
        weights, code = found.groups()
        line = text[: found.start(2)].count("\n")
        compiled = compile("\n" * line + code, str(page), "exec")
        if not weights:
            exec(compiled, names)


def test_code_that_needs_weights_is_the_exception():
    marked = [name_of(page) for page in ENGLISH for found in RUNNABLE.finditer(page.read_text()) if found[1]]
    assert marked == ["README.md"]


def test_both_languages_have_the_same_pages():
    english, chinese = ({p.name for p in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh"))
    assert english == chinese


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[name_of(page) for page in ENGLISH])
def test_both_languages_have_the_same_headings_and_code(english, chinese):
    first, second = (page.read_text(encoding="utf-8") for page in (english, chinese))
    assert headings(first) == headings(second)
    assert FENCE.findall(first) == FENCE.findall(second)


@pytest.mark.parametrize("page", [*ENGLISH, *(chinese for _, chinese in PAIRS)], ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


def test_the_extras_that_pages_name_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAIRS[0]:
        table = re.search(
            r"^\| [^|]* \| (?:extras|可选依赖) \|\n(.*?)\n\n", page.read_text(encoding="utf-8"), re.M | re.S
        )
        assert table is not None
        named = {name for row in table[1].splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[-1])}
        assert named == extras.keys()
    used = {
        name for file in (ROOT / "src").rglob("*.py") for name in re.findall(NEED, file.read_text(encoding="utf-8"))
    }
    assert used <= extras.keys()


@pytest.mark.parametrize("language", [0, 1])
def test_every_preset_key_is_explained(language):
    text = PAIRS[1][language].read_text(encoding="utf-8")
    blocks = {"block_m": "block_size.m", "block_n": "block_size.n", "tile_n": "block_size.tile_n"}
    keys = {blocks.get(item.name, item.name) for item in fields(psa.PSAConfig) if item.init}
    keys |= {"default_attention", "text_length", "attention_configs", "attn_impl"}
    keys |= {f"video_scale.{key}" for key in presets.SCALE_KEYS}
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) == keys


@pytest.mark.parametrize("language", [0, 1])
def test_defaults_of_preset_keys_are_the_codes(language):
    text = PAIRS[1][language].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| `([^`]+)` \| [^|]* \|$", text, re.MULTILINE)
    rows = [(key, yaml.safe_load(value)) for key, value in rows if hasattr(psa.PSAConfig(), key)]
    assert len(rows) > 15
    for key, value in rows:
        assert getattr(psa.PSAConfig.from_dict({key: value}), key) == getattr(psa.PSAConfig(), key), key


def test_the_candidates_of_the_automatic_mode_are_those_of_the_page():
    text = (ROOT / "docs" / "en" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:as above|pooled half .*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    told = {
        (float(exponent), keep, bool(fine))
        for fine, cells in enumerate(rows)
        for keep, cell in zip((True, False), cells, strict=True)
        for exponent in cell.split(", ")
    }
    assert told == set(candidates.ALLOCATIONS)
    assert "capped at {:g} or at {:g}:".format(*candidates.CAPS) in text


def test_the_preset_of_ones_own_loads(tmp_path):
    text = PAIRS[1][0].read_text(encoding="utf-8")
    (example,) = [code for _, code in FENCE.findall(text) if "my_custom_preset:" in code]
    file = tmp_path / "my_presets.yaml"
    file.write_text(example, encoding="utf-8")
    config = presets.get("cogvideo_5b", "my_custom_preset", file)
    assert config.mask_mode == "thresholdbound" and config.warmup_steps == 10
    assert presets.get("cogvideo_5b", "psa_balanced", file) == presets.get("cogvideo_5b", "psa_balanced")

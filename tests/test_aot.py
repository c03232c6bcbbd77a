"""Ahead-of-time compilation without a GPU: nothing spills, and the tensor cores are used."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("on any machine interpreted kernels cannot be compiled", allow_module_level=True)

SOME = r"_psa_fwd_kernel/wan/|_importance_kernel-keys/(wan|single)/|_solve_kernel/wan/|_select_kernel-proportional/wan/"


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "aot.py"
    spec = importlib.util.spec_from_file_location("aot", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


aot = load_benchmark()


def pick(arch, pattern):
    return [variant for variant in aot.variants((arch,)) if re.search(pattern, variant.name)]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_default_call_compiles_without_faults(arch):
    chosen = pick(arch, SOME)
    assert len(chosen) == 5
    for variant in chosen:
        row = aot.compile_variant(variant)
        assert aot.faults(variant, row) == [], variant.name


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_shipped_kernel_compiles_without_faults(arch):
    wrong = {}
    for variant in aot.variants((arch,)):
        found = aot.faults(variant, aot.compile_variant(variant))
        if found:
            wrong[variant.name] = found
    assert wrong == {}


def test_arguments_that_equal_one_compile():
    """A launch turns such an argument into a constant, which has fewer methods than a number on the device."""
    for variant in pick(90, "/wan/"):
        ones = {name: 1 for name, kind in variant.signature.items() if kind == "i32"}
        signature = variant.signature | dict.fromkeys(ones, "constexpr")
        aot.compile_variant(replace(variant, signature=signature, constexprs=variant.constexprs | ones))


def test_faults_are_found(monkeypatch):
    """A spill, and what a kernel without matrix products does not have."""
    (variant,) = pick(90, "_psa_bwd_delta_kernel/wide/")
    row = aot.compile_variant(variant)
    assert aot.faults(variant, row) == [] and row["tensor_core"] == [] and row["async_copies"] == 0
    wrong = aot.faults(replace(variant, instruction="HGMMA", copies=True), row)
    assert wrong == ["lacks HGMMA, has no tensor-core instruction", "has no asynchronous copies"]
    assert "HMMA" in aot.faults(replace(variant, instruction="HGMMA"), row | {"tensor_core": ["HMMA"]})[0]
    monkeypatch.setitem(aot.SHARED_LIMIT, 90, -1)
    assert "shared memory" in aot.faults(variant, row)[0]
    squeezed = replace(variant, options=variant.options | {"maxnreg": 24})
    assert "spills" in aot.faults(squeezed, aot.compile_variant(squeezed))[0]


def test_the_recorded_compilations_are_those_that_ship():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "aot.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in rows] == [variant.name for variant in aot.variants((80, 90, 100, 120))]
    assert [row["name"] for row in rows if row["faults"] or row["spills"]] == []


def test_names_are_unique_and_say_what_they_are():
    names = [variant.name for variant in aot.variants((80, 90, 100, 120))]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[\w-]+/[\w-]+/sm_\d+", name) for name in names)

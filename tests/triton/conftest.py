"""Kernels on CPU tensors: the interpreter must be chosen before any kernel's module is imported.

`TRITON_INTERPRET=1 pytest tests/triton`, in a process of its own (ahead-of-time compilation needs it unset).
"""

import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    from psa.backends import triton

    if not triton.interpreted():
        pytest.skip("on any machine these tests hand CPU tensors to kernels: TRITON_INTERPRET=1 pytest tests/triton")

"""Kernels on CPU tensors: the interpreter must be chosen before any kernel's module is imported.

`TRITON_INTERPRET=1 pytest tests/triton`, in a process of its own (ahead-of-time compilation needs it unset).
"""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

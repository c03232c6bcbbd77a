"""Inputs that mean harm, in the attention kernels under Triton's interpreter."""

import pytest
import torch
from harmful import HARMFUL, smooth

import psa


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter has no bfloat16
@pytest.mark.parametrize("name", HARMFUL)
def test_automatic_plans_of_harmful_inputs_come_out_as_in_the_reference(name, dtype):
    q, k, v = smooth(1, 128, 192)
    HARMFUL[name](q, k, v)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    plan = psa.plan(q, k, psa.PSAConfig(density=0.3, block_n=32), v=v)
    out, want = (psa.attend(q, k, v, plan, backend=name).double() for name in ("triton", "reference"))
    assert bool(out.isfinite().all())
    assert float((out - want).norm()) <= 0.02 * float(want.norm())

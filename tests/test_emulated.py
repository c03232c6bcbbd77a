"""What the compiler made of the kernels, executed on a machine that emulates the GPU.

The first half shows that this machine sees what it should see; the second runs every kernel on it.
"""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")

import triton
import triton.language as tl
from cases import Case, make
from emulator import MachineError, emulated, reasons

import psa
from psa.backends import triton as backend
from psa.backends.triton import tune, whole

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_kernels import CASES, EVERYTHING, MODES, check_attention, check_selection, check_whole, distance
from gpu_verify import PUBLIC, check_public

pytestmark = pytest.mark.skipif(bool(reasons()), reason="; ".join(reasons()))
CPU = torch.device("cpu")
ARCHS = (80, 90, 120)
NO_RESERVE = 0x4000
"""MAP_NORESERVE, which Python has no name for: pages that nothing touches cost nothing."""
PRODUCTS = {torch.bfloat16: "mma_bf16", torch.float16: "mma_f16", torch.float32: "mma_tf32"}


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, rows, depth, SIZE: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column, k = tl.arange(0, SIZE), tl.arange(0, STEP)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, depth, STEP):
        a = tl.load(a_ptr + row[:, None] * depth + start + k[None, :], mask=(row < rows)[:, None], other=0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * SIZE + column[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + row[:, None] * SIZE + column[None, :], total, mask=(row < rows)[:, None])


def multiply(driver, dtype=torch.bfloat16, rows=200, edit=str):
    """A product of the kernel above, and its distance from the exact one."""
    driver.edit = edit
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 256, generator=g).to(dtype), torch.randn(256, 64, generator=g).to(dtype)
    c = torch.full((rows, 64), float("nan"))
    _matmul_kernel.device_caches.clear()
    _matmul_kernel[(-(-rows // 64),)](a, b, c, rows, 256, SIZE=64, STEP=32, num_warps=4, num_stages=3)
    want = a.double() @ b.double()
    return c, float((c - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_product_is_exact(arch, dtype):
    """Tensor-core instructions multiply what the layouts say, in every timing; float32 as tf32."""
    for timing in ("early", "late", "mixed"):
        with emulated(arch, timing) as driver:
            _, error = multiply(driver, dtype)
            assert error < (1e-3 if dtype == torch.float32 else 1e-6)
            executed = driver.counts["_matmul_kernel"]
            assert executed["wgmma_mma" if arch == 90 else PRODUCTS[dtype]] > 0
            assert executed["cp_async"] > 0


def test_a_missing_wait_shows():
    """Of copies in the result; of products by name, since it depends on nothing but registers."""
    with emulated(90, "late") as driver:
        assert not multiply(driver, edit=lambda text: re.sub(r"cp\.async\.wait_group\s+\d+;", "", text))[1] < 0.1
        with pytest.raises(MachineError, match=r"line \d+: (reads|writes) a register of a product|nothing waits for"):
            multiply(driver, edit=lambda text: re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", text))


@pytest.mark.parametrize("arch", [80, 90])
def test_a_missing_barrier_shows(arch):
    def wrong(timing):
        with emulated(arch, timing) as driver:
            return not multiply(driver, edit=lambda text: re.sub(r"bar\.sync\s+0;", "", text))[1] < 1e-3

    assert any(wrong(timing) for timing in ("early", "late", "mixed"))


def test_bad_addresses_are_named():
    """Outside every tensor, and not a multiple of what is loaded at once."""
    with emulated(80) as driver:
        with pytest.raises(MachineError, match=r"line \d+: global address lies outside"):
            multiply(driver, edit=lambda text: re.sub(r"setp\.lt\.s32(\s+%p\d+), .*;", r"setp.eq.b32\1, 0, 0;", text))
        with pytest.raises(MachineError, match=r"shared address \d+ .* lies outside"):
            multiply(driver, edit=lambda text: text.replace("global_smem", "900000"))
    g = torch.randn(4 * 64 * 256 + 1, dtype=torch.float32).to(torch.bfloat16)
    with emulated(80) as driver:
        _matmul_kernel.device_caches.clear()
        inputs = g[: 64 * 256].view(64, 256), g[: 256 * 64].view(256, 64), torch.zeros(64, 64)
        _matmul_kernel[(1,)](*inputs, 64, 256, SIZE=64, STEP=32)
        driver.edit = lambda text: re.sub(r"(cp\.async.*\+) 0 \], 0x10", r"\1 2 ], 0x10", text)
        _matmul_kernel.device_caches.clear()
        with pytest.raises(MachineError, match="global address is not a multiple of 16"):
            _matmul_kernel[(1,)](*inputs, 64, 256, SIZE=64, STEP=32)


UNKNOWN = (
    "tanh.approx.f32 %r1, %r2", "mov.u32 %r1, %laneid", "mov.b64 %rd1, {%rs1, %rs2, %rs3, %rs4}", "bar.sync 1, 64",
    "add.s32 %r1, %r2, %r3, %r4",
)  # fmt: skip


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_it_does_not_know_it_says(instruction):
    with emulated(80) as driver, pytest.raises(NotImplementedError, match=r"line \d+: " + re.escape(instruction)):
        multiply(driver, edit=lambda text: text.replace("\tret;", f"\t{instruction};\n\tret;"))


def test_what_never_ends_is_stopped():
    forever = "$L__forever:\n\tbra.uni $L__forever;\n\tret;"
    with emulated(80) as driver, pytest.raises(MachineError, match="does not end"):
        multiply(driver, edit=lambda text: text.replace("\tret;", forever))


PLAIN = {"CAUSAL": False, "PAIR_BIAS": False, "ROW_BIAS": False}
SMALL = {"length_q": 300, "length_k": 300, "block_m": 128, "block_n": 64}
FEW = {
    "plain": (Case(head_dim=128, **SMALL), torch.bfloat16),
    "half precision, blocks of 128": (Case(head_dim=64, **SMALL | {"block_n": 128}), torch.float16),
    "single precision": (Case(head_dim=64, **SMALL), torch.float32),
    "every option": (Case(2, 4, 2, 200, 333, 96, 64, 32, **EVERYTHING), torch.bfloat16),
    "causal, grouped": (Case(is_causal=True, heads=4, kv_heads=2, head_dim=128, **SMALL), torch.bfloat16),
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_and_its_gradients(arch, name):
    with emulated(arch):
        ok, said = check_attention(*FEW[name], CPU, seed=0)
    assert ok, said


@pytest.mark.parametrize("name", ["plain", "half precision, blocks of 128", "masked"])
def test_the_tiles_of_long_sequences(name, monkeypatch):
    monkeypatch.setattr(tune, "LONG", 1)
    calls = FEW | {"masked": (Case(masked=True, variance=True, head_dim=96, **SMALL), torch.bfloat16)}
    case, dtype = calls[name]
    q, options = torch.empty(1, 1, 1, case.head_dim, dtype=dtype), PLAIN | {"ROW_BIAS": case.masked}
    with emulated(90):
        assert tune.launch_for("forward", q, case.length_k, case.block_m, options).reads_bias
        ok, said = check_attention(case, dtype, CPU, seed=0)
    assert ok, said


def test_long_tiles_serve_where_they_fit():
    def rows(length, dtype=torch.bfloat16, dim=128, **changes):
        q = torch.empty(1, 1, 1, dim, dtype=dtype)
        with emulated(90):
            return tune.launch_for("forward", q, length, 128, PLAIN | changes).BLOCK_N

    assert [rows(tune.LONG - 1), rows(tune.LONG), rows(tune.LONG, dim=64)] == [64, 128, 128]
    for other in ({"CAUSAL": True}, {"PAIR_BIAS": True}, {"dtype": torch.float32}, {"dim": 256}):
        assert rows(tune.LONG, **other) <= 64, other


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_from_tokens_to_output_in_five_launches(arch, causal):
    with emulated(arch):
        ok, said = check_whole(700, causal, CPU, seed=0)
    assert ok, said


def test_the_public_call_that_probes():
    with emulated(90):
        ok, said = check_public("automatic, video", CPU, 0, small=False)
    assert ok, said


def laid_out(x, how):
    """The same numbers elsewhere: what a launch specialises on and offsets pass 2**31 elements in "far"."""
    batch, heads, length, dim = x.shape
    if how == "odd offset":
        view = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    elif how == "odd rows":
        view = torch.empty(batch, heads, length, dim + 1, dtype=x.dtype)[..., :dim]
    elif how == "channels first":
        view = torch.empty(batch, heads, dim, length, dtype=x.dtype).transpose(-1, -2)
    else:
        step = 2**30 + 8
        size = x.itemsize * ((heads - 1) * step + length * dim)
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        view = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (0, step, dim, 1))
    return view.copy_(x)


@pytest.mark.parametrize("how", ["odd offset", "odd rows", "channels first", "far"])
@pytest.mark.parametrize("arch", [80, 90])
def test_every_layout_of_the_inputs(arch, how):
    case = Case(heads=3, kv_heads=3, length_q=90, length_k=101, variance=True)
    q, k, v, selection = make(case, 0, torch.bfloat16)
    grad = torch.randn(q.shape).to(q.dtype)
    config = psa.PSAConfig(mask_mode="proportional", density=0.2, use_sim_mask=True, bias="variance")
    results = []
    with emulated(arch):
        for x in ((q, k, v, grad), [laid_out(x, how) for x in (q, k, v, grad)]):
            out, lse = backend.forward(*x[:3], selection)
            grads = backend.backward(x[3], None, *x[:3], out, lse, selection)
            results.append((out, lse, *grads, whole.forward(*x[:3], config, scale=0.1, is_causal=True)[0]))
    assert all(distance(a, b) < 2e-3 for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_of_the_check_for_gpus(arch, name, timing):
    with emulated(arch, timing):
        ok, said = check_attention(*CASES[name], CPU, seed=1)
    assert ok, said


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_mode_of_selection(arch, mode, causal):
    with emulated(arch):
        ok, said = check_selection(mode, causal, 1500, CPU, seed=1)
    assert ok, said


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_public_call(arch, name):
    with emulated(arch):
        ok, said = check_public(name, CPU, 1, small=False)
    assert ok, said

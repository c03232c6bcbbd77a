"""Tensors to C: the `Args` structure of args.h and the two entry points. float32 on the CPU throughout."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psa.errors import BackendError

from . import library

if TYPE_CHECKING:
    from psa.backends.base import Selection

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIZES = "batch heads kv_heads q_len k_len dim block_m block_n n_levels n_rows causal threads"


class Args(ctypes.Structure):
    """Mirror of `Args` in args.h, in its order."""

    _fields_ = (
        *((name, _INT) for name in _SIZES.split()),
        ("scale", ctypes.c_double),
        *((name, _POINTER) for name in ("q", "k", "v")),
        *((f"{name}_stride", _INT * 3) for name in ("q", "k", "v")),
        ("levels", _POINTER),
        ("levels_stride", _INT * 2),
        ("pair_bias", _POINTER),
        ("pair_stride", _INT * 2),
        ("real_before", _POINTER),
        ("query_power", _POINTER),
        ("power_stride", _INT),
        ("bias_cap", _POINTER),
        ("cap_stride", _INT * 2),
        ("row_bias", _POINTER),
        ("row_bias_stride", _INT * 2),
        *((name, _POINTER) for name in ("pool_k", "pool_v", "out", "lse", "grad_out", "grad_lse")),
        *((name, _POINTER) for name in ("grad_q", "grad_k", "grad_v", "grad_pool_k", "grad_pool_v")),
    )


class _Call:
    """One filled `Args` and the tensors that its pointers need alive."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, selection: "Selection") -> None:
        self.args, self.alive = Args(), []
        q, k, v = (_rows(x) for x in (q, k, v))
        batch, heads, q_len, dim = q.shape
        kv_heads, k_len = k.shape[1:3]
        n_levels = min(selection.block_n, 128).bit_length()
        self.n_pooled = sum(-(-k_len // 2**e) for e in range(1, n_levels))
        sizes = (batch, heads, kv_heads, q_len, k_len, dim, selection.block_m, selection.block_n, n_levels)
        for name, value in zip(
            _SIZES.split(),
            (*sizes, k_len + self.n_pooled, selection.is_causal, torch.get_num_threads()),
            strict=True,
        ):
            setattr(self.args, name, int(value))
        self.args.scale = selection.scale
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.point(name, x, f"{name}_stride", 3)
        self.point("levels", _maps(selection.levels), "levels_stride", 2)
        self._bias(selection)
        self.new("pool_k", batch, kv_heads, self.n_pooled, dim)
        self.new("pool_v", batch, kv_heads, self.n_pooled, dim)

    def _bias(self, selection: "Selection") -> None:
        args = self.args
        if selection.pair_bias is not None:
            self.point("pair_bias", _maps(selection.pair_bias.to(torch.float16)), "pair_stride", 2)
        if selection.key_mask is not None:
            before = torch.zeros(args.batch, args.k_len + 1, dtype=torch.int32)
            torch.cumsum(selection.key_mask, 1, dtype=torch.int32, out=before[:, 1:])
            self.point("real_before", before)
        if selection.query_power is None:
            table = (args.batch if selection.key_mask is not None else 1, 1)
        else:
            table = (args.batch, args.heads)
            cap = selection.bias_cap
            power = selection.query_power.float().contiguous()
            self.point("query_power", power)
            args.power_stride = power.stride(0) if power.shape[0] > 1 else 0
            self.point("bias_cap", torch.full((1, 1), torch.inf) if cap is None else cap.float(), "cap_stride", 2)
        self.new("row_bias", *table, args.n_rows)
        args.row_bias_stride[:] = _steps(self.alive[-1], 2)

    def point(self, name: str, x: Tensor, strides: str = "", n: int = 0) -> None:
        self.alive.append(x)
        setattr(self.args, name, x.data_ptr())
        if strides:
            getattr(self.args, strides)[:] = _steps(x, n)

    def new(self, name: str, *shape: int, zero: bool = False) -> Tensor:
        x = torch.zeros(shape) if zero else torch.empty(shape)
        self.point(name, x)
        return x

    def run(self, entry: str) -> None:
        lib = library()
        if lib.psa_args_size() != ctypes.sizeof(Args):
            raise BackendError(f"args.h has {lib.psa_args_size()} bytes, its mirror {ctypes.sizeof(Args)}: rebuild psa")
        if getattr(lib, entry)(ctypes.addressof(self.args)) != 0:
            raise MemoryError("psa's native engine could not allocate its scratch memory")


def forward(q: Tensor, k: Tensor, v: Tensor, selection: "Selection") -> tuple[Tensor, Tensor]:
    """out and lse in float32, contiguous."""
    call = _Call(q, k, v, selection)
    out, lse = call.new("out", *q.shape), call.new("lse", *q.shape[:-1])
    call.run("psa_forward")
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: "Selection",
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in float32, contiguous."""
    call = _Call(q, k, v, selection)
    for name, x in (("grad_out", grad_out), ("grad_lse", grad_lse), ("out", out), ("lse", lse)):
        if x is not None:
            call.point(name, x.float().contiguous())
    dq = call.new("grad_q", *q.shape)
    dk, dv = call.new("grad_k", *k.shape, zero=True), call.new("grad_v", *v.shape, zero=True)
    for name in ("grad_pool_k", "grad_pool_v"):
        call.new(name, *k.shape[:2], call.n_pooled, k.shape[-1], zero=True)
    call.run("psa_backward")
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """float32 with a contiguous last dimension; a view where it already is."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _maps(x: Tensor) -> Tensor:
    """A per-pair map whose [M, N] planes are contiguous; broadcast dimensions stay one plane."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _steps(x: Tensor, n: int) -> list[int]:
    """Strides of the first n dimensions, 0 where a dimension is broadcast."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:n], x.stride()[:n], strict=True)]

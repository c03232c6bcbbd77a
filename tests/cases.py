"""Inputs that several test files share, and benchmarks/gpu_check.sh with them."""

from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from psa.backends.base import Selection


@dataclass(frozen=True)
class Case:
    """Shapes and options of one attention call."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    length_q: int = 200
    length_k: int = 200
    head_dim: int = 32
    block_m: int = 64
    block_n: int = 32
    is_causal: bool = False
    masked: bool = False
    variance: bool = False
    pairs: bool = False
    shared_levels: bool = False
    empty_rows: bool = False
    strided: bool = False


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Random q, k, v and a Selection with every level present."""
    g = torch.Generator().manual_seed(seed)
    shape_q = (case.batch, case.heads, case.length_q, case.head_dim)
    shape_k = (case.batch, case.kv_heads, case.length_k, case.head_dim)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in (shape_q, shape_k, shape_k))
    if case.strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    blocks = (-(-case.length_q // case.block_m), -(-case.length_k // case.block_n))
    lead = (1, 1) if case.shared_levels else (case.batch, case.heads)
    top = min(case.block_n, 128).bit_length()
    exponents = torch.randint(-1, top, (*lead, *blocks), generator=g)
    if case.empty_rows:
        exponents[:, :, ::2] = -1
    levels = torch.where(exponents < 0, 0, 2 ** exponents.clamp(min=0)).to(device, torch.uint8)
    key_mask = None
    if case.masked:
        key_mask = (torch.rand(case.batch, case.length_k, generator=g) > 0.3).to(device)
    selection = Selection(
        levels,
        case.block_m,
        case.block_n,
        case.head_dim**-0.5,
        case.is_causal,
        query_power=q.float().square().mean(2) if case.variance else None,
        bias_cap=torch.full((1, 1), 1.0, device=device) if case.variance else None,
        pair_bias=torch.rand(levels.shape, generator=g).half().to(device) if case.pairs else None,
        key_mask=key_mask,
    )
    return q, k, v, selection


def same_layout(operator, *arguments):
    """Whether a fake kernel tells the strides that Inductor will find: a difference stops a compiled graph."""
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    facts = [[(x.shape, x.stride(), x.dtype) for x in results] for results in (real, fake)]
    assert facts[0] == facts[1]
    return real


def check_layouts(backend: str) -> None:
    """Attention and its gradients on tokens as models have them, [B, L, H, D] transposed, and on expanded gradients."""
    q, k, v, s = make(Case(strided=True, variance=True, length_q=70, length_k=90))
    rest = (s.levels, s.query_power, s.bias_cap, None, None, 64, 32, s.scale, False, backend)
    out, lse = same_layout(torch.ops.psa.attend, q, k, v, *rest)
    upstream = torch.ones(1, 1, 1, 1).expand(out.shape)
    same_layout(torch.ops.psa.attend_backward, upstream, lse, q, k, v, out, lse, *rest)

"""Training through the pyramid: gradients, checkpoints, autocast, compiled steps, accumulation, DDP, a toy task."""

import os

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import Case, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import psa
from psa.backends import reference
from psa.backends import torch as torch_backend
from psa.backends.base import Selection

VOCABULARY, LENGTH, WIDTH, HEADS = 12, 128, 64, 2
SPARSE = psa.PSAConfig(block_m=16, block_n=16, density=0.5, mask_mode="proportional", bias="variance")


class Block(nn.Module):
    """Pre-norm attention and MLP; ``attention`` is PSAAttention or F.scaled_dot_product_attention."""

    def __init__(self, attention):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.attention = attention

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


class Copier(nn.Module):
    """Reads a sequence of symbols and must write, at each place, the symbol half a sequence away."""

    def __init__(self, attention, layers=1):
        super().__init__()
        self.symbols, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.symbols(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def dense_attention():
    return F.scaled_dot_product_attention


def sparse_attention():
    return psa.PSAAttention(SPARSE)


def build(attention, seed=0, layers=1):
    torch.manual_seed(seed)
    return Copier(attention, layers)


def batch(step, size=8):
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(step))
    return tokens, tokens.roll(LENGTH // 2, dims=1)


def loss_of(model, step, size=8):
    tokens, target = batch(step, size)
    return F.cross_entropy(model(tokens).flatten(0, 1), target.flatten())


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 2), groups=st.integers(1, 2), lengths=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    head_dim=st.sampled_from([16, 24, 64]), blocks=st.tuples(st.sampled_from([64, 128]), st.sampled_from([16, 32, 64])),
    flags=st.tuples(*[st.booleans()] * 5), with_lse=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_gradients_agree_with_float64_autograd(kv_heads, groups, lengths, head_dim, blocks, flags, with_lse, seed):
    causal, masked, variance, pairs, empty = flags
    case = Case(
        1, kv_heads * groups, kv_heads, *lengths, head_dim, *blocks, causal, masked, variance, pairs, False, empty
    )
    q, k, v, selection = make(case, seed)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.forward(*exact, selection)
    g = torch.Generator().manual_seed(seed)
    grad_out, grad_lse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    seen = ~lse.isneginf()
    total = (out * grad_out).sum() + ((lse * grad_lse)[seen].sum() if with_lse else 0.0)
    want = torch.autograd.grad(total, exact)
    got_out, got_lse = torch_backend.forward(q, k, v, selection)
    got = torch_backend.backward(grad_out, grad_lse if with_lse else None, q, k, v, got_out, got_lse, selection)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "empty_rows": True}, {"masked": True, "pairs": True, "heads": 4}]
)
def test_the_torch_backend_passes_gradcheck(options):
    case = Case(length_q=19, length_k=21, head_dim=3, block_n=16, **options)
    q, k, v, s = make(case, 5, torch.float64)

    def attend(q, k, v, s: Selection = s):
        constants = (s.levels, s.query_power, s.bias_cap, s.pair_bias, s.key_mask)
        out, lse = torch.ops.psa.attend(q, k, v, *constants, s.block_m, s.block_n, s.scale, s.is_causal, "torch")
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (q, k, v)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_no_worse_than_dense_ones(dtype):
    """The band: what rounding the inputs and the incoming gradient costs dense attention, and as much again."""
    q, k, v, selection = make(Case(length_q=256, length_k=256, head_dim=64, block_n=64), 1)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))

    def error(attention, tensors):
        exact = [t.double().requires_grad_() for t in tensors]
        want = torch.autograd.grad((attention(*exact) * g.double()).sum(), exact)
        half = [t.to(dtype).requires_grad_() for t in tensors]
        got = torch.autograd.grad((attention(*half) * g.to(dtype)).sum(), half)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))

    plan = psa.Plan.from_levels(selection.levels, block_m=64, block_n=64)
    dense = error(F.scaled_dot_product_attention, (q, k, v))
    sparse = error(lambda *t: psa.attend(*t, plan), (q, k, v))
    assert sparse <= 2 * dense


def test_checkpointing_accumulation_and_compiled_steps_change_no_gradient():
    model = build(sparse_attention, layers=2)
    whole = gradients(model, loss_of(model, 0))
    tokens, target = batch(0)

    def saved(model):
        x = model.symbols(tokens) + model.places.weight
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(model.head(x).flatten(0, 1), target.flatten())

    for a, b in zip(gradients(model, saved(model)), whole, strict=True):
        assert torch.equal(a, b)
    for start in (0, 4):
        part = slice(start, start + 4)
        (F.cross_entropy(model(tokens[part]).flatten(0, 1), target[part].flatten()) / 2).backward()
    for parameter, b in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, b, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(model, loss_of(compiled, 0)), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_autocast_trains():
    model = build(sparse_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, 0)
    exact = gradients(model, loss_of(model, 0))
    got = gradients(model, loss)
    assert all(a.isfinite().all() for a in got)
    cosine = F.cosine_similarity(torch.cat([a.flatten() for a in got]), torch.cat([b.flatten() for b in exact]), dim=0)
    assert cosine > 0.99


def train(attention, steps=260):
    model = build(attention)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model, step, 16)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_a_copy_task_trains_to_the_loss_of_dense_attention():
    dense, sparse = train(dense_attention), train(sparse_attention)
    assert dense < 0.05, f"dense attention itself did not learn the task: {dense:.3f}"
    assert sparse < 0.1, f"dense {dense:.3f}, sparse {sparse:.3f}"


def _worker(rank, world, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(build(sparse_attention))
    tokens, target = batch(0)
    mine = slice(rank * 4, rank * 4 + 4)
    F.cross_entropy(model(tokens[mine]).flatten(0, 1), target[mine].flatten()).backward()
    if rank == 0:
        results.put([p.grad.numpy() for p in model.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradient_of_the_whole_batch():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, 2, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = results.get(timeout=120)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    model = build(sparse_attention)
    for a, b in zip(got, gradients(model, loss_of(model, 0)), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_lse", [False, True])
def test_split_keys_merge_to_the_whole_with_gradients(with_lse):
    q, k, v, selection = make(Case(length_q=100, length_k=160, head_dim=32), 2)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plan = psa.Plan.from_levels(selection.levels, block_m=64, block_n=32)
    whole = psa.attend(*leaves, plan, return_lse=True)
    parts = []
    for keys, blocks in ((slice(0, 96), slice(0, 3)), (slice(96, 160), slice(3, 5))):
        piece = psa.Plan.from_levels(selection.levels[..., blocks], block_m=64, block_n=32)
        parts += psa.attend(leaves[0], leaves[1][:, :, keys], leaves[2][:, :, keys], piece, return_lse=True)
    merged = psa.merge(*parts)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    seen = ~whole[1].isneginf()
    totals = [o.square().sum() + (lse[seen].sum() if with_lse else 0.0) for o, lse in (merged, whole)]
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in totals), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

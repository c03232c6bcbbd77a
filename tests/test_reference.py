"""The specification against golden values, against dense attention, and against its own formulas written out."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import psa
from psa.backends import reference
from psa.backends.base import Selection

GOLDEN = Path(__file__).parent / "data" / "psa_golden.safetensors"


def golden(name: str):
    with safe_open(str(GOLDEN), "pt") as file:
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        return tensors, json.loads(file.metadata()[name])


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_agrees_with_golden_values(index, backend):
    t, facts = golden(f"attention.{index}")
    plan = psa.Plan.from_levels(t["levels"], block_m=facts["block_m"], block_n=facts["block_n"])
    out = psa.attend(t["q"], t["k"], t["v"], plan, is_causal=facts["causal"], backend=backend)
    torch.testing.assert_close(out, t["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", range(4))
def test_levels_agree_with_golden_values(index):
    t, facts = golden(f"levels.{index}")
    levels = psa.allocate_levels(t["importance"], mask_mode=facts["mode"], mask_ratios=facts["mask_ratios"], block_n=64)
    assert torch.equal(levels.int(), t["expected"])


@pytest.mark.parametrize("index", range(3))
def test_similarity_caps_agree_with_golden_values(index):
    t, facts = golden(f"similarity.{index}")
    cap = psa.similarity_cap(t["k"], facts["block_n"], {int(h): x for h, x in facts["thresholds"].items()})
    assert torch.equal(cap.int(), t["expected"])


def by_hand(q, k, v, s: Selection):
    """METHOD §2 for one query row at a time, in Python numbers: slow, obvious, and independent of the library."""
    batch, heads, length_q, _ = q.shape
    length_k, groups = k.shape[2], heads // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            levels = s.levels[b % s.levels.shape[0], h % s.levels.shape[1]]
            for i in range(length_q):
                scores, values = [], []
                for n in range(levels.shape[1]):
                    level = int(levels[i // s.block_m, n])
                    stop = min((n + 1) * s.block_n, length_k)
                    for start in range(n * s.block_n, stop, level) if level else ():
                        tokens = range(start, min(start + level, stop))
                        real = [t for t in tokens if s.key_mask is None or bool(s.key_mask[b, t])]
                        if not real or (s.is_causal and tokens[-1] > i + length_k - length_q):
                            continue
                        keys, rows = k[b, h // groups, real], v[b, h // groups, real]
                        bias = math.log(len(real))
                        if level > 1 and s.query_power is not None:
                            spread = (keys.var(0, correction=0) * s.query_power[b % len(s.query_power), h]).sum()
                            bias += min(0.5 * s.scale**2 * float(spread), float(s.bias_cap.flatten()[0]))
                        if level > 1 and s.pair_bias is not None:
                            bias += float(
                                s.pair_bias[b % len(s.pair_bias), h % s.pair_bias.shape[1], i // s.block_m, n]
                            )
                        scores.append(s.scale * float(q[b, h, i] @ keys.mean(0)) + bias)
                        values.append(rows.mean(0))
                if scores:
                    score = torch.tensor(scores, dtype=q.dtype)
                    out[b, h, i] = score.softmax(0) @ torch.stack(values)
                    lse[b, h, i] = score.logsumexp(0)
    return out, lse


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    head_dim=st.sampled_from([1, 5, 16, 24]),
    blocks=st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 32])),
    flags=st.tuples(*[st.booleans()] * 6),
    seed=st.integers(0, 2**16),
)
def test_reference_is_the_formula_written_out(batch, kv_heads, groups, lengths, head_dim, blocks, flags, seed):
    causal, masked, variance, pairs, shared, empty = flags
    case = Case(
        batch, kv_heads * groups, kv_heads, *lengths, head_dim, *blocks, causal, masked, variance, pairs, shared, empty
    )
    q, k, v, selection = make(case, seed, torch.float64)
    out, lse = reference.forward(q, k, v, selection)
    expected_out, expected_lse = by_hand(q, k, v, selection)
    torch.testing.assert_close(out, expected_out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


def test_level_one_everywhere_is_dense_attention(rng):
    q, k, v = (torch.randn(2, 4, 333, 40, generator=rng, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        plan = psa.Plan.from_levels(torch.ones(1, 1, 3, 6, dtype=torch.int64), block_m=128, block_n=64)
        out = psa.attend(q, k, v, plan, is_causal=causal, backend="reference")
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block_n", [16, 32, 64, 128, 256])
def test_pooling_constant_blocks_is_exact(rng, block_n):
    length = 3 * block_n + 5
    rows = torch.randn(1, 1, 4, 16, generator=rng, dtype=torch.float64)
    k, v = rows.repeat_interleave(block_n, 2)[:, :, :length], rows.flip(2).repeat_interleave(block_n, 2)[:, :, :length]
    q = torch.randn(1, 1, length, 16, generator=rng, dtype=torch.float64)
    dense = F.scaled_dot_product_attention(q, k, v)
    for level in [1 << e for e in range(min(block_n, 128).bit_length())]:
        levels = torch.full((1, 1, -(-length // 64), 4), level)
        plan = psa.Plan.from_levels(levels, block_m=64, block_n=block_n)
        torch.testing.assert_close(psa.attend(q, k, v, plan, backend="reference"), dense, atol=1e-12, rtol=0)


def test_gradients_pass_gradcheck():
    for options in ({}, {"is_causal": True, "empty_rows": True}, {"masked": True, "pairs": True, "heads": 4}):
        q, k, v, selection = make(Case(length_q=37, length_k=45, head_dim=6, block_n=16, **options), 3, torch.float64)

        def attend(*tensors, selection=selection):
            out, lse = reference.forward(*tensors, selection)
            return out, lse.masked_fill(lse.isneginf(), 0.0)

        assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (q, k, v)])

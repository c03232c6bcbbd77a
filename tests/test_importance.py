"""Importance estimates against exact attention mass, their masks, and their determinism."""

import pytest
import torch

import psa
from psa.importance import block_scores, importance, measured_mass, score_rows

KINDS = ["pooled", "sampled", "antidiagonal"]


def exact_mass(q, k, block_m, block_n, scale, is_causal=False):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = scale * q.double() @ k.double().transpose(-1, -2)
    if is_causal:
        shift = k.shape[2] - q.shape[2]
        late = torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None] + shift
        logits = logits.masked_fill(late, -torch.inf)
    p = logits.softmax(-1)
    pad_q, pad_k = -q.shape[2] % block_m, -k.shape[2] % block_n
    p = torch.nn.functional.pad(p, (0, pad_k, 0, pad_q)).unflatten(-1, (-1, block_n)).sum(-1)
    p = p.unflatten(-2, (-1, block_m)).sum(-2)
    return (p / p.sum(-1, keepdim=True)).float()


def smooth(batch, heads, length, dim, seed):
    g = torch.Generator().manual_seed(seed)
    knots = torch.randn(batch, heads, length // 32 + 2, dim, generator=g)
    x = torch.nn.functional.interpolate(knots.flatten(0, 1).transpose(1, 2), size=length, mode="linear").transpose(1, 2)
    return x.unflatten(0, (batch, heads)).contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(512, 512), (300, 437), (77, 500)])
def test_estimates_follow_the_exact_mass(kind, causal, lengths):
    q, k = smooth(1, 4, lengths[0], 32, 0) * 2, smooth(1, 2, lengths[1], 32, 1)
    config = psa.PSAConfig(importance=kind, block_m=64, block_n=32)
    got = importance(q, k, config, scale=32**-0.5, is_causal=causal)
    want = exact_mass(q, k, 64, 32, 32**-0.5, causal)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), atol=1e-5, rtol=0)
    top = want.shape[-1] // 3 + 1
    best = want.topk(top, -1).values.sum(-1)
    found = want.gather(-1, got.topk(top, -1).indices).sum(-1)
    assert (found / best).mean() > 0.85
    if causal:
        assert (got[want == 0] == 0).all()


def test_finest_pooling_is_the_exact_mass():
    q, k = smooth(2, 2, 260, 16, 2), smooth(2, 2, 301, 16, 3)
    config = psa.PSAConfig(importance_rows=1, importance_cols=1, block_m=64, block_n=32)
    got = importance(q, k, config, scale=0.25)
    torch.testing.assert_close(got, exact_mass(q, k, 64, 32, 0.25), atol=1e-6, rtol=1e-4)


def test_measured_mass_at_one_row_is_exact_and_its_ratio_restores_pooled_mass():
    q, k = smooth(1, 2, 200, 16, 4) * 3, smooth(1, 2, 250, 16, 5)
    config = psa.PSAConfig(bias="measured", density=0.2, importance_rows=1, block_m=64, block_n=32)
    mass, ratio = measured_mass(q, k, config, scale=0.25)
    torch.testing.assert_close(mass, exact_mass(q, k, 64, 32, 0.25), atol=1e-6, rtol=1e-4)
    assert (ratio >= 0).all() and (ratio[..., 0] == 0).all()
    assert (ratio[..., 1:].diff(dim=-1) > -1e-3).all()  # coarser means lose more (Jensen)


@pytest.mark.parametrize("kind", [*KINDS, "measured"])
def test_masked_keys_weigh_nothing_and_change_nothing(kind):
    g = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 2, 128, 16, generator=g), torch.randn(2, 2, 160, 16, generator=g)
    mask = torch.ones(2, 160, dtype=torch.bool)
    mask[0, 96:] = False
    other = torch.where(mask[:, None, :, None], k, torch.full_like(k, 50.0))
    config = psa.PSAConfig(block_m=64, block_n=32, importance="pooled" if kind == "measured" else kind)
    if kind == "measured":
        config = config.replace(bias="measured", density=0.3)
        estimate = lambda keys: measured_mass(q, keys, config, scale=0.25, key_mask=mask)[0]  # noqa: E731
    else:
        estimate = lambda keys: importance(q, keys, config, scale=0.25, key_mask=mask)  # noqa: E731
    assert torch.equal(estimate(k), estimate(other))
    assert (estimate(k)[0, :, :, 3:] == 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "measured"])
def test_same_inputs_give_the_same_bits_whatever_the_batch_and_the_global_seed(kind):
    g = torch.Generator().manual_seed(7)
    q, k = torch.randn(3, 4, 300, 32, generator=g), torch.randn(3, 2, 333, 32, generator=g)
    measured = kind == "measured"
    config = psa.PSAConfig(bias="measured", density=0.3) if measured else psa.PSAConfig(importance=kind)
    torch.manual_seed(1)
    first = psa.plan(q, k, config, enable_gqa=True)
    torch.manual_seed(2)
    second = psa.plan(q, k, config, enable_gqa=True)
    assert torch.equal(first.levels, second.levels)
    alone = psa.plan(q[1:2], k[1:2], config, enable_gqa=True)
    assert torch.equal(first.levels[1:2], alone.levels)


def test_sampled_offsets_follow_the_seed():
    g = torch.Generator().manual_seed(8)
    q = torch.randn(1, 1, 512, 16, generator=g) * 3
    a, b = (psa.PSAConfig(importance="sampled", seed=s) for s in (0, 1))
    assert not torch.equal(importance(q, q, a, scale=0.25), importance(q, q, b, scale=0.25))


@pytest.mark.parametrize("causal", [False, True])
def test_importance_of_some_query_blocks_and_some_heads(causal):
    q, k = smooth(2, 4, 512, 32, 0) * 2, smooth(2, 2, 512, 32, 1)
    call = {"config": psa.PSAConfig(block_m=64, block_n=32), "scale": 32**-0.5, "is_causal": causal}
    whole = importance(q, k, **call)
    rows = score_rows(q, k, **call)
    torch.testing.assert_close(block_scores(rows.of_blocks(torch.tensor([1, 2, 7]))), whole[:, :, [1, 2, 7]])
    wanted = torch.tensor([[True, False, False, False], [False, False, True, True]])
    part = block_scores(rows, wanted)
    torch.testing.assert_close(part[wanted], whole[wanted])
    assert not bool(part[0, 2:].any() or part[1, :2].any()), "KV heads that nobody wants are left out on the CPU"

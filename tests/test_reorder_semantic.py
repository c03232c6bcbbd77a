"""Semantic reordering: clusters become contiguous, deterministically, head by head, and carry from call to call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa.errors import ConfigError, ShapeError
from psa.reorder import SemanticState, reorder, semantic_permutation

quick = settings(deadline=None, max_examples=40)


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_permutation(order):
    return torch.equal(order.sort(dim=-1).values, torch.arange(order.shape[-1]).expand_as(order))


def clustered(batch, heads, length, groups=6, seed=0):
    """Tokens of well separated groups, scattered over the sequence; also each token's group [batch, heads, length]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, heads, groups, 16, generator=generator) * 8
    group = torch.randint(groups, (batch, heads, length), generator=generator)
    noise = torch.randn(batch, heads, length, 16, generator=generator) * 0.1
    return centres.gather(2, group[..., None].expand(-1, -1, -1, 16)) + noise, group


def same_orders(a, b):
    return torch.equal(a.q_order, b.q_order) and torch.equal(a.k_order, b.k_order)


@quick
@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 3), st.booleans())
def test_any_length_and_cluster_count(length, clusters, seed, constant):
    q = torch.ones(1, 2, length, 4) if constant else tokens(1, 2, length, 4, seed=seed)
    permutation, state = semantic_permutation(q, q[:, :1], clusters=clusters, seed=seed)
    assert is_permutation(permutation.q_order) and is_permutation(permutation.k_order)
    assert state.k_centroids.shape == (1, 1, min(clusters, length), 4)
    assert state.q_centroids.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_a_group_become_contiguous_in_every_head(seed):
    k, group = clustered(2, 3, 300, seed=seed)
    permutation, _ = semantic_permutation(k, k, clusters=24, seed=seed)
    runs = permutation.apply_k(group).diff(dim=-1).ne(0).sum(-1) + 1
    assert runs.eq(6).all()


def test_inside_a_cluster_tokens_follow_the_base_order():
    k, group = clustered(1, 2, 60, groups=3)
    base = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    permutation, _ = semantic_permutation(k, k, clusters=3, base_order=base)
    place = torch.empty(60, dtype=torch.long).scatter_(0, base, torch.arange(60))
    order = permutation.k_order[0]
    same = group[0].gather(1, order).diff(dim=-1).eq(0)
    assert same.sum() == 2 * 57
    assert (place[order].diff(dim=-1) > 0)[same].all()


def test_same_inputs_same_orders_and_no_global_random_numbers():
    q, k = tokens(1, 2, 400, 8, dtype=torch.bfloat16), tokens(1, 2, 400, 8, seed=1, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    first, _ = semantic_permutation(q, k)
    torch.manual_seed(123)
    again, _ = semantic_permutation(q, k)
    assert same_orders(first, again)
    torch.set_rng_state(before)
    semantic_permutation(q, k)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_orders(first, semantic_permutation(q, k, seed=1)[0])


def test_chunked_assignment_changes_nothing(monkeypatch):
    q = tokens(2, 2, 500, 8)
    whole, _ = semantic_permutation(q, q)
    monkeypatch.setattr("psa.reorder.semantic.CHUNK_ELEMENTS", 3000)
    chunked, _ = semantic_permutation(q, q)
    assert same_orders(whole, chunked)


@pytest.mark.parametrize("method", ["semantic", "hybrid"])
def test_batch_items_and_heads_do_not_influence_each_other(method):
    q, k = tokens(3, 4, 240, 8), tokens(3, 2, 240, 8, seed=1)
    together, _ = reorder(method, q, k, (4, 6, 10))
    alone, _ = reorder(method, q[1:2, :2], k[1:2, :1], (4, 6, 10))
    assert torch.equal(together.q_order[1:2, :2], alone.q_order)
    assert torch.equal(together.k_order[1:2, :1], alone.k_order)


def test_state_carries_the_centroids_on():
    k, group = clustered(1, 2, 400, groups=8)
    _, state = semantic_permutation(k, k, clusters=32)
    warm, after = semantic_permutation(k, k, clusters=32, iterations=0, state=state)
    assert warm.apply_k(group).diff(dim=-1).ne(0).sum(-1).eq(7).all() and torch.equal(
        after.k_centroids, state.k_centroids
    )
    nearby = k + 0.05 * tokens(*k.shape, seed=3)
    moved, after = semantic_permutation(nearby, nearby, state=state)
    assert moved.apply_k(group).diff(dim=-1).ne(0).sum(-1).eq(7).all()
    assert not torch.equal(after.k_centroids, state.k_centroids)
    again = SemanticState.from_dict(state.to_dict()).to("cpu")
    assert same_orders(semantic_permutation(nearby, nearby, state=again)[0], moved)


def test_state_of_another_shape_is_refused():
    q = tokens(1, 2, 64, 8)
    _, state = semantic_permutation(q, q, clusters=4)
    with pytest.raises(ShapeError, match="state=None"):
        semantic_permutation(q[:, :1], q[:, :1], state=state)
    with pytest.raises(ShapeError, match="state=None"):
        semantic_permutation(q, q, clusters=5, state=state)


def test_masked_keys_go_last_and_do_not_count():
    k = tokens(2, 3, 200, 8)
    mask = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) > 0.3
    permutation, _ = semantic_permutation(k, k, key_mask=mask)
    assert torch.equal(permutation.apply_k_mask(mask), mask.sort(dim=-1, descending=True).values)
    other, _ = semantic_permutation(k, torch.where(mask[:, None, :, None], k, 1e4), key_mask=mask)
    assert torch.equal(other.k_order, permutation.k_order)
    nothing, _ = semantic_permutation(k, k, key_mask=torch.zeros_like(mask), text_length=5)
    assert is_permutation(nothing.k_order)


def test_queries_and_keys_of_different_lengths():
    permutation, _ = semantic_permutation(tokens(1, 2, 50, 8), tokens(1, 1, 33, 8))
    assert is_permutation(permutation.q_order) and permutation.k_order.shape == (1, 1, 33)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"clusters": 0}, ConfigError),
        ({"iterations": -1}, ConfigError),
        ({"base_order": torch.arange(9)}, ShapeError),
        ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, ShapeError),
    ],
)
def test_bad_settings_are_refused(arguments, error):
    with pytest.raises(error):
        semantic_permutation(tokens(1, 1, 8, 4), tokens(1, 1, 8, 4), **arguments)


def test_what_the_other_side_does_not_see_decides_nothing():
    """Channels count by how much they move the logits: not at all where the other side has nothing in them, and for
    queries not where all keys are alike."""
    groups, group = clustered(1, 2, 400, groups=6)
    blank = torch.zeros(1, 2, 400, 16)
    noise = 50 * torch.randn(1, 2, 400, 16, generator=torch.Generator().manual_seed(1))
    cases = (
        ((groups, blank), (groups, noise)),
        ((groups, noise), (groups, blank)),
        ((groups, noise), (groups, blank + 300)),
    )
    for q, k in cases:
        permutation, _ = semantic_permutation(torch.cat(q, -1), torch.cat(k, -1), clusters=24)
        for found in (permutation.apply_q(group), permutation.apply_k(group)):
            assert found.diff(dim=-1).ne(0).sum(-1).eq(5).all()

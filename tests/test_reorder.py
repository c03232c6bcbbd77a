"""Reordering: every method gives a permutation that can be undone, and puts neighbours next to each other."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from psa.errors import ConfigError, ShapeError
from psa.reorder import (
    Permutation,
    gilbert_order,
    reorder,
    semantic_permutation,
    spatial_permutation,
    tile_order,
)

GOLDEN = Path(__file__).parent / "data" / "gilbert.safetensors"
METHODS = ("Gilbert", "tile", "semantic", "hybrid")
quick = settings(deadline=None, max_examples=40)


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_permutation(order):
    return torch.equal(order.sort(dim=-1).values, torch.arange(order.shape[-1]).expand_as(order))


def steps(order, width, height):
    """Manhattan distance of consecutive points."""
    points = torch.stack([order % width, order // width % height, order // (width * height)])
    return points.diff(dim=1).abs().sum(0)


# Gilbert and tile orders


@pytest.mark.parametrize("case", range(3))
def test_gilbert_equals_golden_order(case):
    with safe_open(GOLDEN, "pt") as golden:
        size = json.loads(golden.metadata()[f"gilbert.{case}"])
        expected = golden.get_tensor(f"gilbert.{case}.order").long()
    assert torch.equal(gilbert_order(size["width"], size["height"], size["depth"]), expected)


@quick
@given(st.tuples(*[st.integers(1, 24)] * 3))
def test_gilbert_visits_every_point_once(size):
    assert is_permutation(gilbert_order(*size))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 500, 1), (128, 1, 1), (1, 1, 63), (2, 1, 300), (80, 45, 31)])
def test_gilbert_takes_extreme_sizes(size):
    assert is_permutation(gilbert_order(*size))


@quick
@given(st.tuples(*[st.integers(1, 12)] * 3))
def test_gilbert_steps_are_unit_steps_for_even_sizes(half):
    width, height, depth = (2 * n for n in half)
    assert steps(gilbert_order(width, height, depth), width, height).eq(1).all()


@quick
@given(st.tuples(*[st.integers(1, 13)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_tiles_are_contiguous_and_in_raster_order(grid, tile):
    order = tile_order(grid, tile)
    assert is_permutation(order)
    t, h, w = order // (grid[1] * grid[2]), order // grid[2] % grid[1], order % grid[2]
    ids = torch.stack([t // tile[0], h // tile[1], w // tile[2]], dim=1)
    runs, sizes = ids.unique_consecutive(dim=0, return_counts=True)
    assert (
        len(runs) == len(runs.unique(dim=0)) == -(-grid[0] // tile[0]) * -(-grid[1] // tile[1]) * -(-grid[2] // tile[2])
    )
    assert runs.diff(dim=0).abs().sum(1).eq(1).all()  # the serpentine: each tile touches the one before
    assert all(run.diff().gt(0).all() for run in order.split(sizes.tolist()))


def test_gilbert_blocks_are_more_compact_than_raster_blocks():
    """A block of 64 tokens of an 8x16x16 grid is one 4x4x4 cube on the curve, but 4 whole lines in raster order."""
    width, height, depth = 16, 16, 8

    def mean_extent(order):
        points = torch.stack([order % width, order // width % height, order // (width * height)]).view(3, -1, 64)
        return (points.amax(-1) - points.amin(-1) + 1).float().prod(0).mean()

    assert mean_extent(gilbert_order(width, height, depth)) <= 96
    assert mean_extent(tile_order((depth, height, width), (4, 4, 4))) == 64


def test_grid_is_t_h_w():
    assert torch.equal(spatial_permutation("Gilbert", (3, 4, 5)).q_order, gilbert_order(width=5, height=4, depth=3))


def test_spatial_orders_are_cached():
    first = spatial_permutation("gilbert", (4, 5, 6), 3)
    assert spatial_permutation("Gilbert", (4, 5, 6), 3) is first
    assert first.k_order is first.q_order


def test_spatial_order_found_in_inference_mode_serves_training():
    q = tokens(1, 1, 7 * 3 * 5, 4).requires_grad_()
    with torch.inference_mode():
        spatial_permutation("Gilbert", (7, 3, 5)).restore_q(q)
    permutation = spatial_permutation("Gilbert", (7, 3, 5))
    permutation.restore_q(permutation.apply_q(q)).sum().backward()
    assert torch.equal(q.grad, torch.ones_like(q))


# Permutation


def random_permutation(batch, heads, kv_heads, q_tokens, k_tokens, seed=0):
    """Per-head orders; batch 0 means one shared order for all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_tokens), (batch, kv_heads, k_tokens)] if batch else [(q_tokens,), (k_tokens,)]
    return Permutation(*[torch.rand(shape, generator=generator).argsort(-1) for shape in shapes])


@quick
@given(st.sampled_from([0, 1, 2]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_permute_then_restore_is_identity_forward_and_backward(batch, q_tokens, k_tokens, seed):
    permutation = random_permutation(batch, 4, 2, q_tokens, k_tokens, seed)
    q = tokens(2, 4, q_tokens, 3, dtype=torch.float64).requires_grad_()
    lse, weight = tokens(2, 4, q_tokens), tokens(2, 4, q_tokens, 3, seed=1, dtype=torch.float64)
    assert torch.equal(permutation.restore_q(permutation.apply_q(q)), q)
    assert torch.equal(permutation.restore_q(permutation.apply_q(lse)), lse)
    k = tokens(2, 2, k_tokens, 3)
    index = permutation.k_inverse.expand(2, 2, k_tokens)[..., None].expand_as(k)
    assert torch.equal(permutation.apply_k(k).gather(2, index), k)
    (permutation.restore_q(permutation.apply_q(q)) * weight).sum().backward()
    assert torch.equal(q.grad, weight)
    (grad,) = torch.autograd.grad((permutation.apply_q(q) * permutation.apply_q(weight)).sum(), q)
    assert torch.equal(grad, weight)


def test_gradients_match_finite_differences_twice():
    permutation = random_permutation(1, 2, 2, 5, 5)
    q = tokens(1, 2, 5, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(permutation.apply_q, q)
    assert torch.autograd.gradgradcheck(lambda x: permutation.restore_q(x) ** 2, q)


def test_heads_have_orders_of_their_own():
    permutation = Permutation(torch.tensor([[[0, 1, 2], [2, 1, 0]]]), torch.tensor([[[1, 2, 0]]]))
    q = torch.arange(6.0).view(1, 2, 3).expand(2, -1, -1)
    assert permutation.apply_q(q)[1].tolist() == [[0, 1, 2], [5, 4, 3]]
    assert permutation.apply_k(q[:, :1])[0].tolist() == [[1, 2, 0]]
    assert permutation.per_head


def test_non_contiguous_input():
    permutation = spatial_permutation("Gilbert", (2, 3, 4))
    q = tokens(2, 24, 3, 8).transpose(1, 2)
    assert torch.equal(permutation.apply_q(q), q.contiguous()[:, :, permutation.q_order])


def test_shared_order_is_stored_moved_and_inverted_once():
    order = torch.tensor([2, 0, 1])
    permutation = Permutation(order, order)
    assert permutation.k_inverse is permutation.q_inverse
    assert permutation.to("cpu") is permutation
    moved = permutation.to("meta")
    assert moved.k_order is moved.q_order and moved.q_order.device.type == "meta"


@pytest.mark.parametrize("batch", [0, 2])
def test_dictionary_round_trip(batch):
    permutation = random_permutation(batch, 3, 1, 10, 7)
    again = Permutation.from_dict(permutation.to_dict())
    assert torch.equal(again.q_order, permutation.q_order) and torch.equal(again.k_order, permutation.k_order)
    shared = spatial_permutation("tile", (2, 2, 2))
    assert list(shared.to_dict()) == ["q_order"]
    again = Permutation.from_dict(shared.to_dict())
    assert again.k_order is again.q_order


def test_stored_orders_are_checked():
    with pytest.raises(ShapeError, match="every token"):
        Permutation.from_dict({"q_order": torch.tensor([0, 0, 1])})
    with pytest.raises(ShapeError, match="q_order"):
        Permutation.from_dict({})
    with pytest.raises(ShapeError, match="int64"):
        Permutation(torch.tensor([0.0]), torch.tensor([0]))


def test_misfit_names_both_shapes():
    permutation = random_permutation(2, 4, 2, 6, 6)
    for bad in (tokens(2, 4, 7, 3), tokens(2, 3, 6, 3), tokens(3, 4, 6, 3), tokens(4, 6)):
        with pytest.raises(ShapeError, match=r"\[2, 4, 6\]"):
            permutation.apply_q(bad)


def test_key_mask_follows_the_keys():
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    permutation = spatial_permutation("Gilbert", (2, 3, 4))
    assert torch.equal(permutation.apply_k_mask(mask), mask[:, permutation.k_order])
    with pytest.raises(ShapeError, match="different places"):
        random_permutation(1, 2, 2, 24, 24).apply_k_mask(mask)


def test_compiles_without_graph_breaks():
    def double(q):
        permutation = spatial_permutation("Gilbert", (3, 4, 5), 2, "first", device=q.device)
        again = spatial_permutation("tile", (62, 1, 1), tile_size=(5, 1, 1), device=q.device)
        return permutation.restore_q(again.restore_q(again.apply_q(permutation.apply_q(q))) * 2)

    q = tokens(1, 2, 62, 4).requires_grad_()
    out = torch.compile(double, fullgraph=True, backend="aot_eager")(q)
    out.sum().backward()
    assert torch.equal(out, q * 2) and q.grad.eq(2).all()


# All methods through reorder()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 7), (2, 16, 16)])
def test_text_keeps_its_place(method, position, grid):
    text, video = 5, grid[0] * grid[1] * grid[2]
    q, k = tokens(2, 4, video + text, 8), tokens(2, 2, video + text, 8, seed=1)
    permutation, _ = reorder(method, q, k, grid, text_length=text, text_position=position, tile_size=(2, 4, 4))
    place = slice(0, text) if position == "first" else slice(video, None)
    for order in (permutation.q_order, permutation.k_order):
        assert is_permutation(order)
        assert order[..., place].eq(torch.arange(video + text)[place]).all()
    assert torch.equal(permutation.restore_q(permutation.apply_q(q)), q)


def test_method_names_ignore_case_and_suggest_the_nearest():
    q = tokens(1, 1, 24, 4)
    lower, _ = reorder("gilbert", q, q, (2, 3, 4))
    upper, _ = reorder("GILBERT", q, q, (2, 3, 4))
    assert lower is upper
    with pytest.raises(ConfigError, match="Did you mean 'Gilbert'"):
        reorder("Gilber", q, q, (2, 3, 4))
    with pytest.raises(ConfigError, match="Did you mean 'hybrid'"):
        reorder("hybird", q, q, (2, 3, 4))


def test_wrong_grids_and_texts_are_refused():
    q = tokens(1, 1, 24, 4)
    with pytest.raises(ShapeError, match=r"2x3x5 plus text_length 1 is 31 tokens.*24"):
        reorder("Gilbert", q, q, (2, 3, 5), text_length=1)
    with pytest.raises(ConfigError, match="needs the token grid"):
        reorder("hybrid", q, q, None)
    with pytest.raises(ConfigError, match="at least 1"):
        reorder("tile", q, q, (0, 3, 4))
    with pytest.raises(ConfigError, match="text_position"):
        reorder("semantic", q, q, None, text_position="middle")
    with pytest.raises(ConfigError, match="text_length"):
        reorder("semantic", q, q, None, text_length=-1)
    with pytest.raises(ShapeError, match="exceeds"):
        semantic_permutation(q, q, text_length=25)
    with pytest.raises(ConfigError, match="three sizes"):
        tile_order((2, 3, 4), (2, 0, 4))
    with pytest.raises(ConfigError, match="at least 1"):
        gilbert_order(0, 1, 1)

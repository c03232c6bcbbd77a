"""Proportional allocation by importance and rank."""

import pytest
import torch

import psa
from psa.allocate import BlockMask, allocate_levels, ranks
from psa.integrations.prefill import fitted


def test_ranks_leave_out_pinned_and_invisible_blocks():
    shares = torch.tensor([[[[0.4, 0.1, 0.3, 0.2]]]])
    assert ranks(shares, BlockMask()).flatten().tolist() == [1, 4, 2, 3]
    visible = torch.tensor([[[[True, True, True, False]]]])
    pinned = torch.tensor([[[[True, False, False, False]]]])
    assert ranks(shares, BlockMask(visible, pinned)).flatten().tolist() == [3, 2, 1, 4]


@pytest.mark.parametrize("density", (0.15, 0.35))
def test_density_is_met_and_order_kept(density):
    shares = 1 + 0.01 * torch.rand(1, 2, 8, 64, generator=torch.Generator().manual_seed(0))
    levels = allocate_levels(
        shares, mask_mode="proportional", density=density, block_n=64, exponent=1.0, rank_exponent=3.0
    ).float()
    assert (1 / levels).mean().item() == pytest.approx(density, rel=0.02)
    order = shares.argsort(-1, descending=True)
    assert bool((levels.gather(-1, order).diff(dim=-1) >= 0).all())
    top = levels.gather(-1, order)[..., : int(64 * density / 2)]
    assert bool((top == 1).all()), "nearly even importance still gives its first blocks full resolution"


def test_blocks_fit_the_context():
    config = psa.PSAConfig(density=0.15, rank_exponent=3.0)
    sizes = {length: fitted(config, length) for length in (300, 1024, 4096, 8192, 16384, 200_000)}
    assert [(c.block_m, c.block_n) for c in sizes.values()] == [
        (16, 16), (16, 16), (32, 32), (64, 64), (128, 64), (128, 64),
    ]  # fmt: skip
    assert [c.keep_all for c in sizes.values()] == [False, False, True, True, True, True]
    assert psa.PSAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(psa.ConfigError):
        psa.PSAConfig(rank_exponent=-1.0)


@pytest.mark.parametrize("length", (1024, 4096))
def test_copying_heads_keep_their_accuracy(length):
    """The hand-set decoder of benchmarks/long_context.py at a density of .15 and .35."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import long_context

    decoder = long_context.Decoder(length)
    for name in ("copy", "needle", "needle_unpinned"):
        task = long_context.make_task(name, decoder, length, 0)
        full = decoder.accuracy(task, long_context.dense)
        assert full >= 0.95
        for density, least in ((0.15, 0.95), (0.35, 0.98)):
            sparse = long_context.Sparse(long_context.ours, density, task.text_length)
            assert decoder.accuracy(task, sparse) >= least * full

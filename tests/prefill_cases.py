"""Settings and helpers that the tests of the transformers integration share."""

import pytest
import torch

import psa

SMALL = {"block_m": 16, "block_n": 16}
EXACT = psa.PSAConfig(**SMALL, mask_mode="topk", mask_ratios={1: (0.0, 1.0)})
SPARSE = psa.PSAConfig(**SMALL, density=0.4, mask_mode="proportional")
AUTO = psa.PSAConfig(**SMALL, density=0.4)
TOPK = psa.PSAConfig(**SMALL, mask_ratios={1: (0.0, 0.3), 2: (0.3, 0.5), 4: (0.5, 0.8), 0: (0.8, 1.0)})


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 140, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(**inputs).logits


def watched(model, **inputs) -> tuple[torch.Tensor, list[psa.Plan]]:
    """Logits, and the plan of every sparse call."""
    plans = []
    original = psa.functional.psa_attention

    def watch(*args, **kwargs):
        out, plan = original(*args, **kwargs)
        plans.append(plan)
        return out, plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psa.integrations.prefill.psa_attention", watch)
        return logits(model, **inputs), plans

"""What every backend receives beside q, k and v."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The plan's tensors in the order in which q, k and v arrive (after reordering).

    Attributes:
        levels: uint8 [B|1, H|1, M, N]; 0 skips, h > 0 reads means over h tokens.
        query_power: float32 [B|1, H, D], the mean of q_d² per head; switches the variance bias on.
        bias_cap: float32 [B|1, H|1], its upper bound in nats.
        pair_bias: float16 [B|1, H|1, M, N], added to every pooled row (level > 1) of a block pair.
        key_mask: bool [B, Lk], True for real tokens.
    """

    levels: Tensor
    block_m: int
    block_n: int
    scale: float
    is_causal: bool
    query_power: Tensor | None = None
    bias_cap: Tensor | None = None
    pair_bias: Tensor | None = None
    key_mask: Tensor | None = None

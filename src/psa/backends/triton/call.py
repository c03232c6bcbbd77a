"""One attention call as the kernels take it: the pyramid, the lists, and the arguments that all kernels share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import MAX_LEVEL
from ..base import Selection
from .autotune import Run, tuned
from .bias import bias_from_power
from .pool import Pyramid, build_pyramid
from .schedule import build_schedule
from .tune import launch_for, padded


@dataclass(frozen=True)
class Call:
    """What a call's kernels read beside q; ``blocks`` and ``ends`` as :func:`psa.schedule.build_schedule` has them."""

    q: Tensor
    selection: Selection
    pyramid: Pyramid
    blocks: Tensor
    ends: Tensor

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.pyramid.keys.shape[1]

    @property
    def length_k(self) -> int:
        return self.pyramid.length

    def tensors(self) -> tuple[Tensor | None, ...]:
        """``keys, values, bias, blocks, ends, pair``."""
        pair = self.selection.pair_bias
        pair = None if pair is None else pair.contiguous()
        return self.pyramid.keys, self.pyramid.values, self.pyramid.bias, self.blocks, self.ends, pair

    def strides(self) -> tuple[tuple[int, int], ...]:
        """Batch and head strides of the lists (in lines), the row bias and the pair bias; 0 where one serves all."""
        pair = self.selection.pair_bias
        lines = broadcast_strides(self.blocks, self.blocks.shape[-1])
        return lines, broadcast_strides(self.pyramid.bias), (0, 0) if pair is None else broadcast_strides(pair)

    def sizes(self) -> tuple[int | float, ...]:
        """``heads, length_q, length_k, blocks, rows, scale_log2``."""
        heads, length_q = self.q.shape[1:3]
        rows = self.pyramid.keys.shape[2]
        return heads, length_q, self.length_k, self.blocks.shape[-1], rows, self.selection.scale * math.log2(math.e)

    def constants(self) -> dict[str, object]:
        """The constexpr arguments."""
        selection, dim = self.selection, self.q.shape[-1]
        return {
            "GROUP": self.group,
            "D": dim,
            "D_PAD": padded(dim),
            "block_m": selection.block_m,
            "block_n": selection.block_n,
            "LOG2_BLOCK": selection.block_n.bit_length() - 1,
            "LEVELS": min(selection.block_n, MAX_LEVEL).bit_length(),
            "CAUSAL": selection.is_causal,
            "HAS_MASK": selection.key_mask is not None,
            "ROW_BIAS": bool(
                selection.key_mask is not None or selection.query_power is not None or self.length_k % selection.block_n
            ),
            "PAIR_BIAS": selection.pair_bias is not None,
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        }

    def run(self, kernel: str, run: Run) -> None:
        """Runs a kernel with the launch that suits this call."""
        constants = self.constants()
        default = launch_for(kernel, self.q, self.length_k, self.selection.block_m, constants)
        run(tuned(kernel, self.q, constants, default, run))


def broadcast_strides(x: Tensor, unit: int = 1) -> tuple[int, int]:
    """Batch and head strides of a contiguous [1|B, 1|H, ...], in ``unit`` elements: 0 where one entry serves all."""
    per_head = math.prod(x.shape[2:]) // unit
    return (0 if x.shape[0] == 1 else x.shape[1] * per_head, 0 if x.shape[1] == 1 else per_head)


def prepare(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Call:
    """Pools K and V and lists each query block's KV blocks: two launches, three with the variance bias."""
    pyramid = build_pyramid(k, v, selection.block_n, key_mask=selection.key_mask)
    if selection.query_power is not None:
        power, cap = selection.query_power, selection.bias_cap
        cap = power.new_full((1, 1), float("inf")) if cap is None else cap
        pyramid = bias_from_power(pyramid, selection.block_n, power, cap, q.shape[1], selection.scale).run()
    levels = min(selection.block_n, MAX_LEVEL).bit_length()
    return Call(q, selection, pyramid, *build_schedule(selection.levels, levels))

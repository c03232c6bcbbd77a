"""The model while it learns: transformer and text encoder with their loss, on short texts and on part of a clip."""

import math
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 24  # the longest caption has 18 with its end


class PaddedText:
    """Cross-attention as with a text padded by zeros to any length, at the cost of a short one.

    A pipeline pads every text, by default to 512 rows, and equal rows weigh as one row whose logit grows by the
    logarithm of their number; ``bias`` ``[batch, 1, 1, WORDS]`` holds that.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        self.bias: Tensor | None = None

    def __call__(self, attn: Any, hidden: Tensor, text: Tensor, mask: Any = None, rotary: Any = None) -> Tensor:
        return self.inner(attn, hidden, text, self.bias, rotary)


class PickedTimes(nn.Module):
    """Rotary positions for latent frames picked out of a longer clip: those at ``times``, or 0, 1, 2… without."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.times: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        if self.times is None:
            return self.inner(hidden)
        last, (height, width) = int(self.times[-1]), hidden.shape[3:]
        whole = self.inner(hidden.new_empty(1, 1, last + 1, height, width, device="meta"))
        return tuple(part.unflatten(1, (last + 1, -1))[:, self.times].flatten(1, 2) for part in whole)


class Student(nn.Module):
    """Transformer and text encoder with the flow-matching loss."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.readers = [PaddedText(block.attn2.processor) for block in transformer.blocks]  # type: ignore[attr-defined]
        for block, reader in zip(transformer.blocks, self.readers, strict=True):  # type: ignore[arg-type]
            block.attn2.processor = reader
        self.transformer.rope = self.rope = PickedTimes(transformer.rope)  # type: ignore[arg-type]

    def forward(self, noisy: Tensor, noise_level: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Velocity ``[batch, 16, frames, height, width]`` at ``noise_level`` in 0…1; ``ids`` ``[batch, WORDS]`` are
        read as if a pipeline had padded them to ``rows``."""
        real = ids != 0
        text = self.text_encoder(ids, real).last_hidden_state * real[:, :, None]
        weight = (rows - real.sum(1)) / (WORDS - real.sum(1))
        bias = torch.where(real, 0.0, weight.log()[:, None])[:, None, None]
        for reader in self.readers:
            reader.bias = bias
        return self.transformer(noisy, noise_level * 1000, text, return_dict=False)[0]

    def loss(
        self, clean: Tensor, ids: Tensor, shift: float, generator: torch.Generator, share: slice = slice(None)
    ) -> Tensor:
        """Mean squared error of the velocity, over a share of the batch, at noise levels drawn logit-normal, one from
        each of as many equally likely ranges as there are clips, then shifted."""
        batch = len(clean)
        place = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        level = torch.sigmoid(1.2 * torch.special.ndtri(place.clamp(1e-6, 1 - 1e-6)))
        level = shift * level / (1 + (shift - 1) * level)
        noise = torch.randn(clean.shape, generator=generator)
        part = level[:, None, None, None, None]
        rows = torch.exp(torch.empty(batch).uniform_(math.log(WORDS + 8), math.log(512), generator=generator))
        clean, noise, part, level, ids, rows = (x[share] for x in (clean, noise, part, level, ids, rows))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self(clean + part * (noise - clean), level, ids, rows)
        return (velocity.float() - (noise - clean)).square().mean()

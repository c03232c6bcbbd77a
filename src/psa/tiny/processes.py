"""Training by several processes, as ``torchrun`` starts them: each takes its share of every batch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """This process's number among all that train together; one alone is the first of one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Processes":
        """Those that torchrun's environment tells of, connected."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """What this process takes of a batch.

        Raises:
            ConfigError: where shares would not be equal, which their gradients' mean takes for granted.
        """
        if batch % self.count:
            raise ConfigError(f"{self.count} processes cannot share a batch of {batch} clips equally")
        size = batch // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces every tensor by its mean over the processes."""
        if self.count > 1:
            whole = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(whole)
            for tensor, mean in zip(tensors, (whole / self.count).split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def first_then_others(self, make: Callable[[], Made]) -> Made:
        """``make()`` on the first process, which writes files, then on the others, which find them."""
        made = make() if self.is_first else None
        if self.count > 1:
            dist.barrier()
        return make() if made is None else made

"""Counts what a GPU would be asked for: kernels of ours, and torch operators that are more than views."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount", "item")
"""What waits for the device, because its value or its shape is known only there."""
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Watch(TorchDispatchMode):
    """Records operators, and raises where the host would wait for the device. Off inside of kernels: the interpreter
    itself copies and waits.

    Attributes:
        kernels: names of our kernels, in order.
        operators: names of torch operators that launch something; views and allocations do not.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.operators, self.active = [], [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if self.active:
            assert name not in WAITS, f"{name} waits for the device"
            assert not (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])), "mask"
            if not is_view(function) and name not in ALLOCATIONS:
                self.operators.append(name)
        return function(*args, **(kwargs or {}))

    @property
    def launches(self):
        return self.kernels + self.operators


def is_view(function) -> bool:
    """Whether every result shares an argument's memory, which is not written to."""
    results = function._schema.returns
    return bool(results) and all(x.alias_info is not None and not x.alias_info.is_write for x in results)


@contextmanager
def watched(monkeypatch):
    """A :class:`Watch` over the body. Memory is not poisoned in it, which would count as work."""
    watch, launch = Watch(), GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        watch.kernels.append(executor.fn.__name__)
        watch.active = False
        launch(executor, *args, **kwargs)
        watch.active = True

    poisoned = torch.are_deterministic_algorithms_enabled()
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        torch.use_deterministic_algorithms(False)
        try:
            with watch:
                yield watch
        finally:
            torch.use_deterministic_algorithms(poisoned, warn_only=True)

"""What is attached to an enabled model: a processor for each self-attention layer, and a hook that reads each call."""

import re
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PSAError
from .layout import TIMESTEPS
from .processors import is_open, route
from .session import SESSIONS, Session

NOT_SELF = re.compile(r"(^|\.)(attn2|.*cross.*|.*audio.*|.*text.*|.*context.*|.*refiner.*|.*pose.*)(\.|$)")
"""Attention modules that are not the self-attention of the video: matched against their qualified names."""


def unwrap(model: Any) -> Any:
    """The module inside a torch.compile wrapper."""
    return getattr(model, "_orig_mod", model)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The self-attention modules in the model's block lists, in order; their place is their layer index."""
    for top, blocks in model.named_children():
        if isinstance(blocks, nn.ModuleList):
            for name, module in blocks.named_modules(prefix=top):
                if (
                    hasattr(module, "processor")
                    and not getattr(module, "is_cross_attention", False)
                    and not NOT_SELF.search(name)
                ):
                    yield name, module


def attach(model: nn.Module, session: Session, stacked: bool = False) -> None:
    """Routes every layer whose processor is not routed (``fuse_qkv_projections`` brings new ones); stacked: all."""
    session.model = weakref.ref(model)
    for index, (_, attn) in enumerate(layers(model)):
        if stacked or not is_open(attn.processor):
            attn.processor = route(attn.processor, session, index)


class ReadCall:
    """Forward pre-hook of an enabled model."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(module, args, kwargs)
        if not self.session.closed:
            model = unwrap(module)
            attach(model, self.session)
            self.session.begin_call(model, args, kwargs)
        return None

    def _traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inside a compiled graph an operator reads the call; its result stands in for the timestep, to keep it."""
        call = {**dict(zip(self.session.arguments, args, strict=False)), **kwargs}
        tensors = [call.get(name) for name in ("hidden_states", "encoder_hidden_states", "img_ids")]
        tensors = [value if isinstance(value, Tensor) else None for value in tensors]
        sizes = [call.get(name) for name in ("num_frames", "height", "width")]
        shapes = call.get("img_shapes")
        if shapes:
            sizes = list(shapes[0][0] if isinstance(shapes[0], (list, tuple)) and len(shapes[0]) == 1 else shapes[0])
        sizes = sizes if all(isinstance(size, int) for size in sizes) else None
        name = next(name for name in TIMESTEPS if call.get(name) is not None)
        timestep = torch.ops.psa.begin(call[name], *tensors, sizes, self.session.id)
        if name in kwargs:
            return args, {**kwargs, name: timestep}
        place = self.session.arguments.index(name)
        return (*args[:place], timestep, *args[place + 1 :]), kwargs


@torch.library.custom_op("psa::begin", mutates_args=())
def _begin(
    timestep: Tensor, hidden_states: Tensor | None, encoder_hidden_states: Tensor | None, img_ids: Tensor | None,
    sizes: Sequence[int] | None, session: int,
) -> Tensor:  # fmt: skip
    """Reads the step and the layout of one call of a compiled model."""
    current = SESSIONS[session]
    model = current.model() if current.model is not None else None
    if model is None:
        raise PSAError("a copy of an enabled model has to be called once before it is compiled")
    call: dict[str, Any] = {
        "timestep": timestep, "hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states,
        "img_ids": img_ids, **dict(zip(("num_frames", "height", "width"), sizes or (), strict=False)),
    }  # fmt: skip
    current.begin_call(model, (), {name: value for name, value in call.items() if value is not None})
    return timestep.clone()


@_begin.register_fake
def _(timestep, hidden_states, encoder_hidden_states, img_ids, sizes, session):
    return torch.empty_like(timestep)

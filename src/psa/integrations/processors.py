"""A layer's own processor, run with PSA for its attention call.

Processors that diffusers dispatches get a backend registered there. Those that name no backend, or call
``F.scaled_dot_product_attention`` themselves (CogVideoX, Mochi, Allegro), run with that one name bound to PSA.
"""

import functools
import importlib.metadata
import inspect
import threading
import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor

from ..errors import PSAError
from .session import SESSIONS, Session

_active = threading.local()
"""``.processor``: the routed processor whose call is in progress in this thread."""


def route(previous: Any, session: Session, layer: int) -> Any:
    """A processor like ``previous`` whose attention call is served by ``session``."""
    stock = previous
    while is_routed(stock):
        stock = stock.psa_previous
    state = {**stock.__dict__, "_parallel_config": getattr(previous, "_parallel_config", None)}
    if is_routed(previous):
        state["_attention_backend"] = previous.psa_dense
    return _rebuild(type(stock), state, session, layer, previous)


def _rebuild(base: type, state: dict[str, Any], session: Session, layer: int, previous: Any) -> Any:
    cls = _routed_class(base)
    processor: Any = object.__new__(cls)
    own = getattr(processor, "__dict__", {})
    own.update({name: value for name, value in state.items() if name != "_attention_backend"})
    processor.psa_dense = state.get("_attention_backend", state.get("psa_dense"))
    processor.psa_session, processor.psa_layer, processor.psa_previous = session, layer, previous
    processor.psa_tag = torch.tensor([session.id, layer], device="cpu")
    session.processors[layer] = weakref.ref(processor)
    return processor


@functools.cache
def _routed_class(base: type) -> type:
    """A subclass of a stock processor, whose ``isinstance`` and call signature stay those of the stock one."""
    call = base.__call__
    if not hasattr(base, "_attention_backend"):
        call = _bind(base)
    member = psa_backend()

    # diffusers drops arguments that the signature of a processor's __call__ does not name: wraps() keeps it.
    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(_active, "processor", None)
        _active.processor = self
        try:
            return call(self, *args, **kwargs)
        finally:
            _active.processor = before

    def __reduce__(self: Any) -> Any:
        state = {
            name: value for name, value in self.__dict__.items() if not name.startswith("psa_") or name == "psa_dense"
        }
        return _rebuild, (base, state, self.psa_session, self.psa_layer, self.psa_previous)

    def set_dense(self: Any, value: Any) -> None:
        self.psa_dense = value

    members = {
        "__call__": __call__,
        "__reduce__": __reduce__,
        "__module__": __name__,
        "psa_routed": True,
        # set_attention_backend() on an enabled model chooses what dense calls use.
        "_attention_backend": property(lambda self: member, set_dense),
        "_parallel_config": None,
    }
    return type(f"PSA{base.__name__}", (base,), members)


def _bind(base: type) -> Any:
    """The stock ``__call__``, with the attention function that it calls by name bound to PSA."""
    call = inspect.unwrap(base.__call__)
    code, known = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    names = {}
    if code is not None and "dispatch_attention_fn" in code.co_names:
        names["dispatch_attention_fn"] = _backend
    elif code is not None and "scaled_dot_product_attention" in code.co_names and known.get("F") is F:
        names["F"] = types.SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": _sdpa})
    else:
        raise PSAError(
            f"enable: {base.__name__} neither goes through diffusers' attention dispatcher nor calls "
            "F.scaled_dot_product_attention itself; PSA cannot serve it"
        )
    # Without __name__, torch.compile looks names up in this scope instead of in the module that it copies.
    scope = {name: value for name, value in {**known, **names}.items() if name != "__name__"}
    bound = types.FunctionType(code, scope, call.__name__, call.__defaults__, call.__closure__)
    bound.__kwdefaults__ = call.__kwdefaults__
    return bound


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
          is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Stands in for ``F.scaled_dot_product_attention`` inside a bound processor; [B, H, L, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    config = getattr(_active.processor, "_parallel_config", None)
    return _backend(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, config).transpose(1, 2)


def _backend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
             is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
             _parallel_config: Any = None) -> Tensor:  # fmt: skip
    """The attention backend ``"psa"`` of diffusers' dispatcher; [B, L, H, D]."""
    processor = getattr(_active, "processor", None)
    if processor is None:
        raise PSAError("the attention backend 'psa' works on models that psa.enable() was called on; use that instead")
    if query.shape[1] != key.shape[1] or is_causal or dropout_p:
        return _dense(
            processor, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config
        )
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if torch.compiler.is_compiling() and _parallel_config is None and not learning:
        return torch.ops.psa.layer(query, key, value, attn_mask, scale, processor.psa_tag)
    return _serve(processor, query, key, value, attn_mask, scale, enable_gqa, _parallel_config)


@torch.compiler.disable()  # where a compiled model is trained, the graph breaks here
def _serve(processor: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None,
           enable_gqa: bool, config: Any) -> Tensor:  # fmt: skip
    def dense() -> Tensor:
        return _dense(processor, query, key, value, attn_mask, 0.0, False, scale, enable_gqa, config)

    context = getattr(config, "context_parallel_config", None)
    exact_ring = processor.psa_dense in (None, attention_dispatch.AttentionBackendName.NATIVE)
    return processor.psa_session.attend(
        processor.psa_layer, query, key, value, attn_mask, scale, dense, context, exact_ring
    )


def _dense(processor: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
           is_causal: bool, scale: float | None, enable_gqa: bool, config: Any) -> Tensor:  # fmt: skip
    """The pipeline's own attention: the backend that the layer had, or diffusers' active one."""
    return attention_dispatch.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        backend=processor.psa_dense, parallel_config=config,
    )  # fmt: skip


@torch.library.custom_op("psa::layer", mutates_args=())
def _layer(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None, tag: Tensor
) -> Tensor:
    """One attention call of an enabled model inside a compiled graph; tag = [session, layer]; layers share it."""
    number, index = tag.tolist()
    session = SESSIONS[number]
    processor = session.processors[index]()
    return _serve(processor, query, key, value, attn_mask, scale, query.shape[2] != key.shape[2], None).contiguous()


@_layer.register_fake
def _(query, key, value, attn_mask, scale, tag):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1)
def psa_backend() -> Any:
    """The member ``psa`` of diffusers' AttentionBackendName, registered on first use.

    diffusers offers no public way to add a backend, so its enum gets a member here.
    """
    names: Any = attention_dispatch.AttentionBackendName
    registry: Any = attention_dispatch._AttentionBackendRegistry
    try:
        member = str.__new__(names, "psa")
        member._name_, member._value_ = "PSA", "psa"
        names._member_map_["PSA"] = names._value2member_map_["psa"] = member
        names._member_names_.append("PSA")
        registry.register(member, supports_context_parallel=True)(_backend)
    except (AttributeError, TypeError) as error:
        version = importlib.metadata.version("diffusers")
        raise PSAError(f"diffusers {version} changed its attention registry, which psa extends ({error})") from error
    return member


def is_routed(processor: Any) -> bool:
    return getattr(type(processor), "psa_routed", False)


def is_open(processor: Any) -> bool:
    return is_routed(processor) and not processor.psa_session.closed

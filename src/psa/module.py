"""`PSAAttention`: the function as a module that holds its configuration and what is carried from call to call."""

from typing import Any

from torch import Tensor, nn

from .config import PSAConfig
from .functional import make_plan, psa_attention, resolve_config
from .reorder import SemanticState
from .state import ProbeState

PLANNING = ("density", "target_error", "grid", "text_length", "text_position", "key_mask")


class PSAAttention(nn.Module):
    """Holds a :class:`PSAConfig`; called like :func:`psa.psa_attention`, with the same arguments and results.

    In the automatic mode, ``step=`` (and ``layer=``, where one module serves several) let a call reuse what an earlier
    step chose; without ``step`` every call probes. The choices, and the orders by content that go with them, are in
    ``probe_state``; each layer's clustering starts where its last one ended, in ``reorder_states`` by its name.

    Args:
        config: settings of every call; default as in :func:`psa.psa_attention`.
        **settings: changes to the config, e.g. ``PSAAttention(density=0.15)``.
    """

    def __init__(self, config: PSAConfig | None = None, **settings: Any) -> None:
        super().__init__()
        base = PSAConfig() if config is None else config
        self.config = base.replace(**settings) if settings else base
        self.reorder_states: dict[str, SemanticState] = {}
        self.probe_state = ProbeState()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        layer, step, plan = call.pop("layer", 0), call.pop("step", None), call.pop("plan", None)
        if plan is not None:
            return psa_attention(q, k, v, plan=plan, **call)
        given = call.pop("config", None)
        config = resolve_config(self.config if given is None else given, None)
        carries = config.rearrange_method in ("semantic", "hybrid", "auto")
        if not carries and step is None:
            return psa_attention(q, k, v, config=config, **call)
        planning = {name: call.pop(name) for name in PLANNING if name in call}
        shared = {name: call[name] for name in ("is_causal", "scale", "enable_gqa") if name in call}
        where = {"layer": layer, "step": step, "probes": self.probe_state, "state": self.reorder_states.get(str(layer))}
        plan = make_plan(q, k, config, v=v, **planning, **shared, **where)
        if plan.reorder_state is not None:
            self.reorder_states[str(layer)] = plan.reorder_state
        return psa_attention(q, k, v, plan=plan, **call)

    def extra_repr(self) -> str:
        c = self.config
        names = ("density", "target_error", "tau", "mask_ratios")
        amount = next(f"{name}={getattr(c, name)}" for name in names if getattr(c, name) is not None)
        return f"{c.mask_mode}, {amount}, blocks {c.block_m}×{c.block_n}"

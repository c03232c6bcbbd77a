"""The rule by which operators serve ``torch.func.vmap``."""

from torch import Tensor


def _fold(info, dims, args):
    """Moves each mapped dimension into the batch dimension; what is not mapped is repeated for every item."""
    folded = []
    for arg, dim in zip(args, dims, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
        folded.append(arg)
    return folded


def _spread(tensor, batch):
    """[V, 1|B, ...] -> [V * B, ...]."""
    return tensor.expand(tensor.shape[0], batch, *tensor.shape[2:]).flatten(0, 1)


def batched(op, first_tensors):
    """The rule of an operator for ``torch.func.vmap``: the mapped dimension joins the batch."""

    def rule(info, dims, *args):
        args = _fold(info, dims, args)
        batch = args[first_tensors].shape[1]
        flat = [_spread(arg, batch) if isinstance(arg, Tensor) else arg for arg in args]
        outs = op(*flat)
        if isinstance(outs, Tensor):
            return outs.unflatten(0, (info.batch_size, batch)), 0
        outs = tuple(o.unflatten(0, (info.batch_size, batch)) if o.numel() else o for o in outs)
        return outs, tuple(0 if o.numel() else None for o in outs)

    return rule

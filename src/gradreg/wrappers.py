"""What a model is wrapped in or was turned into, as far as that matters to a second derivative."""

import weakref
from typing import Any

from torch import distributed, fx, nn
from torch._ops import OpOverload
from torch.nn.parallel import DistributedDataParallel


def in_process_group() -> bool:
    """Whether ``torch.distributed`` runs, with one process or several."""
    return distributed.is_available() and distributed.is_initialized()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made this module, or compiles its calls."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def is_exported(module: nn.Module) -> bool:
    """Whether this is a graph of torch.export, whose operations are those below the modules."""
    return isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, OpOverload) for node in module.graph.nodes
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a layer of torch's quantisation, whose weights are integers.

    A layer that trains for it (``torch.ao.nn.qat``) has floating-point weights, and ``FloatFunctional`` has none.
    """
    return not _is_a(module, "FloatFunctional", "FXFloatFunctional") and any(
        base.__module__.startswith("torch.") and "quantized" in base.__module__.split(".")
        for base in type(module).__mro__
    )


def is_static(module: nn.Module) -> bool:
    """Whether this is DDP with ``static_graph=True``, which takes the first backward pass for that of the step."""
    return isinstance(module, DistributedDataParallel) and bool(module.static_graph)


def is_sharded(module: nn.Module) -> bool:
    """Whether this is a unit of FSDP, of either version."""
    return _is_a(module, "FSDPModule", "FullyShardedDataParallel")


def frees_parameters(module: nn.Module) -> bool:
    """Whether a unit of FSDP frees its parameters after a backward pass; version 1 cannot be told not to."""
    if not _is_a(module, "FSDPModule"):
        return True
    return any(getattr(group, "reshard_after_backward", False) for group in _groups(module))


def is_stale(module: nn.Module) -> bool:
    """Whether a unit of FSDP2 still holds the full parameters of before an optimiser's step.

    The optimiser changes the shards; the next forward pass sees it only if they are gathered anew. Each call remembers
    which version of the shards a forward pass that follows would gather.
    """
    gathered, versions = True, []
    for group in _groups(module):
        for parameter in group.fsdp_params:
            gathered &= parameter.sharded_state.name == "UNSHARDED"
            versions.append(parameter.sharded_param._version)
    if gathered and versions:
        return _gathered.setdefault(module, versions) != versions
    _gathered[module] = versions
    return False


_gathered: "weakref.WeakKeyDictionary[nn.Module, list[int]]" = weakref.WeakKeyDictionary()


def _groups(unit: Any) -> list[Any]:
    """The groups of parameters of an FSDPModule, which are public only for setting."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _is_a(module: nn.Module, *names: str) -> bool:
    """Whether one of a module's classes has this name: those looked for are too heavy, or too new, to be imported."""
    return any(base.__name__ in names for base in type(module).__mro__)

"""Lists what is not smooth in a model: by the types of its modules, or by the operations that a run of it meets."""

import dataclasses
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradreg.checks import check_input, finite_range
from gradreg.copies import alone
from gradreg.modes import random_state, replayed
from gradreg.smooth.calls import hooked
from gradreg.smooth.twins import ABOVE, FUNCTIONS, OPERATIONS, TWINS, Operation, operation_of
from gradreg.wrappers import is_sharded

_UNREADABLE = "Smoothify the model before torch.jit.trace, or look into it by find_nonsmooth(model, x)."
_RECURRENT = 'Make it with nonlinearity="tanh".'
_QUANTIZED = "Smoothify the model before it is prepared for quantisation."
_OUT_OF_REACH = (
    "smoothify does not reach what is compiled by torch.jit, set as a layer's activation in code, or handed to "
    "checkpointing as a function: hand it a module, or put a smooth activation in by hand."
)
TRANSFORMERS = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


@final
@dataclass(frozen=True)
class NonSmooth:
    """Something in a model that is not twice continuously differentiable in its input.

    Attributes:
        name: The module, as ``named_modules`` calls it; empty for the model itself.
        kind: The class of the module (``"ReLU"``), or the function that it calls (``"F.relu"``).
        reason: What is wrong with it.
        fix: What to do about it.
        flat: Whether its second derivative is zero almost everywhere, so that a gradient penalty cannot act through it:
            ReLU and its like, hard gates, shrinkage. Not so for an ELU or max pooling, which are smooth in between,
            for clamping, which may limit anything, nor for rounding, which has no gradient at all.
        calls: How often a run on x met it; None without x.
        share: The part of the numbers that it changed in that run, which is 0 for a guard that was not needed; None
            without x, and for what does not act on each number.
    """

    name: str
    kind: str
    reason: str
    fix: str
    flat: bool
    calls: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        times = "" if self.calls is None else f" ({self.calls} call{'s' if self.calls > 1 else ''}"
        times += "" if not times else ")" if self.share is None else f", {self.share:.0%} of its numbers changed)"
        return f"{self.name or '(model)'}: {self.kind}: {self.reason}{times}"


def find_nonsmooth(model: nn.Module, x: Tensor | None = None) -> tuple[NonSmooth, ...]:
    """List what in a model is not twice continuously differentiable in its input.

    **Without x** it looks at the types of the modules and runs nothing: activations and max pooling of torch, the hard
    gates of timm, ReLUs in recurrent and transformer layers and in layers prepared for quantisation. It sees no call of
    a function (``F.relu``).

    **With x** a copy of the model runs once, in the modes that it is in, and what counts are the operations below
    autograd: functional calls, code compiled by ``torch.jit`` and operators are seen as well, under the innermost
    module that ran them. What does not depend on x, such as a ReLU on a table of positions, is left out. A guard
    (``clamp(min=1e-6)``) that changed nothing has a :attr:`NonSmooth.share` of 0. Comparisons of numbers that depend on
    x are listed, as masks and branches are made of them.

    It sees what this x meets, and no other branch. It judges by the name of an operation: one that is not in its table,
    such as a kernel of another library, is taken for smooth.

    Args:
        model: The model; it is not changed.
        x: A small batch of inputs, of shape ``(B, ...)``.

    Returns:
        What was found, in the order of ``model.named_modules()``, or in which it was met. A smooth model gives an empty
        tuple.

    Raises:
        TypeError: If the model is not an ``nn.Module``, or x not a tensor of real numbers.
        ValueError: If x is not a finite batch, or the model is sharded or has no values (meta device).
        RuntimeError: If the model cannot be copied.

    Example:
        >>> for found in find_nonsmooth(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.MaxPool1d(2))):
        ...     print(found.name, found.kind, found.flat)
        1 ReLU True
        2 MaxPool1d False
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return abs(x) / x.norm(dim=1, keepdim=True).clamp(min=1e-6)
        >>> for found in find_nonsmooth(Model(), torch.randn(100, 5)):
        ...     print(found.kind, found.share > 0)
        torch.abs True
        torch.clamp False
    """
    check_module(model, "find_nonsmooth")
    if x is None:
        modules = ((name, module, describe(module)) for name, module in model.named_modules())
        return tuple(_found(name, module, described) for name, module, described in modules if described is not None)
    return tuple(_met(model, x))


def check_module(model: object, caller: str) -> None:
    """Raise a TypeError if the model is not an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected the model to be an nn.Module, got {type(model).__name__}.")


def describe(module: nn.Module) -> Operation | None:
    """What is not smooth about a module, by its type."""
    if isinstance(module, torch.jit.ScriptModule):
        return Operation("compiled by torch.jit: its code cannot be replaced", _UNREADABLE)
    if isinstance(module, nn.RNN | nn.RNNCell) and module.nonlinearity == "relu":
        return Operation(OPERATIONS["relu"].reason, _RECURRENT, flat=True)
    if any("qat" in base.__module__.split(".") and "ReLU" in base.__name__ for base in type(module).__mro__):
        return Operation(OPERATIONS["relu"].reason, _QUANTIZED, flat=True)
    if isinstance(module, TRANSFORMERS):
        return OPERATIONS.get(function_of(module))
    return OPERATIONS.get(operation_of_module(module))


def operation_of_module(module: nn.Module) -> str:
    """The operation that a module computes; empty if it is none of the table, or has a forward of its own."""
    return "" if "forward" in vars(module) else operation_of(type(module)) or ""


def function_of(layer: nn.Module) -> str:
    """The operation that a transformer layer holds as a function; empty if it is none that has a twin."""
    activation = vars(layer).get("activation")
    return "" if activation is None else FUNCTIONS.get(activation, "")


def _found(name: str, module: nn.Module, described: Operation) -> NonSmooth:
    kind = f"F.{function_of(module)}" if isinstance(module, TRANSFORMERS) else type(module).__name__
    return NonSmooth(name, kind, described.reason, described.fix, described.flat)


def _met(model: nn.Module, x: Tensor) -> list[NonSmooth]:
    """What a run on x meets."""
    check_input(x)
    if any(tensor.is_meta for tensor in (x, *model.parameters(), *model.buffers())):
        raise ValueError(
            "find_nonsmooth: on the meta device there is nothing to run. Give the model and x values first, or leave x "
            "out."
        )
    finite_range(x)
    if any(map(is_sharded, model.modules())):
        raise ValueError("find_nonsmooth: a sharded model cannot be copied: call it before fully_shard.")
    try:
        with torch.inference_mode(False):
            net = alone(model, precise=False).requires_grad_(False)
    except Exception as error:
        raise RuntimeError(
            f"find_nonsmooth: {type(model).__name__} cannot be copied ({error}). Leave x out to look at the types of "
            "its modules alone."
        ) from error
    watch = _Watch(net)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        with replayed(random_state(x.device), x.device), watch:
            net(leaf.clone())  # which a model may write to
    return list(watch.found.values())


@final
class _Watch(TorchDispatchMode):
    """Sees the operations of a forward pass, and which module runs them. What depends on x requires a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], NonSmooth] = {}
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                module.register_forward_pre_hook(self._entered(name), prepend=True)
                module.register_forward_hook(self._left, always_call=True)

    def _entered(self, name: str) -> Any:
        return lambda module, _: self._running.append((name, module))

    def _left(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        name = name.removesuffix("_")
        name = "floor_divide" if (kwargs or {}).get("rounding_mode") is not None else name
        operation = ABOVE.get(name, name) if space == "aten" else ""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if operation not in OPERATIONS or not any(leaf.requires_grad for leaf in tensors):
            return func(*args, **(kwargs or {}))
        before = tensors[0].clone()
        result = func(*args, **(kwargs or {}))
        alike = isinstance(result, Tensor) and result.shape == before.shape and result.is_floating_point()
        self._note(operation, (result != before).double().mean().item() if alike else None)
        return result

    def _note(self, operation: str, share: float | None) -> None:
        name, module = self._running[-1]
        if (described := describe(module)) is not None:
            seen = _found(name, module, described)
        else:
            described = OPERATIONS[operation]
            reached = any(hooked(outer) for _, outer in self._running)
            fix = _OUT_OF_REACH if operation in TWINS and reached else described.fix
            kind = f"F.{operation}" if hasattr(F, operation) else f"torch.{operation}"
            seen = NonSmooth(name, kind, described.reason, fix, described.flat)
        before = self.found.get((name, seen.kind), seen)
        calls = before.calls or 0
        if share is not None:
            share = (calls * (before.share or 0.0) + share) / (calls + 1)
        self.found[name, seen.kind] = dataclasses.replace(seen, calls=calls + 1, share=share)

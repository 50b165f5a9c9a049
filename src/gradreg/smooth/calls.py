"""Makes calls of non-smooth functions smooth, in the forward of a module whose code stays as it is.

A function mode exchanges ``F.relu`` and its like while a method runs. A trace of the model would do so once and for
all, but freeze ``self.training``, data-dependent branches and the class of the model with it. The mode is entered by
the methods of a derived class and not by a function set on the instance: a method finds the parameters of the copy
that it is called on, and a class can be derived again when a pickle is loaded.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, ClassVar, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, get_testing_overrides

from gradreg.smooth.activations import FUNCTIONS, IN_PLACE, OPERATIONS, twin

_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters)
    for function, operation in FUNCTIONS.items()
    if OPERATIONS[operation].replaceable and isinstance(function, FunctionType)
}
# torch.compile hands only the functions of this list to function modes, and computes others as they are.
UNTRACED = frozenset(FUNCTIONS) - frozenset(get_testing_overrides())


@final
class SmoothCalls(TorchFunctionMode):
    """While it is entered, calls of replaceable functions and tensor methods compute their smooth twin.

    Args:
        act: The activation for what has no twin of its own. It has no parameters, since it is no part of the model.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self._act = act

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operation = FUNCTIONS.get(func, "")
        if not operation or not OPERATIONS[operation].replaceable:
            return func(*args, **kwargs)
        names = _PARAMETERS.get(func, ("input", "min_val", "max_val"))

        def argument(name: str, default: Any) -> Any:
            index = names.index(name) if name in names else len(args)
            return args[index] if index < len(args) else kwargs.get(name, default)

        x, limits = argument("input", None), (argument("min_val", -1.0), argument("max_val", 1.0))
        # Not the module but its forward: torch.fx refuses to trace a module that is not registered in the model.
        smooth = twin(operation, lambda: self._act, *limits).forward
        if func in IN_PLACE or argument("inplace", False):
            # The twin keeps its input for the backward pass, so it must not be the tensor that is overwritten.
            return x.copy_(smooth(x.clone()))
        return smooth(x)


Derivation = tuple[type[nn.Module], frozenset[str], bool]


class Derived:
    """Mixed in front of a module's own class by :func:`derive`; makes the resulting class picklable."""

    derivation: ClassVar[Derivation]
    _smooth_act: nn.Module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and this one has none: it is derived again.
        return _new_derived, self.derivation, *super().__reduce_ex__(max(protocol, 2))[2:]


_DERIVED: dict[Derivation, type[nn.Module]] = {}


def derive(base: type[nn.Module], methods: frozenset[str], uncompiled: bool) -> type[nn.Module]:
    """A subclass of a module class, of the same name, whose methods of these names run under :class:`SmoothCalls`.

    Args:
        base: The class.
        methods: The names.
        uncompiled: Keep ``torch.compile`` out of the methods, which mention a function of ``UNTRACED``.
    """
    key = base, methods, uncompiled
    if key not in _DERIVED:
        namespace: dict[str, Any] = {name: _under_mode(getattr(base, name), uncompiled) for name in methods}
        namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        metaclass: Callable[..., type[nn.Module]] = type(base)
        _DERIVED[key] = metaclass(base.__name__, (Derived, base), namespace | {"derivation": key})
    return _DERIVED[key]


def _new_derived(base: type[nn.Module], methods: frozenset[str], uncompiled: bool) -> nn.Module:
    kind = derive(base, methods, uncompiled)
    return kind.__new__(kind)


def _under_mode(method: Callable[..., Any], uncompiled: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with SmoothCalls(self._smooth_act):
            return method(self, *args, **kwargs)

    return torch.compiler.disable(wrapped) if uncompiled else wrapped


def make_smooth(module: nn.Module, methods: frozenset[str], uncompiled: bool, act: nn.Module) -> None:
    """Let calls of non-smooth functions in these methods of a module compute their twin, or ``act``."""
    vars(module)["_smooth_act"] = act  # not registered: children() and the state_dict stay the same
    module.__class__ = derive(type(module), methods, uncompiled)


def make_as_before(module: nn.Module) -> None:
    """Undo :func:`make_smooth`, where it was done."""
    if isinstance(module, Derived):
        del vars(module)["_smooth_act"]
        module.__class__ = module.derivation[0]  # type: ignore[assignment]  # of the class without Derived

"""Makes calls of non-smooth functions smooth, in the forward of a module whose code stays as it is.

A function mode exchanges ``F.relu`` and its like while a method runs. A trace of the model would do so once and for
all, but freeze ``self.training``, data-dependent branches and the class of the model with it. The mode is entered by
the methods of a derived class and not by a function set on the instance: a method finds the parameters of the copy
that it is called on, and a class can be derived again when a pickle is loaded.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, get_testing_overrides

from gradreg.smooth.activations import FUNCTIONS, IN_PLACE, OPERATIONS, twin

_REPLACEABLE = {function: name for function, name in FUNCTIONS.items() if OPERATIONS[name].replaceable}
_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters)
    for function in _REPLACEABLE
    if isinstance(function, FunctionType)
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
        if func not in _REPLACEABLE:
            return func(*args, **kwargs)
        names = _PARAMETERS.get(func, ("input", "min_val", "max_val"))

        def argument(name: str, default: Any) -> Any:
            index = names.index(name) if name in names else len(args)
            return args[index] if index < len(args) else kwargs.get(name, default)

        x, limits = argument("input", None), (argument("min_val", -1.0), argument("max_val", 1.0))
        # Not the module but its forward: torch.fx refuses to trace a module that is not registered in the model.
        smooth = twin(_REPLACEABLE[func], lambda: self._act, *limits).forward
        if func in IN_PLACE or argument("inplace", False):
            # The twin keeps its input for the backward pass, so it must not be the tensor that is overwritten.
            return x.copy_(smooth(x.clone()))
        return smooth(x)


@final
class PlainCalls(TorchFunctionMode):
    """While it is entered, replaceable functions compute what they say, whatever mode is around it.

    A function that checkpointing runs again in the backward pass is then the same both times, and what the user keeps
    stays as it is below a method that is smooth.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction() if func in _REPLACEABLE else nullcontext():
            return func(*args, **(kwargs or {}))


class Derivation(NamedTuple):
    """How a class was derived.

    Attributes:
        base: From which.
        smooth: The methods that run under :class:`SmoothCalls`.
        plain: The methods that run under :class:`PlainCalls`.
        uncompiled: Whether ``torch.compile`` is kept out of the smooth ones, which mention a function of ``UNTRACED``.
    """

    base: type[nn.Module]
    smooth: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    uncompiled: bool = False


class Derived:
    """Mixed in front of a module's own class by :func:`derive`; makes the resulting class picklable."""

    _gradreg_derivation: ClassVar[Derivation]
    _gradreg_act: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Without super(): a registry of the user's classes is not to learn of this one.
        pass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and this one has none: it is derived again.
        return _new_derived, tuple(self._gradreg_derivation), *super().__reduce_ex__(max(protocol, 2))[2:]


_DERIVED: dict[Derivation, type[nn.Module]] = {}


def derive(derivation: Derivation) -> type[nn.Module]:
    """A subclass of a module class, of the same name, some of whose methods run under a mode."""
    if derivation not in _DERIVED:
        base = derivation.base
        namespace: dict[str, Any] = {
            name: _under(lambda self: SmoothCalls(self._gradreg_act), getattr(base, name), derivation.uncompiled)
            for name in derivation.smooth
        }
        namespace |= {name: _under(lambda self: PlainCalls(), getattr(base, name)) for name in derivation.plain}
        namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        metaclass: Callable[..., type[nn.Module]] = type(base)
        own = {"_gradreg_derivation": derivation}
        _DERIVED[derivation] = metaclass(base.__name__, (Derived, base), namespace | own)
    return _DERIVED[derivation]


def _new_derived(*derivation: Any) -> nn.Module:
    kind = derive(Derivation(*derivation))
    return kind.__new__(kind)


def _under(
    mode: Callable[[Any], TorchFunctionMode], method: Callable[..., Any], uncompiled: bool = False
) -> Callable[..., Any]:
    """A method that runs under the mode that is made for its module."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode(self):
            return method(self, *args, **kwargs)

    return torch.compiler.disable(wrapped) if uncompiled else wrapped


def derivation_of(module: nn.Module) -> Derivation:
    """How the class of a module was derived; from itself if it was not."""
    return module._gradreg_derivation if isinstance(module, Derived) else Derivation(type(module))


def is_smooth(module: nn.Module, method: str) -> bool:
    """Whether calls in a method of a module compute their twins."""
    return method in derivation_of(module).smooth


def has_another_class(module: nn.Module) -> bool:
    """Whether a derived module was given a class that was made of its own."""
    return isinstance(module, Derived) and "_gradreg_derivation" not in vars(type(module))


def put_on(module: nn.Module, kind: type[nn.Module], act: nn.Module | None) -> None:
    """Give a module a derived class, and the activation of its smooth methods."""
    if act is not None:
        vars(module)["_gradreg_act"] = act  # not registered: children() and the state_dict stay the same
    module.__class__ = kind


def take_off(module: nn.Module) -> None:
    """Undo :func:`put_on`, where it was done."""
    base = derivation_of(module).base
    if base is not type(module):
        vars(module).pop("_gradreg_act", None)
        module.__class__ = base

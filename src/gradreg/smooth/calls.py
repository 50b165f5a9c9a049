"""Makes calls of non-smooth functions smooth, in the forward of a module whose code stays as it is.

A function mode exchanges ``F.relu`` and its like while a module runs: one hook enters it, another leaves it. A trace of
the model would exchange them once and for all, but freeze ``self.training`` and data-dependent branches with it.

Every module of the user's own has these hooks, and not the model alone, because checkpointing runs a part of a model
once more in the backward pass, and must find it as it was.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import FrameType, FunctionType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, get_testing_overrides

from gradreg.smooth.twins import ACTIVATIONS, FUNCTIONS, GATES, IN_PLACE, TWINS, Ramp, option_names, options_of

_PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {
    function: tuple(inspect.signature(function).parameters)
    for function in FUNCTIONS
    if isinstance(function, FunctionType)
}
# torch.compile hands only the functions of this list to function modes. Others are not to be compiled.
_HIDDEN = frozenset(FUNCTIONS) - frozenset(get_testing_overrides())
_OF_GATES = ACTIVATIONS["softplus"]()
BUFFER = "smooth_calls_sharpness"  # of a module whose sharpness is annealed


class Calls(TorchFunctionMode):
    """A mode, and the modules that have entered it: every one costs time at every operation, so they share it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.entered = [module]


@final
class SmoothCalls(Calls):
    """While it is entered, calls of functions that have a smooth twin compute that.

    Args:
        module: The module that enters it.
        act: The ramp of sharpness 1. It has no parameters, since it is no part of the model.
        sharpness: Of the twins.
    """

    def __init__(self, module: nn.Module, act: nn.Module, sharpness: float | Tensor) -> None:
        super().__init__(module)
        self.act, self.sharpness = act, sharpness

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS or not _is_called_by_hooked_module():
            return func(*args, **kwargs)
        operation = FUNCTIONS[func]
        names = _PARAMETERS.get(func, ("input", *option_names(operation)))  # functions in C have no signature
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        act = _OF_GATES if operation in GATES else self.act
        options, x = options_of(operation, given), given["input"]

        def twin(z: Tensor) -> Tensor:
            # Not the module but its forward: torch.fx refuses to trace a module that is not registered in the model.
            return TWINS[operation](Ramp(act.forward, self.sharpness), z, **options)

        if func in IN_PLACE or given.get("inplace", False):
            # The twin keeps its input for the backward pass, so it must not be the tensor that is overwritten.
            return x.copy_(twin(x.clone()))
        return twin(x)


@final
class PlainCalls(Calls):
    """While it is entered, functions compute what they say, whatever mode is around it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in FUNCTIONS:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


@final
class Enter:
    """A forward pre-hook that enters a mode: smooth calls, or plain ones without an activation."""

    def __init__(self, act: nn.Module | None, sharpness: float = 1.0) -> None:
        self.act, self.sharpness = act, sharpness

    def __call__(self, module: nn.Module, args: Any) -> None:
        sharpness = module._buffers.get(BUFFER, self.sharpness)
        assert sharpness is not None
        if not torch.compiler.is_compiling():
            while isinstance(above := _get_current_function_mode(), Calls) and not _runs(above.entered[0], module):
                _pop_mode()  # an interrupt from the keyboard calls no hooks: it was left behind
            if isinstance(above, SmoothCalls) and above.act is self.act:
                above.entered.append(module)
                return
        (PlainCalls(module) if self.act is None else SmoothCalls(module, self.act, sharpness)).__enter__()


@final
class Leave:
    """The forward hook that leaves it, also after an exception."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            mode = _get_current_function_mode()
            if not isinstance(mode, Calls) or mode.entered[-1] is not module:  # an earlier hook of its has raised
                return
            mode.entered.pop()
            if mode.entered:
                return
        _pop_mode()


# Where a model itself has hooks, or its graph breaks, these are frames of their own, which are not to be compiled.
with suppress(ImportError):
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    for _method in (Enter.__call__, Leave.__call__, SmoothCalls.__torch_function__, PlainCalls.__torch_function__):
        set_code_exec_strategy(
            inspect.unwrap(_method).__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        )


def hook(module: nn.Module, act: nn.Module | None, sharpness: float = 1.0) -> None:
    """Have a module run under a mode, in the place of one that it ran under before."""
    unhook(module)
    for function in _HIDDEN if act is not None else ():
        torch._dynamo.disallow_in_graph(function)
    module.register_forward_pre_hook(Enter(act, sharpness), prepend=True)  # before any that may raise
    module.register_forward_hook(Leave(), always_call=True)


def unhook(module: nn.Module) -> None:
    """Undo :func:`hook`, where it was done."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in hooks.items() if isinstance(value, (Enter, Leave))]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    module._buffers.pop(BUFFER, None)


def hooked(module: nn.Module) -> Enter | None:
    """The hook by which a module enters a mode, if it has one."""
    return next((value for value in module._forward_pre_hooks.values() if isinstance(value, Enter)), None)


def is_plain(module: nn.Module) -> bool:
    """Whether calls in a module are as they were."""
    entered = hooked(module)
    return entered is None or entered.act is None


def _is_called_by_hooked_module() -> bool:
    """Whether a call comes from a module that has entered the mode, without checkpointing in between.

    What a module hands to checkpointing, other than a module, is run again outside of it. And an interrupt from the
    keyboard calls no hooks, so that the mode may have been left behind.
    """
    if torch.compiler.is_compiling():  # where there are no frames, and what is run again is a copy of the same graph
        return True
    for frame in _frames():
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return False
        if frame.f_code is nn.Module._call_impl.__code__ and hooked(frame.f_locals["self"]):
            return True
    return False


def _runs(module: nn.Module, new: nn.Module) -> bool:
    """Whether a call of a module is under way in this thread, other than the one of ``new`` that has just begun."""
    calls = [frame for frame in _frames() if frame.f_code is nn.Module._call_impl.__code__]
    return sum(frame.f_locals["self"] is module for frame in calls) > (module is new)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back

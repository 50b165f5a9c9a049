"""Finds the non-smooth functions that a method of a module mentions, without running it.

It reads byte code: running the model would need an input and see one branch only, and source text is not always there
and does not say what a name stands for. Names are followed through globals, closures, the attributes of ``self`` and
Python helpers to the objects that they hold, so that ``self.relu`` (a registered module) and ``F.relu`` differ. An
attribute of anything else, such as a local variable, counts as the tensor method of that name.
"""

import builtins
import dis
import functools
import inspect
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gradreg.smooth.activations import FUNCTIONS, operation_of
from gradreg.smooth.calls import UNTRACED

_CHECKPOINTS = {checkpoint, checkpoint_sequential}
_UNKNOWN = object()


@final
@dataclass
class Reading:
    """What one method mentions.

    Attributes:
        own: Operations in its own code.
        within: Operations in nested functions and in Python helpers, which it may hand on to be run elsewhere.
        methods: Methods of modules, its own or others.
        checkpoint: Whether it mentions checkpointing, which runs a function again in the backward pass.
        scripted: Whether it mentions a function compiled by ``torch.jit``, which cannot be read.
        untraced: Whether it mentions a function that ``torch.compile`` hides from function modes.
    """

    own: set[str] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    methods: list[tuple[nn.Module, str]] = field(default_factory=list)
    checkpoint: bool = False
    scripted: bool = False
    untraced: bool = False


def read(module: nn.Module, method: str) -> Reading:
    """Read a method of a module, or the function set on the module under that name."""
    reader = _Reader()
    reader.read(vars(module).get(method) or getattr(type(module), method), module)
    return reader.reading


def mentions(function: object) -> set[str]:
    """The operations that a function mentions."""
    reader = _Reader()
    reader.mention(function, reader.reading.own)
    return reader.reading.own | reader.reading.within


@final
class _Reader:
    def __init__(self) -> None:
        self.reading = Reading()
        self._seen: set[CodeType] = set()

    def read(self, function: Callable[..., Any], receiver: nn.Module | None) -> None:
        """Read a function: a method of ``receiver``, or a helper without one."""
        function = inspect.unwrap(function)
        function = function.__func__ if isinstance(function, MethodType) else function
        if not isinstance(function, FunctionType) or function.__code__ in self._seen or _foreign(function):
            return
        code = function.__code__
        self._seen.add(code)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        scope = ChainMap(_contents(cells), function.__globals__, vars(builtins))
        local = dict.fromkeys((*code.co_varnames, *code.co_cellvars), _UNKNOWN)
        if receiver is not None and code.co_argcount:
            local[code.co_varnames[0]] = receiver
            self._follow_super(code, receiver)
        self._read_code(code, scope, local, self.reading.within if receiver is None else self.reading.own)

    def _follow_super(self, code: CodeType, receiver: nn.Module) -> None:
        if "super" in code.co_names:
            for base in type(receiver).__mro__:
                for inherited in (vars(base).get(name) for name in code.co_names):
                    if isinstance(inherited, FunctionType):
                        self.read(inherited, receiver)
                        self.mention(base if inherited is vars(base).get("forward") else None, self.reading.own)

    def _read_code(self, code: CodeType, scope: Mapping[str, Any], local: dict[str, Any], found: set[str]) -> None:
        value: object = _UNKNOWN
        for instruction in dis.get_instructions(code):
            name, opname = instruction.argval, instruction.opname
            if "LOAD_FAST" in opname or opname in ("LOAD_DEREF", "LOAD_GLOBAL"):
                name = name[-1] if isinstance(name, tuple) else name  # two loads in one, from Python 3.13 on
                value = local.get(name, scope.get(name, _UNKNOWN))
                value = _its_class(value) if opname == "LOAD_GLOBAL" else value
                self.reading.checkpoint |= name.startswith("checkpoint")
            elif opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                value = self._attribute(value, name)
                self.reading.checkpoint |= name.startswith("checkpoint")
            elif opname == "IMPORT_NAME":
                value = sys.modules.get(name, _UNKNOWN)
            else:
                value = _UNKNOWN
            self.mention(value, found)
        for nested in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
            hidden = dict.fromkeys((*nested.co_varnames, *nested.co_cellvars), _UNKNOWN)
            self._read_code(nested, scope, {**local, **hidden}, self.reading.within)

    def _attribute(self, value: object, name: str) -> object:
        if isinstance(value, nn.Module):
            return self._module_attribute(value, name)
        if isinstance(value, ModuleType):
            return vars(value).get(name, _UNKNOWN)
        return getattr(Tensor, name, _UNKNOWN)

    def _module_attribute(self, module: nn.Module, name: str) -> object:
        if name in module._modules:
            return module._modules[name]
        if name in vars(module):
            return vars(module)[name]
        value = inspect.getattr_static(type(module), name, _UNKNOWN)
        if isinstance(value, FunctionType):
            self.reading.methods.append((module, name))
            return _UNKNOWN
        return value.__func__ if isinstance(value, (staticmethod, classmethod)) else _its_class(value)

    def mention(self, value: object, found: set[str]) -> None:
        if isinstance(value, functools.partial):
            self.mention(value.func, found)
        elif isinstance(value, torch.jit.ScriptFunction):
            self.reading.scripted = True
        elif isinstance(value, type):
            found.update(filter(None, (operation_of(value),)))
        elif isinstance(value, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
            self.reading.checkpoint |= value in _CHECKPOINTS
            if value in FUNCTIONS:
                found.add(FUNCTIONS[value])
                self.reading.untraced |= value in UNTRACED
            else:
                self.read(value, None)


def _its_class(value: object) -> object:
    """The class of an activation that is no part of the model, as if it were made where it is called."""
    return type(value) if isinstance(value, nn.Module) and operation_of(type(value)) else value


def _contents(cells: Mapping[str, CellType]) -> dict[str, Any]:
    return {name: cell.cell_contents for name, cell in cells.items() if cell != CellType()}


def _foreign(function: FunctionType) -> bool:
    package = (function.__module__ or "").partition(".")[0]
    return package in sys.stdlib_module_names or package in ("torch", "numpy")

"""A second forward pass that is the same function as the first: its random numbers, buffers and other state.

A finite difference, an attack inside a step or a penalty of two points runs a model more than once in one step. The
passes must be one function of the input, and leave behind what one pass leaves. Two things stand in the way. A pass
draws random numbers (dropout, stochastic depth, masks), from PyTorch's generators, from ``random``, from NumPy, or from
generators that a module holds. And it moves what modules keep: the vectors of ``spectral_norm``, codebooks, recurrent
state, temperatures that fall. :class:`Replay` records both before the first pass and gives them to every other one.
"""

import copy
import random
import sys
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast, final

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradreg.modes import frozen_statistics, random_state, set_random_state
from gradreg.trees import Inputs, tensors_in
from gradreg.wrappers import is_sharded

_INTERNAL = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, hooks, flags
_PLACES = ("_buffers", "_parameters")
# Whose modules keep nothing, unless they have buffers.
_STATELESS = ("torch.nn.modules.", "torch.nn.parallel.", "torch._dynamo.", "torch.jit.")

_MANY = 1000  # entries of a container whose entries do not change: it is a table

Kept = dict[str, dict[str, Any]]  # by place: attributes under the empty name, buffers, parameters


class Replay(ABC):
    """The passes of one model over one batch, all of which are to be the same function.

    Args:
        model: Whatever computes the logits: a module or a function. Of a function only the random numbers are known.
        criterion: What makes losses of them, a module or a function too.
        device: Where they run.

    Attributes:
        drawn_from: By stage that has drawn random numbers: the states of the generators before it.
        frozen: Whether there are running statistics to keep from moving.
    """

    frozen: bool = False
    drawn_from: dict[Hashable, tuple[Any, ...]]
    _model: Callable[..., Any]
    _device: torch.device

    def of_part(self) -> "Replay":
        """For passes over a part of the batch, which draw other numbers but find the same modules."""
        part = copy.copy(self)
        part.drawn_from = {}
        return part

    @abstractmethod
    def call(self, inputs: Inputs, z: Tensor, *, counts: bool) -> tuple[Any, dict[str, Tensor]]:
        """The model's output at z, and the buffers that have moved as far as the model does not have them yet.

        Args:
            inputs: What the model is given, z in its place.
            z: The input.
            counts: Whether this is the step's own pass, which may move what modules keep.
        """

    def take_over(self, buffers: dict[str, Tensor]) -> None:
        """Give the model the buffers that its pass has moved."""
        return

    def aside(self, counts: bool) -> AbstractContextManager[None]:
        """Inside, what modules keep are copies, unless the pass counts."""
        return nullcontext()

    @contextmanager
    def drawing(self, stage: Hashable) -> Iterator[None]:
        """The first block of a stage draws random numbers as ever. Any later one draws the same, and leaves none."""
        start, now = self.drawn_from.get(stage), _random_states(self._device)
        if start is None:
            yield
            # A block that has drawn nothing, in evaluation mode say, does not count as the first.
            if _differ(now, _random_states(self._device)):
                self.drawn_from[stage] = now
            return
        try:
            _set_random_states(start, self._device)
            yield
        finally:
            _set_random_states(now, self._device)


@final
class EagerReplay(Replay):
    """For passes under autograd: any module keeps what it had, and all generators are known."""

    def __init__(self, model: Callable[..., Any], criterion: object, device: torch.device) -> None:
        self._model, self._device, self.drawn_from = model, device, {}
        keepers, self.frozen = [], False
        modules = [*(model.modules() if isinstance(model, nn.Module) else ())]
        modules += criterion.modules() if isinstance(criterion, nn.Module) else ()
        for module in modules:
            plain = type(module).__module__.startswith(_STATELESS)
            if isinstance(module, _NormBase):  # whose running statistics are easily kept from moving
                self.frozen |= module.training
            if not plain or not (isinstance(module, _NormBase) or {None}.issuperset(module._buffers.values())):
                keepers.append(module)
        self._kept = ModuleState(keepers) if keepers else None
        self._in_doubt = (
            isinstance(model, nn.Module)
            and model.training  # in evaluation mode, what measures and attacks run, things stand still
            and model not in _proven
            and _hides_something(model, keepers)
        )

    def call(self, inputs: Inputs, z: Tensor, *, counts: bool) -> tuple[Any, dict[str, Tensor]]:
        with self.drawing("model"), self.aside(counts):
            output = inputs.given_to(self._model, z)
        if self._in_doubt:
            self._prove(inputs, z, output)
        return output, {}

    def aside(self, counts: bool) -> AbstractContextManager[None]:
        return nullcontext() if counts or not (self.frozen or self._kept) else self._on_copies()

    def _prove(self, inputs: Inputs, z: Tensor, output: Any) -> None:
        """Once for each model: a second pass at the same input has to give the same output.

        Raises:
            RuntimeError: If not: the model keeps something where it is not looked for, such as an averaged teacher in
                frozen parameters, or an object of another class.
        """
        model = cast("nn.Module", self._model)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        before = [(parameter._version, parameter.data_ptr()) for parameter in frozen]
        with torch.no_grad(), self.drawing("model"), self._on_copies():
            again = inputs.given_to(model, z.detach())
        same = before == [(parameter._version, parameter.data_ptr()) for parameter in frozen]
        if not (same and all(map(alike, tensors_in(output), tensors_in(again)))):
            raise RuntimeError(
                "A second forward pass at the same input, with the same random numbers, buffers and attributes, gives "
                "another output: the model keeps or draws something that cannot be put back, such as an averaged "
                "teacher whose frozen parameters move in the forward pass. Move it after the step, or keep it in a "
                "buffer; penalties with DoubleBackward() alone need no second pass."
            )
        _proven.add(model)
        self._in_doubt = False

    @contextmanager
    def _on_copies(self) -> Iterator[None]:
        with frozen_statistics(self._model), self._kept.copied() if self._kept else nullcontext():
            yield


@final
class TransformedReplay(Replay):
    """For passes inside ``torch.func`` transforms and compiled regions.

    A transformed function may not change a tensor that it captured, as BatchNorm changes its running statistics. So
    every pass gets copies of the buffers, and those of the step's own pass are taken over when the transform is done.
    """

    def __init__(self, model: Callable[..., Any], criterion: object, device: torch.device) -> None:
        self._model, self._device, self.drawn_from = model, device, {}
        self._buffers = _moving_buffers(model)

    def call(self, inputs: Inputs, z: Tensor, *, counts: bool) -> tuple[Any, dict[str, Tensor]]:
        copies = {name: buffer.clone() for name, buffer in self._buffers.items()}

        def model(*args: Any, **kwargs: Any) -> Any:
            if not copies:
                return self._model(*args, **kwargs)
            return torch.func.functional_call(cast("nn.Module", self._model), copies, args, kwargs)

        with self.drawing("model"):
            if counts:
                return inputs.given_to(model, z), copies
            return without_random_numbers(lambda z: inputs.given_to(model, z), z), {}

    @contextmanager
    def drawing(self, stage: Hashable) -> Iterator[None]:
        if torch.compiler.is_compiling():  # which has no generators to set back: see without_random_numbers
            yield
        else:
            with super().drawing(stage):
                yield

    def take_over(self, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            cast("nn.Module", self._model).get_buffer(name).copy_(buffer)


# The models of which there is no doubt, or that have given the same output twice.
_proven: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_TRANSPARENT = (
    *(bool, int, float, complex, str, bytes, type(None), type, Enum, list, dict, set, deque, tuple, partial),
    *(FunctionType, MethodType, BuiltinFunctionType, random.Random),
    *(Tensor, nn.Module, Generator, torch.dtype, torch.device, torch.Size),
)


def _hides_something(model: nn.Module, keepers: list[nn.Module]) -> bool:
    """Whether a forward pass may move what is not copied; if not, that is remembered.

    Objects of other classes, views, large tables, and the frozen parameters of an averaged teacher.
    """
    if any(not parameter.requires_grad for parameter in model.parameters()):
        return True
    for module in keepers:
        for name, value in vars(module).items():
            if name in _INTERNAL or type(value).__module__.partition(".")[0] == "numpy":
                continue
            table = isinstance(value, list | dict | set | deque) and len(value) > _MANY
            view = isinstance(value, Tensor) and value._base is not None
            if table or view or not isinstance(value, _TRANSPARENT):
                return True
    _proven.add(model)
    return False


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    if not one.is_floating_point() or one.shape != other.shape or not bool(one.isfinite().all()):
        return True
    tolerance = 1e-4 if torch.finfo(one.dtype).bits >= 32 and not torch.is_autocast_enabled(one.device.type) else 1e-2
    return torch.allclose(one.detach(), other, rtol=tolerance, atol=tolerance * max(one.abs().max().item(), 1e-30))


def without_random_numbers(function: Callable[[Any], Any], z: Any) -> Any:
    """The function's value at z; inside a compiled region, raises where it draws random numbers.

    Raises:
        RuntimeError: If it draws some: a second pass would draw others, and be another function than the first.
    """
    if not torch.compiler.is_compiling():
        return function(z)
    try:
        # Mapped over nothing, for the sake of the one thing that vmap can be asked to refuse.
        return torch.func.vmap(lambda _: function(z), randomness="error", out_dims=None)(torch.zeros(1))
    except RuntimeError as error:
        raise RuntimeError(
            "A compiled region cannot draw the same random numbers for two passes of one step, which a finite "
            "difference, an attack inside the step or a loss that is differentiated by itself need. Compile the model "
            f"instead of the step, or leave the random operations (dropout, noise) out. {error}"
        ) from error


def _moving_buffers(model: object) -> dict[str, Tensor]:
    """Copies of the buffers that a forward pass may move: those of modules in training mode."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{prefix}.{name}" if prefix else name: buffer.clone()
        for prefix, module in model.named_modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


@final
class ModuleState:
    """What modules keep between forward passes, as it was when this object was made.

    Not seen is what is kept by an object of another class that a module only points to.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        # The units of a sharded model exchange its parameters themselves.
        self._places = _PLACES[:1] if any(map(is_sharded, modules)) else _PLACES
        memo: dict[int, Any] = {}
        self._before = [(module, _copied(self._kept_by(module), memo)) for module in modules]

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Inside, the modules have copies of what they kept; afterwards again the very objects that they had."""
        # Objects are exchanged, not filled: a graph may have saved the tensors and needs them as they are now.
        memo: dict[int, Any] = {}
        now = [(module, self._kept_by(module)) for module, _ in self._before]
        now = [(m, _copied(kept, {}) if isinstance(m, torch.jit.ScriptModule) else kept) for m, kept in now]
        try:
            for module, kept in self._before:
                self._give(module, _copied(kept, memo))
            yield
        finally:
            for module, kept in now:
                self._give(module, kept)

    def _kept_by(self, module: nn.Module) -> Kept:
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule):  # whose buffers are not its own
            return {"": {}, "values": {name: buffer.detach() for name, buffer in module.named_buffers(recurse=False)}}
        attributes = {name: value for name, value in own.items() if name not in _INTERNAL}
        return {"": attributes, **{place: dict(own[place]) for place in self._places}}

    def _give(self, module: nn.Module, kept: Kept) -> None:
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            for name, values in kept["values"].items():
                dict(module.named_buffers(recurse=False))[name].data.copy_(values)
            return
        for name in [name for name in own if name not in _INTERNAL and name not in kept[""]]:
            del own[name]
        own.update(kept[""])
        for place in self._places:
            own[place].clear()
            own[place].update(kept[place])


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a forward pass could change, and everything else as it is.

    What two modules share, their copies share. Trained parameters are left to the optimiser.
    """
    if id(value) in memo:
        return memo[id(value)][1]
    result: Any = value
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        result = value if value.requires_grad else value.detach().clone()
        if isinstance(value, nn.Parameter) and result is not value:
            result = nn.Parameter(result, requires_grad=False)
    elif isinstance(value, Generator):
        result = Generator(value.device)
        result.set_state(value.get_state())
    elif type(value) is random.Random or type(value).__module__.partition(".")[0] == "numpy":
        result = copy.deepcopy(value)
    elif isinstance(value, list | deque | set | dict):
        result = copy.copy(value)
        memo[id(value)] = value, result  # at once: it may contain itself
        if len(value) <= _MANY:
            _copy_content(value, result, memo)
    elif isinstance(value, tuple):
        items = [_copied(item, memo) for item in value]
        if any(item is not own for item, own in zip(items, value, strict=True)):
            result = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    memo[id(value)] = value, result  # the value too: while it lives nothing else has its id
    return result


def _copy_content(value: Any, result: Any, memo: dict[int, Any]) -> None:
    """Copies of the items in place of the items."""
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(result, key, _copied(item, memo))  # that of a subclass may do something else
    elif isinstance(value, set):
        return  # what can be in a set cannot change
    else:
        for place, item in enumerate(value):
            result[place] = _copied(item, memo)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    """Of all generators that code without a generator of its own draws from."""
    numpy = sys.modules.get("numpy")  # not loaded, not drawn from
    return random_state(device), random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    of_torch, of_python, of_numpy = states
    set_random_state(of_torch, device)
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


def _differ(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether random numbers were drawn between two states."""
    (cpu, device), python, numpy = before
    (cpu_after, device_after), python_after, numpy_after = after
    same = torch.equal(cpu, cpu_after) and (device is None or torch.equal(device, device_after))
    # NumPy's state is a name, 624 numbers, and a position among them, which moves with every draw.
    return not same or python != python_after or (numpy is not None and numpy[2:] != numpy_after[2:])

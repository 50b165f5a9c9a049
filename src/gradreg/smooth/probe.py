"""Finds by experiment what is not smooth in a model: it runs, and every operation is tried between two inputs.

The model runs on a batch and on a neighbour of it. Between the two values that an operation was given in these runs, it
is then tried along a straight line, so that a kink in its outputs is its own and not that of a layer before it.

Operations are those below autograd (``aten.relu``), so that code that cannot be read is seen too: functions held in
lists, operators, ``torch.jit``, C++. A comparison or an index is no number and has no slope; where an operation uses
one, it is made anew at each point of the line by what made it.
"""

import warnings
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gradreg.checks import check_input, finite_range
from gradreg.modes import random_state
from gradreg.smooth.activations import BELOW, OPERATIONS
from gradreg.smooth.breaks import Break, find_break
from gradreg.smooth.paths import Line, Made, Moved, Origins, Path, first_to_run, is_number
from gradreg.smooth.runs import Watch, run
from gradreg.wrappers import is_sharded

# Smooth by definition in every number that they are given, so that they are tried by the tests and not in each model:
# polynomials, norms, averages, activations; copies, shifts and what only allocates.
SMOOTH = {
    "convolution", "mm", "addmm", "bmm", "baddbmm", "add", "sub", "mul", "neg", "sum", "mean", "cumsum",
    "avg_pool2d", "_adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d",
    "_softmax", "sigmoid", "tanh", "gelu", "silu", "mish", "softplus", "exp", "sin", "cos", "erf",
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_scaled_dot_product_flash_attention_for_cpu", "_to_copy", "clone", "detach", "copy", "cat", "stack", "roll",
    "flip", "repeat", "constant_pad_nd", "reflection_pad2d", "_unsafe_view", "index_select", "pixel_shuffle",
    "native_dropout", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "new_zeros", "new_ones",
    "zeros_like", "ones_like",
}  # fmt: skip


Key = tuple[str, str]


@final
@dataclass(frozen=True)
class Tried:
    """What was found of an operation, in all calls by one module.

    Attributes:
        name: The innermost module that ran it.
        operation: Its name below autograd, the same for an in-place variant: ``"relu"``; empty where the module ran
            other operations for the neighbour.
        order: Which derivative jumps: 0 is the value itself, 1 the slope, 2 the curvature; None if none did.
        share: The part of its outputs with such a place between the two inputs; None if it could not be tried, since
            only one of the two runs came there.
        flat: Whether it acts on each element alone, and is linear in between.
        exact: Whether the order is sure: not so if it chooses between numbers that hang together in unknown ways.
        detached: Whether no gradient passes through it.
    """

    name: str
    operation: str
    order: int | None = None
    share: float | None = None
    flat: bool = False
    exact: bool = True
    detached: bool = False


def probe(model: nn.Module, x: Tensor) -> list[Tried]:
    """Try every operation of a model's forward pass between x and x plus noise of x's own standard deviation.

    It runs copies of the model, in the modes that it is in, and in double precision if the model runs in that.
    Each operation is tried at 33 points, and more closely where it looks broken.
    """
    _check(model, x)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.enable_grad():
        x = x.detach()
        with suppress(Exception):  # what the code keeps outside of the model, it keeps as in a run of its own
            run(model, x)
        with suppress(Exception):  # a model with a precision of its own
            return _tried(model, x.double())
        return _tried(model, x)


def _check(model: nn.Module, x: Tensor) -> None:
    check_input(x)
    if any(tensor.is_meta for tensor in (x, *model.parameters(), *model.buffers())):
        raise ValueError(
            "find_nonsmooth: on the meta device there are no values to try. Give the model and x values first, or "
            "leave x out to survey the code alone."
        )
    finite_range(x)
    if any(map(is_sharded, model.modules())):
        raise ValueError("find_nonsmooth: a sharded model cannot be copied: call it before fully_shard.")


def _tried(model: nn.Module, near: Tensor) -> list[Tried]:
    noise = torch.randn(near.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(near)
    scale = float(near.std(correction=0)) or 1.0
    run(model, near)  # which fills what the code keeps for the next run
    far = _Record()
    far.take(tree_leaves(run(model, near + scale * noise, far)))
    comparison = _Compare(far.calls[0])
    run(model, near, comparison)
    broken = {key for key, tried in comparison.tried.items() if tried.order is not None} & comparison.of_numbers
    detached = _detached(model, near, broken) if broken else set()
    return [replace(tried, detached=key in detached) for key, tried in comparison.tried.items()]


@final
@dataclass(frozen=True)
class _Step:
    """An operation of the run on the neighbour.

    Attributes:
        func: The operation.
        given: A copy of every number that it was given, where it is to be tried or to be made anew.
        used: Which of its results something took.
    """

    func: Any
    given: list[Tensor | None]
    used: set[int] = field(default_factory=set)


@final
@dataclass
class _Call:
    """A module's call in the run on the neighbour: its own operations, and its calls of other modules by name.

    ``alone`` says that it is one of the run on the batch, and that the run on the neighbour has none for it.
    """

    name: str
    steps: deque[_Step] = field(default_factory=deque)
    calls: dict[str, deque["_Call"]] = field(default_factory=lambda: defaultdict(deque))
    alone: bool = False


@final
class _Record(Watch):
    """The run on the neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [_Call("")]
        self._results: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def enter(self, name: str) -> None:
        call = _Call(name)
        self.calls[-1].calls[name].append(call)
        self.calls.append(call)

    def leave(self) -> None:
        self.calls.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.take(leaves)
        kept = not _is_smooth(func) or _chooses(leaves)
        step = _Step(func, [leaf.clone() if kept and is_number(leaf) else None for leaf in leaves])
        self.calls[-1].steps.append(step)
        result = func(*args, **(kwargs or {}))
        for index, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._results[leaf] = step, index
        return result

    def take(self, leaves: list[Any]) -> None:
        """Note which results are used."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf in self._results:
                step, index = self._results[leaf]
                step.used.add(index)


@final
class _Compare(Watch):
    """The run on the batch itself, each operation of which is tried on the way to the neighbour."""

    def __init__(self, far: _Call) -> None:
        super().__init__()
        self.tried: dict[Key, Tried] = {}
        self.of_numbers: set[Key] = set()  # through which a gradient could pass
        self._calls = [far]
        self._choices: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._origins = Origins()

    def enter(self, name: str) -> None:
        ahead = self._calls[-1].calls[name]
        if not ahead:
            self._part()
        self._calls.append(ahead.popleft() if ahead else _Call(name, alone=True))

    def leave(self) -> None:
        call = self._calls[-1]
        if call.steps or any(call.calls.values()):
            self._part()
        self._leave_out(call)
        self._calls.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        step = self._counterpart(func, leaves)
        moved = None if step is None else self._moved(step, leaves, spec)
        result = func(*args, **(kwargs or {}))
        results = tree_leaves(result)
        self._origins.keep(func, leaves, spec, results)
        if step is not None and moved is not None:
            for index, leaf in enumerate(results):
                if isinstance(leaf, Tensor) and not is_number(leaf):
                    self._choices[leaf] = Made(moved, index)
            if any(map(is_number, results)) and (moved.chooses or not _is_smooth(func)):
                self._try(step, moved)
        return result

    def _counterpart(self, func: Any, leaves: list[Any]) -> _Step | None:
        """The same operation of the other run; None if that went another way."""
        call = self._calls[-1]
        if not call.steps or not _is_like(call.steps[0], func, leaves):
            self._part()
        elif _is_alike_in_shape(step := call.steps.popleft(), leaves):
            return step
        else:
            self._branch(call.name)
        self._note(call.name, func)
        return None

    def _part(self) -> None:
        """The two runs of the module that runs go different ways: what either of them still runs is not tried."""
        call = self._calls[-1]
        if not call.alone:
            self._branch(call.name)
        while call.steps:
            self._note(call.name, call.steps.popleft().func)

    def _branch(self, name: str) -> None:
        self.tried[name, ""] = Tried(name, "", 0, 1.0)

    def _leave_out(self, call: _Call) -> None:
        for step in call.steps:
            self._note(call.name, step.func)
        for calls in call.calls.values():
            for inner in calls:
                self._leave_out(inner)

    def _note(self, name: str, func: Any) -> None:
        if not _is_smooth(func):
            self.tried.setdefault((name, _name(func)), Tried(name, _name(func)))

    def _moved(self, step: _Step, leaves: list[Any], spec: Any) -> Moved | None:
        """The operation as a function of the place on the line; None if it is the same all along."""
        paths = [self._path(leaf, far, step.func) for leaf, far in zip(leaves, step.given, strict=True)]
        if not any(isinstance(path, Path) for path in paths):
            return None
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        drawn = random_state(device) if torch.Tag.nondeterministic_seeded in step.func.tags else None
        as_it_is = Moved(step.func, paths, spec, device, drawn)
        return first_to_run(as_it_is.in_double_precision(), as_it_is)

    def _path(self, leaf: Any, far: Tensor | None, func: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if far is not None and not torch.equal(leaf, far):
            return Line(leaf, leaf.clone(), far)
        return self._choices.get(leaf, leaf.clone() if func._schema.is_mutable else leaf)

    def _try(self, step: _Step, moved: Moved) -> None:
        """Of the calls of one operation by one module, what is worst counts."""
        key = self._calls[-1].name, _name(step.func)
        before = self.tried.get(key, Tried(*key))
        self.tried[key] = replace(before, share=before.share or 0.0)
        if any(isinstance(path, Line) for path in moved.paths):
            self.of_numbers.add(key)
        if moved.chooses:
            moved = first_to_run(self._origins.together(moved), moved)
        try:
            found = find_break(moved.curve(step.used), expected=bool(BELOW.get(key[1], {key[1]}) & OPERATIONS.keys()))
        except (RuntimeError, IndexError):  # the shapes depend on a choice
            found = Break(0, 1.0, linear=False)
        if found is not None:
            order = found.order if before.order is None else min(before.order, found.order)
            flat = found.linear and moved.is_elementwise and (before.flat or before.order is None)
            exact = before.exact and (found.order > 0 or not moved.chooses or len(moved.lines) < 2)
            self.tried[key] = Tried(*key, order, max(before.share or 0.0, found.share), flat, exact)


@final
class _Gradients(Watch):
    """A run with a gradient in x, which keeps what some operations return."""

    def __init__(self, keys: set[Key]) -> None:
        super().__init__()
        self.results: dict[Key, list[Tensor]] = {key: [] for key in keys}
        self.through: set[Key] = set()
        self._running = [""]

    def enter(self, name: str) -> None:
        self._running.append(name)

    def leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        key = self._running[-1], _name(func)
        if key in self.results and torch.is_grad_enabled():  # as it is not inside of an autograd.Function
            if func._schema.is_mutable:  # a view of something else, perhaps, whose nodes are made anew
                self.through.add(key)
            self.results[key] += filter(is_number, tree_leaves(result))
        return result


def _detached(model: nn.Module, near: Tensor, keys: set[Key]) -> set[Key]:
    """Those of some operations through which no gradient passes; none if that cannot be told."""
    gradients, nodes = _Gradients(keys), set()
    with suppress(Exception), warnings.catch_warnings():  # in-place changes that autograd refuses, say
        warnings.simplefilter("ignore")
        outputs = run(model, near.clone().requires_grad_().clone(), gradients)
        pending = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        while pending:
            node = pending.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                pending += [following for following, _ in node.next_functions]
    if not nodes:
        return set()
    passed = {key for key, results in gradients.results.items() if any(leaf.grad_fn in nodes for leaf in results)}
    return keys - passed - gradients.through


def _is_like(step: _Step, func: Any, leaves: list[Any]) -> bool:
    """Whether an operation of the other run is this one."""
    if step.func is not func or len(step.given) != len(leaves):
        return False
    return all(far is None or is_number(leaf) for far, leaf in zip(step.given, leaves, strict=True))


def _is_alike_in_shape(step: _Step, leaves: list[Any]) -> bool:
    return all(far is None or far.shape == leaf.shape for far, leaf in zip(step.given, leaves, strict=True))


def _is_smooth(func: Any) -> bool:
    return func.is_view or _name(func) in SMOOTH


def _chooses(leaves: list[Any]) -> bool:
    """Whether an operation is given something that is no number, or is to make it."""
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    kinds = (leaf for leaf in leaves if isinstance(leaf, torch.dtype))
    return not all(map(is_number, tensors)) or not all(kind.is_floating_point or kind.is_complex for kind in kinds)


def _name(func: Any) -> str:
    """The name of an operation without its overload, the same for an in-place variant."""
    space, name = func._schema.name.split("::")
    return name.removesuffix("_") if space == "aten" else f"{space}.{name}"

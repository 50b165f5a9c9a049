"""Finds by experiment what is not smooth in a model: it runs, and every operation is tried between two inputs.

The model runs on a batch and on a neighbour of it. Between the two values that an operation was given in these runs, it
is then tried along a straight line, so that a kink in its outputs is its own and not that of a layer before it.

Operations are those below autograd (``aten.relu``), so that code that cannot be read is seen too: functions held in
lists, operators, ``torch.jit``, C++. A comparison or an index is no number and has no slope; where an operation uses
one, it is made anew at each point of the line by what made it.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from gradreg.checks import check_input, finite_range
from gradreg.modes import RandomState, random_state, replayed
from gradreg.smooth.activations import BELOW, OPERATIONS
from gradreg.smooth.breaks import Break, find_break
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
_ELEMENTS = 2**14  # of the outputs of one operation, how many are looked at


@final
@dataclass(frozen=True)
class Tried:
    """What was found of an operation, in all calls by one module.

    Attributes:
        name: The innermost module that ran it.
        operation: Its name below autograd, the same for an in-place variant: ``"relu"``; empty where the model ran
            other operations for the neighbour.
        order: Which derivative jumps: 0 is the value itself, 1 the slope, 2 the curvature; None if none did.
        share: The part of its outputs with such a place between the two inputs.
        flat: Whether it acts on each element alone, and is linear in between.
    """

    name: str
    operation: str
    order: int | None = None
    share: float = 0.0
    flat: bool = False


def probe(model: nn.Module, x: Tensor) -> list[Tried]:
    """Try every operation of a model's forward pass between x and x plus noise of x's own standard deviation.

    It runs copies of the model, in double precision unless the model insists on its own, in the modes that it is in.
    Each operation is tried at 33 points, and more closely where it looks broken.
    """
    _check(model, x)
    try:
        return _tried(model, x.detach().double())
    except RuntimeError:
        return _tried(model, x.detach())


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
    far, state = _Record(), random_state(near.device)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.enable_grad():
        with replayed(state, near.device):
            _run(model, near + scale * noise, far)
        comparison = _Compare(far.steps)
        with replayed(state, near.device):
            _run(model, near, comparison)
    return list(comparison.tried.values())


def _run(model: nn.Module, x: Tensor, mode: "_Watch") -> None:
    """Run a copy of the model under a mode that is told which module is running."""
    parallel = isinstance(model, DistributedDataParallel)  # whose forward pass would communicate
    net = copy.deepcopy(model.get_submodule("module") if parallel else model).to(x.dtype)
    for name, module in net.named_modules(prefix="module" if parallel else ""):
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_pre_hook(lambda *_, name=name: mode.running.append(name))
            module.register_forward_hook(lambda *_: mode.running.pop() and None)
    with mode:
        net(x)


class _Watch(TorchDispatchMode):
    """Sees every operation of a forward pass, and knows the module that runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [""]


@final
@dataclass(frozen=True)
class _Step:
    """An operation of the run on the neighbour, with a copy of every number that it was given."""

    func: Any
    given: list[Tensor | None]


@final
class _Record(_Watch):
    """The run on the neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [] if _is_smooth(func) else tree_leaves((args, kwargs))
        self.steps.append(_Step(func, [leaf.clone() if _is_number(leaf) else None for leaf in leaves]))
        return func(*args, **(kwargs or {}))


@final
class _Compare(_Watch):
    """The run on the batch itself, each operation of which is tried on the way to the neighbour."""

    def __init__(self, steps: Iterable[_Step]) -> None:
        super().__init__()
        self.tried: dict[tuple[str, str], Tried] = {}
        self._steps = iter(steps)
        self._choices: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._together = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moved = self._moved(func, args, kwargs) if self._together else None
        result = func(*args, **kwargs)
        if moved is not None:
            leaves = tree_leaves(result)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and not _is_number(leaf):
                    self._choices[leaf] = _Choice(moved, index)
            if any(map(_is_number, leaves)) and not (_is_smooth(func) and moved.of_numbers):
                self._try(func, moved)
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> "_Moved | None":
        """The operation as a function of the place on the line; None if it is the same all along."""
        leaves, spec = tree_flatten((args, kwargs))
        step = next(self._steps, None)
        if step is None or step.func is not func:
            self.tried[self.running[-1], ""] = Tried(self.running[-1], "", 0, 1.0)
            self._together = False
            return None
        paths = [self._path(leaf, far) for leaf, far in zip(leaves, step.given or [None] * len(leaves), strict=True)]
        if not any(isinstance(path, _Line | _Choice) for path in paths):
            return None
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        random = torch.Tag.nondeterministic_seeded in func.tags
        return _Moved(func, paths, spec, device, random_state(device) if random else None)

    def _path(self, leaf: Any, far: Tensor | None) -> Any:
        if far is not None and not torch.equal(leaf, far):
            return _Line(leaf.clone(), far)
        return self._choices.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

    def _try(self, func: Any, moved: "_Moved") -> None:
        """Of the calls of one operation by one module, what is worst counts."""
        key = self.running[-1], _name(func)
        before = self.tried.setdefault(key, Tried(*key))
        try:
            found = find_break(moved.numbers, expected=bool(BELOW.get(key[1], {key[1]}) & OPERATIONS.keys()))
        except (RuntimeError, IndexError):  # the shapes depend on a choice
            found = Break(0, 1.0, linear=False)
        if found is not None:
            order = found.order if before.order is None else min(before.order, found.order)
            flat = found.linear and moved.is_elementwise and (before.flat or before.order is None)
            self.tried[key] = Tried(*key, order, max(before.share, found.share), flat)


@final
@dataclass(frozen=True)
class _Line:
    """A number on its straight way from the batch to the neighbour."""

    start: Tensor
    end: Tensor

    def __call__(self, place: float | Tensor) -> Tensor:
        way = torch.where(self.start == self.end, 0.0, self.end - self.start)  # also where both are infinite
        return self.start + place * way


@final
@dataclass(frozen=True)
class _Choice:
    """A comparison, an index or the like: what an operation makes of the numbers at a place."""

    made_by: "_Moved"
    index: int

    def __call__(self, place: float | Tensor) -> Tensor:
        return self.made_by(place)[self.index]


@final
@dataclass(frozen=True)
class _Moved:
    """An operation of a place on the line between the two runs."""

    func: Any
    paths: list[Any]
    spec: TreeSpec
    device: torch.device
    random: RandomState | None

    def __call__(self, place: float | Tensor) -> list[Any]:
        """What it returns there, as a flat list; what it is given stays."""
        given = [path(place) if isinstance(path, _Line | _Choice) else self._spared(path) for path in self.paths]
        args, kwargs = tree_unflatten(given, self.spec)
        if self.random is None:
            return tree_leaves(self.func(*args, **kwargs))
        with replayed(self.random, self.device):  # the same dropout at every place
            return tree_leaves(self.func(*args, **kwargs))

    def numbers(self, place: float) -> Tensor:
        """The numbers among the results in one row, or as many of them as are looked at, always the same."""
        outputs = torch.cat([_real(leaf).flatten() for leaf in self(place) if _is_number(leaf)])
        return outputs if len(outputs) <= _ELEMENTS else outputs[_chosen(len(outputs), outputs.device)]

    @property
    def of_numbers(self) -> bool:
        """Whether all that changes are numbers."""
        return not any(isinstance(path, _Choice) for path in self.paths)

    @property
    def is_elementwise(self) -> bool:
        """Whether each element of its one result hangs on the same element of what changes, and on no other."""
        start, *others = self(0.0)
        half = torch.rand(start.shape, generator=torch.Generator().manual_seed(0)).to(start) < 0.5
        lines = [path for path in self.paths if isinstance(path, _Line)]
        if others or any(line.start.shape != start.shape for line in lines):
            return False
        return torch.equal(self(half)[0], torch.where(half, self(1.0)[0], start))

    def _spared(self, leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and self.func._schema.is_mutable else leaf


@lru_cache(maxsize=8)
def _chosen(count: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_ELEMENTS].to(device)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values


def _is_smooth(func: Any) -> bool:
    return func.is_view or _name(func) in SMOOTH


def _name(func: Any) -> str:
    """The name of an operation without its overload, the same for an in-place variant."""
    space, name = func._schema.name.split("::")
    return name.removesuffix("_") if space == "aten" else f"{space}.{name}"

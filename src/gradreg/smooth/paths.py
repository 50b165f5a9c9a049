"""An operation on the way between two runs of a model: as a function of the place on the line from one to the other.

A number goes straight. A comparison or an index is no number and has no straight way: it is made anew at each place by
what made it. So is a number that is used together with a choice, if it is made of what the choice is made of:
``where(x > 0, x, exp(x))`` needs the exp(x) of the very place at which x > 0 changes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from gradreg.copies import promoted
from gradreg.modes import RandomState, replayed

_ELEMENTS = 2**14  # of the outputs of one operation, how many are looked at
_FAR_BACK = 8  # operations, as far as it is looked for what a number is made of


@final
@dataclass(frozen=True, eq=False)
class Line:
    """A number on its straight way from the batch to the neighbour.

    Attributes:
        of: The number that the model holds, which it may change later on.
        start: Its value in the batch.
        end: Its value in the neighbour.
    """

    of: Tensor
    start: Tensor
    end: Tensor

    def __call__(self, place: float | Tensor) -> Tensor:
        way = torch.where(self.start == self.end, 0.0, self.end - self.start)  # also where both are infinite
        return self.start + place * way


@final
@dataclass(frozen=True, eq=False)
class Made:
    """One result of an operation, made anew at each place."""

    by: "Moved"
    index: int

    def __call__(self, place: float | Tensor) -> Tensor:
        return self.by(place)[self.index]


Path = Line | Made


@final
@dataclass(frozen=True, eq=False)
class Moved:
    """An operation of a place on the line between the two runs.

    Attributes:
        func: The operation below autograd.
        paths: What it is given, flattened: a path, or what stays as it is.
        spec: How to put that together again.
        device: Where it runs.
        random: The state of the generators from which it draws; None if it draws nothing.
    """

    func: Any
    paths: list[Any]
    spec: TreeSpec
    device: torch.device
    random: RandomState | None = None

    def __call__(self, place: float | Tensor) -> list[Any]:
        """What it returns there, as a flat list; what it is given stays."""
        given = [path(place) if isinstance(path, Path) else self._spared(path) for path in self.paths]
        args, kwargs = tree_unflatten(given, self.spec)
        if self.random is None:
            return tree_leaves(self.func(*args, **kwargs))
        with replayed(self.random, self.device):  # the same dropout at every place
            return tree_leaves(self.func(*args, **kwargs))

    def curve(self, used: set[int]) -> Callable[[float], Tensor]:
        """The numbers among its results in one row, or as many as are looked at: those used later, or else all."""

        def numbers(place: float) -> Tensor:
            results = {index: leaf for index, leaf in enumerate(self(place)) if is_number(leaf)}
            taken = [results[index] for index in results if index in used] or results.values()
            outputs = torch.cat([_real(leaf).flatten() for leaf in taken])
            return outputs if len(outputs) <= _ELEMENTS else outputs[_chosen(len(outputs), outputs.device)]

        return numbers

    @property
    def chooses(self) -> bool:
        """Whether something that is no number changes in what it is given."""
        return any(isinstance(path, Made) for path in self.paths)

    @cached_property
    def lines(self) -> dict[int, Line]:
        """The straight lines that it hangs on, by the identity of their numbers."""
        return {id(line.of): line for line in self._lines()}

    @property
    def is_elementwise(self) -> bool:
        """Whether each element of its one result hangs on the same element of what changes, and on no other."""
        start, *others = self(0.0)
        half = torch.rand(start.shape, generator=torch.Generator().manual_seed(0)).to(start) < 0.5
        if others or any(line.start.shape != start.shape for line in self._lines()):
            return False
        return torch.equal(self(half)[0], torch.where(half, self(1.0)[0], start))

    def on(self, ways: Mapping[int, Path]) -> "Moved":
        """The same with other ways of some numbers."""

        def other(path: Any) -> Any:
            if isinstance(path, Line):
                return ways.get(id(path.of), path)
            return Made(path.by.on(ways), path.index) if isinstance(path, Made) else path

        return replace(self, paths=[other(path) for path in self.paths])

    def in_double_precision(self) -> "Moved":
        """The same of numbers in double precision."""

        def promote(path: Any) -> Any:
            if isinstance(path, Line):
                return Line(path.of, promoted(path.start), promoted(path.end))
            return promoted(path) if isinstance(path, Tensor) else path

        return replace(self, paths=[promote(path) for path in self.paths])

    def _lines(self) -> Iterator[Line]:
        for path in self.paths:
            if isinstance(path, Line):
                yield path
            elif isinstance(path, Made):
                yield from path.by._lines()

    def _spared(self, leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and self.func._schema.is_mutable else leaf


@final
@dataclass(frozen=True, eq=False)
class _Origin:
    """The operation that made a tensor, with the versions that this and all that it was given had then."""

    func: Any
    given: list[Any]
    spec: TreeSpec
    index: int
    versions: list[int]


_UNKNOWN = object()


@final
class Origins:
    """What made each tensor of a run, so that numbers can be followed back to those that a choice is made of."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def keep(self, func: Any, given: list[Any], spec: TreeSpec, results: list[Any]) -> None:
        """Remember what an operation made, unless it changed it in place or drew it."""
        unknown = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        for index, leaf in enumerate(results):
            if isinstance(leaf, Tensor):
                origin = None if unknown else _Origin(func, given, spec, index, _versions([*given, leaf]))
                self._known[leaf] = origin

    def together(self, moved: Moved) -> Moved:
        """The operation with all that it is given made of as few straight lines as can be."""
        seen: dict[int, Any] = {}
        return moved.on({key: self._way(line.of, moved.lines, seen, _FAR_BACK) for key, line in moved.lines.items()})

    def _way(self, leaf: Any, lines: Mapping[int, Line], seen: dict[int, Any], left: int) -> Any:
        """A path made of these lines; the leaf itself if it stays, and _UNKNOWN if it hangs on something else."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            made = self._made(leaf, lines, seen, left)
            seen[id(leaf)] = made if isinstance(made, Made) else lines.get(id(leaf), made)
        return seen[id(leaf)]

    def _made(self, leaf: Tensor, lines: Mapping[int, Line], seen: dict[int, Any], left: int) -> Any:
        origin = self._known.get(leaf)
        if origin is None or left == 0 or _versions([*origin.given, leaf]) != origin.versions:
            return leaf if isinstance(leaf, nn.Parameter) else _UNKNOWN
        ways = [self._way(given, lines, seen, left - 1) for given in origin.given]
        if any(way is _UNKNOWN for way in ways):
            return _UNKNOWN
        if not any(isinstance(way, Path) for way in ways):
            return leaf
        return Made(Moved(origin.func, ways, origin.spec, leaf.device), origin.index)


def first_to_run(*operations: Moved) -> Moved:
    """The first of these that runs, or else the last."""
    for moved in operations[:-1]:
        with suppress(Exception):  # what it says of types that it does not know is of no use here
            moved(0.0)
            return moved
    return operations[-1]


def is_number(leaf: Any) -> bool:
    """Whether this is a tensor of real or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _versions(leaves: list[Any]) -> list[int]:
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return [-1 if leaf.is_inference() else leaf._version for leaf in tensors]


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values


@lru_cache(maxsize=8)
def _chosen(count: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_ELEMENTS].to(device)

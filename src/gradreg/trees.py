"""Inputs, labels and outputs of any structure: tensors of a batch in tuples, lists, dictionaries and named tuples.

A tensor or list belongs to the samples if its length is the size of the batch, and is then cut and joined with them
(what belongs together otherwise goes into a tuple). Anything else, the mixing weight of mixup for one, belongs to the
batch as a whole.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from gradreg.gradients import outside_inference_mode


@final
class Inputs:
    """What a model is given, of which one tensor is perturbed.

    A tuple or list is given as positional arguments, ``model(*x)``, a mapping as keyword arguments, ``model(**x)``.

    Args:
        whole: A tensor, or a tuple, list or mapping that holds one.
        name: The key or the position of the tensor to perturb. Default: the first one of real numbers, or in a mapping
            the only one.

    Attributes:
        x: The tensor to perturb.
        is_tensor: Whether the model is given the tensor alone.

    Raises:
        TypeError: If there is no such tensor, or a mapping has several.
    """

    def __init__(self, whole: Any, name: str | int | None = None) -> None:
        self.is_tensor = isinstance(whole, Tensor)
        if self.is_tensor:
            self._whole = self.x = whole
            return
        self._whole, self._name = usable(tuple(whole) if type(whole) is list else whole), name
        whole = self._whole
        entries = dict(whole) if isinstance(whole, Mapping) else dict(enumerate(whole)) if _is_list(whole) else {}
        if name is None:
            real = [key for key, entry in entries.items() if isinstance(entry, Tensor) and entry.is_floating_point()]
            self._name = next(iter(real), None)
            if len(real) > 1 and isinstance(whole, Mapping):
                raise TypeError(
                    f"x has several tensors of real numbers: say which one to perturb, perturb={real[0]!r}."
                )
        found = entries.get(self._name)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"x is a {type(whole).__name__} with {list(entries)}; expected a tensor, or a tuple or mapping in "
                f"which perturb={name!r} names one. The order of arguments is (model, x, y)."
            )
        self.x = found

    def given_to(self, model: Callable[..., Any], z: Tensor) -> Any:
        """The model's output for z instead of x."""
        if self.is_tensor:
            return model(z)
        if isinstance(self._whole, Mapping):
            return model(**{**self._whole, self._name: z})
        return model(*(z if place == self._name else entry for place, entry in enumerate(self._whole)))

    def rows(self, rows: Tensor) -> "Inputs":
        """Those of some samples."""
        if self.is_tensor:
            return Inputs(self.x[rows])
        return Inputs(taken(self._whole, rows, len(self.x)), self._name)


def usable(tree: Any) -> Any:
    """The tree, with copies of the tensors made under inference_mode, which cannot be saved for a backward pass."""
    return outside_inference_mode(tree) if isinstance(tree, Tensor) else _mapped(usable, tree)


def detached(tree: Any) -> Any:
    """The tree, its tensors without their graphs."""
    return tree.detach() if isinstance(tree, Tensor) else _mapped(detached, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of the tree."""
    found: list[Tensor] = []

    def collect(branch: Any) -> Any:
        if isinstance(branch, Tensor):
            found.append(branch)
            return branch
        return _mapped(collect, branch)

    collect(tree)
    return found


def taken(tree: Any, rows: Tensor, count: int) -> Any:
    """The entries of some of ``count`` samples."""
    if isinstance(tree, Tensor):
        return tree[rows.to(tree.device)] if tree.ndim and len(tree) == count else tree
    if type(tree).__module__ == "numpy" and getattr(tree, "shape", ())[:1] == (count,):
        return tree[rows.cpu().numpy()]
    if type(tree) is list and len(tree) == count:  # what is a list belongs to the samples, whatever is in it
        return [tree[row] for row in rows.tolist()]
    return _mapped(lambda branch: taken(branch, rows, count), tree)


def joined(trees: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """The entries of all samples in their order, from those of parts of the batch."""
    order, sizes = torch.cat(list(rows)).argsort(), [len(part) for part in rows]
    if isinstance(trees[0], Tensor):
        if any(tree.ndim == 0 or len(tree) != size for tree, size in zip(trees, sizes, strict=True)):
            return trees[0]
        return torch.cat(list(trees))[order.to(trees[0].device)]
    if type(trees[0]) is list and [len(tree) for tree in trees] == sizes:
        together = [entry for tree in trees for entry in tree]
        return [together[row] for row in order.tolist()]
    simple = isinstance(trees[0], Mapping | tuple | list | str | int | float | None)
    if not (simple or dataclasses.is_dataclass(trees[0])):
        raise TypeError(
            f"A {type(trees[0]).__name__} cannot be put together from parts of a batch: let it return tensors in "
            "a tuple, a mapping or a dataclass, or say output=..."
        )
    return _mapped(lambda *branches: joined(branches, rows), *trees)


def _mapped(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The tree with ``function`` applied to its branches; what has none is left as it is."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        branches = {name: function(*(getattr(each, name) for each in (tree, *others))) for name in names}
        return dataclasses.replace(tree, **branches)
    if isinstance(tree, Mapping):
        result: Any = copy.copy(tree)  # of its own class; one that cannot be written to raises
        for key in tree:
            result[key] = function(tree[key], *(other[key] for other in others))
        return result
    if not _is_list(tree):
        return tree
    items = [function(*entries) for entries in zip(tree, *others, strict=True)]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)

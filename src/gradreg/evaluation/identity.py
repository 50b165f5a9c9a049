"""What a sample, a model and an attack are told by: short texts that stay the same across processes and machines."""

import ctypes
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprints(x: Tensor, y: Tensor) -> list[str]:
    """A text for every sample that depends on its values and its label alone, not on where it stands."""
    kind = f"{x.dtype}{tuple(x.shape[1:])}{y.dtype}{tuple(y.shape[1:])}".encode()
    return [
        hashlib.blake2b(kind + image + label, digest_size=8).hexdigest()
        for image, label in zip(_rows(x), _rows(y), strict=True)
    ]


def keys(samples: Iterable[str]) -> Tensor:
    """The number of every sample that its noise is drawn from."""
    return torch.tensor([int(sample, 16) >> 1 for sample in samples])


def describe_model(model: nn.Module) -> dict[str, str]:
    """The structure of a model, and its weights and buffers, each as a text."""
    state = sorted(model.state_dict().items())
    tensors = [(name, value) for name, value in state if isinstance(value, Tensor)]
    others = [f"{name}={describe(value)}" for name, value in state if not isinstance(value, Tensor)]
    names = " ".join(name for name, _ in tensors)
    structure = f"{type(model).__module__}.{type(model).__qualname__} {_without_addresses(repr(model))}"
    return {
        "the model's structure": hashlib.blake2b(structure.encode(), digest_size=16).hexdigest(),
        "the model's weights": _digest([value for _, value in tensors], size=16, text=" ".join([names, *others])),
    }


def describe(value: Any) -> str:
    """A text that tells configurations apart: equal ones have the same text, in every process."""
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} {_digest([value], size=8)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _call(value, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} " + " ".join(describe_model(value).values())
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)}, {describe(value.args)}, {describe(value.keywords)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{describe(key)}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__code__"):
        return f"{value.__module__}.{value.__qualname__} {_code(value)}"
    if " object at 0x" in repr(value):
        return _call(value, vars(value)) if hasattr(value, "__dict__") else type(value).__qualname__
    return _without_addresses(repr(value))


def _call(value: object, arguments: Mapping[str, Any]) -> str:
    return f"{type(value).__qualname__}({', '.join(f'{name}={describe(item)}' for name, item in arguments.items())})"


def _code(function: Callable[..., Any]) -> str:
    """What tells two functions of one name apart: lambdas of one line, or an edited file."""
    code = function.__code__
    bound = [cell.cell_contents for cell in function.__closure__ or ()] + list(function.__defaults__ or ())
    constants = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
    text = f"{code.co_names} {constants} {describe(bound)}"
    return hashlib.blake2b(code.co_code + text.encode(), digest_size=8).hexdigest()


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _rows(tensor: Tensor) -> Iterator[bytes]:
    """The values of each row, as they lie in memory."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
    return (ctypes.string_at(tensor.data_ptr() + row * size, size) for row in range(len(tensor)))


def _digest(tensors: Iterable[Tensor], *, size: int, text: str = "") -> str:
    """A digest of types, shapes and values."""
    found = hashlib.blake2b(text.encode(), digest_size=size)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        found.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        found.update(ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()))
    return found.hexdigest()

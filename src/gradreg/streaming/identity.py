"""What a sample, a model and an attack are told by: short texts that stay the same across processes and machines."""

import ctypes
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, NoneType
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
    structure = " ".join(f"{name}: {_describe_module(module)}" for name, module in model.named_modules())
    return {
        "the model's structure": _hash(structure, size=16),
        "the model's weights": _digest([value for _, value in tensors], size=16, text=" ".join([names, *others])),
    }


def describe(value: Any) -> str:
    """A text that tells configurations apart: equal ones have the same text, in every process."""
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> str:
    """The text of a value that is part of the values with these ids, which are not described again."""
    if id(value) in inside:
        return f"<{type(value).__qualname__}, {len(inside) - inside.index(id(value))} up>"
    inside = (*inside, id(value))
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} {_digest([value], size=8)}"
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} " + " ".join(describe_model(value).values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__}({_named(fields, inside)})"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(_each([value.func, value.args, value.keywords], inside))})"
    if isinstance(value, Mapping):
        items = zip(_each(value, inside), _each(value.values(), inside), strict=True)
        return f"{{{', '.join(f'{key}: {item}' for key, item in items)}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_each(value, inside)))}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_each(value, inside))})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return f"{_describe(value.__func__, inside)} of {_describe(value.__self__, inside)}"
    if isinstance(value, FunctionType):
        bound = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        parts = [
            _describe_code(value.__code__, inside),
            *_each([bound, value.__defaults__, value.__kwdefaults__], inside),
        ]
        return f"{value.__module__}.{value.__qualname__} {_hash(' '.join(parts), size=8)}"
    if hasattr(value, "tobytes"):  # an array, whose repr leaves most of it out
        return f"{type(value).__qualname__} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')} " + _hash(
            repr(value.tobytes()), size=8
        )
    if " object at 0x" in repr(value):  # which shows nothing but an address
        return f"{type(value).__qualname__}({_named(getattr(value, '__dict__', {}), inside)})"
    return _without_addresses(repr(value))


def _each(values: Iterable[Any], inside: tuple[int, ...]) -> list[str]:
    return [_describe(item, inside) for item in values]


def _named(values: Mapping[str, Any], inside: tuple[int, ...]) -> str:
    return ", ".join(f"{name}={_describe(item, inside)}" for name, item in values.items())


def _describe_code(code: CodeType, inside: tuple[int, ...]) -> str:
    """What tells two functions of one name apart: lambdas of one line, or an edited file."""
    constants = [
        _describe_code(constant, inside) if isinstance(constant, CodeType) else _describe(constant, inside)
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


_PLAIN = (bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.Size, FunctionType, BuiltinFunctionType)


def _describe_module(module: nn.Module) -> str:
    """A module's type, what it prints, and its plain attributes: a forward may depend on a number or a function."""
    compiled = type(module).__module__.startswith("torch._dynamo")  # whose attributes change at the first call
    plain = {
        name: value
        for name, value in sorted(vars(module).items())
        if not compiled and name != "training" and not name.startswith("_") and isinstance(value, _PLAIN)
    }
    printed = _without_addresses(module.extra_repr())
    return f"{type(module).__module__}.{type(module).__qualname__}({printed}) {describe(plain)}"


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the function refers to a name that has no value yet
        return False


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _hash(text: str, *, size: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


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

"""What a trial changes in a model, and how it is put back."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg.modes import random_state, replayed

PutBack = Callable[[], Any]

_SYNCHRONISING = ("require_backward_grad_sync", "require_forward_param_sync")


@contextmanager
def left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what forward passes do to a model and to the random states; keep DDP from communicating."""
    put_back = _remember(model, {})
    parallel = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    attributes = [{name: getattr(ddp, name) for name in (*_SYNCHRONISING, "reducer")} for ddp in parallel]
    try:
        for ddp in parallel:
            vars(ddp).update(dict.fromkeys(_SYNCHRONISING, False), reducer=_Idle())
        with replayed(random_state(device), device):
            yield
    finally:
        for ddp, before in zip(parallel, attributes, strict=True):
            vars(ddp).update(before)
        put_back()


@final
class _Idle:
    """In place of DDP's reducer: after the first step a forward pass has that exchange the layout of its buckets."""

    def _rebuild_buckets(self) -> bool:
        return False


def _remember(value: Any, seen: dict[int, Any]) -> PutBack:
    """The function that gives a value the content back that it has now, and returns it.

    Modules, tensors and containers have content; anything else is only put back in its place.
    """
    if id(value) in seen:  # one that is met twice, or that contains itself: the first meeting sees to it
        return partial(_itself, value)
    if not isinstance(value, nn.Module | Tensor | dict | list | deque | set | tuple):
        return partial(_itself, value)
    seen[id(value)] = value
    if isinstance(value, Tensor):
        has_values = value.layout is torch.strided and not value.is_meta
        return partial(_fill_tensor, value, value.detach().clone()) if has_values else partial(_itself, value)
    if isinstance(value, DistributedDataParallel | torch.jit.ScriptModule):  # the rest is their own affair
        own = {"training": value.training, **value._parameters, **value._buffers, **value._modules}
        return partial(_set_attributes, value, {name: _remember(item, seen) for name, item in own.items()})
    if isinstance(value, nn.Module):
        return partial(_fill_module, value, _remember(vars(value), seen))
    if isinstance(value, dict):
        return partial(_fill_dict, value, {key: _remember(item, seen) for key, item in value.items()})
    return partial(_fill, value, [_remember(item, seen) for item in value])


def _itself(value: Any) -> Any:
    return value


def _fill_tensor(tensor: Tensor, content: Tensor) -> Tensor:
    # Only what changed: a graph that is still alive may have saved the tensor in its present version.
    if not torch.equal(tensor, content):
        with torch.no_grad():
            tensor.copy_(content)
    return tensor


def _set_attributes(module: nn.Module, content: dict[str, PutBack]) -> nn.Module:
    for name, put_back in content.items():
        value = put_back()
        if getattr(module, name) is not value:
            setattr(module, name, value)
    return module


def _fill_module(module: nn.Module, put_back: PutBack) -> nn.Module:
    put_back()
    return module


def _fill_dict(value: dict[Any, Any], content: dict[Any, PutBack]) -> dict[Any, Any]:
    items = {key: put_back() for key, put_back in content.items()}
    value.clear()
    value.update(items)
    return value


def _fill(value: Any, content: list[PutBack]) -> Any:
    """Put the items back into a list, a queue or a set; those of a tuple are there."""
    items = [put_back() for put_back in content]
    if isinstance(value, set):
        value.clear()
        value.update(items)
    elif not isinstance(value, tuple):
        value.clear()
        value.extend(items)
    return value


@contextmanager
def filled(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Small random numbers in place of the values of these parameters."""
    values = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = 0.02 * torch.randn_like(value)
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value

"""What a trial changes in a model, and how it is put back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg.modes import random_state, replayed

_OPAQUE = (DistributedDataParallel, torch.jit.ScriptModule)  # whose attributes are their own affair
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what forward passes do to a model and to the random states; keep DDP from communicating."""
    # Of all buffers, as named_buffers() leaves out those that are None, which a forward pass may fill.
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in buffers]
    flags = [(module, module.training) for module in model.modules()]
    kept = [(module, _kept_in(module)) for module in model.modules() if not isinstance(module, _OPAQUE)]
    parallel = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    synced = [(ddp, ddp.require_backward_grad_sync, ddp.require_forward_param_sync) for ddp in parallel]
    try:
        for ddp in parallel:
            ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False
        with replayed(random_state(device), device):
            yield
    finally:
        for ddp, backward, forward in synced:
            ddp.require_backward_grad_sync, ddp.require_forward_param_sync = backward, forward
        for module, flag in flags:
            module.training = flag
        for owner, before in kept:
            _put_back(owner, before)
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # Only what changed: a graph that is still alive may have saved the buffer in its present version.
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _kept_in(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The tensors, lists and dictionaries in the attributes of a module, and copies of the last two."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    tensors = {name: (value, None) for name, value in own.items() if isinstance(value, Tensor)}
    return tensors | {name: (value, copy.copy(value)) for name, value in own.items() if isinstance(value, list | dict)}


def _put_back(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    for name in _kept_in(module).keys() - before.keys():
        del vars(module)[name]
    for name, (value, content) in before.items():
        vars(module)[name] = value
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict):
            value.clear()
            value.update(content)


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

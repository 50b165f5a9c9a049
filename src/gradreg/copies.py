"""Copies of a model that can be run in this process alone, and leave the model as it is."""

import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


def alone(model: nn.Module, *, precise: bool) -> nn.Module:
    """A copy in which no part waits for other processes, with the same names, in double precision if need be.

    Tensors that it keeps with a graph, which ``deepcopy`` refuses, are without it there.
    """
    parallel = {module: _Alone() for module in model.modules() if isinstance(module, DistributedDataParallel)}
    memo: dict[int, Any] = {id(module): copied for module, copied in parallel.items()}
    with _Severed():
        for module, copied in parallel.items():
            copied.module = copy.deepcopy(module.module, memo)
        net = copy.deepcopy(model, memo)
    return net._apply(promoted) if precise else net


def promoted(values: Tensor) -> Tensor:
    """Numbers in double precision; anything else as it is."""
    if values.is_complex():
        return values.to(torch.complex128)
    return values.double() if values.is_floating_point() else values


@final
class _Severed(TorchFunctionMode):
    """While it is entered, ``deepcopy`` takes a tensor without its graph, rather than refusing one that has a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


@final
class _Alone(nn.Module):
    """What stands for DistributedDataParallel in a copy."""

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

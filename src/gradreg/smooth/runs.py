"""Runs a model so that its operations can be watched: copies of it, in this process alone, all in the same way."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradreg.modes import random_state, replayed
from gradreg.smooth.paths import promoted


class Watch(TorchDispatchMode):
    """Sees every operation of a forward pass, and is told which module begins and ends."""

    def enter(self, name: str) -> None:
        """A module begins, inside the one that runs."""

    def leave(self) -> None:
        """The module that runs ends, also by an exception."""


def run(model: nn.Module, x: Tensor, watch: Watch | None = None) -> Any:
    """Run a copy of a model in double precision if x is, and as it is otherwise; what is outside of it stays.

    Random numbers are drawn as if nothing had been drawn since, those of Python and NumPy included.
    """
    net, x = alone(model, precise=x.dtype == torch.float64), x.clone()  # a model may write to its input
    if watch is None:
        with _same_draws(x.device):
            return net(x)
    for name, module in net.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            _follow(module, name, watch)
    with _same_draws(x.device), watch:
        return net(x)


def alone(model: nn.Module, *, precise: bool) -> nn.Module:
    """A copy in which no part waits for other processes, with the same names, in double precision if need be.

    Tensors that it keeps with a graph, which ``deepcopy`` refuses, are without it there.
    """
    parallel = {module: _Alone() for module in model.modules() if isinstance(module, DistributedDataParallel)}
    memo: dict[int, Any] = {id(module): copied for module, copied in parallel.items()}
    try:
        with _Severed():
            for module, copied in parallel.items():
                copied.training = module.training
                copied.module = copy.deepcopy(module.module, memo)
            net = copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"find_nonsmooth: {type(model).__name__} cannot be copied ({error}), so that it cannot be tried. Leave x "
            "out to survey the code alone."
        ) from error
    return net._apply(promoted) if precise else net


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


def _follow(module: nn.Module, name: str, watch: Watch) -> None:
    def enter(*_: Any) -> None:
        watch.enter(name)

    def leave(*_: Any) -> None:
        watch.leave()

    module.register_forward_pre_hook(enter, prepend=True)  # before any that may raise
    module.register_forward_hook(leave, always_call=True)


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """What is drawn inside the block is drawn again after it."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = numpy and numpy.random.get_state()
    try:
        with replayed(random_state(device), device):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpys)

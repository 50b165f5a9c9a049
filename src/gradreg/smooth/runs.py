"""Runs a model so that its operations can be watched: copies of it, all in the same way."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradreg.copies import alone
from gradreg.modes import random_state, replayed


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
    net, x = _copied(model, precise=x.dtype == torch.float64), x.clone()  # a model may write to its input
    if watch is None:
        with _same_draws(x.device):
            return net(x)
    for name, module in net.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            _follow(module, name, watch)
    with _same_draws(x.device), watch:
        return net(x)


def _copied(model: nn.Module, *, precise: bool) -> nn.Module:
    try:
        return alone(model, precise=precise)
    except Exception as error:
        raise RuntimeError(
            f"find_nonsmooth: {type(model).__name__} cannot be copied ({error}), so that it cannot be tried. Leave x "
            "out to survey the code alone."
        ) from error


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

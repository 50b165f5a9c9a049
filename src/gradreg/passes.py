"""Passes of a training step, counted while it runs."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IN, OUT = 101, 103  # sizes of the probe: primes, which no other product of matrices has

aten = torch.ops.aten


class Cost(NamedTuple):
    """What a training step runs, for each sample of the batch.

    Attributes:
        forward: Forward passes.
        input_backward: Backward passes towards the inputs of layers, on the way to the image or to earlier weights.
        weight_backward: Backward passes towards weights.
        double_backward: Passes forward through a backward pass, for second derivatives.
    """

    forward: float
    input_backward: float
    weight_backward: float
    double_backward: float

    @property
    def natural_steps(self) -> float:
        """In steps without penalty or attack: one pass each of the first three kinds, which all count alike."""
        return sum(self) / 3


class Probe(nn.Module):
    """A model with one more linear layer behind it, which changes nothing: whoever passes it passes the model.

    The factor of 1 behind that layer makes it one in the middle: the gradient that comes to it depends on parameters,
    also where it is that of a logit.

    Args:
        model: The model, with at most 101 logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.weight = nn.Parameter(torch.eye(OUT, IN, device=device))
        self.factor = nn.Parameter(torch.ones(1, device=device))
        self.in_forward = False

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        logits = self.model(x)
        padded = F.pad(logits, (0, IN - logits.shape[1]))
        self.in_forward = True
        try:
            return (padded @ self.weight.T)[:, : logits.shape[1]] * self.factor
        finally:
            self.in_forward = False


class PassCounter(TorchDispatchMode):
    """Counts the samples of each product of matrices in a probe.

    Forward is ``(n, IN) x (IN, OUT)``; towards the input ``(n, OUT) x (OUT, IN)``; towards the weights
    ``(OUT, n) x (n, IN)``. A product of the first kind outside of a forward pass is the derivative of one of the
    second kind: it belongs to double backward, and costs as much as a forward pass.

    Attributes:
        samples: By kind of pass.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.samples: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at every operation."""
        out = func(*args, **(kwargs or {}))
        if func is aten.mm.default and {IN, OUT} <= {*args[0].shape, *args[1].shape}:
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            if inner == OUT:
                self.samples["input_backward"] += rows if columns == IN else columns
            elif inner == IN:
                kind = "forward" if self.probe.in_forward else "double_backward"
                self.samples[kind] += rows if columns == OUT else columns
            else:
                self.samples["weight_backward"] += inner
        else:
            self.other(func, args, kwargs or {}, out)
        return out

    def other(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation that is not the probe's."""


def count(model: nn.Module, run: Callable[[nn.Module], object], samples: int) -> Cost:
    """Passes of a run through a model, for each of so many samples: of a second run, as the first one checks more."""
    probe = Probe(model)
    run(probe)
    with PassCounter(probe) as counter:
        run(probe)
    return Cost(*(counter.samples[kind] / samples for kind in Cost._fields))

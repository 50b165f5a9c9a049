"""Passes and arithmetic of a training step, counted while it runs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

KINDS = ("forward", "to inputs", "to weights", "second")
IN, OUT = 101, 103  # sizes of the probe: primes, which no other product of matrices has

aten = torch.ops.aten
FORMULAS = {  # PyTorch's, and two kernels for the CPU that it does not know
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


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


class StepCounter(TorchDispatchMode):
    """Counts the samples of each product of matrices in a probe, and the operations of all that is not the probe.

    Forward is ``(n, IN) x (IN, OUT)``; towards the input ``(n, OUT) x (OUT, IN)``; towards the weights
    ``(OUT, n) x (n, IN)``. A product of the first kind outside of a forward pass is the derivative of one of the
    second kind: it belongs to double backward, and costs as much as a forward pass.

    Attributes:
        samples: By kind of pass.
        flops: Floating-point operations of convolutions, products of matrices and attention.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.samples: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at every operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten.mm.default and {IN, OUT} <= {*args[0].shape, *args[1].shape}:
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            if inner == OUT:
                self.samples["to inputs"] += rows if columns == IN else columns
            elif inner == IN:
                self.samples["forward" if self.probe.in_forward else "second"] += rows if columns == OUT else columns
            else:
                self.samples["to weights"] += inner
        elif func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


def count(model: nn.Module, run: Callable[[nn.Module], object], samples: int) -> dict[str, float]:
    """Passes of a run through a model, by kind, and its floating-point operations, for each of so many samples."""
    probe = Probe(model)
    with StepCounter(probe) as counter:
        run(probe)
    return {**{kind: counter.samples[kind] / samples for kind in KINDS}, "flops": counter.flops / samples}

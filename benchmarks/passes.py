"""Passes and arithmetic of a training step, counted while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from gradreg.passes import Cost, PassCounter, Probe

KINDS = ("forward", "to inputs", "to weights", "second")  # the fields of Cost, as tables have them

aten = torch.ops.aten
FORMULAS = {  # PyTorch's, and two kernels for the CPU that it does not know
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class StepCounter(PassCounter):
    """Counts the operations of all that is not the probe, too.

    Attributes:
        flops: Floating-point operations of convolutions, products of matrices and attention.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.flops = 0

    def other(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Its floating-point operations, if PyTorch has a formula for them."""
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)


def count(model: nn.Module, run: Callable[[nn.Module], object], samples: int) -> dict[str, float]:
    """Passes of a run through a model, by kind, and its floating-point operations, for each of so many samples."""
    probe = Probe(model)
    with StepCounter(probe) as counter:
        run(probe)
    found = zip(KINDS, (counter.samples[kind] / samples for kind in Cost._fields), strict=True)
    return {**dict(found), "flops": counter.flops / samples}

r"""Layers that are affine in their input: convolutions, linear layers, BatchNorm in evaluation mode.

Of :math:`y = A_w x + b`, with :math:`\bar y` the gradient of some scalar with respect to y, the input gradient
:math:`\bar x = A_w^\top \bar y` is bilinear in w and :math:`\bar y`. So what comes from above when it is
differentiated again, a tensor v of the shape of x, goes on by the layer's own kernels:
:math:`\langle v, A_w^\top \bar y\rangle = \langle A_w v, \bar y\rangle` has the gradient :math:`A_w v` with respect to
:math:`\bar y`, and with respect to w the weight gradient that the layer would have at v in the place of x.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gradreg.second_derivatives.engine import Gradients, asked_for
from gradreg.second_derivatives.entrance import Way

_aten = torch.ops.aten
Mask = tuple[bool, bool, bool]


class AffineLayer(ABC):
    """A layer that is affine in its input x and linear in its weight: what it computes, and its three gradients.

    The statistics are tensors that it takes as they are.
    """

    @abstractmethod
    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        """The output at x."""

    @abstractmethod
    def gradients(
        self, output_gradient: Tensor, x: Tensor, weight: Tensor | None, mask: Mask, *statistics: Tensor
    ) -> Gradients:
        """The gradients with respect to x, weight and bias, as far as the mask asks for them."""

    def linear_part(self, statistics: Sequence[Tensor]) -> Sequence[Tensor]:
        """The statistics of the layer without its constant term (the bias aside)."""
        return statistics


@final
@dataclass(frozen=True)
class Convolution(AffineLayer):
    """``F.conv2d``."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    FEW_CHANNELS: ClassVar[int] = 4

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        return torch.conv2d(x, cast("Tensor", weight), bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, output_gradient: Tensor, x: Tensor, weight: Tensor | None, mask: Mask, *statistics: Tensor
    ) -> Gradients:
        to_x = None
        if mask[0] and self.has_phases(x, cast("Tensor", weight)):
            to_x = self._input_gradient_by_phases(output_gradient, x, cast("Tensor", weight))
            mask = (False, *mask[1:])
        found: Gradients = (None, None, None)
        if any(mask):
            sizes = [output_gradient.shape[1]]
            geometry = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
            found = _aten.convolution_backward(output_gradient, x, weight, sizes, *geometry, mask)
        return found[0] if to_x is None else to_x, *found[1:]

    def has_phases(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the input gradient is faster by phases: on a CPU, that of a stem of few channels, with a stride."""
        strided = self.stride[0] > 1 and self.stride[1] > 1 and self.dilation == (1, 1)
        return strided and self.groups == 1 and weight.shape[1] <= self.FEW_CHANNELS and x.device.type == "cpu"

    def _input_gradient_by_phases(self, output_gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The input gradient by a convolution without stride, for which oneDNN's own needs two to four times as long.

        The pixels of x whose positions leave the same remainder by the stride (a phase) are reached by the same
        entries of the kernel. So each phase is a convolution of the output gradient with these entries, flipped; the
        phases are then interleaved, as by ``F.pixel_shuffle``.
        """
        (rows, columns), (down, right) = self.stride, self.padding
        outputs, channels, height, width = weight.shape
        high, wide = -(-height // rows), -(-width // columns)  # the sizes of the kernel of a phase
        kernel = F.pad(weight, (0, wide * columns - width, 0, high * rows - height))
        kernel = kernel.view(outputs, channels, high, rows, wide, columns).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
        kernel = kernel.reshape(-1, outputs, high, wide)
        phases = torch.conv2d(output_gradient, kernel, padding=(high - 1, wide - 1))
        batch, _, above, across = phases.shape
        phases = phases.view(batch, channels, rows, columns, above, across).permute(0, 1, 4, 2, 5, 3)
        spread = phases.reshape(batch, channels, above * rows, across * columns)
        # Pixels that no kernel reaches, at the lower and right edges, have no gradient.
        missing = [max(0, right + x.shape[3] - spread.shape[3]), max(0, down + x.shape[2] - spread.shape[2])]
        spread = F.pad(spread, (0, missing[0], 0, missing[1]))
        return spread[:, :, down : down + x.shape[2], right : right + x.shape[3]].contiguous()


@final
@dataclass(frozen=True)
class Linear(AffineLayer):
    """``F.linear``."""

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        return F.linear(x, cast("Tensor", weight), bias)

    def gradients(
        self, output_gradient: Tensor, x: Tensor, weight: Tensor | None, mask: Mask, *statistics: Tensor
    ) -> Gradients:
        rows = output_gradient.reshape(-1, output_gradient.shape[-1])
        return (
            output_gradient @ cast("Tensor", weight) if mask[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if mask[1] else None,
            rows.sum(0) if mask[2] else None,
        )


@final
@dataclass(frozen=True)
class FixedNormalization(AffineLayer):
    """``F.batch_norm`` in evaluation mode, which scales each channel; its statistics are the running mean, variance."""

    eps: float

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        mean, variance = statistics
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)

    def gradients(
        self, output_gradient: Tensor, x: Tensor, weight: Tensor | None, mask: Mask, *statistics: Tensor
    ) -> Gradients:
        mean, variance = statistics
        return _aten.native_batch_norm_backward(
            output_gradient, x, weight, mean, variance, None, None, False, self.eps, mask
        )

    def linear_part(self, statistics: Sequence[Tensor]) -> Sequence[Tensor]:
        mean, variance = statistics
        return torch.zeros_like(mean), variance


class Affine(Function):
    """An affine layer, as a function of x, weight and bias.

    Args:
        way: Where nothing but the objective's own leaf is behind x, the way from there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: AffineLayer,
        way: Way | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *statistics: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.way = layer, way
        ctx.save_for_backward(x, weight, *statistics)
        return layer.value(x, weight, bias, *statistics)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        to_x, to_weight, to_bias = asked_for(ctx)[2:5]
        if ctx.way is not None and ctx.way.is_idle(ctx):
            to_x = False
        input_gradient = None
        if to_x and torch.is_grad_enabled():
            input_gradient = _InputGradient.apply(ctx.layer, output_gradient, weight, x, *statistics)
            to_x = False
        found: Gradients = (None, None, None)
        if to_x or to_weight or to_bias:
            mask = (to_x, to_weight, to_bias)
            found = ctx.layer.gradients(output_gradient, x, weight, mask, *statistics)
        found = (found[0] if input_gradient is None else input_gradient, found[1], found[2])
        return None, None, *found, *[None] * len(statistics)


class _InputGradient(Function):
    """The input gradient of an affine layer, as a function of that of its output and of the weight. Of x, the shape."""

    @staticmethod
    def forward(
        ctx: Any, layer: AffineLayer, output_gradient: Tensor, weight: Tensor | None, x: Tensor, *statistics: Tensor
    ) -> Tensor | None:
        ctx.layer = layer
        ctx.save_for_backward(output_gradient, weight, *statistics)
        return layer.gradients(output_gradient, x, weight, (True, False, False), *statistics)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        output_gradient, weight, *statistics = ctx.saved_tensors
        _, to_output_gradient, to_weight, *_ = asked_for(ctx)
        linear, mask = ctx.layer.linear_part(statistics), (False, True, False)
        above = ctx.layer.value(v, weight, None, *linear) if to_output_gradient else None
        beside = ctx.layer.gradients(output_gradient, v, weight, mask, *linear)[1] if to_weight else None
        return None, above, beside, None, *[None] * len(statistics)

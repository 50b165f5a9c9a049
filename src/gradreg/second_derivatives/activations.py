r"""Activations.

Of :math:`y = f(x)`, with :math:`\bar y` the gradient of some scalar with respect to y, the input gradient is
:math:`\bar x = f'(x)\,\bar y`. When it is differentiated again, with v from above, its own gradients are
:math:`f'(x)\,v` and :math:`f''(x)\,v\,\bar y`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gradreg.second_derivatives.engine import asked_for, composed

_aten = torch.ops.aten


class Activation(ABC):
    """A function of every coordinate, with PyTorch's kernels for its value and slope."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x)."""

    @abstractmethod
    def slope(self, factor: Tensor, x: Tensor) -> Tensor:
        """f'(x), times a factor."""

    def slope_of_value(self, factor: Tensor, x: Tensor) -> Tensor:
        """The slope by PyTorch's own derivative of the value, for the kernel itself need not have one."""
        return torch.autograd.grad(self.value(x), x, factor, create_graph=True)[0]

    @abstractmethod
    def curvature(self, factor: Tensor, x: Tensor) -> Tensor:
        """f''(x), times a factor, in memory of its own."""


@final
@dataclass(frozen=True)
class GELU(Activation):
    r""":math:`f(x) = x\Phi(x)`, so that :math:`f''(x) = (2 - x^2)\,\varphi(x)` with the normal density."""

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def slope(self, factor: Tensor, x: Tensor) -> Tensor:
        return _aten.gelu_backward(factor, x)

    def curvature(self, factor: Tensor, x: Tensor) -> Tensor:
        # As 2^u with u = -x²/2 · log2(e), whose kernel is four times as fast as that of e^u on a CPU; then
        # 2 - x² = 2 (1 + u ln 2). Four passes over memory, for which addcmul carries the constants.
        zero, x = x.new_zeros(()), _in_range(x)
        u = torch.addcmul(zero, x, x, value=-0.5 * math.log2(math.e))
        density = u.exp2()
        density.addcmul_(density, u, value=math.log(2))
        return torch.addcmul(zero, density, factor, value=2 / math.sqrt(2 * math.pi), out=density)


@final
@dataclass(frozen=True)
class TanhGELU(Activation):
    r""":math:`f(x) = \frac x2 (1 + t)` with :math:`t = \tanh(a x + b x^3)`.

    Here :math:`a = \sqrt{2 / \pi}` and :math:`b = 0.044715\,a`. With the derivative :math:`d = a + 3 b x^2` of tanh's
    argument, :math:`f''(x) = (1 - t^2)\,(2 d - a - x t d^2)`.
    """

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def slope(self, factor: Tensor, x: Tensor) -> Tensor:
        return _aten.gelu_backward(factor, x, approximate="tanh")

    def curvature(self, factor: Tensor, x: Tensor) -> Tensor:
        a = math.sqrt(2 / math.pi)
        b = 0.044715 * a
        x = _in_range(x)
        linear = x.new_full((), a)
        t = torch.addcmul(linear, x, x, value=b).mul_(x).tanh_()
        d = torch.addcmul(linear, x, x, value=3 * b)
        bend = torch.mul(x, t).mul_(d).mul_(d)
        return _aten.tanh_backward(factor, t).mul_(d.mul_(2).sub_(a).sub_(bend))


@final
@dataclass(frozen=True)
class SiLU(Activation):
    r""":math:`f(x) = x\sigma(x)`, so that :math:`f''(x) = \sigma(1 - \sigma)\,(2 + x - 2 x\sigma)`."""

    def value(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def slope(self, factor: Tensor, x: Tensor) -> Tensor:
        return _aten.silu_backward(factor, x)

    def curvature(self, factor: Tensor, x: Tensor) -> Tensor:
        sigmoid = x.sigmoid()
        return _aten.sigmoid_backward(factor, sigmoid).mul_(torch.addcmul(x, x, sigmoid, value=-2).add_(2))


class Activated(Function):
    """An activation, as a function of x."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, x: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return activation.value(x)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, _Slope.apply(ctx.activation, output_gradient, x)
        return None, ctx.activation.slope(output_gradient, x)


class _Slope(Function):
    """The input gradient of an activation, as a function of that of its output and of x."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, output_gradient: Tensor, x: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(output_gradient, x)
        return activation.slope(output_gradient, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        output_gradient, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *composed(ctx.activation.slope_of_value, (output_gradient, x), v)
        _, to_output_gradient, to_x = asked_for(ctx)
        return (
            None,
            ctx.activation.slope(v, x) if to_output_gradient else None,
            ctx.activation.curvature(v, x).mul_(output_gradient) if to_x else None,
        )


def _in_range(x: Tensor) -> Tensor:
    """x, where its square would overflow kept to where a GELU has no curvature left: 0 times infinity is NaN."""
    return x.clamp(-16, 16) if x.dtype == torch.float16 else x

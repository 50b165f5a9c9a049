"""LayerNorm, whose input gradient depends on the input."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gradreg.second_derivatives.engine import Gradients, asked_for, composed

_aten = torch.ops.aten


class LayerNorm(Function):
    """``F.layer_norm``, as a function of x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, shape: Sequence[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        value, mean, rstd = _aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return value

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        to_x, to_weight, to_bias = asked_for(ctx)[2:]
        input_gradient = None
        if to_x and torch.is_grad_enabled():
            input_gradient = _Slope.apply(ctx.shape, ctx.eps, output_gradient, x, weight, mean, rstd)
            to_x = False
        found: Gradients = (None, None, None)
        if torch.is_grad_enabled() and (to_weight or to_bias):  # to be differentiated again
            to_affine = composed(partial(layer_norm_by_formula, ctx.shape, ctx.eps), (x, weight, bias), output_gradient)
            return None, None, input_gradient, *to_affine[1:]
        if to_x or to_weight or to_bias:
            inputs, mask = (output_gradient, x, ctx.shape, mean, rstd, weight, bias), (to_x, to_weight, to_bias)
            found = _aten.native_layer_norm_backward(*inputs, mask)
        return None, None, found[0] if input_gradient is None else input_gradient, *found[1:]


class _Slope(Function):
    r"""The input gradient of LayerNorm, as a function of that of its output, of x and of the weight w.

    Over the D normalised coordinates of one sample, with :math:`\hat x = (x - \mu) r`, means :math:`E`, and
    :math:`P a = a - E[a] - \hat x\,E[a \hat x]` (which is symmetric), the input gradient is
    :math:`\bar x = r P(w \bar y)`. For v from above let :math:`z = r P v`, the input gradient that a layer without
    weight has for v. Then :math:`\langle v, \bar x\rangle` has the gradients

    .. math:: w z \;(\text{to } \bar y), \qquad \sum \bar y z \;(\text{to } w), \qquad
              -r\,\big(E[v \bar x]\,\hat x + E[w \bar y \hat x]\,z + E[v \hat x]\,\bar x\big) \;(\text{to } x),

    the last because :math:`\partial r / \partial x = -r^2 \hat x / D` and
    :math:`\nabla_x \langle a, \hat x\rangle = r P a`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shape: Sequence[int],
        eps: float,
        output_gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        ctx.shape, ctx.eps = shape, eps
        ctx.save_for_backward(output_gradient, x, weight, mean, rstd)
        return _slope(shape, output_gradient, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        output_gradient, x, weight, mean, rstd = ctx.saved_tensors
        shape = ctx.shape
        if torch.is_grad_enabled():
            inputs = (output_gradient, x, weight)
            slope = partial(_slope_of_x, shape, ctx.eps)
            return None, None, *composed(slope, inputs, v), None, None
        _, _, to_output_gradient, to_x, to_weight, *_ = asked_for(ctx)
        leading = tuple(range(x.ndim - len(shape)))
        z = _slope(shape, v, x, None, mean, rstd)
        above = None
        if to_output_gradient:
            above = z if weight is None else z * weight
        below = _curvature(shape, output_gradient, x, weight, mean, rstd, v, z) if to_x else None
        beside = (z * output_gradient).sum(leading) if to_weight else None
        return None, None, above, below, beside, None, None


def _curvature(
    shape: Sequence[int],
    output_gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    v: Tensor,
    z: Tensor,
) -> Tensor:
    """The gradient with respect to x of the scalar product of v and the input gradient of LayerNorm."""
    normalized = tuple(range(x.ndim - len(shape), x.ndim))

    def along(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).mean(normalized, keepdim=True).mul_(rstd).neg_()

    normal = (x - mean).mul_(rstd)
    weighted = output_gradient if weight is None else output_gradient * weight
    input_gradient = _slope(shape, output_gradient, x, weight, mean, rstd)
    with_v, with_weighted = along(v, normal), along(weighted, normal)
    return normal.mul_(along(v, input_gradient)).addcmul_(z, with_weighted).addcmul_(input_gradient, with_v)


def layer_norm_by_formula(
    shape: Sequence[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """LayerNorm by its formula, which has all derivatives."""
    normalized = tuple(range(x.ndim - len(shape), x.ndim))
    centred = x - x.mean(normalized, keepdim=True)
    normal = centred * (centred.square().mean(normalized, keepdim=True) + eps).rsqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def _slope_of_x(shape: Sequence[int], eps: float, output_gradient: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """The input gradient by its formula: PyTorch's third derivative takes mean and standard deviation for constants."""
    normalized = tuple(range(x.ndim - len(shape), x.ndim))
    centred = x - x.mean(normalized, keepdim=True)
    rstd = (centred.square().mean(normalized, keepdim=True) + eps).rsqrt()
    normal, weighted = centred * rstd, output_gradient if weight is None else output_gradient * weight
    along = (weighted * normal).mean(normalized, keepdim=True)
    return rstd * (weighted - weighted.mean(normalized, keepdim=True) - normal * along)


def _slope(
    shape: Sequence[int], output_gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """The input gradient of LayerNorm."""
    mask = (True, False, False)
    return _aten.native_layer_norm_backward(output_gradient, x, shape, mean, rstd, weight, None, mask)[0]

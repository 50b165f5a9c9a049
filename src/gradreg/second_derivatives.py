r"""Second derivatives of a model's layers that cost less than those PyTorch derives by itself.

A penalty on the input gradient differentiates the backward pass. PyTorch has one fused kernel for the derivative of
each layer, but composes the second derivative of many of them from elementary operations, each of which reads and
writes whole tensors: some 20 for GELU, 25 for LayerNorm. A convolution's it takes by convolving with images as
kernels. While :class:`SecondDerivatives` is entered, calls of these layers compute the same values and derivatives
by functions whose second derivatives are written out here.

Two facts carry the module. Let :math:`\bar y` be the gradient of some scalar with respect to a layer's output.

*Affine layers.* Of :math:`y = A_w x + b` the input gradient :math:`\bar x = A_w^\top \bar y` is bilinear in w and
:math:`\bar y`. So what reaches the backward pass from above, a tensor v of the shape of x, is differentiated by the
layer's own kernels: :math:`\langle v, A_w^\top \bar y\rangle = \langle A_w v, \bar y\rangle` has the gradient
:math:`A_w v` with respect to :math:`\bar y`, and with respect to w the weight gradient that the layer has at v in the
place of x. Convolutions, linear layers and BatchNorm in evaluation mode are such.

*Activations.* Of :math:`y = f(x)` the input gradient is :math:`\bar x = f'(x)\,\bar y`, whose own gradients are
:math:`f'(x)\,v` and :math:`f''(x)\,v\,\bar y`.

Third derivatives are right too, and take PyTorch's way.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.overrides import TorchFunctionMode

from gradreg.gradients import in_transform, new_nodes

_aten = torch.ops.aten
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Mask = tuple[bool, bool, bool]


# Affine layers


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

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor) -> Tensor:
        return torch.conv2d(x, cast("Tensor", weight), bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, output_gradient: Tensor, x: Tensor, weight: Tensor | None, mask: Mask, *statistics: Tensor
    ) -> Gradients:
        if mask == (True, False, False) and x.device.type == "cpu" and self._has_phases(cast("Tensor", weight)):
            return self._input_gradient_by_phases(output_gradient, x, cast("Tensor", weight)), None, None
        sizes = [output_gradient.shape[1]]
        geometry = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        return _aten.convolution_backward(output_gradient, x, weight, sizes, *geometry, mask)

    def _has_phases(self, weight: Tensor) -> bool:
        """Whether :meth:`_input_gradient_by_phases` pays: for a stem, of one or three channels, that has a stride."""
        strided = self.stride[0] > 1 and self.stride[1] > 1
        return strided and self.groups == 1 and self.dilation == (1, 1) and weight.shape[1] <= 4

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


class _Affine(Function):
    """An affine layer, as a function of x, weight and bias.

    ``first`` says that only the objective's own leaf is behind x. Its gradient is what the inner pass is after, but no
    later one: that would be the most expensive gradient of many a first layer, which has the largest images.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: AffineLayer, first: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *statistics: Tensor
    ) -> Tensor:
        ctx.layer, ctx.first = layer, first
        ctx.save_for_backward(x, weight, *statistics)
        return layer.value(x, weight, bias, *statistics)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        mask = cast("Mask", _asked_for(ctx)[2:5])
        inner = torch.is_grad_enabled()  # a pass that is differentiated again is the inner one, or may have it inside
        if ctx.first and not inner:
            mask = (False, *mask[1:])
        elif mask[0] and inner:
            input_gradient = _InputGradient.apply(ctx.layer, output_gradient, weight, x, *statistics)
            others: Gradients = (None, None, None)
            if any(mask[1:]):
                others = ctx.layer.gradients(output_gradient, x, weight, (False, *mask[1:]), *statistics)
            return None, None, input_gradient, *others[1:], *[None] * len(statistics)
        gradients = ctx.layer.gradients(output_gradient, x, weight, mask, *statistics) if any(mask) else [None] * 3
        return None, None, *gradients, *[None] * len(statistics)


class _InputGradient(Function):
    """The input gradient of an affine layer, as a function of that of its output and of the weight. Of x, the shape."""

    @staticmethod
    def forward(
        ctx: Any, layer: AffineLayer, output_gradient: Tensor, weight: Tensor, x: Tensor, *statistics: Tensor
    ) -> Tensor | None:
        ctx.layer = layer
        ctx.save_for_backward(output_gradient, weight, *statistics)
        return layer.gradients(output_gradient, x, weight, (True, False, False), *statistics)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        output_gradient, weight, *statistics = ctx.saved_tensors
        _, to_output_gradient, to_weight, *_ = _asked_for(ctx)
        statistics = ctx.layer.linear_part(statistics)
        return (
            None,
            ctx.layer.value(v, weight, None, *statistics) if to_output_gradient else None,
            ctx.layer.gradients(output_gradient, v, weight, (False, True, False), *statistics)[1]
            if to_weight
            else None,
            None,
            *[None] * len(statistics),
        )


# Activations


class Activation(ABC):
    """A function of every coordinate, with PyTorch's kernels for its value and slope."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x)."""

    @abstractmethod
    def slope(self, factor: Tensor, x: Tensor) -> Tensor:
        """f'(x), times a factor."""

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
    r""":math:`f(x) = \frac x2 (1 + t)` with :math:`t = \tanh(a x + b x^3)`, :math:`a = \sqrt{2/\pi}`, :math:`b = 0.044715\,a`.

    With :math:`d = a + 3 b x^2`, the derivative of tanh's argument,

    .. math:: f''(x) = (1 - t^2)\,(2 d - a - x t d^2).
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


class _Activated(Function):
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
            return None, *_composed(ctx.activation.slope, (output_gradient, x), v)
        _, to_output_gradient, to_x = _asked_for(ctx)
        return (
            None,
            ctx.activation.slope(v, x) if to_output_gradient else None,
            ctx.activation.curvature(v, x).mul_(output_gradient) if to_x else None,
        )


def _in_range(x: Tensor) -> Tensor:
    """x, where its square would overflow kept to where a GELU has no curvature left: 0 times infinity is NaN."""
    return x.clamp(-16, 16) if x.dtype == torch.float16 else x


# LayerNorm


class _LayerNorm(Function):
    """``F.layer_norm``, as a function of x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, shape: Sequence[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        value, mean, rstd = _aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return value

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        mask = _asked_for(ctx)[2:]
        input_gradient = None
        if mask[0] and torch.is_grad_enabled():
            input_gradient = _LayerNormSlope.apply(ctx.shape, output_gradient, x, weight, mean, rstd)
            mask[0] = False
        found = [None] * 3
        if any(mask):
            statistics = (ctx.shape, mean, rstd)
            found = _aten.native_layer_norm_backward(output_gradient, x, *statistics, weight, bias, mask)
        return None, None, found[0] if input_gradient is None else input_gradient, *found[1:]


class _LayerNormSlope(Function):
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
        output_gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(output_gradient, x, weight, mean, rstd)
        return _layer_norm_slope(shape, output_gradient, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        output_gradient, x, weight, mean, rstd = ctx.saved_tensors
        shape = ctx.shape
        if torch.is_grad_enabled():

            def slope(*inputs: Tensor) -> Tensor:
                return _layer_norm_slope(shape, *inputs[:2], inputs[2] if len(inputs) > 2 else None, mean, rstd)

            inputs = (output_gradient, x) if weight is None else (output_gradient, x, weight)
            gradients = _composed(slope, inputs, v)
            return None, *gradients, *[None] * (5 - len(gradients))
        _, to_output_gradient, to_x, to_weight, *_ = _asked_for(ctx)
        normalized = tuple(range(x.ndim - len(shape), x.ndim))
        leading = tuple(range(x.ndim - len(shape)))
        z = _layer_norm_slope(shape, v, x, None, mean, rstd)
        gradient = None
        if to_x:
            x_hat = (x - mean).mul_(rstd)
            weighted = output_gradient if weight is None else output_gradient * weight
            input_gradient = _layer_norm_slope(shape, output_gradient, x, weight, mean, rstd)
            over, flipped = dict(dim=normalized, keepdim=True), -rstd
            with_z, with_input_gradient = (weighted * x_hat).mean(**over), (v * x_hat).mean(**over)
            gradient = x_hat.mul_((v * input_gradient).mean(**over).mul_(flipped))
            gradient.addcmul_(z, with_z.mul_(flipped))
            gradient.addcmul_(input_gradient, with_input_gradient.mul_(flipped))
        return (
            None,
            (z if weight is None else z * weight) if to_output_gradient else None,
            gradient,
            (z * output_gradient).sum(leading) if to_weight else None,
            None,
            None,
        )


def _layer_norm_slope(
    shape: Sequence[int], output_gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """The input gradient of LayerNorm."""
    mask = (True, False, False)
    return _aten.native_layer_norm_backward(output_gradient, x, shape, mean, rstd, weight, None, mask)[0]


# What the functions share


def _asked_for(ctx: Any) -> list[bool]:
    """Which inputs of a function a backward pass wants gradients of.

    ``ctx.needs_input_grad`` tells which require grad; the engine knows which of these lead to what the pass is after:
    in the inner pass the input alone. PyTorch's own nodes look that up too.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the inputs that require grad, in order
    return [needed and _will_run(next(nodes)) for needed in ctx.needs_input_grad]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for by name
        return True


def _composed(function: Callable[..., Tensor], inputs: Sequence[Tensor], v: Tensor) -> list[Tensor | None]:
    """PyTorch's own gradients of <v, function(inputs)>, which can be differentiated again."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, v, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


# The calls


@final
class SecondDerivatives(TorchFunctionMode):
    """While it is entered, calls of the layers above are differentiated twice by the functions above.

    Calls that it does not know, and tensors that are more than tensors (sharded ones, say), are left to PyTorch; so is
    what runs inside transforms, compiled regions, or under hooks on saved tensors: checkpointing runs a function again
    outside of this mode, and must find that it saved the same.

    Args:
        leaf: The tensor whose gradient is taken, which nobody else has.
    """

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self._leaf = leaf

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = _CALLS.get(func)
        if call is not None and _may_replace():
            result = call(self._leaf, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _may_replace() -> bool:
    """Whether functions written in Python do here what PyTorch's do."""
    return not (
        in_transform()
        or not torch.is_grad_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or forward_ad._current_level >= 0
    )


def _suits(x: object, *others: object) -> bool:
    """Whether x is a plain tensor of real numbers with a gradient, and the others are plain or None."""
    plain = all(
        tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided)
        for tensor in (x, *others)
    )
    return plain and isinstance(x, Tensor) and x.requires_grad and x.is_floating_point() and x.numel() > 0


def _is_first(x: Tensor, leaf: Tensor) -> bool:
    """Whether nothing but the leaf is behind x: at most a few operations, such as a normalisation."""
    pending, found = [x.grad_fn], 0
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        found += 1
        if node is None or found > 16 or (variable is not None and variable is not leaf):
            return False
        pending += [used for used, _ in node.next_functions if used is not None]
    return True


def _under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to convolutions and linear layers."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _conv2d(
    leaf: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if not _suits(input, weight, bias) or input.ndim != 4 or padding == "same":
        return None
    layer = Convolution(_pair(stride), _pair(0 if padding == "valid" else padding), _pair(dilation), groups)
    return _Affine.apply(layer, _is_first(input, leaf), *_under_autocast(input, weight, bias))


def _linear(leaf: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    # PyTorch's second derivative is as good. Only the input gradient of a first layer is one too many.
    if not _suits(input, weight, bias) or not _is_first(input, leaf):
        return None
    return _Affine.apply(Linear(), True, *_under_autocast(input, weight, bias))


def _batch_norm(
    leaf: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or not _suits(input, running_mean, running_var, weight, bias):
        return None
    return _Affine.apply(FixedNormalization(eps), _is_first(input, leaf), input, weight, bias, running_mean, running_var)


def _layer_norm(
    leaf: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _suits(input, weight, bias):
        return None
    if any(tensor is not None and tensor.dtype != input.dtype for tensor in (weight, bias)):
        return None  # autocast
    return _LayerNorm.apply(tuple(normalized_shape), eps, input, weight, bias)


def _gelu(leaf: Tensor, input: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor | None:
    activation = TanhGELU() if approximate == "tanh" else GELU()
    return _Activated.apply(activation, input) if _suits(input) else None


def _silu(leaf: Tensor, input: Tensor, inplace: bool = False) -> Tensor | None:
    return _Activated.apply(SiLU(), input) if _suits(input) and not inplace else None


_CALLS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.silu: _silu,
}

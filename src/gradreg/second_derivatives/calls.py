"""The function mode that exchanges calls of layers, and which calls it exchanges.

The functions below have the signatures of PyTorch's, after the entrance of the model, and return None for what is left
to PyTorch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gradreg.gradients import in_transform
from gradreg.second_derivatives.activations import GELU, Activated, SiLU, TanhGELU
from gradreg.second_derivatives.affine import Affine, Convolution, FixedNormalization, Linear
from gradreg.second_derivatives.entrance import Entrance
from gradreg.second_derivatives.layer_norm import LayerNorm

# A function written in Python costs some 20 microseconds in each of the four passes. With fewer elements, or fewer
# products of a convolution, that is more than it saves (measured on a CPU: `docs/double-backward.md`).
_LEAST_ELEMENTS = 2**16
_LEAST_PRODUCTS = 2**22
_LEAST_PRODUCTS_OF_A_STEM = 2**19


class ExchangedCalls(TorchFunctionMode):
    """While it is entered, calls of some layers are those of functions of this package.

    Calls that it does not know or that are too small to gain, and tensors that are more than tensors (sharded ones,
    say), are left to PyTorch; so is what runs inside transforms, compiled regions, or under hooks on saved tensors:
    checkpointing runs a function again outside of this mode, and must find that it saved the same.

    Args:
        leaf: The tensor whose gradient is taken, which nobody else has.
        exchanged: For a function of PyTorch, the one that is called in its place, with the entrance of the model before
            its arguments.
    """

    def __init__(self, leaf: Tensor, exchanged: Mapping[Callable[..., Any], Callable[..., Tensor | None]]) -> None:
        super().__init__()
        self._entrance = Entrance(leaf)
        self._exchanged = exchanged

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():  # a compiler, which runs this, too, cannot follow weak references
            self._entrance.see(args)
            if kwargs:
                self._entrance.see(kwargs.values())
        call = self._exchanged.get(func)
        if call is not None:
            result = call(self._entrance, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _may_replace() -> bool:
    """Whether functions written in Python do here what PyTorch's do."""
    eager = torch.is_grad_enabled() and not in_transform() and forward_ad._current_level < 0
    return eager and not _saves_are_hooked()


def _saves_are_hooked() -> bool:
    """Whether hooks act on what is saved for a backward pass; PyTorch before 2.8 cannot tell."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


def _suits(x: object, *others: object) -> bool:
    """Whether x is a plain tensor of real numbers with a gradient, and the others are plain or None."""
    if not _is_plain(x) or not x.requires_grad:
        return False
    return all(other is None or _is_plain(other) for other in others) and _may_replace()


def _is_plain(tensor: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor of real numbers and nothing more: no shard, no quantised or sparse one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    tensor = cast("Tensor", tensor)
    return tensor.layout == torch.strided and tensor.is_floating_point() and tensor.numel() > 0


def _is_large(x: Tensor) -> bool:
    """Whether a layer that passes over memory is worth a function of its own."""
    return isinstance(x, Tensor) and x.numel() >= _LEAST_ELEMENTS


def _convolution_pays(layer: Convolution, x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's second derivative of a convolution is the slower one, or its input gradient.

    It is as good for kernels of one pixel without stride, and better for large kernels in groups, for whose weight
    gradient oneDNN has no fast kernel.
    """
    outputs, _, height, width = weight.shape
    products = x.numel() * outputs * height * width / (layer.groups * layer.stride[0] * layer.stride[1])
    if layer.has_phases(x, weight):
        return products >= _LEAST_PRODUCTS_OF_A_STEM
    if height * width == 1 and layer.stride == (1, 1):
        return False
    if layer.groups > 1 and height * width > 9:
        return False
    return products >= _LEAST_PRODUCTS


def _stem(entrance: Entrance, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    few = isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[1] <= Convolution.FEW_CHANNELS
    few = few and isinstance(input, Tensor) and input.numel() * weight.numel() >= _LEAST_PRODUCTS_OF_A_STEM
    return _conv2d(entrance, input, weight, *args, only_stems=True, **kwargs) if few else None


def _under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to convolutions and linear layers."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) * (2 // len(value)) if isinstance(value, Sequence) else (int(value), int(value))


def _conv2d(
    entrance: Entrance,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    only_stems: bool = False,
) -> Tensor | None:
    if padding == "same" or not isinstance(input, Tensor) or input.ndim != 4:
        return None
    layer = Convolution(_pair(stride), _pair(0 if padding == "valid" else padding), _pair(dilation), groups)
    if not _convolution_pays(layer, input, weight) or (only_stems and not layer.has_phases(input, weight)):
        return None
    if not _suits(input, weight, bias):
        return None
    return Affine.apply(layer, entrance.way_to(input), *_under_autocast(input, weight, bias))


def _linear(entrance: Entrance, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    # PyTorch's second derivative is as good. Only the input gradient of a first layer is one too many.
    if not isinstance(input, Tensor) or weight.ndim != 2 or input.numel() * len(weight) < _LEAST_PRODUCTS:
        return None
    if not _suits(input, weight, bias):
        return None
    way = entrance.way_to(input)
    if way is None:
        return None
    return Affine.apply(Linear(), way, *_under_autocast(input, weight, bias))


def _batch_norm(
    entrance: Entrance,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or not _is_large(input):
        return None
    if not _suits(input, running_mean, running_var, weight, bias):
        return None
    return Affine.apply(FixedNormalization(eps), entrance.way_to(input), input, weight, bias, running_mean, running_var)


def _layer_norm(
    entrance: Entrance,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _is_large(input) or not _suits(input, weight, bias):
        return None
    mixed = any(tensor is not None and tensor.dtype != input.dtype for tensor in (weight, bias))
    if mixed or (torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float32):
        return None  # whose types are those of autocast, which are not the same on every device
    return LayerNorm.apply(tuple(normalized_shape), eps, input, weight, bias)


def _gelu(entrance: Entrance, input: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor | None:
    if not _is_large(input) or not _suits(input):
        return None
    return Activated.apply(TanhGELU() if approximate == "tanh" else GELU(), input)


def _silu(entrance: Entrance, input: Tensor, inplace: bool = False) -> Tensor | None:
    return Activated.apply(SiLU(), input) if not inplace and _is_large(input) and _suits(input) else None


def _register_hook(entrance: Entrance, tensor: Tensor, *hook: Any, **named: Any) -> None:
    if not torch.compiler.is_compiling():
        entrance.see_hook(tensor)


_DIFFERENTIATED_TWICE: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    Tensor.register_hook: _register_hook,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.silu: _silu,
}

# For layers that are differentiated twice: convolutions, normalisations, GELU, SiLU, a first linear layer.
SecondDerivatives = partial(ExchangedCalls, exchanged=_DIFFERENTIATED_TWICE)
# For layers that are differentiated once: convolutions of an image, whose input gradient is slow on a CPU.
FirstDerivatives = partial(ExchangedCalls, exchanged={F.conv2d: _stem, Tensor.register_hook: _register_hook})

"""What is not smooth in PyTorch, and what takes its place.

One table holds every operation under the name of its function (``"relu"``), with what is wrong with it; module classes,
functions and tensor methods are looked up in it alike, so that ``nn.ReLU``, ``F.relu`` and ``x.relu_()`` are one thing.
A gate (Hardsigmoid, Hardtanh, Hardswish) has a smooth twin of its own: a GELU in its place would let values out of the
gate's range and destroy the features. So has the kernel of a linear attention, which divides by a sum of its values: it
has to stay positive. Everything else becomes the activation that the user chose.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    # With this beta the second derivative at 0, beta / 4, is that of GELU, sqrt(2 / pi). With torch's default of 1
    # the output at 0 is 0.69 instead of 0.22, and activations add up over the layers of a network trained with ReLU.
    "softplus": functools.partial(nn.Softplus, beta=4 * math.sqrt(2 / math.pi)),
    "mish": nn.Mish,
}


@final
@dataclass(frozen=True)
class Operation:
    """A function that is not twice continuously differentiable.

    Attributes:
        reason: What is wrong with it.
        fix: What to do about it.
        flat: Whether its second derivative is zero almost everywhere.
        replaceable: Whether :func:`twin` puts something in its place.
    """

    reason: str
    fix: str
    flat: bool = False
    replaceable: bool = False


_FLAT = "its second derivative is zero almost everywhere, so that a gradient penalty cannot act through it"
_SMOOTHIFY = "Train smoothify(model)."
BY_HAND = "Put a smooth activation in its place by hand."
MAY_STAY = "It may stay: max pooling cost a smooth network no robustness where that was measured (docs/smoothness.md)."
OFF_THE_WAY = "Take it off the way from x, or give it a straight-through gradient."
_POOL = Operation(
    "its derivative jumps where the maximum changes place; milder than a ReLU, since it only selects", MAY_STAY
)
_SELECTION = Operation(
    "its derivative jumps where the choice changes; milder than a ReLU, since it only selects", MAY_STAY
)
_ABS = Operation(
    "its derivative jumps at 0: a ReLU in disguise if it is an activation, harmless as part of a norm",
    "As part of a norm it may stay; as an activation, put a smooth one in its place by hand.",
)
_STEP = Operation("a step function, its derivative is zero", OFF_THE_WAY)
_CLAMP = Operation(
    "a ReLU by hand if it limits an activation, harmless if it limits a parameter or guards a division",
    "As a guard it may stay; as an activation, write it as F.relu or F.hardtanh, which smoothify replaces.",
)

OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(
        ("relu", "relu6", "leaky_relu", "rrelu", "hardtanh", "hardsigmoid"),
        Operation(_FLAT, _SMOOTHIFY, flat=True, replaceable=True),
    ),
    **dict.fromkeys(("selu", "hardswish", "hardmish"), Operation("its derivative jumps", _SMOOTHIFY, replaceable=True)),
    "elu": Operation("its derivative jumps, or for alpha = 1 its second derivative does", _SMOOTHIFY, replaceable=True),
    "celu": Operation("its second derivative jumps", _SMOOTHIFY, replaceable=True),
    "prelu": Operation(
        f"{_FLAT}; its slope is a parameter, and replacing it would change the state_dict", BY_HAND, flat=True
    ),
    **dict.fromkeys(
        ("softshrink", "hardshrink", "threshold"), Operation(f"{_FLAT}; it has no smooth twin", BY_HAND, flat=True)
    ),
    "softsign": Operation("its second derivative jumps; it has no smooth twin", BY_HAND),
    **{f"{prefix}max_pool{d}d": _POOL for prefix in ("", "adaptive_", "fractional_") for d in (1, 2, 3)},
    **dict.fromkeys(("amax", "amin", "max", "min", "topk", "kthvalue", "median", "sort", "msort"), _SELECTION),
    **dict.fromkeys(("cummax", "cummin"), _SELECTION),
    **dict.fromkeys(("abs", "absolute"), _ABS),
    **dict.fromkeys(("round", "sign", "sgn", "floor", "ceil", "trunc", "heaviside", "remainder", "fmod"), _STEP),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin"), _CLAMP),
}

# What the functions are called below autograd, where that is something else.
BELOW: dict[str, frozenset[str]] = {
    name: frozenset(operations.split())
    for name, operations in {
        "hardtanh": "hardtanh relu6 hardsigmoid hardswish",
        "elu": "elu selu celu",
        "leaky_relu": "leaky_relu rrelu",
        "rrelu_with_noise": "rrelu",
        "_prelu_kernel": "prelu",
        "abs": "abs absolute softsign",
        "clamp": "clamp clip hardmish",
        "clamp_min": "clamp clip clamp_min",
        "clamp_max": "clamp clip clamp_max",
        "max_pool1d_with_indices": "max_pool1d",
        "max_pool2d_with_indices": "max_pool1d max_pool2d",
        "max_pool3d_with_indices": "max_pool3d",
        "adaptive_max_pool2d": "adaptive_max_pool1d adaptive_max_pool2d",
    }.items()
}

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.RReLU: "rrelu",
    nn.Hardtanh: "hardtanh",
    nn.Hardsigmoid: "hardsigmoid",
    nn.SELU: "selu",
    nn.Hardswish: "hardswish",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.PReLU: "prelu",
    nn.Softshrink: "softshrink",
    nn.Hardshrink: "hardshrink",
    nn.Threshold: "threshold",
    nn.Softsign: "softsign",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
    nn.FractionalMaxPool2d: "fractional_max_pool2d",
    nn.FractionalMaxPool3d: "fractional_max_pool3d",
}
KERNELS = frozenset({"kernel_func"})  # the attributes that hold the kernel of a linear attention, in timm
_TIMM_GATES = {"HardSigmoid": "hardsigmoid", "HardSwish": "hardswish", "HardMish": "hardmish"}


def _functions(suffix: str) -> Iterator[tuple[Callable[..., Any], str]]:
    for operation in OPERATIONS:
        for owner in (F, torch, Tensor):
            if hasattr(owner, operation + suffix):
                yield getattr(owner, operation + suffix), operation


IN_PLACE: dict[Callable[..., Any], str] = dict(_functions("_"))
FUNCTIONS: dict[Callable[..., Any], str] = {**dict(_functions("")), **IN_PLACE}


def operation_of(kind: type) -> str | None:
    """The operation that a class of modules computes; None if it is not in the table, or has a forward of its own."""
    if kind.__module__.startswith("timm.") and (gate := _TIMM_GATES.get(kind.__name__.removesuffix("Me"))):
        return gate
    # What stands in the table is a module, and so is a class derived from it: both have a forward.
    bases = (base for base in kind.__mro__ if base in _MODULES and kind.forward is base.forward)  # type: ignore[attr-defined]
    return next((_MODULES[base] for base in bases), None)


@final
class ScaledTanh(nn.Module):
    """A hyperbolic tangent between two limits, with slope 1 half-way: the smooth twin of ``nn.Hardtanh``.

    Computes c + r·tanh((x − c) / r) with c = (max + min) / 2 and r = (max − min) / 2.

    Args:
        min_val: The lower limit.
        max_val: The upper limit.

    Example:
        >>> ScaledTanh(0.0, 20.0)(torch.tensor([-100.0, 10.0, 100.0]))
        tensor([ 0., 10., 20.])
    """

    def __init__(self, min_val: float, max_val: float) -> None:
        super().__init__()
        self.min_val = min_val
        self.max_val = max_val

    def forward(self, x: Tensor) -> Tensor:
        """The scaled tangent, element by element."""
        centre, radius = (self.max_val + self.min_val) / 2, (self.max_val - self.min_val) / 2
        return centre + radius * torch.tanh((x - centre) / radius)

    def extra_repr(self) -> str:
        """The limits, for ``repr``."""
        return f"min_val={self.min_val}, max_val={self.max_val}"


def twin(operation: str, act: Callable[[], nn.Module], min_val: float = -1.0, max_val: float = 1.0) -> nn.Module:
    """The smooth activation for a replaceable operation; the limits are those of a Hardtanh."""
    match operation:
        case "kernel":
            return ACTIVATIONS["softplus"]()
        case "hardtanh" if math.isfinite(max_val - min_val):
            return ScaledTanh(min_val, max_val)
        case "hardsigmoid":
            return nn.Sigmoid()
        case "hardswish":
            return nn.SiLU()
        case "hardmish":
            return nn.Mish()
    return act()

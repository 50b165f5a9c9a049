"""What is not smooth in PyTorch, and its smooth twin.

One table holds every operation under the name of its function (``"relu"``), with what is wrong with it; module classes,
functions and tensor methods are looked up in it alike, so that ``nn.ReLU``, ``F.relu`` and ``x.relu_()`` are one thing.

Every activation that can be replaced is a formula in ReLU: ``relu6(x) = relu(x) - relu(x - 6)``. Its twin is the same
formula with a smooth *ramp* in the place of ReLU, ``g(x) = act(b x) / b`` of sharpness b. So all twins keep their
bounds and their slopes at infinity, and all become the original as b grows.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.threat_models import at_least_float32


@final
class Ramp:
    """What takes the place of ReLU: an activation, steeper around 0 by a factor, ``g(x) = act(b x) / b``."""

    def __init__(self, act: Callable[[Tensor], Tensor], sharpness: float | Tensor) -> None:
        self.act, self.sharpness = act, sharpness

    def __call__(self, x: Tensor) -> Tensor:
        """The ramp, element by element."""
        if isinstance(self.sharpness, float) and self.sharpness == 1:
            return self.act(x)
        full = at_least_float32(x)  # in half precision b x may overflow
        return (self.act(self.sharpness * full) / self.sharpness).to(x.dtype)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """The twin of a clamp, ``low + g(x - low) - g(x - high)``."""
        full = at_least_float32(x)
        if math.isinf(high):
            return (low + self(full - low)).to(x.dtype)
        if math.isinf(low):
            return (high - self(high - full)).to(x.dtype)
        start, end = self.sharpness * (full - low), self.sharpness * (full - high)
        ramps = self.act(start), self.act(end)
        rising = low + (ramps[0] - ramps[1]) / self.sharpness
        # The same number, written in what the ramps lack: far above both limits differences of ramps are rounding.
        lacking = high - ((start - ramps[0]) - (end - ramps[1])) / self.sharpness
        return torch.where(full.detach() > (low + high) / 2, lacking, rising).to(x.dtype)


_CURVATURE = math.sqrt(2 / math.pi)  # the second derivative of GELU at 0


@final
class Blend(nn.Module):
    r"""Half SiLU, half softplus: :math:`\tfrac12 x\,\sigma(\beta x) + \tfrac1{2\beta} \log(1 + e^{\beta x})`.

    SiLU lies below ReLU and softplus above it, by errors whose means over all x are equal and opposite, so that this
    has none: it changes a trained network least. With :math:`\beta = \tfrac83 \sqrt{2 / \pi} \approx 2.13` its second
    derivative at 0 is GELU's. (A mixture of the two, with a weight of each, is the activation of "Curvature Tuning",
    NeurIPS 2025, arXiv 2502.07783.)

    Example:
        >>> Blend()(torch.tensor([-20.0, 0.0, 20.0])).round(decimals=3)
        tensor([-0.0000,  0.1630, 20.0000])
    """

    beta = 8 / 3 * _CURVATURE

    def forward(self, x: Tensor) -> Tensor:
        """The mean of both, element by element."""
        scaled = self.beta * x
        return (F.silu(scaled) + F.softplus(scaled)) / (2 * self.beta)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    # With this beta the second derivative at 0, beta / 4, is that of GELU. With torch's default of 1 the output at 0
    # is 0.69 instead of 0.22, and activations add up over the layers of a network trained with ReLU.
    "softplus": functools.partial(nn.Softplus, beta=4 * _CURVATURE),
    "mish": nn.Mish,
    "blend": Blend,
}


def _elu(ramp: Ramp, x: Tensor, alpha: float = 1.0) -> Tensor:
    return ramp(x) + alpha * torch.expm1(-ramp(-x))


def _celu(ramp: Ramp, x: Tensor, alpha: float = 1.0) -> Tensor:
    return ramp(x) + alpha * torch.expm1(-ramp(-x) / alpha)


def _leaky(ramp: Ramp, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * x + (1 - negative_slope) * ramp(x)


def _gate(ramp: Ramp, x: Tensor) -> Tensor:
    return ramp.clip(x, -3.0, 3.0) / 6 + 0.5


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

# Of the ramp, x, and the options of the function by name.
TWINS: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda ramp, x: ramp(x),
    "relu6": lambda ramp, x: ramp.clip(x, 0.0, 6.0),
    "leaky_relu": _leaky,
    "rrelu": lambda ramp, x, lower=1 / 8, upper=1 / 3: _leaky(ramp, x, (lower + upper) / 2),
    "hardtanh": lambda ramp, x, min_val=-1.0, max_val=1.0: ramp.clip(x, min_val, max_val),
    "hardsigmoid": _gate,
    "hardswish": lambda ramp, x: x * _gate(ramp, x),
    "hardmish": lambda ramp, x: x * ramp.clip(x, -2.0, 0.0) / 2 + x,
    "elu": _elu,
    "celu": _celu,
    "selu": lambda ramp, x: _SELU_SCALE * _elu(ramp, x, _SELU_ALPHA),
    "softshrink": lambda ramp, x, lambd=0.5: ramp(x - lambd) - ramp(-x - lambd),
}
# Gates, and the kernel of a linear attention, which divides by a sum of its values, may not leave their range, as a
# GELU does by a little: theirs is a softplus.
GATES = frozenset({"hardsigmoid", "hardswish", "hardmish", "kernel"})
KERNELS = frozenset({"kernel_func"})  # the attributes that hold such a kernel, in timm


@final
class SmoothActivation(nn.Module):
    """The smooth twin of an activation, with a sharpness: see :func:`gradreg.smoothify`, which makes it.

    Args:
        operation: The function whose twin it is, ``"relu6"``.
        act: The ramp of sharpness 1.
        sharpness: b; a buffer once :func:`gradreg.anneal_sharpness` changes it.
        options: Of the function, ``{"negative_slope": 0.2}``.

    Attributes:
        scale: How much sharper it is than was asked for, where what it is given is small.

    Example:
        >>> SmoothActivation("relu6", nn.Softplus(), sharpness=50.0)(torch.tensor([-9.0, 3.0, 9.0]))
        tensor([0., 3., 6.])
    """

    sharpness: float | Tensor

    def __init__(
        self, operation: str, act: nn.Module, sharpness: float = 1.0, options: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.operation, self.sharpness, self.options = operation, sharpness, dict(options or {})
        self.scale = 1.0
        self.act = ACTIVATIONS["softplus"]() if operation in GATES else act

    def forward(self, input: Tensor) -> Tensor:
        """The twin, element by element."""
        ramp = Ramp(self.act.forward, self.sharpness)
        return TWINS["relu" if self.operation == "kernel" else self.operation](ramp, input, **self.options)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        options = "".join(f", {name}={value:g}" for name, value in self.options.items())
        return f"{self.operation}, sharpness={float(self.sharpness):g}{options}"


def option_names(operation: str) -> list[str]:
    """The options of a twin, in the order in which its function takes them."""
    return list(inspect.signature(TWINS.get(operation, TWINS["relu"])).parameters)[2:]


def options_of(operation: str, given: Mapping[str, Any]) -> dict[str, float]:
    """The options of a twin, among those of a call or the attributes of the module that it stands for."""
    return {name: float(given[name]) for name in option_names(operation) if name in given}


@final
@dataclass(frozen=True)
class Operation:
    """A function that is not twice continuously differentiable.

    Attributes:
        reason: What is wrong with it.
        fix: What to do about it.
        flat: Whether its second derivative is zero almost everywhere.
    """

    reason: str
    fix: str
    flat: bool = False


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
_COMPARISON = Operation(
    "a comparison of numbers that depend on x: a mask or a branch, at which the output or its slope may jump",
    "It may stay if both sides agree where they meet; a ReLU written as a mask is F.relu, which smoothify replaces.",
)

OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(
        ("relu", "relu6", "leaky_relu", "rrelu", "hardtanh", "hardsigmoid", "softshrink"),
        Operation(_FLAT, _SMOOTHIFY, flat=True),
    ),
    **dict.fromkeys(("selu", "hardswish", "hardmish"), Operation("its derivative jumps", _SMOOTHIFY)),
    "elu": Operation("its derivative jumps, or for alpha = 1 its second derivative does", _SMOOTHIFY),
    "celu": Operation("its second derivative jumps", _SMOOTHIFY),
    "prelu": Operation(
        f"{_FLAT}; its slope is a parameter, and replacing it would change the state_dict", BY_HAND, flat=True
    ),
    **dict.fromkeys(("hardshrink", "threshold"), Operation(f"{_FLAT}; it has no smooth twin", BY_HAND, flat=True)),
    "softsign": Operation("its second derivative jumps; it has no smooth twin", BY_HAND),
    **{f"{prefix}max_pool{d}d": _POOL for prefix in ("", "adaptive_", "fractional_") for d in (1, 2, 3)},
    **dict.fromkeys(
        ("amax", "amin", "aminmax", "max", "min", "topk", "kthvalue", "median", "sort", "msort"), _SELECTION
    ),
    **dict.fromkeys(("cummax", "cummin"), _SELECTION),
    **dict.fromkeys(("abs", "absolute"), _ABS),
    **dict.fromkeys(
        ("round", "sign", "sgn", "floor", "ceil", "trunc", "heaviside", "remainder", "fmod", "frac", "floor_divide"),
        _STEP,
    ),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin"), _CLAMP),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "item"), _COMPARISON),
}

# What operations below autograd are called in the table, where that is something else.
ABOVE = {
    "rrelu_with_noise": "rrelu",
    "_prelu_kernel": "prelu",
    "_local_scalar_dense": "item",
    **{f"max_pool{d}d_with_indices": f"max_pool{d}d" for d in (2, 3)},
}

# The autograd nodes of those that are flat, without "Backward0": LeakyRelu of leaky_relu.
FLAT_NODES = frozenset(
    "".join(part.capitalize() for part in name.split("_"))
    for name in {*OPERATIONS, *ABOVE}
    if OPERATIONS[ABOVE.get(name, name)].flat
)

_SQUASHED = {name.replace("_", ""): name for name in OPERATIONS}
_MODULES = {getattr(nn, name): _SQUASHED[name.lower()] for name in dir(nn) if name.lower() in _SQUASHED}
_TIMM_GATES = {"HardSigmoid": "hardsigmoid", "HardSwish": "hardswish", "HardMish": "hardmish"}


def operation_of(kind: type) -> str | None:
    """The operation that a class of modules computes; None if it is not in the table, or has a forward of its own."""
    if kind.__module__.startswith("timm.") and (gate := _TIMM_GATES.get(kind.__name__.removesuffix("Me"))):
        return gate
    if not issubclass(kind, nn.Module):
        return None
    modules = (base for base in kind.__mro__ if issubclass(base, nn.Module))
    return next((_MODULES[base] for base in modules if base in _MODULES and kind.forward is base.forward), None)


def _functions(suffix: str) -> Iterator[tuple[Callable[..., Any], str]]:
    for operation in TWINS:
        for owner in (F, torch, Tensor):
            if hasattr(owner, operation + suffix):
                yield getattr(owner, operation + suffix), operation


IN_PLACE: dict[Callable[..., Any], str] = dict(_functions("_"))
FUNCTIONS: dict[Callable[..., Any], str] = {**dict(_functions("")), **IN_PLACE}  # those that have a twin

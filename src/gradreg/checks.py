"""Checks of what a user hands over: each message says what was expected, what was found, and what to do.

Shapes, types and flags are checked at every call. Values (labels, NaN, range) are looked at whenever that costs no
synchronisation: at every call on the CPU; elsewhere at an owner's first call, and always if asked to. Inside
``torch.func`` transforms and compiled regions there are no values to look at.
"""

import math
import sys
import warnings
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gradreg.threat_models import Linf


class GradregWarning(UserWarning):
    """Something that trains or attacks without an error, but hardly as intended."""


# Whose frames a warning passes by: this library, PyTorch, the checks of annotations, and context managers.
_NOT_THE_USERS = ("gradreg", "torch", "jaxtyping", "contextlib")


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here, past the frames of this library and of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GradregWarning, stacklevel=level)


_has_looked: "weakref.WeakSet[object]" = weakref.WeakSet()


def may_look(owner: object, x: Tensor, validate: bool) -> bool:
    """Whether owner looks at values in this call.

    Args:
        owner: The objective or attack that is called.
        x: Its input.
        validate: Whether its user asked for checks at every call on every device.
    """
    if x.device.type == "cpu" or validate:
        return True
    first = owner not in _has_looked
    _has_looked.add(owner)
    return first


def check_input(x: Tensor) -> None:
    """Raise unless x is a batch that a gradient can be taken in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, not a tensor; the order of arguments is (model, x, y).")
    if not x.is_floating_point():
        raise TypeError(
            f"x is of type {x.dtype}; a gradient needs real numbers. For 8-bit images pass x.float() / 255, pixels in "
            "[0, 1]."
        )
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected a batch of at least one sample, (B, ...).")


def finite_range(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest value of x; raises if one of its values is NaN or infinite."""
    lowest, highest = x.detach().aminmax()
    low, high = lowest.item(), highest.item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"x holds {int((~torch.isfinite(x)).sum())} values that are NaN or infinite. Their gradient is NaN, and "
            "its sign 0, so that an attack would do nothing. Look at the data loading."
        )
    return low, high


def check_logits(logits: object) -> Tensor:
    """The logits; raises unless they are one tensor."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The model returned {type(logits).__name__}; expected one tensor of logits. Say where they are, "
            "PenalizedLoss(output=lambda output: output[0]), or wrap the model in a module whose forward returns them."
        )
    return logits


def check_labels(logits: Any, y: Any, *, look: bool) -> None:
    """Raise unless y are classes or class probabilities that fit logits of shape (B, K).

    Logits of any other shape belong to a task whose labels are not known here; they pass.

    Args:
        logits: The model's output.
        y: Classes of shape (B,), or probabilities of shape (B, K).
        look: Whether the labels' values may be looked at.
    """
    if not isinstance(logits, Tensor):
        check_logits(logits)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"The criterion takes classes or class probabilities, and y is a {type(y).__name__}. A criterion of your "
            "own takes any y, such as lambda logits, y: y[2] * cross_entropy(logits, y[0]) + (1 - y[2]) * "
            "cross_entropy(logits, y[1]) for mixup."
        )
    if logits.ndim != 2:
        return
    count, classes = logits.shape
    found = f"got {y.dtype} of shape {tuple(y.shape)}"
    if y.shape == (count, 1) and classes != 1:
        raise ValueError(f"Expected labels of shape ({count},), {found}: use y.squeeze(1).")
    if y.shape not in ((count,), (count, classes)):
        raise ValueError(
            f"Expected classes of shape ({count},) or probabilities of shape ({count}, {classes}) for logits of shape "
            f"{tuple(logits.shape)}, {found}."
        )
    if y.ndim == 1 and y.dtype != torch.int64 and classes != 1:
        raise TypeError(f"Expected classes as torch.int64, {found}: use y.long().")
    if y.ndim == 2 and not y.is_floating_point():
        raise TypeError(
            f"Expected class probabilities as real numbers, {found}: use y.to(logits.dtype), or y.argmax(1)."
        )
    if look and y.ndim == 1 and y.dtype == torch.int64:
        low, high = y.aminmax()
        if low < 0 or high >= classes:
            raise ValueError(
                f"Labels run from {int(low)} to {int(high)}, and the model has {classes} classes, 0 to {classes - 1}. "
                "A sample to be ignored (label -100) has no gradient and cannot be penalised or attacked: leave it out "
                "of the batch."
            )


def check_radius(eps: float | Tensor, span: float | Tensor) -> None:
    """Raise if a radius per pixel exceeds the whole range of a pixel: it is in another unit."""
    if bool((torch.as_tensor(eps).cpu() > torch.as_tensor(span).cpu() * (1 + 1e-6)).any()):  # up to rounding
        raise ValueError(
            f"eps={_brief(eps)} exceeds the whole pixel range of {_brief(span)}: it is in another unit than x. "
            "For pixels in [0, 1] write Linf(4 / 255), not Linf(4); for images that a loader normalised, Linf(4 / 255 "
            "/ std)."
        )


def check_units(x: Tensor, places: Iterable[object], *, normalized: bool) -> None:
    """Raise or warn if x, radii and bounds are in different units.

    Args:
        x: The input.
        places: Penalties and attacks, of which those count that have a ``threat`` or ``bounds``.
        normalized: Whether the model normalises pixels of [0, 1] by itself.
    """
    lowest, highest = finite_range(x)
    if normalized:
        check_not_normalized_twice(lowest, highest)
    for place in places:
        threat, bounds = getattr(place, "threat", None), getattr(place, "bounds", None)
        span: float | Tensor | None = 1.0 if lowest >= 0 and highest <= 1 else None
        if bounds is not None:
            low, high = torch.as_tensor(bounds[0]), torch.as_tensor(bounds[1])
            slack = 0.75 * (high - low).max()  # random erasing leaves the range of pixels and is no other unit
            if lowest < low.min() - slack or highest > high.max() + slack:
                raise ValueError(
                    f"x lies in [{lowest:.3g}, {highest:.3g}], far outside of the bounds [{low.min():.3g}, "
                    f"{high.max():.3g}]: they are in another unit. For images that a loader normalised give bounds=((0 "
                    "- mean) / std, (1 - mean) / std) and eps / std, or let the model normalise (with_normalization)."
                )
            span = high - low
        if not isinstance(threat, Linf):
            continue
        if span is not None:
            check_radius(threat.eps, span)
        elif highest > 16 and torch.as_tensor(threat.eps).max().item() < 1:
            warn(
                f"x reaches {highest:.3g}, as bytes do, but {threat} is in units of pixels in [0, 1]. Pass x / 255, or "
                "Linf(255 * eps)."
            )


def check_bounds(x: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise unless x is finite and lies within the bounds of a pixel."""
    lowest, highest = finite_range(x)
    slack = 1e-6 * (high - low)
    if low.numel() == high.numel() == 1:
        inside = bool(low - slack <= lowest) and bool(highest <= high + slack)
    else:
        inside = bool(((x >= low - slack) & (x <= high + slack)).all())
    if not inside:
        raise ValueError(
            f"x lies in [{lowest:.3g}, {highest:.3g}], outside the bounds [{low.min().item():.3g}, "
            f"{high.max().item():.3g}]. If a loader normalises it, let the model do so instead (with_normalization), "
            "or give eps / std and the normalised bounds. If augmentation leaves the range (random erasing), say "
            'out_of_bounds="clamp".'
        )


def check_not_normalized_twice(lowest: float, highest: float) -> None:
    """Raise if values of this range cannot be pixels of [0, 1], though the model normalises and takes just those."""
    if lowest < -0.75 or highest > 2:
        raise ValueError(
            f"The model normalises its input (gradreg.Normalize), but x lies in [{lowest:.3g}, {highest:.3g}]: it "
            "looks normalised already, or in units of 0 to 255. Pass pixels in [0, 1]."
        )


def _brief(value: float | Tensor) -> str:
    return f"{value.max().item() if isinstance(value, Tensor) else value:.4g}"

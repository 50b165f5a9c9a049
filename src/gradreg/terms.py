"""A penalty and its weight: one part of an objective."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, final

from torch import Tensor

from gradreg.controllers import Controller, Measured
from gradreg.point import Point
from gradreg.schedules import Schedule

Weight = float | Schedule | Controller | Callable[[float | None, Measured], float | Tensor]


@final
@dataclass(frozen=True)
class Term:
    """One penalty of an objective.

    Attributes:
        penalty: A :class:`gradreg.Penalty`, or any function of a :class:`gradreg.Point` that returns one number per
            sample. :class:`gradreg.GradientPenalty` makes one of a function of ``(grad, x)``.
        weight: Factor of the penalty's batch mean in the total: a number of at least 0, or a schedule of the step
            ``t``. At steps where it is 0 the term costs nothing. A :class:`Controller`, or a function of ``(t,
            measured)``, sees what was measured at the last step; it may return a tensor, and a number below 0.

    Example:
        >>> from gradreg import EdgeAlignmentPenalty, linear_ramp
        >>> Term(EdgeAlignmentPenalty(), weight=linear_ramp(0.5, duration=100)).weight_at(50)
        0.25
    """

    penalty: Callable[[Point], Tensor]
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        if not callable(self.penalty):
            raise TypeError(
                f"Term: a penalty is a function of a point, such as GradNormPenalty(Linf(4 / 255)); got "
                f"{self.penalty!r}."
            )
        if needs_two_arguments(self.penalty):
            raise TypeError(
                "Term: a penalty is a function of a point. Wrap a function of (grad, x): GradientPenalty(function)."
            )
        if isinstance(self.weight, int | float):
            checked_weight(self.weight)

    def weight_at(self, t: float | None, measured: Measured | None = None) -> float | Tensor:
        """The weight at step t."""
        return scheduled(self.weight, t, measured)


def needs_two_arguments(function: object) -> bool:
    """Whether a function needs two: a weight that does is one of ``(t, measured)``, a penalty that does is wrong."""
    if not callable(function) or isinstance(function, Controller):
        return callable(function)
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return True
    except ValueError:  # one that has no signature
        return False
    return False


def scheduled(weight: Weight, t: float | None, measured: Measured | None = None) -> float | Tensor:
    """The value of a weight at step t."""
    if isinstance(weight, int | float):
        return weight
    if needs_two_arguments(weight):
        return cast("Controller", weight)(t, {} if measured is None else measured)
    if t is None:
        raise ValueError("A weight is a schedule of the optimiser step; call objective(model, x, y, t=step).")
    return checked_weight(cast("Schedule", weight)(t))


def checked_weight(weight: float) -> float:
    """The weight; raises unless it is one."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"A weight must be finite and at least 0, got {weight}.")
    return weight

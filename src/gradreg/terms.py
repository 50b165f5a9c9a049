"""A penalty and its weight: one part of an objective."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradreg.point import Point
from gradreg.schedules import Schedule


@final
@dataclass(frozen=True)
class Term:
    """One penalty of an objective.

    Attributes:
        penalty: A :class:`gradreg.Penalty`, or any function of a :class:`gradreg.Point` that returns one number per
            sample. :class:`gradreg.GradientPenalty` makes one of a function of ``(grad, x)``.
        weight: Factor of the penalty's batch mean in the total, at least 0: a number, or a schedule of the step ``t``.
            At steps where it is 0 the term costs nothing.

    Example:
        >>> from gradreg import EdgeAlignmentPenalty, linear_ramp
        >>> Term(EdgeAlignmentPenalty(), weight=linear_ramp(0.5, duration=100)).weight_at(50)
        0.25
    """

    penalty: Callable[[Point], Tensor]
    weight: float | Schedule = 1.0

    def __post_init__(self) -> None:
        if not callable(self.penalty):
            raise TypeError(
                f"Term: a penalty is a function of a point, such as GradNormPenalty(Linf(4 / 255)); got "
                f"{self.penalty!r}."
            )
        if _needs_two_arguments(self.penalty):
            raise TypeError(
                "Term: a penalty is a function of a point. Wrap a function of (grad, x): GradientPenalty(function)."
            )
        if not callable(self.weight):
            checked_weight(self.weight)

    def weight_at(self, t: float | None) -> float:
        """The weight at step t."""
        return scheduled(self.weight, t) if callable(self.weight) else self.weight


def _needs_two_arguments(function: Callable[..., object]) -> bool:
    """Whether a function can be told to take more than a point."""
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError:
        return True
    except ValueError:  # one that has no signature
        return False
    return False


def scheduled(schedule: Schedule, t: float | None) -> float:
    """The value of a schedule at step t."""
    if t is None:
        raise ValueError("A weight is a schedule of the optimiser step; call objective(model, x, y, t=step).")
    return checked_weight(schedule(t))


def checked_weight(weight: float) -> float:
    """The weight; raises unless it is one."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"A weight must be finite and at least 0, got {weight}.")
    return weight

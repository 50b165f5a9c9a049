"""Schedules: weights and radii as functions of an explicit clock.

A schedule is any function of ``t``, counted in optimiser steps. It has no state, so there is nothing to checkpoint and
nothing to desynchronise between ranks: the clock is the one that the training loop already keeps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

Schedule = Callable[[float], float]


@final
@dataclass(frozen=True)
class constant:  # noqa: N801  (used as a function)
    """The same value at every step.

    Example:
        >>> constant(1.2)(1000)
        1.2
    """

    value: float

    def __call__(self, t: float) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp(ABC):
    """A rise or fall from start to end over the first duration steps, then end.

    Attributes:
        end: The value from step ``duration`` on.
        duration: Length of the ramp in optimiser steps, more than 0.
        start: The value at step 0.
    """

    end: float
    duration: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if not self.duration > 0:
            raise ValueError(
                f"{type(self).__name__}: duration is counted in optimiser steps and must be above 0, got "
                f"{self.duration}; without a ramp the weight is a plain number."
            )

    def __call__(self, t: float) -> float:
        return self.start + (self.end - self.start) * self._share(min(max(t / self.duration, 0.0), 1.0))

    @abstractmethod
    def _share(self, progress: float) -> float:
        """How much of the way is gone when this share of the duration, from 0 to 1, is over."""


@final
@dataclass(frozen=True)
class linear_ramp(Ramp):  # noqa: N801
    """A straight line from start to end over the first duration steps, then end: see :class:`Ramp`.

    The thesis raises the weight of its penalty so, over the first five epochs (Rodríguez Muñoz, "Adversarial robustness
    without perturbations", MIT 2024, section 4.3).

    Example:
        >>> ramp = linear_ramp(1.2, duration=100)
        >>> ramp(0), ramp(50), ramp(5000)
        (0.0, 0.6, 1.2)
    """

    def _share(self, progress: float) -> float:
        return progress


@final
@dataclass(frozen=True)
class cosine_ramp(Ramp):  # noqa: N801
    """Half a cosine wave from start to end over the first duration steps, then end: see :class:`Ramp`.

    Example:
        >>> ramp = cosine_ramp(1.0, duration=100)
        >>> ramp(0), round(ramp(50), 6), ramp(5000)
        (0.0, 0.5, 1.0)
    """

    def _share(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@final
@dataclass(frozen=True)
class every:  # noqa: N801
    """A value at every k-th step, k times as large, and 0 at the steps between: the same on average.

    The weight of a penalty that is too expensive for every step: ``every(2, 1.2)`` halves what it costs on top of the
    loss. Over k steps the gradient is that of the value at every step, as far as the weights stand still meanwhile;
    ``value`` itself is taken at the steps that count.

    Attributes:
        steps: k, at least 1. Step 0 counts, then step k; a clock that skips them never meets the value.
        value: A number, or a schedule of the same clock.

    Example:
        >>> weight = every(2, linear_ramp(1.0, duration=100))
        >>> weight(50), weight(51), weight(100)
        (1.0, 0.0, 2.0)
    """

    steps: int
    value: float | Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"every: steps is a whole number of optimiser steps, at least 1; got {self.steps!r}.")

    def __call__(self, t: float) -> float:
        if t % self.steps != 0:
            return 0.0
        return self.steps * (self.value(t) if callable(self.value) else self.value)


@final
@dataclass(frozen=True)
class join:  # noqa: N801
    """One schedule after the other, each with its own clock that starts at 0.

    Attributes:
        schedules: The schedules in their order.
        boundaries: The step at which each schedule after the first begins, rising; one less than there are schedules.

    Example:
        >>> schedule = join([linear_ramp(1.0, duration=10), constant(0.5)], boundaries=[20])
        >>> schedule(10), schedule(19), schedule(20)
        (1.0, 1.0, 0.5)
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"join: {len(self.schedules)} schedules need {len(self.schedules) - 1} boundaries between them, got "
                f"{len(self.boundaries)}."
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"join: boundaries must rise, got {list(self.boundaries)}.")

    def __call__(self, t: float) -> float:
        begun = [boundary for boundary in self.boundaries if t >= boundary]
        return self.schedules[len(begun)](t - (begun[-1] if begun else 0))

"""A statistic: a definition of one number per sample, which can be measured on any model."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradreg import checks, modes
from gradreg.statistics.point import Model, Point


@dataclass(frozen=True)
class Statistic(ABC):
    """One number per sample: ``statistic(model, x, y) -> (B,)``.

    A frozen configuration that says which of several definitions is meant. What is undefined for a sample is NaN, with
    a warning that says why.

    Attributes:
        unit: Of its values.
        twice: Whether it takes second derivatives.
        floor: What is added to a value before its logarithm is taken.
    """

    unit: ClassVar[str] = ""
    twice: ClassVar[bool] = False
    floor: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def name(self) -> str:
        """What a table calls it."""

    @abstractmethod
    def at(self, point: Point) -> Float[Tensor, "B"]:
        """The values at a point of the model."""

    @final
    def __call__(
        self, model: Model, x: Float[Tensor, "B *x"], y: Tensor, *, index: Tensor | None = None
    ) -> Float[Tensor, "B"]:
        """The values of a batch.

        Args:
            model: Any function from x to logits; an ``nn.Module`` is evaluated in evaluation mode.
            x: Inputs in the units in which perturbations are to be measured: pixels of [0, 1], the model normalising.
            y: Classes ``(B,)``, or probabilities ``(B, K)``.
            index: The number of every sample that its random numbers are drawn from, so that they depend neither on
                the batch nor on the model.

        Raises:
            ValueError: If labels do not fit the logits, or x is not what the statistic is defined for.
        """
        evaluated = modes.evaluating(model) if isinstance(model, nn.Module) else nullcontext()
        with evaluated, torch.inference_mode(False), torch.enable_grad():
            return self.at(Point(model, x, y, index=index, twice=self.twice))


def undefined_where(undefined: Tensor, values: Tensor, name: str, why: str) -> Tensor:
    """The values, NaN where they are undefined; says so."""
    if bool(undefined.any()):
        checks.warn(f"{name} is undefined (NaN) for {int(undefined.sum())} of {len(undefined)} samples: {why}.")
    return values.masked_fill(undefined, torch.nan)

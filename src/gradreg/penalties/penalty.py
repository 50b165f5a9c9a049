"""What a penalty is: one number per sample, a function of a point."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from jaxtyping import Bool, Float
from torch import Tensor

from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.noise import noise_for
from gradreg.point import Point
from gradreg.selectors import ClassSelector
from gradreg.threat_models import ThreatModel

EnergyFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Penalty(ABC):
    """One number per sample: ``penalty(point) -> (B,)``, a frozen configuration that says which definition is meant.

    Attributes:
        floor: What is added to a value before its logarithm is taken.
        why_undefined: Why it is undefined for some samples.
        looks_elsewhere: Whether it asks for other points. If not, an objective of such penalties alone need not record
            the random numbers and buffers that other points would have to have.
        of_batch: Whether its values depend on which samples stand in the batch together. Such a penalty is not taken of
            a part of the batch, and not measured.
    """

    floor: ClassVar[float] = 0.0
    why_undefined: ClassVar[str] = ""
    looks_elsewhere: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        """The values at a point of a model; they depend on the weights as far as the point's gradients do."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        return repr(self)

    @property
    def unit(self) -> str:
        """Of its values."""
        return ""

    @property
    def of_batch(self) -> bool:
        """Whether its values depend on which samples stand in the batch together."""
        return False

    def undefined(self, point: Point) -> Bool[Tensor, "B"] | None:
        """The samples for which it means nothing, though it has a value; None if there are never any."""
        return None

    def seeded(self, seed: int) -> "Penalty":
        """The penalty with random numbers from this seed, if it draws any and has no seed of its own."""
        return self


@dataclass(frozen=True)
class RandomPenalty(Penalty):
    """A penalty that draws random numbers: once for a batch, whoever asks how often.

    Attributes:
        seed: They depend on it and on the sample alone. None draws from PyTorch's generators, anew for every batch.
    """

    seed: int | None = field(default=None, kw_only=True)

    def seeded(self, seed: int) -> "RandomPenalty":
        return replace(self, seed=seed) if self.seed is None else self

    def _noise(self, point: Point, ball: ThreatModel, draw: int = 0) -> Tensor:
        """Noise uniform in the ball for every sample; another one for each number of a draw."""
        return point.drawn((self, draw), lambda: noise_for(point.x, ball, self.seed, point.batch.index, draw))


@final
@dataclass(frozen=True)
class GradientPenalty(Penalty):
    """A penalty that is a function of the input gradient and the input alone.

    Attributes:
        function: ``function(grad, x) -> (B,)``.
        of: What is differentiated with respect to the input: None for the loss, or a selector for the logit of a class.
        threat: The perturbations in whose units :class:`gradreg.FiniteDifference` measures its step.

    Example:
        >>> mean_square = GradientPenalty(lambda grad, x: grad.square().flatten(1).mean(1))
        >>> model, x, y = torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> mean_square(Point(model, cross_entropy, x, y)).shape
        torch.Size([5])
    """

    looks_elsewhere: ClassVar[bool] = False

    function: Callable[[Tensor, Tensor], Tensor]
    of: ClassSelector | None = None
    threat: ThreatModel | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, point: Point) -> Tensor:
        return self.function(point.gradient(self.of), point.x)

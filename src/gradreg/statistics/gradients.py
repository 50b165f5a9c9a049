"""The loss, and how steady the signs of its gradient are."""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from gradreg.penalties import Penalty, RandomPenalty
from gradreg.point import Point
from gradreg.threat_models import ThreatModel


@final
@dataclass(frozen=True)
class Loss(Penalty):
    """The loss of every sample; in :func:`measure` that is cross-entropy.

    Example:
        >>> from gradreg import cross_entropy
        >>> point = Point(torch.nn.Flatten(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(Loss()(point).item(), 4)
        0.6931
    """

    unit: ClassVar[str] = "nats"
    looks_elsewhere: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "loss"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        return point.losses


@final
@dataclass(frozen=True)
class SignAgreement(RandomPenalty):
    """Share of the coordinates whose gradient keeps its sign under noise.

    1 for a loss that is linear within the ball, a half where signs are chance. A coordinate whose gradient is 0 at one
    of the two points alone counts as changed. It is piecewise constant: to be measured, not to be trained.

    Attributes:
        noise: The ball that the noise is drawn from, such as ``Linf(1 / 255)``.
        seed: Of the noise, which depends on it and on the sample alone; None for other noise at every call.

    Example:
        >>> from gradreg import Linf, cross_entropy
        >>> point = Point(torch.nn.Linear(4, 3), cross_entropy, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> SignAgreement(Linf(0.1))(point)
        tensor([1., 1.])
    """

    unit: ClassVar[str] = "share of coordinates"
    noise: ThreatModel

    @property
    def name(self) -> str:
        return f"sign agreement in {self.noise}"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        there = point.at(point.x + self._noise(point, self.noise)).gradient().sign()
        here = point.gradient().sign()
        return (here == there).to(here.dtype).flatten(1).mean(1)

"""The loss and the size of its input gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from gradreg.noise import noise_for
from gradreg.selectors import ClassSelector
from gradreg.statistics.point import Point
from gradreg.statistics.statistic import Statistic
from gradreg.threat_models import ThreatModel


@final
@dataclass(frozen=True)
class Loss(Statistic):
    """Cross-entropy of every sample.

    Example:
        >>> Loss()(torch.nn.Flatten(), torch.zeros(1, 2), torch.tensor([0])).round(decimals=4)
        tensor([0.6931], dtype=torch.float64)
    """

    unit: ClassVar[str] = "nats"

    @property
    def name(self) -> str:
        return "loss"

    def at(self, point: Point) -> Float[Tensor, "B"]:
        return point.losses.detach().double()


@final
@dataclass(frozen=True)
class GradientNorm(Statistic):
    r"""Norm of the input gradient, :math:`\|\nabla_{x_b} \ell_b\|_p` over all pixels and channels.

    Of the loss of every sample by itself, per unit of pixel: Table 4.1 of Rodríguez Muñoz, "Adversarial robustness
    without perturbations" (MIT 2024) has p = 1. The values printed in the thesis are those of a batch's mean loss, 24
    to 32 times smaller; those of the paper (ECCV 2024) are of every sample's own loss, as here.

    Attributes:
        p: 1, 2 or ``math.inf``.
        of: What chooses the class whose logit is differentiated; None for the loss.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        >>> GradientNorm(p=1)(model, torch.zeros(1, 2), torch.tensor([0]))
        tensor([3.5000], dtype=torch.float64)
    """

    unit: ClassVar[str] = "loss per unit of pixel"
    p: float = 1
    of: ClassSelector | None = None

    def __post_init__(self) -> None:
        if self.p not in (1, 2, math.inf):
            raise ValueError(f"GradientNorm: p is 1, 2 or math.inf, got {self.p}.")

    @property
    def name(self) -> str:
        return f"gradient L{self.p:g}" + ("" if self.of is None else f" of {type(self.of).__name__}")

    def at(self, point: Point) -> Float[Tensor, "B"]:
        return torch.linalg.vector_norm(point.gradient(self.of).double().flatten(1), self.p, dim=1)


@final
@dataclass(frozen=True)
class SignAgreement(Statistic):
    r"""Share of the coordinates whose gradient keeps its sign under noise.

    1 for a loss that is linear within the ball, a half where signs are chance. A coordinate whose gradient is 0 at one
    of the two points alone counts as changed.

    Attributes:
        noise: The ball that the noise is drawn from, such as ``Linf(1 / 255)``.
        seed: Of the noise, which depends on it and on the sample alone.

    Example:
        >>> from gradreg import Linf
        >>> SignAgreement(Linf(0.1))(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2]))
        tensor([1., 1.], dtype=torch.float64)
    """

    unit: ClassVar[str] = "share of coordinates"
    noise: ThreatModel
    seed: int = 0

    @property
    def name(self) -> str:
        return f"sign agreement in {self.noise}"

    def at(self, point: Point) -> Float[Tensor, "B"]:
        moved = point.moved(point.x + noise_of(point, self.noise, self.seed))
        same = point.gradient().sign() == moved.gradient().sign()
        return same.double().flatten(1).mean(1)


def noise_of(point: Point, ball: ThreatModel, seed: int, draw: int = 0) -> Tensor:
    """Noise uniform in the ball, that depends on the seed, the sample and the number of the draw alone."""
    return noise_for(point.x, ball, seed, point.index, draw, torch.arange(len(point.x), device=point.x.device))

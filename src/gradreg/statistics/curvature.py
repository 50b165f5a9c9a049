"""How far the loss bends within reach of a perturbation."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from gradreg.noise import generator_of
from gradreg.statistics.gradients import noise_of
from gradreg.statistics.point import Point
from gradreg.statistics.statistic import Statistic
from gradreg.threat_models import L2, ThreatModel, length, unit


@dataclass(frozen=True)
class _PowerIteration(Statistic):
    """What is drawn from the largest eigenvalue of the Hessian.

    Attributes:
        iterations: Products with the Hessian, at least one.
        start: ``"random"``: a direction uniform on the sphere; ``"gradient"``: the gradient's, a good guess that needs
            few iterations.
        estimate: ``"norm"``, the length of the last product, or ``"rayleigh"``, its share along the direction it was
            made from, as in the released code of the thesis. Both tend to the largest absolute eigenvalue from below;
            the second does not where two of opposite sign are as large.
        seed: Of the random direction, which depends on it and on the sample alone.
    """

    twice: ClassVar[bool] = True

    iterations: int = 20
    start: Literal["random", "gradient"] = "random"
    estimate: Literal["norm", "rayleigh"] = "norm"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"{type(self).__name__}: iterations is at least 1, got {self.iterations}.")
        if self.start not in ("random", "gradient"):
            raise ValueError(f'{type(self).__name__}: start is "random" or "gradient", got {self.start!r}.')
        if self.estimate not in ("norm", "rayleigh"):
            raise ValueError(f'{type(self).__name__}: estimate is "norm" or "rayleigh", got {self.estimate!r}.')

    def path(self, point: Point) -> Float[Tensor, "B k"]:
        """The estimate after every iteration: how it converges."""
        key = ("power iteration", self.iterations, self.start, self.estimate, self.seed)
        return point.once(key, lambda: self._iterate(point))

    def _iterate(self, point: Point) -> Tensor:
        direction, found = self._first(point), []
        for _ in range(self.iterations):
            product = point.hessian_product(direction)
            if self.estimate == "norm":
                found.append(length(product).double())
            else:
                found.append((direction * product).double().flatten(1).sum(1).abs())
            direction = unit(product)
        return torch.stack(found, 1)

    def _first(self, point: Point) -> Tensor:
        """The direction to begin with; a random one where the gradient is 0."""
        gradient = point.gradient()
        some = gradient.flatten(1).any(1)
        if self.start == "gradient" and bool(some.all()):
            return unit(gradient)
        random = unit(noise_of(point, L2(1.0), self.seed))
        if self.start == "random":
            return random
        return torch.where(some.view(-1, *[1] * (gradient.ndim - 1)), unit(gradient), random)


@final
@dataclass(frozen=True)
class HessianNorm(_PowerIteration):
    r"""Spectral norm of the Hessian of the loss with respect to the input, :math:`\|\nabla^2_{x_b} \ell_b\|_2`.

    By power iteration on products with the Hessian, as in Table A.1 of Rodríguez Muñoz, "Adversarial robustness without
    perturbations" (MIT 2024), which takes 20 iterations from a random start. :meth:`path` shows whether they suffice.

    Example:
        The Hessian of cross-entropy of two logits 0 and 0 is 1/4 of ``[[1, -1], [-1, 1]]``:

        >>> HessianNorm()(torch.nn.Identity(), torch.zeros(1, 2), torch.tensor([0])).round(decimals=4)
        tensor([0.5000], dtype=torch.float64)
    """

    unit: ClassVar[str] = "loss per squared unit of pixel"

    @property
    def name(self) -> str:
        return "Hessian norm"

    def at(self, point: Point) -> Float[Tensor, "B"]:
        return self.path(point)[:, -1]


@final
@dataclass(frozen=True)
class Curvature(_PowerIteration):
    r"""Normalised curvature, :math:`\|\nabla^2_{x_b} \ell_b\|_2 / (\|\nabla_{x_b} \ell_b\|_2 + c)`.

    Srinivas, Matoba, Lakkaraju & Fleuret, "Efficient Training of Low-Curvature Neural Networks" (NeurIPS 2022): how
    far the gradient turns, relative to its length, and so no matter of the scale of the loss. Table A.1 of Rodríguez
    Muñoz (MIT 2024).

    Attributes:
        offset: c, which keeps a gradient of 0 from dividing.

    Example:
        >>> Curvature()(torch.nn.Identity(), torch.zeros(1, 2), torch.tensor([0])).round(decimals=4)
        tensor([0.7071], dtype=torch.float64)
    """

    unit: ClassVar[str] = "per unit of pixel"
    offset: float = 1e-6

    @property
    def name(self) -> str:
        return "curvature"

    def at(self, point: Point) -> Float[Tensor, "B"]:
        return self.path(point)[:, -1] / (length(point.gradient()).double() + self.offset)


@final
@dataclass(frozen=True)
class LocalLinearityError(Statistic):
    r"""How far the loss between two points of a ball lies from the straight line between them.

    .. math:: E_b = \bigl(\ell(x_c) - (1 - \alpha)\,\ell(x_a) - \alpha\,\ell(x_b)\bigr)^2,\qquad
              x_c = (1 - \alpha) x_a + \alpha x_b

    with :math:`x_a, x_b` uniform in the ball around x and :math:`\alpha` uniform in [0, 1]: Rocamora, Liu, Chrysos,
    Olmos & Cevher, "Efficient local linearity regularization to overcome catastrophic overfitting" (ICLR 2024), and
    Table A.2 of Rodríguez Muñoz (MIT 2024), at ``Linf(4 / 255)``. One triplet per sample, the same for every model.

    Attributes:
        threat: The ball.
        seed: Of the triplet.
        squared: False for the absolute value in the place of the square.

    Example:
        >>> from gradreg import Linf
        >>> error = LocalLinearityError(Linf(0.5))(torch.nn.Identity(), torch.zeros(1, 2), torch.tensor([0]))
        >>> bool(0 < error < 1e-2)
        True
    """

    unit: ClassVar[str] = "squared loss"
    floor: ClassVar[float] = 1e-17  # what the thesis's code adds before it takes the logarithm

    threat: ThreatModel
    seed: int = 0
    squared: bool = True

    @property
    def name(self) -> str:
        return f"local linearity error in {self.threat}"

    def at(self, point: Point) -> Float[Tensor, "B"]:
        x = point.x
        first, second = (x + noise_of(point, self.threat, self.seed, draw) for draw in (0, 1))
        shares = [
            torch.rand((), generator=generator_of(self.seed, position, 2), dtype=torch.float64)
            for position in point.index.tolist()
        ]
        share = torch.stack(shares).to(x.device)
        column = share.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        between = point.losses_at(torch.lerp(first, second, column)).double()
        line = (1 - share) * point.losses_at(first).double() + share * point.losses_at(second).double()
        error = (between - line).abs()
        return error.square() if self.squared else error

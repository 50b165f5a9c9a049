"""How far the loss is from a straight line within reach of a perturbation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg.differentiation import DoubleBackward
from gradreg.gradients import in_transform
from gradreg.noise import generator_of
from gradreg.point import Point
from gradreg.statistics.gradients import RandomPenalty
from gradreg.threat_models import L2, ThreatModel, at_least_float32, length, unit


def hessian_product(point: Point, direction: Tensor, *, create_graph: bool = True) -> Tensor:
    """Every sample's Hessian of the loss with respect to its input, times a direction.

    Args:
        point: The point.
        direction: One direction for each sample, of the shape of x.
        create_graph: Whether the product is to depend on the weights, if input gradients do.

    Raises:
        RuntimeError: If input gradients are finite differences, or inside a transform.

    Example:
        >>> from gradreg import cross_entropy
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> hessian_product(point, torch.tensor([[1.0, 0.0]])).detach()
        tensor([[ 0.2500, -0.2500]])
    """
    how = point.batch.differentiation
    if in_transform() or not (how.second_order or how.constant):
        raise RuntimeError("A Hessian needs DoubleBackward(), outside of transforms and compiled regions.")
    there = point if how.second_order else point.once("twice", lambda: _unfused(point))
    grad = there.slope(create_graph=True)
    if not grad.requires_grad:  # a loss linear in x
        return torch.zeros_like(direction)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    along = (grad * direction).sum()
    return torch.autograd.grad(along, [there.leaf], create_graph=create_graph and how.second_order, **options)[0]


def _unfused(point: Point) -> Point:
    """The point by a pass of its own, without fused attention, which has no second derivative."""
    batch = replace(point.batch, differentiation=DoubleBackward(fused=False))
    there = Point.of(batch, point.x, counts=False)
    with sdpa_kernel(SDPBackend.MATH):
        _ = there.logits
    return there


@dataclass(frozen=True)
class _PowerIteration(RandomPenalty):
    """What is drawn from the largest eigenvalue of the Hessian.

    Attributes:
        iterations: Products with the Hessian, at least one.
        start: ``"random"``: a direction uniform on the sphere; ``"gradient"``: the gradient's, a good guess that needs
            few iterations.
        estimate: ``"norm"``, the length of the last product, or ``"rayleigh"``, its share along the direction it was
            made from, as in the released code of the thesis. Both tend to the largest absolute eigenvalue from below;
            the second does not where two of opposite sign are as large.
        seed: Of the random direction, which depends on it and on the sample alone; None for another one at every call.
    """

    looks_elsewhere: ClassVar[bool] = False

    iterations: int = 20
    start: Literal["random", "gradient"] = "random"
    estimate: Literal["norm", "rayleigh"] = "norm"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"{type(self).__name__}: iterations is at least 1, got {self.iterations}.")
        if self.start not in ("random", "gradient"):
            raise ValueError(f'{type(self).__name__}: start is "random" or "gradient", got {self.start!r}.')
        if self.estimate not in ("norm", "rayleigh"):
            raise ValueError(f'{type(self).__name__}: estimate is "norm" or "rayleigh", got {self.estimate!r}.')

    def path(self, point: Point) -> Float[Tensor, "B k"]:
        """The estimate after every iteration: how it converges. Only the last one depends on the weights."""
        key = ("power iteration", self.iterations, self.start, self.estimate, self.seed)
        return point.once(key, lambda: self._iterate(point))

    def _iterate(self, point: Point) -> Tensor:
        direction, found = self._first(point), []
        for left in reversed(range(self.iterations)):
            product = at_least_float32(hessian_product(point, direction, create_graph=not left))
            share = (direction * product).flatten(1).sum(1).abs()
            found.append(length(product) if self.estimate == "norm" else share)
            direction = unit(product.detach())
        return torch.stack(found, 1)

    def _first(self, point: Point) -> Tensor:
        """The direction to begin with; a random one where the gradient is 0."""
        random = unit(at_least_float32(self._noise(point, L2(1.0))))
        if self.start == "random":
            return random
        gradient = point.gradient().detach()
        some = gradient.flatten(1).any(1).view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(some, unit(gradient), random)


@final
@dataclass(frozen=True)
class HessianNorm(_PowerIteration):
    r"""Spectral norm of the Hessian of the loss with respect to the input, :math:`\|\nabla^2_{x_b} \ell_b\|_2`.

    By power iteration on products with the Hessian, as in Table A.1 of Rodríguez Muñoz, "Adversarial robustness without
    perturbations" (MIT 2024), which takes 20 iterations from a random start. :meth:`path` shows whether they suffice.

    As a penalty it is differentiated through its last product; the direction of that product is detached. Where the
    iteration has converged this is exact: an eigenvalue does not change to first order with the direction. It needs
    :class:`gradreg.DoubleBackward`, and third derivatives of the model.

    Example:
        The Hessian of cross-entropy of two logits 0 and 0 is 1/4 of ``[[1, -1], [-1, 1]]``:

        >>> from gradreg import cross_entropy
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(HessianNorm()(point).item(), 4)
        0.5
    """

    unit: ClassVar[str] = "loss per squared unit of pixel"

    @property
    def name(self) -> str:
        return "Hessian norm"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        return self.path(point)[:, -1]


@final
@dataclass(frozen=True)
class Curvature(_PowerIteration):
    r"""Normalised curvature, :math:`\|\nabla^2_{x_b} \ell_b\|_2 / (\|\nabla_{x_b} \ell_b\|_2 + c)`.

    Srinivas, Matoba, Lakkaraju & Fleuret, "Efficient Training of Low-Curvature Neural Networks" (NeurIPS 2022): how
    far the gradient turns, relative to its length, and so no matter of the scale of the loss. Table A.1 of Rodríguez
    Muñoz (MIT 2024).

    As a penalty it is differentiated through both norms, the upper one as in :class:`HessianNorm`.

    Attributes:
        offset: c, which keeps a gradient of 0 from dividing.

    Example:
        >>> from gradreg import cross_entropy
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(Curvature()(point).item(), 4)
        0.7071
    """

    unit: ClassVar[str] = "per unit of pixel"
    offset: float = 1e-6

    @property
    def name(self) -> str:
        return "curvature"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        return self.path(point)[:, -1] / (length(point.gradient()) + self.offset)


@final
@dataclass(frozen=True)
class LocalLinearity(RandomPenalty):
    r"""How far the loss between two points of a ball lies from the straight line between them.

    .. math:: E_b = \bigl(\ell(x_c) - (1 - \alpha)\,\ell(x_a) - \alpha\,\ell(x_b)\bigr)^2,\qquad
              x_c = (1 - \alpha) x_a + \alpha x_b

    with :math:`x_a, x_b` uniform in the ball around x and :math:`\alpha` uniform in [0, 1]: the penalty of Rocamora,
    Liu, Chrysos, Olmos & Cevher, "Efficient local linearity regularization to overcome catastrophic overfitting" (ICLR
    2024), and Table A.2 of Rodríguez Muñoz (MIT 2024), at ``Linf(4 / 255)``. It takes three forward passes and no
    gradient with respect to the input, so that it trains under any differentiation. Nothing is detached.

    Attributes:
        threat: The ball.
        squared: False for the absolute value instead of the square.
        seed: Of the three points, which depend on it and on the sample alone, not on the model; None for others at
            every call.

    Example:
        >>> from gradreg import Linf, cross_entropy
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> bool(0 < LocalLinearity(Linf(0.5))(point) < 1e-2)
        True
    """

    unit: ClassVar[str] = "squared loss"
    floor: ClassVar[float] = 1e-17  # what the thesis's code adds before it takes the logarithm

    threat: ThreatModel
    squared: bool = True

    @property
    def name(self) -> str:
        return f"local linearity error in {self.threat}"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        x, share = point.x, self._share(point)
        first, second = (x + self._noise(point, self.threat, draw) for draw in (0, 1))
        between = torch.lerp(first, second, share.view(-1, *[1] * (x.ndim - 1)))
        loss, start, end = (
            at_least_float32(point.at(z, differentiable=False).losses) for z in (between, first, second)
        )
        # Differences first: those of neighbouring losses are free of rounding.
        error = (loss - start) - share * (end - start)
        return error.square() if self.squared else error.abs()

    def _share(self, point: Point) -> Tensor:
        """How far the middle point of every sample lies from the first to the second."""
        x, index = point.x, point.batch.index
        if self.seed is None:
            return torch.rand(len(x), dtype=x.dtype, device=x.device)
        positions = range(len(x)) if index is None else index.tolist()
        drawn = [torch.rand((), generator=generator_of(self.seed, p, 2), dtype=torch.float64) for p in positions]
        return torch.stack(drawn).to(x.dtype).to(x.device)

"""How much the gradient of the loss turns: CURE, and the Hessian's norm."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.differentiation import DoubleBackward
from gradreg.gradients import in_transform
from gradreg.graphs import new_nodes
from gradreg.penalties.penalty import Penalty, RandomPenalty
from gradreg.point import Parts, Point
from gradreg.second_derivatives import layer_norm_by_formula
from gradreg.threat_models import L2, ThreatModel, at_least_float32, length, unit
from gradreg.trees import joined, tensors_in


def hessian_product(point: Point, direction: Tensor, *, create_graph: bool = True) -> Tensor:
    """Every sample's Hessian of the loss with respect to its input, times a direction.

    Args:
        point: The point.
        direction: One direction for each sample, of the shape of x.
        create_graph: Whether the product is to depend on the weights, if input gradients do.

    Raises:
        RuntimeError: If input gradients are finite differences, or inside a transform.

    Example:
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> hessian_product(point, torch.tensor([[1.0, 0.0]])).detach()
        tensor([[ 0.2500, -0.2500]])
    """
    how = point.batch.differentiation
    if in_transform() or not (how.second_order or how.constant):
        raise RuntimeError("A Hessian needs DoubleBackward(), outside of transforms and compiled regions.")
    if isinstance(point, Parts):
        parts = zip(point.parts, point.part_rows, strict=True)
        products = [hessian_product(part, direction[rows], create_graph=create_graph) for part, rows in parts]
        return joined(products, point.part_rows)
    there = point
    if how.constant:
        there = point.once("unfused", lambda: _once_more(point, sdpa_kernel(SDPBackend.MATH)))
    elif create_graph and point.once("has layer norm", lambda: _has_layer_norm(point)):
        there = point.once("written out", lambda: _once_more(point, _WrittenOut()))
    grad = there.slope(create_graph=True)
    if not grad.requires_grad:  # a loss linear in x
        return torch.zeros_like(direction)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    along = (grad * direction).sum()
    return torch.autograd.grad(along, [there.leaf], create_graph=create_graph and how.second_order, **options)[0]


def _once_more(point: Point, inside: AbstractContextManager[Any]) -> Point:
    """The point by a pass of its own: without fused attention, which has no second derivative, or written out."""
    batch = replace(point.batch, differentiation=DoubleBackward(fused=False))
    there = Point.of(batch, point.x, counts=False)
    with inside:
        _ = there.logits
    return there


def _has_layer_norm(point: Point) -> bool:
    """Whether PyTorch's LayerNorm is in the graph, whose third derivative takes the statistics for constants."""
    roots = [logits.grad_fn for logits in tensors_in(point.logits)]
    return any(node.name().startswith("NativeLayerNorm") for node in new_nodes(roots, ()))


class _WrittenOut(TorchFunctionMode):
    """LayerNorm by its formula, which has all derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_norm_by_formula(normalized_shape, eps, input, weight, bias)


@final
@dataclass(frozen=True)
class Curvature(Penalty):
    r"""CURE: the squared change of the gradient over a step to where the loss rises.

    .. math:: R_b = \|\nabla\ell(x_b + \delta_b) - \nabla\ell(x_b)\|_2^2

    Moosavi-Dezfooli, Fawzi, Uesato & Frossard, "Robustness via Curvature Regularization, and Vice Versa" (CVPR 2019).
    The step :math:`\delta_b` leads to where the loss rises most within the threat model, to first order, and is held
    constant; both gradients are differentiated. Divided by the squared length of the step, it is approximately the
    squared norm of the Hessian times the step's direction.

    The paper steps by h along the sign of the gradient, scaled to a Euclidean length of 1. For images of n values that
    is ``Linf(h / n**0.5)``, unless some entries of the gradient are 0. On CIFAR-10, for eps 8/255, h rises to 1.5,
    which is ``Linf(1.5 / 3072**0.5)``, 6.9/255, with a weight of 4, while a trained network is fine-tuned for 10 to 20
    epochs. The released code takes the gradients of the *mean* loss and does not square the norm, so its weight depends
    on the batch size and does not carry over. A step costs 4 natural steps.

    Attributes:
        threat: The step goes to the boundary of this ball: along the sign of the gradient for ``Linf``, along the
            gradient for ``L2``.

    Example:
        The gradient of a linear model's logit does not turn, and that of its loss does:

        >>> from gradreg import Linf
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(Curvature(Linf(0.1))(point).item(), 5)
        0.00497
    """

    unit: ClassVar[str] = "squared loss per squared unit of pixel"

    threat: ThreatModel

    @property
    def name(self) -> str:
        return f"curvature within {self.threat}"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        here = point.gradient()
        there = point.at(point.x + self.threat.maximizer(here.detach()).to(point.x.dtype)).gradient()
        return (there - here).square().flatten(1).sum(1)


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
        seed: Of the random direction, which depends on it and on the sample alone; None for another one for every
            batch.
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
class NormalizedCurvature(_PowerIteration):
    r"""Normalised curvature, :math:`\|\nabla^2_{x_b} \ell_b\|_2 / (\|\nabla_{x_b} \ell_b\|_2 + c)`.

    Srinivas, Matoba, Lakkaraju & Fleuret, "Efficient Training of Low-Curvature Neural Networks" (NeurIPS 2022): how
    far the gradient turns, relative to its length, and so no matter of the scale of the loss. Table A.1 of Rodríguez
    Muñoz (MIT 2024).

    As a penalty it is differentiated through both norms, the upper one as in :class:`HessianNorm`. What costs less is
    :class:`Curvature`.

    Attributes:
        offset: c, which keeps a gradient of 0 from dividing.

    Example:
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(NormalizedCurvature()(point).item(), 4)
        0.7071
    """

    unit: ClassVar[str] = "per unit of pixel"
    offset: float = 1e-6

    @property
    def name(self) -> str:
        return "normalized curvature"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        return self.path(point)[:, -1] / (length(point.gradient()) + self.offset)

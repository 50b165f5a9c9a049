"""The Jacobian of the logits with respect to the input."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from gradreg.checks import check_logits
from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.noise import draws_for
from gradreg.penalties.penalty import RandomPenalty
from gradreg.point import Point
from gradreg.threat_models import at_least_float32


@dataclass(frozen=True, eq=False)
class _Projection:
    """The logits along one direction for each sample: a score to differentiate."""

    direction: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return (logits * self.direction).sum(1)


@final
@dataclass(frozen=True)
class JacobianPenalty(RandomPenalty):
    r"""Half of the squared Frobenius norm of the Jacobian of the logits, :math:`\tfrac12 \|J_b\|_F^2`, or an estimate.

    With k random directions :math:`v` of length 1 in the space of the K logits, Hoffman, Roberts & Yaida, "Robust
    Learning with Jacobian Regularization" (2019), estimate it without bias by

    .. math:: R_b = \frac{K}{2k} \sum_{i=1}^{k} \|\nabla_{x_b} \langle v_i, f(x_b) \rangle\|_2^2

    with k = 1 and a weight of 0.01 (MNIST, CIFAR-10 and ImageNet, no eps). ``projections="exact"`` takes all K rows, as
    Jakubovitz & Giryes, "Improving DNN Robustness to Adversarial Attacks using Jacobian Regularization" (ECCV 2018),
    who penalise the norm itself, not squared, in a phase after the training. Nothing is detached.

    With ``centred=True`` the directions are orthogonal to the vector of ones, as adding a constant to all logits
    changes no decision:

    .. math:: R_b = \tfrac12 \|(I - \tfrac1K 11^\top) J_b\|_F^2 = \tfrac{K}{4} \cdot \tfrac{1}{K^2}
              \sum_{l,m} \|\nabla f_l - \nabla f_m\|_2^2

    which is K / 4 of the cross-Lipschitz penalty of Hein & Andriushchenko, "Formal Guarantees on the Robustness of a
    Classifier against Adversarial Manipulation" (NeurIPS 2017). It takes no labels.

    One projection costs 2 natural steps, and each further one, as each of the K rows, one more.

    Attributes:
        projections: How many random directions, or ``"exact"``.
        centred: Whether they are orthogonal to the vector of ones.
        seed: Of the directions, which depend on it and on the sample alone; None for others for every batch.

    Raises:
        ValueError: If projections is no whole number above 0, or logits are not of shape (B, K), with K > 1 if centred.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> point = Point(model, cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> JacobianPenalty("exact")(point).detach(), JacobianPenalty("exact", centred=True)(point).detach()
        (tensor([12.5000]), tensor([6.2500]))
    """

    unit: ClassVar[str] = "squared logits per squared unit of pixel"
    looks_elsewhere: ClassVar[bool] = False

    projections: int | Literal["exact"] = 1
    centred: bool = False

    def __post_init__(self) -> None:
        if self.projections != "exact" and not (isinstance(self.projections, int) and self.projections > 0):
            raise ValueError(
                f'JacobianPenalty: projections is a whole number above 0, or "exact"; got {self.projections!r}.'
            )

    @property
    def name(self) -> str:
        return f"{'centred ' if self.centred else ''}Jacobian, {self.projections} projections"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        scores = point.once((self, "projections"), lambda: self._scores(point))
        squares = [point.gradient(of).square().flatten(1).sum(1) for of in scores]
        return 0.5 * torch.stack(squares).sum(0)

    def _scores(self, point: Point) -> list[_Projection]:
        """Scores whose squared gradients add up to the squared norm, in expectation."""
        logits = at_least_float32(check_logits(point.logits))
        if logits.ndim != 2 or (self.centred and logits.shape[1] < 2):
            raise ValueError(
                f"JacobianPenalty needs logits of shape (B, K){', K > 1' if self.centred else ''}, got shape "
                f"{tuple(logits.shape)}."
            )
        classes = logits.shape[1]
        if self.projections == "exact":
            rows = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            return [_Projection(row.expand_as(logits)) for row in (rows - 1 / classes if self.centred else rows)]
        drawn = point.drawn((self, "directions"), lambda: self._normal(point, logits)).to(logits.dtype)
        if self.centred:
            drawn = drawn - drawn.mean(2, keepdim=True)
        scale = ((classes - self.centred) / self.projections) ** 0.5
        return [_Projection(scale * way / way.norm(dim=1, keepdim=True)) for way in drawn]

    def _normal(self, point: Point, logits: Tensor) -> Tensor:
        """Normal numbers (k, B, K), those of each sample from its own generator if there is a seed."""
        count, classes = int(self.projections), logits.shape[1]
        if self.seed is None:
            return torch.randn(count, len(logits), classes, device=logits.device)

        def draw(generator: torch.Generator | None) -> Tensor:
            return torch.randn(count, classes, generator=generator)

        return draws_for(draw, self.seed, point.batch.index, len(logits), stream=3).transpose(0, 1).to(logits.device)

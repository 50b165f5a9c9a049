r"""How the gradient of a penalty on an input gradient reaches the weights.

A penalty :math:`R(\nabla_x s)` of a score s depends on the weights through a gradient, so its own gradient is a second
derivative. :class:`DoubleBackward` takes it exactly. :class:`FiniteDifference` takes it from one more forward pass,
because

.. math:: \nabla_\theta R(\nabla_x s) = \nabla_\theta \langle u, \nabla_x s \rangle, \qquad u = \frac{\partial
R}{\partial g}

(u held fixed) is the derivative of s along the direction u, differentiated with respect to the weights. That holds for
every penalty, and where second derivatives do not exist: fused attention, compiled models, fully sharded parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from gradreg import checks
from gradreg.gradients import Score, in_transform, with_pull_back
from gradreg.threat_models import ThreatModel

PenaltyFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Differentiation(ABC):
    """A way to make penalties of an input gradient differentiable with respect to the weights.

    Attributes:
        looks_elsewhere: Whether it evaluates the score at other inputs than x, so that random numbers must be replayed.
    """

    looks_elsewhere: ClassVar[bool] = True

    @abstractmethod
    def penalties(self, score: Score, functions: Sequence[PenaltyFunction]) -> list[Tensor]:
        """The values of several penalties on the gradient of one score, each of shape ``(B,)``.

        Their values are exact; their gradients with respect to the weights are what this object stands for.
        """

    def cancels(self, loss_weight: float, penalty_weight: float) -> bool:
        """Whether the penalties' gradients take all weight away that the objective gives to the losses at x."""
        return False


@final
@dataclass(frozen=True)
class DoubleBackward(Differentiation):
    """The exact gradient, by differentiating the backward pass.

    A step costs about twice a natural one. It needs a second derivative of every operation in the model:
    :func:`gradreg.preflight` tells whether yours has them. (Drucker & LeCun, "Improving generalization performance
    using double backpropagation", IEEE Transactions on Neural Networks 1992.)

    Attributes:
        fused: Whether the second derivatives of convolutions, normalisations, GELU and SiLU are taken by functions of
            gradreg in the place of PyTorch's, which need more passes over memory. The gradient is the same up to
            rounding. False leaves all to PyTorch.

    Example:
        >>> from gradreg import GradNormPenalty, Linf, PenalizedLoss, Term
        >>> criterion = torch.nn.CrossEntropyLoss(reduction="none")
        >>> term = Term(GradNormPenalty(Linf(8 / 255)))
        >>> PenalizedLoss(criterion, {"grad_norm": term}, differentiation=DoubleBackward()).differentiation
        DoubleBackward(fused=True)
    """

    looks_elsewhere: ClassVar[bool] = False
    fused: bool = True

    def penalties(self, score: Score, functions: Sequence[PenaltyFunction]) -> list[Tensor]:
        grad = score.gradient(True)
        return [function(grad, score.x) for function in functions]


@final
@dataclass(frozen=True)
class FiniteDifference(Differentiation):
    r"""The gradient from a finite difference of the score along the penalty's own gradient.

    .. math:: D = \frac{s(x + h u) - s(x)}{h} \;\text{(forward)}, \qquad
              D = \frac{s(x + h u) - s(x - h u)}{2h} \;\text{(central)}

    with :math:`u = \partial R / \partial g` fixed and h, for each sample, such that the displacement :math:`h u` has
    the size ``step`` in units of the threat model. The error is of order ``step`` (forward) or ``step`` squared
    (central) in float32; far below 0.01 rounding takes over, and in bfloat16 a quarter is about the least. For
    :class:`gradreg.GradNormPenalty` the displacement is ``step`` times the maximiser, so that ``step=1`` looks where
    FGSM looks.

    One backward pass gives the gradient of the loss with respect to the input; a second one, when ``total`` is
    differentiated, that with respect to the weights. With ``one_pass=True`` they are one and the same, so that a step
    costs a natural one for each of the two points: 2, where it is 2.33 otherwise and 2 for :class:`DoubleBackward`.
    And the activations of the first point are freed before the second is looked at. Where the difference takes away as
    much of the loss at x as the objective has of it, as in FGSM training, the first pass leaves out the weights: 1.67.

    All passes draw the same random numbers, and only the first moves running statistics. Inside transforms and compiled
    regions random numbers cannot be replayed: a module with dropout is refused there, and in a model given as a
    function, whose modules cannot be seen, dropout would make the result wrong.

    Attributes:
        step: Size of the displacement in units of the threat model: 0.25 is a quarter of eps.
        threat: The units, for penalties that have no ``threat`` of their own (edge alignment, a plain function).
        scheme: ``"forward"``, one more forward and backward pass for each penalty, or ``"central"``, two.
        one_pass: Whether to take both gradients of the loss in one backward pass, before the objective returns. Of its
            output only ``total`` then carries a gradient. Every penalty must be a :class:`gradreg.GradNormPenalty` of
            the loss: its displacement has the same size for every sample, and only then is the share of each sample in
            the first pass known before that pass. Not for parameters with hooks on their gradients or sharded ones.
            Inside transforms and compiled regions it changes nothing.

    Raises:
        ValueError: If step is not above 0 or the scheme is unknown; and, when called, if no threat model is known, or
            one with eps 0 where the penalty moves the input.
        TypeError: When called, if x is in half precision.

    Example:
        >>> from gradreg import EdgeAlignmentPenalty, Linf, PenalizedLoss, Term, sampled_class
        >>> criterion = torch.nn.CrossEntropyLoss(reduction="none")
        >>> term = Term(EdgeAlignmentPenalty(), of=sampled_class(0.5))
        >>> difference = FiniteDifference(step=0.25, threat=Linf(8 / 255))
        >>> objective = PenalizedLoss(criterion, {"edges": term}, differentiation=difference)
    """

    step: float = 0.25
    threat: ThreatModel | None = None
    scheme: Literal["forward", "central"] = "forward"
    one_pass: bool = False

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(
                f"FiniteDifference: step is a fraction of eps and must be above 0 (0.25, say), got {self.step}."
            )
        if self.scheme not in ("forward", "central"):
            raise ValueError(f'FiniteDifference: scheme is "forward" or "central", got {self.scheme!r}.')

    def cancels(self, loss_weight: float, penalty_weight: float) -> bool:
        taken = penalty_weight / self.step if self.scheme == "forward" else 0.0
        return math.isclose(loss_weight, taken)

    def penalties(self, score: Score, functions: Sequence[PenaltyFunction]) -> list[Tensor]:
        if score.x.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"FiniteDifference: x is in {score.x.dtype}, whose neighbouring values are about as far apart as the "
                "step. Keep x in float32 and run the model under torch.autocast."
            )
        grad = score.gradient(False).detach()
        return [self._penalty(score, grad, function) for function in functions]

    def _penalty(self, score: Score, grad: Tensor, function: PenaltyFunction) -> Tensor:
        values, pull_back = with_pull_back(lambda g: function(g, score.x), grad)
        (direction,) = pull_back(torch.ones_like(values))
        size = self._threat_of(function).norm(direction)
        if not in_transform() and checks.may_look(self, size, validate=False) and bool(size.isinf().any()):
            raise ValueError(
                "FiniteDifference: the threat model's eps is 0 at inputs that the penalty moves. Give one with eps "
                "above 0 everywhere."
            )
        moves = size > 0
        if getattr(function, "gradient_is_perturbation", False):
            size = moves.to(size.dtype)  # it is taken as it is: bounds may have made it shorter
        per_step = torch.where(moves, self.step / size.where(moves, 1.0), 0.0)
        displacement = per_step.view(-1, *[1] * (grad.ndim - 1)) * direction
        displacement = displacement.to(score.x.dtype)
        if self.scheme == "forward":
            rise = (score.at(score.x + displacement) - score.values) / self.step
        else:
            rise = (score.at(score.x + displacement) - score.at(score.x - displacement)) / (2 * self.step)
        # In one pass every sample must count the same: the size is 1, and nothing rises where nothing moves.
        derivative = rise if self.one_pass else torch.where(moves, rise * size, 0.0)
        return values.detach() + derivative - derivative.detach()

    def _threat_of(self, function: PenaltyFunction) -> ThreatModel:
        threat = getattr(function, "threat", None) or self.threat
        if threat is None:
            raise ValueError(
                f"FiniteDifference: {getattr(function, '__name__', type(function).__name__)} has no threat model, so "
                f"the step of {self.step} has no unit. Give one: FiniteDifference(step={self.step}, threat=Linf(4 / "
                "255))."
            )
        return threat

r"""How an input gradient depends on the weights.

A penalty :math:`R(\nabla_x s)` of a score s depends on the weights through a gradient, so its own gradient is a second
derivative. :class:`DoubleBackward` takes it exactly. :class:`FiniteDifference` takes it from one more forward pass,
because, with :math:`u = \partial R / \partial g` held fixed,
:math:`\nabla_\theta R(\nabla_x s) = \nabla_\theta \langle u, \nabla_x s \rangle` is the derivative of s along u,
differentiated with respect to the weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.gradients import in_transform
from gradreg.second_derivatives import FirstDerivatives, SecondDerivatives
from gradreg.threat_models import ThreatModel
from gradreg.wrappers import is_compiled

Around = Callable[[Tensor], AbstractContextManager[object]]
NOTHING: Around = nullcontext
Point = Any  # gradreg.Point, which stands in a higher layer


@final
@dataclass
class Requests:
    """The input gradients that were asked for in a step."""

    replay: Any = None  # gradreg.replay.Replay: makes what is computed twice draw the same random numbers
    unit: ThreatModel | None = None  # in which a step is measured, where a differentiation has none of its own
    taken: list[tuple[Point, Any, Tensor]] = field(default_factory=list)  # point, score, gradient
    offsets: list[Tensor] = field(default_factory=list)  # in a transform: what makes the gradients differentiable


@dataclass(frozen=True)
class Differentiation(ABC):
    """A way to make input gradients differentiable with respect to the weights.

    Attributes:
        second_order: Whether it differentiates the model twice.
        constant: Whether input gradients do not depend on the weights.
        looks_elsewhere: Whether it runs the model at other points.
    """

    second_order: ClassVar[bool] = False
    constant: ClassVar[bool] = False
    looks_elsewhere: ClassVar[bool] = False

    @abstractmethod
    def gradient(self, point: Point, of: Any) -> Tensor:
        """The gradient of a score with respect to the point's input, as penalties see it."""

    def completed(self, total_of_terms: Callable[[], Tensor], requests: Requests) -> Tensor:
        """The total of an objective, with the gradient that this object stands for."""
        return total_of_terms()

    def around(self, model: object, x: Tensor) -> Around:
        """What the model runs within, while the gradient with respect to x is to be taken."""
        # Faster first derivatives exist for a CPU; and a compiled model would be compiled once more for the mode.
        if x.device.type != "cpu" or not isinstance(model, nn.Module) or any(map(is_compiled, model.modules())):
            return nullcontext
        return FirstDerivatives


@final
@dataclass(frozen=True)
class InputOnly(Differentiation):
    """Input gradients that do not depend on the weights: for attacks and measurements."""

    constant: ClassVar[bool] = True

    def gradient(self, point: Point, of: Any) -> Tensor:
        return point.slope(of, create_graph=False).detach()


@final
@dataclass(frozen=True)
class DoubleBackward(Differentiation):
    """The exact gradient, by differentiating the backward pass.

    A step costs about twice a natural one. It needs a second derivative of every operation in the model:
    :func:`gradreg.preflight` tells whether yours has them. (Drucker & LeCun, "Improving generalization performance
    using double backpropagation", IEEE Transactions on Neural Networks 1992.)

    Attributes:
        fused: Whether the second derivatives of convolutions, normalisations, GELU and SiLU are taken by functions of
            gradreg instead of PyTorch's, which need more passes over memory. The gradient is the same up to rounding.
            False leaves all to PyTorch.

    Example:
        >>> from gradreg import GradNormPenalty, Linf, PenalizedLoss, Term
        >>> term = Term(GradNormPenalty(Linf(8 / 255)))
        >>> PenalizedLoss(terms={"grad_norm": term}, differentiation=DoubleBackward()).differentiation
        DoubleBackward(fused=True)
    """

    second_order: ClassVar[bool] = True
    fused: bool = True

    def gradient(self, point: Point, of: Any) -> Tensor:
        return point.slope(of, create_graph=True)

    def around(self, model: object, x: Tensor) -> Around:
        return SecondDerivatives if self.fused else nullcontext


@final
@dataclass(frozen=True)
class FiniteDifference(Differentiation):
    r"""The gradient from a finite difference of each score along the direction in which the objective depends on it.

    .. math:: D = \frac{s(x + h u) - s(x)}{h} \;\text{(forward)}, \qquad
              D = \frac{s(x + h u) - s(x - h u)}{2h} \;\text{(central)}

    with :math:`u = \partial L / \partial g` the derivative of the total L with respect to the input gradient, held
    fixed, and h such that the largest :math:`h u_b` of a sample has the size ``step`` in units of the threat model.
    The error is of order ``step`` (forward) or ``step`` squared (central) in float32; far below 0.01 rounding takes
    over, and in bfloat16 a quarter is about the least. For :class:`gradreg.GradNormPenalty` :math:`h u` is ``step``
    times the maximiser, so that ``step=1`` looks where FGSM looks.

    It works for any function of any number of gradients, at any number of points, and where second derivatives do not
    exist: fused attention, compiled models, sharded parameters. Each gradient costs one more forward and backward pass:
    2.33 natural steps for a :class:`gradreg.GradNormPenalty`. The values of penalties are exact.

    All passes are one function: they draw the same random numbers and find buffers as the first pass found them, and
    only the first one moves these. (What a forward pass detaches, as a centre of the batch, is a constant for
    :class:`DoubleBackward` and moves with x here. Give the model as a module: a plain function hides what it keeps.
    Checkpointing repeats a forward pass in the backward pass, and finds buffers as they are by then.)

    Attributes:
        step: Size of the displacement in units of the threat model: 0.25 is a quarter of eps.
        threat: The units. Default: those of the objective's first penalty that has a ``threat``.
        scheme: ``"forward"``, one more forward and backward pass for each gradient, or ``"central"``, two.

    Raises:
        ValueError: If step is not above 0 or the scheme is unknown; and, when called, if no threat model is known, or
            one with eps 0 where the penalty moves the input.
        TypeError: When called, if x is in half precision.
        RuntimeError: When called, if random numbers are drawn inside a compiled region, which cannot repeat them.

    Example:
        >>> from gradreg import EdgeAlignmentPenalty, Linf, PenalizedLoss, Term
        >>> difference = FiniteDifference(step=0.25, threat=Linf(8 / 255))
        >>> objective = PenalizedLoss(terms={"edges": Term(EdgeAlignmentPenalty())}, differentiation=difference)
    """

    looks_elsewhere: ClassVar[bool] = True
    step: float = 0.25
    threat: ThreatModel | None = None
    scheme: Literal["forward", "central"] = "forward"

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(
                f"FiniteDifference: step is a fraction of eps and must be above 0 (0.25, say), got {self.step}."
            )
        if self.scheme not in ("forward", "central"):
            raise ValueError(f'FiniteDifference: scheme is "forward" or "central", got {self.scheme!r}.')

    def gradient(self, point: Point, of: Any) -> Tensor:
        requests = point.batch.requests
        for known, score, grad in requests.taken:
            if known is point and score == of:
                return grad
        if point.x.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"FiniteDifference: x is in {point.x.dtype}, whose neighbouring values are about as far apart as the "
                "step. Keep x in float32 and run the model under torch.autocast."
            )
        grad = point.slope(of, create_graph=False).detach()
        if not in_transform():
            grad.requires_grad_()  # a leaf: what the total makes of it is asked of autograd
        elif requests.offsets:
            grad = grad + requests.offsets[len(requests.taken)]
        requests.taken.append((point, of, grad))
        return grad

    def completed(self, total_of_terms: Callable[[], Tensor], requests: Requests) -> Tensor:
        transformed = in_transform()
        with requests.replay.drawing("terms") if transformed else nullcontext():
            total = total_of_terms()
        taken = list(requests.taken)
        if not taken:
            return total
        grads = [grad for *_, grad in taken]
        if transformed:
            directions = self._directions_in_transform(total_of_terms, requests, grads)
        else:
            directions = torch.autograd.grad(total, grads, retain_graph=True, allow_unused=True, materialize_grads=True)
        for (point, of, _), direction in zip(taken, directions, strict=True):
            total = total + self._difference(point, of, direction, self._unit(requests))
        return total

    @staticmethod
    def _directions_in_transform(
        total_of_terms: Callable[[], Tensor], requests: Requests, grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Derivatives of the total with respect to the gradients, for which it is computed a second time."""

        def total_with(offsets: list[Tensor]) -> Tensor:
            requests.taken, requests.offsets = [], offsets
            with requests.replay.drawing("terms"):
                return total_of_terms()

        pulled: Any = torch.func.vjp(total_with, [torch.zeros_like(grad) for grad in grads])
        total, pull_back = pulled
        requests.taken, requests.offsets = [], []
        return pull_back(torch.ones_like(total))[0]

    def _difference(self, point: Point, of: Any, direction: Tensor, threat: ThreatModel) -> Tensor:
        """0, with the derivative of the score along the direction as its gradient with respect to the weights."""
        # One h for all samples: each may see the others, through BatchNorm or a contrastive loss.
        size = threat.norm(direction).amax()
        if not in_transform() and checks.may_look(self, size, validate=False) and bool(size.isinf()):
            raise ValueError(
                "FiniteDifference: the threat model's eps is 0 at inputs that the penalty moves. Give one with eps "
                "above 0 everywhere."
            )
        displacement = (direction * torch.where(size > 0, self.step / size.where(size > 0, 1.0), 0.0)).to(point.x.dtype)
        ahead = point.at(point.x + displacement, differentiable=False).score(of)
        behind = point.score(of)
        if self.scheme == "central":
            behind = point.at(point.x - displacement, differentiable=False).score(of)
        rise = (ahead - behind).sum() / (self.step if self.scheme == "forward" else 2 * self.step)
        derivative = torch.where(size > 0, rise * size, 0.0)
        return derivative - derivative.detach()

    def _unit(self, requests: Requests) -> ThreatModel:
        threat = self.threat or requests.unit
        if threat is None:
            raise ValueError(
                f"FiniteDifference: no penalty of the objective has a threat model, so the step of {self.step} has no "
                f"unit. Give one: FiniteDifference(step={self.step}, threat=Linf(4 / 255))."
            )
        return threat

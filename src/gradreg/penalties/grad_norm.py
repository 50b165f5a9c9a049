"""The dual norm of the input gradient: the thesis's penalty, and its squared form."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch  # noqa: F401  (in the examples)
from jaxtyping import Float
from torch import Tensor

from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.penalties.penalty import Penalty
from gradreg.point import Point
from gradreg.selectors import ClassSelector
from gradreg.threat_models import Bounds, Box, ThreatModel, at_least_float32, check_bounds_form, room


def grad_norm(grad: Float[Tensor, "B *x"], threat: ThreatModel, *, box: Box | None = None) -> Float[Tensor, "B"]:
    r"""First-order estimate of how much the loss can rise inside the threat model, :math:`\|\varepsilon g_b\|_q`.

    For ``Linf(eps)`` it is :math:`\varepsilon \|g_b\|_1`, the penalty of Rodríguez Muñoz ("Adversarial robustness
    without perturbations", MIT 2024, equation 4.1).

    Args:
        grad: Gradient of the per-sample loss with respect to the input, from :func:`gradreg.input_gradient`.
        threat: The perturbations.
        box: Lower and upper limits of each coordinate's change, ``(-x, 1 - x)`` for pixels x in [0, 1]: the rise is
            then that of perturbations which leave an image an image.

    Returns:
        One number per sample, in units of the loss; in float32 for gradients in half precision.

    Example:
        >>> from gradreg import Linf
        >>> grad_norm(torch.tensor([[3.0, -4.0]]), Linf(eps=0.5))
        tensor([3.5000])
    """
    return threat.dual_norm(grad, box)


_DUAL = {"Linf": "L1", "L2": "L2", "L1": "Linf"}


@final
@dataclass(frozen=True, eq=False)  # bounds may be tensors, which cannot be compared so
class GradNormPenalty(Penalty):
    r"""The dual norm of the input gradient, :math:`\|\varepsilon \nabla_{x_b} s_b\|_q`: see :func:`grad_norm`.

    Of the loss, a weight of 1 has a meaning: loss plus penalty is then the worst loss inside the threat model, to first
    order. The thesis weighs the loss by 0.8, the penalty by 1.2, at :math:`\varepsilon = 4/255`. It needs a model with
    smooth activations (:func:`gradreg.smoothify`): the input gradient of a piecewise linear model has a derivative of 0
    with respect to every bias almost everywhere, and the penalty collapses (section 4.3 there).

    With ``bounds`` only perturbations count that leave every pixel in its range, which are all that an attack can make:

    .. math:: R_b = \max \{\langle g_b, \delta\rangle : \|\delta/\varepsilon\|_p \le 1,\ l \le x_b + \delta \le h\}

    For ``Linf(eps)`` that is :math:`\sum_i g_i^+ \min(\varepsilon, h - x_i) + g_i^- \min(\varepsilon, x_i - l)`, so
    that a pixel which is black already has nothing to pay for a slope downwards. The thesis has no bounds.

    With ``squared=True`` and ``L2(1.0)`` it is :math:`\|g_b\|_2^2` of Ross & Doshi-Velez, "Improving the Adversarial
    Robustness and Interpretability of Deep Neural Networks by Regularizing their Input Gradients" (AAAI 2018, equation
    6), before them "double backpropagation" (Drucker & LeCun, 1992). With :class:`gradreg.FiniteDifference` that is
    close to what Finlay & Oberman take ("Scaleable input gradient regularization for adversarial robustness", 2019; the
    docs have their own form). Nothing is detached. It costs 2 natural steps, with finite differences 2.33.

    As a measurement, ``GradNormPenalty(Linf(1.0))`` is the L1 norm of Table 4.1 of the thesis, ``L2(1.0)`` the
    Euclidean norm, ``L1(1.0)`` the largest entry, per unit of pixel.

    Attributes:
        threat: The perturbations to be robust to, in the units of the model's input.
        bounds: Lowest and highest value of an input, as attacks have them: ``(0.0, 1.0)`` for pixels, tensors of shape
            ``(C, 1, 1)`` for images that a loader normalised. None: any perturbation of the threat model counts.
        of: What is differentiated: None for the loss, or a selector for the logit of a class.
        squared: Whether the norm is squared; its units are then squared as well.

    Raises:
        TypeError: If threat is no threat model.
        ValueError: If bounds have one dimension.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        >>> point = Point(model, cross_entropy, torch.zeros(1, 2), torch.tensor([0]))  # whose gradient is (-1.5, 2)
        >>> GradNormPenalty(Linf(eps=0.5))(point)
        tensor([1.7500], grad_fn=<SumBackward1>)

        A black pixel cannot get darker:

        >>> GradNormPenalty(Linf(eps=0.5), bounds=(0.0, 1.0))(point)
        tensor([1.], grad_fn=<SumBackward1>)
    """

    looks_elsewhere: ClassVar[bool] = False

    threat: ThreatModel
    bounds: Bounds | None = None
    of: ClassSelector | None = None
    squared: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"GradNormPenalty: expected a threat model such as Linf(4 / 255), got {type(self.threat).__name__}."
            )
        if self.bounds is not None:
            check_bounds_form(self.bounds)

    @property
    def name(self) -> str:
        eps, kind = self.threat.eps, type(self.threat).__name__
        per_unit = not isinstance(eps, Tensor) and eps == 1 and kind in _DUAL
        norm = f"gradient {_DUAL[kind]} norm" if per_unit else f"gradient norm in {self.threat}"
        bounds = "" if self.bounds is None else f" within {self.bounds}"
        norm = f"squared {norm}" if self.squared else norm
        return norm + bounds + ("" if self.of is None else f", {type(self.of).__name__}")

    @property
    def unit(self) -> str:
        return f"{'squared ' if self.squared else ''}units of the score"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        box = None if self.bounds is None else room(at_least_float32(point.x), self.bounds)
        norm = grad_norm(point.gradient(self.of), self.threat, box=box)
        return norm.square() if self.squared else norm

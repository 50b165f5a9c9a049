"""Penalties: functions of an input gradient, one number per sample.

A penalty knows the gradient and the input, and nothing else: no model, no labels, no weight. So it is also a quantity
to measure, and any function of ``(grad, x)`` that returns one number per sample can stand in its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, final

from jaxtyping import Float
from torch import Tensor, nn

from gradreg.edges import oriented_energy
from gradreg.threat_models import Bounds, Box, ThreatModel, at_least_float32, check_bounds_form, room, unit

EnergyFunction = Callable[..., Tensor]
Level = Literal["sample", "batch"]


class Penalty(nn.Module, ABC):
    """A penalty as a module without state: what :class:`gradreg.Term` takes, beside plain functions.

    Attributes:
        gradient_is_perturbation: Whether its gradient with respect to ``grad`` is a perturbation of its threat model,
            along which :class:`gradreg.FiniteDifference` steps as it is; any other gradient is a direction alone.
    """

    gradient_is_perturbation: ClassVar[bool] = False

    @abstractmethod
    def forward(self, grad: Float[Tensor, "B *x"], x: Float[Tensor, "B *x"]) -> Float[Tensor, "B"]:
        """One number per sample, differentiable with respect to grad."""


def grad_norm(grad: Float[Tensor, "B *x"], threat: ThreatModel, *, box: Box | None = None) -> Float[Tensor, "B"]:
    r"""First-order estimate of how much the loss can rise inside the threat model, :math:`\|\varepsilon g_b\|_q`.

    For ``Linf(eps)`` it is :math:`\varepsilon \|g_b\|_1`, the penalty of Rodríguez Muñoz ("Adversarial robustness
    without perturbations", MIT 2024, equation 4.1).

    Args:
        grad: Gradient of the per-sample loss with respect to the input, from :func:`gradreg.input_gradient`.
        threat: The perturbations to withstand.
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


@final
class GradNormPenalty(Penalty):
    r"""The dual norm of the input gradient, :math:`\|\varepsilon g_b\|_q`: see :func:`grad_norm`.

    A weight of 1 has a meaning: loss plus penalty is then the worst loss inside the threat model, to first order. The
    thesis weighs the loss by 0.8 and the penalty by 1.2 at :math:`\varepsilon = 4/255`. It needs a model with smooth
    activations (:func:`gradreg.smoothify`): the input gradient of a piecewise linear model has a derivative of 0
    with respect to every bias almost everywhere, and the penalty collapses (section 4.3 there).

    With ``bounds`` only perturbations count that leave every pixel in its range, which are all that an attack can make:

    .. math:: R_b = \max \{\langle g_b, \delta\rangle : \|\delta/\varepsilon\|_p \le 1,\ l \le x_b + \delta \le h\}

    For ``Linf(eps)`` that is :math:`\sum_i g_i^+ \min(\varepsilon, h - x_i) + g_i^- \min(\varepsilon, x_i - l)`, so
    that a pixel which is black already has nothing to pay for a slope downwards. The thesis has no bounds.

    Args:
        threat: The perturbations to withstand, in the units of the model's input.
        bounds: Lowest and highest value of an input, as attacks have them: ``(0.0, 1.0)`` for pixels, tensors of shape
            ``(C, 1, 1)`` for images that a loader normalised. None: any perturbation of the threat model counts.

    Shape:
        grad ``(B, ...)``, x ``(B, ...)``, or absent where there are no bounds; result ``(B,)``.

    Raises:
        TypeError: If threat is no threat model.
        ValueError: If bounds have one dimension; when called, if there are bounds and no x.

    Example:
        >>> from gradreg import Linf
        >>> GradNormPenalty(Linf(eps=0.5))(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
        tensor([3.5000, 0.5000])

        A black pixel cannot get darker, and a white one no lighter:

        >>> black, white = torch.tensor([[0.0, 0.2]]), torch.tensor([[1.0, 0.2]])
        >>> penalty = GradNormPenalty(Linf(eps=0.5), bounds=(0.0, 1.0))
        >>> penalty(torch.tensor([[3.0, -4.0]]), black), penalty(torch.tensor([[3.0, -4.0]]), white)
        (tensor([2.3000]), tensor([0.8000]))
    """

    gradient_is_perturbation = True

    def __init__(self, threat: ThreatModel, *, bounds: Bounds | None = None) -> None:
        super().__init__()
        if not isinstance(threat, ThreatModel):
            raise TypeError(
                f"GradNormPenalty: expected a threat model such as Linf(4 / 255), got {type(threat).__name__}."
            )
        if bounds is not None:
            check_bounds_form(bounds)
        self.threat = threat
        self.bounds = bounds

    def forward(self, grad: Float[Tensor, "B *x"], x: Float[Tensor, "B *x"] | None = None) -> Float[Tensor, "B"]:
        """The dual norm of each sample's gradient."""
        if self.bounds is None:
            return grad_norm(grad, self.threat)
        if x is None:
            raise ValueError("GradNormPenalty: with bounds it depends on where x is: call penalty(grad, x).")
        return grad_norm(grad, self.threat, box=room(at_least_float32(x), self.bounds))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return repr(self.threat) if self.bounds is None else f"{self.threat!r}, bounds={self.bounds}"


def edge_alignment(
    grad: Float[Tensor, "B C H W"],
    x: Float[Tensor, "B C H W"],
    *,
    sigma: float = 1.0,
    energy: EnergyFunction = oriented_energy,
    level: Level = "sample",
) -> Float[Tensor, "B"]:
    r"""How far the input gradient points away from the image's edges, :math:`1 - \cos(g_b, E(x_b))`.

    Rodríguez Muñoz ("Adversarial robustness without perturbations", MIT 2024, equation 5.1), where g is the gradient of
    a class logit, the class drawn from the model's own prediction (equation 5.2: :class:`gradreg.sampled_class`). It
    says nothing of the gradient's size. The gradient keeps its sign, and edge energies are never negative.

    Where the gradient or the energy of a sample is 0 its cosine counts as 0, with a zero gradient.

    Args:
        grad: Gradient of a score with respect to the input.
        x: The images that the score was computed from.
        sigma: Width of the edge filter in pixels.
        energy: The edge map, :func:`gradreg.oriented_energy` (the thesis's text) or
            :func:`gradreg.contour_energy` (its released code), or any function ``energy(x, sigma=sigma)`` whose
            result broadcasts against grad.
        level: ``"sample"``: one cosine per image. ``"batch"``: one cosine over all images of the batch, as in the
            released code, split into one share per sample so that the *mean* of the result is 1 minus that cosine.
            Images with a large gradient or many edges then count more. Twice that mean is the code's squared error
            between gradient and edges, each divided by its root mean square.

    Returns:
        One number per sample, without units; in [0, 2] for level ``"sample"``.

    Raises:
        ValueError: If grad and x differ in shape, are not images, or level is neither.

    Example:
        >>> x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> edge_alignment(oriented_energy(x), x).abs().max() < 1e-6
        tensor(True)
    """
    if grad.ndim != 4 or grad.shape != x.shape:
        raise ValueError(
            f"edge_alignment: expected grad and x to be images of one shape (B, C, H, W), got {tuple(grad.shape)} and "
            f"{tuple(x.shape)}."
        )
    if level not in ("sample", "batch"):
        raise ValueError(f'edge_alignment: level is "sample" or "batch", got {level!r}.')
    grad = at_least_float32(grad)
    edges = energy(at_least_float32(x), sigma=sigma).to(grad.dtype).expand_as(grad)
    if level == "batch":
        return 1 - len(grad) * (unit(grad[None]) * unit(edges[None]))[0].flatten(1).sum(1)
    return 1 - (unit(grad) * unit(edges)).flatten(1).sum(1)


@final
class EdgeAlignmentPenalty(Penalty):
    r"""One minus the cosine between input gradient and edge energy: see :func:`edge_alignment`.

    Use it on a class gradient, ``Term(EdgeAlignmentPenalty(), weight, of=sampled_class(0.5))``: on the gradient of the
    loss the thesis reports that it did not converge.

    Args:
        sigma: Width of the edge filter in pixels, above 0.
        energy: The edge map; a module-level function, so that the penalty can be pickled.
        level: ``"sample"`` or ``"batch"``.

    Shape:
        grad and x ``(B, C, H, W)``; result ``(B,)``.

    Example:
        >>> x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> EdgeAlignmentPenalty(sigma=1.0)(torch.zeros_like(x), x)
        tensor([1., 1.])
    """

    def __init__(
        self, sigma: float = 1.0, *, energy: EnergyFunction = oriented_energy, level: Level = "sample"
    ) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"EdgeAlignmentPenalty: sigma is a width in pixels and must be above 0, got {sigma}.")
        if level not in ("sample", "batch"):
            raise ValueError(f'EdgeAlignmentPenalty: level is "sample" or "batch", got {level!r}.')
        self.sigma = sigma
        self.energy = energy
        self.level = level

    def forward(self, grad: Float[Tensor, "B C H W"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
        """One minus the cosine for each sample."""
        return edge_alignment(grad, x, sigma=self.sigma, energy=self.energy, level=self.level)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"sigma={self.sigma}, energy={getattr(self.energy, '__name__', self.energy)}, level={self.level!r}"

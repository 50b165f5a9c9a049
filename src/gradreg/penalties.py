"""Penalties: functions of a :class:`gradreg.Point`, one number per sample.

``penalty(point) -> (B,)`` is all that a penalty is, so any function of a point can stand in its place. The same object
is a quantity to measure (:func:`gradreg.statistics.measure`) and a part of an objective (:class:`gradreg.Term`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from jaxtyping import Bool, Float
from torch import Tensor

from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.edges import oriented_energy
from gradreg.point import Point
from gradreg.selectors import ClassSelector, sampled_class
from gradreg.threat_models import Bounds, Box, ThreatModel, at_least_float32, check_bounds_form, room, unit

EnergyFunction = Callable[..., Tensor]
Level = Literal["sample", "batch"]

_FLAT = 1e-12  # what rounding leaves of the energy of a flat image


@dataclass(frozen=True)
class Penalty(ABC):
    """One number per sample: ``penalty(point) -> (B,)``, a frozen configuration that says which definition is meant.

    Attributes:
        unit: Of its values.
        floor: What is added to a value before its logarithm is taken.
        why_undefined: Why it is undefined for some samples.
        looks_elsewhere: Whether it asks for other points. If not, an objective of such penalties alone need not record
            the random numbers and buffers that other points would have to have.
    """

    unit: ClassVar[str] = ""
    floor: ClassVar[float] = 0.0
    why_undefined: ClassVar[str] = ""
    looks_elsewhere: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        """The values at a point of a model; they depend on the weights as far as the point's gradients do."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        return repr(self)

    def undefined(self, point: Point) -> Bool[Tensor, "B"] | None:
        """The samples for which it means nothing, though it has a value; None if there are never any."""
        return None

    def seeded(self, seed: int) -> "Penalty":
        """The penalty with random numbers from this seed, if it draws any and has no seed of its own."""
        return self


@final
@dataclass(frozen=True)
class GradientPenalty(Penalty):
    """A penalty that is a function of the input gradient and the input alone.

    Attributes:
        function: ``function(grad, x) -> (B,)``.
        of: What is differentiated with respect to the input: None for the loss, or a selector for the logit of a class.
        threat: The perturbations in whose units :class:`gradreg.FiniteDifference` measures its step.

    Example:
        >>> mean_square = GradientPenalty(lambda grad, x: grad.square().flatten(1).mean(1))
        >>> model, x, y = torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> mean_square(Point(model, cross_entropy, x, y)).shape
        torch.Size([5])
    """

    looks_elsewhere: ClassVar[bool] = False

    function: Callable[[Tensor, Tensor], Tensor]
    of: ClassSelector | None = None
    threat: ThreatModel | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, point: Point) -> Tensor:
        return self.function(point.gradient(self.of), point.x)


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

    As a measurement, ``GradNormPenalty(Linf(1.0))`` is the L1 norm of Table 4.1 of the thesis, ``L2(1.0)`` the
    Euclidean norm, ``L1(1.0)`` the largest entry, per unit of pixel.

    Attributes:
        threat: The perturbations to be robust to, in the units of the model's input.
        bounds: Lowest and highest value of an input, as attacks have them: ``(0.0, 1.0)`` for pixels, tensors of shape
            ``(C, 1, 1)`` for images that a loader normalised. None: any perturbation of the threat model counts.
        of: What is differentiated: None for the loss, or a selector for the logit of a class.

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

    unit: ClassVar[str] = "units of the score"
    looks_elsewhere: ClassVar[bool] = False

    threat: ThreatModel
    bounds: Bounds | None = None
    of: ClassSelector | None = None

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
        return norm + bounds + ("" if self.of is None else f", {type(self.of).__name__}")

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        grad = point.gradient(self.of)
        if self.bounds is None:
            return grad_norm(grad, self.threat)
        return grad_norm(grad, self.threat, box=room(at_least_float32(point.x), self.bounds))


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
    edges = energy(at_least_float32(x), sigma=sigma).to(grad.dtype)
    largest = edges.abs().amax((1, 2, 3), keepdim=True)
    edges = edges.where(largest > _FLAT, 0.0).expand_as(grad)
    if level == "batch":
        return 1 - len(grad) * (unit(grad[None]) * unit(edges[None]))[0].flatten(1).sum(1)
    return 1 - (unit(grad) * unit(edges)).flatten(1).sum(1)


@final
@dataclass(frozen=True)
class EdgeAlignmentPenalty(Penalty):
    r"""One minus the cosine between an input gradient and the edge energy of the image: see :func:`edge_alignment`.

    By default the gradient is that of the logit of a class drawn from the model's own prediction, as in the thesis; on
    the gradient of the loss it reports that training did not converge.

    As a measurement it is undefined where the gradient is 0 or the image flat; as a penalty it is 1 there.

    Attributes:
        sigma: Width of the edge filter in pixels, above 0.
        energy: The edge map; a module-level function, so that the penalty can be pickled.
        level: ``"sample"`` or ``"batch"``.
        of: What is differentiated: a selector for the logit of a class, or None for the loss.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
        >>> point = Point(model, cross_entropy, torch.rand(2, 3, 16, 16), torch.tensor([3, 7]))
        >>> values = EdgeAlignmentPenalty(sigma=1.0)(point)
        >>> bool(((0 <= values) & (values <= 2)).all())
        True
    """

    why_undefined: ClassVar[str] = "their gradient is 0, or the image flat"
    looks_elsewhere: ClassVar[bool] = False

    sigma: float = 1.0
    energy: EnergyFunction = oriented_energy
    level: Level = "sample"
    of: ClassSelector | None = sampled_class(0.5)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"EdgeAlignmentPenalty: sigma is a width in pixels and must be above 0, got {self.sigma}.")
        if self.level not in ("sample", "batch"):
            raise ValueError(f'EdgeAlignmentPenalty: level is "sample" or "batch", got {self.level!r}.')

    @property
    def name(self) -> str:
        return "one minus cosine of edges and gradient" + ("" if self.of is None else f" of {type(self.of).__name__}")

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        grad = point.gradient(self.of)
        return edge_alignment(grad, point.x, sigma=self.sigma, energy=self.energy, level=self.level)

    def undefined(self, point: Point) -> Bool[Tensor, "B"]:
        edges = self.energy(at_least_float32(point.x), sigma=self.sigma).flatten(1)
        return ~point.gradient(self.of).flatten(1).any(1) | (edges.abs().amax(1) <= _FLAT)

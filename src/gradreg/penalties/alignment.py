"""Penalties of the direction of a gradient: along edges, along given maps, and along itself at a noisy point."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from jaxtyping import Bool, Float
from torch import Tensor

from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.edges import oriented_energy
from gradreg.penalties.penalty import EnergyFunction, Penalty, RandomPenalty
from gradreg.point import Point
from gradreg.selectors import ClassSelector, sampled_class, true_class
from gradreg.threat_models import ThreatModel, at_least_float32, cosine, unit

Level = Literal["sample", "batch"]

_FLAT = 1e-12  # what rounding leaves of the energy of a flat image


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
    return 1 - cosine(grad, edges)


@final
@dataclass(frozen=True)
class EdgeAlignmentPenalty(Penalty):
    r"""One minus the cosine between an input gradient and the edge energy of the image: see :func:`edge_alignment`.

    By default the gradient is that of the logit of a class drawn from the model's own prediction, as in the thesis; on
    the gradient of the loss it reports that training did not converge.

    As a measurement it is undefined where the gradient is 0 or the image flat; as a penalty it is 1 there. A step costs
    2 natural steps.

    Attributes:
        sigma: Width of the edge filter in pixels, above 0.
        energy: The edge map; a module-level function, so that the penalty can be pickled.
        level: ``"sample"`` or ``"batch"``.
        of: What is differentiated: a selector for the logit of a class, or None for the loss.

    Raises:
        ValueError: If sigma is not above 0 or level is neither; when called, if x are no images.

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

    @property
    def of_batch(self) -> bool:
        return self.level == "batch"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        grad = point.gradient(self.of)
        return edge_alignment(grad, point.x, sigma=self.sigma, energy=self.energy, level=self.level)

    def undefined(self, point: Point) -> Bool[Tensor, "B"]:
        edges = self.energy(at_least_float32(point.x), sigma=self.sigma).flatten(1)
        return ~point.gradient(self.of).flatten(1).any(1) | (edges.abs().amax(1) <= _FLAT)


@final
@dataclass(frozen=True)
class SaliencyAlignment(Penalty):
    r"""One minus the cosine between an input gradient and a map that is given, :math:`1 - \cos(g_b, m_b)`.

    For "perceptually aligned gradients" (Ganz, Kawar & Elad, "Do Perceptually Aligned Gradients Imply Robustness?",
    ICML 2023), for human attention maps, and to train through an attribution: a map that another model or method makes
    of the image. The map is held constant. Where the gradient or the map is 0 the value is 1, with a zero gradient.

    It costs 2 natural steps, as every penalty of one gradient. Such training alone is easily overrated: a published
    method that aligned gradients with images has 0.26 % under AutoAttack (JARN, eps 8/255 on CIFAR-10, RobustBench).

    Attributes:
        target: ``target(point)``: the maps, in the shape of x or one that broadcasts against it. Those that a data set
            holds travel with the labels: ``lambda point: point.y["map"]``, with a criterion that takes ``y["class"]``.
        of: What is differentiated: a selector for the logit of a class, or None for the loss.
        absolute: Whether the gradient's absolute value is compared, as a saliency map without signs.

    Raises:
        ValueError: When called, if the maps do not fit x.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> point = Point(model, cross_entropy, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))
        >>> weights = model[1].weight.detach()
        >>> SaliencyAlignment(lambda point: weights[point.y].view(-1, 1, 2, 2))(point).abs().max() < 1e-6
        tensor(True)
    """

    why_undefined: ClassVar[str] = "their gradient or their map is 0"

    target: Callable[[Point], Tensor]
    of: ClassSelector | None = true_class()  # noqa: RUF009  (frozen)
    absolute: bool = False

    @property
    def name(self) -> str:
        return f"one minus cosine of {getattr(self.target, '__name__', 'map')} and gradient"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        grad = point.gradient(self.of)
        return 1 - cosine(grad.abs() if self.absolute else grad, self._maps(point).to(grad.dtype))

    def undefined(self, point: Point) -> Bool[Tensor, "B"]:
        return ~(point.gradient(self.of).flatten(1).any(1) & self._maps(point).flatten(1).any(1))

    def _maps(self, point: Point) -> Tensor:
        maps, shape = self.target(point).detach().to(point.x.device), point.x.shape
        if maps.ndim != len(shape) or any(own not in (1, size) for own, size in zip(maps.shape, shape, strict=True)):
            raise ValueError(
                f"SaliencyAlignment: the maps have shape {tuple(maps.shape)}, which does not fit x, {tuple(shape)}. "
                "One map for all channels has shape (B, 1, H, W)."
            )
        return maps.expand_as(point.x)


@final
@dataclass(frozen=True)
class GradientAlignment(RandomPenalty):
    r"""GradAlign: how far the gradient turns within the ball.

    .. math:: R_b = 1 - \cos\bigl(\nabla\ell(x_b), \nabla\ell(x_b + \eta_b)\bigr)

    Andriushchenko & Flammarion, "Understanding and Improving Fast Adversarial Training" (NeurIPS 2020), with
    :math:`\eta_b` uniform in the ball, around the clean image also where the objective's attack has moved the batch. It
    keeps single-step adversarial training from catastrophic overfitting. Its weight at eps 8/255 is 0.2, at 16/255 it
    is 2.0 (CIFAR-10, beside FGSM). The paper's training differentiates both gradients; its authors find that holding
    the one at the image constant, as this class does by default, makes no substantial difference, and it costs less.

    Values have no unit and lie in [0, 2]. Where a gradient is 0 the value is 1, with a zero gradient; the paper leaves
    such samples out. Beside the clean loss it costs 3.33 natural steps, beside FGSM, whose own gradient serves, 3.67.

    Attributes:
        threat: The ball.
        detach: The gradient that is held constant: ``"clean"``, that at the image; ``"noisy"``; or None.
        seed: Of the noise, which depends on it and on the sample alone; None for other noise for every batch.

    Raises:
        ValueError: If detach is none of these.

    Example:
        >>> from gradreg import Linf
        >>> point = Point(torch.nn.Linear(4, 3), cross_entropy, torch.rand(2, 4), torch.tensor([0, 2]))
        >>> bool((GradientAlignment(Linf(0.1))(point) < 0.1).all())
        True
    """

    why_undefined: ClassVar[str] = "a gradient is 0"

    threat: ThreatModel
    detach: Literal["clean", "noisy"] | None = "clean"

    def __post_init__(self) -> None:
        if self.detach not in ("clean", "noisy", None):
            raise ValueError(f'GradientAlignment: detach is "clean", "noisy" or None, got {self.detach!r}.')

    @property
    def name(self) -> str:
        return f"gradient alignment in {self.threat}"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        return 1 - cosine(*self._gradients(point))

    def undefined(self, point: Point) -> Bool[Tensor, "B"]:
        here, there = (grad.flatten(1).any(1) for grad in self._gradients(point))
        return ~(here & there)

    def _gradients(self, point: Point) -> tuple[Tensor, Tensor]:
        point = point.origin or point
        noisy = point.once((self, "noisy"), lambda: point.at(point.x + self._noise(point, self.threat)))
        here = point.gradient(constant=self.detach == "clean")
        return here, noisy.gradient(constant=self.detach == "noisy")

"""How far gradients look like the edges of the image."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradreg.edges import contour_energy, oriented_energy
from gradreg.penalties import EnergyFunction, edge_alignment
from gradreg.selectors import ClassSelector
from gradreg.statistics.point import Point
from gradreg.statistics.statistic import Statistic, undefined_where


@final
@dataclass(frozen=True)
class EdgeCosine(Statistic):
    r"""Cosine between gradient and edge energy, :math:`\cos(\nabla_{x_b} s_b, E(x_b))`.

    One minus what :class:`gradreg.EdgeAlignmentPenalty` penalises. Undefined where the gradient is 0 or the image flat.

    Attributes:
        of: What chooses the class whose logit is differentiated; None for the loss.
        energy: The edge map.
        sigma: Width of its filter, in pixels.

    Example:
        >>> x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> bool((EdgeCosine()(model, x, torch.tensor([0, 1])).abs() <= 1).all())
        True
    """

    of: ClassSelector | None = None
    energy: EnergyFunction = oriented_energy
    sigma: float = 1.0

    @property
    def name(self) -> str:
        return "cosine of gradient and edges" + ("" if self.of is None else f", {type(self.of).__name__}")

    def at(self, point: Point) -> Float[Tensor, "B"]:
        grad, x = point.gradient(self.of).double(), point.x.double()
        cosine = 1 - edge_alignment(grad, x, sigma=self.sigma, energy=self.energy)
        edges = self.energy(x, sigma=self.sigma)
        nothing = ~grad.flatten(1).any(1) | (edges.flatten(1).abs().amax(1) < _FLAT)
        return undefined_where(nothing, cosine, self.name, "their gradient is 0, or the image flat")


@final
@dataclass(frozen=True)
class EdgeCorrelation(Statistic):
    r"""Pearson's correlation, over the pixels of an image, of the logarithms of its gradient and of its edge energy.

    .. math:: \rho_b = \mathrm{corr}_{uv}\bigl(\log \textstyle\sum_c |\nabla_{x_b} s_b|_{cuv},\
              \log \max(E(x_b)_{uv}, c_0)\bigr)

    Table 5.1 and Fig. 5.1 of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024), which has
    :math:`c_0 = 10^{-3}` and, in the released code, the contour energy. A background without edges sits at the clamp,
    one cluster of pixels that alone can make or hide a correlation: ``edges_only`` leaves it out.

    Undefined where all pixels have the same gradient or the same energy: a constant image, for one.

    Attributes:
        of: What chooses the class whose logit is differentiated (the thesis's saliency map); None for the loss.
        channels: ``"sum"`` of the absolute gradients of a pixel's channels, or the ``"max"``, as of a saliency map.
        energy: The edge map; its channels are added up.
        sigma: Width of its filter, in pixels.
        clamp: :math:`c_0`, the least energy that counts, in the units of the energy.
        edges_only: Whether to look only at pixels whose energy is above the clamp.
        least: The least gradient that counts, so that one of 0 has a logarithm.

    Example:
        The gradient of a linear model whose weights are the image's edges:

        >>> x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
        >>> _ = model[1].weight.data.copy_(contour_energy(x).flatten() * torch.tensor([[0.01], [-0.01]]))
        >>> EdgeCorrelation()(model, x, torch.tensor([0])).round(decimals=4)
        tensor([1.], dtype=torch.float64)
    """

    of: ClassSelector | None = None
    channels: Literal["sum", "max"] = "sum"
    energy: EnergyFunction = contour_energy
    sigma: float = 1.0
    clamp: float = 1e-3
    edges_only: bool = False
    least: float = 1e-12

    unit: ClassVar[str] = "correlation"

    def __post_init__(self) -> None:
        if self.channels not in ("sum", "max"):
            raise ValueError(f'EdgeCorrelation: channels is "sum" or "max", got {self.channels!r}.')
        if not (self.clamp > 0 and self.least > 0):
            raise ValueError(
                f"EdgeCorrelation: clamp and least are above 0, as only then they have logarithms; got {self.clamp} "
                f"and {self.least}."
            )

    @property
    def name(self) -> str:
        what = "gradient" if self.of is None else type(self.of).__name__
        return f"correlation of {what} and edges" + (", edge pixels" if self.edges_only else "")

    def at(self, point: Point) -> Float[Tensor, "B"]:
        gradients, energies, counted = self.pixels(point)
        rho = pearson(gradients, energies, counted)
        return undefined_where(rho.isnan(), rho, self.name, "their gradient or their edges are constant")

    def pixels(self, point: Point) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
        """For every pixel log10 of its gradient and of its energy, and whether it counts: the scatter plot."""
        x = point.x.double()
        energy = self.energy(x, sigma=self.sigma).sum(1).flatten(1)
        size = point.gradient(self.of).double().abs()
        size = (size.sum(1) if self.channels == "sum" else size.amax(1)).flatten(1)
        counted = energy > self.clamp if self.edges_only else torch.ones_like(energy, dtype=torch.bool)
        return size.clamp(min=self.least).log10(), energy.clamp(min=self.clamp).log10(), counted


_FLAT = 1e-12  # what rounding leaves of the energy of a flat image


def pearson(a: Float[Tensor, "B n"], b: Float[Tensor, "B n"], counted: Bool[Tensor, "B n"]) -> Float[Tensor, "B"]:
    """Pearson's correlation of each row's counted entries, in float64; NaN where one side of them is constant.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, -6.0]])
        >>> pearson(a, b, torch.tensor([[True, True, False]])).item()
        1.0
    """
    weight = counted.double()
    weight = weight / weight.sum(1, keepdim=True)  # NaN where nothing counts

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        rest = values.double() - (weight * values).sum(1, keepdim=True)
        spread = (weight * rest.square()).sum(1).sqrt()
        size = (weight * values.double().square()).sum(1).sqrt()
        return rest, spread.where(spread > 1e-9 * size, torch.nan)

    (of_a, spread_a), (of_b, spread_b) = centred(a), centred(b)
    return (weight * of_a * of_b).sum(1) / (spread_a * spread_b)

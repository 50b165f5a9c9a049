"""How far gradients look like the edges of the image."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradreg.edges import contour_energy
from gradreg.penalties import EnergyFunction, Penalty
from gradreg.point import Point
from gradreg.selectors import ClassSelector
from gradreg.threat_models import length, unit


@final
@dataclass(frozen=True)
class EdgeCorrelation(Penalty):
    r"""Pearson's correlation, over the pixels of an image, of the logarithms of its gradient and of its edge energy.

    .. math:: \rho_b = \mathrm{corr}_{uv}\bigl(\log \textstyle\sum_c |\nabla_{x_b} s_b|_{cuv},\
              \log \max(E(x_b)_{uv}, c_0)\bigr)

    Table 5.1 and Fig. 5.1 of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024), which has
    :math:`c_0 = 10^{-3}` and, in the released code, the contour energy. A background without edges sits at the clamp,
    one cluster of pixels that alone can make or hide a correlation: ``edges_only`` leaves it out.

    As a measurement it is undefined where all pixels have the same gradient or the same energy: a constant image, for
    one. As a penalty it is 0 there, with a zero gradient.

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

        >>> from gradreg import cross_entropy
        >>> x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
        >>> _ = model[1].weight.data.copy_(contour_energy(x).flatten() * torch.tensor([[0.01], [-0.01]]))
        >>> round(EdgeCorrelation()(Point(model, cross_entropy, x, torch.tensor([0]))).item(), 4)
        1.0
    """

    unit: ClassVar[str] = "correlation"
    looks_elsewhere: ClassVar[bool] = False
    why_undefined: ClassVar[str] = "their gradient or their edges are constant"

    of: ClassSelector | None = None
    channels: Literal["sum", "max"] = "sum"
    energy: EnergyFunction = contour_energy
    sigma: float = 1.0
    clamp: float = 1e-3
    edges_only: bool = False
    least: float = 1e-12

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

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        rho, _ = self._correlation(point)
        return rho.to(point.gradient(self.of).dtype)

    def undefined(self, point: Point) -> Bool[Tensor, "B"]:
        return self._correlation(point)[1]

    def pixels(self, point: Point) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
        """For every pixel log10 of its gradient and of its energy, and whether it counts: the scatter plot."""
        x = point.x.double()
        energy = self.energy(x, sigma=self.sigma).sum(1).flatten(1)
        size = point.gradient(self.of).double().abs()
        size = (size.sum(1) if self.channels == "sum" else size.amax(1)).flatten(1)
        counted = energy > self.clamp if self.edges_only else torch.ones_like(energy, dtype=torch.bool)
        return size.clamp(min=self.least).log10(), energy.clamp(min=self.clamp).log10(), counted

    def _correlation(self, point: Point) -> tuple[Tensor, Tensor]:
        return point.once(self, lambda: _correlated(*self.pixels(point)))


def pearson(a: Float[Tensor, "B n"], b: Float[Tensor, "B n"], counted: Bool[Tensor, "B n"]) -> Float[Tensor, "B"]:
    """Pearson's correlation of each row's counted entries, in float64; NaN where one side of them is constant.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, -6.0]])
        >>> round(pearson(a, b, torch.tensor([[True, True, False]])).item(), 9)
        1.0
    """
    rho, undefined = _correlated(a, b, counted)
    return rho.masked_fill(undefined, torch.nan)


def _correlated(a: Tensor, b: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The correlations, 0 with a zero gradient where they are undefined; and where that is."""
    ones = counted.double()

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        """Distances from the mean, scaled to length 1; and whether there are any beyond rounding."""
        values = ones * values.double()
        rest = values - ones * (values.sum(1, keepdim=True) / ones.sum(1, keepdim=True).clamp(min=1))
        varies = length(rest) > 1e-9 * length(values)
        return unit(rest.where(varies.unsqueeze(1), 0.0)), varies

    (of_a, a_varies), (of_b, b_varies) = centred(a), centred(b)
    return (of_a * of_b).sum(1), ~(a_varies & b_varies)

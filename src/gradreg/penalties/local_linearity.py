"""How far the loss is from a straight line within reach of a perturbation: ELLE and LLR."""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from gradreg import checks
from gradreg.attacks import Search, grad_enabled
from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.noise import draws_for
from gradreg.penalties.penalty import RandomPenalty
from gradreg.point import Point
from gradreg.threat_models import Bounds, ThreatModel, at_least_float32, check_bounds_form


@final
@dataclass(frozen=True)
class LocalLinearity(RandomPenalty):
    r"""ELLE: how far the loss between two points of a ball lies from the straight line between them.

    .. math:: E_b = \bigl(\ell(x_c) - (1 - \alpha)\,\ell(x_a) - \alpha\,\ell(x_b)\bigr)^2,\qquad
              x_c = (1 - \alpha) x_a + \alpha x_b

    with :math:`x_a, x_b` uniform in the ball around x and :math:`\alpha` uniform in [0, 1]: the penalty of Rocamora,
    Liu, Chrysos, Olmos & Cevher, "Efficient local linearity regularization to overcome catastrophic overfitting" (ICLR
    2024), and Table A.2 of Rodríguez Muñoz (MIT 2024), at ``Linf(4 / 255)``. It takes no gradient with respect to the
    input, so that it trains under any differentiation. Nothing is detached.

    It is taken around the clean image, also where the objective's attack has moved the batch. Its three passes run in
    float32, under autocast too. It is meant beside single-step adversarial training, with weights of 1,000 (eps up to
    8/255) to 10,000 (squares of small numbers); with :class:`gradreg.SpikeWeight` as its weight it is ELLE-A. It costs
    4 natural steps: three values, in one pass where samples are apart (:meth:`Point.losses_at`).

    Attributes:
        threat: The ball.
        squared: False for the absolute value instead of the square.
        seed: Of the three points, which depend on it and on the sample alone, not on the model; None for others for
            every batch.

    Example:
        >>> from gradreg import Linf
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> bool(0 < LocalLinearity(Linf(0.5))(point) < 1e-2)
        True
    """

    floor: ClassVar[float] = 1e-17  # what the thesis's code adds before it takes the logarithm

    threat: ThreatModel
    squared: bool = True

    @property
    def name(self) -> str:
        return f"{'squared ' if self.squared else ''}local linearity error in {self.threat}"

    @property
    def unit(self) -> str:
        return "squared units of the loss" if self.squared else "units of the loss"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        point = point.origin or point
        if point.x.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"LocalLinearity: x is in {point.x.dtype}, in which differences of losses are mostly rounding. Keep "
                "x and the weights in float32; under torch.autocast its passes are in float32."
            )
        x, share = point.x, point.drawn((self, "share"), lambda: self._share(point))
        first, second = (x + self._noise(point, self.threat, draw) for draw in (0, 1))
        between = torch.lerp(first, second, share.view(-1, *[1] * (x.ndim - 1)))
        # In half precision such differences would be rounding and nothing else.
        with torch.autocast(x.device.type, enabled=False):
            loss, start, end = point.losses_at(between, first, second)
        # Differences first: those of neighbouring losses are free of rounding.
        error = (loss - start) - share * (end - start)
        return error.square() if self.squared else error.abs()

    def _share(self, point: Point) -> Tensor:
        """How far the middle point of every sample lies from the first to the second."""
        x = point.x
        if self.seed is None:
            return torch.rand(len(x), dtype=x.dtype, device=x.device)

        def draw(generator: torch.Generator | None) -> Tensor:
            return torch.rand((), generator=generator, dtype=torch.float64)

        return draws_for(draw, self.seed, point.batch.index, len(x), stream=2).to(x.dtype).to(x.device)


@final
@dataclass(frozen=True, eq=False)  # bounds may be tensors, which cannot be compared so
class WorstLocalLinearity(RandomPenalty):
    r"""LLR: how far the loss lies from its tangent, where in the ball it does most, and the tangent's rise there.

    .. math:: R_b = |\ell(x_b + \delta_b) - \ell(x_b) - \delta_b^\top g_b| + c\,|\delta_b^\top g_b|,\qquad
              \delta_b = \arg\max_{\|\delta\| \le \varepsilon} |\ell(x_b + \delta) - \ell(x_b) - \delta^\top g_b|

    with :math:`g_b = \nabla\ell(x_b)`: Qin et al., "Adversarial Robustness through Local Linearization" (NeurIPS 2019),
    whose weights are :math:`\lambda = 4` and :math:`\mu = \lambda c = 3` (CIFAR-10, eps 8/255, beside the clean loss);
    its release has a clean loss of weight 2, :math:`\lambda = 4` and c = 0.3. The worst point is searched for by steps
    of gradient ascent from a random start (the release: ten steps of Adam) and held constant, as the gradient is during
    the search. Everything else is differentiated. With two steps it costs 4.33 natural steps.

    Attributes:
        threat: The ball.
        steps: Of the search, each as long as ``2.5 * eps / steps``, at most eps.
        gradient_weight: c.
        bounds: Lowest and highest value of an input, kept by the search; None for no bounds.
        seed: Of the random start, which depends on it and on the sample alone; None for another one for every batch.

    Example:
        >>> from gradreg import Linf
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.zeros(1, 2), torch.tensor([0]))
        >>> round(WorstLocalLinearity(Linf(0.5))(point).item(), 4)
        0.4951
    """

    unit: ClassVar[str] = "units of the loss"

    threat: ThreatModel
    steps: int = 2
    gradient_weight: float = 0.75
    bounds: Bounds | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.bounds is not None:
            check_bounds_form(self.bounds)
        if self.steps < 1 or not self.gradient_weight >= 0:
            raise ValueError(
                f"WorstLocalLinearity: steps is at least 1 and gradient_weight at least 0, got {self.steps} and "
                f"{self.gradient_weight}."
            )

    @property
    def name(self) -> str:
        return f"worst local linearity error in {self.threat}"

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        if torch.is_autocast_enabled(point.x.device.type):
            checks.warn(
                "WorstLocalLinearity: under autocast the differences of losses that it is made of are mostly rounding. "
                "Take the step outside of autocast."
            )
        grad, losses = point.gradient(), at_least_float32(point.losses)
        delta = self._worst(point, grad.detach(), losses.detach())
        rise = (delta * grad).flatten(1).sum(1)
        there = at_least_float32(point.at(point.x + delta.to(point.x.dtype), differentiable=False).losses)
        return (there - losses - rise).abs() + self.gradient_weight * rise.abs()

    def _worst(self, point: Point, grad: Tensor, losses: Tensor) -> Tensor:
        """The perturbation of the largest error that the search finds."""
        x = at_least_float32(point.x)

        def error_at(z: Tensor, rows: Tensor) -> Tensor:
            value = at_least_float32(point.loss_of(point.logits_at(z.to(point.x.dtype), rows)))
            return (value - losses - ((z - x) * grad).flatten(1).sum(1)).abs()

        with grad_enabled():
            search = Search(error_at, x, self.threat, self.bounds, best=False, look=False)
            search.run(
                self._noise(point, self.threat).to(x.dtype), self.steps, self.threat.eps * min(1.0, 2.5 / self.steps)
            )
            return search.result() - x

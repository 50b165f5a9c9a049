"""Controllers: weights that depend on what was measured at the last step, and so have a state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

Measured = Mapping[str, Tensor]


class KeptInFull(nn.Module):
    """A module whose buffers move with the others, but are never cast: counts and means need their digits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptInFull":
        super()._apply(lambda tensor: tensor.to(fn(torch.empty_like(tensor)).device), recurse)
        return self


class Controller(KeptInFull, ABC):
    """A weight that sees what was measured: ``controller(t, measured)``, in the place of a schedule.

    ``measured`` maps ``"loss"``, ``"start"`` (the loss where the objective's attack has started) and the name of every
    term to the mean of the last step in which it was computed: scalars on the device of the loss, NaN as long as there
    are none. Under DistributedDataParallel each rank measures its own batch, and the weights are those of rank 0. In
    evaluation mode nothing is measured, and a controller keeps its state. State goes into buffers: it is
    in the objective's ``state_dict``, resumes with it, and DistributedDataParallel keeps it alike on all ranks. A
    controller that returns a tensor never waits for the device, and its term is computed at every step; one that
    returns a number waits once, and its term costs nothing at steps where the number is 0.

    A plain function of ``(t, measured)`` is a weight, too. It has no state to resume.
    """

    @abstractmethod
    def forward(self, t: float | None, measured: Measured) -> Tensor | float:
        """The weight at step t."""


@final
class SpikeWeight(Controller):
    r"""A weight that jumps to its peak when what was measured is an outlier, and decays after: the switch of ELLE-A.

    .. math:: \lambda_t = \lambda_{\max} \text{ if } E_{t-1} > \bar E + k\,\sigma(E), \text{ else } \gamma \lambda_{t-1}

    with mean and standard deviation over all steps before (Rocamora et al., "Efficient local linearity regularization
    to overcome catastrophic overfitting", ICLR 2024, in whose release k = 2, :math:`\gamma` = 0.99, and the peak 4,000
    at every eps). It starts at 0, and cannot jump before the fourth measurement.

    Args:
        name: Of the term whose mean is watched.
        peak: :math:`\lambda_{\max}`.
        decay: :math:`\gamma`.
        deviations: k.

    Example:
        >>> from gradreg import Linf, LocalLinearity, PenalizedLoss, NFGSM, Term
        >>> term = Term(LocalLinearity(Linf(8 / 255)), weight=SpikeWeight("line", peak=4000.0))
        >>> objective = PenalizedLoss(terms={"line": term}, at=NFGSM(Linf(8 / 255)))
        >>> _ = objective(nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> float(objective.terms["line"].weight.weight)
        0.0
    """

    weight: Tensor
    seen: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, name: str, peak: float, *, decay: float = 0.99, deviations: float = 2.0) -> None:
        super().__init__()
        self.name, self.peak, self.decay, self.deviations = name, peak, decay, deviations
        for buffer in ("weight", "seen", "mean", "squares"):
            self.register_buffer(buffer, torch.zeros(()))

    def forward(self, t: float | None, measured: Measured) -> Tensor:
        if not self.training:
            return self.weight.clone()
        value = measured[self.name].to(self.mean.dtype)
        if value.device != self.mean.device:
            self.to(value.device)
        # In place, as buffers have to be that are exchanged between ranks; by torch.where, which waits for no device.
        known = value.isfinite()
        value = torch.where(known, value, self.mean)
        bound = self.mean + self.deviations * (self.squares / self.seen.clamp(min=1)).sqrt()
        spike = known & (self.seen > 2) & (value > bound)
        self.weight.copy_(torch.where(spike, torch.full_like(value, self.peak), self.decay * self.weight))
        step = value - self.mean
        self.seen.add_(known)
        self.mean.add_(step / self.seen.clamp(min=1))
        self.squares.add_(step * (value - self.mean))
        return self.weight.clone()


@final
class ConvergenceWeight(Controller):
    r"""Plus or minus a weight where a loss strays from its mean over the last period: the switch of ConvergeSmooth.

    .. math:: \lambda_t = w \operatorname{sign}(\ell_{t-1} - \bar\ell) \text{ if } |\ell_{t-1} - \bar\ell| > \gamma,
              \text{ else } 0

    with :math:`\bar\ell` the mean over the last whole period. Zhao, Zhang, Kong & Yin, "Fast Adversarial Training with
    Smooth Convergence" (ICCV 2023), have an epoch as the period, :math:`\gamma` = 0.03 and w = 1, on the loss where the
    attack starts, and compare the loss of the step itself; here the weight follows one step later. The term to weigh is
    that loss, as a function of a point: ``lambda point: point.at(point.first_step.x, differentiable=False).losses``,
    for an attack that moves the whole batch. It costs one natural step, at the steps where the weight is not 0, and
    waits for the device at each. In evaluation mode it is w.

    Args:
        period: Steps of an epoch.
        tolerance: :math:`\gamma`, in units of the loss.
        weight: w.
        name: What is watched: ``"start"``, the mean loss where the objective's attack starts, ``"loss"``, or a term.

    Example:
        >>> weight = ConvergenceWeight(period=2)
        >>> [weight(t, {"start": torch.tensor(loss)}) for t, loss in enumerate([1.0, 1.0, 1.0, 0.9, 1.5])]
        [0.0, 0.0, 0.0, -1.0, 1.0]
    """

    mean: Tensor
    total: Tensor
    seen: Tensor

    def __init__(self, period: int, *, tolerance: float = 0.03, weight: float = 1.0, name: str = "start") -> None:
        super().__init__()
        if period < 1 or not tolerance >= 0:
            raise ValueError(
                f"ConvergenceWeight: period is at least 1 and tolerance at least 0, got {period} and {tolerance}."
            )
        self.period, self.tolerance, self.factor, self.name = period, tolerance, weight, name
        self.register_buffer("mean", torch.tensor(torch.nan))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, t: float | None, measured: Measured) -> float:
        if not self.training:
            return self.factor
        value = float(measured[self.name])
        if not math.isfinite(value):
            return 0.0
        away = value - float(self.mean)
        self.total.add_(value)
        self.seen.add_(1)
        if int(self.seen) == self.period:
            self.mean.copy_(self.total / self.period)
            self.total.zero_()
            self.seen.zero_()
        return math.copysign(self.factor, away) if abs(away) > self.tolerance else 0.0


@final
class Measurement(KeptInFull):
    """What the last step has measured, by name; NaN before."""

    values: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("values", torch.full((len(self.names),), torch.nan))

    def latest(self) -> Measured:
        """Copies, which a later step does not change."""
        return _Named(zip(self.names, self.values.clone(), strict=True))

    @torch.no_grad()
    def take(self, means: Mapping[str, Tensor], device: torch.device) -> None:
        """Take in some means; what is not among them stays."""
        if self.values.device != device:
            self.values = self.values.to(device)
        for place, name in enumerate(self.names):
            if name in means:
                self.values[place] = means[name]


class _Named(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"A weight asks for {name!r}, and what was measured are {list(self)}: the names of the terms.")

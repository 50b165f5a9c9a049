"""APGD: projected gradient ascent with momentum that chooses its own step size, for any function of the input."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradreg.attacks.search import (
    LossesAt,
    OutOfBounds,
    Search,
    check_attackable,
    check_search,
    grad_enabled,
    may_look,
)
from gradreg.threat_models import L1, Bounds, ThreatModel


def apgd(
    losses_at: LossesAt,
    x: Float[Tensor, "B *x"],
    threat: ThreatModel,
    *,
    steps: int = 100,
    random_start: bool = True,
    start: Float[Tensor, "B *x"] | None = None,
    restarts: int = 1,
    best: bool = True,
    bounds: Bounds | None = (0.0, 1.0),
    out_of_bounds: OutOfBounds = "check",
    seed: int | None = None,
    index: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B *x"]:
    r"""Auto-PGD: ascent with momentum whose steps start long and are halved where they stop to pay.

    .. math:: z = \Pi\bigl(\delta_k + \eta\, s(g_k)\bigr), \qquad
              \delta_{k+1} = \Pi\bigl(\delta_k + \tfrac34 (z - \delta_k) + \tfrac14 (\delta_k - \delta_{k-1})\bigr)

    with s the step of the threat model and :math:`\eta = 2\varepsilon` at first. At checkpoints after 22, 41, 57, ... %
    of the steps, each sample's :math:`\eta` is halved and the sample goes back to its highest point, if no more
    than three quarters of its steps since the last checkpoint rose, or if it was not halved there and found no higher
    point since. (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks", ICML 2020, algorithm 1. Projections are exact on ball and bounds together.)

    In L1 there is no momentum, and a step moves few coordinates: one fifth of them at first, then two thirds as many as
    differ at the highest point. Every 4 % of the steps a sample whose highest point became sparser goes back to it and
    steps by a full :math:`\varepsilon` again; any other's :math:`\eta` is divided by 1.5, down to a tenth (Croce &
    Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", ICML 2021, section 3).

    Arguments, result and errors are those of :func:`pgd`; there is no step size to choose.

    Example:
        A linear loss rises most in a corner of the ball:

        >>> from gradreg import Linf
        >>> slope = torch.tensor([[1.0, -2.0]])
        >>> apgd(lambda z, rows: (z * slope).sum(1), torch.full((1, 2), 0.5), Linf(0.1), steps=5)
        tensor([[0.6000, 0.4000]])
    """
    check_search(
        "apgd", x, steps=steps, restarts=restarts, best=best, random_start=random_start, seed=seed, index=index
    )
    look = may_look(apgd, x)
    check_attackable(x, threat, bounds, out_of_bounds, look)
    with grad_enabled():
        search = Search(losses_at, x, threat, bounds, best=best, look=look)
        for delta in search.starts(restarts, start=start, random_start=random_start, seed=seed, index=index):
            climb(search, delta, steps)
        return search.result()


def climb(search: Search, start: Tensor, steps: int) -> None:
    """One start of APGD, from the active samples' rows of ``start``."""
    ascent = Ascent(search, start, steps)
    while search.active.numel() and ascent.taken < steps:
        ascent.advance()
    ascent.finish()


@dataclass(frozen=True)
class Climbers:
    """What APGD knows of each active sample.

    Attributes:
        delta: Where it is.
        previous: Where it was one step before.
        last: The loss there.
        highest: The highest loss of this start.
        summit: The perturbation of that loss.
        slope: The gradient there.
        length: Of a step, in units of the radius.
        rises: How many steps rose since the last checkpoint.
        settled: Whether the policy changed something at the last checkpoint.
        then: The highest loss at the last checkpoint, or in L1 how many coordinates differed at the highest point.
        density: Fraction of the coordinates that a step in L1 moves.
    """

    delta: Tensor
    previous: Tensor
    last: Tensor
    highest: Tensor
    summit: Tensor
    slope: Tensor
    length: Tensor
    rises: Tensor
    settled: Tensor
    then: Tensor
    density: Tensor

    def rows(self, keep: Tensor) -> "Climbers":
        """Those of some samples."""
        return Climbers(*(getattr(self, field.name)[keep] for field in fields(self)))


class Policy(ABC):
    """How steps are taken, and how they change at the checkpoints.

    Attributes:
        length: Of the first steps, in units of the radius.
        momentum: Share of the last move in the next one.
        checkpoints: After how many steps the policy is asked, and how many steps that is after the last time.
    """

    length: float
    momentum: float
    checkpoints: dict[int, int]

    @abstractmethod
    def begin(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``then`` and ``density`` of every sample at the start."""

    @abstractmethod
    def adapt(self, s: Climbers, period: int) -> tuple[Climbers, Tensor]:
        """The samples with their new step, and which of them go back to their highest point."""

    @abstractmethod
    def stride(self, threat: ThreatModel, eps: Tensor, density: Tensor) -> ThreatModel:
        """The ball whose :meth:`~gradreg.ThreatModel.ascent` is a step of this length."""


@final
class Halving(Policy):
    """In Linf and L2: long steps first, halved where they stop to pay."""

    def __init__(self, steps: int) -> None:
        self.length = 2.0
        self.momentum = 0.25
        period, end, self.checkpoints = max(1, math.floor(0.22 * steps)), 0, {}
        while (end := end + period) < steps:
            self.checkpoints[end] = period
            period = max(period - max(1, math.floor(0.03 * steps)), math.floor(0.06 * steps), 1)

    def begin(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        each = delta.flatten(1)[:, 0]
        return torch.full_like(each, -torch.inf), torch.ones_like(each)

    def adapt(self, s: Climbers, period: int) -> tuple[Climbers, Tensor]:
        too_few = s.rises <= 0.75 * period
        stuck = ~s.settled & (s.highest <= s.then)
        halved = too_few | stuck
        return replace(s, length=torch.where(halved, s.length / 2, s.length), settled=halved, then=s.highest), halved

    def stride(self, threat: ThreatModel, eps: Tensor, density: Tensor) -> ThreatModel:
        return threat.with_eps(eps)


@final
class Thinning(Policy):
    """In L1: steps along fewer and fewer coordinates."""

    def __init__(self, steps: int) -> None:
        self.length = 1.0
        self.momentum = 0.0
        period = max(1, math.floor(0.04 * steps))
        self.checkpoints = dict.fromkeys(range(period, steps, period), period)

    def begin(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        each = delta.flatten(1)[:, 0]
        return torch.full_like(each, delta[0].numel()), torch.full_like(each, 0.2)

    def adapt(self, s: Climbers, period: int) -> tuple[Climbers, Tensor]:
        moved = (s.summit != 0).flatten(1).sum(1).to(s.then.dtype)
        sparser = moved < 0.95 * s.then
        length = torch.where(sparser, self.length, (s.length / 1.5).clamp(min=self.length / 10))
        density = moved / (1.5 * s.summit[0].numel())
        return replace(s, length=length, settled=sparser, then=moved, density=density), sparser

    def stride(self, threat: ThreatModel, eps: Tensor, density: Tensor) -> ThreatModel:
        return L1(eps, density)


class Ascent:
    """One start of APGD in progress.

    Attributes:
        state: What is known of each active sample.
        taken: How many steps were taken.
        policy: How steps are taken.
    """

    def __init__(self, search: Search, start: Tensor, steps: int) -> None:
        self.policy: Policy = Thinning(steps) if isinstance(search.threat, L1) else Halving(steps)
        self.taken = 0
        self._search = search
        delta = search.enter(start)
        then, density = self.policy.begin(delta)
        self.state = Climbers(
            delta=delta,
            previous=delta,
            last=torch.full_like(then, -torch.inf),
            highest=torch.full_like(then, -torch.inf),
            summit=delta,
            slope=delta,
            length=torch.full_like(then, self.policy.length),
            rises=torch.zeros_like(then),
            settled=torch.ones_like(then, dtype=torch.bool),
            then=then,
            density=density,
        )

    def advance(self) -> None:
        """One step of all active samples; those who are done leave before it."""
        search = self._search
        losses, done, grad = search.slope(self.state.delta)
        if done is not None:
            search.record(losses, done, self.state.delta)
            losses, grad = search.leave(done, losses, grad)
            self.state = self.state.rows(~done)
        if search.active.numel():
            self._step(losses.to(self.state.highest.dtype), grad)

    def drop(self, gone: Tensor) -> None:
        """Take active samples out of play, though they are not done."""
        self._search.retire(gone)
        self.state = self.state.rows(~gone)

    def finish(self) -> None:
        """Record where the active samples came to."""
        if self._search.active.numel():
            self._record_summits()
            self._search.finish(self.state.delta)

    def _record_summits(self) -> None:
        if self._search.best:
            self._search.record(self.state.highest, None, self.state.summit)

    def _step(self, losses: Tensor, grad: Tensor) -> None:
        s, search = self.state, self._search
        higher = losses > s.highest
        s = replace(
            s,
            highest=torch.where(higher, losses, s.highest),  # a loss that is NaN is not higher
            summit=_where(higher, s.delta, s.summit),
            slope=_where(higher, grad, s.slope),
            rises=s.rises + (losses > s.last) if self.taken else s.rises,
            last=losses,
        )
        delta = s.delta
        if self.taken in self.policy.checkpoints:
            s, back = self.policy.adapt(s, self.policy.checkpoints[self.taken])
            s = replace(s, rises=torch.zeros_like(s.rises))
            delta, grad = _where(back, s.summit, delta), _where(back, s.slope, grad)
        stride = self.policy.stride(search.threat, search.in_units(s.length), s.density)
        # Without regard to the box: what is pushed beyond its limit keeps its place when the projection shortens all.
        moved = search.project(stride.ascent(grad, delta).add_(delta))
        if self.taken and self.policy.momentum:
            ahead = torch.lerp(moved, delta, self.policy.momentum).add_(delta - s.previous, alpha=self.policy.momentum)
            moved = search.project(ahead)
        self.state = replace(s, delta=moved, previous=delta)
        self.taken += 1


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)

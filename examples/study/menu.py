"""The menu: every regulariser of the library and the objectives that it is compared with, each with three weights."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from gradreg import (
    FGSM,
    L2,
    NFGSM,
    Attack,
    CollapseAlarm,
    ConvergenceWeight,
    Curvature,
    EdgeAlignmentPenalty,
    GradientAlignment,
    GradNormPenalty,
    JacobianPenalty,
    Linf,
    LocalLinearity,
    LogitPairing,
    PenalizedLoss,
    PGDAttack,
    Point,
    RememberedStart,
    SpikeWeight,
    Term,
    WorstLocalLinearity,
    boosted_cross_entropy,
    cross_entropy,
)

EQUAL_STEPS = 500
LONG_STEPS = 4290  # ten epochs
LONG_ENTRIES = (
    "N-FGSM", "start for each image", "start for each class", "start for all", "FGSM-PGI", "LIET", "FGSM-UAP",
)  # fmt: skip
BUDGET = 1500.0  # natural steps: those of 500 steps of PGD-3, which cost 3 each
SHAPE, CLASSES, TRAINED = (1, 28, 28), 10, 55_000

Make = Callable[[Linf, float, "Kept"], PenalizedLoss]  # of the threat model, the weight, and what is kept


@dataclass
class Kept:
    """What has a state, made once for a training."""

    alarm: CollapseAlarm = field(default_factory=CollapseAlarm)
    start: RememberedStart | None = None
    weight: nn.Module | None = None


@dataclass(frozen=True)
class Entry:
    """One way to train.

    Attributes:
        make: The objective; its radius rises in the first fifth of the training, and with it what depends on it.
        weights: That are tried first on validation images.
        about: What the weight is.
        keep: What has a state, made of the weight.
        collapses: Whether its attack is one that training can overfit to, so that the alarm watches it.
        kind: For the figure.
    """

    make: Make
    weights: tuple[float, ...] = (1.0,)
    about: str = "weight"
    keep: Callable[[float], Kept] = lambda weight: Kept()
    collapses: bool = False
    kind: str = "penalty"


KINDS = {  # colours of Okabe and Ito
    "attack": "#000000",
    "penalty": "#E69F00",
    "pair": "#0072B2",
    "penalty beside one step": "#009E73",
    "start that remembers": "#CC79A7",
}


def pgd(threat: Linf, steps: int = 3, **options: Any) -> PGDAttack:
    """Some steps from noise, of 2/3 of the radius for three: the last point."""
    return PGDAttack(threat, steps=steps, step_size=2 / steps * threat.eps, best=False, **options)


def attacked(attack: Callable[[Linf, "Kept"], Attack]) -> Make:
    """Adversarial training, whose weight is a factor of the radius."""
    return lambda threat, weight, kept: PenalizedLoss(at=attack(threat.scaled(weight), kept), alarm=kept.alarm)


def penalty(of: Callable[[Linf], Callable[[Point], Tensor]], loss_weight: float = 1.0) -> Make:
    """A penalty beside the clean loss."""
    return lambda threat, weight, kept: PenalizedLoss(terms={"it": Term(of(threat), weight)}, loss_weight=loss_weight)


def beside(attack: Callable[[Linf, "Kept"], Attack], of: Callable[[Linf], Callable[[Point], Tensor]]) -> Make:
    """A penalty beside the loss under an attack."""
    return lambda threat, weight, kept: PenalizedLoss(
        at=attack(threat, kept),
        terms={"it": Term(of(threat), kept.weight or weight)},
        alarm=kept.alarm,
    )


def euclidean(threat: Linf) -> L2:
    """The ball around the cube of the threat model, so that weights mean the same at every radius."""
    return L2(threat.eps * 28)


def scaleable(threat: Linf) -> Callable[[Point], Tensor]:
    """Finlay & Oberman (2019): the squared slope of the loss along its gradient, by a finite difference."""

    def value(point: Point) -> Tensor:
        step = euclidean(threat).scaled(0.1).maximizer(point.gradient(constant=True))
        rise = point.at(point.x + step, differentiable=False).losses - point.losses
        return (rise / 0.1).square()

    return value


def pairing(divergence: Any, at: Any, **options: Any) -> Callable[[Point], Tensor]:
    """Logits at two points."""
    return LogitPairing(divergence, at, **options)


def start_loss(point: Point) -> Tensor:
    """The loss where the objective's attack has started."""
    assert point.first_step is not None
    return point.at(point.first_step.x, differentiable=False).losses


def n_fgsm(threat: Linf, kept: Kept, noise: float = 1.0) -> NFGSM:
    """One step from noise, or from a start that remembers with half of the noise."""
    return NFGSM(threat, noise=noise if kept.start is None else 0.5, start=kept.start)


def fgsm_rs(threat: Linf, kept: Kept) -> PGDAttack:
    """One step of 1.25 radii from noise, projected: "fast adversarial training"."""
    return PGDAttack(threat, steps=1, step_size=1.25 * threat.eps, best=False)


def of_samples(weight: float) -> Kept:
    """A start for each image, with momentum: FGSM-MEP."""
    return Kept(start=RememberedStart(SHAPE, per="sample", count=TRAINED, momentum=0.3))


def of_classes(weight: float) -> Kept:
    """A start for each class: LIET."""
    return Kept(start=RememberedStart(SHAPE, per="class", count=CLASSES, momentum=0.3))


def of_all(weight: float) -> Kept:
    """One start for all: FGSM-UAP."""
    return Kept(start=RememberedStart(SHAPE, momentum=0.3))


RADII, RADIUS = (0.8, 1.0, 1.2), "radius / eps"

MENU: dict[str, Entry] = {
    "natural": Entry(lambda threat, weight, kept: PenalizedLoss(), about=""),
    "N-FGSM": Entry(attacked(n_fgsm), RADII, RADIUS, collapses=True),
    "N-FGSM, half": Entry(
        attacked(lambda threat, kept: NFGSM(threat, share=0.5)), (1.0, 1.25, 1.5), RADIUS, collapses=True
    ),
    "PGD-3": Entry(attacked(lambda threat, kept: pgd(threat, random_start=False)), RADII, RADIUS),
    "TRADES, 3 steps": Entry(penalty(lambda threat: pairing("kl", pgd(threat))), (3.0, 6.0, 12.0)),
    "TRADES, 1 step": Entry(penalty(lambda threat: pairing("kl", pgd(threat, 1))), (3.0, 6.0, 12.0)),
    "GradNorm": Entry(penalty(GradNormPenalty, 0.8), (0.6, 1.2, 2.4)),
    "GradNorm, squared L2": Entry(
        penalty(lambda threat: GradNormPenalty(euclidean(threat), squared=True)), (0.3, 1.0, 3.0)
    ),
    "squared slope": Entry(penalty(scaleable), (0.3, 1.0, 3.0)),
    "Jacobian": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            terms={"it": Term(JacobianPenalty(), weight * (28 * threat.eps) ** 2)}
        ),
        (0.03, 0.1, 0.3),
    ),
    "cross-Lipschitz": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            terms={"it": Term(JacobianPenalty(centred=True), weight * (28 * threat.eps) ** 2)}
        ),
        (0.03, 0.1, 0.3),
    ),
    "edges": Entry(
        lambda threat, weight, kept: PenalizedLoss(terms={"it": Term(EdgeAlignmentPenalty(), weight)}),
        (2.5, 5.0, 10.0),
    ),
    "CURE": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            terms={"it": Term(Curvature(threat), weight * (28 * threat.eps) ** 2)}
        ),
        (0.3, 1.0, 3.0),
    ),
    "LLR": Entry(penalty(WorstLocalLinearity), (1.0, 2.0, 4.0)),
    "FGSM": Entry(attacked(lambda threat, kept: FGSM(threat)), RADII, RADIUS, collapses=True),
    "FGSM-RS": Entry(attacked(fgsm_rs), RADII, RADIUS, collapses=True),
    "GradAlign": Entry(beside(lambda threat, kept: FGSM(threat), GradientAlignment), (0.05, 0.2, 0.8), collapses=True),
    "ELLE": Entry(beside(lambda threat, kept: FGSM(threat), LocalLinearity), (1e3, 3e4, 1e6), collapses=True),
    "ELLE-A": Entry(
        beside(lambda threat, kept: FGSM(threat), LocalLinearity),
        (1e3, 3e4, 1e6),
        keep=lambda weight: Kept(weight=SpikeWeight("it", weight)),
        collapses=True,
    ),
    "ConvergeSmooth": Entry(
        beside(n_fgsm, lambda threat: start_loss),
        (0.25, 0.5, 1.0),
        keep=lambda weight: Kept(weight=ConvergenceWeight(100, weight=weight)),
        collapses=True,
    ),
    "GAT": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            terms={"it": Term(pairing("squared", n_fgsm(threat, kept), attack_weight=weight), weight)}
        ),
        (3.0, 10.0, 30.0),
    ),
    "NuAT": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            terms={"it": Term(pairing("nuclear", n_fgsm(threat, kept), attack_weight=weight), weight)}
        ),
        (4.0, 12.0, 36.0),
    ),
    "ALP": Entry(beside(lambda threat, kept: pgd(threat), lambda threat: pairing("logits", "clean")), (0.01, 0.1, 0.5)),
    "MART": Entry(
        lambda threat, weight, kept: PenalizedLoss(
            boosted_cross_entropy,
            {"it": Term(pairing("kl", "clean", weighted=True), weight)},
            at=pgd(threat, criterion=cross_entropy),
        ),
        (2.5, 5.0, 10.0),
    ),
    "start for each image": Entry(attacked(n_fgsm), RADII, RADIUS, of_samples, collapses=True),
    "start for each class": Entry(attacked(n_fgsm), RADII, RADIUS, of_classes, collapses=True),
    "start for all": Entry(attacked(n_fgsm), RADII, RADIUS, of_all, collapses=True),
    "FGSM-PGI": Entry(
        beside(n_fgsm, lambda threat: pairing("logits", "start")), (0.01, 0.1, 0.5), keep=of_samples, collapses=True
    ),
    "LIET": Entry(
        beside(n_fgsm, lambda threat: pairing("js", "start")), (1.0, 5.0, 25.0), keep=of_classes, collapses=True
    ),
    "FGSM-UAP": Entry(
        beside(n_fgsm, lambda threat: pairing("logits", "start")), (0.01, 0.1, 0.5), keep=of_all, collapses=True
    ),
}


_KINDS_OF = {
    "attack": ("natural", "N-FGSM", "N-FGSM, half", "PGD-3", "FGSM", "FGSM-RS"),
    "pair": ("TRADES, 3 steps", "TRADES, 1 step", "GAT", "NuAT", "ALP", "MART"),
    "penalty beside one step": ("GradAlign", "ELLE", "ELLE-A", "ConvergeSmooth"),
    "start that remembers": (
        "start for each image",
        "start for each class",
        "start for all",
        "FGSM-PGI",
        "LIET",
        "FGSM-UAP",
    ),
}
MENU = {
    name: replace(entry, kind=next((kind for kind, names in _KINDS_OF.items() if name in names), "penalty"))
    for name, entry in MENU.items()
}


class Training:
    """An entry with one of its weights, as an objective whose radius rises: ``training(model, x, y, t, index)``."""

    def __init__(self, entry: Entry, weight: float, threat: Linf, warm_up: float) -> None:
        self.entry, self.weight, self.threat, self.warm_up = entry, weight, threat, warm_up
        self.kept = entry.keep(weight)
        self.objective = self._made(1.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, t: int, index: Tensor) -> Tensor:
        """The total of a batch."""
        if t <= self.warm_up + 1:
            rising = self._made(min(1.0, max(t, 1) / self.warm_up))
            self.objective.at, self.objective.terms = rising.at, rising.terms  # the checks of the model are made once
        return self.objective(model, x, y, t, index=index).total

    @property
    def cost(self) -> float:
        """Of a step, in natural steps, at most."""
        return self.objective.cost(0, shape=SHAPE).natural_steps

    def _made(self, share: float) -> PenalizedLoss:
        made = self.entry.make(self.threat.scaled(share), self.weight, self.kept)
        made.alarm = self.kept.alarm if self.entry.collapses else None
        return made


def steps_of(name: str, threat: Linf) -> int:
    """How many steps an entry can take for the budget."""
    entry = MENU[name]
    return round(BUDGET / Training(entry, entry.weights[0], threat, 1).cost)

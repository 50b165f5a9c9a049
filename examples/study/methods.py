"""The ways to train that are compared. Each is a function of the threat model and of the length of the warm-up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradreg import (
    FGSM,
    NFGSM,
    Attack,
    Differentiation,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    every,
    linear_ramp,
    sampled_class,
)

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
NATURAL = PenalizedLoss(CROSS_ENTROPY, {})


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What adapts to the size of the gradients."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What does not; its rate is the best of 0.02, 0.05, 0.1 and 0.2 on validation images without a penalty."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        objective: Makes the objective from the threat model and the number of steps in which its weight rises to its
            full size.
        attack: Makes the attack whose images are trained on, for a threat model that rises likewise.
        activation: Of the network.
        family: Methods of a family differ in one number, and lie on one curve.
        start: The method whose network, trained as long, is trained on; None for a fresh one.
        optimizer: Made for the parameters.
        first_rate: The learning rate at first, of the largest one, to which it rises in the first tenth of the steps.
    """

    objective: Callable[[Linf, float], PenalizedLoss] = lambda threat, warm_up: NATURAL
    attack: Callable[[Linf], Attack] | None = None
    activation: str = "gelu"
    family: str = ""
    start: str | None = None
    optimizer: Optimizer = adamw
    first_rate: float = 0.0


def grad_norm(
    weight: float = 1.2,
    *,
    loss_weight: float = 0.8,
    differentiation: Differentiation | None = None,
    bounds: tuple[float, float] | None = None,
    noise: float = 0.0,
    fraction: float = 1.0,
    k: int = 1,
) -> Callable[[Linf, float], PenalizedLoss]:
    """The thesis's objective, with its weights 0.8 and 1.2, or a cheaper estimate of it.

    Args:
        weight: Of the penalty.
        loss_weight: Of the loss.
        differentiation: How the penalty is differentiated.
        bounds: Of the pixels, where only what leaves an image an image is penalised.
        noise: Radius of the noise, in units of the threat model.
        fraction: Share of the batch that is penalised.
        k: The penalty is taken at every k-th step.
    """

    def objective(threat: Linf, warm_up: float) -> PenalizedLoss:
        rising = linear_ramp(weight, duration=warm_up)
        return PenalizedLoss(
            CROSS_ENTROPY,
            {"grad_norm": Term(GradNormPenalty(threat, bounds=bounds), weight=rising if k == 1 else every(k, rising))},
            loss_weight=loss_weight,
            differentiation=differentiation,
            noise=threat.scaled(noise) if noise else None,
            fraction=fraction,
        )

    return objective


def edges(weight: float) -> Callable[[Linf, float], PenalizedLoss]:
    """A class gradient that points at the image's edges."""

    def objective(threat: Linf, warm_up: float) -> PenalizedLoss:
        rising = linear_ramp(weight, duration=warm_up)
        return PenalizedLoss(CROSS_ENTROPY, {"edges": Term(EdgeAlignmentPenalty(), rising, of=sampled_class(0.5))})

    return objective


NOISY = {
    1.0: "noisy differences",
    0.5: "noisy differences, half of the batch",
    0.25: "noisy differences, quarter of the batch",
}


def noisy(weight: float, fraction: float = 1.0, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Method:
    """Finite differences of a full step from a noisy start: its two points lie where N-FGSM's do."""
    difference = FiniteDifference(1.0, one_pass=True)
    return Method(
        grad_norm(weight, differentiation=difference, bounds=bounds, noise=1.0, fraction=fraction),
        family=NOISY[fraction] if bounds else "",
    )


def pgd_3(factor: float, *, random_start: bool = False) -> Method:
    """Three steps from the image itself, for a radius that many times as large. The thesis starts at random."""

    def attack(threat: Linf) -> Attack:
        wider = threat.scaled(factor)
        return PGDAttack(wider, steps=3, step_size=2 / 3 * wider.eps, random_start=random_start, best=False)

    return Method(attack=attack, family="PGD-3")


def n_fgsm(factor: float, noise: float) -> Method:
    """One step from noise, for a radius that many times as large."""
    return Method(
        attack=lambda threat: NFGSM(threat.scaled(factor), noise=noise), family="N-FGSM" if noise == 1 else ""
    )


METHODS: dict[str, Method] = {
    "natural": Method(),
    "edges": Method(edges(5.0), family="edges"),
    "GradNorm": Method(grad_norm(), family="GradNorm"),
    "GradNorm, every 4th step": Method(grad_norm(k=4), family="GradNorm, every 4th step"),
    "GradNorm, differences, every 4th step": Method(
        grad_norm(k=4, differentiation=FiniteDifference(0.25, one_pass=True))
    ),
    "noisy differences, 0.4": noisy(0.4),
    "noisy differences, 0.6": noisy(0.6),
    "noisy differences, half, 0.4": noisy(0.4, 0.5),
    "noisy differences, half, 0.6": noisy(0.6, 0.5),
    "noisy differences, quarter, 0.2": noisy(0.2, 0.25),
    "noisy differences, quarter, 0.4": noisy(0.4, 0.25),
    "FGSM": Method(attack=lambda threat: FGSM(threat), family="FGSM"),
    "PGD-1": Method(
        attack=lambda threat: PGDAttack(threat, steps=1, step_size=1.25 * threat.eps, best=False), family="PGD-1"
    ),
    "N-FGSM, 0.8 eps": n_fgsm(0.8, 1.0),
    "N-FGSM": n_fgsm(1.0, 1.0),
    "PGD-3, 0.6 eps": pgd_3(0.6),
    "PGD-3, 0.8 eps": pgd_3(0.8),
    "PGD-3": pgd_3(1.0),
}

# What takes the cheap estimators apart, to be run for fewer seeds.
ABLATIONS: dict[str, Method] = {
    "GradNorm, half of the batch": Method(grad_norm(fraction=0.5)),
    "GradNorm, differences": Method(grad_norm(differentiation=FiniteDifference(0.25, one_pass=True))),
    "GradNorm, differences, quarter": Method(
        grad_norm(differentiation=FiniteDifference(0.25, one_pass=True), fraction=0.25)
    ),
    "GradNorm in bounds": Method(grad_norm(bounds=(0.0, 1.0))),
    "GradNorm in bounds at noise": Method(grad_norm(bounds=(0.0, 1.0), noise=1.0)),
    "full step in bounds without noise": Method(
        grad_norm(0.6, differentiation=FiniteDifference(1.0, one_pass=True), bounds=(0.0, 1.0))
    ),
    "noisy differences, 0.6, without bounds": noisy(0.6, bounds=None),
    "noisy differences, half, 0.6, without bounds": noisy(0.6, 0.5, bounds=None),
    "noisy differences, half, 0.8, without bounds": noisy(0.8, 0.5, bounds=None),
    "noisy differences, half, 1.0, without bounds": noisy(1.0, 0.5, bounds=None),
    "noisy differences, quarter, 1.0, without bounds": noisy(1.0, 0.25, bounds=None),
    "N-FGSM, 1.2 eps": n_fgsm(1.2, 1.0),
    "N-FGSM, noise 2 eps": n_fgsm(1.0, 2.0),
    "PGD-3, 1.2 eps": pgd_3(1.2),
    "PGD-3, 1.4 eps": pgd_3(1.4),
    "PGD-3, random start": replace(pgd_3(1.0, random_start=True), family=""),
}

# What the thesis says of activations, of where training starts, and of what makes it crash (section 4.3).
CONDITIONS: dict[str, Method] = {
    "GradNorm, SiLU": Method(grad_norm(), activation="silu"),
    "GradNorm, ReLU": Method(grad_norm(), activation="relu"),
    "GradNorm, ReLU, weight 2.4": Method(grad_norm(2.4), activation="relu"),
    "PGD-3, ReLU": replace(pgd_3(1.0), activation="relu", family=""),
    "natural, then GradNorm": Method(grad_norm(), start="natural"),
    "natural, then PGD-3": replace(pgd_3(1.0), start="natural", family=""),
    "natural, SGD": Method(optimizer=sgd),
    "GradNorm, SGD": Method(grad_norm(), optimizer=sgd),
    "natural, warm-up from the full rate": Method(first_rate=1.0),
    "GradNorm, warm-up from the full rate": Method(grad_norm(), first_rate=1.0),
}

ALL = METHODS | ABLATIONS | CONDITIONS

"""The ways to train that are compared. Each is a function of the threat model and of the length of the warm-up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradreg import (
    FGSM,
    NFGSM,
    Attack,
    EdgeAlignmentPenalty,
    GradNormPenalty,
    Linf,
    Noise,
    PenalizedLoss,
    PenalizedOutput,
    PGDAttack,
    Schedule,
    Term,
    every,
    linear_ramp,
)

from study.noisy_differences import NoisyDifferences

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Objective = Callable[[nn.Module, Tensor, Tensor, int], PenalizedOutput]
ObjectiveOf = Callable[[Linf, float], Objective]  # of the threat model and the length of the warm-up

NATURAL = PenalizedLoss()


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
        objective: Makes the objective from the threat model and the number of steps in which the weight of its penalty,
            or the radius of its attack, rises to its full size.
        activation: Of the network.
        family: Methods of a family differ in one number, and lie on one curve.
        start: The method whose network, trained as long, is trained on; None for a fresh one.
        optimizer: Made for the parameters.
        first_rate: The learning rate at first, of the largest one, to which it rises in the first tenth of the steps.
    """

    objective: ObjectiveOf = lambda threat, warm_up: NATURAL
    activation: str = "gelu"
    family: str = ""
    start: str | None = None
    optimizer: Optimizer = adamw
    first_rate: float = 0.0


def _rising(weight: float, warm_up: float, k: int) -> Schedule:
    rising = linear_ramp(weight, duration=warm_up)
    return rising if k == 1 else every(k, rising)


def grad_norm(
    weight: float = 1.2,
    *,
    bounds: tuple[float, float] | None = None,
    noise: float = 0.0,
    fraction: float = 1.0,
    k: int = 1,
) -> ObjectiveOf:
    """The thesis's objective, with its weights 0.8 and 1.2.

    Args:
        weight: Of the penalty; that of the loss is 0.8.
        bounds: Of the pixels, where only what leaves an image an image is penalised.
        noise: Radius of the noise, in units of the threat model.
        fraction: Share of the batch that is penalised.
        k: The penalty is taken at every k-th step.
    """

    def objective(threat: Linf, warm_up: float) -> PenalizedLoss:
        term = Term(GradNormPenalty(threat, bounds=bounds), weight=_rising(weight, warm_up, k))
        at = Noise(threat.scaled(noise), bounds=bounds) if noise else None
        return PenalizedLoss(terms={"grad_norm": term}, at=at, loss_weight=0.8, fraction=fraction)

    return objective


def differences(
    weight: float = 1.2,
    *,
    step: float = 0.25,
    noise: float = 0.0,
    bounds: tuple[float, float] | None = None,
    share: float = 1.0,
    k: int = 1,
) -> ObjectiveOf:
    """The same by a finite difference in one pass: see :class:`NoisyDifferences`."""

    def objective(threat: Linf, warm_up: float) -> NoisyDifferences:
        rising = _rising(weight, warm_up, k)
        return NoisyDifferences(threat, rising, step=step, noise=noise, bounds=bounds, share=share)

    return objective


def edges(weight: float) -> ObjectiveOf:
    """A class gradient that points at the image's edges."""

    def objective(threat: Linf, warm_up: float) -> PenalizedLoss:
        return PenalizedLoss(terms={"edges": Term(EdgeAlignmentPenalty(), _rising(weight, warm_up, 1))})

    return objective


def attacked(attack: Callable[[Linf], Attack]) -> ObjectiveOf:
    """Adversarial training, whose radius rises as the weight of a penalty does.

    Args:
        attack: Makes the attack for a threat model.
    """

    def objective(threat: Linf, warm_up: float) -> Objective:
        full = PenalizedLoss(at=attack(threat))

        def of_step(model: nn.Module, x: Tensor, y: Tensor, t: int) -> PenalizedOutput:
            if t == 0:
                return NATURAL(model, x, y)
            rising = full if t >= warm_up else PenalizedLoss(at=attack(threat.scaled(t / warm_up)))
            return rising(model, x, y)

        return of_step

    return objective


NOISY = {
    1.0: "noisy differences",
    0.5: "noisy differences, half of the batch",
    0.25: "noisy differences, quarter of the batch",
}


def noisy(weight: float, share: float = 1.0, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Method:
    """A full step from a noisy start: its two points lie where N-FGSM's do.

    With the weight of 0.4 on half of the batch, half of the loss's, that is ``NFGSM(threat, share=0.5)``; its weight
    rises in the warm-up, where the radius of an attack would.
    """
    objective = differences(weight, step=1.0, noise=1.0, bounds=bounds, share=share)
    return Method(objective, family=NOISY[share] if bounds else "")


def pgd_3(factor: float, *, random_start: bool = False) -> Method:
    """Three steps from the image itself, for a radius that many times as large. The thesis starts at random."""

    def attack(threat: Linf) -> Attack:
        wider = threat.scaled(factor)
        return PGDAttack(wider, steps=3, step_size=2 / 3 * wider.eps, random_start=random_start, best=False)

    return Method(attacked(attack), family="PGD-3")


def n_fgsm(factor: float, noise: float) -> Method:
    """One step from noise, for a radius that many times as large."""
    objective = attacked(lambda threat: NFGSM(threat.scaled(factor), noise=noise))
    return Method(objective, family="N-FGSM" if noise == 1 else "")


METHODS: dict[str, Method] = {
    "natural": Method(),
    "edges": Method(edges(5.0), family="edges"),
    "GradNorm": Method(grad_norm(), family="GradNorm"),
    "GradNorm, every 4th step": Method(grad_norm(k=4), family="GradNorm, every 4th step"),
    "GradNorm, differences, every 4th step": Method(differences(k=4)),
    "noisy differences, 0.4": noisy(0.4),
    "noisy differences, 0.6": noisy(0.6),
    "noisy differences, half, 0.4": noisy(0.4, 0.5),
    "noisy differences, half, 0.6": noisy(0.6, 0.5),
    "noisy differences, quarter, 0.2": noisy(0.2, 0.25),
    "noisy differences, quarter, 0.4": noisy(0.4, 0.25),
    "FGSM": Method(attacked(lambda threat: FGSM(threat)), family="FGSM"),
    "PGD-1": Method(
        attacked(lambda threat: PGDAttack(threat, steps=1, step_size=1.25 * threat.eps, best=False)), family="PGD-1"
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
    "GradNorm, differences": Method(differences()),
    "GradNorm, differences, quarter": Method(differences(share=0.25)),
    "GradNorm in bounds": Method(grad_norm(bounds=(0.0, 1.0))),
    "GradNorm in bounds at noise": Method(grad_norm(bounds=(0.0, 1.0), noise=1.0)),
    "full step in bounds without noise": Method(differences(0.6, step=1.0, bounds=(0.0, 1.0))),
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

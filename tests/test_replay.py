"""Two forward passes of one step are one function: same random numbers, same state; and they leave what one leaves.

The reference is written by hand: a second pass on a copy of the model as it was before the first one, with all
generators set back.
"""

import copy
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import (
    FGSM,
    NFGSM,
    DoubleBackward,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    Noise,
    PenalizedLoss,
    PGDAttack,
    Point,
    Term,
    cross_entropy,
)
from gradreg.copies import alone

from cases import CLASSES, make_batch, parameters_of, relative_error

# The run-time checks of annotations draw from Python's generator themselves.
pytestmark = pytest.mark.usefixtures("unchecked")

EPS, STEP, WEIGHT = 0.1, 0.25, 1.2
OBJECTIVE = PenalizedLoss(
    terms={"p": Term(GradNormPenalty(Linf(EPS)), WEIGHT)}, differentiation=FiniteDifference(STEP, scheme="forward")
)


class Net(nn.Module):
    """Two linear layers with something between them that draws random numbers or keeps something."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(72, 16), between, nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(F.gelu(self.first(x.flatten(1)))))


class FunctionalDropout(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5)


class NoisyLayer(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class RandomDepth(nn.Module):
    """Stochastic depth, decided by Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.gelu(self.layer(h)) if random.random() < 0.5 else 2 * h


class NumPyMask(nn.Module):
    """As SpecAugment of Transformers masks its features."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.from_numpy(np.random.binomial(1, 0.5, h.shape)).to(h)


class OwnGenerators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generators = [torch.Generator().manual_seed(1)]
        self.python, self.numpy = random.Random(2), np.random.default_rng(3)

    def forward(self, h: Tensor) -> Tensor:
        mask = torch.rand(h.shape, generator=self.generators[0]).round().to(h)
        return h * mask * self.python.random() + float(self.numpy.random())


class Codebook(nn.Module):
    """A codebook in a frozen parameter, moved towards the activations as van den Oord et al. (2017) do."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 16), requires_grad=False)
        self.register_buffer("counts", torch.ones(4))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            nearest = torch.cdist(h, self.codes).argmin(1)
            self.counts = self.counts * 0.5 + F.one_hot(nearest, 4).sum(0).to(h)
            self.codes.data.lerp_(torch.stack([h[nearest == k].sum(0) for k in range(4)]).to(self.codes), 0.3)
        return h * self.codes.mean(0) + h * self.counts.mean()


class Recurrent(nn.Module):
    """Keeps the last activations in a plain attribute, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.history: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        out = h if self.state is None else h * (1 + self.state.mean())
        out = out * (1 + len(self.history))
        self.state = h.detach()
        self.history.append(self.state)
        return out


class Annealed(nn.Module):
    """A temperature that falls at every pass, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.calls = 2.0, {"n": 0}

    def forward(self, h: Tensor) -> Tensor:
        self.temperature *= 0.7
        self.calls["n"] += 1
        return h / self.temperature * self.calls["n"]


class RunningScale(nn.Module):
    """As EvoNorm: divides by a running variance that it moves first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(16))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.spread.mul_(0.5).add_(0.5 * h.detach().var(0))
        return h / (self.spread + 0.1).sqrt()


def _spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))


def _spectral_by_hook() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(16, 16))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5),
    "functional dropout": FunctionalDropout,
    "noise": NoisyLayer,
    "depth by random": RandomDepth,
    "NumPy mask": NumPyMask,
    "generators of its own": OwnGenerators,
    "spectral norm": _spectral,
    "spectral norm by a hook": _spectral_by_hook,
    "codebook": Codebook,
    "recurrent state": Recurrent,
    "annealed temperature": Annealed,
    "running scale": RunningScale,
    "containers": lambda: Containers(),
    "BatchNorm": lambda: nn.BatchNorm1d(16),
    "several": lambda: nn.Sequential(_spectral(), nn.Dropout(0.3), Annealed(), Codebook(), RandomDepth()),
}


class Containers(nn.Module):
    """Keeps what it has seen in a queue of limited length, in a counter, and in a dictionary of another library."""

    class Strict(dict[str, float]):
        """One that does not want to be updated."""

        def update(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("as ModelOutput of Transformers does")

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.counter, self.output = deque([1.0, 2.0], maxlen=2), Counter(a=3), self.Strict(scale=1.0)

    def forward(self, h: Tensor) -> Tensor:
        self.queue.append(self.queue[-1] * 0.5)
        self.counter.update("ab")
        self.output["scale"] = self.output["scale"] * 0.9
        return h * sum(self.queue) * self.counter["a"] * self.output["scale"]


class CentredLoss(nn.Module):
    """A criterion that keeps a moving centre of the logits, as DINO does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        self.centre.mul_(0.5).add_(0.5 * logits.detach().mean(0))
        return F.cross_entropy(logits - 3 * self.centre, y, reduction="none")


class DroppingLoss(nn.Module):
    """A criterion that draws random numbers."""

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.dropout(logits, 0.5), y, reduction="none")


def _net(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net(BETWEEN[name]()).double()
    net(torch.randn(3, 72, dtype=torch.float64))  # so that what is kept is not what it was made with
    return net


def _seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def _drawn() -> list[Any]:
    """What all generators would draw next."""
    return [torch.rand(3).tolist(), random.random(), np.random.rand()]


def _state(module: nn.Module) -> list[Any]:
    """Everything that modules keep, as numbers."""
    found: list[Any] = [value.tolist() for value in module.state_dict().values()]
    for part in module.modules():
        if isinstance(part, Recurrent):
            found += [None if part.state is None else part.state.tolist(), [h.tolist() for h in part.history]]
        if isinstance(part, Annealed):
            found += [part.temperature, dict(part.calls)]
        if isinstance(part, Containers):
            found += [list(part.queue), part.queue.maxlen, dict(part.counter), dict(part.output)]
        if isinstance(part, OwnGenerators):
            generators = copy.deepcopy((part.python, part.numpy))
            found += [part.generators[0].get_state().tolist(), generators[0].random(), generators[1].random()]
    return found


def _by_hand(net: nn.Module, x: Tensor, y: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """The gradient of the objective by two passes from one state, the second on a copy."""
    twin = alone(net, precise=False)
    twin.load_state_dict(net.state_dict())
    _seed()
    leaf = x.clone().requires_grad_()
    here = criterion(net(leaf), y)
    (grad,) = torch.autograd.grad(here.sum(), leaf, retain_graph=True)
    _seed()
    there = criterion(twin(x + STEP * EPS * grad.sign()), y)
    total = here.mean() + WEIGHT * ((there - here) / STEP).mean()
    own, other = parameters_of(net), parameters_of(twin)
    found = torch.autograd.grad(total, [*own, *other], allow_unused=True, materialize_grads=True)
    return [a + b for a, b in zip(found[: len(own)], found[len(own) :], strict=True)]


def _gradient(objective: PenalizedLoss, net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    _seed()
    total = objective(net, x, y).total
    return list(torch.autograd.grad(total, parameters_of(net), allow_unused=True, materialize_grads=True))


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
@pytest.mark.parametrize("name", BETWEEN)
class TestFiniteDifference:
    def test_is_that_of_one_function(self, name: str) -> None:
        net, (x, y) = _net(name), make_batch(6)
        expected = _by_hand(alone(net, precise=False), x, y, cross_entropy)
        assert relative_error(_gradient(OBJECTIVE, net, x, y), expected) < 1e-12

    def test_leaves_what_one_pass_leaves(self, name: str) -> None:
        net, (x, y) = _net(name), make_batch(6)
        plain = alone(net, precise=False)
        _seed()
        plain(x)
        after = _drawn()
        parts = [dict(module.__dict__) for module in net.modules()]
        _gradient(OBJECTIVE, net, x, y)
        assert _drawn() == after
        assert _state(net) == _state(plain)
        assert [list(module.__dict__) for module in net.modules()] == [list(part) for part in parts]

    def test_steps_of_training_stay_those_of_one_function(self, name: str) -> None:
        net, (x, y) = _net(name), make_batch(6)
        twin = alone(net, precise=False)
        for _ in range(5 if name == "several" else 20):  # whose temperature falls until rounding decides
            found = _gradient(OBJECTIVE, net, x, y)
            expected = _by_hand(twin, x, y, cross_entropy)
            assert relative_error(found, expected) < 1e-9
            with torch.no_grad():
                for model in (net, twin):
                    for parameter, slope in zip(parameters_of(model), expected, strict=True):
                        parameter.sub_(0.03 * slope)


# What these compute depends on x also through the state that they move first, without a gradient: a finite difference
# follows it, autograd does not.
MOVED_FIRST = ("codebook", "running scale", "several")


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
@pytest.mark.parametrize("name", [name for name in BETWEEN if name not in MOVED_FIRST])
def test_finite_differences_tend_to_the_exact_gradient(name: str) -> None:
    net, (x, y) = _net(name), make_batch(6)
    terms = {"p": Term(GradNormPenalty(Linf(EPS)), WEIGHT)}
    exact, close = (
        _gradient(PenalizedLoss(terms=terms, differentiation=how), alone(net, precise=False), x, y)
        for how in (DoubleBackward(), FiniteDifference(1e-3, scheme="central"))
    )
    assert relative_error(close, exact) < 1e-5


@pytest.mark.parametrize("name", ["nothing", "dropout", "depth by random", "spectral norm"])
def test_a_criterion_draws_the_same_numbers_too(name: str) -> None:
    net, (x, y), criterion = _net(name), make_batch(6), DroppingLoss()
    objective = PenalizedLoss(criterion, OBJECTIVE.terms, differentiation=FiniteDifference(STEP))
    expected = _by_hand(alone(net, precise=False), x, y, criterion)
    assert relative_error(_gradient(objective, net, x, y), expected) < 1e-12


@pytest.mark.parametrize(
    "at", [NFGSM(Linf(EPS), share=0.5), PGDAttack(Linf(EPS), steps=2, best=False), Noise(Linf(EPS))]
)
@pytest.mark.parametrize("name", BETWEEN)
def test_an_attack_moves_nothing_and_the_step_moves_it_once(name: str, at: Any) -> None:
    """What is kept afterwards is what one pass over the mixed batch, from the state before, would have left."""
    net, (x, y) = _net(name), make_batch(6)
    plain = alone(net, precise=False)
    _seed()
    out = PenalizedLoss(at=at)(net, x, y)
    if name in ("spectral norm", "spectral norm by a hook", "annealed temperature"):  # whatever the input is
        plain(out.x)
        assert _state(net) == _state(plain)
    elif name in ("running scale", "BatchNorm", "codebook"):
        plain(out.x)
        found, expected = (list(model.buffers()) for model in (net, plain))
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, expected, strict=True))
    elif name == "recurrent state":
        assert len(net.between.history) == len(plain.between.history) + 1


def test_a_criterion_moves_its_buffers_once() -> None:
    net, (x, y), criterion = _net("nothing"), make_batch(6), CentredLoss()
    before, after = copy.deepcopy(criterion), copy.deepcopy(criterion)
    twins = iter((before, copy.deepcopy(criterion)))
    expected = _by_hand(alone(net, precise=False), x, y, lambda logits, y: next(twins)(logits, y))
    objective = PenalizedLoss(criterion, OBJECTIVE.terms, differentiation=FiniteDifference(STEP))
    assert relative_error(_gradient(objective, net, x, y), expected) < 1e-12
    after(net(x), y)
    assert torch.allclose(criterion.centre, after.centre, rtol=1e-12)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ["nothing", "dropout", "functional dropout"])
def test_a_penalty_at_half_attacked_points_is_of_one_function(name: str, share: float) -> None:
    """Where parts of the batch draw their own random numbers, so do they at every other point."""
    net, (x, y) = _net(name), make_batch(6)
    terms, at = {"p": Term(GradNormPenalty(Linf(EPS)), WEIGHT)}, NFGSM(Linf(EPS), share=share)
    exact, close = (
        _gradient(PenalizedLoss(terms=terms, at=at, differentiation=how), net, x, y)
        for how in (DoubleBackward(), FiniteDifference(1e-3, scheme="central"))
    )
    assert relative_error(close, exact) < 1e-5


@pytest.mark.parametrize("at", [FGSM(Linf(EPS), mode="eval"), PGDAttack(Linf(EPS), steps=2, mode="eval")])
def test_every_step_draws_new_numbers_after_an_attack_in_evaluation_mode(at: Any) -> None:
    net, (x, y) = _net("dropout"), make_batch(6)
    objective = PenalizedLoss(at=at)
    _seed()
    logits = [objective(net, x, y).logits for _ in range(2)]
    assert not torch.equal(*(found == 0 for found in logits)) or not torch.allclose(*logits, rtol=1e-3)


def test_a_random_projection_is_the_same_at_every_point() -> None:
    """The penalty of Hoffman et al. 2019, by finite differences of a score that draws random numbers."""

    def projected(point: Point) -> Tensor:
        return point.gradient(lambda logits: (logits * torch.randn_like(logits)).sum(1)).flatten(1).square().sum(1)

    net, (x, y) = _net("dropout"), make_batch(6)
    exact, close = (
        _gradient(PenalizedLoss(terms={"p": Term(projected)}, differentiation=how), net, x, y)
        for how in (DoubleBackward(), FiniteDifference(1e-3, Linf(EPS), "central"))
    )
    assert relative_error(close, exact) < 1e-5


def test_a_teacher_that_a_forward_pass_averages_is_refused() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(72, CLASSES), nn.Linear(72, CLASSES).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                own.data = own.data * 0.9 + 0.1 * other.data
            return self.student(x.flatten(1)) + self.teacher(x.flatten(1))

    with pytest.raises(RuntimeError, match="teacher"):
        OBJECTIVE(Averaged().double(), *make_batch(6))


def test_what_the_first_pass_adds_the_second_does_not_find() -> None:
    class Lazy(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            if hasattr(self, "scale"):
                return h * self.scale
            self.scale = 1 + h.detach().std()
            return h

    net, (x, y) = Net(Lazy()).double(), make_batch(6)
    expected = _by_hand(alone(net, precise=False), x, y, cross_entropy)
    assert relative_error(_gradient(OBJECTIVE, net, x, y), expected) < 1e-12


def test_a_loss_in_which_samples_see_each_other() -> None:
    """A contrastive loss: a sample's loss depends on the displacements of all."""

    def contrastive(features: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(features @ features.T, torch.arange(len(features)), reduction="none")

    net, (x, y) = _net("nothing"), make_batch(6)
    terms = {"p": Term(lambda point: point.gradient().flatten(1).square().sum(1), 0.5)}
    exact, close = (
        _gradient(PenalizedLoss(contrastive, terms, differentiation=how), net, x, y)
        for how in (DoubleBackward(), FiniteDifference(1e-3, Linf(EPS), "central"))
    )
    assert relative_error(close, exact) < 1e-5


def test_a_container_that_holds_itself() -> None:
    net, (x, y) = _net("nothing"), make_batch(6)
    net.between.settings = {"scale": 1.0}
    net.between.settings["self"] = net.between.settings
    net.register_buffer("unused", torch.zeros(1))
    assert torch.isfinite(OBJECTIVE(net, x, y).total)


def test_points_of_one_batch_are_one_function() -> None:
    net, (x, y) = _net("several"), make_batch(6)
    point = Point(net, cross_entropy, x, y)
    again = point.at(x)
    assert torch.equal(point.logits, again.logits)
    assert torch.equal(again.logits, point.at(x).logits)


def test_the_first_pass_may_be_another_than_the_step_s_own() -> None:
    """An attack asks for other points before the step's own pass has run."""
    net, (x, y) = _net("several"), make_batch(6)
    point = Point(net, cross_entropy, x, y)
    before = point.at(x).logits
    assert torch.equal(before, point.logits)


def test_an_exception_leaves_the_modules_as_they_were() -> None:
    net, (x, y) = _net("recurrent state"), make_batch(6)
    point = Point(net, cross_entropy, x, y)
    _ = point.logits
    state = _state(net)
    with pytest.raises(RuntimeError, match="shapes"):
        _ = point.at(torch.zeros(6, 3, dtype=torch.float64)).logits
    assert _state(net) == state


def test_what_modules_share_stays_shared() -> None:
    class Reads(nn.Module):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, h: Tensor) -> Tensor:
            return h * self.scale

    class Writes(Reads):
        def forward(self, h: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            return h * self.scale

    scale = torch.ones((), dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), Writes(scale), nn.GELU(), Reads(scale), nn.Linear(16, CLASSES))
    net, (x, y) = net.double(), make_batch(6)
    net[4].scale = net[2].scale = scale
    point = Point(net, cross_entropy, x, y)
    assert torch.equal(point.logits, point.at(x).logits)
    assert scale.item() == 0.5
    assert net[4].scale is net[2].scale is scale

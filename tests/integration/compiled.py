"""Whole-step torch.compile without a graph break (backend aot_eager: the same tracing, no code generation).

Dynamo cannot trace the run-time checks of annotations under which the other tests run, so this file is no test of
theirs: test_compile.py runs it in a process of its own, as users have the library.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gradreg import (
    FGSM,
    L1,
    L2,
    NFGSM,
    Attack,
    Curvature,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientAlignment,
    GradNormPenalty,
    JacobianPenalty,
    Linf,
    LocalLinearity,
    LogitPairing,
    Noise,
    PenalizedLoss,
    PGDAttack,
    Point,
    SaliencyAlignment,
    SpikeWeight,
    Term,
    ThreatModel,
    WorstLocalLinearity,
    edge_alignment,
    grad_norm,
    input_gradient_of,
    linear_ramp,
)

from cases import (
    CLASSES,
    FUNCTIONAL,
    OBJECTIVES,
    make_batch,
    make_model,
    make_objective,
    objective_gradient,
    parameters_of,
    per_sample_cross_entropy,
    relative_error,
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("objective_name", OBJECTIVES)
def test_objectives(objective_name: str) -> None:
    _check(make_model("conv"), make_objective(objective_name))


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
@pytest.mark.parametrize("model_name", [*FUNCTIONAL, "batch_norm_train"])
def test_models(model_name: str) -> None:
    _check(make_model(model_name), make_objective("both"))


def _check(model: nn.Module, objective: PenalizedLoss, batch: tuple[Tensor, Tensor] | None = None) -> None:
    x, y = make_batch() if batch is None else batch
    twin = make_model("batch_norm_train") if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else None
    expected = objective_gradient(objective, model, x, y)
    if twin is not None and model.training:  # eager has moved the statistics once; so must compiled
        model.load_state_dict(twin.state_dict())
        twin(x)
    step = torch.compile(lambda x, y: objective(model, x, y, t=5).total, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(step(x, y), parameters_of(model))
    assert relative_error(list(found), expected) < 1e-12
    if twin is not None and model.training:
        assert all(torch.allclose(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("name", ["dropout", "functional dropout", "noise"])
def test_an_exact_penalty_draws_classes_and_trains(name: str) -> None:
    """One forward pass is enough for it, and may draw what it likes."""
    model, (x, y) = _random(name), make_batch()
    objective = PenalizedLoss(per_sample_cross_entropy, {"e": Term(EdgeAlignmentPenalty(sigma=0.6), 0.5)})
    step = torch.compile(lambda x, y: objective(model, x, y).total, backend="aot_eager", fullgraph=True)
    gradient = torch.autograd.grad(step(x, y), parameters_of(model))
    assert all(torch.isfinite(g).all() for g in gradient)
    assert any(bool(g.any()) for g in gradient)


class _Random(nn.Module):
    """A model that draws random numbers on its way."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.first, self.last = act, nn.Linear(72, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(F.gelu(self.first(x.flatten(1)))))


def _random(name: str) -> nn.Module:
    if name == "dropout":
        return make_model("dropout_eval").train()
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "functional dropout": lambda h: F.dropout(h, 0.5),
        "noise": lambda h: h + torch.randn_like(h),
        "random depth": lambda h: h * torch.rand(len(h), 1, dtype=h.dtype),
    }
    return _Random(acts[name]).double()


RANDOM = "dropout", "functional dropout", "noise", "random depth"
TERMS = {"p": Term(GradNormPenalty(Linf(0.1)))}


def _dropped_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return per_sample_cross_entropy(F.dropout(logits, 0.3), y)


DIFFERENCE = {"terms": TERMS, "differentiation": FiniteDifference(0.1)}
TWO_PASSES: dict[str, dict[str, Any]] = {
    "difference": DIFFERENCE,
    "central difference": {"terms": TERMS, "differentiation": FiniteDifference(0.1, scheme="central")},
    "difference of a class": {
        "terms": {"e": Term(EdgeAlignmentPenalty(sigma=0.6))},
        "differentiation": FiniteDifference(0.1, Linf(0.1)),
    },
    "N-FGSM of half": {"at": NFGSM(Linf(0.1), share=0.5)},
    "N-FGSM": {"at": NFGSM(Linf(0.1))},
    "PGD": {"at": PGDAttack(Linf(0.1), steps=2, best=False)},
}


@pytest.mark.parametrize(
    ("step", "name"),
    [
        *[("difference", name) for name in (*RANDOM, "criterion")],
        *[(step, "dropout") for step in TWO_PASSES if step != "difference"],
        *[(step, "criterion") for step in ("central difference", "N-FGSM of half", "PGD")],
    ],
)
def test_two_passes_that_would_draw_other_numbers_are_refused(step: str, name: str) -> None:
    """In a compiled region none can be set back."""
    x, y = make_batch(4)
    model = make_model("conv") if name == "criterion" else _random(name)
    criterion = _dropped_cross_entropy if name == "criterion" else per_sample_cross_entropy
    objective = PenalizedLoss(criterion, **TWO_PASSES[step])
    objective(model, x, y).total.backward()
    compiled = torch.compile(lambda x, y: objective(model, x, y).total, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="random"):
        compiled(x, y).backward()


def two_points(point: Point) -> Tensor:
    """A penalty of two gradients."""
    there = point.at(point.x + 0.05 * point.x.cos()).gradient()
    return (point.gradient() - there).flatten(1).square().sum(1)


@pytest.mark.parametrize("differentiation", [None, FiniteDifference(0.1, Linf(0.1))])
def test_penalties_of_two_gradients(differentiation: FiniteDifference | None) -> None:
    terms = {"p": Term(two_points, 0.7)}
    _check(make_model("conv"), PenalizedLoss(per_sample_cross_entropy, terms, differentiation=differentiation))


class SteadyAlignment(GradientAlignment):
    """With numbers in the place of random ones, which a compiled region draws otherwise."""

    def _noise(self, point: Point, ball: ThreatModel, draw: int = 0) -> Tensor:
        return 0.05 * point.x.cos()


class SteadyLinearity(LocalLinearity):
    def _noise(self, point: Point, ball: ThreatModel, draw: int = 0) -> Tensor:
        return (0.05 + 0.03 * draw) * point.x.cos()

    def _share(self, point: Point) -> Tensor:
        return point.x.flatten(1).mean(1)


class SteadyWorst(WorstLocalLinearity):
    def _noise(self, point: Point, ball: ThreatModel, draw: int = 0) -> Tensor:
        return 0.05 * point.x.cos()


STEP = NFGSM(Linf(0.1), noise=0.0)
MENU: dict[str, dict[str, Any]] = {
    "gradients": {
        "terms": {
            "squared": Term(GradNormPenalty(Linf(0.1), squared=True)),
            "Jacobian": Term(JacobianPenalty("exact", centred=True)),
            "curvature": Term(Curvature(Linf(0.1))),
            "alignment": Term(SteadyAlignment(Linf(0.1))),
            "maps": Term(SaliencyAlignment(lambda point: point.x)),
        }
    },
    "values": {"terms": {"ELLE": Term(SteadyLinearity(Linf(0.1))), "LLR": Term(SteadyWorst(Linf(0.1)))}},
    "pairs": {
        "terms": {
            name: Term(LogitPairing(name, STEP, attack_weight=1.0)) for name in ("kl", "js", "squared", "nuclear")
        }
    },
    "pairs after an attack": {
        "terms": {name: Term(LogitPairing("logits", name)) for name in ("clean", "start")},
        "at": STEP,
    },
}


@pytest.mark.parametrize("differentiation", [None, FiniteDifference(0.1, Linf(0.1))])
@pytest.mark.parametrize("name", MENU)
def test_the_menu(name: str, differentiation: FiniteDifference | None) -> None:
    _check(make_model("conv"), PenalizedLoss(per_sample_cross_entropy, **MENU[name], differentiation=differentiation))


@pytest.mark.parametrize("differentiation", [None, FiniteDifference(0.1, Linf(0.1))])
def test_penalties_that_draw_random_numbers(differentiation: FiniteDifference | None) -> None:
    """Other ones at every step, and the same ones at all points of a step: two points that are one do not differ."""
    model, (x, y) = make_model("conv"), make_batch(4)
    terms = {"alignment": Term(GradientAlignment(Linf(1e-9))), "Jacobian": Term(JacobianPenalty())}
    objective = PenalizedLoss(per_sample_cross_entropy, terms, differentiation=differentiation)
    step = torch.compile(lambda x, y: tuple(objective(model, x, y)), backend="aot_eager", fullgraph=True)
    first, second = (step(x, y) for _ in range(2))
    assert first[3]["alignment"].abs().max() < 1e-6
    assert not torch.equal(first[3]["Jacobian"], second[3]["Jacobian"])
    assert all(g.isfinite().all() for g in torch.autograd.grad(first[0], parameters_of(model)))


def test_a_controller_compiles() -> None:
    """Its buffers move inside the region."""
    model, (x, y) = make_model("conv"), make_batch(4)
    weight = SpikeWeight("p", peak=2.0)
    objective = PenalizedLoss(per_sample_cross_entropy, {"p": Term(GradNormPenalty(Linf(0.1)), weight)}).double()
    step = torch.compile(lambda x, y: objective(model, x, y).total, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        step(x, y)
    assert int(weight.seen) == 3


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("model_name", ["conv", "attention", "batch_norm_train"])
@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
def test_finite_differences(model_name: str, scheme: str) -> None:
    _check(make_model(model_name), make_objective("both", differentiation=FiniteDifference(0.1, Linf(0.1), scheme)))


PLACES: dict[str, Attack] = {
    "noise": Noise(Linf(0.0)),
    "FGSM": FGSM(Linf(0.1)),
    "FGSM, L2": FGSM(L2(0.5)),
    "N-FGSM": NFGSM(Linf(0.1), noise=0.0),
    "N-FGSM of half": NFGSM(Linf(0.1), noise=0.0, share=0.5),
    "PGD": PGDAttack(Linf(0.1), steps=2, best=False, early_stop=False, random_start=False),
    "PGD, best": PGDAttack(L1(1.0), steps=2, random_start=False),
}
PENALISED: dict[str, dict[str, Any]] = {
    "loss": {},
    "exact": {"terms": OBJECTIVES["both"]},
    "difference": {"terms": OBJECTIVES["both"], "differentiation": FiniteDifference(0.1, Linf(0.1))},
}


@pytest.mark.parametrize(
    ("place", "penalised"),
    [
        *[(place, "loss") for place in PLACES],
        *[(place, penalised) for place in ("noise", "N-FGSM of half", "PGD") for penalised in ("exact", "difference")],
    ],
)
def test_places(place: str, penalised: str) -> None:
    """Other numbers are drawn than eagerly, so that what is compared is the gradient where they do not matter."""
    x, y = make_batch(4)
    same = x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4)
    _check(make_model("conv"), PenalizedLoss(per_sample_cross_entropy, at=PLACES[place], **PENALISED[penalised]), same)


@pytest.mark.parametrize("place", ["FGSM", "N-FGSM", "PGD"])
def test_places_in_evaluation_mode(place: str) -> None:
    """An attack in evaluation mode draws nothing, so that one training pass may."""
    model, (x, y) = make_model("dropout_eval").train(), make_batch(4)
    objective = PenalizedLoss(per_sample_cross_entropy, at=replace(PLACES[place], mode="eval"))
    expected = objective(model, x, y).x
    step = torch.compile(lambda x, y: objective(model, x, y)[4], backend="aot_eager", fullgraph=True)
    assert torch.allclose(step(x, y), expected, atol=1e-12)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("place", ["N-FGSM", "N-FGSM of half", "PGD", "noise"])
def test_places_where_samples_see_each_other(place: str) -> None:
    """BatchNorm in training mode; its statistics move once, and are those of the whole attacked batch."""
    x, y = make_batch(4)
    model, twin, compiled = (make_model("batch_norm_train") for _ in range(3))
    at = PLACES[place]
    same = (x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4)) if place == "N-FGSM of half" else (x, y)
    objective = PenalizedLoss(per_sample_cross_entropy, at=at)
    expected = objective_gradient(objective, model, *same)
    out = objective(twin, *same)
    step = torch.compile(lambda x, y: objective(compiled, x, y).total, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(step(*same), parameters_of(compiled))
    assert relative_error(list(found), expected) < 1e-11
    fresh = make_model("batch_norm_train")
    fresh(out.x)
    assert all(torch.allclose(a, b) for a, b in zip(compiled.buffers(), fresh.buffers(), strict=True))


def test_the_recommended_objective_moves_a_half_and_stays_in_bounds() -> None:
    """With the random numbers of the compiled region, step by step other ones."""
    model, (x, y) = make_model("conv"), make_batch(8)
    objective = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))
    step = torch.compile(lambda x, y: objective(model, x, y)[4], backend="aot_eager", fullgraph=True)
    first, second = step(x, y), step(x, y)
    assert not torch.equal(first, second)
    for z in (first, second):
        assert ((z >= 0) & (z <= 1)).all()
        assert ((z - x).abs() <= 0.2 + 1e-12).all()
        assert ((z - x).abs().flatten(1).amax(1) > 0.1 + 1e-9).sum() == 4


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
@pytest.mark.parametrize("place", ["N-FGSM of half", "PGD"])
def test_places_around_a_compiled_model(place: str) -> None:
    model, (x, y) = make_model("conv"), make_batch(4)
    x, y = x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4)
    objective = PenalizedLoss(per_sample_cross_entropy, at=PLACES[place])
    found = objective_gradient(objective, torch.compile(model, backend="aot_eager"), x, y)
    assert relative_error(found, objective_gradient(objective, model, x, y)) < 1e-12


def test_a_ramp_compiles_a_few_times_and_not_at_every_step() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective, counter = make_objective("both"), CompileCounter()
    step = torch.compile(lambda x, y, t: objective(model, x, y, t=t).total, backend=counter, fullgraph=True)
    totals = [step(x, y, t).item() for t in range(20)]
    assert totals == pytest.approx([objective(model, x, y, t=t).total.item() for t in range(20)])
    assert counter.frame_count <= 5


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("at", [None, NFGSM(Linf(0.1), noise=0.0)])
def test_a_ramp_of_finite_differences(fraction: float, at: Attack | None) -> None:
    (x, y), model = make_batch(), make_model("conv")
    x, y = x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone()  # whichever is drawn
    objective = PenalizedLoss(
        per_sample_cross_entropy,
        {"grad_norm": Term(GradNormPenalty(Linf(0.1)), weight=linear_ramp(0.4, duration=3))},
        at=at,
        loss_weight=0.8,
        differentiation=FiniteDifference(1.0),
        fraction=fraction,
    )
    step = torch.compile(lambda x, y, t: objective(model, x, y, t=t).total, backend="aot_eager", fullgraph=True)
    for t in range(5):
        expected = torch.autograd.grad(objective(model, x, y, t=t).total, parameters_of(model))
        found = torch.autograd.grad(step(x, y, t), parameters_of(model))
        assert relative_error(list(found), list(expected)) < 1e-11


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4), L1(2.0)])
def test_functions_of_a_gradient(threat: ThreatModel) -> None:
    x, _ = make_batch()
    g = torch.randn_like(x)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda g: grad_norm(g, threat),
        threat.maximizer,
        lambda g: threat.project(g, (-x, 1 - x)),
        lambda g: edge_alignment(g, x, sigma=0.6),
    ]
    for function in functions:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(g), function(g), rtol=1e-12)


def test_input_gradient_of() -> None:
    model, (x, y) = make_model("conv"), make_batch()

    def gradient(x: Tensor) -> Tensor:
        return input_gradient_of(lambda z: per_sample_cross_entropy(model(z), y), x)[0]

    assert relative_error(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x)) < 1e-12


# Dynamo looks at the .grad of the non-leaf that a compiled model is given, and hides the warning of that from all but
# -W error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_with_finite_differences() -> None:
    """Double backward raises there; finite differences need none."""
    model, (x, y) = make_model("conv"), make_batch()
    objective = make_objective("both", differentiation=FiniteDifference(0.1, Linf(0.1)))
    expected = objective_gradient(objective, model, x, y)
    found = objective_gradient(objective, torch.compile(model, backend="aot_eager", fullgraph=True), x, y)
    assert relative_error(found, expected) < 1e-10

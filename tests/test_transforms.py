"""What works with what: functions of the library under torch.func transforms.

The table in docs/concepts.md has the parametrisations below as its rows and columns; its column for torch.compile is
tested in integration/compiled.py.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from gradreg import (
    FGSM,
    L1,
    L2,
    NFGSM,
    Attack,
    EdgeAlignmentPenalty,
    FiniteDifference,
    Linf,
    Noise,
    PenalizedLoss,
    PGDAttack,
    Point,
    Term,
    ThreatModel,
    edge_alignment,
    grad_norm,
    input_gradient_of,
    sampled_class,
    true_class,
)

from cases import (
    FUNCTIONAL,
    OBJECTIVES,
    make_batch,
    make_model,
    make_objective,
    objective_gradient,
    per_sample_cross_entropy,
    relative_error,
    soft_labels,
)


def _total(objective: PenalizedLoss, model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return objective(lambda z: functional_call(model, parameters, (z,)), x, y, t=5).total


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("objective_name", OBJECTIVES)
@pytest.mark.parametrize("model_name", ["conv", "attention"])
class TestObjective:
    def test_functional_call(self, objective_name: str, model_name: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        objective = make_objective(objective_name)
        parameters = {name: value.requires_grad_() for name, value in _parameters(model).items()}
        found = torch.autograd.grad(_total(objective, model, parameters, x, y), list(parameters.values()))
        assert relative_error(list(found), objective_gradient(objective, model, x, y)) < 1e-12

    def test_grad(self, objective_name: str, model_name: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        objective = make_objective(objective_name)
        found = grad(lambda p: _total(objective, model, p, x, soft_labels(y)))(_parameters(model))
        assert relative_error(list(found.values()), objective_gradient(objective, model, x, soft_labels(y))) < 1e-12

    def test_vmap_gives_per_sample_gradients(self, objective_name: str, model_name: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        objective = make_objective(objective_name)

        def of_sample(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return _total(objective, model, parameters, x[None], y[None])

        found = vmap(grad(of_sample), in_dims=(None, 0, 0))(_parameters(model), x, y)
        alone = [objective_gradient(objective, model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        expected = [torch.stack(gradients) for gradients in zip(*alone, strict=True)]
        assert relative_error(list(found.values()), expected) < 1e-12

    def test_vmap_over_an_ensemble_of_models(self, objective_name: str, model_name: str) -> None:
        models = [make_model(model_name, seed=seed) for seed in range(3)]
        x, y = make_batch()
        objective = make_objective(objective_name)
        stacked = {n: torch.stack([_parameters(m)[n] for m in models]) for n in _parameters(models[0])}
        found = vmap(lambda p: _total(objective, models[0], p, x, y))(stacked)
        expected = torch.stack([objective(model, x, y, t=5).total.detach() for model in models])
        assert relative_error(found, expected) < 1e-12

    def test_jvp(self, objective_name: str, model_name: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        objective = make_objective(objective_name)
        tangents = {name: torch.randn_like(value) for name, value in _parameters(model).items()}
        _, found = jvp(lambda p: _total(objective, model, p, x, y), (_parameters(model),), (tangents,))
        gradient = objective_gradient(objective, model, x, y)
        expected = sum((g * t).sum() for g, t in zip(gradient, tangents.values(), strict=True))
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("model_name", FUNCTIONAL)
def test_every_model_under_grad(model_name: str) -> None:
    model, (x, y) = make_model(model_name), make_batch()
    objective = make_objective("both")
    found = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
def test_batch_norm_in_training_mode_under_functional_call() -> None:
    model, twin, (x, y) = make_model("batch_norm_train"), make_model("batch_norm_train"), make_batch()
    parameters = {name: value.requires_grad_() for name, value in _parameters(model).items()}
    total = _total(make_objective("both"), model, parameters, x, y)
    found = torch.autograd.grad(total, list(parameters.values()))
    assert relative_error(list(found), objective_gradient(make_objective("both"), twin, x, y)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def two_points(point: Point) -> Tensor:
    """A penalty of two gradients."""
    there = point.at(point.x + 0.05 * point.x.cos()).gradient()
    return (point.gradient() - there).flatten(1).square().sum(1)


DIFFERENCES = {
    "both": OBJECTIVES["both"],
    "two points": {"p": Term(two_points, 0.7)},
    "two scores": {"p": Term(lambda point: (point.gradient() * point.gradient(true_class())).flatten(1).sum(1))},
}


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("terms", DIFFERENCES)
def test_finite_differences_under_grad_vmap_and_jvp(terms: str, scheme: str) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    difference = FiniteDifference(0.1, Linf(0.1), scheme)
    objective = PenalizedLoss(per_sample_cross_entropy, DIFFERENCES[terms], loss_weight=0.8, differentiation=difference)
    expected = objective_gradient(objective, model, x, y)

    whole = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    assert relative_error(list(whole.values()), expected) < 1e-10

    of_sample = grad(lambda p, x, y: _total(objective, model, p, x[None], y[None]))
    parts = vmap(of_sample, in_dims=(None, 0, 0))(_parameters(model), x, y)
    alone = [objective_gradient(objective, model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    assert relative_error(list(parts.values()), [torch.stack(grads) for grads in zip(*alone, strict=True)]) < 1e-10

    tangents = {name: torch.randn_like(value) for name, value in _parameters(model).items()}
    _, slope = jvp(lambda p: _total(objective, model, p, x, y), (_parameters(model),), (tangents,))
    product = sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True))
    assert relative_error(slope, product) < 1e-9


@pytest.mark.parametrize("terms", DIFFERENCES)
def test_penalties_of_several_gradients_under_grad(terms: str) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(per_sample_cross_entropy, DIFFERENCES[terms])
    found = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-12


PLACES: dict[str, Attack] = {
    "noise": Noise(Linf(0.1)),
    "FGSM": FGSM(L2(0.5)),
    "N-FGSM": NFGSM(Linf(0.1), noise=2.0, bounds=None),
    "N-FGSM of half": NFGSM(Linf(0.1), share=0.5),
    "PGD": PGDAttack(Linf(0.1), steps=2, best=False),
    "PGD, best": PGDAttack(L1(1.0), steps=2),
}
RANDOM = "dropout", "noise inside"


def _random_model(name: str) -> nn.Module:
    if name == "dropout":
        return make_model("dropout_eval").train()

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model("conv")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + 0.1 * torch.randn_like(x))

    return Noisy()


class TestPlaces:
    """Where the loss is taken, inside a transform, with the random numbers that are drawn eagerly."""

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("model_name", ["conv", "attention", *RANDOM])
    @pytest.mark.parametrize("penalised", [False, True])
    def test_grad(self, place: str, model_name: str, penalised: bool) -> None:
        model = _random_model(model_name) if model_name in RANDOM else make_model(model_name)
        x, y = make_batch(6)
        terms = OBJECTIVES["both"] if penalised else {}
        objective = PenalizedLoss(per_sample_cross_entropy, terms, at=PLACES[place])
        torch.manual_seed(0)
        found = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
        torch.manual_seed(0)
        assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-11

    @pytest.mark.parametrize("place", [FGSM(Linf(0.1)), NFGSM(Linf(0.1), noise=0.0), Noise(Linf(0.0)),
                                       PGDAttack(Linf(0.1), steps=2, random_start=False)])  # fmt: skip
    def test_vmap_gives_per_sample_gradients(self, place: Attack) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = PenalizedLoss(per_sample_cross_entropy, at=place)

        def of_sample(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return _total(objective, model, parameters, x[None], y[None])

        mapped = vmap(grad(of_sample), in_dims=(None, 0, 0), randomness="different")
        found = mapped(_parameters(model), x, y)
        expected = objective_gradient(objective, model, x, y)
        assert relative_error([part.mean(0) for part in found.values()], expected) < 1e-11

    @pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)])
    def test_noise_may_be_drawn_inside_vmap(self, threat: ThreatModel) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        same, label = x[:1].expand(4, -1, -1, -1), y[:1].expand(4)
        objective = PenalizedLoss(at=NFGSM(threat))
        moved = vmap(lambda x, y: objective(model, x[None], y[None]).x[0], randomness="different")(same, label)
        assert not torch.equal(moved[0], moved[1])
        assert (threat.norm(moved - same) <= 2 + 1e-9).all()

    def test_jvp(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))
        tangents = {name: torch.randn_like(value) for name, value in _parameters(model).items()}
        torch.manual_seed(0)
        _, found = jvp(lambda p: _total(objective, model, p, x, y), (_parameters(model),), (tangents,))
        torch.manual_seed(0)
        gradient = objective_gradient(objective, model, x, y)
        expected = sum((g * t).sum() for g, t in zip(gradient, tangents.values(), strict=True))
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("model_name", RANDOM)
def test_finite_differences_draw_the_same_numbers_inside_a_transform(model_name: str, scheme: str) -> None:
    model, (x, y) = _random_model(model_name), make_batch()
    terms = {"e": Term(EdgeAlignmentPenalty(sigma=0.6), 0.5), "p": Term(two_points)}
    difference = FiniteDifference(0.1, Linf(0.1), scheme)
    objective = PenalizedLoss(per_sample_cross_entropy, terms, differentiation=difference)
    torch.manual_seed(0)
    found = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    torch.manual_seed(0)
    assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-11


def test_a_drawn_class_inside_grad_is_the_eager_one() -> None:
    model, (x, y) = make_model("conv"), make_batch(20)
    objective = PenalizedLoss(terms={"e": Term(EdgeAlignmentPenalty(sigma=0.6))})
    torch.manual_seed(0)
    found = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    torch.manual_seed(0)
    assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-12


def test_classes_may_be_drawn_inside_vmap() -> None:
    model, (x, y) = make_model("conv"), make_batch(64)
    drawn = vmap(lambda x: sampled_class(1.0)(model(x[None]), y[:1]), randomness="different")(x).squeeze(1)
    assert drawn.unique().numel() > 1


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4), L1(2.0)])
def test_functions_of_a_gradient_under_vmap_and_jvp(threat: object) -> None:
    x, _ = make_batch()
    g = torch.randn_like(x)
    functions = {
        "grad_norm": lambda g: grad_norm(g, threat),
        "maximizer": threat.maximizer,
        "project": threat.project,
        "norm": threat.norm,
        "edge_alignment": lambda g: edge_alignment(g, x[: len(g)], sigma=0.6),
    }
    for name, function in functions.items():
        one_by_one = torch.stack([function(g[i : i + 1])[0] for i in range(len(g))])
        if name != "edge_alignment":
            mapped = vmap(lambda g, function=function: function(g[None])[0])(g)
            assert torch.allclose(mapped, one_by_one, rtol=1e-12), name
        tangent = torch.randn_like(g)
        _, forward = jvp(function, (g,), (tangent,))
        step = 1e-6
        difference = (function(g + step * tangent) - function(g - step * tangent)) / (2 * step)
        assert torch.allclose(forward, difference, rtol=1e-4, atol=1e-7), name


def test_input_gradient_of_under_vmap_and_jvp() -> None:
    model, (x, y) = make_model("conv"), make_batch()

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return input_gradient_of(lambda z: per_sample_cross_entropy(model(z), y), x)[0]

    mapped = vmap(lambda x, y: gradient(x[None], y[None])[0])(x, y)
    assert relative_error(mapped, gradient(x, y).detach()) < 1e-12
    tangent = torch.randn_like(x)
    _, product = jvp(lambda x: gradient(x, y), (x,), (tangent,))  # a Hessian-vector product, forward over reverse
    difference = (gradient(x + 1e-5 * tangent, y) - gradient(x - 1e-5 * tangent, y)) / 2e-5
    assert relative_error(product.detach(), difference.detach()) < 1e-6

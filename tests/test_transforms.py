"""What works with what: functions of the library under torch.func transforms.

The table in docs/concepts.md has the parametrisations below as its rows and columns; its column for torch.compile is
tested in integration/compiled.py.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from gradreg import (
    L1,
    L2,
    FiniteDifference,
    Linf,
    PenalizedLoss,
    edge_alignment,
    grad_norm,
    input_gradient_of,
    sampled_class,
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


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_finite_differences_under_grad_vmap_and_jvp(scheme: str) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = make_objective("both", differentiation=FiniteDifference(0.1, Linf(0.1), scheme))
    expected = objective_gradient(objective, model, x, y)

    whole = grad(lambda p: _total(objective, model, p, x, y))(_parameters(model))
    assert relative_error(list(whole.values()), expected) < 1e-10

    of_sample = grad(lambda p, x, y: _total(objective, model, p, x[None], y[None]))
    parts = vmap(of_sample, in_dims=(None, 0, 0))(_parameters(model), x, y)
    assert relative_error([part.mean(0) for part in parts.values()], expected) < 1e-10

    tangents = {name: torch.randn_like(value) for name, value in _parameters(model).items()}
    _, slope = jvp(lambda p: _total(objective, model, p, x, y), (_parameters(model),), (tangents,))
    product = sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True))
    assert relative_error(slope, product) < 1e-9


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

"""Whole-step torch.compile without a graph break (backend aot_eager: the same tracing, no code generation).

Dynamo cannot trace the run-time checks of annotations under which the other tests run, so this file is no test of
theirs: test_compile.py runs it in a process of its own, as users have the library.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gradreg import (
    L1,
    L2,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Term,
    ThreatModel,
    edge_alignment,
    grad_norm,
    input_gradient_of,
    linear_ramp,
    sampled_class,
)

from cases import (
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


def _check(model: nn.Module, objective: PenalizedLoss) -> None:
    x, y = make_batch()
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


def test_dropout_draws_classes_and_trains() -> None:
    model, (x, y) = make_model("dropout_eval").train(), make_batch()
    terms = {"e": Term(EdgeAlignmentPenalty(sigma=0.6), 0.5, of=sampled_class(0.5))}
    objective = PenalizedLoss(per_sample_cross_entropy, terms)
    step = torch.compile(lambda x, y: objective(model, x, y).total, backend="aot_eager", fullgraph=True)
    gradient = torch.autograd.grad(step(x, y), parameters_of(model))
    assert all(torch.isfinite(g).all() for g in gradient)
    assert any(bool(g.any()) for g in gradient)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_finite_differences(scheme: str) -> None:
    _check(make_model("conv"), make_objective("both", differentiation=FiniteDifference(0.1, Linf(0.1), scheme)))


def test_half_of_the_batch_at_noisy_points_in_one_pass() -> None:
    """Other numbers are drawn than eagerly, so that what is compared is the gradient where they do not matter."""
    model, (x, y) = make_model("conv"), make_batch(4)
    same = x[:1].expand_as(x), y[:1].expand_as(y)
    options = {"noise": Linf(0.0), "fraction": 0.5, "differentiation": FiniteDifference(0.1, one_pass=True)}
    objective = make_objective("grad_norm Linf", **options)
    step = torch.compile(lambda x, y: objective(model, x, y).total, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(step(*same), parameters_of(model))
    assert relative_error(list(found), objective_gradient(objective, model, *same)) < 1e-12


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
def test_one_pass_around_a_compiled_model() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = make_objective("grad_norm Linf", differentiation=FiniteDifference(0.1, one_pass=True))
    compiled = torch.compile(model, backend="aot_eager")
    found = objective_gradient(objective, compiled, x, y)
    assert relative_error(found, objective_gradient(objective, model, x, y)) < 1e-12


def test_a_ramp_compiles_a_few_times_and_not_at_every_step() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective, counter = make_objective("both"), CompileCounter()
    step = torch.compile(lambda x, y, t: objective(model, x, y, t=t).total, backend=counter, fullgraph=True)
    totals = [step(x, y, t).item() for t in range(20)]
    assert totals == pytest.approx([objective(model, x, y, t=t).total.item() for t in range(20)])
    assert counter.frame_count <= 5


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_ramp_of_finite_differences(one_pass: bool, fraction: float) -> None:
    (x, y), model = make_batch(), make_model("conv")
    x, y = x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone()  # whichever is drawn
    objective = PenalizedLoss(
        per_sample_cross_entropy,
        {"grad_norm": Term(GradNormPenalty(Linf(0.1)), weight=linear_ramp(0.4, duration=3))},
        loss_weight=0.8,
        differentiation=FiniteDifference(1.0, one_pass=one_pass),
        fraction=fraction,
    )
    step = torch.compile(lambda x, y, t: objective(model, x, y, t=t).total, backend="aot_eager", fullgraph=True)
    for t in range(5):  # at the ramp's end half of the batch takes all of the loss at x away
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

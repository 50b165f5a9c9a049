"""How a penalty's gradient reaches the weights: exactly, and by finite differences of known order."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import (
    FGSM,
    L1,
    L2,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientPenalty,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Point,
    Term,
    ThreatModel,
    predicted_class,
    sampled_class,
    true_class,
)

from cases import make_batch, make_model, parameters_of, passes_of_a_step, per_sample_cross_entropy, relative_error


def _total_gradient(
    model: nn.Module, terms: dict[str, Term], differentiation: object, x: Tensor, y: Tensor, loss_weight: float = 0.0
) -> list[Tensor]:
    """The gradient of the total with respect to the weights."""
    objective = PenalizedLoss(per_sample_cross_entropy, terms, loss_weight=loss_weight, differentiation=differentiation)
    total = objective(model, x, y).total
    return list(torch.autograd.grad(total, parameters_of(model), allow_unused=True, materialize_grads=True))


def _penalty_gradient(model: nn.Module, term: Term, differentiation: object, x: Tensor, y: Tensor) -> list[Tensor]:
    return _total_gradient(model, {"p": term}, differentiation, x, y)


def _away(x: Tensor) -> Tensor:
    """A displacement that is the same in every call, another one for every pixel."""
    return 0.05 * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).sin().view_as(x)


def gradient_alignment(point: Point) -> Tensor:
    """How far the gradients at two points differ in direction (GradAlign)."""
    here, there = point.gradient(), point.at(point.x + _away(point.x)).gradient()
    return 1 - F.cosine_similarity(here.flatten(1), there.flatten(1), dim=1)


def curvature(point: Point) -> Tensor:
    """How much the gradient changes on a short way along itself (CURE)."""
    grad = point.gradient()
    ahead = point.at(point.x + 0.05 * grad.detach() / grad.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    return (ahead.gradient() - grad).flatten(1).square().sum(1)


def alignment_of_two_scores(point: Point) -> Tensor:
    """Of the loss and of a class, both at the point itself."""
    return (point.gradient() * point.gradient(true_class())).flatten(1).sum(1)


def slope_and_value(point: Point) -> Tensor:
    """A penalty of logits, losses and a gradient."""
    return point.gradient().flatten(1).square().sum(1) * point.losses + point.logits.square().sum(1)


TERMS = {
    "Linf": Term(GradNormPenalty(Linf(0.05))),
    "L2": Term(GradNormPenalty(L2(0.05))),
    "L1": Term(GradNormPenalty(L1(0.05))),
    "Linf per channel": Term(GradNormPenalty(Linf(torch.tensor([0.02, 0.06]).view(2, 1, 1)))),
    "Linf in bounds": Term(GradNormPenalty(Linf(0.05), bounds=(0.0, 1.0))),
    "L2 in bounds": Term(GradNormPenalty(L2(0.05), bounds=(0.0, 1.0))),
    "L2 of a logit": Term(GradNormPenalty(L2(0.05), of=predicted_class())),
    "edges of a drawn class": Term(EdgeAlignmentPenalty(sigma=0.6)),
    "edges of the true class": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class())),
    "edges of the batch": Term(EdgeAlignmentPenalty(sigma=0.6, level="batch", of=None)),
    "a function of gradient and input": Term(GradientPenalty(lambda grad, x: (grad * x).flatten(1).sum(1).square())),
    "a function of a point": Term(slope_and_value),
    "gradients at two points": Term(gradient_alignment),
    "gradients on a way": Term(curvature),
    "gradients of two scores": Term(alignment_of_two_scores),
    "of the margin": Term(lambda point: point.gradient(lambda z: z[:, 0] - z[:, 1]).flatten(1).norm(dim=1)),
}
BOTH = {
    "g": Term(GradNormPenalty(Linf(0.05)), 1.2),
    "e": Term(EdgeAlignmentPenalty(sigma=0.6), 0.5),
    "a": Term(gradient_alignment, 0.3),
}
CASES = {**{name: {"p": term} for name, term in TERMS.items()}, "several at once": BOTH}
SCHEMES = pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])


def _check_order(model: nn.Module, terms: dict[str, Term], scheme: str, order: int, steps: list[float]) -> None:
    x, y = make_batch()

    def gradient(differentiation: object) -> list[Tensor]:
        torch.manual_seed(11)  # the same classes are drawn
        return _total_gradient(model, terms, differentiation, x, y, loss_weight=0.8)

    exact = gradient(DoubleBackward())
    errors = [relative_error(gradient(FiniteDifference(step, Linf(0.05), scheme)), exact) for step in steps]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("name", CASES)
@SCHEMES
def test_finite_differences_converge_at_their_order(name: str, scheme: str, order: int) -> None:
    _check_order(make_model("conv"), CASES[name], scheme, order, [0.2, 0.1, 0.05])


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
@pytest.mark.parametrize("name", CASES)
@SCHEMES
def test_they_do_where_samples_see_each_other(name: str, scheme: str, order: int) -> None:
    """BatchNorm in training mode, where displacements of other sizes at other samples would not even converge."""
    _check_order(make_model("batch_norm_train"), CASES[name], scheme, order, [0.04, 0.02, 0.01])


def test_finite_differences_vanish_into_the_exact_gradient() -> None:
    model, (x, y) = make_model("group_norm"), make_batch()
    exact = _penalty_gradient(model, TERMS["Linf"], DoubleBackward(), x, y)
    close = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(1e-3, scheme="central"), x, y)
    assert relative_error(close, exact) < 1e-6


@pytest.mark.parametrize("differentiation", [DoubleBackward(), FiniteDifference(0.5), FiniteDifference(2.0)])
def test_the_value_is_that_of_the_penalty_whatever_the_step(differentiation: object) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(
        per_sample_cross_entropy, {"p": TERMS["L2"]}, loss_weight=0.0, differentiation=differentiation
    )
    out = objective(model, x, y)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(per_sample_cross_entropy(model(leaf), y).sum(), leaf)
    assert torch.allclose(out.penalties["p"], L2(0.05).dual_norm(grad), rtol=1e-12)
    assert torch.allclose(out.total, out.penalties["p"].mean(), rtol=1e-12)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.7)])
def test_the_displacement_has_the_size_of_the_step_along_the_maximizer(threat: ThreatModel) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    seen: list[Tensor] = []

    def spying(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return model(z)

    objective = PenalizedLoss(
        per_sample_cross_entropy, {"p": Term(GradNormPenalty(threat))}, differentiation=FiniteDifference(0.25)
    )
    objective(spying, x, y)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(per_sample_cross_entropy(model(leaf), y).sum(), leaf)
    assert len(seen) == 2
    assert torch.allclose(seen[1] - x, 0.25 * threat.maximizer(grad), atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_values_and_total_are_those_of_double_backward(name: str, scheme: str) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    outputs = []
    for how in (FiniteDifference(0.5, Linf(0.05), scheme), DoubleBackward()):
        torch.manual_seed(11)
        outputs.append(PenalizedLoss(per_sample_cross_entropy, CASES[name], differentiation=how)(model, x, y))
    found, exact = outputs
    assert torch.allclose(found.total, exact.total, rtol=1e-12)
    for term, values in exact.penalties.items():
        assert torch.allclose(found.penalties[term], values, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "gradients"), [("Linf", 1), ("edges of a drawn class", 1), ("gradients at two points", 2),
                            ("gradients of two scores", 2)])  # fmt: skip
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_each_gradient_costs_one_more_pass_or_two(name: str, gradients: int, scheme: str) -> None:
    x, y = make_batch(dtype=torch.float32)
    objective = PenalizedLoss(
        per_sample_cross_entropy, CASES[name], differentiation=FiniteDifference(0.25, Linf(0.05), scheme)
    )
    model = make_model("conv", torch.float32)
    found = passes_of_a_step(model, lambda probe: objective(probe, x, y).total.backward(), len(x))
    points = 2 if name == "gradients at two points" else 1
    more = gradients * (1 if scheme == "forward" else 2)
    assert found["forward"] == points + more
    assert found["second"] == 0
    assert found["to weights"] <= points + more


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_a_step_of_one_and_weight_one_is_training_on_the_fgsm_point(bounds: tuple[float, float] | None) -> None:
    """Because loss + (loss(x + eps sign g) - loss(x)) / 1 is the loss at the FGSM point, which bounds keep an image."""
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(
        per_sample_cross_entropy,
        {"p": Term(GradNormPenalty(Linf(0.1), bounds=bounds), weight=1.0)},
        differentiation=FiniteDifference(step=1.0),
    )
    found = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
    moved = FGSM(Linf(0.1), bounds=bounds)(model, x, y)
    expected = torch.autograd.grad(per_sample_cross_entropy(model(moved), y).mean(), parameters_of(model))
    assert relative_error(list(found), list(expected)) < 1e-12


class TestRandomness:
    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 4)).double()

    def test_all_passes_drop_the_same_units(self) -> None:
        model, (x, y) = self._model(), make_batch()
        torch.manual_seed(3)
        exact = _penalty_gradient(model, TERMS["Linf"], DoubleBackward(), x, y)
        torch.manual_seed(3)
        close = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(1e-3, scheme="central"), x, y)
        assert relative_error(close, exact) < 1e-4

    def test_the_generator_goes_on_as_after_one_pass(self) -> None:
        model, (x, y) = self._model(), make_batch()
        torch.manual_seed(3)
        model(x)
        expected = torch.rand(4)
        torch.manual_seed(3)
        _penalty_gradient(model, TERMS["Linf"], FiniteDifference(scheme="central"), x, y)
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_running_statistics_are_updated_once(scheme: str) -> None:
    model, (x, y) = make_model("batch_norm_train"), make_batch()
    twin = make_model("batch_norm_train")
    twin(x)
    _penalty_gradient(model, TERMS["Linf"], FiniteDifference(scheme=scheme), x, y)
    for (name, found), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
def test_batch_norm_in_training_mode_is_differentiated_through() -> None:
    model, (x, y) = make_model("batch_norm_train"), make_batch()
    exact = _penalty_gradient(model, TERMS["Linf"], DoubleBackward(), x, y)
    close = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(1e-3, scheme="central"), x, y)
    assert relative_error(close, exact) < 1e-5


def test_a_sample_without_a_gradient_contributes_nothing() -> None:
    model, (x, y) = make_model("conv"), make_batch()

    def half(z: Tensor) -> Tensor:
        mask = torch.ones(len(z), 1, dtype=z.dtype)
        mask[0] = 0
        return model(z) * mask

    found = _penalty_gradient_of(half, model, x, y)
    expected = _penalty_gradient_of(model, model, x[1:], y[1:])
    assert relative_error(found, [grad * 4 / 5 for grad in expected]) < 1e-10


def _penalty_gradient_of(function: object, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    objective = PenalizedLoss(
        per_sample_cross_entropy, {"p": TERMS["Linf"]}, loss_weight=0.0, differentiation=FiniteDifference()
    )
    return list(torch.autograd.grad(objective(function, x, y).total, parameters_of(model), materialize_grads=True))


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_step(self) -> None:
        for step in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="step"):
                FiniteDifference(step)

    def test_scheme(self) -> None:
        with pytest.raises(ValueError, match="scheme"):
            FiniteDifference(scheme="backward")

    def test_no_unit(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match="unit"):
            _penalty_gradient(model, TERMS["edges of a drawn class"], FiniteDifference(), x, y)

    @pytest.mark.parametrize("name", ["edges of the true class", "gradients at two points"])
    def test_radius_zero_where_the_penalty_moves(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        threat = Linf(torch.tensor([0.0, 0.1]).view(2, 1, 1))
        with pytest.raises(ValueError, match="eps is 0"):
            _penalty_gradient(model, TERMS[name], FiniteDifference(threat=threat), x, y)

    def test_half_precision(self) -> None:
        model, (x, y) = make_model("conv", torch.bfloat16), make_batch(dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="float32"):
            _penalty_gradient(model, TERMS["Linf"], FiniteDifference(), x, y)


class TestUnit:
    def test_is_that_of_the_difference(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        own = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(0.5, threat=Linf(0.025)), x, y)
        half = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(0.25), x, y)
        assert relative_error(own, half) < 1e-11

    def test_or_that_of_the_first_penalty_that_has_one(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        terms = {"e": TERMS["edges of the true class"], "g": TERMS["L2"], "h": TERMS["Linf"]}
        found = _total_gradient(model, terms, FiniteDifference(0.5), x, y)
        expected = _total_gradient(model, terms, FiniteDifference(0.5, threat=L2(0.05)), x, y)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_may_be_given_with_a_function_of_gradient_and_input(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()

        def flatness(grad: Tensor, x: Tensor) -> Tensor:
            return grad.square().flatten(1).sum(1)

        found = _penalty_gradient(model, Term(GradientPenalty(flatness, threat=L2(0.1))), FiniteDifference(), x, y)
        unit = FiniteDifference(threat=L2(0.1))
        expected = _penalty_gradient(model, Term(GradientPenalty(flatness)), unit, x, y)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_radii_of_the_samples_measure_the_largest_move(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        seen: list[Tensor] = []
        radii = torch.linspace(0.01, 0.1, 5, dtype=x.dtype).view(5, 1, 1, 1)
        terms = {"p": TERMS["gradients of two scores"]}

        def spying(z: Tensor) -> Tensor:
            seen.append(z.detach().clone())
            return model(z)

        difference = FiniteDifference(0.5, threat=L2(radii))
        PenalizedLoss(per_sample_cross_entropy, terms, differentiation=difference)(spying, x, y)
        assert len(seen) == 3
        for moved in seen[1:]:
            assert L2(radii).norm(moved - x).max().item() == pytest.approx(0.5)


def test_equal_scores_share_one_difference() -> None:
    """Of two penalties of one gradient, the step goes along the sum of both directions."""
    model, (x, y) = make_model("conv"), make_batch()
    calls: list[Tensor] = []

    def spying(z: Tensor) -> Tensor:
        calls.append(z)
        return model(z)

    terms = {"a": TERMS["Linf"], "b": TERMS["L2"], "c": Term(GradNormPenalty(L1(0.05), of=true_class()))}
    PenalizedLoss(per_sample_cross_entropy, terms, differentiation=FiniteDifference())(spying, x, y)
    assert len(calls) == 1 + 2


@pytest.mark.parametrize("make", [lambda: sampled_class(0.5), lambda: sampled_class(5.0)])
def test_a_drawn_class_is_that_of_all_points(make: Callable[[], sampled_class]) -> None:
    """At the displaced point the class is not drawn anew, nor at another point of a penalty."""
    model, (x, y) = make_model("conv"), make_batch(30)

    def two_points(point: Point) -> Tensor:
        there = point.at(point.x + _away(point.x))
        return (point.gradient(make()) - there.gradient(make())).flatten(1).square().sum(1)

    gradients = []
    for how in (FiniteDifference(1e-3, Linf(0.05), "central"), DoubleBackward()):
        torch.manual_seed(11)
        gradients.append(_penalty_gradient(model, Term(two_points), how, x, y))
    assert relative_error(*gradients) < 1e-5

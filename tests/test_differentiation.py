"""How a penalty's gradient reaches the weights: exactly, and by finite differences of known order."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gradreg import (
    FGSM,
    L1,
    L2,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Term,
    ThreatModel,
    true_class,
)

from cases import make_batch, make_model, parameters_of, per_sample_cross_entropy, relative_error


def _penalty_gradient(model: nn.Module, term: Term, differentiation: object, x: Tensor, y: Tensor) -> list[Tensor]:
    objective = PenalizedLoss(per_sample_cross_entropy, {"p": term}, loss_weight=0.0, differentiation=differentiation)
    return list(
        torch.autograd.grad(
            objective(model, x, y).total, parameters_of(model), allow_unused=True, materialize_grads=True
        )
    )


TERMS = {
    "Linf": Term(GradNormPenalty(Linf(0.05))),
    "L2": Term(GradNormPenalty(L2(0.05))),
    "L1": Term(GradNormPenalty(L1(0.05))),
    "Linf per channel": Term(GradNormPenalty(Linf(torch.tensor([0.02, 0.06]).view(2, 1, 1)))),
    "Linf in bounds": Term(GradNormPenalty(Linf(0.05), bounds=(0.0, 1.0))),
    "L2 in bounds": Term(GradNormPenalty(L2(0.05), bounds=(0.0, 1.0))),
    "edges of a logit": Term(EdgeAlignmentPenalty(sigma=0.6), of=true_class()),
    "a plain function": Term(lambda grad, x: (grad * x).flatten(1).sum(1).square()),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
def test_finite_differences_converge_at_their_order(name: str, scheme: str, order: int) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    exact = _penalty_gradient(model, TERMS[name], DoubleBackward(), x, y)
    steps = [0.2, 0.1, 0.05]
    errors = [
        relative_error(_penalty_gradient(model, TERMS[name], FiniteDifference(step, Linf(0.05), scheme), x, y), exact)
        for step in steps
    ]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


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


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (0.45, 0.55)])
def test_a_step_of_one_and_weight_one_is_training_on_the_fgsm_point(
    bounds: tuple[float, float] | None, one_pass: bool
) -> None:
    """Because loss + (loss(x + eps sign g) - loss(x)) / 1 is the loss at the FGSM point, which bounds keep an image."""
    model, (x, y) = make_model("conv"), make_batch()
    if bounds == (0.45, 0.55):  # nowhere is there room for all of a step
        x = 0.5 + 0.04 * (x - 0.5)
    objective = PenalizedLoss(
        per_sample_cross_entropy,
        {"p": Term(GradNormPenalty(Linf(0.1), bounds=bounds), weight=1.0)},
        differentiation=FiniteDifference(step=1.0, one_pass=one_pass),
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
            with pytest.raises(ValueError, match="fraction of eps"):
                FiniteDifference(step)

    def test_scheme(self) -> None:
        with pytest.raises(ValueError, match='"forward" or "central"'):
            FiniteDifference(scheme="backward")

    def test_no_unit(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match=r"threat=Linf\(4 / 255\)"):
            _penalty_gradient(model, Term(EdgeAlignmentPenalty(sigma=0.6)), FiniteDifference(), x, y)

    def test_radius_zero_where_the_penalty_moves(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        threat = Linf(torch.tensor([0.0, 0.1]).view(2, 1, 1))
        with pytest.raises(ValueError, match="eps is 0"):
            _penalty_gradient(model, TERMS["edges of a logit"], FiniteDifference(threat=threat), x, y)

    def test_half_precision(self) -> None:
        model, (x, y) = make_model("conv", torch.bfloat16), make_batch(dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="Keep x in float32"):
            _penalty_gradient(model, TERMS["Linf"], FiniteDifference(), x, y)

    def test_dropout_in_a_transform(self) -> None:
        model, (x, y) = make_model("dropout_eval").train(), make_batch()
        objective = PenalizedLoss(per_sample_cross_entropy, {"p": TERMS["Linf"]}, differentiation=FiniteDifference())
        with pytest.raises(RuntimeError, match="same dropout masks"):
            torch.func.grad(lambda z: objective(model, z, y).total)(x)


def test_a_penalty_with_a_threat_of_its_own_keeps_it() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    plain = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(0.5), x, y)
    other = _penalty_gradient(model, TERMS["Linf"], FiniteDifference(0.5, threat=Linf(1e-3)), x, y)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))

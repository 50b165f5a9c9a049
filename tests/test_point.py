"""A point: what is computed at it, how often, and what it shares with other points of its batch."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

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
    input_gradient,
    predicted_class,
    sampled_class,
    true_class,
)
from gradreg.differentiation import InputOnly

from cases import make_batch, make_model, parameters_of, relative_error


def _point(name: str = "conv", size: int = 5, **options: Any) -> Point:
    return Point(make_model(name), cross_entropy, *make_batch(size), **options)


class _Passes:
    """Counts forward passes of a model, and backward passes through its last layer."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        model.register_forward_hook(lambda *_: self.counts.update(["forward"]))
        model[-1].register_full_backward_hook(lambda *_: self.counts.update(["backward"]))


class TestValues:
    def test_are_those_of_the_model(self) -> None:
        point = _point()
        model, y = point.batch.model, point.batch.y
        leaf = point.x.clone().requires_grad_()
        logits = model(leaf)
        losses = cross_entropy(logits, y)
        assert torch.equal(point.logits, logits)
        assert torch.equal(point.losses, losses)
        assert torch.equal(point.score(), losses)
        assert torch.equal(point.gradient(), input_gradient(losses, leaf))
        assert torch.equal(point.score(true_class()), logits.gather(1, y[:, None]).squeeze(1))
        assert torch.equal(point.gradient(true_class()), input_gradient(point.score(true_class()), point.leaf))

    def test_of_any_function_of_the_logits(self) -> None:
        point = _point()
        leaf = point.x.clone().requires_grad_()
        spread = point.batch.model(leaf).var(1)
        assert torch.allclose(point.gradient(lambda logits: logits.var(1)), input_gradient(spread, leaf), rtol=1e-12)

    def test_each_is_computed_when_it_is_asked_for_and_once(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        passes = _Passes(model)
        point = Point(model, cross_entropy, x, y)
        assert not passes.counts
        _ = point.logits, point.losses, point.logits
        assert passes.counts == {"forward": 1}
        _ = point.gradient(), point.gradient(), point.gradient(None)
        assert passes.counts == {"forward": 1, "backward": 1}
        of = sampled_class(2.0)
        assert point.gradient(of) is point.gradient(sampled_class(2.0))
        assert passes.counts == {"forward": 1, "backward": 2}

    def test_a_class_is_chosen_once_for_all_points(self) -> None:
        point = _point(size=64)
        there = point.at(1 - point.x)
        of = sampled_class(50.0)
        chosen = point.score(of)
        rows = torch.arange(64)
        classes = torch.isclose(point.logits, chosen[:, None]).double().argmax(1)
        assert torch.equal(there.score(of), there.logits[rows, classes])
        assert not torch.equal(classes, point.logits.argmax(1))

    @pytest.mark.parametrize(("how", "has_graph"), [(DoubleBackward(), True), (InputOnly(), False)])
    def test_the_gradient_depends_on_the_weights_as_the_differentiation_says(self, how: Any, has_graph: bool) -> None:
        assert _point(differentiation=how).gradient().requires_grad is has_graph

    def test_a_penalty_works_without_an_objective(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        point = Point(model, cross_entropy, x, y)
        total = point.losses.mean() + 1.2 * GradNormPenalty(Linf(0.1))(point).mean()
        objective = PenalizedLoss(terms={"p": Term(GradNormPenalty(Linf(0.1)), 1.2)})
        expected = torch.autograd.grad(objective(model, x, y).total, parameters_of(model))
        assert relative_error(list(torch.autograd.grad(total, parameters_of(model))), list(expected)) < 1e-12

    def test_works_inside_a_transform(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()

        def total(parameters: dict[str, Tensor]) -> Tensor:
            point = Point(lambda z: functional_call(model, parameters, (z,)), cross_entropy, x, y)
            there = point.at(x + 0.1 * point.gradient().sign())
            return GradNormPenalty(Linf(0.1))(point).mean() + there.losses.mean() + there.gradient().square().mean()

        found = grad(total)({name: value.detach() for name, value in model.named_parameters()})
        point = Point(model, cross_entropy, x, y)
        there = point.at(x + 0.1 * point.gradient().sign())
        expected = GradNormPenalty(Linf(0.1))(point).mean() + there.losses.mean() + there.gradient().square().mean()
        slopes = torch.autograd.grad(expected, parameters_of(model))
        assert relative_error(list(found.values()), list(slopes)) < 1e-12

    def test_a_finite_difference_without_an_objective_is_refused(self) -> None:
        with pytest.raises(ValueError, match="PenalizedLoss"):
            _point(differentiation=FiniteDifference())

    def test_a_gradient_of_zero_is_named(self) -> None:
        x, y = make_batch()
        point = Point(lambda z: make_model("conv")(z.round()), cross_entropy, x, y)
        with pytest.warns(UserWarning, match="exactly 0"):
            point.gradient()
        quiet = Point(lambda z: make_model("conv")(z.round()), cross_entropy, x, y, look=False)
        assert not quiet.gradient().any()


class TestOtherPoints:
    def test_at_another_input_it_is_the_same_function(self) -> None:
        point = _point("dropout_eval")
        point.batch.model.train()
        z = 1 - point.x
        assert torch.equal(point.at(point.x).logits, point.logits)
        assert torch.equal(point.at(z).logits, point.at(z).logits)

    def test_another_input_is_a_constant(self) -> None:
        point = _point()
        there = point.at(point.x + 0.1 * point.gradient())
        assert not there.x.requires_grad
        assert there.losses.requires_grad

    def test_some_samples_are_a_batch_of_their_own(self) -> None:
        point, rows = _point(size=6), torch.tensor([4, 1])
        part = point.rows(rows)
        assert torch.allclose(part.losses, point.losses[rows], rtol=1e-12)
        assert torch.allclose(part.gradient(), point.gradient()[rows], rtol=1e-12)

    def test_running_statistics_move_at_the_step_s_own_point_alone(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        point = Point(model, cross_entropy, x, y)
        _ = point.at(1 - x).losses, point.rows(torch.tensor([0, 1])).losses
        assert norm.num_batches_tracked == 0
        _ = point.losses
        assert norm.num_batches_tracked == 1
        _ = point.at(1 - x).losses
        assert norm.num_batches_tracked == 1


class TestWhereTheLossIsTaken:
    def test_at_the_input_itself(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        out = PenalizedLoss()(model, x, y)
        assert torch.equal(out.x, x)
        assert out.clean_logits is out.logits
        assert torch.equal(out.total, cross_entropy(model(x), y).mean())

    @pytest.mark.parametrize(
        "at", [Noise(Linf(0.1)), NFGSM(Linf(0.1), share=0.5), NFGSM(Linf(0.1)), PGDAttack(Linf(0.1), steps=2)]
    )
    def test_at_another_place_the_clean_logits_are_unknown(self, at: Any) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        out = PenalizedLoss(at=at)(model, x, y)
        assert out.clean_logits is None
        assert not torch.equal(out.x, x)
        assert torch.allclose(out.logits, model(out.x), rtol=1e-12)
        assert torch.allclose(out.loss, cross_entropy(model(out.x), y).mean(), rtol=1e-12)

    def test_an_attack_from_the_input_knows_the_clean_logits(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        out = PenalizedLoss(at=FGSM(Linf(0.1)))(model, x, y)
        assert torch.equal(out.clean_logits, model(x))
        assert not out.clean_logits.requires_grad
        expected = FGSM(Linf(0.1))(model, x, y)
        assert torch.allclose(out.x, expected, rtol=1e-12)

    def test_penalties_are_taken_where_the_loss_is(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        out = PenalizedLoss(terms={"p": Term(GradNormPenalty(Linf(0.1)))}, at=FGSM(Linf(0.1)))(model, x, y)
        leaf = out.x.clone().requires_grad_()
        expected = 0.1 * input_gradient(cross_entropy(model(leaf), y), leaf).abs().flatten(1).sum(1)
        assert torch.allclose(out.penalties["p"], expected, rtol=1e-12)

    def test_the_attack_raises_the_loss_of_the_objective(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()

        def smoothed(logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits, y, reduction="none", label_smoothing=0.9)

        own = PenalizedLoss(smoothed, at=FGSM(Linf(0.1)))(model, x, y).x
        assert torch.allclose(own, FGSM(Linf(0.1), criterion=smoothed)(model, x, y), rtol=1e-12)
        other = PenalizedLoss(smoothed, at=FGSM(Linf(0.1), criterion=cross_entropy))(model, x, y).x
        assert torch.allclose(other, FGSM(Linf(0.1))(model, x, y), rtol=1e-12)
        assert not torch.equal(own, other)

    def test_an_attack_in_evaluation_mode_sees_the_network_so(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
        out = PenalizedLoss(at=FGSM(Linf(0.1), mode="eval"))(model, x, y)
        assert model.training
        evaluated = make_model("batch_norm_train")
        evaluated.load_state_dict({n: v for n, v in model.state_dict().items() if "num_batches" not in n}, strict=False)
        assert torch.isfinite(out.total)

    def test_a_validation_loss_under_no_grad(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        torch.manual_seed(0)
        expected = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))(model, x, y).total
        torch.manual_seed(0)
        with torch.no_grad():
            found = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))(model, x, y).total
        assert torch.equal(found, expected.detach())
        assert not found.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_pixels_too_far_apart_for_an_attack_are_refused(self, dtype: torch.dtype) -> None:
        x, y = make_batch()
        for at in (NFGSM(Linf(0.1), share=0.5), FGSM(Linf(0.1)), PGDAttack(Linf(0.1), steps=2), Noise(Linf(0.1))):
            with pytest.raises(TypeError, match="float32"):
                PenalizedLoss(at=at)(make_model("conv"), x.to(dtype), y)

    def test_what_is_no_place(self) -> None:
        with pytest.raises(TypeError, match="attack"):
            PenalizedLoss(at=Linf(0.1))


class TestPenaltiesOfSeveralPoints:
    def test_an_attack_from_the_input_uses_the_gradient_that_is_there(self) -> None:
        """One step from x, as in ALP or one-step TRADES: two forward passes, one gradient for the images."""

        def pairing(point: Point) -> Tensor:
            z = FGSM(Linf(0.1)).perturb(point)
            return (point.at(z, differentiable=False).logits - point.logits).square().sum(1)

        model, (x, y) = make_model("conv"), make_batch()
        objective = PenalizedLoss(terms={"norm": Term(GradNormPenalty(Linf(0.1))), "pair": Term(pairing)})
        passes = _Passes(model)
        total = objective(model, x, y).total
        assert passes.counts == {"forward": 2, "backward": 1}
        found = torch.autograd.grad(total, parameters_of(model))

        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        losses = cross_entropy(logits, y)
        slope = input_gradient(losses, leaf)
        z = (x + 0.1 * slope.detach().sign()).clamp(0, 1)
        pairs = (model(z) - logits).square().sum(1).mean()
        expected = losses.mean() + pairs + 0.1 * slope.abs().flatten(1).sum(1).mean()
        assert relative_error(list(found), list(torch.autograd.grad(expected, parameters_of(model)))) < 1e-12

    @pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
    def test_finite_differences_converge_for_gradients_at_two_points(self, scheme: Any, order: int) -> None:
        """GradAlign (Andriushchenko & Flammarion 2020) and CURE (Moosavi-Dezfooli et al. 2019) at once."""

        def align(point: Point) -> Tensor:
            there = point.at(point.x + 0.05 * torch.ones_like(point.x))
            return 1 - F.cosine_similarity(point.gradient().flatten(1), there.gradient().flatten(1))

        def curvature(point: Point) -> Tensor:
            there = point.at(point.x + 0.05 * point.gradient().detach().sign())
            return (there.gradient() - point.gradient()).flatten(1).square().sum(1)

        model, (x, y) = make_model("group_norm"), make_batch()
        terms = {"align": Term(align, 0.5), "curve": Term(curvature, 2.0), "edges": Term(lambda p: align(p) ** 2, 0.3)}

        def gradient(how: Any) -> list[Tensor]:
            total = PenalizedLoss(terms=terms, differentiation=how)(model, x, y).total
            return list(torch.autograd.grad(total, parameters_of(model)))

        exact = gradient(DoubleBackward())
        errors = [relative_error(gradient(FiniteDifference(s, Linf(0.1), scheme)), exact) for s in (0.02, 0.01)]
        assert errors[1] < 0.02
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)

    def test_predicted_and_given_classes(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = PenalizedLoss(terms={"p": Term(GradNormPenalty(Linf(0.1), of=predicted_class()))})
        given = objective(model, x, y, classes=model(x).argmax(1))
        assert torch.equal(given.total, objective(model, x, y).total)

"""What is left out to save time: nothing on average, or as much as the documentation says; and what one pass saves."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradreg import (
    L1,
    L2,
    NFGSM,
    Differentiation,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Term,
    ThreatModel,
    every,
    linear_ramp,
    true_class,
)

import passes
from cases import (
    MODELS,
    make_batch,
    make_model,
    objective_gradient,
    parameters_of,
    per_sample_cross_entropy,
    relative_error,
)


class _Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


GRAD_NORM = {"p": Term(GradNormPenalty(Linf(0.1)), weight=1.2)}
EDGES = {"p": Term(EdgeAlignmentPenalty(sigma=0.6), weight=0.5, of=true_class())}
DIFFERENTIATIONS = [DoubleBackward(), FiniteDifference(0.5), FiniteDifference(0.5, one_pass=True)]


def _objective(terms: dict[str, Term] = GRAD_NORM, **options: object) -> PenalizedLoss:
    return PenalizedLoss(per_sample_cross_entropy, terms, loss_weight=0.8, **options)


class TestFraction:
    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_the_average_over_all_draws_is_the_gradient_of_the_whole_batch(
        self, differentiation: Differentiation
    ) -> None:
        """Two of four samples can be drawn in six ways, all as likely: each is waited for once."""
        model, (x, y) = make_model("conv"), make_batch(4)
        half = _objective(differentiation=differentiation, fraction=0.5)
        gradients: dict[tuple[float, ...], list[Tensor]] = {}
        for seed in range(100):
            torch.manual_seed(seed)
            out = half(model, x, y)
            drawn = tuple(sorted(round(value, 9) for value in out.penalties["p"].tolist()))
            gradients[drawn] = list(torch.autograd.grad(out.total, parameters_of(model)))
        assert len(gradients) == 6
        average = [sum(parts) / 6 for parts in zip(*gradients.values(), strict=True)]
        whole = objective_gradient(_objective(differentiation=differentiation), model, x, y)
        assert relative_error(average, whole) < 1e-12

    def test_every_way_to_draw_is_as_likely(self) -> None:
        """A chi-squared statistic of 600 draws with 5 degrees of freedom: above 20.5 once in a thousand."""
        model, (x, y) = make_model("mlp"), make_batch(4)
        objective = _objective(fraction=0.5)
        torch.manual_seed(0)
        counts: dict[tuple[float, ...], int] = {}
        for _ in range(600):
            drawn = tuple(sorted(round(v, 9) for v in objective(model, x, y).penalties["p"].tolist()))
            counts[drawn] = counts.get(drawn, 0) + 1
        assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5

    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_loss_and_logits_are_those_of_the_whole_batch_in_its_order(self, differentiation: Differentiation) -> None:
        model, (x, y) = make_model("conv"), make_batch(7)
        out = _objective(differentiation=differentiation, fraction=0.4)(model, x, y)
        assert torch.allclose(out.logits, model(x), rtol=1e-12)
        assert torch.allclose(out.loss, per_sample_cross_entropy(model(x), y).mean(), rtol=1e-12)
        assert out.penalties["p"].shape == (3,)

    def test_given_classes_follow_their_samples(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        classes = (y + 1) % 4
        of_all = _objective(EDGES)(model, x, y, classes=classes).penalties["p"].tolist()
        drawn = _objective(EDGES, fraction=0.5)(model, x, y, classes=classes).penalties["p"].tolist()
        assert all(min(abs(value - other) for other in of_all) < 1e-12 for value in drawn)

    def test_at_least_one_sample_is_drawn(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(3)
        assert _objective(fraction=0.01)(model, x, y).penalties["p"].shape == (1,)

    def test_a_fraction_that_rounds_to_all_is_all(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(3)
        state = torch.get_rng_state()
        found = objective_gradient(_objective(fraction=0.9), model, x, y)
        assert relative_error(found, objective_gradient(_objective(), model, x, y)) == 0
        assert torch.equal(torch.get_rng_state(), state)

    def test_costs_nothing_where_no_term_has_a_weight(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch(4)
        batches: list[int] = []
        model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        terms = {"p": Term(GradNormPenalty(Linf(0.1)), weight=linear_ramp(1.0, duration=10))}
        _objective(terms, fraction=0.5)(model, x, y, t=0)
        assert batches == [4]

    def test_works_in_a_transform(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(4)
        objective = _objective(fraction=0.5)
        torch.manual_seed(3)
        eager = objective_gradient(objective, model, x, y)
        torch.manual_seed(3)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        found = grad(lambda p: objective(lambda z: functional_call(model, p, (z,)), x, y).total)(parameters)
        assert relative_error(list(found.values()), eager) < 1e-12

    @pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
    def test_batch_statistics_are_refused(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch(4)
        with pytest.raises(RuntimeError, match="a part of the batch is another function of each"):
            _objective(fraction=0.5)(model, x, y)
        _objective(fraction=0.5)(model.eval(), x, y).total.backward()

    @pytest.mark.parametrize("name", ["functional dropout", "drop path of another name", "noise", "module"])
    def test_random_numbers_of_any_kind_are_the_same_in_both_passes(self, name: str) -> None:
        """Other masks in the second pass would give a difference of two functions, not of two points."""
        act: Callable[[Tensor], Tensor] = {
            "functional dropout": lambda h: F.dropout(h, 0.5),
            "drop path of another name": lambda h: h * torch.rand(len(h), 1, dtype=h.dtype).round(),
            "noise": lambda h: h + torch.randn_like(h),
            "module": nn.Dropout(0.5),
        }[name]

        class Chancy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(72, 16), nn.Linear(16, 16), nn.Linear(16, 4)])

            def forward(self, x: Tensor) -> Tensor:
                h = act(F.gelu(self.layers[0](x.flatten(1))))
                return self.layers[2](act(F.gelu(self.layers[1](h))))

        torch.manual_seed(0)
        model, (x, y) = Chancy().double(), make_batch(6)
        gradients = []
        for differentiation in (FiniteDifference(1e-3, scheme="central"), DoubleBackward()):
            torch.manual_seed(1)
            objective = PenalizedLoss(
                per_sample_cross_entropy, GRAD_NORM, loss_weight=0.0, differentiation=differentiation, fraction=0.5
            )
            gradients.append(objective_gradient(objective, model, x, y))
        assert relative_error(*gradients) < 1e-4

    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_a_wrong_label_is_found_whether_drawn_or_not(self, differentiation: Differentiation) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        y[0] = -100
        for seed in range(6):
            torch.manual_seed(seed)
            with pytest.raises(ValueError, match="-100"):
                _objective(differentiation=differentiation, fraction=0.34)(model, x, y)

    def test_a_radius_for_each_sample_is_refused(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        terms = {"p": Term(GradNormPenalty(Linf(torch.full((6, 1, 1, 1), 0.1, dtype=x.dtype))))}
        with pytest.raises(ValueError, match="a radius for each sample"):
            _objective(terms, fraction=0.5)(model, x, y)

    @pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
    def test_must_be_a_share(self, fraction: float) -> None:
        with pytest.raises(ValueError, match=r"share of the batch that is penalised, in \(0, 1\]"):
            _objective(fraction=fraction)


class TestNoise:
    @pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3), L1(0.5)])
    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_the_objective_is_taken_at_one_point_of_the_ball(
        self, threat: ThreatModel, differentiation: Differentiation
    ) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        torch.manual_seed(0)
        found = objective_gradient(_objective(differentiation=differentiation, noise=threat), model, x, y)
        start = seen[0]
        assert (start != x).all(1).any()
        assert (threat.norm(start - x) <= 1 + 1e-9).all()
        expected = objective_gradient(_objective(differentiation=differentiation), model, start, y)
        assert relative_error(found, expected) < 1e-12

    def test_of_a_function_linear_in_x_changes_no_penalty(self) -> None:
        """Its input gradient is the same everywhere."""
        linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
        x, y = make_batch()
        terms = {"p": Term(GradNormPenalty(L2(0.4)))}

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            return logits.gather(1, labels[:, None]).squeeze(1)

        noisy = PenalizedLoss(criterion, terms, noise=Linf(0.3))(linear, x, y).penalties["p"]
        assert torch.allclose(noisy, PenalizedLoss(criterion, terms)(linear, x, y).penalties["p"], rtol=1e-12)

    def test_bias_of_a_quadratic_loss_is_half_the_trace_times_the_variance(self) -> None:
        """E l(x + n) - l(x) = tr(H) eps^2 / 6 for n uniform in [-eps, eps]; the Hessian here is the identity."""
        x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        objective = PenalizedLoss(lambda z, _: 0.5 * z.square().sum(1), {}, noise=Linf(0.6))
        torch.manual_seed(1)
        rise = objective(lambda z: z, x, torch.zeros(len(x), dtype=torch.long)).loss - 0.5 * x.square().sum(1).mean()
        # The rise of one sample has variance eps^2 |x|^2 / 3 at most about 1, so that three errors of its mean are .02.
        assert rise.item() == pytest.approx(8 * 0.6**2 / 6, abs=0.025)

    @pytest.mark.parametrize("options", [{"noise": Linf(0.1)}, {"fraction": 0.5}, {}])
    def test_an_input_that_requires_grad_is_welcome(self, options: dict[str, object]) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        torch.manual_seed(0)
        expected = _objective(**options)(model, x, y).total
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        total = _objective(**options)(model, leaf, y).total
        total.backward()
        assert torch.equal(total, expected)
        assert leaf.grad is None

    def test_is_drawn_anew_and_follows_the_seed(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(noise=Linf(0.1))
        torch.manual_seed(0)
        first, second = objective(model, x, y).total, objective(model, x, y).total
        torch.manual_seed(0)
        assert torch.equal(objective(model, x, y).total, first)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
    def test_with_a_full_step_and_equal_weights_is_n_fgsm(self, bounds: tuple[float, float] | None) -> None:
        """(1 - 1) loss(x + n) + loss(x + n + eps sign g): de Jorge et al. 2022; with bounds, their clipping too."""
        model, (x, y) = make_model("conv"), make_batch()
        torch.manual_seed(0)
        objective = PenalizedLoss(
            per_sample_cross_entropy,
            {"p": Term(GradNormPenalty(Linf(0.1), bounds=bounds), weight=1.0)},
            differentiation=FiniteDifference(1.0, one_pass=True),
            noise=Linf(0.1),
        )
        found = objective_gradient(objective, model, x, y)
        torch.manual_seed(0)
        x_adv = NFGSM(Linf(0.1), noise=1.0, bounds=bounds)(model, x, y)
        expected = torch.autograd.grad(per_sample_cross_entropy(model(x_adv), y).mean(), parameters_of(model))
        assert relative_error(found, list(expected)) < 1e-11

    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_every_point_lies_in_the_bounds_of_the_penalties(self, differentiation: Differentiation) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        terms = {"p": Term(GradNormPenalty(Linf(0.3), bounds=(torch.zeros(2, 1, 1), torch.ones(2, 1, 1))))}
        _objective(terms, noise=Linf(0.3), differentiation=differentiation, fraction=0.5)(model, x.round(), y)
        assert all(((z >= 0) & (z <= 1)).all() for z in seen)
        assert any(((z > 0) & (z < 1)).any() for z in seen)

    def test_inputs_in_another_unit_than_the_bounds_are_refused(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        terms = {"p": Term(GradNormPenalty(Linf(0.1), bounds=(0.0, 1.0)))}
        with pytest.raises(ValueError, match="in another unit"):
            _objective(terms)(model, 4 * x - 2, y)
        narrow = {"p": Term(GradNormPenalty(Linf(0.9), bounds=(0.25, 0.75)))}
        with pytest.raises(ValueError, match=r"exceeds the whole pixel range of 0\.5"):
            _objective(narrow)(model, x, y)

    @pytest.mark.parametrize(("bounds", "span"), [(None, "1:"), ((0.0, 1.0), "1:"), ((0.0, 0.5), r"0\.5:")])
    def test_noise_in_another_unit_is_refused(self, bounds: tuple[float, float] | None, span: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        terms = {"p": Term(GradNormPenalty(Linf(0.1), bounds=bounds))}
        with pytest.raises(ValueError, match=f"eps=8 exceeds the whole pixel range of {span}"):
            _objective(terms, noise=Linf(8.0))(model, x / 2, y)

    def test_penalties_of_other_bounds_are_refused(self) -> None:
        terms = {name: Term(GradNormPenalty(Linf(0.1), bounds=(0.0, high))) for name, high in (("p", 1.0), ("q", 2.0))}
        with pytest.raises(ValueError, match="can be clamped to one range"):
            _objective(terms, noise=Linf(0.1))
        assert _objective(terms).noise is None

    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_ball(self) -> None:
        with pytest.raises(TypeError, match="noise is a ball to draw from, such as"):
            _objective(noise=0.1)


class TestEvery:
    def test_k_steps_have_the_gradient_of_k_steps(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        terms = {"p": Term(GradNormPenalty(Linf(0.1)), weight=every(3, 1.2))}
        of_steps = [
            torch.autograd.grad(_objective(terms)(model, x, y, t=t).total, parameters_of(model)) for t in range(3)
        ]
        average = [sum(parts) / 3 for parts in zip(*of_steps, strict=True)]
        assert relative_error(average, objective_gradient(_objective(), model, x, y)) < 1e-12

    def test_the_steps_between_are_natural(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        out = _objective({"p": Term(GradNormPenalty(Linf(0.1)), weight=every(2, 1.2))})(model, x, y, t=1)
        assert out.penalties == {}
        assert torch.equal(out.total, 0.8 * out.loss)


class TestOnePass:
    @pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
    @pytest.mark.parametrize("scheme", ["forward", "central"])
    @pytest.mark.parametrize("model_name", MODELS)
    def test_has_the_gradients_of_three_passes(self, model_name: str, scheme: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        terms = {"p": Term(GradNormPenalty(Linf(0.1)), 1.2), "q": Term(GradNormPenalty(L2(0.3)), 0.7)}
        found, expected = (
            objective_gradient(
                _objective(terms, differentiation=FiniteDifference(0.5, scheme=scheme, one_pass=one_pass)),
                copy.deepcopy(model),
                x,
                y,
            )
            for one_pass in (True, False)
        )
        assert len(found) == len(expected) == 0 or relative_error(found, expected) < 1e-12

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_values_are_those_of_three_passes(self, fraction: float) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        outputs = []
        for one_pass in (True, False):
            torch.manual_seed(0)
            difference = FiniteDifference(0.5, one_pass=one_pass)
            outputs.append(_objective(differentiation=difference, fraction=fraction, noise=Linf(0.1))(model, x, y))
        for name in ("total", "loss", "logits"):
            assert torch.allclose(getattr(outputs[0], name), getattr(outputs[1], name), rtol=1e-12)
        assert torch.allclose(outputs[0].penalties["p"], outputs[1].penalties["p"], rtol=1e-12)

    @pytest.mark.parametrize(("one_pass", "count"), [(True, 2), (False, 3)])
    def test_saves_a_backward_pass(self, one_pass: bool, count: int) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        passes: list[str] = []
        model[1].register_forward_hook(lambda *_: passes.append("forward"))
        model[1].register_full_backward_hook(lambda *_: passes.append("backward"))
        _objective(differentiation=FiniteDifference(one_pass=one_pass))(model, x, y).total.backward()
        assert passes.count("forward") == 2
        assert passes.count("backward") == count

    @pytest.mark.parametrize("scheme", ["forward", "central"])
    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    @pytest.mark.parametrize("loss_weight", [0.0, 0.15, 0.3])  # a forward difference of one step takes away 0.3
    def test_has_them_where_the_loss_at_x_counts_nothing(
        self, loss_weight: float, fraction: float, scheme: str
    ) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        terms = {
            "p": Term(GradNormPenalty(Linf(0.1)), 0.1 * fraction),
            "q": Term(GradNormPenalty(L2(0.3)), 0.2 * fraction),
        }
        found = []
        for one_pass in (True, False):
            difference = FiniteDifference(1.0, scheme=scheme, one_pass=one_pass)
            objective = PenalizedLoss(
                per_sample_cross_entropy, terms, loss_weight=loss_weight, differentiation=difference, fraction=fraction
            )
            torch.manual_seed(0)
            found.append(objective_gradient(objective, model, x, y))
        assert relative_error(*found) < 1e-12

    @pytest.mark.parametrize(
        ("fraction", "weight", "to_weights"), [(1.0, 0.8, 1), (1.0, 0.4, 2), (0.5, 0.4, 1), (0.5, 0.8, 1.5)]
    )
    def test_leaves_out_the_weights_where_the_loss_at_x_counts_nothing(
        self, fraction: float, weight: float, to_weights: float
    ) -> None:
        terms = {"p": Term(GradNormPenalty(Linf(0.1)), weight)}
        objective = _objective(terms, differentiation=FiniteDifference(1.0, one_pass=True), fraction=fraction)
        x, y = make_batch(6, dtype=torch.float32)
        found = passes.count(
            make_model("conv", torch.float32), lambda model: objective(model, x, y).total.backward(), len(x)
        )
        del found["flops"]
        assert found == {"forward": 1 + fraction, "to inputs": 1 + fraction, "to weights": to_weights, "second": 0}

    @pytest.mark.parametrize("one_pass", [True, False])
    def test_frees_the_first_graph_before_the_second_forward_pass(self, one_pass: bool) -> None:
        """An activation that the graph keeps for its backward pass is alive as long as the graph needs it."""
        model, (x, y) = make_model("conv"), make_batch()
        activations: list[weakref.ref[Tensor]] = []
        alive: list[bool] = []
        model.register_forward_pre_hook(lambda *_: alive.extend(ref() is not None for ref in activations))
        model[0].register_forward_hook(lambda *inout: activations.append(weakref.ref(inout[-1])))
        _objective(differentiation=FiniteDifference(one_pass=one_pass))(model, x, y)
        assert alive == [not one_pass]

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_only_the_total_carries_a_gradient(self, fraction: float) -> None:
        model, (x, y) = make_model("conv"), make_batch(4)
        out = _objective(differentiation=FiniteDifference(one_pass=True), fraction=fraction)(model, x, y)
        assert out.total.requires_grad
        assert not any(tensor.requires_grad for tensor in (out.loss, out.logits, out.penalties["p"]))

    def test_can_be_scaled_and_gone_through_twice(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(differentiation=FiniteDifference(one_pass=True))
        expected = objective_gradient(objective, model, x, y)
        total = objective(model, x, y).total
        (3 * total).backward(retain_graph=True)
        total.backward()
        assert relative_error([parameter.grad for parameter in model.parameters()], [4 * g for g in expected]) < 1e-12

    def test_frozen_parameters_stay_without_a_gradient(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        model[0].weight.requires_grad_(False)
        one, three = (
            objective_gradient(_objective(differentiation=FiniteDifference(one_pass=p)), model, x, y)
            for p in (True, False)
        )
        assert relative_error(one, three) < 1e-12
        _objective(differentiation=FiniteDifference(one_pass=True))(model, x, y).total.backward()
        assert model[0].weight.grad is None

    def test_a_criterion_with_parameters_is_trained(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

            def forward(self, logits: Tensor, y: Tensor) -> Tensor:
                return per_sample_cross_entropy(self.scale * logits, y)

        model, (x, y), criterion = make_model("conv"), make_batch(), Scaled()
        gradients = []
        for one_pass in (True, False):
            difference = FiniteDifference(one_pass=one_pass)
            objective = PenalizedLoss(criterion, GRAD_NORM, differentiation=difference)
            gradients.append(torch.autograd.grad(objective(model, x, y).total, criterion.scale)[0])
        assert torch.allclose(*gradients, rtol=1e-12)

    def test_a_sample_without_a_gradient_contributes_nothing_wrong(self) -> None:
        """Its loss is constant, and its displacement 0: what the first pass takes away the second gives back."""

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = make_model("mlp")

            def forward(self, z: Tensor) -> Tensor:
                alive = torch.ones(len(z), 1, dtype=z.dtype)
                alive[0] = 0
                return self.body(z * alive.view(-1, 1, 1, 1))

        model, (x, y) = Gated(), make_batch()
        one, three = (
            objective_gradient(_objective(differentiation=FiniteDifference(one_pass=p)), model, x, y)
            for p in (True, False)
        )
        assert relative_error(one, three) < 1e-12

    @pytest.mark.parametrize("scale", [1.0, 2.0**10])
    def test_the_inner_scale_is_divided_out(self, scale: float) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        one = _objective(differentiation=FiniteDifference(one_pass=True), inner_scale=scale)
        three = _objective(differentiation=FiniteDifference())
        found = objective_gradient(one, model, x, y)
        assert relative_error(found, objective_gradient(three, model, x, y)) < 1e-12

    def test_under_autocast_is_as_close_as_three_passes(self) -> None:
        model, (x, y) = make_model("conv", torch.float32), make_batch(dtype=torch.float32)
        exact = objective_gradient(_objective(differentiation=FiniteDifference(1.0)), model, x, y)
        errors = []
        for one_pass in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                total = _objective(differentiation=FiniteDifference(1.0, one_pass=one_pass))(model, x, y).total
            errors.append(relative_error(list(torch.autograd.grad(total, parameters_of(model))), exact))
        assert errors[1] > 0
        assert errors[0] < 1.5 * errors[1] < 0.1

    def test_a_parameter_whose_gradient_is_undefined_is_left_out(self) -> None:
        class Ignored(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, z: Tensor, scale: Tensor) -> Tensor:
                return z * scale.detach()

            @staticmethod
            def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
                return grad, None

        class Quantiser(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.scale = make_model("mlp"), nn.Parameter(torch.ones((), dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return Ignored.apply(self.body(x), self.scale)

        model, (x, y) = Quantiser(), make_batch()
        one, three = (
            torch.autograd.grad(
                _objective(differentiation=FiniteDifference(one_pass=p))(model, x, y).total,
                parameters_of(model),
                allow_unused=True,
            )
            for p in (True, False)
        )
        assert [g is None for g in one] == [g is None for g in three]
        assert relative_error([g for g in one if g is not None], [g for g in three if g is not None]) < 1e-12

    def test_a_model_that_detaches_x_is_named(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(differentiation=FiniteDifference(one_pass=True))
        with pytest.raises(RuntimeError, match="the losses do not depend on x"):
            objective(nn.Sequential(_Detach(), model), x, y)

    def test_in_a_transform_it_changes_nothing(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(differentiation=FiniteDifference(0.5, one_pass=True))
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        found = grad(lambda p: objective(lambda z: functional_call(model, p, (z,)), x, y).total)(parameters)
        assert relative_error(list(found.values()), objective_gradient(objective, model, x, y)) < 1e-12

    def test_a_second_derivative_of_the_total_is_refused(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        total = _objective(differentiation=FiniteDifference(one_pass=True))(model, x, y).total
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(total, parameters_of(model), create_graph=True)

    @pytest.mark.parametrize(
        "term",
        [
            Term(EdgeAlignmentPenalty(), of=true_class()),
            Term(GradNormPenalty(Linf(0.1)), of=true_class()),
            Term(EdgeAlignmentPenalty()),
            Term(lambda g, x: g.flatten(1).norm(dim=1)),
        ],
    )
    def test_other_penalties_are_refused(self, term: Term) -> None:
        with pytest.raises(ValueError, match="is not a GradNormPenalty of the loss"):
            _objective({"p": term}, differentiation=FiniteDifference(threat=Linf(0.1), one_pass=True))

    def test_hooks_on_gradients_are_refused(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        model[0].weight.register_hook(lambda g: g.clamp(-1, 1))
        with pytest.raises(RuntimeError, match="would run twice"):
            _objective(differentiation=FiniteDifference(one_pass=True))(model, x, y)


class TestFiniteDifferenceBias:
    """Of the loss 1/2 sum theta_i x_i^2 the gradient is theta x, the penalty eps sum |theta_i x_i|."""

    @pytest.mark.parametrize("differentiation", [FiniteDifference(0.5), FiniteDifference(0.5, one_pass=True)])
    def test_is_half_a_step_times_the_curvature(self, differentiation: Differentiation) -> None:
        theta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -0.7]], dtype=torch.float64)
        total = _quadratic(theta, differentiation)(x)
        (found,) = torch.autograd.grad(total, theta)
        eps, step = 0.1, 0.5
        exact = eps * x.abs().mean(0)  # the derivative of the penalty, as all of theta is above 0
        curvature = 0.5 * step * eps**2  # half a step times the derivative of u' H u, where u = eps sign(theta x)
        assert torch.allclose(found, 0.5 * x.square().mean(0) + exact + curvature, rtol=1e-12)

    def test_central_has_none(self) -> None:
        theta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -0.7]], dtype=torch.float64)
        (found,) = torch.autograd.grad(_quadratic(theta, FiniteDifference(0.5, scheme="central"))(x), theta)
        assert torch.allclose(found, 0.5 * x.square().mean(0) + 0.1 * x.abs().mean(0), rtol=1e-12)


def _quadratic(theta: Tensor, differentiation: Differentiation) -> Callable[[Tensor], Tensor]:
    objective = PenalizedLoss(
        lambda values, _: values, {"p": Term(GradNormPenalty(Linf(0.1)))}, differentiation=differentiation
    )
    return lambda x: (
        objective(lambda z: 0.5 * (theta * z.square()).sum(1), x, torch.zeros(len(x), dtype=torch.long)).total
    )

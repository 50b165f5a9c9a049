"""The penalised objective: its gradients, the published formula, its equivalence to the explicit loop, its errors."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    NFGSM,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientPenalty,
    GradNormPenalty,
    GradregWarning,
    Linf,
    Noise,
    PenalizedLoss,
    PenalizedModel,
    PGDAttack,
    Point,
    Term,
    class_scores,
    constant,
    cross_entropy,
    edge_alignment,
    grad_norm,
    input_gradient,
    linear_ramp,
    margin,
    oriented_energy,
    predicted_class,
    sampled_class,
    true_class,
    with_normalization,
)

from cases import (
    CLASSES,
    MODELS,
    make_batch,
    make_model,
    parameters_of,
    passes_of_a_step,
    per_sample_cross_entropy,
    relative_error,
    soft_labels,
)

TERMS = {
    "Linf": Term(GradNormPenalty(Linf(0.1)), weight=1.2),
    "L2": Term(GradNormPenalty(L2(0.4)), weight=1.2),
    "L1": Term(GradNormPenalty(L1(2.0)), weight=1.2),
    "edges": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class()), weight=0.5),
}


def _objective(**terms: Term) -> PenalizedLoss:
    return PenalizedLoss(per_sample_cross_entropy, terms or {"p": TERMS["Linf"]}, loss_weight=0.8)


def _gradient(objective: PenalizedLoss, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(objective(model, x, y).total, parameters_of(model)))


class TestGradients:
    @pytest.mark.parametrize("model_name", [name for name in MODELS if name != "batch_norm_train"])
    @pytest.mark.parametrize("term_name", TERMS)
    def test_equal_central_differences_in_the_weights(self, model_name: str, term_name: str) -> None:
        model, (x, y) = make_model(model_name), make_batch()
        objective = _objective(p=TERMS[term_name])
        gradient = _gradient(objective, model, x, soft_labels(y))
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters_of(model)]
            slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
            rise = self._along(objective, model, direction, x, soft_labels(y), 1e-6)
            assert rise == pytest.approx(slope, rel=1e-6)

    @staticmethod
    def _along(
        objective: PenalizedLoss, model: nn.Module, direction: list[Tensor], x: Tensor, y: Tensor, step: float
    ) -> float:
        totals = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for parameter, d in zip(parameters_of(moved), direction, strict=True):
                    parameter.add_(sign * step * d)
            totals.append(objective(moved, x, y).total.item())
        return (totals[0] - totals[1]) / (2 * step)

    def test_pass_gradcheck(self) -> None:
        model, (x, y) = make_model("mlp"), make_batch(2)
        names = [name for name, _ in model.named_parameters()]
        objective = _objective(p=TERMS["L2"])

        def total(*parameters: Tensor) -> Tensor:
            values = dict(zip(names, parameters, strict=True))
            return objective(lambda z: torch.func.functional_call(model, values, (z,)), x, y).total

        assert torch.autograd.gradcheck(total, tuple(p.detach().requires_grad_() for p in model.parameters()))

    def test_are_finite_at_a_zero_gradient(self) -> None:
        model, (x, y) = make_model("mlp"), make_batch()
        with torch.no_grad():
            model[1].weight.zero_()
        for term in TERMS.values():
            with pytest.warns(GradregWarning, match="exactly"):
                gradient = _gradient(_objective(p=term), model, x, y)
            assert all(torch.isfinite(g).all() for g in gradient)


class TestPublishedFormula:
    r"""Rodríguez Muñoz 2024, equation 4.1 as the released code computes it, written out here from its description.

    The criterion is the batch *mean* over soft mixup labels, so its gradient carries 1/B, which is multiplied back;
    pixels are normalised with a scalar sigma, so that eps becomes eps/sigma.
    """

    eps, sigma, mean = 4 / 255, 0.225, 0.45

    def _published(self, model: nn.Module, normalised: Tensor, y: Tensor) -> Tensor:
        leaf = normalised.clone().requires_grad_()
        loss = torch.sum(-y * F.log_softmax(model(leaf), dim=-1), dim=-1).mean()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        norms = torch.stack([sample.abs().sum() for sample in grad])
        return 0.8 * loss + 1.2 * (self.eps / self.sigma) * len(leaf) * norms.mean()

    @pytest.mark.parametrize("name", ["conv", "attention", "group_norm"])
    @pytest.mark.parametrize("batch", [1, 6])
    def test_equals_the_objective_on_normalised_and_on_pixel_inputs(self, name: str, batch: int) -> None:
        model, (pixels, y) = make_model(name), make_batch(batch)
        mixed, normalised = soft_labels(y), (pixels - self.mean) / self.sigma
        expected = self._published(model, normalised, mixed)
        expected_gradient = list(torch.autograd.grad(expected, parameters_of(model)))

        on_normalised = _objective(p=Term(GradNormPenalty(Linf(self.eps / self.sigma)), weight=1.2))
        per_channel = torch.full((2, 1, 1), self.eps / self.sigma, dtype=torch.float64)
        on_channels = _objective(p=Term(GradNormPenalty(Linf(per_channel)), weight=1.2))
        on_pixels = _objective(p=Term(GradNormPenalty(Linf(self.eps)), weight=1.2))
        wrapped = with_normalization(model, [self.mean] * 2, [self.sigma] * 2).double()
        for objective, net, x in (
            (on_normalised, model, normalised),
            (on_channels, model, normalised),
            (on_pixels, wrapped, pixels),
        ):
            out = objective(net, x, mixed)
            assert relative_error(out.total, expected) < 1e-10
            found = list(torch.autograd.grad(out.total, parameters_of(model)))
            assert relative_error(found, expected_gradient) < 1e-10


NETS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: make_model(name) for name in ("conv", "group_norm", "attention", "shared")},
    "dropout": lambda: make_model("dropout_eval").train(),
}


def _norm_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """0.8 CE + 1.2 eps |d CE / d x|_1, by two plain calls of autograd."""
    leaf = x.clone().requires_grad_()
    losses = F.cross_entropy(model(leaf), y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    return 0.8 * losses.mean() + 1.2 * 0.1 * grad.abs().flatten(1).sum(1).mean()


def _both_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same, and 0.5 (1 - cos) of the true class's gradient and the edges, from one forward pass."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    losses = F.cross_entropy(logits, y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    (of_class,) = torch.autograd.grad(sum(logits[i, k] for i, k in enumerate(y.tolist())), leaf, create_graph=True)
    edges = oriented_energy(x, sigma=0.6)
    cosines = F.cosine_similarity(of_class.flatten(1), edges.flatten(1), dim=1, eps=0)
    norms = grad.abs().flatten(1).sum(1)
    return 0.8 * losses.mean() + 1.2 * 0.1 * norms.mean() + 0.5 * (1 - cosines).mean()


def _recommended_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """CE where a half of the batch is noisy, and a half took one signed step from there, all inside [0, 1].

    A network that drops units drops the same ones of a sample that is attacked when it trains on it.
    """
    noisy = (x + Linf(0.1).sample_like(x)).clamp(0, 1)
    taken, left = torch.randperm(len(x)).tensor_split([round(0.5 * len(x))])
    mask = torch.get_rng_state()
    leaf = noisy[taken].requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y[taken], reduction="sum"), leaf)
    moved = (noisy[taken] + 0.1 * grad.sign()).clamp(0, 1)
    after = torch.get_rng_state()
    torch.set_rng_state(mask)
    of_taken = F.cross_entropy(model(moved), y[taken], reduction="sum")
    torch.set_rng_state(after)
    return (of_taken + F.cross_entropy(model(noisy[left]), y[left], reduction="sum")) / len(x)


BY_HAND: dict[str, tuple[PenalizedLoss, Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "exact": (_objective(p=TERMS["Linf"]), _norm_by_hand),
    "both": (_objective(p=TERMS["Linf"], q=TERMS["edges"]), _both_by_hand),
    "recommended": (PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5)), _recommended_by_hand),
}


class TestEquivalences:
    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize("name", BY_HAND)
    @pytest.mark.parametrize("seed", range(3))
    def test_the_objective_is_the_loop_by_hand(self, name: str, net: str, seed: int) -> None:
        model, (x, y) = NETS[net](), make_batch(6, seed=seed)
        objective, by_hand = BY_HAND[name]
        torch.manual_seed(seed)
        total = objective(model, x, y).total
        found = list(torch.autograd.grad(total, parameters_of(model)))
        torch.manual_seed(seed)
        expected_total = by_hand(model, x, y)
        expected = list(torch.autograd.grad(expected_total, parameters_of(model)))
        assert relative_error(total, expected_total) < 1e-12
        assert relative_error(found, expected) < 1e-12

    def test_the_object_is_the_explicit_loop(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(grad_norm=TERMS["Linf"], edges=TERMS["edges"])
        found = _gradient(objective, model, x, y)

        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        losses = F.cross_entropy(logits, y, reduction="none")
        norms = grad_norm(input_gradient(losses, leaf), Linf(0.1))
        angles = edge_alignment(input_gradient(class_scores(logits, y), leaf), x, sigma=0.6)
        total = 0.8 * losses.mean() + 1.2 * norms.mean() + 0.5 * angles.mean()
        assert relative_error(found, list(torch.autograd.grad(total, parameters_of(model)))) < 1e-12

    def test_the_object_is_the_loop_over_a_point(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        found = _gradient(_objective(a=TERMS["Linf"], b=TERMS["edges"]), model, x, y)
        point = Point(model, cross_entropy, x, y)
        penalties = [term.weight * term.penalty(point).mean() for term in (TERMS["Linf"], TERMS["edges"])]
        total = 0.8 * point.losses.mean() + sum(penalties)
        assert relative_error(found, list(torch.autograd.grad(total, parameters_of(model)))) < 1e-12

    @pytest.mark.parametrize("differentiation", [DoubleBackward(), FiniteDifference(0.25)])
    def test_micro_batches_are_the_batch(self, differentiation: object) -> None:
        model, (x, y) = make_model("group_norm"), make_batch(6)
        objective = PenalizedLoss(per_sample_cross_entropy, {"p": TERMS["Linf"]}, differentiation=differentiation)
        whole = _gradient(objective, model, x, y)
        parts = [_gradient(objective, model, x[rows], y[rows]) for rows in (slice(0, 3), slice(3, 6))]
        assert relative_error([(a + b) / 2 for a, b in zip(*parts, strict=True)], whole) < 1e-12

    def test_inner_scale_changes_nothing_in_float64(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        scaled = PenalizedLoss(per_sample_cross_entropy, {"p": TERMS["Linf"]}, loss_weight=0.8, inner_scale=1024.0)
        assert relative_error(_gradient(scaled, model, x, y), _gradient(_objective(), model, x, y)) < 1e-12

    def test_penalized_model_is_the_objective_on_the_model(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        together = PenalizedModel(model, _objective())
        assert torch.equal(together(x, y).total, _objective()(model, x, y).total)
        assert [name for name, _ in together.named_parameters()] == [f"model.{n}" for n, _ in model.named_parameters()]


class TestWork:
    """What is computed, and how often."""

    def _counting(self, model: nn.Module) -> tuple[nn.Module, list[int]]:
        calls = [0]
        model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return model, calls

    def test_terms_share_one_forward_and_one_gradient_per_score(self) -> None:
        x, y = make_batch(dtype=torch.float32)
        objective = _objective(a=TERMS["Linf"], b=TERMS["L2"], c=TERMS["edges"], d=TERMS["edges"])
        found = passes_of_a_step(make_model("conv", torch.float32), lambda model: objective(model, x, y), len(x))
        assert found == {"forward": 1, "to inputs": 2, "to weights": 0, "second": 0}

    def test_equal_selectors_draw_one_class(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(64)
        seen: list[Tensor] = []

        def remember(grad: Tensor, x: Tensor) -> Tensor:
            seen.append(grad)
            return grad.flatten(1).sum(1)

        temperatures = {"a": 5.0, "b": 5.0, "c": 4.0}
        terms = {name: Term(GradientPenalty(remember, of=sampled_class(t))) for name, t in temperatures.items()}
        _objective(**terms)(model, x, y)
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], seen[2])

    def test_a_term_without_weight_costs_nothing_and_is_not_reported(self) -> None:
        (model, _), (x, y) = self._counting(make_model("conv")), make_batch()

        def never(point: Point) -> Tensor:
            raise AssertionError("a term of weight 0 was evaluated")

        objective = _objective(ramp=Term(never, weight=linear_ramp(1.0, duration=10)), off=Term(never, weight=0.0))
        out = objective(model, x, y, t=0)
        assert out.penalties == {}
        assert torch.allclose(out.total, 0.8 * out.loss, rtol=1e-15)
        assert _graph_size(out.total) == _graph_size((0.8 * per_sample_cross_entropy(model(x), y)).mean())

    def test_the_input_is_left_as_it_was(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        before = x.clone()
        for requires_grad in (False, True):
            x.requires_grad_(requires_grad)
            _objective()(model, x, y).total.backward()
            assert torch.equal(x, before)
            assert x.requires_grad is requires_grad
            assert x.grad is None

    def test_a_first_layer_that_works_in_place_is_harmless(self) -> None:
        x, y = make_batch()
        head = make_model("conv")
        in_place = nn.Sequential(nn.SiLU(inplace=True), head)
        out_of_place = nn.Sequential(nn.SiLU(), head)
        before = x.clone()
        found = _gradient(_objective(), in_place, x, y)
        assert torch.equal(x, before)
        assert relative_error(found, _gradient(_objective(), out_of_place, x, y)) < 1e-12


def _graph_size(tensor: Tensor) -> int:
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return len(seen)


class TestWeights:
    def test_schedules_follow_the_clock(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = PenalizedLoss(
            per_sample_cross_entropy,
            {"p": Term(GradNormPenalty(Linf(0.1)), weight=linear_ramp(2.0, duration=10))},
            loss_weight=constant(0.5),
        )
        out = objective(model, x, y, t=5)
        assert torch.allclose(out.total, 0.5 * out.loss + 1.0 * out.penalties["p"].mean(), rtol=1e-12)

    @pytest.mark.usefixtures("unchecked")
    def test_a_schedule_needs_the_clock(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match="schedule"):
            _objective(p=Term(GradNormPenalty(Linf(0.1)), weight=linear_ramp(2.0, duration=10)))(model, x, y)

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_must_be_finite_and_not_negative(self, weight: float) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match="finite"):
            Term(GradNormPenalty(Linf(0.1)), weight=weight)
        with pytest.raises(ValueError, match="finite"):
            PenalizedLoss(per_sample_cross_entropy, {}, loss_weight=weight)
        with pytest.raises(ValueError, match="finite"):
            _objective(p=Term(GradNormPenalty(Linf(0.1)), weight=constant(weight)))(model, x, y, t=0)


class TestScores:
    def test_of_a_class_differentiates_that_logit(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        for selector, classes in ((true_class(), y), (predicted_class(), logits.argmax(1))):
            out = _objective(p=Term(GradNormPenalty(L2(1.0), of=selector)))(model, x, y)
            grad = input_gradient(class_scores(logits, classes), leaf)
            assert torch.allclose(out.penalties["p"], grad.flatten(1).norm(dim=1), rtol=1e-10)

    def test_given_classes_replace_the_choice(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        drawn = Term(GradNormPenalty(L2(1.0), of=sampled_class(0.5)))
        given = _objective(p=drawn)(model, x, y, classes=y)
        of_labels = Term(GradNormPenalty(L2(1.0), of=true_class()))
        assert torch.equal(given.total, _objective(p=of_labels)(model, x, y).total)

    def test_soft_and_hard_labels_agree(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        one_hot = F.one_hot(y, CLASSES).double()
        assert relative_error(_gradient(_objective(), model, x, one_hot), _gradient(_objective(), model, x, y)) < 1e-12

    def test_any_per_sample_loss_will_do(self) -> None:
        model, (x, _) = make_model("conv"), make_batch()
        y = torch.rand(5, CLASSES, dtype=torch.float64)

        def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
            return (prediction - y).square().sum(1)

        objective = PenalizedLoss(squared_error, {"p": Term(GradNormPenalty(L2(1.0)))})
        leaf = x.clone().requires_grad_()
        expected = input_gradient(squared_error(model(leaf), y), leaf).flatten(1).norm(dim=1)
        assert torch.allclose(objective(model, x, y).penalties["p"], expected, rtol=1e-12)


STEPS: dict[str, dict[str, Any]] = {
    "no penalty": {},
    "exact": {"terms": {"p": Term(GradNormPenalty(Linf(0.1)))}},
    "finite difference": {"terms": {"p": Term(GradNormPenalty(Linf(0.1)))}, "differentiation": FiniteDifference()},
    "fraction": {"terms": {"p": Term(GradNormPenalty(Linf(0.1)))}, "fraction": 0.5},
    "noise": {"at": Noise(Linf(0.1))},
    "half attacked": {"at": NFGSM(Linf(0.1), share=0.5)},
    "half attacked, with a penalty": {
        "at": NFGSM(Linf(0.1), share=0.5),
        "terms": {"p": Term(GradNormPenalty(Linf(0.1)))},
    },
    "adversarial": {"at": PGDAttack(Linf(0.1), steps=2, best=False)},
}
REAL = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TASKS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any]] = {
    "regression": (lambda out, y: (out - y).square().sum(1), REAL),
    "regression of one number": (lambda out, y: (out[:, 0] - y).square(), REAL[:, 0]),
    "embeddings": (
        lambda out, y: 1 - F.cosine_similarity(out, y["anchor"]) + y["margin"], {"anchor": REAL, "margin": 0.2},
    ),
    "mean and variance": (
        lambda out, y: F.gaussian_nll_loss(out[:, 0], y, out[:, 1].exp(), reduction="none"), REAL[:, 0],
    ),
    "survival": (lambda out, y: y[1] * out[:, 0] + out[:, 0].neg().exp() * y[0], (REAL[:, 0], REAL[:, 1].round())),
    "mixup": (
        lambda out, y: y[2] * cross_entropy(out, y[0]) + (1 - y[2]) * cross_entropy(out, y[1]),
        (torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 1, 0, 2, 2]), 0.3),
    ),
    "several tasks": (
        lambda out, y: cross_entropy(out[:, :2], y["sex"]) + (out[:, 2] - y["age"]).square(),
        {"sex": torch.tensor([0, 1, 1, 0, 0, 1]), "age": REAL[:, 0]},
    ),
    "names": (lambda out, y: out[:, 0] * out.new_tensor([len(name) for name in y]), ["a", "bb", "c", "dd", "ee", "f"]),
    "nothing": (lambda out, y: out.square().sum(1), None),
}  # fmt: skip


class TestLabels:
    """What a criterion takes is its user's business, unless it is known to take labels of classes."""

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("task", TASKS)
    def test_labels_of_any_task_come_to_the_criterion(self, task: str, step: str) -> None:
        criterion, y = TASKS[task]
        model, (x, _) = make_model("conv"), make_batch(6)
        out = PenalizedLoss(criterion, **STEPS[step])(model, x, y)
        out.total.backward()
        assert out.logits.shape == (6, CLASSES)
        expected = criterion(model(out.x), y).mean()
        assert torch.allclose(out.loss, expected, rtol=1e-12)
        if step in ("no penalty", "noise", "half attacked", "adversarial"):
            found = [parameter.grad for parameter in model.parameters()]
            assert relative_error(found, list(torch.autograd.grad(expected, parameters_of(model)))) < 1e-12

    @pytest.mark.parametrize("step", STEPS)
    def test_labels_stay_with_their_samples(self, step: str) -> None:
        """A second input says which sample it is, and so does every label."""
        model, (x, _) = make_model("conv"), make_batch(6)
        numbers, seen = torch.arange(6), []

        def numbered(image: Tensor, number: Tensor) -> Tensor:
            return torch.cat([model(image), number[:, None].to(image)], 1)

        def criterion(out: Tensor, y: tuple[dict[str, Tensor], list[int], float]) -> Tensor:
            labels, numbers, shared = y
            seen.append(numbers)
            assert out[:, -1].tolist() == labels["number"].tolist() == numbers
            assert shared == 0.5
            return out[:, :-1].square().sum(1)

        PenalizedLoss(criterion, **STEPS[step])(numbered, (x, numbers), ({"number": numbers}, numbers.tolist(), 0.5))
        last = seen[-1] if len(seen[-1]) == 6 else [*seen[-2], *seen[-1]]  # in one pass, or in two of a half
        assert sorted(last) == list(range(6))

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("criterion", [cross_entropy, per_sample_cross_entropy, margin])
    def test_labels_of_classes_are_checked(self, criterion: Callable[[Tensor, Tensor], Tensor], step: str) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        y[0] = -100
        with pytest.raises(ValueError, match="-100"):
            PenalizedLoss(criterion, **STEPS[step])(model, x, y)


class TestContracts:
    @pytest.mark.parametrize("name", TERMS)
    def test_state_pickle_copy_repr(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(p=TERMS[name])
        expected = objective(model, x, y).total
        assert objective.state_dict() == {}
        for twin in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
            assert torch.equal(twin(model, x, y).total, expected)
            assert repr(twin) == repr(objective)
        assert "p=" in repr(objective) or "'p'" in repr(objective)

    @pytest.mark.parametrize("differentiation", [DoubleBackward(), FiniteDifference(threat=Linf(0.1))])
    def test_nothing_of_the_model_is_changed(self, differentiation: object) -> None:
        model, (x, y) = make_model("batch_norm_eval"), make_batch()
        model[0].train()
        flags = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        objective = PenalizedLoss(per_sample_cross_entropy, TERMS, differentiation=differentiation)
        objective(model, x, y)
        assert [module.training for module in model.modules()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())

    @pytest.mark.filterwarnings("ignore:.*statistics of the batch:gradreg.GradregWarning")
    def test_safe_after_an_exception(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        flags = [module.training for module in model.modules()]

        class RefusedError(Exception):
            pass

        calls = [0]

        def fails_later(module: nn.Module, args: object) -> None:
            calls[0] += 1
            if calls[0] > 1:
                raise RefusedError

        model[-1].register_forward_pre_hook(fails_later)
        objective = PenalizedLoss(per_sample_cross_entropy, {"p": TERMS["Linf"]}, differentiation=FiniteDifference())
        with pytest.raises(RefusedError):
            objective(model, x, y)
        assert [module.training for module in model.modules()] == flags
        assert all(module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class TestPrecision:
    def _gradients(self, dtype: torch.dtype | None, inner_scale: float = 1.0, factor: float = 1.0) -> list[Tensor]:
        model, (x, y) = make_model("conv", torch.float32), make_batch(dtype=torch.float32)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.mul_(factor)
        objective = PenalizedLoss(
            per_sample_cross_entropy, {"p": TERMS["Linf"], "e": TERMS["edges"]}, inner_scale=inner_scale
        )
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            out = objective(model, x, y)
        assert out.penalties["p"].dtype == out.penalties["e"].dtype == torch.float32
        return list(torch.autograd.grad(out.total, parameters_of(model)))

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
    def test_autocast_is_close_to_float32(self, dtype: torch.dtype, tolerance: float) -> None:
        assert relative_error(self._gradients(dtype), self._gradients(None)) < tolerance

    def test_float32_is_close_to_float64(self) -> None:
        doubles = make_model("conv")
        exact = _gradient(_objective(), doubles, *make_batch())
        singles = _gradient(_objective(), make_model("conv", torch.float32), *make_batch(dtype=torch.float32))
        assert relative_error([g.double() for g in singles], exact) < 1e-5

    def test_inner_scale_is_divided_out_in_float32(self) -> None:
        """A float16 input whose gradient, once unscaled, is below the range of float16."""
        x, y = make_batch(dtype=torch.float16)
        model = make_model("mlp", torch.float16)

        def faint(logits: Tensor, y: Tensor) -> Tensor:
            return 1e-7 * F.cross_entropy(logits.float(), y, reduction="none")

        terms = {"p": Term(GradNormPenalty(Linf(0.1)))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradregWarning)
            plain = PenalizedLoss(faint, terms)(model, x, y).penalties["p"]
        scaled = PenalizedLoss(faint, terms, inner_scale=2.0**20)(model, x, y).penalties["p"]
        exact = PenalizedLoss(faint, terms)(make_model("mlp"), x.double(), y).penalties["p"]
        assert relative_error(plain.double().detach(), exact.detach()) > 0.5
        assert relative_error(scaled.double().detach(), exact.detach()) < 0.02

    def test_inner_scale_saves_what_float16_would_lose(self) -> None:
        """A criterion with tiny slopes: without a scale every input gradient flushes to zero in float16."""
        model, (x, y) = make_model("conv", torch.float32), make_batch(dtype=torch.float32)

        def faint(logits: Tensor, y: Tensor) -> Tensor:
            return 1e-7 * F.cross_entropy(logits, y, reduction="none")

        def measured(inner_scale: float, dtype: torch.dtype | None) -> Tensor:
            objective = PenalizedLoss(faint, {"p": Term(GradNormPenalty(Linf(1e4)))}, inner_scale=inner_scale)
            normalised = (x - 0.5) * 4
            with torch.autocast("cpu", dtype=dtype or torch.float16, enabled=dtype is not None):
                return objective(model, normalised, y).penalties["p"].detach()

        exact = measured(1.0, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradregWarning)
            lost = relative_error(measured(1.0, torch.float16), exact)
        assert lost > 0.5
        assert relative_error(measured(2.0**16, torch.float16), exact) < 0.02


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    """What an objective can see to be wrong: a message that tells, and nothing half-changed."""

    def _fails(
        self, error: type[Exception], match: str, model: object, x: Tensor, y: Tensor, **options: object
    ) -> None:
        with pytest.raises(error, match=match):
            PenalizedLoss(options.pop("criterion", per_sample_cross_entropy), {"p": TERMS["Linf"]}, **options)(
                model, x, y
            )
        if isinstance(model, nn.Module):
            assert all(parameter.grad is None for parameter in model.parameters())

    def test_images_of_bytes(self) -> None:
        _, y = make_batch()
        x = torch.randint(0, 256, (5, 2, 6, 6), dtype=torch.uint8)
        self._fails(TypeError, "float", make_model("conv"), x, y)

    def test_not_a_number(self) -> None:
        x, y = make_batch()
        x[2, 0, 0, 0] = float("nan")
        self._fails(ValueError, "NaN", make_model("conv"), x, y)

    def test_no_batch(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, "batch", make_model("conv"), x[:0], y[:0])

    def test_ignored_label(self) -> None:
        x, y = make_batch()
        y[0] = -100
        self._fails(ValueError, "-100", make_model("conv"), x, y)

    def test_label_out_of_range(self) -> None:
        x, y = make_batch()
        y[0] = CLASSES
        self._fails(ValueError, "4 classes", make_model("conv"), x, y)

    @pytest.mark.parametrize(
        ("mangle", "error", "match"),
        [
            (lambda y: y.int(), TypeError, "long"),
            (lambda y: y.double(), TypeError, "long"),
            (lambda y: y[:, None], ValueError, "squeeze"),
            (lambda y: F.one_hot(y, CLASSES), TypeError, "argmax"),
            (lambda y: F.one_hot(y, CLASSES + 1).double(), ValueError, "probabilities"),
            (lambda y: y[:3], ValueError, "classes"),
        ],
    )
    def test_labels_of_another_kind(self, mangle: object, error: type[Exception], match: str) -> None:
        x, y = make_batch()
        self._fails(error, match, make_model("conv"), x, mangle(y))

    @pytest.mark.parametrize("wrap", [lambda out: (out, out), lambda out: {"scores": out}, lambda out: None])
    def test_a_model_that_returns_no_logits(self, wrap: object) -> None:
        model = make_model("conv")
        self._fails(TypeError, "output", lambda z: wrap(model(z)), *make_batch())

    def test_a_criterion_that_averages(self) -> None:
        reduced = nn.CrossEntropyLoss()
        self._fails(ValueError, "reduction", None, *make_batch(), criterion=reduced)
        mean = lambda logits, y: F.cross_entropy(logits, y)  # noqa: E731
        self._fails(ValueError, "reduction", make_model("conv"), *make_batch(), criterion=mean)

    def test_disabled_grad(self) -> None:
        with torch.no_grad():
            self._fails(RuntimeError, "disabled", make_model("conv"), *make_batch())
        with torch.inference_mode():
            self._fails(RuntimeError, "disabled", make_model("conv"), *make_batch())

    def test_inference_tensors_are_copied(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        expected = _gradient(_objective(), model, x, y)
        with torch.inference_mode():
            x, y = x.clone(), y.clone()
        assert relative_error(_gradient(_objective(), model, x, y), expected) == 0

    def test_all_parameters_frozen(self) -> None:
        model = make_model("conv").requires_grad_(False)
        self._fails(RuntimeError, "frozen", model, *make_batch())

    def test_some_parameters_frozen_is_fine(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        everything = dict(zip(model.parameters(), _gradient(_objective(), model, x, y), strict=True))
        model[0].requires_grad_(False)
        found = _gradient(_objective(), model, x, y)
        assert relative_error(found, [everything[p] for p in parameters_of(model)]) < 1e-12

    def test_a_front_end_without_a_slope(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="rounding"):
            _objective()(lambda z: model(torch.round(z * 255) / 255), x, y)

    def test_a_saturated_loss(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="saturated"):
            _objective()(lambda z: model(z) * 0 + 1e4 * z.new_ones(1) * F.one_hot(y, CLASSES), x, y)

    def test_a_model_that_detaches(self) -> None:
        model = make_model("conv")
        self._fails(RuntimeError, "depend", lambda z: model(z.detach()), *make_batch())

    @pytest.mark.parametrize("eps", [4, 1.01, torch.full((2, 1, 1), 8.0)])
    def test_eps_in_another_unit(self, eps: float | Tensor) -> None:
        x, y = make_batch()
        objective = PenalizedLoss(per_sample_cross_entropy, {"p": Term(GradNormPenalty(Linf(eps)))})
        with pytest.raises(ValueError, match="unit"):
            objective(make_model("conv"), x, y)

    def test_normalised_twice(self) -> None:
        x, y = make_batch()
        model = with_normalization(make_model("conv"), [0.5] * 2, [0.2] * 2).double()
        self._fails(ValueError, "already", model, (x - 0.5) / 0.2, y)
        self._fails(ValueError, "already", model, x * 255, y)

    def test_piecewise_linear_activations_are_named_once(self) -> None:
        x, y = make_batch()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
        objective = _objective()
        with pytest.warns(GradregWarning, match="smoothify"):
            objective(model, x, y)
        objective(model, x, y)

    def test_a_compiled_model_is_named(self) -> None:
        x, y = make_batch()
        with pytest.warns(GradregWarning, match="compiled"):
            _objective()(torch.compile(make_model("conv"), backend="eager"), x, y)

    def test_fused_attention_is_named_before_it_raises(self) -> None:
        torch.manual_seed(0)
        attention = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
        model = nn.Sequential(nn.Flatten(1, 2), attention, nn.Flatten(), nn.Linear(72, CLASSES)).double()
        x, y = make_batch()
        with pytest.warns(GradregWarning, match="attention"):
            out = _objective()(model, x, y)
        with pytest.raises(RuntimeError, match="derivative"):
            out.total.backward()

    def test_a_penalty_of_the_wrong_shape_is_named(self) -> None:
        x, y = make_batch()
        objective = _objective(total=Term(lambda point: point.gradient().abs().sum()))
        with pytest.raises(ValueError, match="'total'"):
            objective(make_model("conv"), x, y)

    def test_arguments_in_another_order(self) -> None:
        x, y = make_batch()
        with pytest.raises(TypeError, match="order"):
            _objective()(x, make_model("conv"), y)

    def test_what_hides_inside_a_wrapper_is_named(self) -> None:
        x, y = make_batch()
        compiled = with_normalization(torch.compile(make_model("conv"), backend="eager"), [0.5] * 2, [0.2] * 2).double()
        with pytest.warns(GradregWarning, match="compiled"):
            _objective()(compiled, x, y)

    def test_batch_norm_in_training_mode_is_named_once(self) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        objective = _objective()
        with pytest.warns(GradregWarning, match="BatchNorm2d") as caught:
            objective(model, x, y)
        assert [warning.filename for warning in caught] == [__file__]
        objective(model, x, y)

    def test_an_input_with_a_graph(self) -> None:
        x, y = make_batch()
        upstream = torch.ones(1, dtype=torch.float64, requires_grad=True)
        self._fails(RuntimeError, "graph", make_model("conv"), x * upstream, y)

    def test_bytes_for_a_penalty_of_pixels(self) -> None:
        x, y = make_batch()
        with pytest.warns(GradregWarning, match="bytes"):
            _objective()(make_model("conv"), x * 255, y)

    def test_reentrant_checkpointing_points_to_preflight(self) -> None:
        model = make_model("conv")
        checkpointed = torch.utils.checkpoint.checkpoint
        x, y = make_batch()
        self._fails(RuntimeError, "preflight", lambda z: checkpointed(model, z, use_reentrant=True), x, y)

    def test_a_frozen_model_under_a_trained_criterion_is_fine(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

            def forward(self, logits: Tensor, y: Tensor) -> Tensor:
                return per_sample_cross_entropy(self.scale * logits, y)

        criterion, (x, y) = Scaled(), make_batch()
        objective = PenalizedLoss(criterion, {"p": TERMS["Linf"]})
        objective(make_model("conv").requires_grad_(False), x, y).total.backward()
        assert criterion.scale.grad is not None

    def test_what_is_no_differentiation(self) -> None:
        with pytest.raises(TypeError, match="DoubleBackward"):
            PenalizedLoss(per_sample_cross_entropy, {}, differentiation=DoubleBackward)
        with pytest.raises(TypeError, match="named"):
            PenalizedLoss(per_sample_cross_entropy, [TERMS["Linf"]])
        with pytest.raises(TypeError, match="GradNormPenalty"):
            Term(Linf(0.1))

    def test_class_scores_of_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="logits"):
            class_scores(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="classes"):
            class_scores(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))

    def test_what_is_no_term(self) -> None:
        with pytest.raises(TypeError, match="Term"):
            PenalizedLoss(per_sample_cross_entropy, {"p": GradNormPenalty(Linf(0.1))})
        with pytest.raises(TypeError, match="GradientPenalty"):
            Term(lambda grad, x: grad.flatten(1).sum(1))
        with pytest.raises(TypeError, match="NFGSM"):
            PenalizedLoss(at=Linf(0.1))

    def test_inner_scale(self) -> None:
        with pytest.raises(ValueError, match="inner_scale"):
            PenalizedLoss(per_sample_cross_entropy, {}, inner_scale=0.0)

"""What is left out or moved to save time: nothing on average, or as much as the documentation says.

The objective that gradreg recommends is compared with the same training written out by hand.
"""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradreg import (
    FGSM,
    L1,
    L2,
    NFGSM,
    APGDAttack,
    Attack,
    Differentiation,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    Noise,
    PenalizedLoss,
    PenalizedModel,
    PGDAttack,
    RandomSearch,
    TargetedAPGDAttack,
    Term,
    ThreatModel,
    TransferAttack,
    every,
    linear_ramp,
    margin,
    true_class,
)

from cases import (
    CLASSES,
    make_batch,
    make_model,
    objective_gradient,
    parameters_of,
    passes_of_a_step,
    per_sample_cross_entropy,
    relative_error,
)


class _Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


GRAD_NORM = {"p": Term(GradNormPenalty(Linf(0.1)), weight=1.2)}
EDGES = {"p": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class()), weight=0.5)}
DIFFERENTIATIONS = [DoubleBackward(), FiniteDifference(0.5), FiniteDifference(0.5, scheme="central")]


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

    @pytest.mark.usefixtures("unchecked")
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

    @pytest.mark.usefixtures("unchecked")  # whose checks draw random numbers, as a model may: that is refused
    def test_goes_with_noise_and_with_an_attack(self) -> None:
        """Equal samples without noise: whichever is drawn, loss and penalty are those of the whole batch."""
        model, (x, y) = make_model("conv"), make_batch(4)
        x, y = x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4)
        for at in (Noise(Linf(0.0)), FGSM(Linf(0.1))):
            found = objective_gradient(_objective(at=at, fraction=0.5), model, x, y)
            assert relative_error(found, objective_gradient(_objective(at=at), model, x, y)) < 1e-12

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
        with pytest.raises(RuntimeError, match="statistics"):
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
        with pytest.raises(ValueError, match="radius"):
            _objective(terms, fraction=0.5)(model, x, y)

    @pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
    def test_must_be_a_share(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="fraction"):
            _objective(fraction=fraction)


class TestNoise:
    @pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3), L1(0.5)])
    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
    def test_the_objective_is_taken_at_one_point_of_the_ball(
        self, threat: ThreatModel, differentiation: Differentiation, bounds: tuple[float, float] | None
    ) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        x = x.round()
        out = _objective(differentiation=differentiation, at=Noise(threat, bounds=bounds))(model, x, y)
        assert (out.x != x).flatten(1).any(1).all()
        assert (threat.norm(out.x - x) <= 1 + 1e-9).all()
        assert bool(((out.x >= 0) & (out.x <= 1)).all()) == (bounds is not None)
        found = list(torch.autograd.grad(out.total, parameters_of(model)))
        expected = objective_gradient(_objective(differentiation=differentiation), model, out.x, y)
        assert relative_error(found, expected) < 1e-12
        assert not out.x.requires_grad

    def test_of_a_function_linear_in_x_changes_no_penalty(self) -> None:
        """Its input gradient is the same everywhere."""
        linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
        x, y = make_batch()
        terms = {"p": Term(GradNormPenalty(L2(0.4)))}

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            return logits.gather(1, labels[:, None]).squeeze(1)

        noisy = PenalizedLoss(criterion, terms, at=Noise(Linf(0.3)))(linear, x, y).penalties["p"]
        assert torch.allclose(noisy, PenalizedLoss(criterion, terms)(linear, x, y).penalties["p"], rtol=1e-12)

    def test_bias_of_a_quadratic_loss_is_half_the_trace_times_the_variance(self) -> None:
        """E l(x + n) - l(x) = tr(H) eps^2 / 6 for n uniform in [-eps, eps]; the Hessian here is the identity."""
        x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        objective = PenalizedLoss(lambda z, _: 0.5 * z.square().sum(1), at=Noise(Linf(0.6), bounds=None))
        torch.manual_seed(1)
        rise = objective(lambda z: z, x).loss - 0.5 * x.square().sum(1).mean()
        # The rise of one sample has variance eps^2 |x|^2 / 3 at most about 1, so that three errors of its mean are .02.
        assert rise.item() == pytest.approx(8 * 0.6**2 / 6, abs=0.025)

    @pytest.mark.parametrize("options", [{"at": Noise(Linf(0.1))}, {"fraction": 0.5}, {}])
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
        objective = _objective(at=Noise(Linf(0.1)))
        torch.manual_seed(0)
        first, second = objective(model, x, y).total, objective(model, x, y).total
        torch.manual_seed(0)
        assert torch.equal(objective(model, x, y).total, first)
        assert not torch.equal(first, second)

    def test_with_a_seed_of_its_own_is_always_the_same(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        objective = _objective(at=Noise(Linf(0.1), seed=3))
        assert torch.equal(objective(model, x, y).x, objective(model, x, y).x)

    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
    def test_with_a_full_step_and_equal_weights_is_n_fgsm(self, bounds: tuple[float, float] | None) -> None:
        """(1 - 1) loss(x + n) + loss(x + n + eps sign g): de Jorge et al. 2022; with bounds, their clipping too."""
        model, (x, y) = make_model("conv"), make_batch()
        torch.manual_seed(0)
        objective = PenalizedLoss(
            per_sample_cross_entropy,
            {"p": Term(GradNormPenalty(Linf(0.1), bounds=bounds), weight=1.0)},
            differentiation=FiniteDifference(1.0),
            at=Noise(Linf(0.1), bounds=bounds),
        )
        found = objective_gradient(objective, model, x, y)
        torch.manual_seed(0)
        x_adv = NFGSM(Linf(0.1), noise=1.0, bounds=bounds)(model, x, y)
        expected = torch.autograd.grad(per_sample_cross_entropy(model(x_adv), y).mean(), parameters_of(model))
        assert relative_error(found, list(expected)) < 1e-11

    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS[:2])
    def test_every_point_lies_in_the_bounds(self, differentiation: Differentiation) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        bounds = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
        terms = {"p": Term(GradNormPenalty(Linf(0.3), bounds=bounds))}
        at = Noise(Linf(0.3), bounds=bounds)
        _objective(terms, at=at, differentiation=differentiation, fraction=0.5)(model, x.round(), y)
        assert all(((z >= 0) & (z <= 1)).all() for z in seen)
        assert any(((z > 0) & (z < 1)).any() for z in seen)

    def test_inputs_in_another_unit_than_the_bounds_are_refused(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        terms = {"p": Term(GradNormPenalty(Linf(0.1), bounds=(0.0, 1.0)))}
        with pytest.raises(ValueError, match="unit"):
            _objective(terms)(model, 4 * x - 2, y)
        with pytest.raises(ValueError, match="unit"):
            _objective(at=Noise(Linf(0.1)))(model, 4 * x - 2, y)
        narrow = {"p": Term(GradNormPenalty(Linf(0.9), bounds=(0.25, 0.75)))}
        with pytest.raises(ValueError, match="unit"):
            _objective(narrow)(model, x, y)

    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (0.0, 0.5)])
    def test_noise_in_another_unit_is_refused(self, bounds: tuple[float, float] | None) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match="eps=8"):
            _objective(at=Noise(Linf(8.0), bounds=bounds))(model, x / 2, y)

    def test_augmentation_that_leaves_the_bounds_is_brought_back(self) -> None:
        """As random erasing does, by less than half of the range."""
        model, (x, y) = make_model("conv"), make_batch()
        out = _objective(at=Noise(Linf(0.1)))(model, 1.6 * x - 0.3, y)
        assert ((out.x >= 0) & (out.x <= 1)).all()

    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_place(self) -> None:
        for at in (0.1, Linf(0.1), Noise):
            with pytest.raises(TypeError, match="NFGSM"):
                _objective(at=at)


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


THREATS = {"Linf": Linf(0.1), "L2": L2(0.5), "L1": L1(1.0)}
NETS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: make_model(name) for name in ("conv", "group_norm", "attention", "batch_norm_eval")},
    "dropout": lambda: make_model("dropout_eval").train(),
    "frozen stem": lambda: _frozen(make_model("conv"), 0),
    "frozen head": lambda: _frozen(make_model("conv"), 3),
}


def _frozen(model: nn.Sequential, layer: int) -> nn.Module:
    model[layer].requires_grad_(False)
    return model


def _attacked(model: nn.Module, noisy: Tensor, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """One full step from noisy images along the gradient of their cross-entropy."""
    leaf = noisy.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    if isinstance(threat, L1):  # whose step spreads over the steepest pixels that are not yet moved far
        return (noisy + threat.ascent(slope, noisy - x)).clamp(0, 1)
    return (noisy + threat.maximizer(slope)).clamp(0, 1)


def _by_hand(model: nn.Module, x: Tensor, y: Tensor, share: float, threat: ThreatModel) -> Tensor:
    """The mean loss where a share of the batch is attacked by one step from noise, and the others are noisy.

    A network that drops units drops the same ones of a sample when it is attacked and when it is trained on.
    """
    noisy = (x + threat.sample_like(x)).clamp(0, 1)
    count = max(1, round(share * len(x)))
    taken, left = torch.randperm(len(x)).tensor_split([count]) if count < len(x) else (torch.arange(len(x)), None)
    before = torch.get_rng_state()
    moved = _attacked(model, noisy[taken], x[taken], y[taken], threat)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    loss = F.cross_entropy(model(moved), y[taken], reduction="sum")
    torch.set_rng_state(after)
    if left is not None:
        loss = loss + F.cross_entropy(model(noisy[left]), y[left], reduction="sum")
    return loss / len(x)


def _recommended(share: float = 0.5, threat: ThreatModel = THREATS["Linf"], **options: object) -> PenalizedLoss:
    return PenalizedLoss(per_sample_cross_entropy, at=NFGSM(threat, share=share), **options)


class _Scaled(nn.Module):
    """A criterion with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return per_sample_cross_entropy(self.scale * logits, y)


@pytest.mark.usefixtures("unchecked")  # whose checks draw random numbers, as a model may: users do not have them
class TestRecommended:
    """Half of the batch is noisy, the other half attacked by one step from noise."""

    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize("threat", THREATS)
    def test_is_the_training_by_hand(self, net: str, share: float, threat: str) -> None:
        model, (x, y) = NETS[net](), make_batch(8)
        torch.manual_seed(4)
        out = _recommended(share, THREATS[threat])(model, x, y)
        found = list(torch.autograd.grad(out.total, parameters_of(model)))
        torch.manual_seed(4)
        total = _by_hand(model, x, y, share, THREATS[threat])
        assert relative_error(out.total, total) < 1e-12
        assert relative_error(found, list(torch.autograd.grad(total, parameters_of(model)))) < 1e-12

    def test_every_half_is_as_likely(self) -> None:
        """A chi-squared statistic of 600 draws with 5 degrees of freedom: above 20.5 once in a thousand."""
        model, (x, y) = make_model("mlp"), make_batch(4)
        objective, counts = PenalizedLoss(at=NFGSM(Linf(0.1), noise=0.0, share=0.5, bounds=None)), {}
        for _ in range(600):
            drawn = tuple((objective(model, x, y).x != x).flatten(1).any(1).tolist())
            counts[drawn] = counts.get(drawn, 0) + 1
        assert all(sum(drawn) == 2 for drawn in counts)
        assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5

    def test_at_least_one_sample_is_attacked(self) -> None:
        model, (x, y) = make_model("mlp"), make_batch(3)
        out = PenalizedLoss(at=NFGSM(Linf(0.1), noise=0.0, share=0.01))(model, x, y)
        assert (out.x != x).flatten(1).any(1).sum() == 1

    @pytest.mark.parametrize("net", ["conv", "group_norm", "dropout"])
    def test_the_result_tells_where_the_loss_was_taken(self, net: str) -> None:
        model, (x, y) = NETS[net](), make_batch(6)
        out = _recommended()(model, x, y)
        assert ((out.x >= 0) & (out.x <= 1)).all()
        assert ((out.x - x).abs() <= 0.2 + 1e-12).all()
        assert torch.allclose(out.loss, per_sample_cross_entropy(out.logits, y).mean(), rtol=1e-12)
        assert torch.equal(out.total, out.loss)
        assert out.penalties == {}
        assert out.clean_logits is None
        if net != "dropout":
            assert torch.allclose(out.logits, model(out.x), rtol=1e-12)

    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
    def test_costs_a_share_of_a_pass_forward_and_back_and_none_to_the_weights(
        self, share: float, threat: ThreatModel
    ) -> None:
        x, y = make_batch(8, dtype=torch.float32)
        model = make_model("conv", torch.float32)
        objective = _recommended(share, threat)
        found = passes_of_a_step(model, lambda probe: objective(probe, x, y).total.backward(), len(x))
        assert found == {"forward": 1 + share, "to inputs": 1 + share, "to weights": 1, "second": 0}

    @pytest.mark.parametrize("at", [NFGSM(Linf(0.1), share=0.5), NFGSM(Linf(0.1)), FGSM(Linf(0.1)),
                                    PGDAttack(Linf(0.1), steps=3, best=False)])  # fmt: skip
    @pytest.mark.parametrize("net", ["conv", "dropout"])
    def test_frees_the_graph_of_the_attack_before_the_training_pass(self, at: Attack, net: str) -> None:
        """An activation that a graph keeps for its backward pass is alive as long as the graph needs it."""
        model, (x, y) = NETS[net](), make_batch(6)
        activations: list[weakref.ref[Tensor]] = []
        alive: list[int] = []
        samples: list[int] = []

        def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
            alive.append(sum(ref() is not None for ref in activations))
            samples.append(len(inputs[0]))

        model.register_forward_pre_hook(before)
        model[0].register_forward_hook(lambda *inout: activations.append(weakref.ref(inout[-1])))
        out = PenalizedLoss(at=at)(model, x, y)
        training = 2 if net == "dropout" and isinstance(at, NFGSM) and at.share < 1 else 1  # forward passes
        assert sum(samples[-training:]) == 6
        assert alive[: len(alive) - training + 1] == [0] * (len(alive) - training + 1)
        out.total.backward()

    def test_no_gradient_of_a_parameter_is_touched_before_backward(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        ran: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, name=name: ran.append(name))
        out = _recommended()(model, x, y)
        assert ran == []
        assert all(parameter.grad is None for parameter in model.parameters())
        out.total.backward()
        assert sorted(ran) == sorted(name for name, _ in model.named_parameters())  # each once

    def test_hooks_on_parameter_gradients_do_what_they_do(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        torch.manual_seed(0)
        expected = [g.clamp(-1e-3, 1e-3) for g in objective_gradient(_recommended(), model, x, y)]
        for parameter in model.parameters():
            parameter.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        torch.manual_seed(0)
        _recommended()(model, x, y).total.backward()
        assert relative_error([parameter.grad for parameter in model.parameters()], expected) < 1e-12

    def test_can_be_scaled_and_gone_through_twice(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        torch.manual_seed(0)
        expected = objective_gradient(_recommended(), model, x, y)
        torch.manual_seed(0)
        total = _recommended()(model, x, y).total
        (3 * total).backward(retain_graph=True)
        total.backward()
        assert relative_error([parameter.grad for parameter in model.parameters()], [4 * g for g in expected]) < 1e-12

    def test_the_total_can_be_differentiated_again(self) -> None:
        """The attacked point is a constant, as in adversarial training by hand."""
        model, (x, y) = make_model("conv"), make_batch(6)
        found = []
        for total_of in (lambda: _recommended()(model, x, y).total, lambda: _by_hand(model, x, y, 0.5, Linf(0.1))):
            torch.manual_seed(0)
            gradients = torch.autograd.grad(total_of(), parameters_of(model), create_graph=True)
            found.append(list(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters_of(model))))
        assert relative_error(*found) < 1e-11

    def test_frozen_parameters_stay_without_a_gradient(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        model[0].weight.requires_grad_(False)
        _recommended()(model, x, y).total.backward()
        assert model[0].weight.grad is None
        assert model[0].bias.grad is not None

    def test_a_criterion_with_parameters_is_trained(self) -> None:
        model, (x, y), criterion = make_model("conv"), make_batch(6), _Scaled()
        objective = PenalizedLoss(criterion, at=NFGSM(Linf(0.1), share=0.5))
        out = objective(model, x, y)
        out.total.backward()
        found = criterion.scale.grad.clone()
        expected = torch.autograd.grad(criterion(model(out.x), y).mean(), criterion.scale)
        assert torch.allclose(found, *expected, rtol=1e-12)

    def test_the_attack_raises_the_very_loss_of_the_objective(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        at = FGSM(Linf(0.1))
        by_margin = PenalizedLoss(margin, at=at)(model, x, y).x
        assert torch.equal(by_margin, FGSM(Linf(0.1), criterion=margin)(model, x, y))
        assert not torch.equal(by_margin, at(model, x, y))
        own = PenalizedLoss(at=FGSM(Linf(0.1), criterion=margin))(model, x, y).x
        assert torch.equal(own, by_margin)

    def test_a_sample_without_a_gradient_stays_noisy(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = make_model("mlp")

            def forward(self, z: Tensor) -> Tensor:
                alive = (z.flatten(1).mean(1, keepdim=True) > 0.4).to(z.dtype)
                return self.body(z * alive.view(-1, 1, 1, 1))

        model, (x, y) = Gated(), make_batch(8)
        x[:3] /= 2
        torch.manual_seed(0)
        found = objective_gradient(_recommended(), model, x, y)
        torch.manual_seed(0)
        expected = torch.autograd.grad(_by_hand(model, x, y, 0.5, Linf(0.1)), parameters_of(model))
        assert relative_error(found, list(expected)) < 1e-12

    @pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
    def test_the_inner_scale_is_divided_out(self, threat: ThreatModel) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        gradients = []
        for scale in (1.0, 2.0**10):
            torch.manual_seed(0)
            gradients.append(objective_gradient(_recommended(threat=threat, inner_scale=scale), model, x, y))
        assert relative_error(*gradients) < 1e-12

    @pytest.mark.parametrize("loss_weight", [0.3, linear_ramp(0.6, duration=10)])
    def test_the_loss_has_its_weight(self, loss_weight: object) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        out = _recommended(loss_weight=loss_weight)(model, x, y, t=5)
        assert torch.allclose(out.total, 0.3 * out.loss, rtol=1e-12)

    def test_under_autocast_is_as_close_as_by_hand(self) -> None:
        model, (x, y) = make_model("conv", torch.float32), make_batch(8, dtype=torch.float32)

        def gradient(total_of: Callable[[], Tensor], enabled: bool) -> list[Tensor]:
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                total = total_of()
            return list(torch.autograd.grad(total, parameters_of(model)))

        by_hand = lambda: _by_hand(model, x, y, 0.5, Linf(0.1))  # noqa: E731
        exact = gradient(by_hand, enabled=False)
        found = relative_error(gradient(lambda: _recommended()(model, x, y).total, enabled=True), exact)
        expected = relative_error(gradient(by_hand, enabled=True), exact)
        assert expected > 0
        assert found < 1.5 * expected < 0.1

    def test_half_precision_is_refused(self) -> None:
        model, (x, y) = make_model("conv", torch.bfloat16), make_batch(dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="float32"):
            _recommended()(model, x, y)

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

        model, (x, y) = Quantiser(), make_batch(6)
        torch.manual_seed(0)
        _recommended()(model, x, y).total.backward()
        assert model.scale.grad is None
        torch.manual_seed(0)
        parameters = list(model.body.parameters())
        expected = torch.autograd.grad(_by_hand(model.body, x, y, 0.5, Linf(0.1)), parameters)
        assert relative_error([parameter.grad for parameter in parameters], list(expected)) < 1e-12

    @pytest.mark.parametrize("at", [NFGSM(Linf(0.1), share=0.5), FGSM(Linf(0.1)), PGDAttack(Linf(0.1))])
    def test_a_model_that_detaches_x_is_named(self, at: Attack) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        with pytest.raises(RuntimeError, match="depend"):
            PenalizedLoss(at=at)(nn.Sequential(_Detach(), model), x, y)

    def test_in_a_transform_it_changes_nothing(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        torch.manual_seed(0)
        found = grad(lambda p: _recommended()(lambda z: functional_call(model, p, (z,)), x, y).total)(parameters)
        torch.manual_seed(0)
        assert relative_error(list(found.values()), objective_gradient(_recommended(), model, x, y)) < 1e-12

    def test_micro_batches_are_the_batch(self) -> None:
        """Equal samples without noise, so that it does not matter which are drawn."""
        model, (x, y) = make_model("group_norm"), make_batch(8)
        x, y = x[:1].repeat(8, 1, 1, 1), y[:1].repeat(8)
        objective = PenalizedLoss(at=NFGSM(Linf(0.1), noise=0.0, share=0.5))
        whole = objective_gradient(objective, model, x, y)
        for part in (slice(0, 4), slice(4, 8)):
            (objective(model, x[part], y[part]).total / 2).backward()
        assert relative_error([parameter.grad for parameter in model.parameters()], whole) < 1e-12

    def test_model_and_objective_as_one_module(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        totals = []
        for total_of in (lambda: PenalizedModel(model, _recommended())(x, y), lambda: _recommended()(model, x, y)):
            torch.manual_seed(0)
            totals.append(total_of().total)
        assert torch.equal(*totals)


class TestBatchNorm:
    """In training mode, without a warning: the attack sees the statistics of its part, and one pass sees the whole."""

    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize("mode", ["keep", "eval"])
    def test_is_the_training_by_hand(self, share: float, mode: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch(8)
        model(torch.rand_like(x))  # so that the running statistics are some
        attacked, trained = copy.deepcopy(model).train(mode == "keep"), copy.deepcopy(model)
        torch.manual_seed(0)
        out = PenalizedLoss(at=NFGSM(Linf(0.1), share=share, mode=mode))(model, x, y)

        torch.manual_seed(0)
        mixed = (x + Linf(0.1).sample_like(x)).clamp(0, 1)
        taken = torch.randperm(8)[: round(8 * share)] if share < 1 else torch.arange(8)
        mixed[taken] = _attacked(attacked, mixed[taken], x[taken], y[taken], Linf(0.1))
        expected = F.cross_entropy(trained(mixed), y)
        assert torch.allclose(out.x, mixed, atol=1e-12)
        assert relative_error(out.total, expected) < 1e-12
        gradients = [torch.autograd.grad(t, parameters_of(m)) for t, m in ((out.total, model), (expected, trained))]
        assert relative_error(*map(list, gradients)) < 1e-12
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), trained.buffers(), strict=True))
        assert model.training
        assert model[1].training

    @pytest.mark.parametrize(
        "at",
        [
            Noise(Linf(0.1)), FGSM(Linf(0.1)), NFGSM(Linf(0.1)), PGDAttack(Linf(0.1), steps=3),
            APGDAttack(Linf(0.1), steps=3), RandomSearch(Linf(0.1), queries=3),
        ],
        ids=lambda at: at.name,
    )  # fmt: skip
    @pytest.mark.parametrize("net", ["batch_norm_train", "batch norm and dropout"])
    def test_statistics_move_once_and_are_those_of_the_attacked_batch(self, at: Attack, net: str) -> None:
        if net == "batch_norm_train":
            model = make_model(net)
        else:
            layers = (
                nn.Conv2d(2, 6, 3),
                nn.BatchNorm2d(6),
                nn.GELU(),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(96, CLASSES),
            )
            model = nn.Sequential(*layers).double()
        twin, (x, y) = copy.deepcopy(model), make_batch(8)
        out = PenalizedLoss(at=at)(model, x, y)
        twin(out.x)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
        assert model[1].num_batches_tracked == 1


PLACES: dict[str, Attack] = {
    "noise": Noise(Linf(0.1)),
    "FGSM": FGSM(Linf(0.1)),
    "FGSM, L2": FGSM(L2(0.5)),
    "N-FGSM": NFGSM(Linf(0.1), noise=2.0, bounds=None),
    "N-FGSM of half": NFGSM(Linf(0.1), share=0.5),
    "PGD": PGDAttack(Linf(0.1), steps=3, step_size=0.07, best=False),
    "PGD, best": PGDAttack(L1(1.0), steps=3),
    "APGD": APGDAttack(Linf(0.1), steps=4),
    "APGD-T": TargetedAPGDAttack(Linf(0.1), steps=4),
    "random search": RandomSearch(Linf(0.1), queries=5),
    "transfer": TransferAttack(PGDAttack(Linf(0.1), steps=2), make_model("mlp", seed=5)),
}


class TestAnyAttack:
    @pytest.mark.parametrize("name", PLACES)
    @pytest.mark.parametrize("net", ["conv", "group_norm"])
    def test_is_where_the_loss_is_taken(self, name: str, net: str) -> None:
        model, (x, y), at = make_model(net), make_batch(6), PLACES[name]
        torch.manual_seed(0)
        out = PenalizedLoss(at=at)(model, x, y)
        torch.manual_seed(0)
        assert torch.allclose(out.x, at(model, x, y), atol=1e-12)
        found = list(torch.autograd.grad(out.total, parameters_of(model)))
        expected = torch.autograd.grad(F.cross_entropy(model(out.x), y), parameters_of(model))
        assert relative_error(found, list(expected)) < 1e-12

    @pytest.mark.parametrize("name", PLACES)
    @pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
    def test_penalties_are_taken_there_too(self, name: str, differentiation: Differentiation) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        terms = {**GRAD_NORM, "e": EDGES["p"]}
        out = _objective(terms, at=PLACES[name], differentiation=differentiation)(model, x, y)
        found = list(torch.autograd.grad(out.total, parameters_of(model)))
        there = _objective(terms, differentiation=differentiation)(model, out.x, y)
        assert relative_error(found, list(torch.autograd.grad(there.total, parameters_of(model)))) < 1e-11
        for term, values in there.penalties.items():
            assert torch.allclose(out.penalties[term], values, rtol=1e-11)

    @pytest.mark.parametrize("name", PLACES)
    def test_leaves_the_model_as_it_was(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_eval"), make_batch(6)
        model[0].train()
        flags, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
        before = x.clone()
        PenalizedLoss(at=PLACES[name])(model, x, y)
        assert [module.training for module in model.modules()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert torch.equal(x, before)

    @pytest.mark.parametrize("name", PLACES)
    def test_a_validation_loss_needs_no_grad(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        torch.manual_seed(0)
        expected = PenalizedLoss(at=PLACES[name])(model, x, y).loss
        torch.manual_seed(0)
        with torch.no_grad():
            out = PenalizedLoss(at=PLACES[name])(model, x, y)
        assert torch.allclose(out.loss, expected, rtol=1e-12)
        assert not out.total.requires_grad

    def test_a_dropped_unit_is_dropped_by_attack_and_training(self) -> None:
        """A network that drops half of its units is attacked and trained as one and the same network."""
        model, (x, y) = make_model("dropout_eval").train(), make_batch(6)
        # None of these draws a number of its own from the default generator.
        for at in (FGSM(Linf(0.1)), PGDAttack(Linf(0.1), steps=2, random_start=False), APGDAttack(Linf(0.1), seed=0)):
            torch.manual_seed(0)
            out = PenalizedLoss(at=at)(model, x, y)
            torch.manual_seed(0)
            masked = model(out.x)
            assert torch.allclose(out.logits, masked, rtol=1e-12)

    def test_step_sizes_and_radii_of_each_sample(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(6)
        radii = torch.linspace(0.01, 0.06, 6, dtype=x.dtype).view(6, 1, 1, 1)
        bounds = torch.zeros(6, 1, 1, 1, dtype=x.dtype), torch.ones(6, 1, 1, 1, dtype=x.dtype)
        out = PenalizedLoss(at=NFGSM(Linf(radii), share=0.5, bounds=bounds))(model, x, y)
        moved = (out.x - x).abs().flatten(1).amax(1)
        assert (moved <= 2 * radii.flatten() + 1e-12).all()
        assert (moved > radii.flatten() * 1.01).sum() == 3


class TestFiniteDifferenceBias:
    """Of the loss 1/2 sum theta_i x_i^2 the gradient is theta x, the penalty eps sum |theta_i x_i|."""

    def test_is_half_a_step_times_the_curvature(self) -> None:
        theta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -0.7]], dtype=torch.float64)
        total = _quadratic(theta, FiniteDifference(0.5))(x)
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

"""What has a state: controllers, remembered starts, the alarm for collapse; and weights that are moved and put back."""

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradreg import (
    FGSM,
    L2,
    NFGSM,
    CollapseAlarm,
    Controller,
    ConvergenceWeight,
    GradNormPenalty,
    GradregWarning,
    Linf,
    LocalLinearity,
    LogitPairing,
    Noise,
    PenalizedLoss,
    PGDAttack,
    Point,
    RememberedStart,
    SpikeWeight,
    Term,
    adversarial_weights,
    cross_entropy,
    evaluate,
    input_gradient,
    preflight,
)

from cases import make_batch, make_model, parameters_of, soft_labels

BALL = Linf(0.1)
HERE = {"p": Term(GradNormPenalty(BALL))}


def saved_and_loaded(objective: PenalizedLoss, fresh: PenalizedLoss) -> PenalizedLoss:
    """The fresh objective with the state of the other one, through a file."""
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# Controllers


def spikes(errors: list[float], peak: float, decay: float, deviations: float) -> Iterator[float]:
    """The rule of ELLE-A, as its authors run it: the weight at each step, from the errors before."""
    weight, history = 0.0, []
    for error in errors:
        if len(history) > 2:
            mean = sum(history) / len(history)
            std = (sum((value - mean) ** 2 for value in history) / len(history)) ** 0.5
            spike = error > mean + deviations * std
        else:
            spike = False
        weight = peak if spike else decay * weight
        history.append(error)
        yield weight


def test_spike_weight_is_the_rule_of_elle_a() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(200, generator=generator, dtype=torch.float64)
    errors[::17] += 3
    controller = SpikeWeight("line", peak=5.0, decay=0.9, deviations=1.5)
    found = [float(controller(None, {"line": error})) for error in errors]
    assert found == pytest.approx(list(spikes(errors.tolist(), 5.0, 0.9, 1.5)), rel=1e-5)
    assert max(found) == 5.0
    assert found[3] == 0


def test_a_step_in_which_nothing_was_measured_does_not_count() -> None:
    controller = SpikeWeight("line", peak=5.0)
    for error in (1.0, torch.nan, 1.0, torch.nan, 1.1):
        controller(None, {"line": torch.tensor(error)})
    assert int(controller.seen) == 3
    assert float(controller.mean) == pytest.approx(3.1 / 3)


def test_convergence_weight_compares_with_the_last_period() -> None:
    controller = ConvergenceWeight(period=3, tolerance=0.1, weight=2.0, name="loss")
    losses = [torch.nan, 1.0, 1.3, 1.3, 1.25, 1.0, 1.4, 2.0]
    found = [controller(t, {"loss": torch.tensor(loss)}) for t, loss in enumerate(losses)]
    # The first period has a mean of 1.2; the second of 3.65 / 3.
    assert found == [0, 0, 0, 0, 0, -2, 2, 2]


def test_a_weight_sees_what_the_last_step_measured() -> None:
    seen: list[dict[str, float]] = []

    def weight(t: float | None, measured: Any) -> float:
        seen.append({name: float(value) for name, value in measured.items()})
        return 0.0 if t == 1 else 2.0

    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(terms={"p": Term(GradNormPenalty(BALL), weight)}, at=NFGSM(BALL, noise=0.0))
    outs = [objective(model, x, y, t=t) for t in range(3)]
    assert all(value != value for value in seen[0].values())
    assert list(seen[0]) == ["loss", "start", "p"]
    assert seen[1]["loss"] == pytest.approx(outs[0].loss.item())
    assert seen[1]["start"] == pytest.approx(cross_entropy(model(x), y).mean().item())
    assert (
        seen[1]["p"] == seen[2]["p"] == pytest.approx(outs[0].penalties["p"].mean().item())
    )  # at step 1 it was not computed
    assert not outs[1].penalties
    assert outs[2].total.item() == pytest.approx((outs[2].loss + 2 * outs[2].penalties["p"].mean()).item())


def test_the_weight_of_the_loss_may_be_controlled_too() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(loss_weight=lambda t, measured: 0.5 if measured["loss"] > 0 else 1.0)
    first, second = objective(model, x, y), objective(model, x, y)
    assert first.total.item() == first.loss.item()
    assert second.total.item() == pytest.approx(second.loss.item() / 2)


def test_a_tensor_of_0_is_a_weight_that_is_computed() -> None:
    """Whether it is 0 is not asked, as that would wait for the device."""
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(terms={"line": Term(LocalLinearity(BALL), SpikeWeight("line", 4.0))})
    out = objective(model, x, y)
    assert out.penalties["line"].shape == (5,)
    assert out.total.item() == out.loss.item()


def test_state_of_controllers_resumes() -> None:
    def make() -> PenalizedLoss:
        return PenalizedLoss(terms={"line": Term(LocalLinearity(BALL, seed=1), SpikeWeight("line", 4.0))})

    model, batches = make_model("conv", torch.float32), [make_batch(5, torch.float32, seed) for seed in range(8)]
    whole, first = make(), make()
    expected = [whole(model, *batch).total.item() for batch in batches]
    for batch in batches[:4]:
        first(model, *batch)
    second = saved_and_loaded(first, make())
    assert [second(model, *batch).total.item() for batch in batches[4:]] == expected[4:]


def test_an_objective_without_controllers_has_no_state() -> None:
    assert not PenalizedLoss(terms={"p": Term(GradNormPenalty(BALL), lambda t: 1.0)}, at=NFGSM(BALL)).state_dict()


def test_in_evaluation_mode_nothing_is_measured() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(terms={"line": Term(LocalLinearity(BALL), SpikeWeight("line", 4.0))})
    objective(model, x, y)
    before = copy.deepcopy(objective.state_dict())
    objective.eval()(model, x, y)
    objective.cost()
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_transform_has_no_place_for_a_state() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    objective = PenalizedLoss(terms={"line": Term(LocalLinearity(BALL), SpikeWeight("line", 4.0))})
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def total(weights: dict[str, Tensor]) -> Tensor:
        return objective(lambda z: torch.func.functional_call(model, weights, (z,)), x, y).total

    with pytest.raises(RuntimeError, match="state"):
        torch.func.grad(total)(weights)


def test_preflight_tries_a_controlled_term() -> None:
    model, (x, y) = make_model("mlp", torch.float32), make_batch(dtype=torch.float32)
    controller = SpikeWeight("p", 4.0)
    objective = PenalizedLoss(terms={"p": Term(GradNormPenalty(BALL), controller)})
    assert preflight(objective, model, x, y).ok
    assert int(controller.seen) == 0


def test_preflight_tries_a_remembered_start() -> None:
    model, (x, y) = make_model("mlp", torch.float32), make_batch(dtype=torch.float32)
    start = RememberedStart((2, 6, 6), per="sample", count=5)
    objective = PenalizedLoss(at=NFGSM(BALL, start=start))
    assert preflight(objective, model, x, y, index=torch.arange(5)).ok
    assert not preflight(objective, model, x, y).ok
    assert not start.perturbations.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_is_never_cast(dtype: torch.dtype) -> None:
    """In bfloat16 a count ends at 256."""
    controller, alarm = SpikeWeight("line", peak=5.0), CollapseAlarm()
    objective = PenalizedLoss(terms={"line": Term(GradNormPenalty(BALL), controller)}, at=FGSM(BALL), alarm=alarm)
    objective.to(dtype)
    for _ in range(300):
        controller(None, {"line": torch.tensor(1.0, dtype=dtype)})
    assert int(controller.seen) == 300
    assert {buffer.dtype for buffer in objective.buffers()} == {torch.float32}


def test_what_is_not_finite_does_not_count() -> None:
    controller = SpikeWeight("line", peak=5.0)
    for error in (1.0, torch.inf, 1.1, torch.nan, 0.9, 1.0, 9.0):
        found = controller(None, {"line": torch.tensor(error)})
    assert float(found) == 5.0


def test_names_of_terms_are_not_those_of_the_loss_and_controllers_belong_to_one() -> None:
    for name in ("loss", "start"):
        with pytest.raises(ValueError, match="name"):
            PenalizedLoss(terms={name: Term(GradNormPenalty(BALL), SpikeWeight(name, 1.0))})
        PenalizedLoss(terms={name: Term(GradNormPenalty(BALL))})
    with pytest.raises(ValueError, match="start"):
        PenalizedLoss(terms={"a": Term(GradNormPenalty(BALL), ConvergenceWeight(3))})
    weight = SpikeWeight("a", 1.0)
    with pytest.raises(ValueError, match="controller"):
        PenalizedLoss(terms={"a": Term(GradNormPenalty(BALL), weight), "b": Term(GradNormPenalty(BALL), weight)})
    model, batch = make_model("conv"), make_batch()
    with pytest.raises(ValueError, match="typo"):
        PenalizedLoss(terms={"a": Term(GradNormPenalty(BALL), SpikeWeight("typo", 1.0))})(model, *batch)


@pytest.mark.usefixtures("unchecked")
def test_controllers_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="period"):
        ConvergenceWeight(0)
    with pytest.raises(TypeError):
        Controller()


# Starts that remember


def test_the_start_of_each_sample_is_last_steps_projected_ascent() -> None:
    """As written for FGSM-MEP: momentum of gradients of length 1, and a step along its sign."""
    model, (x, y) = make_model("conv"), make_batch()
    start = RememberedStart((2, 6, 6), per="sample", count=9, momentum=0.3, step=0.5)
    objective = PenalizedLoss(at=NFGSM(BALL, noise=0.0, start=start, bounds=None))
    index = torch.tensor([8, 0, 3, 4, 1])
    kept, slope = torch.zeros(5, 2, 6, 6, dtype=torch.float64), torch.zeros(5, 2, 6, 6, dtype=torch.float64)
    for _ in range(3):
        out = objective(model, x, y, index=index)
        z = (x + kept).requires_grad_()
        grad = input_gradient(cross_entropy(model(z), y), z)
        torch.testing.assert_close(out.x, x + kept + 0.1 * grad.sign(), rtol=1e-6, atol=1e-7)
        slope = 0.3 * slope + grad / grad.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
        kept = (kept + 0.05 * slope.sign()).clamp(-0.1, 0.1).detach()
        torch.testing.assert_close(start.perturbations[index].double(), kept, rtol=1e-6, atol=1e-7)
    assert not start.perturbations[[2, 5, 6, 7]].any()


def test_the_start_of_a_class_is_of_its_mean_gradient() -> None:
    model, x, y = make_model("conv"), make_batch(6)[0], torch.tensor([0, 0, 2, 2, 2, 0])
    start = RememberedStart((2, 6, 6), per="class", count=4)
    at = PGDAttack(BALL, steps=1, step_size=0.1, best=False, random_start=False, start=start)
    PenalizedLoss(at=at)(model, x, y)
    z = x.clone().requires_grad_()
    grad = input_gradient(cross_entropy(model(z), y), z)
    grad = grad / grad.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
    for kind in (0, 2):
        torch.testing.assert_close(
            start.perturbations[kind].double(), 0.1 * grad[y == kind].mean(0).sign(), rtol=1e-6, atol=0
        )
    assert not start.perturbations[[1, 3]].any()
    out = PenalizedLoss(at=at)(model, x, soft_labels(y))
    assert (out.x - x).abs().max() <= 0.1 + 1e-9


def test_one_start_for_all_raises_the_loss_of_all() -> None:
    model, (x, y) = make_model("conv"), make_batch(8)
    start = RememberedStart((2, 6, 6), step=0.2)
    objective = PenalizedLoss(at=NFGSM(L2(1.0), noise=0.0, start=start, bounds=None))
    for _ in range(20):
        objective(model, x, y)
    assert start.perturbations.norm() == pytest.approx(1.0, rel=1e-5)
    assert cross_entropy(model(x + start.perturbations), y).mean() > cross_entropy(model(x), y).mean()


def test_a_tensor_may_be_a_start() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    start = 0.05 * torch.randn(2, 6, 6, dtype=torch.float64).sign()
    out = PenalizedLoss(at=NFGSM(Linf(0.0), noise=0.0, start=start))(model, x, y)
    assert torch.equal(out.x, (x + start).clamp(0, 1))
    found = PenalizedLoss(at=PGDAttack(BALL, steps=1, step_size=1e-12, random_start=False, best=False, start=start))
    torch.testing.assert_close(found(model, x, y).x, (x + start).clamp(0, 1))


def test_what_is_not_in_the_batch_or_not_finite_stays() -> None:
    model, x = make_model("conv"), make_batch(6)[0]
    start = RememberedStart((2, 6, 6), per="class", count=4, momentum=0.5, step=0.1)
    objective = PenalizedLoss(at=NFGSM(BALL, noise=0.0, start=start, bounds=None))
    objective(model, x, torch.tensor([0, 0, 0, 1, 1, 1]))
    before = start.perturbations.clone()
    objective(model, x, torch.tensor([2, 2, 2, 3, 3, 3]))
    assert torch.equal(start.perturbations[:2], before[:2])
    point = Point(model, cross_entropy, x, torch.tensor([0, 0, 0, 1, 1, 1]))
    start.update(point, torch.full_like(x, torch.nan), BALL)
    assert torch.equal(start.perturbations[:2], before[:2])
    assert start.momentum_buffer.isfinite().all()


def test_a_radius_for_each_sample_is_kept_for_each_sample() -> None:
    model, (x, y) = make_model("conv"), make_batch(6)
    radii = torch.linspace(0.1, 0.01, 6, dtype=torch.float64).view(6, 1, 1, 1)
    start = RememberedStart((2, 6, 6), per="sample", count=6, step=3.0)
    for share in (1.0, 0.5):
        attack = NFGSM(Linf(radii), noise=0.0, start=start, bounds=None, share=share)
        PenalizedLoss(at=attack)(model, x, y, index=torch.arange(6))
        assert (start.perturbations.flatten(1).abs().amax(1) <= radii.flatten() + 1e-7).all()
    with pytest.raises(ValueError, match="each sample"):
        PenalizedLoss(at=NFGSM(Linf(radii), start=RememberedStart((2, 6, 6))))(model, x, y)


def test_a_start_inside_a_pairing_belongs_to_the_objective() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    start = RememberedStart((2, 6, 6))
    objective = PenalizedLoss(terms={"kl": Term(LogitPairing("kl", NFGSM(BALL, start=start)))})
    objective.cost()
    objective.eval()(model, x, y)
    assert not start.perturbations.any()
    assert any(name.endswith("_extra_state") for name in objective.state_dict())
    objective.train()(model, x, y)
    assert start.perturbations.any()


def test_states_do_not_change_inside_a_transform() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for objective in (
        PenalizedLoss(at=NFGSM(BALL, start=RememberedStart((2, 6, 6)))),
        PenalizedLoss(at=FGSM(BALL), alarm=CollapseAlarm()),
    ):
        with pytest.raises(RuntimeError, match="transform"):
            torch.func.grad(
                lambda w, objective=objective: (
                    objective(lambda z: torch.func.functional_call(model, w, (z,)), x, y).total
                )
            )(weights)


def test_a_start_moves_with_the_crop_of_its_sample() -> None:
    flips = torch.tensor([True, False, True])

    def flipped(start: Tensor, index: Tensor) -> Tensor:
        return torch.where(flips[index].view(-1, 1, 1, 1), start.flip(3), start)

    model, (x, y) = make_model("conv"), make_batch(3)
    plain = RememberedStart((2, 6, 6), per="sample", count=3)
    moved = RememberedStart((2, 6, 6), per="sample", count=3, transforms=(flipped, flipped))
    for start in (plain, moved):
        PenalizedLoss(at=NFGSM(BALL, noise=0.0, start=start))(model, x, y, index=torch.arange(3))
    torch.testing.assert_close(moved.perturbations, flipped(plain.perturbations, torch.arange(3)))


def test_starts_are_kept_in_training_alone_and_resume() -> None:
    def make() -> PenalizedLoss:
        start = RememberedStart((2, 6, 6), per="sample", count=5, momentum=0.5)
        return PenalizedLoss(at=NFGSM(BALL, noise=0.0, start=start))

    model, (x, y), index = make_model("conv"), make_batch(), torch.arange(5)
    objective = make()
    objective(model, x, y, index=index)
    resumed, before = saved_and_loaded(objective, make()), objective.at.start.perturbations.clone()
    assert torch.equal(resumed.at.start.perturbations, before)
    assert torch.equal(resumed.at.start.momentum_buffer, objective.at.start.momentum_buffer)
    objective.eval()(model, x, y, index=index)
    objective.at(model, x, y)
    evaluate(model, [(x, y)], [objective.at], masking=0, progress=False)
    objective.cost()
    assert torch.equal(objective.at.start.perturbations, before)
    with pytest.raises(ValueError, match="shape"):
        RememberedStart((2, 6, 6), per="sample", count=4).set_extra_state(objective.at.start.get_extra_state())


@pytest.mark.usefixtures("unchecked")
def test_starts_say_what_they_need() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    for wrong in ({"per": "image"}, {"count": 3}, {"momentum": 1.0}, {"step": 0.0}):
        with pytest.raises(ValueError, match="RememberedStart"):
            RememberedStart((2, 6, 6), **wrong)
    with pytest.raises(ValueError, match="index"):
        PenalizedLoss(at=NFGSM(BALL, start=RememberedStart((2, 6, 6), per="sample", count=5)))(model, x, y)
    with pytest.raises(ValueError, match="shape"):
        PenalizedLoss(at=NFGSM(BALL, start=RememberedStart((3, 6, 6))))(model, x, y)
    start = RememberedStart((2, 6, 6), per="class", count=4)
    labels = {"class": y}
    criterion = lambda logits, y: cross_entropy(logits, y["class"])  # noqa: E731
    with pytest.raises(ValueError, match="class"):
        PenalizedLoss(criterion, at=NFGSM(BALL, start=start))(model, x, labels)


# The alarm


class Curled(nn.Module):
    """A loss that rises from the image at first and has fallen below where it was at the end of a full step."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor(frequency, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        wave = (self.frequency * x).sin().flatten(1).sum(1)
        return torch.stack([-wave, wave], 1)


def observed(alarm: CollapseAlarm, frequency: float, steps: int, at: Any = None) -> list[str]:
    """The warnings of some steps."""
    objective = PenalizedLoss(at=FGSM(Linf(1.0), bounds=None) if at is None else at, alarm=alarm)
    model, x, y = Curled(frequency), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for _ in range(steps):
            objective(model, x, y).total.backward()
    return [str(one.message) for one in caught if issubclass(one.category, GradregWarning)]


def test_a_collapse_is_heard_with_its_evidence() -> None:
    alarm = CollapseAlarm(period=3)
    assert not observed(alarm, 0.5, 7)
    assert float(alarm.fallen) == 0
    assert float(alarm.cosine) == pytest.approx(1.0)
    heard = observed(alarm, 4.5, 6)
    assert heard
    assert "100 %" in heard[-1]
    assert "-1.00 (1.00" in heard[-1]


def test_no_alarm_where_training_is_sound() -> None:
    model, (x, y) = make_model("mlp", torch.float32), make_batch(32, torch.float32)
    alarm = CollapseAlarm(period=5)
    objective = PenalizedLoss(at=NFGSM(Linf(0.05), share=0.5), alarm=alarm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(action="error"):
        for _ in range(31):
            optimizer.zero_grad()
            objective(model, x, y).total.backward()
            optimizer.step()
    assert float(alarm.cosine) > 0.5


def test_the_alarm_changes_nothing() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    for terms in ({}, HERE):
        plain = PenalizedLoss(terms=terms, at=NFGSM(BALL, noise=0.0))
        watched = PenalizedLoss(terms=terms, at=NFGSM(BALL, noise=0.0), alarm=CollapseAlarm(1))
        gradients = []
        for objective in (plain, watched):
            model.zero_grad()
            objective(model, x, y).total.backward()
            gradients.append([weight.grad.clone() for weight in parameters_of(model)])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        assert plain.cost() == watched.cost()


def test_the_alarm_knows_the_cosine_of_the_two_gradients() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    alarm = CollapseAlarm(period=1)
    objective = PenalizedLoss(at=FGSM(BALL), alarm=alarm)
    for _ in range(2):
        out = objective(model, x, y)
        out.total.backward()
    grads = []
    for z in (x, out.x):
        leaf = z.clone().requires_grad_()
        grads.append(input_gradient(cross_entropy(model(leaf), y), leaf).flatten(1))
    assert float(alarm.cosine) == pytest.approx(torch.cosine_similarity(*grads).mean().item(), rel=1e-5)


def test_the_alarm_resumes_and_needs_a_step() -> None:
    def make() -> PenalizedLoss:
        return PenalizedLoss(at=FGSM(BALL), alarm=CollapseAlarm(2))

    model, (x, y) = make_model("conv"), make_batch()
    objective = make()
    for _ in range(3):
        objective(model, x, y).total.backward()
    resumed = saved_and_loaded(objective, make())
    assert torch.equal(resumed.alarm.found, objective.alarm.found) or resumed.alarm.found.isnan().any()
    assert resumed.alarm.steps == 3
    for at in (None, Noise(BALL)):
        with pytest.raises(RuntimeError, match="CollapseAlarm"):
            PenalizedLoss(at=at, alarm=CollapseAlarm())(model, x, y)
    with pytest.raises(ValueError, match="period"):
        CollapseAlarm(0)
    with pytest.raises(ValueError, match="keep"):
        PenalizedLoss(at=FGSM(BALL, mode="eval"), alarm=CollapseAlarm())(model, x, y)


# Weights that are moved


def test_adversarial_weights_are_those_of_the_paper_and_leave_no_trace() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    before = copy.deepcopy(model.state_dict())
    loss = cross_entropy(model(x), y).mean()
    slopes = dict(
        zip(before, torch.autograd.grad(cross_entropy(model(x), y).mean(), parameters_of(model)), strict=True)
    )
    with adversarial_weights(model, loss, gamma=0.01):
        for name, weight in model.named_parameters():
            step = slopes[name] * (0.01 * before[name].norm() / slopes[name].norm()) if weight.ndim > 1 else 0
            torch.testing.assert_close(weight.detach(), before[name] + step)
        worse = cross_entropy(model(x), y).mean()
        worse.backward()
    assert worse > loss
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is not None for weight in parameters_of(model))


def test_adversarial_weights_leave_normalisations_alone() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.LayerNorm((6, 4, 4)), nn.GELU(), nn.Flatten(), nn.Linear(96, 4)]
    model, (x, y) = nn.Sequential(*layers).double(), make_batch()
    before = copy.deepcopy(model.state_dict())
    with adversarial_weights(model, cross_entropy(model(x), y).mean()):
        cross_entropy(model(x), y).mean().backward()
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"0.weight", "5.weight"}
    assert int(model[1].num_batches_tracked) == 1


def test_adversarial_weights_are_put_back_after_an_error() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), adversarial_weights(model, cross_entropy(model(x), y).mean()):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

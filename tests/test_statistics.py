"""Statistics: closed forms, slow references, one contract for all, streaming in any batches, and what is undefined."""

import copy
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import (
    FGSM,
    L1,
    L2,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientPenalty,
    GradNormPenalty,
    GradregWarning,
    HessianNorm,
    Linf,
    LocalLinearity,
    NormalizedCurvature,
    PenalizedLoss,
    Penalty,
    PGDAttack,
    Point,
    StateError,
    Term,
    contour_energy,
    cross_entropy,
    evaluate,
    oriented_energy,
    predicted_class,
    true_class,
)
from gradreg import statistics as gs
from gradreg.differentiation import Differentiation, DoubleBackward, InputOnly
from gradreg.penalties import hessian_product
from gradreg.statistics import (
    EdgeCorrelation,
    LogHistogram,
    Loss,
    Measurements,
    Moments,
    SignAgreement,
    Summary,
    gradient_histograms,
    measure,
    measure_along,
    pearson,
)

from cases import (
    FUNCTIONAL,
    make_batch,
    make_model,
    parameters_of,
    per_sample_cross_entropy,
    relative_error,
    soft_labels,
)

ZERO = torch.zeros(1, dtype=torch.long)
NORMS = {1: Linf(1.0), 2: L2(1.0), math.inf: L1(1.0)}  # the threat model whose dual norm it is


def values(
    penalty: Callable[[Point], Tensor],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """What is measured of a batch."""
    return penalty(Point(model, cross_entropy, x, y, differentiation=InputOnly(), index=index, look=False)).detach()


class LossIs(nn.Module):
    """Logits of two classes whose cross-entropy with class 0 is a given positive function of x."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        loss = self.loss(x)
        return torch.stack([torch.zeros_like(loss), loss + torch.log(-torch.expm1(-loss))], 1)


def quadratic(matrix: Tensor, slope: Tensor, height: float = 9.0) -> LossIs:
    return LossIs(lambda x: height + x @ slope + 0.5 * ((x @ matrix) * x).sum(1))


def symmetric(size: int) -> Tensor:
    matrix = torch.randn(size, size, dtype=torch.float64)
    return (matrix + matrix.T) / 2


def reference_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One sample at a time, by torch.func."""
    one = torch.func.grad(lambda z, label: F.cross_entropy(model(z[None]), label[None]))
    return torch.stack([one(z, label) for z, label in zip(x, y, strict=True)])


# Closed forms


class TestQuadraticLoss:
    """Value c + b.x + x.A x / 2: its gradient is b + A x, its Hessian A."""

    @pytest.mark.parametrize("estimate", ["norm", "rayleigh"])
    @pytest.mark.parametrize("start", ["random", "gradient"])
    def test_spectral_norm(self, estimate: str, start: str) -> None:
        matrix, x = symmetric(6), 0.1 * torch.randn(4, 6, dtype=torch.float64)
        model = quadratic(matrix, torch.randn(6, dtype=torch.float64))
        found = values(HessianNorm(iterations=400, estimate=estimate, start=start), model, x, ZERO.expand(4))
        expected = torch.linalg.eigvalsh(matrix).abs().max()
        torch.testing.assert_close(found, expected.expand(4), rtol=1e-4, atol=0)

    def test_two_eigenvalues_of_opposite_sign(self) -> None:
        """The length of the product finds them, its share along the direction need not."""
        model = quadratic(torch.diag(torch.tensor([2.0, -2.0])).double(), torch.zeros(2).double())
        batch = torch.zeros(3, 2).double(), ZERO.expand(3)
        torch.testing.assert_close(values(HessianNorm(iterations=3), model, *batch), torch.full((3,), 2.0).double())
        share = values(HessianNorm(iterations=3, estimate="rayleigh", seed=0), model, *batch)
        assert (share < 1.99).any()

    def test_the_path_rises_to_the_norm(self) -> None:
        matrix = symmetric(6)
        model = quadratic(matrix, torch.zeros(6).double())
        path = values(HessianNorm(iterations=40).path, model, torch.zeros(2, 6).double(), ZERO.expand(2))
        assert path.shape == (2, 40)
        assert (path.diff(dim=1) >= -1e-12).all()
        assert (path <= torch.linalg.eigvalsh(matrix).abs().max() + 1e-9).all()

    def test_the_first_product_is_with_the_gradient_and_where_there_is_none_with_chance(self) -> None:
        matrix, slope = symmetric(5), torch.randn(5, dtype=torch.float64)
        first = HessianNorm(iterations=1, start="gradient")
        found = values(first, quadratic(matrix, slope), torch.zeros(1, 5).double(), ZERO)
        torch.testing.assert_close(found, (matrix @ slope).norm()[None] / slope.norm())
        at_the_bottom = LossIs(lambda z: 9 + 0.5 * ((z @ matrix) * z).sum(1))
        both = values(first, at_the_bottom, torch.stack([torch.zeros(5).double(), slope]), ZERO.expand(2))
        assert 0 < both[0] <= torch.linalg.eigvalsh(matrix).abs().max()
        torch.testing.assert_close(both[1], (matrix @ matrix @ slope).norm() / (matrix @ slope).norm())

    def test_curvature(self) -> None:
        matrix, slope = symmetric(5), torch.randn(5, dtype=torch.float64)
        x = 0.1 * torch.randn(3, 5, dtype=torch.float64)
        found = values(NormalizedCurvature(iterations=400, offset=0.25), quadratic(matrix, slope), x, ZERO.expand(3))
        expected = torch.linalg.eigvalsh(matrix).abs().max() / ((slope + x @ matrix).norm(dim=1) + 0.25)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("seed", [0, None])
    def test_local_linearity(self, seed: int | None) -> None:
        """Between a and b the loss sags by s (1 - s) / 2 (b - a).A (b - a), whatever its slope."""
        matrix = symmetric(4)
        model = quadratic(matrix, torch.randn(4, dtype=torch.float64))
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        x = 0.1 * torch.randn(3, 4, dtype=torch.float64)
        for squared in (True, False):
            found = values(LocalLinearity(Linf(0.5), squared=squared, seed=seed), model, x, ZERO.expand(3))
            between, first, second = seen
            seen.clear()
            assert all(((z - x).abs() <= 0.5).all() for z in (between, first, second))
            way = second - first
            share = ((between - first) * way).sum(1) / way.square().sum(1)
            assert ((share >= 0) & (share <= 1)).all()
            torch.testing.assert_close(between, first + share[:, None] * way)
            sag = share * (1 - share) / 2 * ((way @ matrix) * way).sum(1)
            expected = sag.square() if squared else sag.abs()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_logistic_loss() -> None:
    """log(1 + exp(-w.x)) has the gradient -s w and the Hessian s (1 - s) w w, with s = 1 / (1 + exp(w.x))."""
    w, x = torch.randn(7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    model = nn.Linear(7, 2, bias=False).double()
    model.weight.data = torch.stack([w, torch.zeros_like(w)])
    s, batch = torch.sigmoid(-(x @ w)), (x, ZERO.expand(4))
    for p, size in ((1, w.abs().sum()), (2, w.norm()), (math.inf, w.abs().max())):
        torch.testing.assert_close(values(GradNormPenalty(NORMS[p]), model, *batch), s * size)
    norm = s * (1 - s) * w.square().sum()
    torch.testing.assert_close(values(HessianNorm(), model, *batch), norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(values(Loss(), model, *batch), F.softplus(-(x @ w)))


def test_a_loss_linear_in_x_is_straight() -> None:
    model = LossIs(lambda x: 5 + x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    batch = torch.rand(4, 3, dtype=torch.float64), ZERO.expand(4)
    assert (values(LocalLinearity(Linf(0.5)), model, *batch) < 1e-24).all()
    assert (values(HessianNorm(), model, *batch) < 1e-9).all()
    assert (values(NormalizedCurvature(), model, *batch) < 1e-9).all()
    assert (values(SignAgreement(Linf(0.5)), model, *batch) == 1).all()
    assert values(HessianNorm(), nn.Linear(3, 1).double(), *batch).tolist() == [0.0] * 4  # one class: loss 0


@pytest.mark.parametrize("energy", [oriented_energy, contour_energy])
def test_a_gradient_that_is_its_own_edge_map(energy: Callable[..., Tensor]) -> None:
    x = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    edges = energy(x).flatten()
    for sign in (1, -1):
        model = nn.Sequential(nn.Flatten(), LossIs(lambda z, sign=sign: 50 + sign * z @ edges))
        for edges_only in (False, True):
            correlation = EdgeCorrelation(energy=energy, edges_only=edges_only, clamp=1e-12)
            assert values(correlation, model, x, ZERO).item() == pytest.approx(1)


# References


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_gradient_norms_are_those_of_each_sample_alone(name: str) -> None:
    model, (x, y) = make_model(name).eval(), make_batch()
    grads = reference_gradients(model, x, y).flatten(1)
    for p, threat in NORMS.items():
        found = values(GradNormPenalty(threat), model, x, y)
        torch.testing.assert_close(found, torch.linalg.vector_norm(grads, p, dim=1))


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_spectral_norm_is_the_largest_eigenvalue(name: str) -> None:
    model, (x, y) = make_model(name), make_batch(3)
    found = values(HessianNorm(iterations=500), model, x, y)
    for value, z, label in zip(found, x, y, strict=True):
        hessian = torch.func.hessian(lambda v, k: F.cross_entropy(model(v.view(1, 2, 6, 6)), k))(
            z.flatten(), label[None]
        )
        assert value.item() == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("channels", ["sum", "max"])
@pytest.mark.parametrize("edges_only", [False, True])
@pytest.mark.parametrize("of", [None, predicted_class()])
def test_edge_correlation_is_that_of_numpy(of: object, edges_only: bool, channels: str) -> None:
    model, (x, y) = make_model("conv"), make_batch(4)
    x[0] = (x[0] > 0.5).double()
    statistic = EdgeCorrelation(of=of, channels=channels, edges_only=edges_only, clamp=0.2, sigma=0.6)
    grads = reference_gradients(model, x, y).detach()
    if of is not None:
        chosen = model(x).argmax(1)
        one = torch.func.grad(lambda z, k: model(z[None])[0][k])
        grads = torch.stack([one(z, k).detach() for z, k in zip(x, chosen, strict=True)])
    sizes = grads.abs().sum(1) if channels == "sum" else grads.abs().amax(1)
    energies = contour_energy(x, sigma=0.6)[:, 0]
    expected = []
    for size, energy in zip(sizes.numpy(), energies.numpy(), strict=True):
        kept = energy > 0.2 if edges_only else np.ones_like(energy, dtype=bool)
        expected.append(np.corrcoef(np.log(size[kept]), np.log(np.maximum(energy, 0.2)[kept]))[0, 1])
    np.testing.assert_allclose(values(statistic, model, x, y).numpy(), expected, rtol=1e-9)


def test_sign_agreement_counts_equal_signs() -> None:
    model, (x, y) = make_model("mlp"), make_batch(3)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    found = values(SignAgreement(L2(2.0), seed=3), model, x, y)
    signs = [reference_gradients(model, z, y).sign() for z in seen[:2]]
    torch.testing.assert_close(found, (signs[0] == signs[1]).double().flatten(1).mean(1))
    assert (found < 1).any()
    moved = next(z for z in seen[:2] if not torch.equal(z, x))
    assert (L2(2.0).norm(moved - x) <= 1 + 1e-9).all()


def test_soft_labels() -> None:
    model, (x, y) = make_model("conv"), make_batch(3)
    hard = F.one_hot(y, 4).double()
    for statistic in (Loss(), GradNormPenalty(Linf(1.0)), HessianNorm(seed=0)):
        torch.testing.assert_close(values(statistic, model, x, hard), values(statistic, model, x, y))
    assert values(Loss(), model, x, soft_labels(y)).shape == (3,)


@given(data=st.data())
def test_pearson_is_that_of_numpy(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    a, b = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64) + data.draw(st.sampled_from([0.0, 1e3]))
    counted = torch.rand(3, 9, generator=generator) < 0.7
    counted[:, :3] = True
    expected = [np.corrcoef(p[c], q[c])[0, 1] for p, q, c in zip(a.numpy(), b.numpy(), counted.numpy(), strict=True)]
    np.testing.assert_allclose(pearson(a, b, counted).numpy(), expected, atol=1e-7)


def test_pearson_of_what_is_constant_is_undefined() -> None:
    a, b = torch.rand(4, 9), torch.rand(4, 9)
    a[0], b[1] = 0.3, -7.0
    a[2, 1:] = a[2, 0]
    counted = torch.ones(4, 9, dtype=torch.bool)
    counted[2, 0] = False  # and what differs does not count
    counted[3] = False
    assert pearson(a, b, counted).isnan().all()


# As penalties


def directions(model: nn.Module, x: Tensor, y: Tensor, iterations: int, start: Tensor) -> Tensor:
    """Unit vectors after some products with the Hessian, by torch.func."""
    gradient = torch.func.grad(lambda z: F.cross_entropy(model(z), y, reduction="sum"))
    direction = start
    for _ in range(iterations):
        product = torch.func.jvp(gradient, (x,), (direction,))[1].detach()
        direction = product / product.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return direction


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("estimate", ["norm", "rayleigh"])
@pytest.mark.parametrize("name", ["mlp", "conv", "group_norm", "attention"])
def test_hessian_norm_and_curvature_train_with_directions_held_fixed(name: str, estimate: str, fused: bool) -> None:
    """Against central differences of the total, along all weights at once."""
    model, (x, y) = make_model(name), make_batch(3)
    grads = reference_gradients(model, x, y).detach()
    held = directions(model, x, y, 2, grads / grads.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def total() -> Tensor:
        gradient = torch.func.grad(lambda z: F.cross_entropy(model(z), y, reduction="sum"))
        slope, product = torch.func.jvp(gradient, (x,), (held,))
        size = product.flatten(1).norm(dim=1) if estimate == "norm" else (product * held).flatten(1).sum(1).abs()
        return (0.3 * size + 0.2 * size / (slope.flatten(1).norm(dim=1) + 0.1)).mean()

    settings = {"iterations": 3, "start": "gradient", "estimate": estimate}
    terms = {
        "norm": Term(HessianNorm(**settings), 0.3),
        "curvature": Term(NormalizedCurvature(**settings, offset=0.1), 0.2),
    }
    objective = PenalizedLoss(terms=terms, loss_weight=0.0, differentiation=DoubleBackward(fused=fused))
    assert_trains(objective, total, model, x, y)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("differentiation", [DoubleBackward(), FiniteDifference()], ids=["exact", "difference"])
@pytest.mark.parametrize("name", ["conv", "batch_norm_train", "attention"])
def test_local_linearity_trains_without_any_gradient_of_the_input(
    name: str, differentiation: Differentiation, squared: bool
) -> None:
    model, (x, y) = make_model(name), make_batch(3)
    penalty = LocalLinearity(Linf(0.5), squared=squared, seed=5)
    objective = PenalizedLoss(terms={"line": Term(penalty, 0.7)}, loss_weight=0.0, differentiation=differentiation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradregWarning)  # BatchNorm
        assert_trains(objective, lambda: 0.7 * values(penalty, model, x, y).mean(), model, x, y)


def assert_trains(
    objective: PenalizedLoss, total: Callable[[], Tensor], model: nn.Module, x: Tensor, y: Tensor
) -> None:
    """Value and gradient of the objective are those of ``total``, a function of the model's weights as they are."""
    weights = parameters_of(model)
    before = [weight.detach().clone() for weight in weights]
    found = objective(model, x, y).total
    assert found.item() == pytest.approx(total().item(), rel=1e-9)
    gradient = torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
        ends = []
        for step in (1e-5, -1e-5):
            for weight, start, way in zip(weights, before, ways, strict=True):
                weight.data = start + step * way
            ends.append(total().item())
        for weight, start in zip(weights, before, strict=True):
            weight.data = start
        expected = (ends[0] - ends[1]) / 2e-5
        along = sum((grad * way).sum() for grad, way in zip(gradient, ways, strict=True))
        assert along.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_hessian_needs_second_derivatives() -> None:
    model, batch = make_model("conv"), make_batch(3)
    objective = PenalizedLoss(terms={"norm": Term(HessianNorm(3))}, differentiation=FiniteDifference(threat=Linf(0.1)))
    with pytest.raises(RuntimeError, match="DoubleBackward"):
        objective(model, *batch)


def test_without_a_seed_every_step_draws_anew_and_with_one_it_does_not() -> None:
    model, batch = make_model("conv"), make_batch(3)
    for penalty in (HessianNorm(1), NormalizedCurvature(1), LocalLinearity(Linf(0.2)), SignAgreement(Linf(2.0))):
        assert not torch.equal(values(penalty, model, *batch), values(penalty, model, *batch))
        seeded = penalty.seeded(4)
        assert torch.equal(values(seeded, model, *batch), values(replace(penalty, seed=4), model, *batch))
        assert seeded.seeded(5) == seeded


# One contract for every statistic

STATISTICS: dict[str, Penalty] = {
    "loss": Loss(),
    "L1": GradNormPenalty(Linf(1.0)),
    "Linf of a class": GradNormPenalty(L1(1.0), of=true_class()),
    "signs": SignAgreement(Linf(0.1), seed=0),
    "alignment": EdgeAlignmentPenalty(sigma=0.6, of=None),
    "alignment of a class": EdgeAlignmentPenalty(of=predicted_class(), sigma=0.6, energy=contour_energy),
    "correlation": EdgeCorrelation(sigma=0.6),
    "edge pixels": EdgeCorrelation(sigma=0.6, clamp=0.1, edges_only=True, channels="max"),
    "Hessian": HessianNorm(iterations=3, seed=0),
    "curvature": NormalizedCurvature(iterations=3, start="gradient", estimate="rayleigh", seed=0),
    "linearity": LocalLinearity(Linf(0.1), seed=0),
    "function": GradientPenalty(lambda grad, x: grad.square().flatten(1).sum(1)),
}
every_statistic = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=list(STATISTICS))
with_edges = pytest.mark.parametrize(
    "statistic",
    [EdgeCorrelation(sigma=0.6), EdgeAlignmentPenalty(sigma=0.6, of=None)],
    ids=["correlation", "alignment"],
)


def measured(penalty: Callable[[Point], Tensor], model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(measure(model, [(x, y)], {"it": penalty}, progress=False).values["it"], dtype=torch.float64)


def test_every_statistic_is_in_the_contract() -> None:
    public = {getattr(gs, name) for name in gs.__all__}
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Penalty)}
    assert kinds <= {type(statistic) for statistic in STATISTICS.values()}


@every_statistic
def test_is_one_finite_number_per_sample(statistic: Penalty) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    found = values(statistic, model, x, y)
    assert found.shape == (5,)
    assert found.isfinite().all()
    assert found.dtype == torch.float64
    assert values(statistic, make_model("conv", torch.float32), x.float(), y).dtype == torch.float32
    assert statistic.name


@every_statistic
def test_a_sample_does_not_depend_on_the_others(statistic: Penalty) -> None:
    """Nor on the order: the index says which random numbers are whose."""
    model, (x, y) = make_model("conv"), make_batch()
    index, order = torch.tensor([7, 1, 9, 4, 2]), torch.tensor([3, 0, 4, 1, 2])
    together = values(statistic, model, x, y, index)
    shuffled = values(statistic, model, x[order], y[order], index[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-9, atol=1e-18)
    alone = [values(statistic, model, x[i : i + 1], y[i : i + 1], index[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=1e-18)


@every_statistic
def test_leaves_everything_as_it_was(statistic: Penalty) -> None:
    model, (x, y) = make_model("batch_norm_train").train(), make_batch()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    measured(statistic, model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.requires_grad


@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "function"])
def test_can_be_copied_pickled_and_written(name: str) -> None:
    statistic, model, (x, y) = STATISTICS[name], make_model("conv"), make_batch()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(statistic)))
    assert repr(twin) == repr(statistic)
    torch.testing.assert_close(values(twin, model, x, y), values(statistic, model, x, y))


@every_statistic
def test_works_on_fused_attention_under_no_grad_and_on_a_function(statistic: Penalty) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).transpose(1, 2).reshape(len(x), 6, 12)).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))

    model, (x, y) = Attends(), make_batch(3, torch.float32)
    expected = measured(statistic, model, x, y)
    with torch.no_grad():
        torch.testing.assert_close(measured(statistic, model, x, y), expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            measured(statistic, lambda z: model(z), x, y).clone(), expected, rtol=1e-4, atol=1e-9
        )


def test_noise_is_the_same_for_every_model() -> None:
    """So that models are compared at the same points."""
    (x, y), seen = make_batch(3), []
    for seed in (0, 1):
        model = make_model("mlp", seed=seed)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        measured(LocalLinearity(Linf(0.1)), model, x, y)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[half - 2], seen[half - 1])


# What is undefined


@with_edges
def test_a_flat_image_has_no_edges(statistic: Penalty) -> None:
    model, (x, y) = make_model("conv"), make_batch(3)
    x[1] = 0.5
    with pytest.warns(GradregWarning, match="undefined .* 1 of 3"):
        assert measured(statistic, model, x, y).isnan().tolist() == [False, True, False]


@with_edges
def test_a_gradient_of_zero_has_no_direction(statistic: Penalty) -> None:
    model, (x, y) = make_model("conv"), make_batch(3)
    nn.init.zeros_(model[-1].weight)
    with pytest.warns(GradregWarning, match="undefined .* 3 of 3"):
        assert measured(statistic, model, x, y).isnan().all()


@every_statistic
def test_a_gradient_of_zero_is_a_finding_and_nothing_to_warn_of(statistic: Penalty) -> None:
    model, (x, y) = make_model("conv"), make_batch(3)
    nn.init.zeros_(model[-1].weight)
    if statistic.undefined(Point(model, cross_entropy, x, y, look=False)) is None:
        assert measured(statistic, model, x, y).isfinite().all()


@every_statistic
@pytest.mark.parametrize("flat", ["image", "gradient"])
def test_what_is_undefined_trains_nothing(statistic: Penalty, flat: str) -> None:
    """As a penalty it has a value all the same, and a gradient of 0; nowhere NaN."""
    model, (x, y) = make_model("mlp"), make_batch(3)
    x[1] = 0.5 if flat == "image" else x[1]
    with torch.no_grad():
        model[-1].weight.mul_(float(flat == "image"))
    point = Point(model, cross_entropy, x, y, look=False)
    found, undefined = statistic(point), statistic.undefined(point)
    assert found.isfinite().all()
    weights = parameters_of(model)
    if undefined is not None:
        assert undefined.tolist() == ([False, True, False] if flat == "image" else [True] * 3)
        idle = torch.autograd.grad(found[undefined].sum(), weights, retain_graph=True, materialize_grads=True)
        assert not any(grad.any() for grad in idle)
    if found.requires_grad:
        grads = torch.autograd.grad(found.sum(), weights, allow_unused=True, materialize_grads=True)
        assert all(grad.isfinite().all() for grad in grads)


def test_no_pixel_with_an_edge() -> None:
    model, (x, y) = make_model("conv"), make_batch(2)
    with pytest.warns(GradregWarning, match="2 of 2"):
        assert measured(EdgeCorrelation(sigma=0.6, clamp=1e3, edges_only=True), model, x, y).isnan().all()


def test_gray_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    for statistic in (EdgeCorrelation(), EdgeCorrelation(channels="max", clamp=0.05, edges_only=True)):
        assert values(statistic, model, x, y).isfinite().all()


class TestErrors:
    def test_edges_of_what_is_no_image(self, unchecked: None) -> None:
        for statistic in (EdgeAlignmentPenalty(), EdgeCorrelation()):
            with pytest.raises(ValueError, match="images"):
                values(statistic, nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]))

    @pytest.mark.usefixtures("unchecked")
    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="iterations"):
            HessianNorm(iterations=0)
        with pytest.raises(ValueError, match="start"):
            NormalizedCurvature(start="zero")
        with pytest.raises(ValueError, match="estimate"):
            NormalizedCurvature(estimate="trace")
        with pytest.raises(ValueError, match="channels"):
            EdgeCorrelation(channels="mean")
        with pytest.raises(ValueError, match="logarithms"):
            EdgeCorrelation(clamp=0.0)

    def test_labels(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(3)
        with pytest.raises(ValueError, match="-100"):
            measured(Loss(), model, x, torch.full_like(y, -100))


# Summaries


@given(
    values=st.lists(st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_batches_of_any_size_are_summed_up_as_one(values: list[float], cuts: list[int]) -> None:
    at_once, in_parts = Summary(), Summary()
    at_once.add(values)
    for part in np.split(np.array(values), sorted(cuts)):
        in_parts.add(torch.tensor(part))
    array, scale = np.array(values), max(map(abs, values))
    assert in_parts.n == at_once.n == len(values)
    for summary in (at_once, in_parts):
        assert summary.mean == pytest.approx(array.mean(), abs=1e-12 * scale)
        assert summary.std == pytest.approx(array.std(), abs=1e-7 * scale)
        assert (summary.lowest, summary.highest) == (array.min(), array.max())
    above = array[array > 0]
    assert in_parts.log10.n == len(above)
    if len(above):
        assert in_parts.log10.mean == pytest.approx(np.log10(above).mean(), abs=1e-9)
    for q in (0.0, 0.05, 0.5, 0.9, 1.0):
        assert in_parts.quantile(q) == at_once.quantile(q)
        expected = np.quantile(array, q, method="lower")
        assert at_once.quantile(q) == pytest.approx(expected, rel=0.0024, abs=1e-12)


def test_spread_between_batches_counts() -> None:
    summary = Summary()
    for part in ([1.0, 2.0], [30.0], [4.0, 500.0, 6.0]):
        summary.add(part)
    assert summary.std == pytest.approx(np.std([1.0, 2.0, 30.0, 4.0, 500.0, 6.0]))


def test_memory_does_not_grow_with_the_number_of_values() -> None:
    summary, histogram = Summary(), LogHistogram()
    sizes = []
    for _ in range(4):
        values = 10 ** (3 * torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        summary.add(values)
        histogram.add(values)
        sizes.append((sys.getsizeof(summary._bins), sys.getsizeof(histogram.counts)))
    assert len(set(sizes)) == 1
    assert len(summary._bins) <= 3001
    assert summary.n == histogram.n == 80_000


def test_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 1,000 samples of 50 normal numbers, 95 % within three standard errors of that share."""
    draws = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = sum(low <= 0 <= high for low, high in (Moments.of(row).interval for row in draws))
    assert 920 <= held <= 970


def test_summary_of_nothing_and_of_what_is_undefined() -> None:
    summary = Summary()
    assert math.isnan(summary.mean)
    assert math.isnan(summary.quantile(0.5))
    assert summary.interval == (-math.inf, math.inf)
    summary.add([math.nan, math.nan])
    assert (summary.n, summary.undefined) == (0, 2)
    summary.add([0.0, 4.0])
    assert (summary.n, summary.log10.n, summary.log10.mean) == (2, 1, pytest.approx(math.log10(4)))
    assert "undefined 2" in str(summary)
    with pytest.raises(ValueError, match="share in"):
        summary.quantile(1.5)


def test_floor_is_added_before_the_logarithm() -> None:
    summary = Summary(floor=1e-17)
    summary.add([0.0])
    assert (summary.log10.n, summary.log10.mean) == (1, -17.0)


def test_histogram_counts_sizes() -> None:
    values = torch.randn(1000, dtype=torch.float64) * 10 ** (4 * torch.rand(1000, dtype=torch.float64))
    histogram, part = LogHistogram(bins_per_decade=5), LogHistogram(bins_per_decade=5)
    histogram.add(values[:300])
    part.add(torch.cat([values[300:], torch.zeros(7, dtype=torch.float64)]))
    histogram.merge(part)
    logs = np.log10(values.abs().numpy())
    edges = np.arange(math.floor(logs.min() * 5), math.floor(logs.max() * 5) + 2) / 5
    counts, _ = np.histogram(logs, bins=edges)
    middles, density = histogram.density()
    np.testing.assert_allclose(middles, 10 ** (edges[:-1] + 0.1))
    np.testing.assert_allclose(np.array(density) * 1007 / 5, counts)
    assert (histogram.zeros, histogram.n) == (7, 1007)
    assert LogHistogram().density() == ([], [])


# Over a data set


def loader_of(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_measured_is_what_each_statistic_says() -> None:
    model, (x, y) = make_model("conv"), make_batch(7)
    found = measure(model, loader_of(x, y, 3), STATISTICS, progress=False)
    for name in ("loss", "L1", "Linf of a class", "alignment", "correlation", "edge pixels", "function"):
        torch.testing.assert_close(torch.tensor(found.values[name]).double(), values(STATISTICS[name], model, x, y))
    assert found.n == 7
    assert found.accuracy.count == int((model(x).argmax(1) == y).sum())
    assert found.units["Hessian"] == "loss per squared unit of pixel"
    assert all(f"| {name} |" in str(found) for name in STATISTICS)


def test_statistics_of_one_point_share_its_gradient() -> None:
    model, (x, y) = make_model("conv"), make_batch(7)
    penalties = [*map(GradNormPenalty, NORMS.values()), EdgeAlignmentPenalty(of=None), EdgeCorrelation(sigma=0.6)]
    found = measure(model, loader_of(x, y, 3), penalties, progress=False)
    assert found.cost["backward"] == 7
    assert found.cost["forward"] == 14  # one for the verdict, one to differentiate
    with_hessian = measure(model, [(x, y)], [HessianNorm(4), NormalizedCurvature(4), *penalties], progress=False)
    assert with_hessian.cost["forward"] == 21
    assert (
        measure(model, [(x, y)], [NormalizedCurvature(4)], progress=False).cost["backward"]
        == with_hessian.cost["backward"]
    )


def test_passes_at_other_points_are_counted() -> None:
    model, (x, y) = make_model("conv"), make_batch(7)
    found = measure(model, loader_of(x, y, 3), [LocalLinearity(Linf(0.1)), SignAgreement(Linf(0.1))], progress=False)
    assert found.cost["forward"] == 7 * (1 + 3 + 2)
    assert found.cost["backward"] == 7 * 2


def test_batch_size_and_order_do_not_matter() -> None:
    model, (x, y) = make_model("conv"), make_batch(7)
    attack = PGDAttack(Linf(0.1), steps=3)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    one = measure(model, loader_of(x, y, 7), STATISTICS, attack=attack, progress=False)
    other = measure(model, loader_of(x[order], y[order], 2), STATISTICS, attack=attack, progress=False)
    assert [one.samples[i] for i in order] == other.samples
    assert "".join(one.attacked[i] for i in order) == other.attacked
    for name in STATISTICS:
        np.testing.assert_allclose(np.array(one.values[name])[order], other.values[name], rtol=1e-8, atol=1e-18)
        assert one.summary(name).mean == pytest.approx(other.summary(name).mean)


def test_groups_are_the_verdicts_of_an_evaluation() -> None:
    model, (x, y) = make_model("conv"), make_batch(12)
    y[:8] = model(x).argmax(1)[:8]
    attack = PGDAttack(Linf(0.05), steps=5)
    found = measure(model, loader_of(x, y, 5), {"norm": GradNormPenalty(Linf(1.0))}, attack=attack, progress=False)
    report = evaluate(model, loader_of(x, y, 5), attack, masking=0, progress=False)
    assert [verdict == "1" for verdict in found.attacked] == report.robust
    assert found.robust_accuracy == report.robust_accuracy
    norms = torch.tensor(found.values["norm"])
    robust = torch.tensor(report.robust)
    assert 0 < robust.sum() < 12
    assert found.summary("norm", "robust").mean == pytest.approx(norms[robust].mean().item())
    assert found.summary("norm", "fooled").mean == pytest.approx(norms[~robust].mean().item())
    assert found.summary("norm").n == 12


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    model, (x, y) = make_model("conv"), make_batch(4)
    x[1] = 0.25
    with pytest.warns(GradregWarning, match="undefined"):
        found = measure(model, [(x, y)], [EdgeCorrelation(sigma=0.6), Loss()], attack=FGSM(Linf(0.1)), progress=False)
    found.save(tmp_path / "found.json")
    text = (tmp_path / "found.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = Measurements.load(tmp_path / "found.json")
    assert again.to_dict() == found.to_dict()
    name = "correlation of gradient and edges"
    assert (again.summary(name).n, again.summary(name).undefined) == (3, 1)
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(StateError, match="measurements"):
        Measurements.load(tmp_path / "found.json")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model, (x, y) = make_model("conv"), make_batch(6)
    loader, state = loader_of(x, y, 2), tmp_path / "state.json"
    calls = 0

    class Breaks(Penalty):
        def __call__(self, point: Point) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return point.losses

    with pytest.raises(KeyboardInterrupt):
        measure(model, loader, {"loss": Breaks()}, state=state, progress=False)
    found = measure(model, loader, {"loss": Breaks()}, state=state, progress=False)
    assert calls == 4
    expected = per_sample_cross_entropy(model(x), y).detach()
    torch.testing.assert_close(torch.tensor(found.values["loss"]).double(), expected)
    for other in (Loss(), lambda point: point.losses):
        with pytest.raises(StateError, match="differ"):
            measure(model, loader, {"loss": other}, state=state, progress=False)


def test_a_state_file_knows_what_was_measured(tmp_path: Path) -> None:
    model, batch = make_model("conv"), make_batch(2)
    state = tmp_path / "state.json"
    measure(model, [batch], {"it": LocalLinearity(Linf(0.1))}, state=state, progress=False)
    measure(model, [batch], {"it": LocalLinearity(Linf(0.1), seed=0)}, state=state, progress=False)  # the same
    for other in (LocalLinearity(Linf(0.1), seed=1), LocalLinearity(Linf(0.2)), LocalLinearity(L2(0.1))):
        with pytest.raises(StateError, match="differ"):
            measure(model, [batch], {"it": other}, state=state, progress=False)
    with pytest.raises(StateError, match="differ"):
        measure(model, [batch], {"it": LocalLinearity(Linf(0.1))}, seed=1, state=state, progress=False)


def test_along_an_attack() -> None:
    model, (x, y) = make_model("conv"), make_batch(5)
    attack = FGSM(Linf(0.05))
    along = measure_along(model, loader_of(x, y, 2), attack, [0.0, 0.5, 1.0], [Loss(), HessianNorm(2)], progress=False)
    x_adv = attack(model, x, y)
    for scale, found in along.items():
        expected = values(Loss(), model, x + scale * (x_adv - x), y)
        torch.testing.assert_close(torch.tensor(found.values["loss"]).double(), expected)
    assert [verdict == "1" for verdict in along[1.0].attacked] == (model(x_adv).argmax(1) == y).tolist()
    assert along[0.0].clean == along[1.0].clean


def test_histograms_hold_every_entry() -> None:
    model, (x, y) = make_model("conv"), make_batch(5)
    grads = reference_gradients(model, x, y)
    found = gradient_histograms(model, loader_of(x, y, 2), bins_per_decade=3, progress=False)
    for name, part in {"all": grads, "channel 0": grads[:, 0], "channel 1": grads[:, 1]}.items():
        expected = LogHistogram(3)
        expected.add(part)
        assert found[name].n == part.numel()
        assert sum((found[name].counts - expected.counts).values()) <= 1  # rounding at the edge of a bin
    flat = gradient_histograms(nn.Linear(3, 2), [(torch.rand(2, 3), torch.tensor([0, 1]))], progress=False)
    assert list(flat) == ["all"]


class TestErrorsOfMeasure:
    def test_names(self) -> None:
        model, batch = make_model("conv"), make_batch(2)
        with pytest.raises(ValueError, match="'loss'"):
            measure(model, [batch], [Loss(), Loss()], progress=False)
        with pytest.raises(ValueError, match="no penalty"):
            measure(model, [batch], [], progress=False)

    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_penalty(self) -> None:
        for wrong in (3, Loss):
            with pytest.raises(TypeError, match="functions of a point"):
                measure(make_model("conv"), [make_batch(2)], {"norm": wrong}, progress=False)

    def test_groups(self) -> None:
        found = measure(make_model("conv"), [make_batch(2)], [Loss()], progress=False)
        with pytest.raises(ValueError, match="no attack"):
            found.summary("loss", "fooled")
        with pytest.raises(ValueError, match="no attack"):
            _ = found.robust_accuracy

    def test_scales(self) -> None:
        for scales in ([], [0.0, 0.0], [math.nan]):
            with pytest.raises(ValueError, match="different"):
                measure_along(make_model("conv"), [make_batch(2)], FGSM(Linf(0.1)), scales, [Loss()], progress=False)

    def test_a_value_for_the_batch(self) -> None:
        def mean(point: Point) -> Tensor:
            return point.losses.mean(0, keepdim=True)

        with pytest.raises(ValueError, match=r"'mean' .* \(1,\)"):
            measure(make_model("conv"), [make_batch(2)], [mean], progress=False)

    def test_bins(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            gradient_histograms(make_model("conv"), [make_batch(2)], bins_per_decade=0, progress=False)


def test_a_hessian_product_is_that_of_double_backward() -> None:
    x, y = make_batch(2)
    v = torch.randn_like(x)
    for how in (DoubleBackward(), InputOnly()):
        model = make_model("mlp")
        point = Point(model, cross_entropy, x, y, differentiation=how)
        hessian = torch.func.hessian(lambda z, model=model: cross_entropy(model(z), y).sum())(x)
        expected = (hessian.flatten(4).flatten(0, 3) @ v.flatten()).view_as(v)
        assert relative_error(hessian_product(point, v).detach(), expected.detach()) < 1e-10
    terms = {"p": Term(HessianNorm(2))}
    with pytest.raises(RuntimeError, match="DoubleBackward"):
        PenalizedLoss(terms=terms, differentiation=FiniteDifference(threat=Linf(0.1)))(model, x, y)

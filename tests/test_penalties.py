"""Penalties: the published formulas, closed forms, finite values where a gradient is 0, and one contract for all."""

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradreg
from gradreg import (
    L1,
    L2,
    EdgeAlignmentPenalty,
    GradientPenalty,
    GradNormPenalty,
    HessianNorm,
    Linf,
    NormalizedCurvature,
    Penalty,
    Point,
    ThreatModel,
    contour_energy,
    cross_entropy,
    edge_alignment,
    grad_norm,
    input_gradient,
    oriented_energy,
    predicted_class,
    sampled_class,
    true_class,
    with_normalization,
)

import reference
import test_menu
from cases import CLASSES, make_batch, make_model, soft_labels
from strategies import FLOATS, gradients, normals, powers_of_ten, radii

every_energy = pytest.mark.parametrize("energy", [oriented_energy, contour_energy], ids=lambda energy: energy.__name__)
every_level = pytest.mark.parametrize("level", ["sample", "batch"])
P = {Linf: math.inf, L2: 2, L1: 1}


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def point_of(grad: Tensor, x: Tensor) -> Point:
    """A point with this gradient, of the loss and of the only class, which depends on grad as on weights."""
    y = torch.zeros(len(x), dtype=torch.int64)
    return Point(lambda z: (grad * z).flatten(1).sum(1, keepdim=True), lambda logits, y: logits[:, 0], x, y)


def gradient_of_losses(model: nn.Module, z: Tensor, probabilities: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return input_gradient(-(probabilities * model(z).log_softmax(1)).sum(1), z)


# Gradient norm


@pytest.mark.parametrize("kind", list(P), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
def test_grad_norm_is_the_dual_norm(kind: type[ThreatModel], dtype: torch.dtype, data: st.DataObject) -> None:
    grad = data.draw(gradients(dtype))
    eps = data.draw(radii(tuple(grad.shape)))
    expected = reference.dual_norm(grad, eps, P[kind])
    found = grad_norm(grad, kind(eps))
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= (1e-6 if dtype == torch.float32 else 1e-12) * expected).all()


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", ["mlp", "conv", "group_norm", "attention"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_grad_norm_is_the_published_penalty(size: int, name: str, labels: str) -> None:
    """Of normalised images z = (x - m) / s with one s for all channels, whose gradients are s times as large."""
    model = make_model(name)
    on_pixels = with_normalization(model, mean=[0.45], std=[0.225]).double()
    eps, std = 4 / 255, on_pixels.normalize.std.item()
    x, y = make_batch(size)
    z = on_pixels.normalize(x)
    probabilities = soft_labels(y) if labels == "soft" else nn.functional.one_hot(y, CLASSES).double()
    published = reference.published_gradient_penalty(model, z, probabilities, eps, std).item()
    of_normalised = grad_norm(gradient_of_losses(model, z, probabilities), Linf(eps / std)).mean().item()
    of_pixels = grad_norm(gradient_of_losses(on_pixels, x, probabilities), Linf(eps)).mean().item()
    assert of_normalised == pytest.approx(published, rel=1e-10)
    assert of_pixels == pytest.approx(published, rel=1e-10)


def test_grad_norm_of_a_linear_model() -> None:
    """The logistic loss log(1 + exp(-w.x)) has the gradient -w / (1 + exp(w.x))."""
    w = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.5], [0.2, -0.1]], dtype=torch.float64, requires_grad=True)
    grad = input_gradient(nn.functional.softplus(-(x @ w)), x)
    slope = torch.sigmoid(-(x @ w)).detach()
    for threat, size in ((Linf(0.5), 7.0), (L2(0.5), 5.0), (L1(0.5), 4.0)):
        torch.testing.assert_close(grad_norm(grad, threat).detach(), 0.5 * size * slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("threat", [Linf(0.3), L2(0.8), L1(1.5)])
def test_in_bounds_only_what_leaves_an_image_an_image_counts(threat: ThreatModel) -> None:
    """No image of the ball rises more along the gradient than the penalty says, and one rises as much."""
    x = (2 * images(2, 1, 4, 4) - 0.5).clamp(0, 1)
    grad = torch.randn_like(x)
    penalty = GradNormPenalty(threat, bounds=(0.0, 1.0))(point_of(grad, x)).detach()
    assert (penalty < threat.dual_norm(grad)).all() or isinstance(threat, L1)
    best = x + threat.maximizer(grad, (-x, 1 - x))
    assert ((best >= 0) & (best <= 1)).all()
    torch.testing.assert_close((grad * (best - x)).flatten(1).sum(1), penalty)
    for seed in range(50):
        delta = 3 * threat.sample_like(x, torch.Generator().manual_seed(seed)) + seed % 2 * grad
        other = x + threat.project(delta, (-x, 1 - x))
        assert ((grad * (other - x)).flatten(1).sum(1) <= penalty + 1e-9).all()


def test_bounds_of_normalised_images() -> None:
    """A model on z = (x - m) / s has gradients s times as large, in a room 1 / s times as wide."""
    x, grad = images(2, 3, 4, 4), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x[0] = x[0].round()
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6]).double().view(3, 1, 1),
        torch.tensor([0.2, 0.3, 0.25]).double().view(3, 1, 1),
    )
    of_pixels = GradNormPenalty(Linf(0.1), bounds=(0.0, 1.0))(point_of(grad, x))
    normalised = GradNormPenalty(Linf(0.1 / std), bounds=((0 - mean) / std, (1 - mean) / std))
    torch.testing.assert_close(normalised(point_of(grad * std, (x - mean) / std)), of_pixels)


def test_a_pixel_outside_of_its_bounds_moves_no_further_out() -> None:
    grad, x = torch.tensor([[2.0, -3.0, 5.0]]), torch.tensor([[-0.5, -0.5, 1.5]])
    assert GradNormPenalty(Linf(0.25), bounds=(0.0, 1.0))(point_of(grad, x)).item() == pytest.approx(0.5)


# Edge alignment


@every_energy
@pytest.mark.parametrize(("sign", "expected"), [(1, 0.0), (-1, 2.0)])
def test_alignment_of_the_edges_themselves(energy: Callable[..., Tensor], sign: int, expected: float) -> None:
    x = images(2, 3, 8, 8)
    grad = sign * energy(x).expand_as(x)
    torch.testing.assert_close(edge_alignment(grad, x, energy=energy), torch.full((2,), expected).double())


@every_energy
def test_alignment_of_an_orthogonal_gradient_is_one(energy: Callable[..., Tensor]) -> None:
    x = images(2, 3, 8, 8)
    edges = energy(x).expand_as(x)
    grad = torch.randn_like(x)
    share = (reference.inner(grad, edges) / reference.inner(edges, edges)).view(2, 1, 1, 1)
    result = edge_alignment(grad - share * edges, x, energy=energy)
    torch.testing.assert_close(result, torch.ones(2).double(), rtol=0, atol=1e-10)


@every_energy
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
def test_alignment_is_one_minus_the_cosine(
    energy: Callable[..., Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    grad = data.draw(gradients(dtype, shape=(3, 2, 6, 7)))
    x = data.draw(normals((3, 2, 6, 7), dtype))
    found = edge_alignment(grad, x, sigma=0.8, energy=energy)
    expected = reference.one_minus_cosine(grad, energy(x.double(), sigma=0.8).expand_as(grad))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@every_level
@given(data=st.data())
def test_alignment_ignores_the_size_of_the_gradient(level: str, data: st.DataObject) -> None:
    grad, x = data.draw(normals((3, 2, 6, 7), torch.float64)), images(3, 2, 6, 7)
    plain = edge_alignment(grad, x, level=level)
    scale = data.draw(powers_of_ten(-100, 100))
    torch.testing.assert_close(edge_alignment(scale * grad, x, level=level), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(edge_alignment(-grad, x, level=level), 2 - plain, rtol=0, atol=1e-12)
    if level == "sample":
        scales = torch.rand(3, 1, 1, 1, dtype=torch.float64) + 0.1
        torch.testing.assert_close(edge_alignment(scales * grad, x), plain, rtol=0, atol=1e-12)
        assert ((plain >= -1e-12) & (plain <= 2 + 1e-12)).all()


@every_energy
@pytest.mark.parametrize("size", [1, 4])
def test_alignment_of_the_batch_is_the_loss_of_the_released_code(energy: Callable[..., Tensor], size: int) -> None:
    x = images(size, 3, 8, 8)
    grad = torch.randn_like(x) * torch.logspace(-2, 2, size, dtype=torch.float64).view(-1, 1, 1, 1)
    edges = energy(x).expand_as(x)
    mean = edge_alignment(grad, x, energy=energy, level="batch").mean().item()
    cosine = nn.functional.cosine_similarity(grad.flatten(), edges.flatten(), dim=0).item()
    assert mean == pytest.approx(1 - cosine, abs=1e-10)
    assert 2 * mean == pytest.approx(reference.squared_error_of_normalised(grad, edges).item(), abs=1e-10)


def test_alignment_of_one_image_is_that_of_its_batch() -> None:
    x, grad = images(1, 3, 8, 8), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(edge_alignment(grad, x, level="batch"), edge_alignment(grad, x))


def test_batch_level_shares_add_up_and_weigh_by_size() -> None:
    x = images(2, 3, 8, 8)
    grad = oriented_energy(x) * torch.tensor([1.0, -1e-6]).view(2, 1, 1, 1)
    shares = edge_alignment(grad, x, level="batch")
    cosine = nn.functional.cosine_similarity(grad.flatten(), oriented_energy(x).flatten(), dim=0)
    torch.testing.assert_close(shares.mean(), 1 - cosine)
    assert shares[1].item() == pytest.approx(1.0, abs=1e-5)


@every_energy
@every_level
def test_alignment_where_a_gradient_or_an_image_is_flat(energy: Callable[..., Tensor], level: str) -> None:
    grad, x = torch.randn(4, 3, 8, 8, dtype=torch.float64), images(4, 3, 8, 8)
    grad[0] = 0
    x[1] = 0
    grad[2], x[2] = 0, 0
    leaf = grad.clone().requires_grad_()
    result = edge_alignment(leaf, x, energy=energy, level=level)
    assert result[:3].tolist() == [1.0, 1.0, 1.0]
    (derivative,) = torch.autograd.grad(result.sum(), leaf)
    assert derivative.isfinite().all()
    assert derivative[3].any()
    if level == "sample":
        assert not derivative[:3].any()


@every_energy
@every_level
def test_alignment_of_nothing_at_all(energy: Callable[..., Tensor], level: str) -> None:
    leaf = torch.zeros(2, 3, 8, 8, requires_grad=True)
    result = edge_alignment(leaf, torch.zeros(2, 3, 8, 8), energy=energy, level=level)
    assert result.tolist() == [1.0, 1.0]
    (derivative,) = torch.autograd.grad(result.sum(), leaf)
    assert not derivative.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    grad, x = (1e-4 * torch.randn(2, 3, 32, 32)).to(dtype), torch.rand(2, 3, 32, 32).to(dtype)
    assert torch.equal(edge_alignment(grad, x), edge_alignment(grad.float(), x.float()))
    assert torch.equal(grad_norm(grad, Linf(0.5)), grad_norm(grad.float(), Linf(0.5)))


def test_alignment_takes_any_energy_of_image_and_width() -> None:
    def brightness(x: Tensor, *, sigma: float) -> Tensor:
        assert x.dtype in FLOATS
        return sigma * x.sum(1, keepdim=True)

    x, grad = images(2, 3, 2, 2), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    expected = reference.one_minus_cosine(grad, x.sum(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(edge_alignment(grad, x, energy=brightness), expected)
    torch.testing.assert_close(EdgeAlignmentPenalty(energy=brightness)(point_of(grad, x)), expected)
    assert edge_alignment(grad.half(), x.half(), energy=brightness).dtype == torch.float32


# Derivatives


@pytest.mark.parametrize("threat", [Linf(0.5), L2(0.5), L1(0.5)], ids=repr)
def test_grad_norm_has_its_derivatives(threat: ThreatModel) -> None:
    grad = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda grad: grad_norm(grad, threat), grad)
    assert torch.autograd.gradgradcheck(lambda grad: grad_norm(grad, threat), grad)


@every_energy
@every_level
def test_alignment_has_its_derivatives(energy: Callable[..., Tensor], level: str) -> None:
    grad = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    x = images(2, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, x: edge_alignment(g, x, energy=energy, level=level), (grad, x))


# What is refused


@pytest.mark.parametrize(
    ("grad_shape", "x_shape"), [((2, 3, 8, 8), (2, 3, 8, 9)), ((2, 1, 8, 8), (2, 3, 8, 8)), ((2, 8), (2, 8))], ids=str
)
def test_alignment_needs_images(grad_shape: tuple[int, ...], x_shape: tuple[int, ...], unchecked: None) -> None:
    with pytest.raises(ValueError, match="images"):
        edge_alignment(torch.rand(grad_shape), torch.rand(x_shape))
    with pytest.raises(ValueError, match="images"):
        EdgeAlignmentPenalty()(point_of(torch.rand(2, 8), torch.rand(2, 8)))


def test_alignment_has_two_levels(unchecked: None) -> None:
    with pytest.raises(ValueError, match="level"):
        edge_alignment(images(1, 1, 8, 8), images(1, 1, 8, 8), level="image")
    with pytest.raises(ValueError, match="level"):
        EdgeAlignmentPenalty(level="image")


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_alignment_needs_a_width(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        EdgeAlignmentPenalty(sigma=sigma)
    with pytest.raises(ValueError, match="sigma"):
        edge_alignment(images(1, 1, 8, 8), images(1, 1, 8, 8), sigma=sigma)


@pytest.mark.parametrize("threat", [4 / 255, "Linf", Linf])
def test_grad_norm_penalty_needs_a_threat_model(threat: object, unchecked: None) -> None:
    with pytest.raises(TypeError, match=type(threat).__name__):
        GradNormPenalty(threat)


def test_bounds_for_channels_have_their_shape(unchecked: None) -> None:
    with pytest.raises(ValueError, match="channels"):
        GradNormPenalty(Linf(0.1), bounds=(torch.zeros(3), torch.ones(3)))


def test_penalty_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Penalty()


# What is differentiated


def score_and_leaf(model: nn.Module, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.clone().requires_grad_()
    return input_gradient(of(model(leaf)), leaf).detach()


def test_by_default_the_norm_is_that_of_the_loss_and_the_edges_those_of_a_drawn_class() -> None:
    model, (x, y) = make_model("conv"), make_batch(40)
    point = Point(model, cross_entropy, x, y)
    of_loss = score_and_leaf(model, x, lambda logits: cross_entropy(logits, y))
    torch.testing.assert_close(GradNormPenalty(Linf(0.1))(point).detach(), grad_norm(of_loss, Linf(0.1)))

    torch.manual_seed(5)
    classes = sampled_class(0.5)(model(x), y)
    assert not torch.equal(classes, y)
    of_class = score_and_leaf(model, x, lambda logits: logits.gather(1, classes[:, None])[:, 0])
    torch.manual_seed(5)
    found = EdgeAlignmentPenalty(sigma=0.6)(point).detach()
    torch.testing.assert_close(found, edge_alignment(of_class, x, sigma=0.6))


@pytest.mark.parametrize(
    "make",
    [
        lambda of: GradNormPenalty(L2(1.0), of=of),
        lambda of: EdgeAlignmentPenalty(sigma=0.6, of=of),
        lambda of: GradientPenalty(lambda grad, x: (grad * x).flatten(1).sum(1), of=of),
    ],
)
def test_the_gradient_may_be_that_of_any_score(make: Callable[[object], Penalty]) -> None:
    model, (x, y) = make_model("conv"), make_batch()
    on_loss = make(None)
    for of, score in (
        (None, lambda logits: cross_entropy(logits, y)),
        (true_class(), lambda logits: logits.gather(1, y[:, None])[:, 0]),
        (predicted_class(), lambda logits: logits.max(1).values),
    ):
        grad = score_and_leaf(model, x, score)
        expected = on_loss(point_of(grad, x)).detach()
        torch.testing.assert_close(make(of)(Point(model, cross_entropy, x, y)).detach(), expected)


def test_undefined_are_samples_without_a_gradient_or_edges() -> None:
    grad, x = torch.randn(4, 3, 8, 8, dtype=torch.float64), images(4, 3, 8, 8)
    grad[0], x[1] = 0, 0
    point = point_of(grad, x)
    assert EdgeAlignmentPenalty().undefined(point).tolist() == [True, True, False, False]
    assert EdgeAlignmentPenalty()(point)[:2].tolist() == [1.0, 1.0]
    assert GradNormPenalty(Linf(0.1)).undefined(point) is None


# One contract for every penalty

Function = Callable[[Tensor, Tensor], Tensor]
CHANNELS = Linf(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))


def slope_along_the_image(grad: Tensor, x: Tensor) -> Tensor:
    return (grad * x).flatten(1).sum(1).square()


# A penalty, and the function of gradient and input that it stands for.
PENALTIES: dict[str, tuple[Penalty, Function]] = {
    "grad norm, Linf": (GradNormPenalty(Linf(4 / 255)), lambda grad, x: grad_norm(grad, Linf(4 / 255))),
    "grad norm, L2": (GradNormPenalty(L2(0.5)), lambda grad, x: grad_norm(grad, L2(0.5))),
    "grad norm, L1": (GradNormPenalty(L1(12.0)), lambda grad, x: grad_norm(grad, L1(12.0))),
    "grad norm, channels": (GradNormPenalty(CHANNELS), lambda grad, x: grad_norm(grad, CHANNELS)),
    "grad norm of a class": (GradNormPenalty(L2(0.5), of=true_class()), lambda grad, x: grad_norm(grad, L2(0.5))),
    "grad norm in bounds": (
        GradNormPenalty(Linf(0.2), bounds=(0.0, 1.0)),
        lambda grad, x: grad_norm(grad, Linf(0.2), box=(-x, 1 - x)),
    ),
    "grad norm in bounds, L2": (
        GradNormPenalty(L2(0.5), bounds=(0.0, 1.0)),
        lambda grad, x: grad_norm(grad, L2(0.5), box=(-x, 1 - x)),
    ),
    "edges": (EdgeAlignmentPenalty(sigma=0.7, of=true_class()), lambda grad, x: edge_alignment(grad, x, sigma=0.7)),
    "edges, contours": (
        EdgeAlignmentPenalty(energy=contour_energy, of=None),
        lambda grad, x: edge_alignment(grad, x, energy=contour_energy),
    ),
    "edges, batch": (
        EdgeAlignmentPenalty(level="batch", of=predicted_class()),
        lambda grad, x: edge_alignment(grad, x, level="batch"),
    ),
    "a function": (GradientPenalty(slope_along_the_image, threat=Linf(0.1)), slope_along_the_image),
}
every_penalty = pytest.mark.parametrize("penalty", [penalty for penalty, _ in PENALTIES.values()], ids=list(PENALTIES))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64), images(4, 3, 8, 8)


def test_every_penalty_of_one_gradient_is_in_the_contract() -> None:
    """And every other one in that of the menu, or of the statistics."""
    ours = {kind for kind in vars(gradreg).values() if isinstance(kind, type) and issubclass(kind, Penalty)}
    contracts = {type(penalty) for penalty, _ in PENALTIES.values()}
    contracts |= {type(entry.penalty) for entry in test_menu.MENU.values()} | {HessianNorm, NormalizedCurvature}
    assert contracts == ours - {Penalty}


@pytest.mark.parametrize(("penalty", "function"), PENALTIES.values(), ids=PENALTIES)
def test_penalty_is_its_function(penalty: Penalty, function: Function, batch: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(penalty(point_of(*batch)), function(*batch))


@every_penalty
def test_penalty_is_one_finite_number_per_sample(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    for size, dtype in itertools.product((1, 4), FLOATS):
        result = penalty(point_of(*(tensor[:size].to(dtype) for tensor in batch)))
        assert result.shape == (size,)
        assert result.dtype == dtype
        assert result.isfinite().all()


@every_penalty
def test_penalty_permutes_with_the_batch(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    grad, x = batch
    order = torch.tensor([2, 0, 3, 1])
    found = penalty(point_of(grad[order], x[order]))
    torch.testing.assert_close(found, penalty(point_of(grad, x))[order], rtol=1e-12, atol=1e-12)


@every_penalty
def test_penalty_of_a_sample_does_not_depend_on_the_others(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    grad, x = batch
    alone = [penalty(point_of(grad[index : index + 1], x[index : index + 1])) for index in range(len(x))]
    together = penalty(point_of(grad, x))
    assert torch.allclose(torch.cat(alone), together, rtol=1e-12) == (getattr(penalty, "level", "sample") == "sample")


@every_penalty
def test_penalty_trains_through_the_gradient_only(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    grad, x = batch[0].requires_grad_(), batch[1].requires_grad_()
    penalty(point_of(grad, x)).sum().backward()
    assert grad.grad.isfinite().all()
    assert grad.grad.flatten(1).any(1).all()
    assert x.grad is None


@every_penalty
def test_penalty_is_frozen_and_has_no_state(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        penalty.of = true_class()
    first = penalty(point_of(*batch))
    penalty(point_of(torch.randn_like(batch[0]), batch[1]))
    assert torch.equal(penalty(point_of(*batch)), first)


@every_penalty
def test_penalty_can_be_copied_and_pickled(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    for other in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert type(other) is type(penalty)
        assert repr(other) == repr(penalty)
        assert torch.equal(other(point_of(*batch)), penalty(point_of(*batch)))


@every_penalty
def test_penalty_changes_nothing(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    before = [tensor.clone() for tensor in batch]
    versions = [tensor._version for tensor in batch]
    state = torch.get_rng_state()
    penalty(point_of(*batch))
    assert all(torch.equal(tensor, saved) for tensor, saved in zip(batch, before, strict=True))
    assert [tensor._version for tensor in batch] == versions
    assert torch.equal(torch.get_rng_state(), state)


@every_penalty
def test_penalty_has_a_name_and_can_be_seeded(penalty: Penalty, batch: tuple[Tensor, Tensor]) -> None:
    assert penalty.name
    assert torch.equal(penalty.seeded(3)(point_of(*batch)), penalty(point_of(*batch)))


@pytest.mark.parametrize(
    "penalty",
    [
        GradNormPenalty(Linf(0.25)),
        GradNormPenalty(L1(12.0, density=0.1), bounds=(0.0, 1.0)),
        GradNormPenalty(L2(0.5), of=sampled_class(0.3)),
    ],
    ids=str,
)
def test_grad_norm_penalty_is_written_as_it_is_made(penalty: GradNormPenalty) -> None:
    assert repr(eval(repr(penalty))) == repr(penalty)


@pytest.mark.parametrize(
    ("penalty", "settings"),
    [
        (EdgeAlignmentPenalty(), ("oriented_energy", "'sample'", "sampled_class(temperature=0.5)")),
        (EdgeAlignmentPenalty(0.25, contour_energy, "batch"), ("sigma=0.25", "contour_energy", "'batch'")),
        (GradientPenalty(slope_along_the_image, threat=Linf(0.1)), ("slope_along_the_image", "Linf(eps=0.1)")),
    ],
)
def test_penalty_shows_its_settings(penalty: Penalty, settings: tuple[str, ...]) -> None:
    assert all(setting in repr(penalty) for setting in settings)


def test_equal_edge_penalties_are_one() -> None:
    assert EdgeAlignmentPenalty(0.5) == EdgeAlignmentPenalty(0.5)
    assert EdgeAlignmentPenalty(0.5) != EdgeAlignmentPenalty(0.5, of=None)

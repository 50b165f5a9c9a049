"""Threat models: the identities that tie norm, dual norm, maximiser and projection together, and what they refuse."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradreg import L1, L2, Linf, ThreatModel
from gradreg.threat_models import length, room, rows_of, unit

import reference
from reference import inner, radius
from strategies import FLOATS, Perturbation, gradients, images, normals, perturbations, radii

P = {Linf: math.inf, L2: 2, L1: 1}
IDENTITY = {torch.float32: 1e-6, torch.float64: 1e-12}
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-10}
HALVES = (torch.float16, torch.bfloat16)

Kind = type[ThreatModel]
every_kind = pytest.mark.parametrize("kind", list(P), ids=lambda kind: kind.__name__)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@st.composite
def gradients_and_radii(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
    grad = draw(gradients(dtype))
    return grad, draw(radii(tuple(grad.shape)))


@st.composite
def boxes(draw: st.DrawFn, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The room of pixels in [0, 1], some of them at their limits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = (1.5 * torch.rand(grad.shape, generator=generator, dtype=torch.float64) - 0.25).clamp(0, 1).to(grad.dtype)
    return room(x, (0.0, 1.0))


def close(found: Tensor, expected: Tensor, tolerance: float, scale: float | Tensor = 1.0) -> bool:
    """Whether found is within tolerance of expected, in units of scale."""
    return bool(((found.double() - expected.double()).abs() <= tolerance * torch.as_tensor(scale)).all())


# Identities


@every_kind
@every_float
@given(data=st.data())
def test_maximizer_attains_the_dual_norm_inside_the_ball(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(dtype))
    threat = kind(eps)
    best = threat.maximizer(grad)
    expected = reference.dual_norm(grad, eps, P[kind])
    assert best.dtype == dtype
    assert best.shape == grad.shape
    assert close(threat.dual_norm(grad), expected, IDENTITY[dtype], expected)
    assert close(inner(grad, best), expected, IDENTITY[dtype], expected)
    assert (threat.norm(best) <= 1 + IDENTITY[dtype]).all()


@every_kind
@every_float
@given(data=st.data())
def test_hoelder(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(dtype))
    delta = data.draw(normals(tuple(grad.shape), dtype)) * (radius(eps, grad) > 0)
    threat = kind(eps)
    bound = threat.dual_norm(grad).double() * threat.norm(delta.to(dtype)).double()
    size = (grad.double() * delta).abs().flatten(1).sum(1)
    assert (inner(grad, delta) <= bound + IDENTITY[dtype] * size).all()


@every_kind
@given(data=st.data())
def test_maximizer_is_the_gradient_of_the_dual_norm(kind: Kind, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(torch.float64))
    grad = torch.where(grad == 0, 1e-3 * grad.abs().max() + 1e-30, grad)
    threat = kind(eps)
    leaf = grad.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(threat.dual_norm(leaf).sum(), leaf)
    if kind is L1:  # the maximum over coordinates has a gradient only where one coordinate alone attains it
        top = (radius(eps, grad) * grad).abs().flatten(1).topk(min(2, grad[0].numel())).values
        unique = (top[:, 0] > top[:, -1]) | (top.shape[1] == 1)
    else:
        unique = torch.ones(len(grad), dtype=torch.bool)
    limits = radius(eps, grad)[unique]
    assert close(derivative[unique], threat.maximizer(grad)[unique], 1e-12, limits)


@every_kind
@every_float
@given(data=st.data())
def test_in_a_box_the_maximizer_rises_as_far_as_can_be(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(dtype))
    box = data.draw(boxes(grad))
    threat = kind(eps)
    best = threat.maximizer(grad, box)
    expected = reference.highest_rise(grad, eps, P[kind], box)
    assert best.dtype == dtype
    assert (threat.norm(best) <= 1 + IDENTITY[dtype]).all()
    assert close(best.clamp(*box), best, IDENTITY[dtype])
    tolerance = 10 * IDENTITY[dtype]
    assert close(threat.dual_norm(grad, box), expected, tolerance, expected)
    assert close(inner(grad, best), expected, tolerance, expected)


@every_kind
@given(data=st.data())
def test_in_a_box_the_maximizer_is_the_gradient_of_the_dual_norm(kind: Kind, data: st.DataObject) -> None:
    """Exactly, and so also by differences: the dual norm is convex, and lies above each of its tangents."""
    grad, eps = data.draw(gradients_and_radii(torch.float64))
    box = data.draw(boxes(grad))
    threat = kind(eps)
    leaf = grad.clone().requires_grad_()
    value = threat.dual_norm(leaf, box)
    (derivative,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.equal(derivative, threat.maximizer(grad, box))
    other = grad * data.draw(normals(tuple(grad.shape), torch.float64))
    above = threat.dual_norm(other, box) - value.detach() - inner(derivative, other - grad)
    size = inner(derivative.abs(), other.abs() + grad.abs())
    assert (above >= -1e-9 * size).all()


@every_kind
@given(data=st.data())
def test_a_box_around_the_ball_changes_nothing(kind: Kind, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(torch.float64))
    threat, side = kind(eps), radius(eps, grad) * 1.01
    assert close(threat.maximizer(grad, (-side, side)), threat.maximizer(grad), 1e-12, side)
    assert close(threat.dual_norm(grad, (-side, side)), threat.dual_norm(grad), 1e-12, threat.dual_norm(grad))


@every_kind
@given(data=st.data())
def test_order_of_the_batch_does_not_matter(kind: Kind, data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(torch.float64))
    order = torch.tensor(data.draw(st.permutations(range(len(grad)))))
    threat, permuted = kind(eps), kind(eps).rows(order, grad)
    if not isinstance(eps, Tensor) or eps.shape[:1] != grad.shape[:1] or eps.ndim < grad.ndim:
        assert permuted.eps is eps
    assert torch.equal(permuted.dual_norm(grad[order]), threat.dual_norm(grad)[order])
    assert torch.equal(permuted.norm(grad[order]), threat.norm(grad)[order])
    assert torch.equal(permuted.maximizer(grad[order]), threat.maximizer(grad)[order])
    assert torch.equal(permuted.project(grad[order]), threat.project(grad)[order])


@every_kind
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_identity_holds_at_the_ends_of_float32(kind: Kind, scale: float) -> None:
    grad = torch.tensor([[3.0, -4.0, 0.0, 1.0]]) * scale
    threat = kind(1.0)
    best = threat.maximizer(grad)
    expected = reference.dual_norm(grad, 1.0, P[kind])
    tolerance = 1e-6 if scale > 1e-40 else 1e-2  # subnormal numbers have few digits
    assert close(threat.dual_norm(grad), expected, tolerance, expected)
    assert close(inner(grad, best), expected, tolerance, expected)
    assert close(threat.norm(best), torch.ones(1), 1e-6)


@every_kind
def test_zero_gradient_moves_nothing_and_has_a_zero_derivative(kind: Kind) -> None:
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    threat = kind(0.5)
    assert not threat.maximizer(zero).any()
    assert not threat.dual_norm(zero).any()
    (derivative,) = torch.autograd.grad(threat.dual_norm(zero).sum(), zero)
    assert not derivative.any()


@every_kind
@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 4), (2, 3, 4, 4), (2, 2, 3, 2, 2)], ids=str)
def test_samples_of_any_shape_are_flat_vectors(kind: Kind, shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape, dtype=torch.float64)
    flat = grad.flatten(1)
    threat = kind(0.5)
    assert torch.equal(threat.dual_norm(grad), threat.dual_norm(flat))
    assert torch.equal(threat.norm(grad), threat.norm(flat))
    assert torch.equal(threat.maximizer(grad), threat.maximizer(flat).view(shape))
    assert torch.equal(threat.project(grad), threat.project(flat).view(shape))
    assert threat.sample_like(grad).shape == shape
    assert torch.equal(threat.ascent(grad, grad), threat.ascent(flat, flat).view(shape))


@pytest.mark.parametrize("value", [3.0, 7.0, 41.0, 49.0, 1e-42, 1e38])
@pytest.mark.parametrize("small", [0.0, 1e-9])
def test_unit_vector_of_one_dominating_coordinate_has_no_slope_along_it(value: float, small: float) -> None:
    direction = torch.tensor([[value, value * small, 0.0]], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(unit(direction)[0, 0], direction)
    assert derivative[0, 0].abs() <= 1e-9 / value
    assert close(unit(direction), torch.tensor([[1.0, small, 0.0]]), 1e-12)


def test_unit_and_length_of_zero_have_zero_derivatives() -> None:
    for function in (unit, length):
        zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        value = function(zero)
        assert not value.any()
        (derivative,) = torch.autograd.grad(value.sum(), zero)
        assert not derivative.any()


def test_unit_and_length_have_their_derivatives() -> None:
    direction = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, direction)
    assert torch.autograd.gradcheck(length, direction)
    assert torch.autograd.gradgradcheck(unit, direction)
    assert torch.autograd.gradgradcheck(length, direction)


# Half precision


@every_kind
@every_half
def test_half_precision_is_measured_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    grad = (30 * torch.randn(2, 3, 64, 64)).to(dtype)
    threat = kind(8 / 255)
    assert torch.equal(threat.dual_norm(grad), threat.dual_norm(grad.float()))
    assert torch.equal(threat.norm(grad), threat.norm(grad.float()))
    assert threat.dual_norm(grad).dtype == threat.norm(grad).dtype == torch.float32


@every_kind
@every_half
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_half_precision_moves_as_float32_does(kind: Kind, dtype: torch.dtype, scale: float) -> None:
    grad = (scale * torch.randn(2, 3, 8, 8)).to(dtype)
    threat = kind(8 / 255)
    best = threat.maximizer(grad)
    assert best.dtype == dtype
    assert close(best, threat.maximizer(grad.float()), ROUNDING[dtype], threat.eps)


@every_kind
@every_half
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_half_precision_projects_as_float32_does(kind: Kind, dtype: torch.dtype, scale: float) -> None:
    delta, x = (scale * torch.randn(2, 3, 8, 8)).to(dtype), torch.rand(2, 3, 8, 8).to(dtype)
    threat = kind(8 / 255)
    for box in (None, (-x, 1 - x)):
        nearest = threat.project(delta, box)
        expected = threat.project(delta.float(), None if box is None else (box[0].float(), box[1].float()))
        assert nearest.dtype == dtype
        assert close(nearest, expected, ROUNDING[dtype], threat.eps)


# Projection


@every_kind
@every_float
@given(data=st.data())
def test_projection_is_the_nearest_point_of_ball_and_box(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    case: Perturbation = data.draw(perturbations(dtype))
    threat = kind(case.eps)
    nearest = threat.project(case.delta, case.box)
    expected = reference.project(case.delta, case.eps, P[kind], case.box)
    eps = radius(case.eps, case.delta)
    far = torch.where(eps > 0, case.delta.double().abs() / eps.clamp(min=1e-30), 0.0).max().clamp(min=1)
    assert nearest.dtype == dtype
    assert close(nearest, expected, ROUNDING[dtype] * far, eps)


@every_kind
@every_float
@given(data=st.data())
def test_projection_lands_inside_and_stays_there(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    case: Perturbation = data.draw(perturbations(dtype))
    threat = kind(case.eps)
    nearest = threat.project(case.delta, case.box)
    assert (threat.norm(nearest) <= 1 + IDENTITY[dtype]).all()
    if case.box is not None:
        low, high = case.box
        assert close(nearest.clamp(low, high), nearest, IDENTITY[dtype])
    again = threat.project(nearest, case.box)
    assert close(again, nearest, ROUNDING[dtype], radius(case.eps, nearest))


@every_kind
@given(data=st.data())
def test_no_other_point_lies_in_the_direction_of_the_perturbation(kind: Kind, data: st.DataObject) -> None:
    """The variational inequality <u - P(u), v - P(u)> <= 0 for every feasible v: only the nearest point has it."""
    case: Perturbation = data.draw(perturbations(torch.float64))
    threat = kind(case.eps)
    nearest = threat.project(case.delta, case.box)
    eps = radius(case.eps, nearest)
    inverse = torch.where(eps > 0, 1 / eps.clamp(min=1e-30), 0.0)
    for seed in range(5):
        other = threat.sample_like(nearest, torch.Generator().manual_seed(seed))
        if seed % 2:
            other = threat.maximizer(other)
        if case.box is not None:  # a box around 0 only shortens a perturbation
            other = other.clamp(*case.box)
        beyond = (case.delta - nearest) * inverse
        size = 1 + beyond.abs().flatten(1).sum(1)
        assert (inner(beyond, (other - nearest) * inverse) <= 1e-9 * size.square()).all()


@every_kind
@every_float
@given(data=st.data())
def test_projection_leaves_what_is_inside(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    case: Perturbation = data.draw(perturbations(dtype))
    threat = kind(case.eps)
    inside = 0.999 * threat.sample_like(case.delta, torch.Generator().manual_seed(0))
    if case.box is not None:
        inside = inside.clamp(*case.box)
    assert close(threat.project(inside, case.box), inside, IDENTITY[dtype], radius(case.eps, inside))


@every_kind
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e20, 1e30])
def test_projection_of_tiny_and_huge_perturbations(kind: Kind, scale: float) -> None:
    delta = torch.randn(4, 3, 5, 5) * scale
    x = torch.rand_like(delta)
    for box in (None, (-x, 1 - x)):
        nearest = kind(0.5).project(delta, box)
        assert (kind(0.5).norm(nearest) <= 1 + 1e-6).all()
        if scale < 1:
            assert close(nearest, delta, 1e-6, scale)
        elif kind is not L1:  # whose threshold is the difference of huge numbers
            assert close(nearest, reference.project(delta, 0.5, P[kind], box), 1e-5)


@every_kind
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_projection_of_large_images_stays_inside(kind: Kind, density: float) -> None:
    """Where sums over all pixels in float32 lose digits."""
    x = torch.rand(2, 3, 224, 224)
    delta = torch.randn_like(x) * (torch.rand_like(x) < density)
    threat = kind(1.0)
    for box in (None, (-x, 1 - x)):
        nearest = threat.project(delta, box)
        size = threat.norm(nearest.double())
        assert (size <= 1 + 1e-6).all()
        assert (size > 0.99).all() or kind is Linf


@every_kind
def test_projection_takes_a_box_that_broadcasts(kind: Kind) -> None:
    delta = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    low, high = torch.full((3, 1, 1), -0.01), torch.tensor(0.02)
    full = (low.expand_as(delta).clone(), high.expand_as(delta).clone())
    assert torch.equal(kind(0.3).project(delta, (low, high)), kind(0.3).project(delta, full))


# Radii


@every_kind
@pytest.mark.parametrize("form", ["sample", "channel", "pixel"])
def test_radius_of_each_sample_channel_or_pixel(kind: Kind, form: str) -> None:
    shape = {"sample": (3, 1, 1, 1), "channel": (2, 1, 1), "pixel": (3, 2, 4, 4)}[form]
    eps = 0.1 + torch.rand(shape, dtype=torch.float64)
    grad, x = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.rand(3, 2, 4, 4, dtype=torch.float64)
    for index in range(3):
        one = slice(index, index + 1)
        alone = kind(eps.expand_as(grad)[one])
        assert torch.equal(kind(eps).dual_norm(grad)[one], alone.dual_norm(grad[one]))
        assert torch.equal(kind(eps).norm(grad)[one], alone.norm(grad[one]))
        assert torch.equal(kind(eps).maximizer(grad)[one], alone.maximizer(grad[one]))
        assert torch.equal(kind(eps).project(grad)[one], alone.project(grad[one]))
        box = (-x, 1 - x)
        projected = alone.project(grad[one], (-x[one], 1 - x[one]))
        assert torch.equal(kind(eps).project(grad, box)[one], projected)


@every_kind
def test_equal_radii_are_one_number(kind: Kind) -> None:
    grad = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for shape in ((), (3, 1, 1, 1), (2, 1, 1), (4, 4), (3, 2, 4, 4)):
        threat = kind(torch.full(shape, 0.25))
        assert torch.equal(threat.dual_norm(grad), kind(0.25).dual_norm(grad))
        assert torch.equal(threat.norm(grad), kind(0.25).norm(grad))
        assert torch.equal(threat.maximizer(grad), kind(0.25).maximizer(grad))
        assert torch.equal(threat.project(grad), kind(0.25).project(grad))


@every_kind
@given(data=st.data())
def test_normalised_inputs_are_pixels_with_eps_over_std(kind: Kind, data: st.DataObject) -> None:
    grad = data.draw(images.flatmap(lambda shape: normals(shape, torch.float64)))
    std = 0.1 + torch.rand(grad.shape[1], 1, 1, dtype=torch.float64)
    pixels, normalised = kind(0.3), kind(0.3 / std)
    dual = pixels.dual_norm(grad)
    assert close(normalised.dual_norm(grad * std), dual, 1e-12, dual)
    assert close(normalised.project(grad / std) * std, pixels.project(grad), 1e-12)
    if kind is not L1:  # whose maximiser is not unique
        assert close(normalised.maximizer(grad * std) * std, pixels.maximizer(grad), 1e-12)


@every_kind
def test_coordinates_of_radius_zero_stay(kind: Kind) -> None:
    eps = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    grad = torch.tensor([[1.0, 100.0, -2.0, -100.0]])
    threat, others = kind(eps), kind(0.5)
    moving = [0, 2]
    assert torch.equal(threat.dual_norm(grad), others.dual_norm(grad[:, moving]))
    x = torch.rand(1, 4)
    for moved in (
        threat.maximizer(grad),
        threat.ascent(grad, torch.zeros(1, 4)),
        threat.project(grad),
        threat.project(grad, (-x, 1 - x)),
        threat.sample_like(grad),
    ):
        assert not moved[:, [1, 3]].any()
        assert moved[:, moving].any()
    assert torch.equal(threat.project(grad)[:, moving], others.project(grad[:, moving]))
    assert not kind(0.0).project(grad).any()
    assert not kind(0.0).sample_like(grad).any()
    assert not kind(0.0).maximizer(grad).any()


@every_kind
def test_moving_a_coordinate_of_radius_zero_leaves_the_ball(kind: Kind) -> None:
    delta = torch.tensor([[0.1, 0.0], [0.1, 0.2]])
    for threat in (kind(torch.tensor([[0.5, 0.0]])), kind(torch.tensor([[0.5, 0.0]], dtype=torch.float64))):
        assert threat.norm(delta).tolist() == pytest.approx([0.2, math.inf])
    assert kind(0.0).norm(torch.tensor([[0.0], [0.2]])).tolist() == [0.0, math.inf]


def test_rows_follow_what_is_given_for_each_sample() -> None:
    x = torch.zeros(3, 2, 4, 4)
    each = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    assert torch.equal(Linf(each).rows([2, 0], x).eps, each[[2, 0]])
    assert torch.equal(Linf(each).rows(torch.tensor([True, False, True]), x).eps, each[[0, 2]])
    for shared in (0.1, torch.tensor(0.1), torch.full((2, 1, 1), 0.1), torch.full((1, 2, 1, 1), 0.1)):
        assert Linf(shared).rows([2, 0], x).eps is shared
    square = torch.zeros(3, 3, 4, 4)
    per_channel = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert Linf(per_channel).rows([2, 0], square).eps is per_channel
    bounds = torch.arange(3.0).view(3, 1, 1, 1)
    assert rows_of(bounds, [1], x).item() == 1
    assert rows_of(0.5, [1], x) == 0.5


@every_kind
def test_another_radius_of_the_same_ball(kind: Kind) -> None:
    assert kind(0.5).scaled(0.5).eps == 0.25
    assert type(kind(0.5).scaled(0.5)) is kind
    assert kind(0.5).with_eps(0.1).eps == 0.1
    each = torch.rand(3, 1, 1, 1)
    assert torch.equal(kind(each).scaled(2.0).eps, 2 * each)
    sparse = L1(0.5, density=0.3)
    for other in (sparse.scaled(2.0), sparse.with_eps(0.1), sparse.rows([0], torch.zeros(2, 3))):
        assert other.density == 0.3


# Noise


@every_kind
@every_float
@given(data=st.data())
def test_noise_lies_in_the_ball(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    x, eps = data.draw(gradients_and_radii(dtype))
    noise = kind(eps).sample_like(x, torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    assert noise.dtype == dtype
    assert noise.shape == x.shape
    assert (kind(eps).norm(noise) <= 1 + IDENTITY[dtype]).all()


@every_kind
@every_half
def test_noise_in_half_precision(kind: Kind, dtype: torch.dtype) -> None:
    noise = kind(0.5).sample_like(torch.zeros(8, 3, 8, 8, dtype=dtype))
    assert noise.dtype == dtype
    assert (kind(0.5).norm(noise) <= 1 + ROUNDING[dtype]).all()
    assert (kind(0.5).norm(noise) > 0.5).all()


def largest_gap(sample: Tensor) -> float:
    """Between the distribution of a sample and the uniform one on [0, 1] (Kolmogorov and Smirnov)."""
    ranked = sample.double().sort().values
    return (ranked - (torch.arange(len(ranked)) + 0.5) / len(ranked)).abs().max().item()


COUNT = 10_000
GAP = 2.7 / COUNT**0.5  # exceeded by chance once in a million samples


@every_kind
@pytest.mark.parametrize("dimensions", [1, 3, 8])
def test_noise_fills_the_ball_uniformly(kind: Kind, dimensions: int) -> None:
    threat = kind(0.5)
    noise = threat.sample_like(torch.zeros(COUNT, dimensions), torch.Generator().manual_seed(1))
    size = threat.norm(noise)
    assert largest_gap(size**dimensions) < GAP
    standard_error = 0.5 / COUNT**0.5
    assert noise.mean(0).abs().max() < 5 * standard_error
    assert (noise.T @ noise / COUNT - torch.diag(noise.square().mean(0))).abs().max() < 5 * 0.25 / COUNT**0.5
    assert torch.corrcoef(torch.stack([size, noise[:, 0]]))[0, 1].abs() < 5 / COUNT**0.5


def test_noise_has_uniform_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.zeros(COUNT, 3)
    box = Linf(0.5).sample_like(x, generator)
    assert all(largest_gap(box[:, axis] + 0.5) < GAP for axis in range(3))
    sphere = L2(0.5).sample_like(x, generator)
    heights = sphere / sphere.norm(dim=1, keepdim=True)  # uniform on a sphere in space (Archimedes)
    assert all(largest_gap((heights[:, axis] + 1) / 2) < GAP for axis in range(3))
    simplex = L1(0.5).sample_like(x, generator)
    shares = (simplex / simplex.abs().sum(1, keepdim=True)).abs()  # of a uniform point: beta distributed
    assert all(largest_gap(1 - (1 - shares[:, axis]) ** 2) < GAP for axis in range(3))
    assert (simplex.sign().mean(0).abs() < 5 / COUNT**0.5).all()


@every_kind
def test_noise_is_reproducible_and_scales_with_the_radius(kind: Kind) -> None:
    x = torch.zeros(3, 2, 4, 4)
    eps = 0.1 + torch.rand(3, 1, 1, 1)

    def draw(eps: float | Tensor, seed: int) -> Tensor:
        return kind(eps).sample_like(x, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0.5, seed=3), draw(0.5, seed=3))
    assert not torch.equal(draw(0.5, seed=3), draw(0.5, seed=4))
    assert torch.equal(draw(eps, seed=3), eps * draw(1.0, seed=3))
    before = torch.get_rng_state()
    draw(0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = kind(0.5).sample_like(x)
    torch.manual_seed(5)
    assert torch.equal(kind(0.5).sample_like(x), first)
    assert not torch.equal(kind(0.5).sample_like(x), first)


# The step of an attack


@pytest.mark.parametrize("kind", [Linf, L2])
def test_ascent_is_the_maximizer(kind: Kind) -> None:
    grad, delta = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(kind(0.5).ascent(grad, delta, (-delta, delta)), kind(0.5).maximizer(grad))


@pytest.mark.parametrize(("density", "count"), [(0.01, 1), (0.05, 2), (0.25, 8), (0.3, 10), (0.5, 16), (1.0, 32)])
def test_ascent_in_l1_moves_the_best_coordinates_equally(density: float, count: int) -> None:
    grad = torch.randn(3, 2, 4, 4)
    eps = 0.1 + torch.rand(2, 1, 1)
    step = L1(eps, density).ascent(grad, torch.zeros_like(grad))
    moved = step.abs() > 1e-6
    merit = (eps * grad).abs()
    assert moved.flatten(1).sum(1).tolist() == [count] * 3
    assert close(L1(eps).norm(step), torch.ones(3), 1e-6)
    assert close(step, moved * grad.sign() * eps / count, 1e-6)
    for sample in range(3):
        best, rest = merit[sample][moved[sample]], merit[sample][~moved[sample]]
        assert rest.numel() == 0 or best.min() >= rest.max()


def test_ascent_in_l1_moves_only_where_there_is_headroom() -> None:
    low, high = torch.tensor([[-0.2, -0.2, 0.0, -0.2]]), torch.tensor([[0.1, 0.1, 0.1, 0.1]])
    grad = torch.tensor([[5.0, -4.0, -3.0, 2.0]])

    def step(delta: list[float], density: float, sign: int = 1) -> Tensor:
        return L1(0.3, density).ascent(sign * grad, torch.tensor([delta]), (low, high))

    at_limits = [0.1, -0.1, 0.0, 0.0]  # the first is at its upper limit, the third at its lower one
    assert close(step(at_limits, density=0.5), torch.tensor([[0.0, -0.1, 0.0, 0.1]]), 1e-7)
    assert close(step(at_limits, density=1.0), torch.tensor([[0.0, -0.075, 0.0, 0.075]]), 1e-7)
    assert close(step([0.0, 0.1, 0.0, 0.0], density=0.25), torch.tensor([[0.1, -0.2, 0.0, 0.0]]), 1e-7)
    assert not step([0.1, -0.2, 0.0, 0.1], density=1.0).any()
    assert not step([0.1001, -0.2001, -0.0001, 0.1001], density=1.0).any()  # outside by rounding
    inwards = step(at_limits, density=0.25, sign=-1)  # from a limit there is room to the other one
    assert close(inwards, torch.tensor([[-0.3, 0.0, 0.0, 0.0]]), 1e-7)


@given(data=st.data())
def test_ascent_in_l1_rises_most_of_all_steps_of_its_density(data: st.DataObject) -> None:
    grad, eps = data.draw(gradients_and_radii(torch.float64))
    x = torch.rand(grad.shape, dtype=torch.float64)
    delta = L1(eps).project(torch.randn_like(x), (-x, 1 - x))
    density = data.draw(st.sampled_from([0.01, 0.1, 0.5, 1.0]))
    step = L1(eps, density).ascent(grad, delta, (-x, 1 - x))
    share = 1 / max(1, round(density * grad[0].numel()))
    expected = reference.steepest_rise(grad, eps, share, (-x - delta, 1 - x - delta))
    assert close(inner(grad, step), expected, 1e-10, reference.dual_norm(grad, eps, P[L1]))
    assert (L1(eps).norm(step) <= 1 + 1e-12).all()
    assert close((delta + step).clamp(-x, 1 - x), delta + step, 1e-12)


def test_ascent_in_l1_takes_a_box_that_broadcasts() -> None:
    grad = torch.randn(2, 3, 4, 4)
    delta = 0.1 * torch.randn(2, 3, 4, 4).sign()
    low, high = torch.full((3, 1, 1), -0.1), torch.tensor(0.1)
    step = L1(0.5, density=1.0).ascent(grad, delta, (low, high))
    assert torch.equal(step != 0, grad.sign() != delta.sign())


def test_ascent_in_l1_follows_the_radius_of_each_sample() -> None:
    grad, delta = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    eps = torch.tensor([0.1, 0.7]).view(2, 1, 1, 1)
    step = L1(eps, density=0.25).ascent(grad, delta)
    for sample, alone in enumerate((0.1, 0.7)):
        one = slice(sample, sample + 1)
        assert torch.equal(step[one], L1(alone, density=0.25).ascent(grad[one], delta[one]))


@every_kind
def test_ascent_without_a_gradient_stays(kind: Kind) -> None:
    zero, x = torch.zeros(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert not kind(0.5).ascent(zero, zero).any()
    assert not kind(0.5).ascent(zero, zero, (-x, 1 - x)).any()


# What is refused, and what a threat model is as an object


@every_kind
@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (-0.1, "eps must be finite and at least 0, got -0.1"),
        (math.nan, "eps must be finite and at least 0, got nan"),
        (math.inf, "eps must be finite and at least 0, got inf"),
        (torch.tensor([[0.1], [-0.1]]), "eps must be finite and at least 0, got tensor"),
        (torch.tensor([[0.1], [math.nan]]), "eps must be finite and at least 0, got tensor"),
        (torch.tensor([[0.1], [math.inf]]), "eps must be finite and at least 0, got tensor"),
        (torch.tensor([0.1, 0.2]), r"shape \(2,\), which could mean samples, channels or columns.*view\(-1, 1, 1, 1\)"),
    ],
    ids=["negative", "nan", "inf", "negative entry", "nan entry", "inf entry", "one dimension"],
)
def test_radius_is_checked(kind: Kind, eps: float | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: .*{message}"):
        kind(eps)


@every_kind
@pytest.mark.parametrize(
    ("eps_shape", "shape"),
    [((2, 1, 1), (2, 3)), ((3, 1), (2, 3)), ((3, 1), (1, 3)), ((4, 1, 1, 1), (1, 3, 2, 2)), ((5, 1, 1), (2, 3, 2, 2))],
    ids=str,
)
@pytest.mark.parametrize(
    "use",
    [
        lambda threat, x: threat.dual_norm(x),
        lambda threat, x: threat.norm(x),
        lambda threat, x: threat.maximizer(x),
        lambda threat, x: threat.project(x),
        lambda threat, x: threat.project(x, (-x.abs(), x.abs())),
        lambda threat, x: threat.sample_like(x),
        lambda threat, x: threat.ascent(x, x),
    ],
    ids=["dual_norm", "norm", "maximizer", "project", "project into a box", "sample_like", "ascent"],
)
def test_radius_that_does_not_fit_the_batch(
    kind: Kind,
    eps_shape: tuple[int, ...],
    shape: tuple[int, ...],
    use: Callable[[ThreatModel, Tensor], Tensor],
    unchecked: None,
) -> None:
    threat = kind(torch.ones(eps_shape))
    message = f"^{kind.__name__}: eps of shape {eps_shape} does not broadcast against a batch of shape {shape}"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        use(threat, torch.randn(shape))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_density_is_a_fraction(density: float) -> None:
    with pytest.raises(ValueError, match=rf"^L1: density is a fraction of the coordinates in \(0, 1\], got {density}"):
        L1(0.5, density)


def test_threat_model_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ThreatModel(0.5)


@every_kind
def test_threat_model_is_a_value(kind: Kind) -> None:
    threat = kind(0.5)
    grad = torch.randn(2, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0
    assert repr(threat).startswith(f"{kind.__name__}(eps=0.5")
    assert repr(eval(repr(threat))) == repr(threat)
    for other in (pickle.loads(pickle.dumps(threat)), copy.deepcopy(threat)):
        assert type(other) is kind
        assert torch.equal(other.maximizer(grad), threat.maximizer(grad))
    assert pickle.loads(pickle.dumps(L1(0.5, density=0.3))).density == 0.3


@every_kind
def test_inputs_are_not_changed(kind: Kind) -> None:
    grad, x = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    eps = 0.1 + torch.rand(2, 1, 1, 1)
    tensors = (grad, x, eps)
    before = [tensor.clone() for tensor in tensors]
    threat = kind(eps)
    threat.dual_norm(grad)
    threat.norm(grad)
    threat.maximizer(grad)
    threat.project(grad)
    threat.project(grad, (-x, 1 - x))
    threat.ascent(grad, grad, (-x, 1 - x))
    threat.sample_like(x)
    assert all(torch.equal(tensor, saved) for tensor, saved in zip(tensors, before, strict=True))


@every_kind
def test_radius_inside_a_transform(kind: Kind) -> None:
    grad = torch.randn(3, 5, dtype=torch.float64)
    eps = 0.1 + torch.rand(3, dtype=torch.float64)

    def largest_rise(radius: Tensor, row: Tensor) -> Tensor:
        return kind(radius).dual_norm(row[None])[0]

    def nearest(radius: Tensor, row: Tensor) -> Tensor:
        return kind(radius).project(row[None])[0]

    each = kind(eps.view(3, 1))
    assert close(torch.func.vmap(largest_rise)(eps, grad), each.dual_norm(grad), 1e-12)
    assert close(torch.func.vmap(nearest)(eps, grad), each.project(grad), 1e-12)
    slopes = torch.func.vmap(torch.func.grad(largest_rise))(eps, grad)
    assert close(slopes, kind(1.0).dual_norm(grad), 1e-12)  # the dual norm is eps times that of radius 1


@pytest.mark.usefixtures("unchecked")
def test_a_list_of_radii_is_refused_with_the_mend() -> None:
    with pytest.raises(TypeError, match=r"torch.tensor\(\[0.1, 0.2\]\).view\(-1, 1, 1\)"):
        Linf([0.1, 0.2])

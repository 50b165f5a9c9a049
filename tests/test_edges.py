"""Edge energies: the explicit double loop, closed forms, symmetries, and smoothness where an image is flat."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradreg import contour_energy, edge_alignment, oriented_energy

import reference
from strategies import normals

Energy = Callable[..., Tensor]
DEGREE = {oriented_energy: 2, contour_energy: 1}  # energy(a * x) = a**degree * energy(x)
REFERENCE = {oriented_energy: reference.oriented_energy, contour_energy: reference.contour_energy}
every_energy = pytest.mark.parametrize("energy", list(DEGREE), ids=lambda energy: energy.__name__)


def ramp(height: int, width: int, down: float, right: float, start: float = 0.0) -> Tensor:
    """An image that rises by down per row and right per column."""
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return (start + down * rows[:, None] + right * columns)[None, None]


@every_energy
@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_energy_is_the_explicit_loop(energy: Energy, sigma: float, dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 6, 8, dtype=dtype)
    found, expected = energy(x, sigma=sigma), REFERENCE[energy](x, sigma)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


def test_discrete_gaussian_has_the_published_taps() -> None:
    taps = reference.discrete_gaussian(1.0)
    assert taps == pytest.approx([0.008174, 0.05005, 0.208375, 0.466801, 0.208375, 0.05005, 0.008174], abs=1e-6)


def test_contour_energy_of_a_step_spreads_by_the_published_taps() -> None:
    """The difference over two pixels of a blurred step is the filter on either side of it; it is blurred once more."""
    step = (torch.arange(24) >= 12).double().expand(1, 1, 24, 24)
    taps = torch.tensor(reference.discrete_gaussian(1.0), dtype=torch.float64)
    either_side = 2 * (F.pad(taps, (1, 0)) + F.pad(taps, (0, 1)))
    expected = F.conv1d(either_side[None, None], taps[None, None], padding=6)[0, 0]
    middle = contour_energy(step)[0, 0, 12]
    torch.testing.assert_close(middle[5:19], expected, rtol=0, atol=1e-12)


@every_energy
@given(data=st.data())
def test_energy_is_never_negative_and_grows_by_its_degree(energy: Energy, data: st.DataObject) -> None:
    x = data.draw(normals((2, 3, 7, 9), torch.float64))
    scale = data.draw(st.floats(-100, 100))
    plain = energy(x)
    assert (plain >= 0).all()
    torch.testing.assert_close(energy(scale * x), abs(scale) ** DEGREE[energy] * plain, rtol=1e-10, atol=1e-10)


@every_energy
@given(data=st.data())
def test_energy_ignores_brightness(energy: Energy, data: st.DataObject) -> None:
    x = data.draw(normals((2, 3, 7, 9), torch.float64))
    offset = data.draw(normals((2, 3, 1, 1), torch.float64))
    torch.testing.assert_close(energy(x + offset), energy(x), rtol=0, atol=1e-10)


@every_energy
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_energy_turns_with_the_image(energy: Energy, sigma: float) -> None:
    x = torch.randn(2, 3, 8, 11, dtype=torch.float64)
    plain = energy(x, sigma=sigma)
    for quarters in (1, 2, 3):
        turned = energy(x.rot90(quarters, (2, 3)), sigma=sigma)
        torch.testing.assert_close(turned, plain.rot90(quarters, (2, 3)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(energy(x.flip(3), sigma=sigma), plain.flip(3), rtol=1e-10, atol=1e-10)


@every_energy
def test_energy_moves_with_the_image(energy: Energy) -> None:
    spot = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    spot[0, 0, 14:16, 14:17] = torch.rand(2, 3, dtype=torch.float64)
    moved = energy(spot.roll((2, -1), (2, 3)))
    torch.testing.assert_close(moved, energy(spot).roll((2, -1), (2, 3)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("down", "right"), [(1.0, 0.0), (0.0, -2.0), (0.3, 0.4)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_oriented_energy_of_a_ramp_is_its_squared_slope(down: float, right: float, sigma: float) -> None:
    inner = slice(6, -6)
    energy = oriented_energy(ramp(16, 17, down, right, start=5.0), sigma=sigma)[..., inner, inner]
    torch.testing.assert_close(energy, torch.full_like(energy, down**2 + right**2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_contour_energy_of_ramps_is_four_times_the_root_of_their_squared_slopes(sigma: float) -> None:
    """The 3x3 differences answer 4 to a slope of 1; channels add up before the root."""
    channels = torch.cat([ramp(25, 25, 0.3, 0.4), ramp(25, 25, 1.2, 0.0)], 1)
    inner = slice(12, 13)
    energy = contour_energy(channels, sigma=sigma)[..., inner, inner]
    torch.testing.assert_close(energy, torch.full_like(energy, 4 * 1.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frequency", [0.2, 0.5, 1.0])
def test_oriented_energy_of_a_wave(frequency: float) -> None:
    """The Gaussian derivative of A sin(kx) is A k exp(-(k sigma)^2 / 2) cos(kx)."""
    position = torch.arange(65, dtype=torch.float64)
    wave = 3.0 * (frequency * position).sin().expand(1, 1, 65, 65)
    expected = (3.0 * frequency * math.exp(-(frequency**2) / 2) * (frequency * position).cos()) ** 2
    middle = oriented_energy(wave)[0, 0, 32, 3:-3]
    torch.testing.assert_close(middle, expected[3:-3], rtol=0, atol=0.06 * expected.max().item())


def test_oriented_energy_keeps_channels_apart_and_contour_energy_joins_them() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    one = slice(1, 2)
    torch.testing.assert_close(oriented_energy(x)[:, one], oriented_energy(x[:, one]))
    assert contour_energy(x).shape == (2, 1, 8, 8)
    torch.testing.assert_close(contour_energy(x[:, [2, 0, 1]]), contour_energy(x))


@every_energy
def test_every_image_has_its_own_energy(energy: Energy) -> None:
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(energy(x)[1:2], energy(x[1:2]), rtol=1e-12, atol=1e-12)


@every_energy
def test_flat_images_have_no_energy_and_a_finite_derivative(energy: Energy) -> None:
    flat = torch.zeros(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    value = energy(flat)
    assert not value.any()
    (derivative,) = torch.autograd.grad(value.sum(), flat)
    assert not derivative.any()
    half = torch.cat([torch.zeros(1, 1, 12, 8), torch.rand(1, 1, 12, 8)], 3).requires_grad_()
    (derivative,) = torch.autograd.grad(energy(half).sum(), half)
    assert derivative.isfinite().all()
    assert derivative.any()


@every_energy
def test_energy_has_its_derivatives(energy: Energy) -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(energy, x)


@every_energy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_energy_is_computed_in_float32_under_autocast(energy: Energy, dtype: torch.dtype) -> None:
    x, grad = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        found, alignment = energy(x), edge_alignment(grad, x, energy=energy)
    assert found.dtype == torch.float32
    assert torch.equal(found, energy(x))
    assert torch.equal(alignment, edge_alignment(grad, x, energy=energy))


@every_energy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_energy_of_half_precision_images_is_computed_in_float32(energy: Energy, dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 8, 8).to(dtype)
    torch.testing.assert_close(energy(x).float(), energy(x.float()), rtol=1e-2, atol=1e-3)


@every_energy
def test_strided_images(energy: Energy) -> None:
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    assert torch.allclose(energy(x.contiguous(memory_format=torch.channels_last)), energy(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(energy(x.mT), energy(x.mT.contiguous()), rtol=1e-12, atol=1e-12)


@every_energy
@pytest.mark.parametrize(
    ("shape", "sigma", "message"),
    [
        ((3, 9, 9), 1.0, "expected images of shape (B, C, H, W), got (3, 9, 9)"),
        ((2, 9), 1.0, "expected images of shape (B, C, H, W), got (2, 9)"),
        ((1, 3, 9, 9), 0.0, "sigma is a width in pixels and must be above 0, got 0.0"),
        ((1, 3, 9, 9), -1.0, "sigma is a width in pixels and must be above 0, got -1.0"),
        ((1, 3, 9, 9), math.nan, "sigma is a width in pixels and must be above 0, got nan"),
        ((1, 3, 9, 3), 1.0, "images of 9x3 are too small for a filter that reaches 3 pixels (3 * sigma, sigma=1.0)"),
        ((1, 3, 4, 9), 1.5, "images of 4x9 are too small for a filter that reaches 5 pixels (3 * sigma, sigma=1.5)"),
    ],
    ids=["no batch", "vectors", "zero", "negative", "nan", "narrow", "low"],
)
def test_what_has_no_edges(energy: Energy, shape: tuple[int, ...], sigma: float, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{energy.__name__}: {message}")):
        energy(torch.rand(shape), sigma=sigma)


@every_energy
def test_smallest_images(energy: Energy) -> None:
    assert energy(torch.rand(1, 3, 4, 4)).isfinite().all()
    assert energy(torch.rand(1, 3, 3, 3), sigma=0.5).isfinite().all()

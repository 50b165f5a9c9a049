"""Hypothesis strategies for batches of gradients and perturbations, radii of every accepted form, and pixel ranges."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64)

vectors = st.tuples(st.integers(1, 4), st.integers(1, 12))
images = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
shapes = st.one_of(vectors, images)


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers spread evenly over orders of magnitude."""
    return st.floats(low, high).map(lambda exponent: 10**exponent)


@st.composite
def normals(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, spread: float = 0.0) -> Tensor:
    """Normal numbers, among which may be zeros, whole samples included, of magnitudes up to 10**spread apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values * 10 ** (spread * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5))
    if draw(st.booleans()):
        values = values * (torch.rand(shape, generator=generator) < 0.5)
    if draw(st.booleans()):
        values[0] = 0
    return values.to(dtype)


@st.composite
def gradients(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """Batches of shape (B, d) or (B, C, H, W) at scales from 1e-20 to 1e20."""
    shape = draw(shapes) if shape is None else shape
    return draw(normals(shape, dtype, spread=4)) * draw(powers_of_ten(-20, 20))


@st.composite
def radii(draw: st.DrawFn, shape: tuple[int, ...], *, zeros: bool = True) -> float | Tensor:
    """A radius for batches of this shape: a number, or a tensor for each sample, channel or coordinate."""
    scale = draw(powers_of_ten(-2, 1))
    forms = [None, (), (shape[0],) + (1,) * (len(shape) - 1), shape]
    if len(shape) == 4:
        forms.append((shape[1], 1, 1))
    form = draw(st.sampled_from(forms))
    if form is None:
        return draw(st.sampled_from([scale, 0.0])) if zeros else scale
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    eps = scale * (0.1 + torch.rand(form, generator=generator))
    return eps * (torch.rand(form, generator=generator) < 0.8) if zeros and draw(st.booleans()) else eps


@dataclass(frozen=True)
class Perturbation:
    """A perturbation to be projected, the radius, and the room that the pixels leave it."""

    delta: Tensor
    eps: float | Tensor
    box: tuple[Tensor, Tensor] | None


@st.composite
def perturbations(draw: st.DrawFn, dtype: torch.dtype) -> Perturbation:
    """Perturbations from well inside to far outside of the ball; pixels of [0, 1], some of them at their limits."""
    shape = draw(shapes)
    eps = draw(radii(shape))
    delta = draw(normals(shape, dtype)) * draw(powers_of_ten(-4, 3))
    if not draw(st.booleans()):
        return Perturbation(delta, eps, None)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = (1.5 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.25).clamp(0, 1).to(dtype)
    return Perturbation(delta, eps, (-x, 1 - x))

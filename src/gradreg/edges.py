r"""Edge maps of an image: the oriented energy of the thesis, and the contour energy of its released code.

Both answer "how much does the image change here", pixel by pixel. They differ where the text and the code of
Rodríguez Muñoz ("Adversarial robustness without perturbations", MIT 2024, chapter 5) differ:

=============  ======================================  =============================================
.              :func:`oriented_energy` (equation 5.1)  :func:`contour_energy` (released code)
=============  ======================================  =============================================
derivative     Gaussian-derivative filters             discrete Gaussian blur, then 3x3 differences
magnitude      squared                                 square root of the sum of squares
channels       each its own map                        summed into one map
afterwards     nothing                                 blurred again
=============  ======================================  =============================================
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def oriented_energy(x: Float[Tensor, "B C H W"], *, sigma: float = 1.0) -> Float[Tensor, "B C H W"]:
    r"""Squared length of the smoothed image gradient, per channel.

    .. math:: E(x) = |g_u * x|^2 + |g_v * x|^2

    with :math:`g_u, g_v` the horizontal and vertical derivative of a Gaussian of standard deviation sigma (Rodríguez
    Muñoz, MIT 2024, equation 5.1). The filters reach three standard deviations, borders are reflected, and a filter
    answers 1 to a ramp that rises by 1 per pixel.

    Args:
        x: Images. H and W must exceed ``ceil(3 * sigma)``.
        sigma: Standard deviation of the Gaussian, in pixels.

    Returns:
        The energy, in squared input units per squared pixel.

    Raises:
        ValueError: If x is no batch of images, sigma is not above 0, or the images are too small for the filter.

    Example:
        >>> ramp = torch.arange(9.0).expand(1, 1, 9, 9)
        >>> oriented_energy(ramp)[0, 0, 4, 4].round(decimals=4)
        tensor(1.)
    """
    offsets = _offsets(x, sigma, "oriented_energy")
    smooth = torch.exp(-(offsets**2) / (2 * sigma**2))
    slope = offsets * smooth
    smooth, slope = smooth / smooth.sum(), slope / (slope * offsets).sum()
    return _filter(x, slope, smooth).square() + _filter(x, smooth, slope).square()


def contour_energy(x: Float[Tensor, "B C H W"], *, sigma: float = 1.0) -> Float[Tensor, "B 1 H W"]:
    r"""Length of the smoothed image gradient over all channels, smoothed again.

    .. math:: E(x) = h * \sqrt{\textstyle\sum_c |k_u * h * x_c|^2 + |k_v * h * x_c|^2}

    with h the discrete Gaussian :math:`h_n \propto e^{-\sigma^2} I_n(\sigma^2)` and :math:`k_u(i, j) = i / (i^2 + j^2)`
    on 3x3 pixels. This is the target that the released code of Rodríguez Muñoz (MIT 2024) aligns gradients with, where
    its text says :func:`oriented_energy`; that code has sigma instead of sigma squared, which is the same at its sigma
    of 1.

    Args:
        x: Images. H and W must exceed ``ceil(3 * sigma)``.
        sigma: Standard deviation of the Gaussian, in pixels.

    Returns:
        One map per image, in units of the input per pixel.

    Raises:
        ValueError: If x is no batch of images, sigma is not above 0, or the images are too small for the filter.

    Example:
        >>> bool(contour_energy(torch.ones(1, 3, 9, 9)).max() < 1e-6)
        True
    """
    offsets = _offsets(x, sigma, "contour_energy")
    gaussian = _discrete_gaussian(offsets, sigma)
    side = offsets.new_tensor([-1.0, 0.0, 1.0])
    slope = side.view(1, 3) / (side.view(1, 3) ** 2 + side.view(3, 1) ** 2).clamp(min=1)
    blurred = _filter(x, gaussian, gaussian)
    squares = _correlate(blurred, slope).square() + _correlate(blurred, slope.T).square()
    total = squares.sum(1, keepdim=True)
    # The root has an infinite slope at 0; a flat image must still be differentiable.
    root = torch.where(total > 0, total.where(total > 0, 1.0).sqrt(), 0.0)
    return _filter(root, gaussian, gaussian)


def _offsets(x: Tensor, sigma: float, name: str) -> Tensor:
    """The pixels that a filter of this width spans, after checking that it fits the images."""
    if x.ndim != 4:
        raise ValueError(f"{name}: expected images of shape (B, C, H, W), got {tuple(x.shape)}.")
    if not sigma > 0:
        raise ValueError(f"{name}: sigma is a width in pixels and must be above 0, got {sigma}.")
    radius = math.ceil(3 * sigma)
    if min(x.shape[2:]) <= radius:
        raise ValueError(
            f"{name}: images of {x.shape[2]}x{x.shape[3]} are too small for a filter that reaches {radius} pixels "
            f"(3 * sigma, sigma={sigma}); choose a smaller sigma."
        )
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.arange(-radius, radius + 1, dtype=dtype, device=x.device)


def _discrete_gaussian(offsets: Tensor, sigma: float) -> Tensor:
    """Values e^-t I_n(t) at t = sigma^2, the Gaussian of a discrete line, cut off and scaled to sum 1.

    Their generating function is exp(t (cos θ - 1)), so one Fourier sum over more angles than the filter has taps
    gives them to rounding.
    """
    angles = torch.arange(0, 512, dtype=torch.float64, device=offsets.device) * (2 * math.pi / 512)
    spectrum = torch.exp(sigma**2 * (angles.cos() - 1))
    taps = (spectrum * torch.cos(offsets.double().unsqueeze(1) * angles)).mean(1)
    return (taps / taps.sum()).to(offsets.dtype)


def _filter(x: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Correlation with a separable filter, per channel, borders reflected."""
    return _correlate(_correlate(x, horizontal.view(1, -1)), vertical.view(-1, 1))


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlation with one kernel, per channel, borders reflected; in the kernel's type, also under autocast."""
    rows, columns = kernel.shape
    padded = F.pad(x.to(kernel.dtype), (columns // 2, columns // 2, rows // 2, rows // 2), mode="reflect")
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(padded, kernel.expand(x.shape[1], 1, rows, columns), groups=x.shape[1])

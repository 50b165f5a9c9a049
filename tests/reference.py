"""Slow, obvious versions of what the library computes: float64, one sample and one pixel at a time.

Nothing here is shared with the library, and each algorithm is another one than the library's: bisection where it sorts,
explicit loops where it convolves, power series where it takes Fourier sums.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = list[list[float]]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each sample of a with that of b, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1)


def radius(eps: float | Tensor, like: Tensor) -> Tensor:
    """The radius of every coordinate, in float64."""
    return torch.as_tensor(eps, dtype=torch.float64).expand(like.shape)


def p_norm(values: Tensor, p: float) -> float:
    """The p-norm of a row of numbers."""
    numbers = [abs(value) for value in values.flatten().tolist()]
    largest = max(numbers, default=0.0)
    if largest == 0 or p == math.inf:
        return largest
    return largest * sum((number / largest) ** p for number in numbers) ** (1 / p)


def dual_norm(grad: Tensor, eps: float | Tensor, p: float) -> Tensor:
    """The q-norm of eps * grad per sample, where 1/p + 1/q = 1."""
    q = {1: math.inf, 2: 2, math.inf: 1}[p]
    return torch.tensor([p_norm(row, q) for row in grad.double() * radius(eps, grad)], dtype=torch.float64)


def project(delta: Tensor, eps: float | Tensor, p: float, box: tuple[Tensor, Tensor] | None) -> Tensor:
    """The nearest point of ball and box in the coordinates delta / eps, per sample."""
    low, high = box or (torch.tensor(-math.inf), torch.tensor(math.inf))
    sides = (side.double().expand(delta.shape) for side in (delta, radius(eps, delta), low, high))
    return torch.stack([_project(*sample, p) for sample in zip(*sides, strict=True)])


def _project(delta: Tensor, eps: Tensor, low: Tensor, high: Tensor, p: float) -> Tensor:
    """One sample: the multiplier of the norm constraint by bisection."""
    moves = eps > 0
    scale = torch.where(moves, eps, 1.0)
    u, low, high = (torch.where(moves, side / scale, 0.0) for side in (delta, low, high))
    if p == math.inf:
        return u.clamp(-1, 1).clamp(low, high) * eps

    def at(multiplier: float) -> Tensor:
        moved = u.sign() * (u.abs() - multiplier).clamp(min=0) if p == 1 else u / (1 + multiplier)
        return moved.clamp(low, high)

    if p_norm(at(0.0), p) <= 1:
        return at(0.0) * eps
    inside, outside = p_norm(u, 2) + 1, 0.0
    for _ in range(100):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if p_norm(at(middle), p) <= 1 else (inside, middle)
    return at(inside) * eps


def highest_rise(grad: Tensor, eps: float | Tensor, p: float, box: tuple[Tensor, Tensor]) -> Tensor:
    """The most that <grad, delta> can be for delta in ball and box, per sample."""
    if p == 1:
        return steepest_rise(grad, eps, 1.0, box)
    sides = (side.double().expand(grad.shape) for side in (grad, radius(eps, grad), *box))
    return torch.tensor([_highest_rise(*sample, p) for sample in zip(*sides, strict=True)], dtype=torch.float64)


def _highest_rise(grad: Tensor, eps: Tensor, low: Tensor, high: Tensor, p: float) -> float:
    """One sample: each coordinate as far as it can go for Linf; for L2 the multiplier of the norm by bisection."""
    moves = eps > 0
    scale = torch.where(moves, eps, 1.0)
    low, high = (torch.where(moves, side / scale, 0.0) for side in (low, high))
    slope = grad * eps
    corner = torch.where(slope > 0, high, torch.where(slope < 0, low, 0.0))
    if p == math.inf:
        return (slope * corner.clamp(-1, 1)).sum().item()
    if p_norm(corner, 2) <= 1:
        return (slope * corner).sum().item()
    slope = slope / (largest := slope.abs().max())
    inside, outside = 0.0, 1e30
    for _ in range(300):
        middle = (inside + outside) / 2 if inside > 0 else outside / 10
        inside, outside = (middle, outside) if p_norm((middle * slope).clamp(low, high), 2) <= 1 else (inside, middle)
    return (largest * (slope * (inside * slope).clamp(low, high)).sum()).item()


def steepest_rise(grad: Tensor, eps: float | Tensor, largest: float, box: tuple[Tensor, Tensor]) -> Tensor:
    """The most that <grad, step> can be for a step of L1 norm 1 and coordinates at most largest, in units of eps.

    The step stays in the box. Greedy: spend the norm where it buys most.
    """

    def rise(grad: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> float:
        slopes, sides = (eps * grad).tolist(), torch.where(grad < 0, -low, high).tolist()
        rooms = [
            min(largest, side / radius) if radius > 0 else 0.0 for side, radius in zip(sides, eps.tolist(), strict=True)
        ]
        total, left = 0.0, 1.0
        for slope, room in sorted(zip(map(abs, slopes), rooms, strict=True), reverse=True):
            total, left = total + slope * min(room, left), left - min(room, left)
        return total

    sides = (side.double().expand(grad.shape).flatten(1) for side in (grad, radius(eps, grad), *box))
    return torch.tensor([rise(*sample) for sample in zip(*sides, strict=True)], dtype=torch.float64)


def reflected(index: int, length: int) -> int:
    """The pixel that a reflecting border shows at this index: -1 is pixel 1, length is pixel length - 2."""
    if index < 0:
        return -index
    return 2 * (length - 1) - index if index >= length else index


def correlate(channel: Tensor, kernel: Kernel) -> Tensor:
    """Correlation of one channel with a kernel of odd size, borders reflected."""
    pixels = channel.tolist()
    height, width = channel.shape
    up, left = len(kernel) // 2, len(kernel[0]) // 2

    def at(row: int, column: int) -> float:
        return sum(
            weight * pixels[reflected(row + i - up, height)][reflected(column + j - left, width)]
            for i, weights in enumerate(kernel)
            for j, weight in enumerate(weights)
        )

    return torch.tensor([[at(row, column) for column in range(width)] for row in range(height)], dtype=torch.float64)


def oriented_energy(x: Tensor, sigma: float) -> Tensor:
    """Squared responses to the two derivatives of a sampled Gaussian, normalised to answer 1 to a ramp of slope 1."""
    reach = range(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    bell = [math.exp(-(n**2) / (2 * sigma**2)) for n in reach]
    slope_of_ramp = sum(n**2 * weight for n, weight in zip(reach, bell, strict=True))
    smooth = [weight / sum(bell) for weight in bell]
    slope = [n * weight / slope_of_ramp for n, weight in zip(reach, bell, strict=True)]
    across = [[down * right for right in slope] for down in smooth]
    along = [[down * right for right in smooth] for down in slope]

    def energy(channel: Tensor) -> Tensor:
        return correlate(channel, across).square() + correlate(channel, along).square()

    return torch.stack([torch.stack([energy(channel) for channel in image]) for image in x.double()])


def discrete_gaussian(sigma: float) -> list[float]:
    """Taps proportional to e^-t I_n(t) at t = sigma^2, of sum 1, from the power series of the Bessel functions."""
    t, reach = sigma**2, math.ceil(3 * sigma)

    def bessel(n: int) -> float:
        terms = ((2 * k + n) * math.log(t / 2) - math.lgamma(k + 1) - math.lgamma(k + n + 1) for k in range(100))
        return math.fsum(math.exp(term) for term in terms)

    taps = [bessel(abs(n)) for n in range(-reach, reach + 1)]
    return [tap / sum(taps) for tap in taps]


def contour_energy(x: Tensor, sigma: float) -> Tensor:
    """Blur, 3x3 differences, root of the sum of squares over directions and channels, blur."""
    taps = discrete_gaussian(sigma)
    blur = [[down * right for right in taps] for down in taps]
    across = [[-0.5, 0.0, 0.5], [-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]]
    along = [list(row) for row in zip(*across, strict=True)]

    def energy(image: Tensor) -> Tensor:
        blurred = [correlate(channel, blur) for channel in image]
        sides = torch.stack([correlate(channel, kernel) for channel in blurred for kernel in (across, along)])
        return correlate(sides.square().sum(0).sqrt(), blur)

    return torch.stack([energy(image)[None] for image in x.double()])


def one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per sample; 1 where either is 0."""
    dots = inner(a, b).tolist()
    lengths = [p_norm(row, 2) * p_norm(other, 2) for row, other in zip(a.double(), b.double(), strict=True)]
    cosines = [dot / length if length > 0 else 0.0 for dot, length in zip(dots, lengths, strict=True)]
    return torch.tensor([1 - cosine for cosine in cosines], dtype=torch.float64)


def squared_error_of_normalised(grad: Tensor, edges: Tensor) -> Tensor:
    """The edge loss of the released code: mean squared error, each tensor divided by its root mean square."""
    grad, edges = grad.double(), edges.double().expand(grad.shape)
    return (grad / grad.square().mean().sqrt() - edges / edges.square().mean().sqrt()).square().mean()


def published_gradient_penalty(
    model: Callable[[Tensor], Tensor], z: Tensor, probabilities: Tensor, eps: float, std: float
) -> Tensor:
    """The penalty of the released code: (eps / std) * B * mean_i of the L1 norm of the batch-mean loss's gradient."""
    z = z.detach().requires_grad_()
    mean_loss = -(probabilities * model(z).log_softmax(1)).sum(1).mean()
    (grad,) = torch.autograd.grad(mean_loss, z)
    return eps / std * len(z) * grad.abs().flatten(1).sum(1).mean()

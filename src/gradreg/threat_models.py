r"""Threat models: the sets of perturbations that a model should be robust to.

A threat model is a scaled norm ball :math:`\{\delta : \|\delta / \varepsilon\|_p \le 1\}`. Everything that an
attack or a penalty needs to know of it follows from the ball alone: the dual norm (how much a linear function can
rise inside it), the maximiser (where it rises most), the projection onto it, and uniform noise in it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

Eps = float | Tensor
Bounds = tuple[float | Tensor, float | Tensor]
Box = tuple[Tensor, Tensor]

_FAR = 1e15  # times as far as the ball; its square, added over all coordinates, is still a number in float32


@dataclass(frozen=True, eq=False)
class ThreatModel(ABC):
    r"""A ball :math:`\{\delta : \|\delta/\varepsilon\|_p \le 1\}` of perturbations of one sample.

    Samples lie along the first dimension of every tensor; a norm runs over all other dimensions.

    Attributes:
        eps: The radius, in the units of the model's input (``8 / 255`` for pixels in [0, 1]). A tensor gives each
            sample, channel or pixel its own: it broadcasts against a batch ``(B, ...)``, for example ``(B, 1, 1, 1)``
            for one radius per sample or ``(C, 1, 1)`` for one per channel. A loader that normalises its images by
            ``std`` has the radius ``eps / std`` with ``std`` of shape ``(C, 1, 1)``.

    Raises:
        ValueError: If eps is negative or not finite, or a one-dimensional tensor: whether that would mean
            samples, channels or columns cannot be told.
    """

    eps: Eps

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.eps, Tensor):
            if self.eps.ndim == 1:
                raise ValueError(
                    f"{name}: eps has shape {tuple(self.eps.shape)}, which could mean samples, channels or columns. "
                    "Give it the shape in which it broadcasts against the batch: eps.view(-1, 1, 1, 1) for one "
                    "radius per sample, eps.view(-1, 1, 1) for one per channel."
                )
            if self.eps.device.type == "cpu" and not _transformed(self.eps):
                self._check_range(bool(torch.isfinite(self.eps).all() and (self.eps >= 0).all()))
        elif isinstance(self.eps, Sequence):
            raise TypeError(
                f"{name}: eps is a number or a tensor, got {type(self.eps).__name__}. For one radius per channel give "
                f"torch.tensor({self.eps}).view(-1, 1, 1)."
            )
        else:
            self._check_range(math.isfinite(self.eps) and self.eps >= 0)

    def _check_range(self, valid: bool) -> None:
        if not valid:
            raise ValueError(f"{type(self).__name__}: eps must be finite and at least 0, got {self.eps}.")

    @abstractmethod
    def norm(self, delta: Float[Tensor, "B *x"]) -> Float[Tensor, "B"]:
        r"""Size of a perturbation in units of the ball, :math:`\|\delta/\varepsilon\|_p`: at most 1 inside."""

    @abstractmethod
    def dual_norm(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B"]:
        r"""Largest rise of a linear function in the ball, :math:`\max_\delta \langle g, \delta \rangle`.

        It is the dual norm :math:`\|\varepsilon g\|_q`; in a box, where not every perturbation is allowed, less.
        Differentiable; its gradient is :meth:`maximizer`. Computed in float32 for half-precision input.

        Args:
            grad: Gradients g.
            box: Limits of each coordinate, as in :meth:`project`. The result then has a first derivative alone.
        """

    @abstractmethod
    def maximizer(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        r"""The perturbation of the ball at which :math:`\langle g, \delta\rangle` is largest (0 where g is 0).

        Args:
            grad: Gradients g.
            box: Limits of each coordinate, as in :meth:`project`.
        """

    @abstractmethod
    def project(self, delta: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        """The point of the ball, and of the box if one is given, nearest to delta.

        Nearest in the scaled coordinates ``delta / eps``.

        Args:
            delta: Perturbations.
            box: Lower and upper limits of each coordinate, ``lower <= 0 <= upper``: for a sample x of pixels in
                [0, 1] they are ``(-x, 1 - x)``.
        """

    @abstractmethod
    def sample_like(self, x: Float[Tensor, "B *x"], generator: torch.Generator | None = None) -> Float[Tensor, "B *x"]:
        """Noise uniform in the ball, one draw per sample, with the shape, dtype and device of x."""

    def ascent(
        self, grad: Float[Tensor, "B *x"], delta: Float[Tensor, "B *x"], box: Box | None = None
    ) -> Float[Tensor, "B *x"]:
        """The step of an iterated attack: the maximiser, where nothing better is known of the norm.

        Args:
            grad: Gradient of the function to ascend, at delta.
            delta: The perturbation so far.
            box: Limits of delta, as in :meth:`project`.
        """
        return self.maximizer(grad)

    def with_eps(self, eps: Eps) -> "ThreatModel":
        """The ball of the same norm with another radius."""
        return type(self)(eps)

    def scaled(self, factor: Eps) -> "ThreatModel":
        """The ball of the same norm, its radius multiplied by factor."""
        return self.with_eps(times(self.eps, factor))

    def rows(self, rows: Tensor | Sequence[int], x: Float[Tensor, "B *x"]) -> "ThreatModel":
        """The threat model of some samples of the batch x: follows a per-sample eps, leaves any other as it is."""
        return self.with_eps(rows_of(self.eps, rows, x)) if isinstance(self.eps, Tensor) else self

    def _rise(self, grad: Tensor, box: Box) -> Tensor:
        """The dual norm in a box. Its derivative is the maximiser, which so can count as fixed."""
        grad = at_least_float32(grad)
        return (_samples(grad) * _samples(self.maximizer(grad.detach(), box))).sum(1)

    def _eps_like(self, tensor: Tensor) -> Eps:
        """The radius, ready to be multiplied with tensor."""
        if not isinstance(self.eps, Tensor):
            return self.eps
        eps = self.eps.to(device=tensor.device, dtype=tensor.dtype)
        sides = zip(reversed(eps.shape), reversed(tensor.shape), strict=False)
        if eps.ndim > tensor.ndim or any(side not in (1, whole) for side, whole in sides):
            raise ValueError(
                f"{type(self).__name__}: eps of shape {tuple(eps.shape)} does not broadcast against a batch of shape "
                f"{tuple(tensor.shape)}."
            )
        return eps

    def _units(self, delta: Tensor) -> Tensor:
        """A perturbation in units of eps; infinitely many where it moves a coordinate whose eps is 0."""
        delta = at_least_float32(delta)
        return torch.where(delta == 0, 0.0, delta / self._eps_like(delta))

    def _shrink(self, delta: Tensor) -> Tensor:
        """To scaled coordinates, to be projected there; a coordinate whose eps is 0 cannot move, and is 0."""
        eps = self._eps_like(delta)
        if isinstance(eps, Tensor):
            return torch.where(eps > 0, delta / eps.where(eps > 0, 1.0), 0.0)
        return delta / eps if eps > 0 else torch.zeros_like(delta)

    def _stretch(self, scaled: Tensor) -> Tensor:
        """Back from scaled coordinates."""
        return scaled * self._eps_like(scaled)


@final
class Linf(ThreatModel):
    r"""Each coordinate moves by at most eps: :math:`\|\delta/\varepsilon\|_\infty \le 1`.

    Its dual norm is :math:`\|\varepsilon g\|_1`, its maximiser :math:`\varepsilon\,\mathrm{sign}(g)`, the step of the
    fast gradient sign method (Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", 2015).

    Example:
        >>> threat = Linf(eps=0.5)
        >>> threat.dual_norm(torch.tensor([[3.0, -4.0]]))
        tensor([3.5000])
        >>> threat.maximizer(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.5000, -0.5000]])
    """

    def norm(self, delta: Float[Tensor, "B *x"]) -> Float[Tensor, "B"]:
        return _samples(self._units(delta)).abs().amax(1)

    def dual_norm(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B"]:
        if box is not None:
            return self._rise(grad, box)
        grad = at_least_float32(grad)
        return _samples(grad * self._eps_like(grad)).abs().sum(1)

    def maximizer(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        signs, eps = grad.sign(), self._eps_like(grad)
        best = signs * eps if isinstance(eps, Tensor) else signs.mul_(eps)  # in place: it is a new tensor
        return best if box is None else best.clamp(*box)

    def project(self, delta: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        eps = self._eps_like(delta)
        inside = torch.minimum(torch.maximum(delta, -eps), eps) if isinstance(eps, Tensor) else delta.clamp(-eps, eps)
        return clamped_(inside, box)

    def sample_like(self, x: Float[Tensor, "B *x"], generator: torch.Generator | None = None) -> Float[Tensor, "B *x"]:
        noise = torch.empty_like(x, memory_format=torch.contiguous_format).uniform_(-1, 1, generator=generator)
        return noise * self._eps_like(x)


@final
class L2(ThreatModel):
    r"""Euclidean length at most eps: :math:`\|\delta/\varepsilon\|_2 \le 1`.

    Its dual norm is :math:`\|\varepsilon g\|_2`, its maximiser :math:`\varepsilon\,(\varepsilon g)/\|\varepsilon
    g\|_2`.

    Example:
        >>> threat = L2(eps=0.5)
        >>> threat.dual_norm(torch.tensor([[3.0, -4.0]]))
        tensor([2.5000])
        >>> threat.maximizer(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.3000, -0.4000]])
    """

    def norm(self, delta: Float[Tensor, "B *x"]) -> Float[Tensor, "B"]:
        return length(self._units(delta))

    def dual_norm(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B"]:
        if box is not None:
            return self._rise(grad, box)
        return length(self._stretch(at_least_float32(grad)))

    def maximizer(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        direction = unit(self._stretch(at_least_float32(grad)))
        if box is None:
            return self._stretch(direction).to(grad.dtype)
        # Of all points far out along the gradient, the nearest in ball and box is the same, and rises most.
        return self.project(self._stretch(direction * _FAR), box).to(grad.dtype)

    def project(self, delta: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        r"""The nearest point, exact also where ball and box both bind.

        The solution is :math:`\mathrm{clip}(t u, l, h)` for the scaled perturbation u and the one :math:`t \in (0, 1]`
        that brings it to length 1; between the sorted values of t at which a coordinate meets the box, the squared
        length is quadratic in t, so t has a closed form.
        """
        u = _samples(self._shrink(at_least_float32(delta)))
        if box is None:
            return self._stretch((u / length(u).clamp(min=1.0).unsqueeze(1)).view_as(delta)).to(delta.dtype)
        low, high = (_samples(self._shrink(side.expand_as(delta))) for side in box)
        room = torch.where(u < 0, -low, high)
        size = u.abs().amax(1, keepdim=True).clamp(min=1.0)  # keeps the squares below from overflowing; t is up to size
        magnitude = u.abs() / size
        meets = torch.minimum(room / magnitude.clamp(min=torch.finfo(u.dtype).tiny), size)
        order = meets.argsort(1)
        knots = meets.gather(1, order)
        met = room.square().gather(1, order).cumsum(1)  # squared length of the coordinates at the box ...
        met = torch.cat([torch.zeros_like(met[:, :1]), met[:, :-1]], 1)
        free = magnitude.square().gather(1, order).flip(1).cumsum(1).flip(1)  # ... and of the others, per t squared
        index = ((met + knots.square() * free) < 1).sum(1, keepdim=True).clamp(max=u.shape[1] - 1)
        free = free.gather(1, index).clamp(min=torch.finfo(u.dtype).tiny)
        t = ((1 - met.gather(1, index)).clamp(min=0.0) / free).sqrt()
        clipped = torch.minimum(torch.maximum(u, low), high)
        shortened = torch.minimum(torch.maximum(u / size * t, low), high)
        nearest = torch.where(length(clipped).unsqueeze(1) > 1, shortened, clipped)
        nearest = nearest / length(nearest).clamp(min=1.0).unsqueeze(1)  # rounding may have left the ball
        return self._stretch(nearest.view_as(delta)).to(delta.dtype)

    def sample_like(self, x: Float[Tensor, "B *x"], generator: torch.Generator | None = None) -> Float[Tensor, "B *x"]:
        direction = unit(_empty(x).normal_(generator=generator))
        return self._stretch(direction * _radius_like(x, generator))


@final
@dataclass(frozen=True, eq=False)
class L1(ThreatModel):
    r"""Sum of absolute changes at most eps: :math:`\|\delta/\varepsilon\|_1 \le 1`.

    Its dual norm is :math:`\|\varepsilon g\|_\infty`, reached by moving the single coordinate of the largest
    :math:`|\varepsilon g|`. An iterated attack would crawl along one coordinate at a time and stall at the edge of the
    pixel range, so its step (:meth:`ascent`) is spread over the steepest coordinates, :attr:`density` of them or more
    where their room is used up, and the projection honours ball and box together (after Croce & Hein, "Mind the Box:
    l1-APGD for Sparse Adversarial Attacks on Image Classifiers", ICML 2021).

    Attributes:
        density: Fraction of the coordinates over which an attack step is spread, at least one; a tensor ``(B,)`` for
            one per sample.

    Example:
        >>> threat = L1(eps=0.5)
        >>> threat.dual_norm(torch.tensor([[3.0, -4.0]]))
        tensor([2.])
        >>> threat.maximizer(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.0000, -0.5000]])
    """

    density: float | Tensor = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.density, Tensor) and not 0 < self.density <= 1:
            raise ValueError(f"L1: density is a fraction of the coordinates in (0, 1], got {self.density}.")

    def with_eps(self, eps: Eps) -> "L1":
        return L1(eps, self.density)

    def norm(self, delta: Float[Tensor, "B *x"]) -> Float[Tensor, "B"]:
        return _samples(self._units(delta)).abs().sum(1)

    def dual_norm(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B"]:
        if box is not None:
            return self._rise(grad, box)
        return _samples(self._stretch(at_least_float32(grad))).abs().amax(1)

    def maximizer(self, grad: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        scaled = _samples(self._stretch(at_least_float32(grad)))
        capacity = torch.ones_like(scaled)
        if box is not None:
            capacity = self._capped(capacity, scaled, (side.expand_as(grad) for side in box))
        return self._stretch(_filled(scaled, capacity).view_as(grad)).to(grad.dtype)

    def ascent(
        self, grad: Float[Tensor, "B *x"], delta: Float[Tensor, "B *x"], box: Box | None = None
    ) -> Float[Tensor, "B *x"]:
        scaled = _samples(self._stretch(at_least_float32(grad)))
        share = torch.as_tensor(self.density, dtype=torch.float64, device=scaled.device)
        moving = (share * scaled.shape[1]).round().clamp(min=1)
        capacity = moving.reciprocal().view(-1, 1).to(scaled.dtype).expand_as(scaled)
        if box is not None:
            capacity = self._capped(capacity, scaled, (side.expand_as(delta) - delta for side in box))
        return self._stretch(_filled(scaled, capacity).view_as(grad)).to(grad.dtype)

    def _capped(self, capacity: Tensor, direction: Tensor, limits: Iterable[Tensor]) -> Tensor:
        """What each coordinate may move in its direction, at most as far as these limits, below and above, are away."""
        low, high = (_samples(self._shrink(limit)) for limit in limits)
        return torch.minimum(capacity, torch.where(direction < 0, -low, high).clamp(min=0.0))

    def project(self, delta: Float[Tensor, "B *x"], box: Box | None = None) -> Float[Tensor, "B *x"]:
        r"""The nearest point, exact also where ball and box both bind.

        In scaled coordinates the solution lowers every magnitude by the same :math:`\lambda \ge 0` and clips it to its
        room in the box, :math:`\mathrm{sign}(u)\,\min(\max(|u| - \lambda, 0), r)`; its L1 norm is piecewise linear in
        :math:`\lambda`, with knots at :math:`|u|` and :math:`|u| - r`, so sorting the knots gives :math:`\lambda`
        exactly.
        """
        u = _samples(self._shrink(at_least_float32(delta)))
        magnitude = u.abs()
        room = magnitude
        if box is not None:
            low, high = (_samples(self._shrink(side.expand_as(delta))) for side in box)
            room = torch.minimum(magnitude, torch.where(u < 0, -low, high))
        knots = torch.cat([magnitude, magnitude - room], 1)
        slope = torch.cat([torch.ones_like(u), -torch.ones_like(u)], 1)
        knots, order = knots.sort(1, descending=True)
        slope = slope.gather(1, order)
        slopes = slope.cumsum(1)
        intercepts = (slope * knots).cumsum(1)
        # The norm at each knot rises as the knots fall; the last knot at which it is below 1 starts the piece of
        # lambda.
        piece = ((intercepts - slopes * knots) < 1).sum(1, keepdim=True).sub(1).clamp(min=0)
        lam = (intercepts.gather(1, piece) - 1) / slopes.gather(1, piece).clamp(min=1)
        nearest = u.sign() * torch.minimum((magnitude - lam.clamp(min=0)).clamp(min=0), room)
        return self._stretch((nearest / nearest.abs().sum(1, keepdim=True).clamp(min=1.0)).view_as(delta)).to(
            delta.dtype
        )

    def sample_like(self, x: Float[Tensor, "B *x"], generator: torch.Generator | None = None) -> Float[Tensor, "B *x"]:
        magnitude = _empty(x).exponential_(generator=generator)
        sign = _empty(x).uniform_(-1, 1, generator=generator).sign()
        share = magnitude / _samples(magnitude).sum(1).view(_column(x))
        return self._stretch(sign * share * _radius_like(x, generator))


def check_bounds_form(bounds: Bounds) -> None:
    """Raise unless bounds are a lowest and a highest value, in a shape that can be told."""
    if any(isinstance(side, Tensor) and side.ndim == 1 for side in bounds):
        raise ValueError(
            "bounds of one dimension could mean channels or columns: use bound.view(-1, 1, 1) for channels."
        )


def bounds_like(bounds: Bounds, x: Tensor) -> Bounds:
    """Two numbers, or two tensors of the type of x and where it is."""
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.as_tensor(low).to(x), torch.as_tensor(high).to(x)
    return bounds


def clamped_(z: Tensor, bounds: Bounds | None) -> Tensor:
    """Clamp z, a new tensor, to two numbers, two tensors or None: in place, where no transform may follow it."""
    if bounds is None:
        return z
    if isinstance(bounds[0], Tensor) or isinstance(bounds[1], Tensor):
        bounds = bounds_like(bounds, z)
    low, high = cast("tuple[Tensor, Tensor]", bounds)  # the stubs know either pair, not one type for both
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(z):
        return z.clamp(low, high)
    return z.clamp_(low, high)


def room(x: Tensor, bounds: Bounds) -> Box:
    """How far every coordinate may move, down and up; one outside of its bounds moves no further out."""
    low, high = bounds_like(bounds, x)
    return (low - x).clamp(max=0.0), (high - x).clamp(min=0.0)


Value = TypeVar("Value", float | Tensor, Tensor)


def rows_of(value: Value, rows: Tensor | Sequence[int], x: Float[Tensor, "B *x"]) -> Value:
    """The entries for some samples of the batch x, of a value that is one for all samples or one for each.

    A tensor holds one entry per sample if it has the rank of the batch and its first dimension: ``(B, 1, 1, 1)`` does,
    ``(C, 1, 1)`` does not.
    """
    if isinstance(value, Tensor) and value.ndim == x.ndim and value.shape[0] == x.shape[0]:
        return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]
    return value


def times(value: Eps, factor: Eps) -> Eps:
    """The product, on the device of the factor."""
    if isinstance(value, Tensor) and isinstance(factor, Tensor):
        return value.to(factor.device) * factor
    return value * factor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of a half-precision type: sums over an image overflow or drown there."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def length(tensor: Tensor) -> Tensor:
    """Euclidean norm per sample, with a zero gradient at 0 and no overflow or underflow of the squares."""
    flat = _samples(tensor)
    largest = flat.detach().abs().amax(1, keepdim=True)
    largest = largest.where((largest > 0) & largest.isfinite(), 1.0)
    return torch.linalg.vector_norm(flat / largest, dim=1) * largest.squeeze(1)


def unit(tensor: Tensor) -> Tensor:
    """The tensor scaled to length 1 per sample; 0 stays 0, with a zero gradient. No square overflows or underflows."""
    flat = _samples(tensor)
    largest = flat.detach().abs().amax(1, keepdim=True)
    flat = torch.where(largest > 0, flat / largest.where(largest > 0, 1.0), 0.0)
    size = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return (flat / size.where(size > 0, 1.0)).view_as(tensor)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of every sample; that of a tensor of zeros counts as 0, with a zero gradient."""
    return (unit(a) * unit(b)).flatten(1).sum(1)


def _samples(tensor: Tensor) -> Tensor:
    """One row per sample."""
    return tensor.reshape(tensor.shape[0], -1)


def _column(x: Tensor) -> tuple[int, ...]:
    """The shape of one number per sample that broadcasts against x."""
    return (x.shape[0],) + (1,) * (x.ndim - 1)


def _empty(x: Tensor) -> Tensor:
    """A tensor like x, always contiguous: noise must not depend on the memory format."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _radius_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """The distance from the centre of a point uniform in a unit ball of as many dimensions as a sample has."""
    uniform = torch.rand(x.shape[0], generator=generator, dtype=x.dtype, device=x.device)
    return uniform.pow(1 / max(1, x[0].numel())).view(_column(x))


def _filled(slope: Tensor, capacity: Tensor) -> Tensor:
    """The vector of L1 norm at most 1 and coordinates at most capacity along which a linear function rises most.

    It fills the steepest coordinates to their capacity, one after the other, until the norm is used up.
    """
    order = slope.abs().argsort(1, descending=True)
    capacity = capacity.gather(1, order)
    used = capacity.cumsum(1) - capacity
    moves = torch.minimum((1 - used).clamp(min=0.0), capacity)
    return torch.zeros_like(slope).scatter(1, order, moves) * slope.sign()


def _transformed(tensor: Tensor) -> bool:
    """Whether the tensor's values may not be looked at: inside a torch.func transform or a compiled region."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)

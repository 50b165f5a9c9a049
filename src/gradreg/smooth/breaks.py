"""Finds where a function of one variable breaks: jumps in its value, its slope or its curvature.

Between points that lie h apart, the (k+1)-th difference of a smooth function shrinks like h**(k+1). Across a jump of
its k-th derivative it shrinks like h**k only: with four times the points the two can be told apart, for every element
of the function at once. A function that merely changes fast can look broken from afar. So the most suspicious elements
are looked at from ever closer by, where a smooth function becomes a polynomial and a jump stays what it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_ORDERS = (0, 1, 2)
_COARSE, _FINE = 8, 32  # intervals
_WINDOW = 12  # intervals of a close look
_WIDTH = 4 / _FINE  # of the first close look, which leaves out half an interval at each end of the curve
_ENDS = 6 / _FINE  # and one that leaves out nothing; a logarithm that begins near 0 looks broken there
_LOOKS = 14  # close looks, each at half the width of the one before
_SUSPECTS = 2  # of each order
_NOISE = 16.0  # differences below this many units of rounding are rounding
_NEGLIGIBLE = 1e-6  # a jump below this part of the derivative's own size is the splice of a kernel, not a kink


@final
@dataclass(frozen=True)
class Break:
    """What was found in a curve.

    Attributes:
        order: Which derivative jumps: 0 is the value itself, 1 the slope, 2 the curvature.
        share: The part of the elements that break somewhere.
        linear: Whether the curve is a straight line nearly everywhere.
    """

    order: int
    share: float
    linear: bool


def find_break(curve: Callable[[float], Tensor], *, expected: bool = False) -> Break | None:
    """Look for a break of a curve between 0 and 1.

    Args:
        curve: From a number to values, of shape (N,), always in the same order.
        expected: Whether curves of this kind are known to break: what looks broken from afar is then believed.

    Returns:
        The break, with the lowest order that was seen from close by; None if there is none.
    """
    points = [curve(k / _FINE) for k in range(_FINE + 1)]
    values, rounding = torch.stack(points).double(), _NOISE * torch.finfo(points[0].dtype).eps
    if not values.numel():
        return None
    strength = torch.stack([_strength(values, order, rounding) for order in _ORDERS])
    suspected = strength.amax(0) > 0
    orders = strength.gt(0).double().argmax(0)  # the lowest, for a jump shows in the higher differences too
    for element in _strongest(strength, orders):
        place = _place(values[:, element]) / _FINE
        order = _look_closely(curve, element, place, rounding, _ENDS if expected else _WIDTH)
        if order is None and expected:
            order = int(orders[element])
        if order is not None:
            return Break(order, suspected.double().mean().item(), _is_straight(values, rounding))
    return None


def _strength(values: Tensor, order: int, rounding: float) -> Tensor:
    """How much each element's derivative of this order seems to jump; 0 where it is smooth or hidden in rounding."""
    fine, coarse = (_jumps(points, order).amax(0) for points in (values, values[:: _FINE // _COARSE]))
    finer = (_COARSE / _FINE) ** (order + 0.5)  # half-way between a jump and none
    size = _finite(values.abs()).amax(0)
    typical = _finite(values.diff(n=order, dim=0).abs()).max()
    is_jump = (fine > finer * coarse) & (fine > rounding * size) & (fine > _NEGLIGIBLE * typical)
    return torch.where(is_jump, fine, 0.0)


def _jumps(values: Tensor, order: int) -> Tensor:
    """The jump of the derivative between two neighbouring points, times h**order: (order + 1) differences share it."""
    return _finite(values.diff(n=order + 1, dim=0).abs()).unfold(0, order + 1, 1).sum(-1)


def _place(values: Tensor) -> float:
    """Where a derivative jumps most, in units of h: a jump of any order shows in the highest differences."""
    return float(_jumps(values, _ORDERS[-1]).argmax()) + _ORDERS[-1] + 0.5


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)  # a masked attention score is -inf all along the line


def _strongest(strength: Tensor, orders: Tensor) -> list[int]:
    """Those to look at closely: of the lowest order first, and the largest first."""
    chosen = []
    for order in _ORDERS:
        own = torch.where(orders == order, strength[order], 0.0)
        top = own.topk(min(_SUSPECTS, len(own)))
        chosen += [int(index) for value, index in zip(*top, strict=True) if value > 0]
    return chosen


def _look_closely(
    curve: Callable[[float], Tensor], element: int, centre: float, rounding: float, width: float
) -> int | None:
    """The order of an element's break near a place, if it stays a break from ever closer by."""
    jumps: dict[int, list[float]] = {order: [] for order in _ORDERS}
    for _ in range(_LOOKS):
        start, step = min(max(centre - width / 2, 0.0), 1.0 - width), width / _WINDOW
        values = torch.stack([curve(start + k * step)[element] for k in range(_WINDOW + 1)]).double()
        noise = rounding * (values.abs().max() + values.diff().abs().max() / step)  # of the output, of the input
        for order in _ORDERS:
            derivative = values.diff(n=order) / step**order
            jump = derivative.max() - derivative.min()
            if jump > noise * (2 / step) ** order and jump > _NEGLIGIBLE * derivative.abs().max():
                jumps[order].append(jump.item())
        centre, width = start + _place(values) * step, width / 2
    told = _ORDERS if rounding < 1e-12 else _ORDERS[:2]  # single precision is too coarse for curvatures
    return next((order for order in told if _stays(jumps[order])), None)


def _stays(jumps: list[float]) -> bool:
    """Whether the last looks saw the same jump; that of a smooth function halves with the width."""
    return len(jumps) > 3 and jumps[-1] > 2**-1.5 * jumps[-4]


def _is_straight(values: Tensor, rounding: float) -> bool:
    bends, slopes = values.diff(n=2, dim=0).abs(), values.diff(dim=0).abs()
    floor = rounding * values.abs().amax(0) + _NEGLIGIBLE * slopes.amax(0)
    return bool((bends > floor).double().mean() < 0.25)

"""Checks of what a user hands over: what passes, and what is refused with the fact or the fix that tells."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from gradreg import FGSM, L1, L2, NFGSM, GradNormPenalty, GradregWarning, Linf, Noise, PGDAttack
from gradreg.checks import (
    check_bounds,
    check_input,
    check_labels,
    check_logits,
    check_radius,
    check_units,
    finite_range,
    may_look,
)

# Input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (2, 3, 4, 4), (1, 2, 3, 4, 5)], ids=str)
def test_input_of_real_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_input(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_input_of_other_numbers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        check_input(torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (0, 3, 4, 4)], ids=str)
def test_input_that_is_no_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch"):
        check_input(torch.zeros(shape))


def test_finite_input() -> None:
    assert finite_range(torch.tensor([[0.0, 1e38, -1e38, 1e-45]])) == pytest.approx((-1e38, 1e38))


@pytest.mark.parametrize(("bad", "count"), [([math.nan], 1), ([math.inf, -math.inf], 2), ([math.nan, math.inf], 2)])
def test_input_that_is_not_finite(bad: list[float], count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} values"):
        finite_range(torch.tensor([[0.0, 1.0, *bad]]))


@pytest.mark.parametrize(
    ("output", "name"), [((torch.zeros(1, 2),), "tuple"), ({"logits": torch.zeros(1, 2)}, "dict"), (None, "NoneType")]
)
def test_output_that_is_no_tensor(output: object, name: str) -> None:
    check_logits(torch.zeros(1, 2))
    check_logits(nn.Parameter(torch.zeros(1, 2)))
    with pytest.raises(TypeError, match=name):
        check_logits(output)


# Labels

LOGITS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        (LOGITS, torch.tensor([0, 3, 1])),
        (LOGITS, torch.full((3, 4), 0.25)),
        (LOGITS, torch.full((3, 4), 0.25, dtype=torch.float64)),
        (torch.zeros(3, 1), torch.tensor([0.0, 1.0, 1.0])),
        (torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [1.0]])),
        (torch.zeros(3, 4, 5, 5), torch.zeros(3, 5, 5, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(3)),
    ],
    ids=[
        "classes",
        "probabilities",
        "double probabilities",
        "binary",
        "binary column",
        "segmentation",
        "regression",
    ],
)
def test_labels_that_fit(logits: Tensor, y: Tensor) -> None:
    check_labels(logits, y, look=True)
    check_labels(logits, y, look=False)


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize(
    ("y", "error", "fix"),
    [
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, "y.squeeze(1)"),
        (torch.zeros(2, dtype=torch.int64), ValueError, "(2,)"),
        (torch.zeros(3, 5), ValueError, "(3, 5)"),
        (torch.zeros(4, 3), ValueError, "(4, 3)"),
        (torch.tensor(1), ValueError, "()"),
        (torch.zeros(3), TypeError, "y.long()"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "y.long()"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "y.long()"),
        (torch.eye(4, dtype=torch.int64)[:3], TypeError, "y.argmax(1)"),
        (None, TypeError, "NoneType"),
        ((torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1]), 0.5), TypeError, "tuple"),
    ],
    ids=[
        "column",
        "count",
        "classes",
        "transposed",
        "scalar",
        "float",
        "int32",
        "bool",
        "whole one-hot",
        "none",
        "mixup",
    ],
)
def test_labels_that_do_not_fit(y: object, error: type[Exception], fix: str, look: bool) -> None:
    with pytest.raises(error, match=re.escape(fix)):
        check_labels(LOGITS, y, look=look)


@pytest.mark.parametrize("y", [[0, -100, 1], [0, -1, 3], [0, 4, 1], [-1, 9, 0]])
def test_labels_out_of_range(y: list[int]) -> None:
    with pytest.raises(ValueError, match=f"from {min(y)} to {max(y)}"):
        check_labels(LOGITS, torch.tensor(y), look=True)
    check_labels(LOGITS, torch.tensor(y), look=False)


# Units


@pytest.mark.parametrize(
    ("eps", "span"),
    [
        (8 / 255, 1.0),
        (1.0, 1.0),  # the whole range: an attack that must always win, the end of a curve
        (torch.full((3, 1, 1), 0.15), torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1)),
        (torch.tensor([0.1, 0.9]).view(2, 1, 1, 1), torch.tensor(1.0)),
    ],
)
def test_radius_of_a_pixel(eps: float | Tensor, span: float | Tensor) -> None:
    check_radius(eps, span)


@pytest.mark.parametrize(
    ("eps", "span", "found"),
    [
        (4.0, 1.0, "eps=4 "),
        (1.01, 1.0, "eps=1.01 "),
        (torch.tensor([0.1, 2.0]).view(2, 1, 1), 1.0, "eps=2 "),
        (4.5, torch.tensor([4.0, 5.0]).view(2, 1, 1), "eps=4.5 "),
    ],
)
def test_radius_of_other_units(eps: float | Tensor, span: float | Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        check_radius(eps, span)


LOW, HIGH = torch.tensor([0.0, -1.0]).view(2, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1)


def test_pixels_within_bounds() -> None:
    x = torch.stack([torch.linspace(0, 1, 4).view(2, 2), torch.linspace(-1, 3, 4).view(2, 2)])[None]
    check_bounds(x, LOW, HIGH)
    check_bounds(x + 1e-7, LOW, HIGH)
    check_bounds(torch.rand(2, 5), torch.tensor(0.0), torch.tensor(1.0))


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("side", ["low", "high"])
def test_pixels_out_of_bounds(channel: int, side: str) -> None:
    x = torch.full((2, 2, 3, 3), 0.5)
    x[1, channel, 2, 0] = LOW[channel] - 1e-3 if side == "low" else HIGH[channel] + 1e-3
    with pytest.raises(ValueError, match="out_of_bounds"):
        check_bounds(x, LOW, HIGH)


def ranging(lowest: float, highest: float) -> Tensor:
    """Images whose values run from the lowest to the highest."""
    return torch.linspace(lowest, highest, 18).view(1, 2, 3, 3)


PLACES = [GradNormPenalty(Linf(0.1), bounds=(0.0, 1.0)), Noise(L2(0.5)), PGDAttack(L1(2.0))]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: type(place).__name__)
@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 1.0), (-0.47, 1.27), (-0.75, 1.75)])
def test_pixels_in_the_unit_of_bounds(place: object, lowest: float, highest: float) -> None:
    check_units(ranging(lowest, highest), [None, place], normalized=False)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: type(place).__name__)
@pytest.mark.parametrize(("lowest", "highest"), [(-2.1, 0.5), (0.0, 2.6), (0.0, 255.0)])
def test_pixels_in_another_unit_than_bounds(place: object, lowest: float, highest: float) -> None:
    with pytest.raises(ValueError, match="unit"):
        check_units(ranging(lowest, highest), [None, place], normalized=False)


@pytest.mark.parametrize(
    ("x", "place"),
    [
        (ranging(0.0, 1.0), GradNormPenalty(Linf(4))),
        (ranging(0.0, 1.0), FGSM(Linf(8))),
        (ranging(0.0, 0.4), Noise(Linf(0.6), bounds=(0.0, 0.5))),
        (ranging(-1.5, 1.5), NFGSM(Linf(4.5), bounds=(LOW - 1, HIGH))),
    ],
)
def test_a_radius_in_another_unit_than_pixels(x: Tensor, place: object) -> None:
    with pytest.raises(ValueError, match="eps"):
        check_units(x, [place], normalized=False)


def test_radii_that_may_be_as_large_as_they_are() -> None:
    places = [GradNormPenalty(L2(40.0)), GradNormPenalty(L1(400.0)), lambda point: point.losses]
    check_units(ranging(0.0, 1.0), places, normalized=False)
    check_units(ranging(-2.0, 2.0), [GradNormPenalty(Linf(3.0))], normalized=False)  # normalised, it seems
    check_units(ranging(0.0, 255.0), [GradNormPenalty(Linf(8.0))], normalized=False)


def test_a_radius_of_pixels_for_bytes() -> None:
    with pytest.warns(GradregWarning, match="bytes"):
        check_units(ranging(0.0, 255.0), [GradNormPenalty(Linf(8 / 255))], normalized=False)


def test_units_of_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN"):
        check_units(torch.tensor([[0.0, math.nan]]), [], normalized=False)


def test_pixels_out_of_bounds_are_named() -> None:
    with pytest.raises(ValueError, match=r"-0\.47, 1\.27"):
        check_bounds(torch.tensor([[-0.47, 0.5, 1.27]]), torch.tensor(0.0), torch.tensor(1.0))


@pytest.mark.parametrize("low", [-0.75, -0.47, 0.0])
@pytest.mark.parametrize("high", [1.0, 1.27, 2.0])
def test_pixels_for_a_model_that_normalises(low: float, high: float) -> None:
    check_units(ranging(low, high), [], normalized=True)


@pytest.mark.parametrize(("low", "high"), [(-2.1, 0.5), (-1.0, 1.0), (-0.76, 0.0), (0.0, 2.01), (0.0, 255.0)])
def test_pixels_that_are_normalised_already(low: float, high: float) -> None:
    check_units(ranging(low, high), [], normalized=False)
    with pytest.raises(ValueError, match="already"):
        check_units(ranging(low, high), [], normalized=True)


# Who looks


class Owner:
    pass


def test_values_are_always_looked_at_on_the_cpu() -> None:
    owner = Owner()
    assert [may_look(owner, torch.zeros(1, 1), validate=False) for _ in range(3)] == [True] * 3


def test_values_are_looked_at_once_where_that_synchronises() -> None:
    elsewhere = torch.zeros(1, 1, device="meta")
    one, other = Owner(), Owner()
    assert [may_look(one, elsewhere, validate=False) for _ in range(3)] == [True, False, False]
    assert [may_look(other, elsewhere, validate=False) for _ in range(2)] == [True, False]
    assert [may_look(one, elsewhere, validate=True) for _ in range(2)] == [True, True]


def test_warnings_are_warnings_of_the_user() -> None:
    assert issubclass(GradregWarning, UserWarning)

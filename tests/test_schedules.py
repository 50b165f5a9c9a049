"""Schedules: their closed forms, their ends, their composition, and that they carry no state."""

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg import Schedule, constant, cosine_ramp, every, join, linear_ramp

RAMPS = [linear_ramp, cosine_ramp]
every_ramp = pytest.mark.parametrize("ramp", RAMPS, ids=lambda ramp: ramp.__name__)
weights = st.floats(-100, 100)
steps = st.floats(-10, 1e6)
durations = st.floats(1e-3, 1e5)


@given(value=weights, t=steps)
def test_constant(value: float, t: float) -> None:
    assert constant(value)(t) == value


@given(start=weights, end=weights, duration=durations, progress=st.floats(0, 1))
def test_ramps_have_their_closed_forms(start: float, end: float, duration: float, progress: float) -> None:
    t = progress * duration
    linear, cosine = linear_ramp(end, duration, start), cosine_ramp(end, duration, start)
    assert linear(t) == pytest.approx((1 - progress) * start + progress * end, abs=1e-9)
    assert cosine(t) == pytest.approx((start + end) / 2 + (start - end) / 2 * math.cos(math.pi * progress), abs=1e-9)


@every_ramp
@given(start=weights, end=weights, duration=durations, beyond=st.floats(0, 1e6))
def test_ramps_stay_at_their_ends(
    ramp: Callable[..., Schedule], start: float, end: float, duration: float, beyond: float
) -> None:
    schedule = ramp(end, duration=duration, start=start)
    assert schedule(-beyond) == schedule(0) == start
    assert schedule(duration) == pytest.approx(end, abs=1e-12)
    assert schedule(duration + beyond) == schedule(duration)


@every_ramp
@given(start=weights, end=weights, duration=durations, times=st.lists(steps, min_size=2, max_size=9))
def test_ramps_are_monotone_and_stay_between_their_ends(
    ramp: Callable[..., Schedule], start: float, end: float, duration: float, times: list[float]
) -> None:
    values = [ramp(end, duration, start)(t) for t in sorted(times)]
    slack = 1e-12
    assert all(min(start, end) - slack <= value <= max(start, end) + slack for value in values)
    rises = [(later - earlier) * (1 if end >= start else -1) for earlier, later in itertools.pairwise(values)]
    assert all(rise >= -slack for rise in rises)


@every_ramp
def test_ramps_start_at_zero(ramp: Callable[..., Schedule]) -> None:
    assert ramp(1.2, duration=100)(0) == 0.0
    assert ramp(1.2, duration=100)(50) == pytest.approx(0.6)


def test_the_ramp_of_the_thesis() -> None:
    """The released code: min(0 + 0.2 * epoch, 1), the epoch with its fraction of steps."""
    steps_per_epoch = 40
    ramp = linear_ramp(1.2, duration=5 * steps_per_epoch)
    for step in (0, 1, 39, 100, 199, 200, 4000):
        assert ramp(step) == pytest.approx(1.2 * min(0.2 * step / steps_per_epoch, 1))


def test_cosine_ramp_is_flat_at_its_ends_and_steepest_in_the_middle() -> None:
    ramp = cosine_ramp(1.0, duration=1000)
    assert ramp(1) < 1e-5
    assert 1 - ramp(999) < 1e-5
    assert ramp(501) - ramp(500) == pytest.approx(math.pi / 2 / 1000, rel=1e-3)


def test_join_gives_each_schedule_its_own_clock() -> None:
    schedule = join([linear_ramp(1.0, 10), cosine_ramp(0.0, 10, start=1.0), lambda t: -t], boundaries=[20, 30])
    assert [schedule(t) for t in (0, 5, 10, 19)] == [0.0, 0.5, 1.0, 1.0]
    assert [schedule(t) for t in (20, 25)] == pytest.approx([1.0, 0.5])
    assert [schedule(t) for t in (30, 31, 100)] == [0, -1, -70]
    assert schedule(29.5) == cosine_ramp(0.0, 10, start=1.0)(9.5)


def test_join_of_one_is_that_one() -> None:
    ramp = linear_ramp(1.0, 10)
    assert [join([ramp], [])(t) for t in range(-1, 12)] == [ramp(t) for t in range(-1, 12)]


def test_joins_nest() -> None:
    early = join([constant(1.0), constant(2.0)], [10])
    assert [join([early, constant(3.0)], [20])(t) for t in (9, 10, 19, 20)] == [1.0, 2.0, 2.0, 3.0]


@every_ramp
@pytest.mark.parametrize("duration", [0, -1.0, math.nan])
def test_ramps_need_a_duration(ramp: Callable[..., Schedule], duration: float) -> None:
    message = f"{ramp.__name__}: duration is counted in optimiser steps and must be above 0, got {duration}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        ramp(1.0, duration=duration)


@pytest.mark.parametrize(
    ("count", "boundaries", "message"),
    [
        (2, [], "join: 2 schedules need 1 boundaries between them, got 0."),
        (1, [5], "join: 1 schedules need 0 boundaries between them, got 1."),
        (3, [5, 5], "join: boundaries must rise, got [5, 5]."),
        (3, [5, 4], "join: boundaries must rise, got [5, 4]."),
    ],
)
def test_joins_need_rising_boundaries(count: int, boundaries: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        join([constant(1.0)] * count, boundaries)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_kth_step_is_the_value_on_average(k: int) -> None:
    weight = every(k, 1.2)
    values = [weight(t) for t in range(3 * k)]
    assert sum(values) == pytest.approx(1.2 * len(values))
    assert [value > 0 for value in values] == [t % k == 0 for t in range(3 * k)]


def test_every_follows_a_schedule_at_the_steps_that_count() -> None:
    weight = every(10, linear_ramp(1.0, duration=100))
    assert [weight(t) for t in (0, 15, 50, 51, 200)] == pytest.approx([0, 0, 5, 0, 10])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("k", [0, -2, 1.5])
def test_every_needs_a_whole_number_of_steps(k: int) -> None:
    with pytest.raises(ValueError, match="every: steps is a whole number of optimiser steps"):
        every(k, 1.0)


SCHEDULES: list[Schedule] = [
    constant(1.2),
    linear_ramp(1.2, duration=100, start=0.2),
    cosine_ramp(1.2, duration=100, start=0.2),
    join([linear_ramp(1.2, duration=100), constant(0.5)], boundaries=[200]),
    every(2, 1.2),
    every(3, linear_ramp(1.2, duration=100)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedule_is_a_value_without_state(schedule: Schedule) -> None:
    times = [0, 1, 50, 100, 150, 200, 300]
    values = [schedule(t) for t in times]
    assert [schedule(t) for t in reversed(times)] == values[::-1]
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert other == schedule
        assert [other(t) for t in times] == values
    with pytest.raises(AttributeError):
        schedule.end = 3.0


def test_different_schedules_are_unequal() -> None:
    assert constant(1.0) != constant(2.0)
    assert linear_ramp(1.0, 10) != linear_ramp(1.0, 11)
    assert linear_ramp(1.0, 10) != cosine_ramp(1.0, 10)
    assert linear_ramp(1.0, 10) == linear_ramp(1.0, 10, 0.0)

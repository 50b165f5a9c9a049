"""Intervals and paired tests against published values, their defining equations and exact enumeration."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg import PairedComparison, Proportion, mcnemar, wilson

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 20_000))
    return draw(st.integers(0, n)), n


@st.composite
def tables(draw: st.DrawFn) -> PairedComparison:
    cells = draw(st.lists(st.integers(0, 200), min_size=4, max_size=4).filter(any))
    return PairedComparison(*cells)


class TestWilson:
    @pytest.mark.parametrize(
        ("count", "n", "interval"),
        [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (870, 1000, (0.8477, 0.8894))],
    )
    def test_known_values(self, count: int, n: int, interval: tuple[float, float]) -> None:
        assert wilson(count, n) == pytest.approx(interval, abs=1e-4)
        assert Proportion(count, n).interval == wilson(count, n)

    @given(counts())
    def test_ends_are_the_rates_that_the_score_test_just_does_not_reject(self, seen: tuple[int, int]) -> None:
        count, n = seen
        for rate in wilson(count, n):
            assert abs(count / n - rate) == pytest.approx(Z * math.sqrt(rate * (1 - rate) / n), rel=1e-6, abs=1e-9)

    @given(counts())
    def test_mirrored_and_around_the_estimate(self, seen: tuple[int, int]) -> None:
        count, n = seen
        low, high = wilson(count, n)
        assert 0 <= low <= count / n <= high <= 1
        assert low < high
        assert wilson(n - count, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)

    @pytest.mark.parametrize("n", [50, 200])
    @pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.87])
    def test_covers_the_rate_as_often_as_it_says(self, rate: float, n: int) -> None:
        for confidence in (0.8, 0.95, 0.99):
            covered = 0.0
            for count in range(n + 1):
                low, high = wilson(count, n, confidence)
                covered += (low <= rate <= high) * math.comb(n, count) * rate**count * (1 - rate) ** (n - count)
            assert covered == pytest.approx(confidence, abs=0.04)

    def test_narrows_with_n_and_widens_with_confidence(self) -> None:
        widths = [high - low for low, high in (wilson(7 * n, 10 * n) for n in (1, 4, 100, 10_000))]
        assert widths == sorted(widths, reverse=True)
        assert widths[3] == pytest.approx(2 * Z * math.sqrt(0.7 * 0.3 / 100_000), rel=1e-3)
        (low, high), (lower, higher) = wilson(30, 100, 0.8), wilson(30, 100, 0.99)
        assert lower < low < high < higher


class TestMcNemar:
    @given(first=st.integers(0, 40), second=st.integers(0, 40))
    def test_is_the_exact_binomial_probability(self, first: int, second: int) -> None:
        m = first + second
        tail = sum(math.comb(m, k) for k in range(min(first, second) + 1))
        assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail / 2**m), rel=1e-12)
        assert mcnemar(first, second) == mcnemar(second, first)

    @given(st.integers(0, 5000))
    def test_equal_counts_say_nothing(self, count: int) -> None:
        assert mcnemar(count, count) == 1

    def test_many_samples(self) -> None:
        m, k = 2_000, 940
        tail = sum(math.comb(m, i) for i in range(k + 1))
        assert mcnemar(k, m - k) == pytest.approx(2 * tail / 2**m, rel=1e-9)
        assert 0 <= mcnemar(0, 10_000) < 1e-300


class TestPairedComparison:
    def test_newcombes_published_interval(self) -> None:
        """Statistics in Medicine 1998, table II, method 10, from the cells 36, 12, 2 and 0."""
        comparison = PairedComparison(both=36, first=12, second=2, neither=0)
        assert comparison.n == 50
        assert comparison.difference == pytest.approx(0.2)
        assert comparison.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)

    @pytest.mark.parametrize(
        ("cells", "interval"),
        [
            ((0, 0, 0, 50), (-0.0713, 0.0713)),  # nothing is known of the correlation: z² / (n + z²)
            ((25, 0, 0, 25), (-0.0378, 0.0378)),  # phi = 0.96: 0.1336 * sqrt(2 - 2 * 0.96)
            ((20, 12, 2, 16), (0.0562, 0.3292)),
        ],
    )
    def test_other_cases_of_its_correction(
        self, cells: tuple[int, int, int, int], interval: tuple[float, float]
    ) -> None:
        assert PairedComparison(*cells).interval == pytest.approx(interval, abs=1e-4)

    @given(tables())
    def test_swapping_the_models_mirrors_it(self, comparison: PairedComparison) -> None:
        low, high = comparison.interval
        swapped = PairedComparison(comparison.both, comparison.second, comparison.first, comparison.neither)
        assert swapped.difference == -comparison.difference
        assert swapped.interval == pytest.approx((-high, -low), abs=1e-12)
        assert swapped.p_value == comparison.p_value

    @given(tables())
    def test_holds_the_difference(self, comparison: PairedComparison) -> None:
        low, high = comparison.interval
        assert -1 <= low <= comparison.difference + 1e-12
        assert comparison.difference - 1e-12 <= high <= 1

    def test_pairing_is_what_narrows_it(self) -> None:
        """The same two accuracies, on the same samples and on as different ones as can be."""
        paired, crossed = PairedComparison(60, 10, 0, 30), PairedComparison(30, 40, 30, 0)
        assert paired.difference == pytest.approx(crossed.difference)
        low, high = paired.interval
        lower, higher = crossed.interval
        assert high - low < (higher - lower) / 2
        assert paired.p_value == mcnemar(10, 0) < 0.05 < crossed.p_value == mcnemar(40, 30)

    def test_text_holds_the_numbers(self) -> None:
        text = str(PairedComparison(both=36, first=12, second=2, neither=0))
        for part in ("first 96.0 %", "second 76.0 %", "+20.0 points", "+5.7 to +34.0", "p = 0.013", "n = 50"):
            assert part in text


class TestErrors:
    @pytest.mark.parametrize(("count", "n"), [(-1, 10), (11, 10), (0, 0)])
    def test_a_count_that_is_none(self, count: int, n: int) -> None:
        with pytest.raises(ValueError, match=f"got {count} of {n}"):
            Proportion(count, n)

    @pytest.mark.parametrize("cells", [(0, 0, 0, 0), (1, -1, 0, 3)])
    def test_a_comparison_of_nothing(self, cells: tuple[int, int, int, int]) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            PairedComparison(*cells)


def test_proportion_prints_percent_and_interval() -> None:
    assert str(Proportion(870, 1000)) == "87.0 % (84.8-88.9)"
    assert Proportion(3, 8).value == 0.375


@pytest.mark.parametrize(
    ("function", "counts"), [(wilson, (5, 3)), (wilson, (0, 0)), (wilson, (-1, 3)), (mcnemar, (-1, 5))]
)
def test_counts_that_cannot_be_are_refused(function: Callable[..., object], counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        function(*counts)

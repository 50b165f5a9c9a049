"""Accuracies as what they are: counts, with the interval that so many samples leave, and paired comparisons."""

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Proportion:
    """How many of n, and what that says of the rate behind it.

    Attributes:
        count: How many.
        n: Of how many.

    Raises:
        ValueError: Unless ``0 <= count <= n`` and n is at least 1.

    Example:
        >>> accuracy = Proportion(870, 1000)
        >>> accuracy.value
        0.87
        >>> print(accuracy)
        87.0 % (84.8-88.9)
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n or self.n < 1:
            raise ValueError(f"Proportion: expected 0 <= count <= n and n >= 1, got {self.count} of {self.n}.")

    @property
    def value(self) -> float:
        """The share, count / n."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of :func:`wilson`."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same samples: where they differ decides, not how often both are right.

    Attributes:
        both: Samples that both get right.
        first: Samples that only the first gets right.
        second: Samples that only the second gets right.
        neither: Samples that neither gets right.

    Example:
        >>> comparison = PairedComparison(both=600, first=40, second=15, neither=345)
        >>> print(comparison)
        first 64.0 %, second 61.5 %, difference +2.5 points (95 % interval +1.0 to +4.0), p = 0.001, n = 1000
    """

    both: int
    first: int
    second: int
    neither: int

    def __post_init__(self) -> None:
        if min(self.both, self.first, self.second, self.neither) < 0 or self.n < 1:
            raise ValueError(f"PairedComparison: expected counts of at least one sample, got {self!r}.")

    @property
    def n(self) -> int:
        """How many samples were compared."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.first - self.second) / self.n

    @property
    def p_value(self) -> float:
        """Of :func:`mcnemar`: how likely so uneven a split of the differing samples is if the models are equal."""
        return mcnemar(self.first, self.second)

    @property
    def interval(self) -> tuple[float, float]:
        r"""95 % interval of the difference.

        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
        Statistics in Medicine 1998, method 10: Wilson's intervals of both accuracies, combined with their correlation.
        """
        n, agree = self.n, self.both * self.neither - self.first * self.second
        one, two = self.both + self.first, self.both + self.second
        spread = math.sqrt(one * (n - one) * two * (n - two))
        excess = max(agree - n / 2, 0.0) if agree > 0 else agree
        phi = excess / spread if spread > 0 else 0.0
        (low_1, high_1), (low_2, high_2) = wilson(one, n), wilson(two, n)
        down, up = (one / n - low_1, high_2 - two / n), (high_1 - one / n, two / n - low_2)
        widths = [math.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0.0)) for a, b in (down, up)]
        return max(self.difference - widths[0], -1.0), min(self.difference + widths[1], 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        first, second = (self.both + self.first) / self.n, (self.both + self.second) / self.n
        return (
            f"first {100 * first:.1f} %, second {100 * second:.1f} %, difference {100 * self.difference:+.1f} points "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}), p = {self.p_value:.2g}, n = {self.n}"
        )


def wilson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Interval for a rate of which ``count`` of ``n`` were seen, sound for small n and near 0 and 1.

    .. math:: \frac{k + z^2/2}{n + z^2} \pm \frac{z}{n + z^2} \sqrt{\frac{k (n - k)}{n} + \frac{z^2}{4}}

    (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927), with z the normal
    quantile of the confidence.

    Example:
        >>> low, high = wilson(0, 10)
        >>> low, round(high, 3)
        (0.0, 0.278)
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= count <= n and n >= 1, got {count} of {n}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (count + z**2 / 2) / (n + z**2)
    half_width = z / (n + z**2) * math.sqrt(count * (n - count) / n + z**2 / 4)
    low = 0.0 if count == 0 else center - half_width
    high = 1.0 if count == n else center + half_width
    return low, high


def mcnemar(first: int, second: int) -> float:
    r"""Exact two-sided p-value for two paired rates being equal.

    Of the samples in which two models differ, as many should favour either: with :math:`m = b + c` of them,
    :math:`p = \min\bigl(1, 2 \sum_{k \le \min(b, c)} \binom{m}{k} 2^{-m}\bigr)` (McNemar, "Note on the sampling error
    of the difference between correlated proportions or percentages", Psychometrika 1947, in its exact form).

    Args:
        first: Samples that only the first model gets right, b.
        second: Samples that only the second model gets right, c.

    Example:
        >>> mcnemar(0, 5)
        0.0625
    """
    if min(first, second) < 0:
        raise ValueError(f"mcnemar: expected counts of at least 0, got {first} and {second}.")
    m = first + second
    logs = (math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) for k in range(min(first, second) + 1))
    return min(1.0, 2 * math.fsum(math.exp(log - m * math.log(2)) for log in logs))

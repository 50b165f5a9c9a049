"""Summaries of many values, in memory that does not grow with them."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import final

import torch
from torch import Tensor

_PER_DECADE = 1000  # bins of the quantiles: one is 0.23 % wide


@final
@dataclass
class Moments:
    """Count, mean and spread of numbers, added in any order (Chan, Golub & LeVeque 1979)."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean

    def add(self, other: "Moments") -> None:
        """Take in what others have summed up."""
        if other.n:
            total, step = self.n + other.n, other.mean - self.mean
            self.squares += other.squares + step * step * self.n * other.n / total
            self.mean += step * other.n / total
            self.n = total

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Of some numbers, at once."""
        if not values.numel():
            return cls()
        values = values.double()
        mean = values.mean()
        return cls(values.numel(), mean.item(), (values - mean).square().sum().item())

    @property
    def std(self) -> float:
        """Standard deviation of the numbers themselves (divided by n); NaN for none."""
        return math.sqrt(self.squares / self.n) if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean, from its standard error: of many numbers, without too long a tail."""
        if self.n < 2:
            return -math.inf, math.inf
        half = NormalDist().inv_cdf(0.975) * math.sqrt(self.squares / (self.n - 1) / self.n)
        return self.mean - half, self.mean + half


@final
@dataclass
class Summary:
    """Mean, spread, logarithm and quantiles of a statistic over a data set.

    Values are added in batches of any size and order. Memory depends on their range, not on their number: quantiles
    come from a histogram whose bins are 0.23 % wide.

    Attributes:
        floor: What is added to a value before its logarithm is taken.
        moments: Of the values that are defined.
        log10: Of their logarithms, of those above 0.
        undefined: How many values were NaN.
        lowest: The least value.
        highest: The largest.

    Example:
        >>> summary = Summary()
        >>> summary.add(torch.tensor([1.0, 10.0, 100.0, float("nan")]))
        >>> summary.n, summary.mean, summary.log10.mean, summary.undefined
        (3, 37.0, 1.0, 1)
        >>> round(summary.quantile(0.5), 1)
        10.0
    """

    floor: float = 0.0
    moments: Moments = field(default_factory=Moments)
    log10: Moments = field(default_factory=Moments)
    undefined: int = 0
    lowest: float = math.inf
    highest: float = -math.inf
    _bins: Counter[tuple[int, int]] = field(default_factory=Counter, repr=False)

    @property
    def n(self) -> int:
        """How many values are defined."""
        return self.moments.n

    @property
    def mean(self) -> float:
        """Of the values that are defined; NaN for none."""
        return self.moments.mean if self.n else math.nan

    @property
    def std(self) -> float:
        """Their standard deviation (divided by n)."""
        return self.moments.std

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        return self.moments.interval

    def add(self, values: Tensor | Iterable[float]) -> None:
        """Take in some values; NaN counts as undefined."""
        found = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64)
        found = found.detach().cpu().flatten()
        self.undefined += int(found.isnan().sum())
        found = found[~found.isnan()]
        if not found.numel():
            return
        self.moments.add(Moments.of(found))
        logs = (found + self.floor).log10()
        self.log10.add(Moments.of(logs[found + self.floor > 0]))
        self.lowest, self.highest = min(self.lowest, found.min().item()), max(self.highest, found.max().item())
        size = found.abs()
        bins = torch.where(size > 0, (size.log10() * _PER_DECADE).floor(), 0.0).long()
        for key in zip(found.sign().long().tolist(), bins.tolist(), strict=True):
            self._bins[key] += 1

    def quantile(self, q: float) -> float:
        """The value below which a share q of the values lies, to 0.23 %; the least for 0, the largest for 1."""
        if not 0 <= q <= 1:
            raise ValueError(f"quantile: q is a share in [0, 1], got {q}.")
        if not self.n:
            return math.nan
        if q in (0, 1):
            return self.lowest if q == 0 else self.highest
        rank, seen = q * (self.n - 1), 0
        for sign, number in sorted(self._bins, key=lambda key: (key[0], key[0] * key[1])):
            seen += self._bins[sign, number]
            if seen > rank:
                middle = sign * 10 ** ((number + 0.5) / _PER_DECADE)
                return min(max(middle, self.lowest), self.highest)
        return self.highest

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{self.mean:.4g} ({low:.4g} to {high:.4g}), std {self.std:.4g}, n = {self.n}"
        return text + (f", undefined {self.undefined}" if self.undefined else "")


@final
@dataclass
class LogHistogram:
    """How often numbers of each size occur: bins of equal width in their logarithm.

    Attributes:
        bins_per_decade: How many bins a factor of 10 has.
        counts: How many numbers fell into bin k, from ``10**(k / bins_per_decade)`` to the next.
        zeros: How many were 0.

    Example:
        >>> histogram = LogHistogram(bins_per_decade=1)
        >>> histogram.add(torch.tensor([0.0, 2.0, -5.0, 30.0]))
        >>> histogram.zeros, dict(histogram.counts)
        (1, {0: 2, 1: 1})
    """

    bins_per_decade: int = 20
    counts: Counter[int] = field(default_factory=Counter)
    zeros: int = 0

    @property
    def n(self) -> int:
        """How many numbers there are."""
        return sum(self.counts.values()) + self.zeros

    def add(self, values: Tensor) -> None:
        """Take in the sizes of some numbers."""
        sizes = values.detach().flatten().abs().double()
        self.zeros += int((sizes == 0).sum())
        bins = (sizes[sizes > 0].log10() * self.bins_per_decade).floor().long()
        for number, count in zip(*(side.tolist() for side in bins.unique(return_counts=True)), strict=True):
            self.counts[number] += count

    def merge(self, other: "LogHistogram") -> None:
        """Take in what another one has counted."""
        self.counts.update(other.counts)
        self.zeros += other.zeros

    def density(self) -> tuple[list[float], list[float]]:
        """The middle of every bin from the first to the last, and the share of numbers in it per decade."""
        if not self.counts:
            return [], []
        numbers = range(min(self.counts), max(self.counts) + 1)
        middles = [10 ** ((number + 0.5) / self.bins_per_decade) for number in numbers]
        return middles, [self.counts[number] / self.n * self.bins_per_decade for number in numbers]

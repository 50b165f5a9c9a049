"""What the methods reached: accuracies over seeds and images, and intervals of whatever number is made of them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from study.data import FASHION_MNIST
from study.methods import ALL, METHODS
from study.runs import Run, unpack

SPLIT = "test"
CURVE = "PGD-3"  # the family whose trade-off of clean against robust accuracy the others are measured by
DRAWS = 2000

Results = Mapping[Run, dict[str, Any]]
Mean = Callable[[str], tuple[float, float]]  # of a method: clean and robust accuracy, in percent


class Setting(NamedTuple):
    """What all methods of a table have in common."""

    data: str
    net: str
    eps: str
    steps: int

    def __str__(self) -> str:
        data = "" if self.data == FASHION_MNIST else f"{self.data}, "
        return f"{data}{self.net}, eps {self.eps}, {self.steps} steps"


def setting_of(run: Run) -> Setting:
    """The setting of a run."""
    return Setting(run.data, run.net, run.eps, run.steps)


def settings_of(results: Results) -> list[Setting]:
    """The settings that there are runs of, those of Fashion-MNIST first."""
    return sorted(
        {setting_of(run) for run in results if run.split == SPLIT}, key=lambda s: (s.data != FASHION_MNIST, s)
    )


def key(result: Mapping[str, Any]) -> Run:
    """The run that a result is of."""
    return Run(
        **{name: result[name] for name in ("net", "eps", "steps", "method", "seed", "split", "data") if name in result}
    )


class Points:
    """What the methods reached in one setting: an array over seeds for each, and draws for intervals.

    The intervals are those of a bootstrap that draws anew, together, the seeds and the images, the same ones for every
    method: they hold what as many other trainings and images would change.
    """

    def __init__(self, results: Results, setting: Setting) -> None:
        of_setting = {run: r for run, r in results.items() if setting_of(run) == setting}
        self.clean_accuracy: dict[str, np.ndarray] = {}
        self.verdicts: dict[str, np.ndarray] = {}
        self.autoattack: dict[str, list[dict[str, Any]]] = {}
        self._seeds: dict[str, list[int]] = {}
        for method in ALL:
            rows = [r for run, r in of_setting.items() if run.method == method and run.split == SPLIT]
            if rows:
                self._seeds[method] = [row["seed"] for row in rows]
                self.clean_accuracy[method] = np.array([100 * row["clean"] / row["clean_of"] for row in rows])
                self.verdicts[method] = np.array([unpack(row["verdicts"]) for row in rows], dtype=float) * 100
                self.autoattack[method] = [row for row in rows if "autoattack" in row]

    def seeds(self, method: str) -> int:
        """How many there are of a method."""
        return len(self.clean_accuracy[method])

    def mean(self, method: str) -> tuple[float, float]:
        """Clean and robust accuracy, in percent."""
        return float(self.clean_accuracy[method].mean()), float(self.verdicts[method].mean())

    def curve(self) -> list[str]:
        """The methods of the family that the others are measured by, as far as there are runs."""
        return [name for name, method in METHODS.items() if method.family == CURVE and name in self.clean_accuracy]

    def estimate(
        self, methods: Iterable[str], function: Callable[[Mean], float]
    ) -> tuple[float, tuple[float, float]] | None:
        """A number made of what several methods reached, and its 95 % interval; None if they have no seed in common.

        Args:
            methods: Of the seeds those count that all of these have.
            function: Makes the number of the methods' clean and robust accuracies, given as a function of the name.
        """
        names = set(methods)
        common = set.intersection(*(set(self._seeds.get(name, ())) for name in names))
        if not common:
            return None
        seeds, images = bootstrap_weights(len(common), self.verdicts[min(names)].shape[1], DRAWS)
        drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in names:
            rows = [self._seeds[name].index(seed) for seed in sorted(common)]
            drawn[name] = seeds @ self.clean_accuracy[name][rows], ((seeds @ self.verdicts[name][rows]) * images).sum(1)
        value, *others = (
            float(function(lambda name, draw=draw: (drawn[name][0][draw], drawn[name][1][draw])))
            for draw in range(len(seeds))
        )
        low, high = np.quantile(others, [0.025, 0.975])
        return value, (float(low), float(high))

    def above_curve(self, method: str) -> tuple[float, tuple[float, float]] | None:
        """Robust accuracy above that of the curve at the same clean accuracy, and its 95 % interval.

        The curve is a straight line between its points, and goes on level beyond its ends.
        """
        family = self.curve()
        if len(family) < 2:
            return None

        def above(mean: Mean) -> float:
            places, heights = zip(*sorted(mean(other) for other in family), strict=True)
            clean, robust = mean(method)
            return robust - np.interp(clean, places, heights)

        return self.estimate([method, *family], above)

    def interval(self, method: str) -> tuple[float, float]:
        """Of the robust accuracy, 95 %."""
        found = self.estimate([method], lambda mean: mean(method)[1])
        assert found is not None
        return found[1]


@functools.cache
def bootstrap_weights(seeds: int, images: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of seeds and of images: first all alike, then as often as each is drawn anew, with replacement."""
    generator = np.random.default_rng(0)

    def weights(count: int) -> np.ndarray:
        drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(draws)]
        return np.stack([np.ones(count), *drawn]) / count

    return weights(seeds), weights(images)

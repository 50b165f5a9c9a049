"""Tables and figures of the study, from the files of its runs."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from study.methods import ALL, METHODS
from study.models import NETS
from study.runs import Run, unpack

RECORD = Path("docs/fashion-mnist")
SPLIT = "test"
CURVE = "PGD-3"  # the family whose trade-off of clean against robust accuracy the others are measured by
DRAWS = 2000
WINDOW = 8  # points of robust accuracy below the best that the figure shows
LOOKS = {  # of the families in the figure; colours of Okabe and Ito
    "edges": ("#009E73", "P"),
    "GradNorm": ("#E69F00", "*"),
    "GradNorm, every 4th step": ("#E69F00", "X"),
    "noisy differences": ("#0072B2", "o"),
    "noisy differences, half of the batch": ("#56B4E9", "o"),
    "noisy differences, quarter of the batch": ("#56B4E9", "d"),
    "FGSM": ("#000000", "^"),
    "PGD-1": ("#000000", "v"),
    "N-FGSM": ("#CC79A7", "D"),
    "PGD-3": ("#D55E00", "s"),
}

INTRODUCTION = """# Fashion-MNIST: the tables

Runs of `python examples/fashion_mnist.py`, which has the options; made from `runs.json` by its `--report`.
Clean: 10,000 test images. Robust: the first 1,000 under APGD-CE and APGD-T (9 targets, dropped by halves).
Intervals are bootstraps of images and seeds together; with one seed they hold no other training. AutoAttack:
how many of the first 200 withstand its standard version, for each seed tried. Cost: CPU time of a step,
natural = 1, `python benchmarks/study_cost.py --threads 1`.
"""

Setting = tuple[str, str, int]  # net, eps, steps
Results = dict[Run, dict[str, Any]]


def key(result: dict[str, Any]) -> Run:
    """The run that a result is of."""
    return Run(**{name: result[name] for name in ("net", "eps", "steps", "method", "seed", "split")})


def gathered(folder: Path) -> Results:
    """All results: those on record, and those in the folder."""
    record = RECORD / "runs.json"
    found = json.loads(record.read_text())["runs"] if record.exists() else []
    found += [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    results = {key(result): result for result in found}
    return {run: results[run] for run in sorted(results)}


def write(folder: Path) -> None:
    """Put all results on record, and tables and figures beside them."""
    results = gathered(folder)
    RECORD.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in results.values())
    (RECORD / "runs.json").write_text(f'{{"runs": [\n{lines}\n]}}\n')
    costs = _costs()
    tables = [table(setting, Points(results, setting), costs.get(setting[0], {})) for setting in settings_of(results)]
    (RECORD / "tables.md").write_text("\n".join([INTRODUCTION, *tables]))
    clean = figure(results, lambda net, name, points: points.mean(name), "clean accuracy, %")
    clean.savefig(RECORD / "clean_and_robust.png")

    def cost_and_robust(net: str, name: str, points: Points) -> tuple[float, float] | None:
        return (costs[net][name], points.mean(name)[1]) if name in costs.get(net, {}) else None

    figure(results, cost_and_robust, "CPU time of a step, natural = 1").savefig(RECORD / "cost_and_robust.png")


def settings_of(results: Results) -> list[Setting]:
    """The settings that there are runs of."""
    return sorted({(run.net, run.eps, run.steps) for run in results if run.split == SPLIT})


def _costs() -> dict[str, dict[str, float]]:
    """Cost of a step of every method on every network, natural = 1, as far as it was measured."""
    path = RECORD / "costs.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return {
        net: {name: ratio["median"] for name, ratio in report[net]["cpu_ratio_to_natural"].items()}
        for net in NETS
        if net in report
    }


class Points:
    """What the methods reached in one setting: an array over seeds for each, and draws for intervals.

    The intervals are those of a bootstrap that draws anew, together, the seeds and the images, the same ones for every
    method: they hold what another five trainings and another thousand images would change.
    """

    def __init__(self, results: Results, setting: Setting) -> None:
        of_setting = {run: r for run, r in results.items() if (run.net, run.eps, run.steps) == setting}
        self.clean: dict[str, np.ndarray] = {}
        self.verdicts: dict[str, np.ndarray] = {}
        self.autoattack: dict[str, list[dict[str, Any]]] = {}
        self._seeds: dict[str, list[int]] = {}
        for method in ALL:
            rows = [r for run, r in of_setting.items() if run.method == method and run.split == SPLIT]
            if rows:
                self._seeds[method] = [row["seed"] for row in rows]
                self.clean[method] = np.array([100 * row["clean"] / row["clean_of"] for row in rows])
                self.verdicts[method] = np.array([unpack(row["verdicts"]) for row in rows], dtype=float) * 100
                self.autoattack[method] = [row for row in rows if "autoattack" in row]

    def seeds(self, method: str) -> int:
        """How many there are of a method."""
        return len(self.clean[method])

    def mean(self, method: str) -> tuple[float, float]:
        """Clean and robust accuracy, in percent."""
        return float(self.clean[method].mean()), float(self.verdicts[method].mean())

    def curve(self) -> list[str]:
        """The methods of the family that the others are measured by, as far as there are runs."""
        return [name for name, method in METHODS.items() if method.family == CURVE and name in self.clean]

    def interval(self, method: str) -> tuple[float, float]:
        """Of the robust accuracy, 95 %."""
        return _central(self.verdicts[method][np.ix_(*draw)].mean() for draw in self._draws(method))

    def above_curve(self, method: str) -> tuple[float, tuple[float, float]] | None:
        """Robust accuracy above that of the curve at the same clean accuracy, and its 95 % interval.

        The curve is a straight line between its points, and goes on level beyond its ends. Of the seeds those count
        that all of its methods have.
        """
        family = self.curve()
        common = set(self._seeds[method]).intersection(*(self._seeds[other] for other in family))
        if len(family) < 2 or not common:
            return None
        of_common = {name: [self._seeds[name].index(seed) for seed in sorted(common)] for name in {method, *family}}

        def mean(name: str, seeds: np.ndarray, images: np.ndarray) -> tuple[float, float]:
            rows = np.array(of_common[name])[seeds]
            return self.clean[name][rows].mean(), self.verdicts[name][np.ix_(rows, images)].mean()

        def above(seeds: np.ndarray, images: np.ndarray) -> float:
            places, heights = zip(*sorted(mean(other, seeds, images) for other in family), strict=True)
            clean, robust = mean(method, seeds, images)
            return float(robust - np.interp(clean, places, heights))

        everything = np.arange(len(common)), np.arange(self.verdicts[method].shape[1])
        return above(*everything), _central(above(*draw) for draw in self._draws(method, len(common)))

    def _draws(self, method: str, seeds: int | None = None) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        generator = np.random.default_rng(0)
        all_seeds, images = self.verdicts[method].shape
        seeds = all_seeds if seeds is None else seeds
        for _ in range(DRAWS):
            yield generator.integers(seeds, size=seeds), generator.integers(images, size=images)


def _central(values: Iterable[float]) -> tuple[float, float]:
    low, high = np.quantile(np.fromiter(values, dtype=float), [0.025, 0.975])
    return float(low), float(high)


def table(setting: Setting, points: Points, costs: dict[str, float]) -> str:
    """One setting as a Markdown table."""
    net, eps, steps = setting
    lines = [
        f"\n## {net}, eps {eps}, {steps} steps\n",
        "| trained with | seeds | clean % | robust % (95 %) | above PGD-3's curve (95 %) | AutoAttack, 200 | cost |",
        "|---|--:|--:|:-:|:-:|:-:|--:|",
    ]
    for method in points.clean:
        clean, robust = points.mean(method)
        low, high = points.interval(method)
        above, attacked = points.above_curve(method), points.autoattack[method]
        of_curve = "" if above is None else f"{above[0]:+.1f} ({above[1][0]:+.1f} to {above[1][1]:+.1f})"
        counts = ", ".join(str(row["autoattack"]) for row in attacked)
        cost = f"{costs[method]:.2f}" if method in costs else ""
        lines.append(
            f"| {method} | {points.seeds(method)} | {clean:.1f} | {robust:.1f} ({low:.1f}-{high:.1f}) | {of_curve} "
            f"| {counts} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def figure(results: Results, across: Callable[[str, str, Points], tuple[float, float] | None], label: str) -> Figure:
    """Robust accuracy of what comes near the best against something else, in a panel for each setting.

    Args:
        results: All runs.
        across: Where a method lies, from the net, its name and the points of the setting; None for nowhere.
        label: Of the horizontal axis.
    """
    settings = settings_of(results)
    rows = sorted({(net, eps) for net, eps, _ in settings})
    columns = sorted({steps for _, _, steps in settings})
    picture = Figure(figsize=(7.5, 2.4 * len(rows) + 0.9), layout="constrained", dpi=150)
    axes = picture.subplots(len(rows), len(columns), squeeze=False)
    handles: dict[str, Any] = {}
    for panel, ((net, eps), steps) in zip(axes.flat, itertools.product(rows, columns), strict=True):
        points = Points(results, (net, eps, steps))
        best = max((points.mean(name)[1] for name in points.clean), default=100.0)
        near = []
        for family, (color, marker) in LOOKS.items():
            members = [name for name in METHODS if METHODS[name].family == family and name in points.clean]
            places = [place for name in members if (place := across(net, name, points)) is not None]
            if places:
                (handles[family],) = panel.plot(
                    *zip(*places, strict=True), color=color, marker=marker, markersize=5, linewidth=1
                )
            near += [place for place, robust in places if robust > best - WINDOW]
        panel.set(title=f"{net}, eps {eps}, {steps} steps", ylim=(best - WINDOW, best + 1))
        if near:
            panel.set(xlim=(min(near) - 0.04 * (max(near) - min(near)) - 0.1, max(near) * 1.005 + 0.1))
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[-1]:
        panel.set(xlabel=label)
    for panel in axes[:, 0]:
        panel.set(ylabel="robust accuracy, %")
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return picture

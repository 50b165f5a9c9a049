"""Tables and figures of the study, from the files of its runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.methods import ALL, METHODS
from study.models import NETS
from study.runs import Run, unpack

RECORD = Path("docs/fashion-mnist")
SPLIT = "test"
CURVE = "PGD-3"  # the family whose trade-off of clean against robust accuracy the others are measured by
DRAWS = 2000
WINDOW = 8  # points of robust accuracy below the best that the figure shows
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito
MARKERS = "osv^DP*X"

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
    settings = sorted({(run.net, run.eps, run.steps) for run in results if run.split == SPLIT})
    tables = [table(setting, Points(results, setting), costs.get(setting[0], {})) for setting in settings]
    (RECORD / "tables.md").write_text("\n".join([INTRODUCTION, *tables]))
    figure(settings, results, costs).savefig(RECORD / "front.png")


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
        f"\n### {net}, eps {eps}, {steps} steps\n",
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


def figure(settings: list[Setting], results: Results, costs: dict[str, dict[str, float]]) -> Figure:
    """For each setting, robust accuracy against clean accuracy and against cost, of what comes near the best."""
    picture = Figure(figsize=(7.5, 2.7 * len(settings) + 0.8), layout="constrained", dpi=150)
    axes = picture.subplots(len(settings), 2, squeeze=False, sharey="row")
    families = list(dict.fromkeys(method.family or name for name, method in ALL.items()))
    for (left, right), setting in zip(axes, settings, strict=True):
        points = Points(results, setting)
        of_net = costs.get(setting[0], {})
        for index, family in enumerate(families):
            members = [name for name in points.clean if (ALL[name].family or name) == family]
            looks = {
                "color": COLORS[index % 8],
                "marker": MARKERS[(index * 3 + index // 8) % 8],
                "label": family,
                "markersize": 5,
            }
            _line(left, [points.mean(name) for name in members], **looks)
            _line(right, [(of_net[name], points.mean(name)[1]) for name in members if name in of_net], **looks)
        net, eps, steps = setting
        best = max(points.mean(name)[1] for name in points.clean)
        near = [points.mean(name) for name in points.clean if points.mean(name)[1] > best - WINDOW]
        left.set(xlim=(min(clean for clean, _ in near) - 0.5, max(clean for clean, _ in near) + 0.5))
        left.set(ylim=(best - WINDOW, best + 1))
        left.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=f"{net}, eps {eps}, {steps} steps")
        right.set(xlabel="cost of a step, natural = 1")
        for panel in (left, right):
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return picture


def _line(panel: Axes, places: list[tuple[float, float]], **looks: Any) -> None:
    if places:
        panel.plot(*zip(*places, strict=True), linewidth=1, **looks)

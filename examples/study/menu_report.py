"""Tables and figures of the menu, from the files of its runs."""

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study import points
from study.menu import BUDGET, EQUAL_STEPS, KINDS, LONG_ENTRIES, LONG_STEPS, MENU
from study.runs import Run, unpack

RECORD = Path("docs/menu")
ANCHOR = "N-FGSM, half"  # the recommended objective, with which the others are compared
WINDOW = 25.0  # points of robust accuracy below the best that the figure shows
GAP = 8.0  # points of accuracy under PGD-20 over that under APGD, above which PGD is fooled

INTRODUCTION = f"""# What each entry of the menu is worth

Runs of `python examples/menu.py`; made from `runs.json` by its `--report`. Fashion-MNIST, 128 images a step. Every
entry was trained with three weights, or four if the best one was the largest or smallest, and evaluated on 500
validation images (one seed, APGD-CE of 50 steps); the weight with the most robust accuracy is in the tables. *Equal
compute*: as many steps as cost {BUDGET:.0f} natural steps, by `objective.cost()`. *Equal steps*: {EQUAL_STEPS}. Clean:
10,000 test images. Robust: the first 1,000 under APGD-CE and APGD-T (9 targets, dropped by halves, 30 steps: on six
networks the verdicts of 100 steps); 95 % intervals are bootstraps of images and seeds together, and with three seeds
understate what training varies. *Over*: robust accuracy over that of the recommended objective, `NFGSM(threat,
share=0.5)`, with the same seeds and images. *Gap*: accuracy under PGD-20 over robust accuracy, the smallest of the
seeds; above {GAP:.0f} points it is flagged, as PGD then says little. *Collapse*: in how many seeds accuracy under
PGD-20 is below half of that under FGSM, of entries with an attack of one step.
"""

Setting = tuple[str, str]  # net and eps
Kind = tuple[str, bool]  # entry, and whether its runs have equal steps
Group = Sequence[Mapping[str, Any]]  # the runs of an entry in a setting, one for each seed


@functools.cache
def on_record() -> Mapping[str, dict[str, Any]]:
    """The runs that are committed, by their names."""
    path = RECORD / "runs.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else []
    return {name_of(result): result for result in found}


def name_of(result: Mapping[str, Any]) -> str:
    """The name of the run that a result is of."""
    return Run(*(result[field] for field in Run.__dataclass_fields__)).name


def write(folder: Path) -> None:
    """Put all results on record, and tables and figures beside them."""
    found = dict(on_record())
    for path in sorted((folder / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        found[name_of(result)] = result
    RECORD.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(found[name]) for name in sorted(found))
    (RECORD / "runs.json").write_text(f'{{"runs": [\n{lines}\n]}}\n')
    on_record.cache_clear()
    settings = in_settings(found.values())
    tables = [table(*setting, groups) for setting, groups in settings.items()] + [long_table(found.values())]
    (RECORD / "tables.md").write_text(INTRODUCTION + "".join(tables))
    if settings:
        figure(settings).savefig(RECORD / "clean_and_robust.png")


def in_settings(found: Iterable[dict[str, Any]]) -> dict[Setting, dict[Kind, list[dict[str, Any]]]]:
    """The runs on test images, by setting, entry, and whether they have equal steps or equal compute."""
    settings: dict[Setting, dict[Kind, list[dict[str, Any]]]] = {}
    found = sorted(found, key=name_of)
    weights = chosen_weights(found)
    for result in found:
        setting = result["net"], result["eps"], result["entry"]
        if result["split"] == "test" and result["weight"] == weights.get(setting, result["weight"]):
            groups = settings.setdefault((result["net"], result["eps"]), defaultdict(list))
            for equal_steps in (False, True):
                if result["steps"] == (EQUAL_STEPS if equal_steps else steps_for_budget(result)):
                    groups[result["entry"], equal_steps].append(result)
    return settings


def chosen_weights(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], float]:
    """By net, eps and entry: the weight that is the best one on validation images."""
    tried: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for result in found:
        if result["split"] == "validation":
            tried[result["net"], result["eps"], result["entry"]].append(result)
    return {setting: best_weight(results) for setting, results in tried.items()}


def best_weight(tried: Iterable[Mapping[str, Any]]) -> float:
    """The weight with the most robust accuracy; of two as good, the smaller one."""
    return max(tried, key=lambda result: (result["robust"], -result["weight"]))["weight"]


def steps_for_budget(result: Mapping[str, Any]) -> int:
    """How many steps cost the budget."""
    return round(BUDGET / result["cost"])


def table(net: str, eps: str, groups: Mapping[Kind, Group]) -> str:
    """One setting as a Markdown table, the most robust entry at equal compute first."""
    anchor = groups.get((ANCHOR, False), ())
    lines = [
        f"\n## {net}, eps {eps}\n",
        "| trained with | weight | cost | steps | seeds | clean % | robust % (95 %) | over the recommended | gap "
        "| collapse | at equal steps: clean % | robust % |",
        "|---|--:|--:|--:|--:|--:|:-:|:-:|--:|--:|--:|--:|",
    ]
    entries = [entry for entry in MENU if groups.get((entry, False))]
    for entry in sorted(entries, key=lambda entry: -mean(groups[entry, False], "robust")):
        group, steps = groups[entry, False], groups.get((entry, True), ())
        first = group[0]
        low, high = interval(group)
        over = "" if entry == ANCHOR or not anchor else difference(group, anchor)
        gap = min(100 * (run["PGD-20"] - run["robust"]) / run["robust_of"] for run in group)
        collapsed = MENU[entry].collapses and sum(run["PGD-20"] < 0.5 * run["FGSM"] for run in group)
        weight = f"{first['weight']:g}" if MENU[entry].about else ""
        flagged = f"**{gap:.1f}**" if gap > GAP else f"{gap:.1f}"
        at_steps = [f"{mean(steps, what):.1f}" if steps else "" for what in ("clean", "robust")]
        lines.append(
            f"| {entry} | {weight} | {first['cost']:.2f} | {first['steps']} | {len(group)} "
            f"| {mean(group, 'clean'):.1f} | {mean(group, 'robust'):.1f} ({low:.1f}-{high:.1f}) | {over} | {flagged} "
            f"| {collapsed or ''} | {at_steps[0]} | {at_steps[1]} |"
        )
    return "\n".join(lines) + "\n"


def long_table(found: Iterable[dict[str, Any]]) -> str:
    """What starts that remember are worth when the training is long enough to remember anything."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(found, key=name_of):
        if result["split"] == "test" and result["steps"] == LONG_STEPS:
            groups[result["entry"]].append(result)
    if not groups:
        return ""
    first = next(iter(groups.values()))[0]
    lines = [
        f"\n## Ten epochs: {first['net']}, eps {first['eps']}, {LONG_STEPS} steps\n",
        "| trained with | weight | seeds | clean % | robust % (95 %) | over N-FGSM, points |",
        "|---|--:|--:|--:|:-:|:-:|",
    ]
    for entry in (name for name in LONG_ENTRIES if name in groups):
        group = groups[entry]
        low, high = interval(group)
        over = "" if entry == "N-FGSM" or "N-FGSM" not in groups else difference(group, groups["N-FGSM"])
        lines.append(
            f"| {entry} | {group[0]['weight']:g} | {len(group)} | {mean(group, 'clean'):.1f} "
            f"| {mean(group, 'robust'):.1f} ({low:.1f}-{high:.1f}) | {over} |"
        )
    return "\n".join(lines) + "\n"


def mean(group: Group, what: str) -> float:
    """Mean accuracy over the seeds, in percent."""
    return float(np.mean([100 * run[what] / run[f"{what}_of"] for run in group]))


def interval(group: Group) -> tuple[float, float]:
    """Of the robust accuracy, 95 %."""
    return _quantiles(_draws([group])[0])


def difference(group: Group, anchor: Group) -> str:
    """Robust accuracy over the anchor's, of the seeds that both have, and its 95 % interval."""
    ours, theirs = ({run["seed"]: run for run in runs} for runs in (group, anchor))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    drawn = _draws([[runs[seed] for seed in seeds] for runs in (ours, theirs)])
    low, high = _quantiles(drawn[0] - drawn[1])
    return f"{drawn[0][0] - drawn[1][0]:+.1f} ({low:+.1f} to {high:+.1f})"


def _draws(groups: Sequence[Group]) -> list[np.ndarray]:
    """Robust accuracies in percent: as found, then of seeds and images drawn anew, the same ones for all groups."""
    verdicts = [np.array([unpack(run["verdicts"]) for run in group], dtype=float) * 100 for group in groups]
    seeds, images = points.bootstrap_weights(*verdicts[0].shape, points.DRAWS)
    return [((seeds @ of_group) * images).sum(1) for of_group in verdicts]


def _quantiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return float(low), float(high)


def figure(settings: Mapping[Setting, Mapping[Kind, Group]]) -> Figure:
    """Clean against robust accuracy at equal compute, a panel for each setting; numbers stand for entries."""
    picture = Figure(figsize=(7.5, 3.3 * ((len(settings) + 1) // 2) + 2.4), layout="constrained", dpi=150)
    panels = picture.subplots((len(settings) + 1) // 2, 2, squeeze=False).flat
    numbers = {entry: number for number, entry in enumerate(MENU, 1)}
    for panel, ((net, eps), groups) in zip(panels, settings.items(), strict=False):
        places: list[tuple[float, float]] = []
        for entry, number in numbers.items():
            if group := groups.get((entry, False)):
                place = mean(group, "clean"), mean(group, "robust")
                places.append(place)
                panel.plot(*place, marker="o", markersize=9, color=KINDS[MENU[entry].kind], alpha=0.85)
                panel.annotate(str(number), place, ha="center", va="center", fontsize=5.5, color="white")
        best = max(robust for _, robust in places)
        shown = [clean for clean, robust in places if robust > best - WINDOW]
        panel.set(title=f"{net}, eps {eps}", ylim=(best - WINDOW, best + 2), xlim=(min(shown) - 1, max(shown) + 1))
        panel.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(picture.axes)[len(settings) :]:
        panel.set_axis_off()
    keys = [f"{number} {entry}" for entry, number in numbers.items()]
    rows = [keys[start : start + 4] for start in range(0, len(keys), 4)]
    text = "\n".join("".join(f"{key:<25s}" for key in row) for row in rows)
    handles = [Line2D([], [], color=color, marker="o", linestyle="", label=kind) for kind, color in KINDS.items()]
    picture.legend(handles=handles, loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=7)
    picture.supxlabel(text, fontsize=6.2, family="monospace", ha="left", x=0.02)
    return picture

"""The claims of the thesis about accuracy and cost, held against the runs of the study.

Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024), Tables 4.2, 4.4 and 5.1 and section 4.3.
What it says of gradients, edges and curvature is held against such networks by `examples/robustness_report.py`.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from study.data import FASHION_MNIST
from study.points import Mean, Points, Setting

INTRODUCTION = """# Fashion-MNIST: the claims

What the thesis says of accuracy and cost, beside what the [runs](tables.md) say; `examples/fashion_mnist.py --report`
makes this page. 95 % intervals of robust accuracy under APGD-CE and APGD-T, over images and seeds together; of clean
accuracy, which is of all test images, over seeds alone. *Holds*, *fails*: the whole interval is on one side; *open*: it
holds both. An empty cell has no runs, nor has a claim without a row. What is said of gradients, edges and curvature is
[held against networks of the same kind](../robustness/fashion-mnist.md).
"""
COST = "GradNorm costs 60 % of adversarial training: its share | 60 % (Table 4.3; an attack with parameter gradients)"


@dataclass(frozen=True)
class Claim:
    """One claim, as a number that says how far it holds.

    Attributes:
        statement: What is said.
        published: The number where it was published, and its source.
        methods: That the number is made of.
        number: Makes it of their clean and robust accuracies.
        form: How it is written.
        threshold: From which on the claim holds; None where no more than the number was asked for.
    """

    statement: str
    published: str
    methods: tuple[str, ...]
    number: Callable[[Mean], float]
    form: str
    threshold: float | None = None

    def cell(self, points: Points) -> str:
        """The number in one setting, its 95 % interval and, if there is a threshold, the verdict."""
        found = points.estimate(self.methods, self.number)
        if found is None:
            return ""
        value, (low, high) = found
        text = self.form.format(value)
        if low < high:
            text += f" ({self.form.format(low)} to {self.form.format(high)})"
        if self.threshold is None:
            return text
        verdict = "holds" if low >= self.threshold else "fails" if high < self.threshold else "open"
        return f"{verdict}: {text}"


def share(statement: str, published: str, method: str, *, of: str, threshold: float) -> Claim:
    """A method's robust accuracy in percent of another one's."""
    return Claim(
        statement, published, (method, of), lambda mean: 100 * mean(method)[1] / mean(of)[1], "{:.0f}", threshold
    )


def gain(
    statement: str, published: str, method: str, *, over: str, clean: bool = False, threshold: float | None = None
) -> Claim:
    """How many points of robust or clean accuracy a method is above another one."""
    which = 0 if clean else 1
    return Claim(
        statement, published, (method, over), lambda mean: mean(method)[which] - mean(over)[which], "{:+.1f}", threshold
    )


CLAIMS = (
    share(
        "GradNorm has 90 % of adversarial training's robust accuracy: its share",
        "92 % (Swin-B, Table 4.2), 92 % (ResNet-50, Table 4.4)",
        "GradNorm",
        of="PGD-3",
        threshold=90,
    ),
    gain(
        "and its clean accuracy: points of GradNorm over PGD-3",
        "+0.6 (Swin-B, Table 4.2), +1.0 (ResNet-50, Table 4.4)",
        "GradNorm",
        over="PGD-3",
        clean=True,
    ),
    share("the same with SiLU", "92 % (ResNet-50, Table 4.4)", "GradNorm, SiLU", of="PGD-3", threshold=90),
    share(
        "the same, both from a network that was trained before",
        "so the thesis starts; no other number",
        "natural, then GradNorm",
        of="natural, then PGD-3",
        threshold=90,
    ),
    share(
        "noisy differences, weight 0.4: share",
        "not in the thesis",
        "noisy differences, 0.4",
        of="PGD-3",
        threshold=90,
    ),
    share(
        "noisy differences on half of the batch, weight 0.4: share",
        "not in the thesis",
        "noisy differences, half, 0.4",
        of="PGD-3",
        threshold=90,
    ),
    share("edge alignment has 60 %: its share", "62 % (Swin-B, Table 5.1)", "edges", of="PGD-3", threshold=60),
    gain(
        "GradNorm needs smooth activations: points of GELU over ReLU",
        "+23.2 (ResNet-50, Table 4.4)",
        "GradNorm",
        over="GradNorm, ReLU",
        threshold=0,
    ),
    gain(
        "with ReLU, twice the weight does not help: points over once",
        "no number",
        "GradNorm, ReLU, weight 2.4",
        over="GradNorm, ReLU",
    ),
    gain(
        "adversarial training does not need them: points of GELU over ReLU",
        "+1.0 (ResNet-50, Table 4.4)",
        "PGD-3",
        over="PGD-3, ReLU",
    ),
    gain(
        "an optimiser that does not adapt makes the penalty crash: points of SGD over AdamW under GradNorm",
        "crashes; no number (section 4.3)",
        "GradNorm, SGD",
        over="GradNorm",
    ),
    gain(
        "without a penalty it does not: points of clean accuracy of SGD over AdamW",
        "",
        "natural, SGD",
        over="natural",
        clean=True,
    ),
    gain(
        "so does a learning rate that starts high: points of a start from the full rate",
        "crashes; no number (section 4.3)",
        "GradNorm, warm-up from the full rate",
        over="GradNorm",
    ),
    gain(
        "without a penalty it does not: points of clean accuracy",
        "",
        "natural, warm-up from the full rate",
        over="natural",
        clean=True,
    ),
)


def page(points: Mapping[Setting, Points], costs: Mapping[str, Mapping[str, float]]) -> str:
    """All claims as a page of Markdown, a table for each data set and network."""
    parts = [INTRODUCTION]
    for (data, net), group in itertools.groupby(points, key=lambda setting: (setting.data, setting.net)):
        settings = list(group)
        titles = [f"eps {setting.eps}, {setting.steps:,} steps" for setting in settings]
        lines = [
            f"\n## {net}\n" if data == FASHION_MNIST else f"\n## {net}, {data}\n",
            f"| claim | published, on ImageNet | {' | '.join(titles)} |",
            "|---|---|" + ":-:|" * len(titles),
        ]
        for claim in CLAIMS:
            cells = [claim.cell(points[setting]) for setting in settings]
            if any(cells):
                lines.append(f"| {claim.statement} | {claim.published} | {' | '.join(cells)} |")
        attacked = [autoattack(points[setting]) for setting in settings]
        if any(attacked):
            lines.append(
                f"| GradNorm's share under AutoAttack (200 images) | 92 % (Table 4.2) | {' | '.join(attacked)} |"
            )
        of_net = costs.get(net, {})
        if {"GradNorm", "PGD-3"} <= of_net.keys():
            percent = f"{100 * of_net['GradNorm'] / of_net['PGD-3']:.0f}"
            lines.append(f"| {COST} |" + f" {percent} |" * len(titles))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def autoattack(points: Points) -> str:
    """GradNorm's share of PGD-3's accuracy under AutoAttack, over the seeds that have both."""
    counts = [
        {row["seed"]: row["autoattack"] for row in points.autoattack.get(name, ())} for name in ("GradNorm", "PGD-3")
    ]
    seeds = counts[0].keys() & counts[1].keys()
    if not seeds:
        return ""
    ours, theirs = (sum(of_method[seed] for seed in seeds) for of_method in counts)
    return f"{100 * ours / theirs:.0f} ({ours} of {theirs}; seeds: {len(seeds)})"

"""What chapters 4 and 5 and appendix A of the thesis say of robust models, held against what was measured here.

Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024). Published numbers are those of its text, of
the tables of the paper (ECCV 2024) and of the stored outputs of the released notebooks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradreg.statistics import Moments

from robustness.findings import Findings

HOLDS, FAILS, OPEN = "holds", "does not hold", "open"


@dataclass(frozen=True)
class Answer:
    """What was measured of one model.

    Attributes:
        here: In numbers.
        verdict: ``"holds"``, ``"does not hold"``, or ``"open"`` where the 95 % interval holds both.
    """

    here: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One claim, to be held against a model.

    Attributes:
        statement: What is said.
        where: In the thesis.
        published: The numbers that it rests on.
        ask: The answer, from the findings of a model and of the one that it is compared with.
    """

    statement: str
    where: str
    published: str
    ask: Callable[[Findings, Findings], Answer]


def answers(
    findings: dict[str, Findings], natural: str, adversarial: str | None
) -> list[tuple[Claim, dict[str, Answer]]]:
    """Every claim, and the answer of every model that it is about.

    Args:
        findings: Of all models.
        natural: The model that the others are compared with.
        adversarial: The adversarially trained one, of whose robust accuracy the others' is a share; None for none.
    """
    base = findings[natural]
    found = [
        (claim, {label: claim.ask(f, base) for label, f in findings.items() if label != natural}) for claim in CLAIMS
    ]
    found.append((WITHIN, {label: WITHIN.ask(f, f) for label, f in findings.items()}))
    if adversarial is not None:
        top, rest = findings[adversarial], [label for label in findings if label not in (natural, adversarial)]
        found.append((SHARE, {label: SHARE.ask(findings[label], top) for label in rest if "edge" not in label}))
        found.append((EDGES, {label: EDGES.ask(findings[label], top) for label in rest if "edge" in label}))
    return [(claim, of_models) for claim, of_models in found if of_models]


def to_dict(found: Sequence[tuple[Claim, dict[str, Answer]]]) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [
        {
            "claim": claim.statement,
            "where": claim.where,
            "published": claim.published,
            "models": {label: vars(answer) for label, answer in of_models.items()},
        }
        for claim, of_models in found
    ]


def to_markdown(found: Sequence[tuple[Claim, dict[str, Answer]]], labels: Sequence[str]) -> str:
    """As a table."""
    lines = [f"| claim | where, and what is published | {' | '.join(labels)} |", "|---|---|" + "---|" * len(labels)]
    for claim, of_models in found:
        where = f"{claim.where}: {claim.published}" if claim.published else claim.where
        cells = [
            f"{of_models[label].verdict}: {of_models[label].here}" if label in of_models else "" for label in labels
        ]
        lines.append(f"| {claim.statement} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def smaller(name: str) -> Callable[[Findings, Findings], Answer]:
    """The statistic is smaller than that of the natural model: the mean of the log10 of the ratio, image by image."""

    def ask(found: Findings, base: Findings) -> Answer:
        floor = found.measurements.floors[name]
        logs = (_values(base, name) + floor).log10() - (_values(found, name) + floor).log10()
        moments = Moments.of(logs[logs.isfinite()])
        low, high = moments.interval
        means = " to ".join(f"{f.measurements.summary(name).mean:.3g}" for f in (base, found))
        here = f"{_power(moments.mean)} times ({_power(low)} to {_power(high)}); means {means}"
        return Answer(here, _verdict(low, high))

    return ask


def larger(name: str) -> Callable[[Findings, Findings], Answer]:
    """The statistic is larger than that of the natural model: the mean of the difference, image by image."""

    def ask(found: Findings, base: Findings) -> Answer:
        before, after = _values(base, name), _values(found, name)
        both = before.isfinite() & after.isfinite()
        low, high = Moments.of((after - before)[both]).interval
        here = f"{before[both].mean():+.2f} to {after[both].mean():+.2f}, by {low:+.2f} to {high:+.2f}"
        return Answer(here, _verdict(low, high))

    return ask


def _rises_less(found: Findings, base: Findings) -> Answer:
    rises = [
        torch.tensor(f.along[1.0].values["loss"]).double() - torch.tensor(f.along[0.0].values["loss"]).double()
        for f in (base, found)
    ]
    low, high = Moments.of(rises[0] - rises[1]).interval
    here = f"by {rises[1].mean():.2f} where the natural model's rises by {rises[0].mean():.2f}"
    return Answer(here, _verdict(low, high))


def _within(found: Findings, _: Findings) -> Answer:
    name = "gradient, L1 norm"
    robust, fooled = (found.measurements.summary(name, group) for group in ("robust", "fooled"))
    if min(robust.log10.n, fooled.log10.n) < 2:
        return Answer("all images but one at most are in one group", OPEN)
    gap = fooled.log10.mean - robust.log10.mean
    spread = 1.96 * math.sqrt(sum(s.log10.std**2 / (s.log10.n - 1) for s in (robust, fooled)))
    here = f"means {robust.mean:.3g} (n = {robust.n}) and {fooled.mean:.3g} (n = {fooled.n})"
    return Answer(here, _verdict(gap - spread, gap + spread))


def _share_of(target: float) -> Callable[[Findings, Findings], Answer]:
    def ask(found: Findings, top: Findings) -> Answer:
        mine, theirs = found.report.robust_accuracy, top.report.robust_accuracy
        low, high = top.report.compare(found.report).interval
        share = mine.value / theirs.value if theirs.count else math.nan
        points = f"{100 * mine.value:.1f} of {100 * theirs.value:.1f} %"
        between = f"{-100 * high:+.1f} to {-100 * low:+.1f} points"
        allowed = (target - 1) * theirs.value
        return Answer(f"{100 * share:.0f} %: {points} ({between})", _verdict(-high - allowed, -low - allowed))

    return ask


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The loss's gradient is smaller",
        "Table 4.1 of the paper",
        "mean L1 norm, Swin-B: 3,892 natural, 37.4 adversarially trained (104 times)",
        smaller("gradient, L1 norm"),
    ),
    Claim(
        "The loss is less curved",
        "Table A.1",
        "Hessian norm 1,436,045 natural, 0.751 adversarial, 0.788 GradNorm",
        smaller("Hessian norm"),
    ),
    Claim(
        "Its gradient turns less, relative to its length",
        "Table A.1, Fig. A.1",
        "curvature 17,666 natural, 2.17 adversarial, 2.15 GradNorm",
        smaller("normalised curvature"),
    ),
    Claim(
        "The loss is closer to linear around an image",
        "Table A.2, Fig. A.2",
        "log10 -4.58 natural, -6.84 adversarial, -6.60 GradNorm (100 to 180 times)",
        smaller("local linearity error"),
    ),
    Claim("The loss rises less along an attack's direction", "Fig. A.3", "a figure", _rises_less),
    Claim(
        "The loss's gradient looks like the image's edges",
        "Table 5.1",
        "log-log correlation about -0.45 natural, +0.56 robust",
        larger("edge correlation of the loss's gradient"),
    ),
    Claim(
        "It does where there are edges at all",
        "beyond the thesis",
        "",
        larger("edge correlation of the loss's gradient, edge pixels"),
    ),
    Claim(
        "So does the saliency map",
        "Table 5.1",
        "about -0.45 natural, +0.56 robust",
        larger("edge correlation of the saliency map"),
    ),
    Claim(
        "So does the saliency map where there are edges at all",
        "beyond the thesis",
        "",
        larger("edge correlation of the saliency map, edge pixels"),
    ),
    Claim(
        "Gradients keep their signs under noise",
        "beyond the thesis",
        "",
        larger("signs that stay under noise of eps / 4"),
    ),
)
WITHIN = Claim(
    "Gradients are smaller at images that are robust to PGD-10",
    "Table 4.1 of the paper",
    "mean L1 norm, adversarially trained Swin-B: 10.96 and 75.90",
    _within,
)
SHARE = Claim(
    "A penalty has 90 % of adversarial training's robust accuracy",
    "Table 4.2",
    "51.58 of 56.12 %: 92 %",
    _share_of(0.9),
)
EDGES = Claim("Edge alignment has 60 % of it", "Table 5.1", "35.02 of 56.12 %: 62 %", _share_of(0.6))


def _values(found: Findings, name: str) -> Tensor:
    return torch.tensor(found.measurements.values[name]).double()


def _power(exponent: float) -> str:
    return f"{10**exponent:.2g}" if exponent < 2 else f"{10**exponent:,.0f}"


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else OPEN

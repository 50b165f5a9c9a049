"""What chapters 4 and 5 and appendix A of the thesis say of robust models, held against what was measured here.

Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024). Published numbers are those of the text, of
the paper's tables (ECCV 2024) and of the stored outputs of the released notebooks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradreg.statistics import Measurements, Moments
from robustness.findings import Findings


@dataclass(frozen=True)
class Line:
    """One claim about one model.

    Attributes:
        claim: What is said.
        where: In the thesis.
        published: The numbers that it rests on.
        model: The robust model that is held against it.
        here: The numbers here.
        verdict: ``"holds"``, ``"does not hold"``, or ``"open"`` where the 95 % interval holds both.
    """

    claim: str
    where: str
    published: str
    model: str
    here: str
    verdict: str


def lines_of(findings: dict[str, Findings], natural: str, adversarial: str | None) -> list[Line]:
    """Every claim, for every model beside the natural one.

    Args:
        findings: Of all models.
        natural: The model that the others are compared with.
        adversarial: The adversarially trained one, of whose robust accuracy the others' is a share; None for none.
    """
    base = findings[natural]
    lines = []
    for label, found in findings.items():
        if label != natural:
            lines += [claim(label, base, found) for claim in CLAIMS]
    if adversarial is not None:
        top = findings[adversarial].report
        for label, found in findings.items():
            if label not in (natural, adversarial):
                lines.append(
                    _share(label, found.report.worst_case.value, top.worst_case.value, found, findings[adversarial])
                )
    lines += [_within(label, found) for label, found in findings.items()]
    return lines


def smaller(name: str, claim: str, where: str, published: str) -> Callable[[str, Findings, Findings], Line]:
    """The statistic is smaller than that of the natural model: the mean of the log10 of the ratio, image by image."""

    def line(label: str, base: Findings, found: Findings) -> Line:
        logs = _logs(base.measurements, name) - _logs(found.measurements, name)
        moments = Moments.of(logs[logs.isfinite()])
        low, high = moments.interval
        here = f"{_power(moments.mean)} times smaller ({_power(low)} to {_power(high)}), geometric mean over images"
        return Line(claim, where, published, label, here, _verdict(low, high))

    return line


def larger(name: str, claim: str, where: str, published: str) -> Callable[[str, Findings, Findings], Line]:
    """The statistic is larger than that of the natural model: the mean of the difference, image by image."""

    def line(label: str, base: Findings, found: Findings) -> Line:
        before, after = (torch.tensor(f.measurements.values[name]).double() for f in (base, found))
        difference = after - before
        moments = Moments.of(difference[difference.isfinite()])
        low, high = moments.interval
        means = [Moments.of(values[values.isfinite()]).mean for values in (before, after)]
        here = f"{means[0]:+.2f} natural, {means[1]:+.2f} here: {moments.mean:+.2f} ({low:+.2f} to {high:+.2f})"
        return Line(claim, where, published, label, here, _verdict(low, high))

    return line


def _along(label: str, base: Findings, found: Findings) -> Line:
    """How much the loss rises on the way to the attacked images."""
    rises = [
        torch.tensor(f.along[1.0].values["loss"]).double() - torch.tensor(f.along[0.0].values["loss"]).double()
        for f in (base, found)
    ]
    moments = Moments.of(rises[0] - rises[1])
    low, high = moments.interval
    here = f"by {rises[0].mean():.2f} natural, {rises[1].mean():.2f} here: {moments.mean:.2f} less ({low:.2f} to {high:.2f})"
    return Line(
        "The loss rises less along the direction of an attack",
        "Fig. A.3",
        "AT 36 to about 62, GradNorm 37 to about 78: L1 gradients at x and at eps",
        label,
        here,
        _verdict(low, high),
    )


def _within(label: str, found: Findings) -> Line:
    """Whether gradients are smaller where the attack fails, in one model."""
    name, measurements = "gradient, L1 norm", found.measurements
    withstand, fooled = (measurements.summary(name, group) for group in ("withstands", "fooled"))
    gap = withstand.log10.mean - fooled.log10.mean
    spread = 1.96 * math.sqrt(
        sum(s.log10.std**2 / max(s.log10.n - 1, 1) for s in (withstand, fooled))
    )  # of independent samples
    known = withstand.log10.n > 1 and fooled.log10.n > 1
    here = (
        f"means {withstand.mean:.3g} (n = {withstand.n}) and {fooled.mean:.3g} (n = {fooled.n})"
        if withstand.n and fooled.n
        else "all images are in one group"
    )
    return Line(
        "Gradients are smaller at images that withstand the attack",
        "Table 4.1",
        "Swin-B, adversarially trained: 10.96 and 75.90",
        label,
        here,
        _verdict(-gap - spread, -gap + spread) if known else "open",
    )


def _share(label: str, mine: float, top: float, found: Findings, adversarial: Findings) -> Line:
    both = adversarial.report.compare(found.report)
    share = mine / top if top else math.nan
    edges = "edge" in label.lower()
    target = 0.6 if edges else 0.9
    return Line(
        f"{'Edge alignment' if edges else 'A penalty'} reaches {100 * target:.0f} % of adversarial training's robust accuracy",
        "Table 5.1" if edges else "Table 4.2",
        "35.02 of 56.12: 62 %" if edges else "51.58 of 56.12: 92 %",
        label,
        f"{100 * mine:.1f} of {100 * top:.1f} %: {100 * share:.0f} % ({both})",
        "holds" if share >= target else "does not hold",
    )


CLAIMS: Sequence[Callable[[str, Findings, Findings], Line]] = (
    smaller(
        "gradient, L1 norm",
        "The loss's gradient is smaller",
        "Table 4.1",
        "L1, Swin-B: 3,892 natural, 37.4 robust (104 times)",
    ),
    smaller(
        "Hessian norm", "The loss bends less", "Table A.1", "Hessian norm 1,436,045 natural, 0.751 AT, 0.788 GradNorm"
    ),
    smaller(
        "normalised curvature",
        "Its gradient turns less, relative to its length",
        "Table A.1, Fig. A.1",
        "curvature 17,666 natural, 2.17 AT, 2.15 GradNorm",
    ),
    smaller(
        "local linearity error",
        "The loss is closer to linear around an image",
        "Table A.2, Fig. A.2",
        "log10 -4.58 natural, -6.84 AT, -6.60 GradNorm (100 to 180 times)",
    ),
    larger(
        "edge correlation of the loss's gradient",
        "Gradients look like edges",
        "Table 5.1",
        "about -0.45 natural, +0.56 robust; 0.569 in a stored output",
    ),
    larger("the same, edge pixels", "The same where there are edges at all", "beyond the thesis", "no number"),
    larger(
        "edge correlation of the saliency map",
        "Saliency maps look like edges",
        "Table 5.1",
        "about -0.45 natural, +0.56 robust",
    ),
    larger("the same, edge pixels only", "The same where there are edges at all", "beyond the thesis", "no number"),
    larger(
        "signs that stay under noise of eps / 4",
        "Gradients keep their signs under noise",
        "beyond the thesis",
        "no number",
    ),
    _along,
)


def _logs(measurements: Measurements, name: str) -> torch.Tensor:
    return (torch.tensor(measurements.values[name]).double() + measurements.floors[name]).log10()


def _power(exponent: float) -> str:
    return f"{10**exponent:.2g}" if exponent < 2 else f"{10**exponent:,.0f}"


def _verdict(low: float, high: float) -> str:
    if math.isnan(low):
        return "open"
    return "holds" if low > 0 else "does not hold" if high < 0 else "open"


def to_dict(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [vars(line) for line in lines]

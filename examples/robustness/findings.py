"""Everything that is measured of one model. Each part has a state file, so that an interrupted report goes on."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    APGDAttack,
    EdgeAlignmentPenalty,
    GradNormPenalty,
    HessianNorm,
    Linf,
    LocalLinearity,
    NormalizedCurvature,
    PGDAttack,
    Point,
    RobustnessCurve,
    RobustnessReport,
    TargetedAPGDAttack,
    accuracy_curve,
    cross_entropy,
    evaluate,
    predicted_class,
)
from gradreg.differentiation import InputOnly
from gradreg.statistics import (
    EdgeCorrelation,
    LogHistogram,
    Loss,
    Measurements,
    SignAgreement,
    gradient_histograms,
    measure,
    measure_along,
)

from robustness.subjects import Images

SCALES = [step * 2 / 8 for step in range(9)]
RADII = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the curve, in units of eps


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        eps: The largest change of a pixel of [0, 1].
        iterations: Products with the Hessian in the power iteration.
        batch_size: Images at a time.
        seed: Of everything drawn.
    """

    eps: float
    iterations: int = 20
    batch_size: int = 50
    seed: int = 0

    @property
    def threat(self) -> Linf:
        """The perturbations looked at."""
        return Linf(self.eps)

    @property
    def statistics(self) -> dict[str, Callable[[Point], Tensor]]:
        """By the names that the page gives them."""
        return {
            "loss": Loss(),
            "gradient, L1 norm": GradNormPenalty(Linf(1.0)),
            "gradient, L2 norm": GradNormPenalty(L2(1.0)),
            "gradient, Linf norm": GradNormPenalty(L1(1.0)),
            "Hessian norm": HessianNorm(self.iterations, seed=self.seed),
            "normalised curvature": NormalizedCurvature(self.iterations, seed=self.seed),
            "local linearity error": LocalLinearity(self.threat, seed=self.seed),
            "edge correlation of the loss's gradient": EdgeCorrelation(),
            "edge correlation of the loss's gradient, edge pixels": EdgeCorrelation(edges_only=True),
            "edge correlation of the saliency map": EdgeCorrelation(of=predicted_class(), channels="max"),
            "edge correlation of the saliency map, edge pixels": EdgeCorrelation(
                of=predicted_class(), channels="max", edges_only=True
            ),
            "cosine of the class gradient and edges": cosine_of_edges,
            "signs that stay under noise of eps / 4": SignAgreement(self.threat.scaled(0.25), seed=self.seed),
        }

    @property
    def definitions(self) -> dict[str, str]:
        """Of the statistics, as code: the same in every process, a function by its name."""
        function = re.compile(r"<function (\S+) at 0x[0-9a-f]+>")
        return {name: function.sub(r"\1", repr(statistic)) for name, statistic in self.statistics.items()}

    @property
    def attacks(self) -> dict[str, Any]:
        """That the robust accuracy is taken under."""
        return {
            "APGD-CE": APGDAttack(self.threat, seed=self.seed),
            "APGD-T": TargetedAPGDAttack(self.threat, halving=True, seed=self.seed),
        }

    @property
    def grouping(self) -> PGDAttack:
        """The attack whose success groups the statistics, as in Table 4.1 of the thesis."""
        return PGDAttack(self.threat, steps=10, step_size=self.eps / 2, seed=self.seed)

    @property
    def direction(self) -> PGDAttack:
        """The attack whose direction is followed, as in Fig. A.3 of the thesis."""
        return PGDAttack(self.threat, steps=5, step_size=self.eps / 2, seed=self.seed)


@dataclass(frozen=True)
class Findings:
    """What was measured of one model.

    Attributes:
        report: Accuracy under attack.
        curve: Accuracy against eps.
        measurements: Statistics of every image.
        along: Some of them on the way to the attacked images and beyond.
        histograms: Sizes of gradient entries.
        path: Estimates of the power iteration after each product, for the first images.
    """

    report: RobustnessReport
    curve: RobustnessCurve
    measurements: Measurements
    along: dict[float, Measurements]
    histograms: dict[str, LogHistogram]
    path: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the page as JSON holds them, without those of each image."""
        names = list(next(iter(self.along.values())).values)
        return {
            "accuracy": _without(self.report.to_dict(), "verdicts", "samples"),
            "curve": _without(self.curve.to_dict(), "distances", "samples"),
            "statistics": _without(self.measurements.to_dict(), "values", "clean", "attacked", "samples"),
            "along_attack": {
                str(scale): {name: found.summary(name).mean for name in names} for scale, found in self.along.items()
            },
            "gradient_histograms": {
                name: {"bins_per_decade": h.bins_per_decade, "zeros": h.zeros, "counts": dict(sorted(h.counts.items()))}
                for name, h in self.histograms.items()
            },
            "power_iteration": self.path.quantile(torch.tensor([0.05, 0.5, 0.95]).to(self.path), dim=0).tolist(),
        }


def look_at(label: str, model: nn.Module, images: Images, settings: Settings, folder: Path) -> Findings:
    """Measure all of it, or go on where an interrupted run was.

    Args:
        label: Names the state files.
        model: On pixels in [0, 1].
        images: What to look at.
        settings: How.
        folder: Where the state files are, and where the statistics of every image go.
    """
    loader = images.loader(settings.batch_size)
    stem = re.sub(r"[^\w.-]+", "-", label)
    states = folder / "state"
    states.mkdir(parents=True, exist_ok=True)

    def state(part: str) -> Path:
        return states / f"{stem}.{part}.json"

    report = evaluate(model, loader, settings.attacks, seed=settings.seed, state=state("accuracy"))
    radii = [factor * settings.eps for factor in RADII]
    search = PGDAttack(settings.threat, steps=20, seed=settings.seed)
    curve = accuracy_curve(model, loader, search, radii, seed=settings.seed, state=state("curve"))
    measurements = measure(
        model, loader, settings.statistics, attack=settings.grouping, seed=settings.seed, state=state("statistics")
    )
    measurements.save(folder / f"{stem}.statistics.json")
    followed = {
        "loss": Loss(),
        "gradient, L1 norm": GradNormPenalty(Linf(1.0)),
        "normalised curvature": NormalizedCurvature(2, start="gradient"),
    }
    along = measure_along(model, loader, settings.direction, SCALES, followed, state=state("along"))
    histograms = gradient_histograms(model, loader, state=state("gradients"))
    x, y = next(iter(loader))
    point = Point(model, cross_entropy, x, y, differentiation=InputOnly(), look=False)
    path = HessianNorm(settings.iterations, seed=settings.seed).path(point)
    return Findings(report, curve, measurements, along, histograms, path)


def cosine_of_edges(point: Point) -> Tensor:
    """Cosine between the gradient of the predicted class's logit and the edge energy of the image."""
    return 1 - EdgeAlignmentPenalty(of=predicted_class())(point)


def _without(content: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}

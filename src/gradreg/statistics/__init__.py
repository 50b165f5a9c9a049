"""Statistics: what tells a robust model from a vulnerable one without attacking it.

A :class:`Statistic` is a definition of one number per sample, ``statistic(model, x, y) -> (B,)``; :func:`measure` takes
any number of them over a data set. They are the measurements of chapters 4 and 5 and appendix A of Rodríguez Muñoz,
"Adversarial robustness without perturbations" (MIT 2024), each with the definitions between which its text and its
released code differ.
"""

from gradreg.statistics.curvature import Curvature, HessianNorm, LocalLinearityError
from gradreg.statistics.edges import EdgeCorrelation, EdgeCosine, pearson
from gradreg.statistics.gradients import GradientNorm, Loss, SignAgreement
from gradreg.statistics.measurements import Measurements, gradient_histograms, measure, measure_along
from gradreg.statistics.point import Point
from gradreg.statistics.statistic import Statistic
from gradreg.statistics.summary import LogHistogram, Moments, Summary

__all__ = [
    "Curvature",
    "EdgeCorrelation",
    "EdgeCosine",
    "GradientNorm",
    "HessianNorm",
    "LocalLinearityError",
    "LogHistogram",
    "Loss",
    "Measurements",
    "Moments",
    "Point",
    "SignAgreement",
    "Statistic",
    "Summary",
    "gradient_histograms",
    "measure",
    "measure_along",
    "pearson",
]

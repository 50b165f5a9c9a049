"""Statistics: what tells a robust model from a vulnerable one without attacking it.

A statistic is a :class:`gradreg.Penalty`, or any function of a :class:`gradreg.Point` that returns one number per
sample; :func:`measure` takes any number of them over a data set. Here are those that no one trains with. With
:class:`gradreg.GradNormPenalty`, :class:`gradreg.EdgeAlignmentPenalty`, :class:`gradreg.HessianNorm`,
:class:`gradreg.NormalizedCurvature` and :class:`gradreg.LocalLinearity` they are the measurements of chapters 4 and 5
and appendix A of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024), each with the definitions
between which its text and its released code differ.
"""

from gradreg.statistics.edges import EdgeCorrelation, pearson
from gradreg.statistics.gradients import Loss, SignAgreement
from gradreg.statistics.measurements import Measurements, gradient_histograms, measure, measure_along
from gradreg.statistics.summary import LogHistogram, Moments, Summary

__all__ = [
    "EdgeCorrelation",
    "LogHistogram",
    "Loss",
    "Measurements",
    "Moments",
    "SignAgreement",
    "Summary",
    "gradient_histograms",
    "measure",
    "measure_along",
    "pearson",
]

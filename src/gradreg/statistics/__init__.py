"""Statistics: what tells a robust model from a vulnerable one without attacking it.

A statistic is a :class:`gradreg.Penalty`, or any function of a :class:`gradreg.Point` that returns one number per
sample; :func:`measure` takes any number of them over a data set. The norms of the gradient are
:class:`gradreg.GradNormPenalty`, its cosine with edges :class:`gradreg.EdgeAlignmentPenalty`; here are the others. They
are the measurements of chapters 4 and 5 and appendix A of Rodríguez Muñoz, "Adversarial robustness without
perturbations" (MIT 2024), each with the definitions between which its text and its released code differ.
"""

from gradreg.statistics.curvature import Curvature, HessianNorm, LocalLinearity, hessian_product
from gradreg.statistics.edges import EdgeCorrelation, pearson
from gradreg.statistics.gradients import Loss, SignAgreement
from gradreg.statistics.measurements import Measurements, gradient_histograms, measure, measure_along
from gradreg.statistics.summary import LogHistogram, Moments, Summary

__all__ = [
    "Curvature",
    "EdgeCorrelation",
    "HessianNorm",
    "LocalLinearity",
    "LogHistogram",
    "Loss",
    "Measurements",
    "Moments",
    "SignAgreement",
    "Summary",
    "gradient_histograms",
    "hessian_product",
    "measure",
    "measure_along",
    "pearson",
]

"""Penalties: functions of a :class:`gradreg.Point`, one number per sample.

``penalty(point) -> (B,)`` is all that a penalty is, so any function of a point can stand in its place. The same object
is a quantity to measure (:func:`gradreg.statistics.measure`) and a part of an objective (:class:`gradreg.Term`).
"""

from gradreg.penalties.alignment import EdgeAlignmentPenalty, GradientAlignment, SaliencyAlignment, edge_alignment
from gradreg.penalties.curvature import Curvature, HessianNorm, NormalizedCurvature, hessian_product
from gradreg.penalties.grad_norm import GradNormPenalty, grad_norm
from gradreg.penalties.jacobian import JacobianPenalty
from gradreg.penalties.local_linearity import LocalLinearity, WorstLocalLinearity
from gradreg.penalties.logit_pairing import DIVERGENCES, LogitPairing
from gradreg.penalties.penalty import EnergyFunction, GradientPenalty, Penalty, RandomPenalty

__all__ = [
    "DIVERGENCES",
    "Curvature",
    "EdgeAlignmentPenalty",
    "EnergyFunction",
    "GradNormPenalty",
    "GradientAlignment",
    "GradientPenalty",
    "HessianNorm",
    "JacobianPenalty",
    "LocalLinearity",
    "LogitPairing",
    "NormalizedCurvature",
    "Penalty",
    "RandomPenalty",
    "SaliencyAlignment",
    "WorstLocalLinearity",
    "edge_alignment",
    "grad_norm",
    "hessian_product",
]

"""Input-gradient regularisation for PyTorch: adversarial robustness from clean images, in any training loop."""

from gradreg.agreement import Agreement, agreement
from gradreg.attacks import (
    FGSM,
    NFGSM,
    APGDAttack,
    Attack,
    AutoAttack,
    IteratedAttack,
    Noise,
    PGDAttack,
    RandomSearch,
    RememberedStart,
    TargetedAPGDAttack,
    TransferAttack,
    apgd,
    pgd,
)
from gradreg.checks import GradregWarning
from gradreg.collapse import CollapseAlarm
from gradreg.controllers import Controller, ConvergenceWeight, SpikeWeight
from gradreg.criteria import boosted_cross_entropy, cross_entropy, dlr, kl_divergence, margin, targeted_dlr
from gradreg.differentiation import Differentiation, DoubleBackward, FiniteDifference
from gradreg.edges import contour_energy, oriented_energy
from gradreg.evaluation import (
    AttackResult,
    Flag,
    RobustnessCurve,
    RobustnessReport,
    accuracy_curve,
    evaluate,
    masking_checks,
    minimal_distortion,
)
from gradreg.gradients import input_gradient, input_gradient_of
from gradreg.intervals import PairedComparison, Proportion, mcnemar, wilson
from gradreg.normalization import Normalize, with_normalization
from gradreg.objective import PenalizedLoss, PenalizedModel, PenalizedOutput
from gradreg.penalties import (
    Curvature,
    EdgeAlignmentPenalty,
    GradientAlignment,
    GradientPenalty,
    GradNormPenalty,
    HessianNorm,
    JacobianPenalty,
    LocalLinearity,
    LogitPairing,
    NormalizedCurvature,
    Penalty,
    SaliencyAlignment,
    WorstLocalLinearity,
    edge_alignment,
    grad_norm,
)
from gradreg.point import Point
from gradreg.preflight import Finding, PreflightReport, preflight
from gradreg.schedules import Schedule, constant, cosine_ramp, every, join, linear_ramp
from gradreg.selectors import ClassSelector, class_scores, predicted_class, sampled_class, true_class
from gradreg.smooth import NonSmooth, SmoothReport, anneal_sharpness, find_nonsmooth, smoothify, unsmoothify
from gradreg.state import StateError
from gradreg.terms import Term
from gradreg.threat_models import L1, L2, Linf, ThreatModel
from gradreg.weight_perturbation import adversarial_weights

__all__ = [
    "FGSM",
    "L1",
    "L2",
    "NFGSM",
    "APGDAttack",
    "Agreement",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "ClassSelector",
    "CollapseAlarm",
    "Controller",
    "ConvergenceWeight",
    "Curvature",
    "Differentiation",
    "DoubleBackward",
    "EdgeAlignmentPenalty",
    "Finding",
    "FiniteDifference",
    "Flag",
    "GradNormPenalty",
    "GradientAlignment",
    "GradientPenalty",
    "GradregWarning",
    "HessianNorm",
    "IteratedAttack",
    "JacobianPenalty",
    "Linf",
    "LocalLinearity",
    "LogitPairing",
    "Noise",
    "NonSmooth",
    "Normalize",
    "NormalizedCurvature",
    "PGDAttack",
    "PairedComparison",
    "PenalizedLoss",
    "PenalizedModel",
    "PenalizedOutput",
    "Penalty",
    "Point",
    "PreflightReport",
    "Proportion",
    "RandomSearch",
    "RememberedStart",
    "RobustnessCurve",
    "RobustnessReport",
    "SaliencyAlignment",
    "Schedule",
    "SmoothReport",
    "SpikeWeight",
    "StateError",
    "TargetedAPGDAttack",
    "Term",
    "ThreatModel",
    "TransferAttack",
    "WorstLocalLinearity",
    "accuracy_curve",
    "adversarial_weights",
    "agreement",
    "anneal_sharpness",
    "apgd",
    "boosted_cross_entropy",
    "class_scores",
    "constant",
    "contour_energy",
    "cosine_ramp",
    "cross_entropy",
    "dlr",
    "edge_alignment",
    "evaluate",
    "every",
    "find_nonsmooth",
    "grad_norm",
    "input_gradient",
    "input_gradient_of",
    "join",
    "kl_divergence",
    "linear_ramp",
    "margin",
    "masking_checks",
    "mcnemar",
    "minimal_distortion",
    "oriented_energy",
    "pgd",
    "predicted_class",
    "preflight",
    "sampled_class",
    "smoothify",
    "targeted_dlr",
    "true_class",
    "unsmoothify",
    "wilson",
    "with_normalization",
]

__version__ = "0.1.0.dev0"

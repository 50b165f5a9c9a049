"""Evaluation of robustness: verdicts per sample, counted with intervals; curves; signs that an attack was fooled.

Everything streams over batches, can be interrupted and resumed, and is shared by the processes of ``torchrun``.
"""

from gradreg.evaluation.curves import RobustnessCurve, accuracy_curve, minimal_distortion
from gradreg.evaluation.masking import masking_checks
from gradreg.evaluation.report import AttackResult, Flag, RobustnessReport
from gradreg.evaluation.verdicts import evaluate

__all__ = [
    "AttackResult",
    "Flag",
    "RobustnessCurve",
    "RobustnessReport",
    "accuracy_curve",
    "evaluate",
    "masking_checks",
    "minimal_distortion",
]

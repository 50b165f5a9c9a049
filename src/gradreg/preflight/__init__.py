"""Preflight: a training step is tried before training, on copies: what breaks it, in which module, and what to do.

Much that trains without complaint breaks in a step with an input gradient, above all if that is differentiated again.
Some of it raises in the last backward pass, far from its cause, and some only trains wrongly.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradreg import findings as table
from gradreg.differentiation import Differentiation, FiniteDifference
from gradreg.findings import Finding
from gradreg.objective import PenalizedLoss
from gradreg.preflight.inspection import inspect, inspect_activations
from gradreg.preflight.report import PreflightReport
from gradreg.preflight.step import Step, copying_fails, step_of
from gradreg.preflight.trial import tried
from gradreg.threat_models import Linf
from gradreg.wrappers import is_sharded

__all__ = ["Finding", "PreflightReport", "preflight"]


def preflight(
    objective: PenalizedLoss, model: nn.Module, x: Any, y: Any = None, t: float | None = None
) -> PreflightReport:
    r"""Say whether a training step works, and otherwise name the module and the fix.

    It takes the very step that training will take, ``objective(model, x, y, t).total.backward()``, on copies of model,
    objective and batch: with the objective's penalties, its ``at``, its differentiation, in the modes that the model is
    in. So the verdict is what happens, not what a list of known layers says. If the step fails, every node of the
    autograd graph is traced back to the module that made it. If it runs, its gradients are looked at; and where the
    model is differentiated twice, that is held against a finite difference in double precision, because some backward
    passes lose a derivative without an error.

    If a step with second derivatives fails, the same step is tried with :class:`gradreg.FiniteDifference`. Only if that
    works, :meth:`PreflightReport.differentiation` returns it. A weight that a schedule has at 0 at t is given its value
    of another time, so that every term is tried.

    What is found:

    * **of the batch**: token ids, NaN, labels or units that do not fit, x normalised twice, tensors made in inference
      mode, a loss that is saturated;
    * **of the model**: no values, no trainable parameter, quantised layers; no way from x to the logits, a step function
      on it, a weight that is 0; graphs kept from step to step; what raises, NaN;
    * **of second derivatives**: fused attention, compiled models, checkpoints, operations and backward passes that have
      none or a wrong one; BatchNorm with batch statistics, and what is not smooth (warnings);
    * **of distributed training**: ``static_graph=True``, FSDP (which is not run), SyncBatchNorm;
    * **of the objective**: whatever criterion, attack or penalties raise, and a penalty that moves no parameter.

    No exception leaves it: each becomes a finding. Call it on the model as you will train it, before the first step.
    Model, batch and random numbers are as before, also when the step fails. A model that cannot be copied is run
    itself, and put back. What a forward pass writes elsewhere stays: in globals, or in files. It costs a few steps on
    the batch given, three passes in double precision (ten if something is wrong), memory for copies of the model, and
    with second derivatives a run of :func:`find_nonsmooth`. DDP communicates nothing in them.

    Args:
        objective: The objective.
        model: The model, wrapped and compiled as it will be trained.
        x: A small batch of what the objective takes; two to four samples will do.
        y: Its labels.
        t: The optimiser step, for the schedules.

    Returns:
        The report: ``report.ok`` is the verdict, ``report.findings`` say why, ``print(report)`` shows them, errors
        first, ``report.raise_for_errors()`` stops a script, and ``report.differentiation()`` is what works.

    Example:
        >>> from gradreg import GradNormPenalty, Linf, PenalizedLoss, Term
        >>> objective = PenalizedLoss(terms={"grad_norm": Term(GradNormPenalty(Linf(4 / 255)))})
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(preflight(objective, model, torch.rand(2, 4), torch.tensor([0, 2])))  # doctest: +ELLIPSIS
        preflight: the objective works
        warning: 1: ReLU is not smooth: ...
          fix: Train smoothify(model)...
    """
    if not isinstance(objective, PenalizedLoss) or not isinstance(model, nn.Module):
        kinds = {"objective": type(objective).__name__, "model": type(model).__name__}
        return PreflightReport((table.FUNCTION.at(**kinds),))
    works: Differentiation | None = None
    found: list[Finding] = []
    with torch.inference_mode(False), torch.enable_grad():
        try:
            step = step_of(objective, model, x, y, t)
        except Exception as error:  # x holds no tensor, a schedule raises
            return PreflightReport((Finding("error", "", str(error)),))
        found += _all_of(lambda: inspect(step))
        runs = not any(map(is_sharded, model.modules())) and not _fails(found)
        if runs:
            step, copied = _copyable(step)
            found += copied
            if not _fails(found):
                trial, works = _try(step)
                found += trial
        if step.twice:
            runs = runs and not _fails(found)
            found += _all_of(lambda: inspect_activations(step, runs=runs))
    return PreflightReport(tuple(sorted(found, key=lambda finding: finding.severity == "warning")), works)


def _try(step: Step) -> tuple[list[Finding], Differentiation | None]:
    """What a trial finds, and what works: the step as it is, or with finite differences."""
    found = _all_of(lambda: tried(step))
    if not _fails(found):
        return found, step.objective.differentiation
    if not step.twice:
        return found, None
    low, high = step.inputs.x.detach().aminmax()
    of_terms = [getattr(term.penalty, "threat", None) for term in step.objective.terms.values()]
    ball = Linf(float(f"{0.01 * (high - low).item() or 0.01:.2g}"))  # a hundredth of x's range
    instead = FiniteDifference() if any(of_terms) else FiniteDifference(threat=ball)
    if _fails(_all_of(lambda: tried(step.by(instead)))):
        return found, None
    unit = "" if instead.threat is None else f"threat={instead.threat}"
    also = f"Or use differentiation=FiniteDifference({unit}), which was tried and works."
    return [replace(one, fix=f"{one.fix} {also}".strip()) if one.severity == "error" else one for one in found], instead


def _copyable(step: Step) -> tuple[Step, list[Finding]]:
    """The step, which knows whether it can be copied, and what there is to say of that."""
    error = copying_fails(step.model, step.objective)
    if error is None:
        return step, []
    parallel = any(isinstance(module, DistributedDataParallel) for module in step.model.modules())
    entry = table.UNCOPIED_PARALLEL if parallel else table.UNCOPIED
    return replace(step, copies=False), [entry.at(error=error)]


def _all_of(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings, and why there are no more of them if preflight itself fails."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:
        found.append(table.NOT_LOOKED_AT.at(error=f"{type(error).__name__}: {error}"))
    return found


def _fails(found: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in found)

"""Preflight: a training step is tried before training, on copies: what breaks it, in which module, and what to do."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradreg import findings as table
from gradreg.copies import alone
from gradreg.differentiation import Differentiation, FiniteDifference
from gradreg.findings import Finding
from gradreg.objective import PenalizedLoss
from gradreg.preflight.inspection import inspect, inspect_activations
from gradreg.preflight.report import PreflightReport
from gradreg.preflight.step import Step, step_of
from gradreg.preflight.trial import guarded, tried
from gradreg.threat_models import Linf
from gradreg.wrappers import is_sharded

__all__ = ["Finding", "PreflightReport", "preflight"]


def preflight(
    objective: PenalizedLoss,
    model: nn.Module,
    x: Any,
    y: Any = None,
    t: float | None = None,
    *,
    index: torch.Tensor | None = None,
) -> PreflightReport:
    r"""Say whether a training step works, and otherwise name the module and the fix.

    It takes the very step that training will take, ``objective(model, x, y, t).total.backward()``, on copies, in the
    modes that the model is in. So the verdict is what happens, not what a list of known layers says. If the step
    fails, the nodes of the autograd graph are traced back to the modules that made them. If it runs, its gradients are
    looked at; and if it takes second derivatives, these are held against finite differences in double precision,
    because some backward passes lose them without an error.

    If second derivatives fail, the same step is tried with :class:`gradreg.FiniteDifference`, which is recommended only
    if it works. A term whose weight is 0 at t is tried with its weight of another time. What is found:

    * of the **batch**: token ids, NaN, labels and units that do not fit, a saturated loss;
    * of the **model**: no values, nothing to train, quantised layers; an input that is cut off from the logits, by a
      step function or by a weight of 0; graphs kept from step to step; whatever raises;
    * of **second derivatives**: fused attention, compiled models, checkpoints, operations that have none, backward
      passes that lose them; as warnings, BatchNorm with batch statistics, and what is not smooth;
    * of **distributed training**: ``static_graph=True``, FSDP (which is not run), SyncBatchNorm;
    * of the **objective**: what criterion, attack and penalties raise, and penalties that move no parameter.

    No exception leaves it; each becomes a finding. Model, batch and random numbers stay as they are, also if the step
    fails. A model that cannot be copied is run itself, and put back. What a forward pass writes elsewhere stays: in
    globals, or in files. It costs a few steps, up to ten passes in double precision, memory for copies, and a run of
    :func:`find_nonsmooth`. DDP communicates nothing meanwhile.

    Args:
        objective: The objective.
        model: The model, wrapped and compiled as it will be trained.
        x: A small batch of what the objective takes; two to four samples will do.
        y: Its labels.
        t: The optimiser step, for the schedules.
        index: The numbers of the samples, where the objective needs them.

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
    found: list[Finding] = []
    works: Differentiation | None = None
    with torch.inference_mode(False), torch.enable_grad():
        try:
            works = _look(objective, model, (x, y, t, index), found)
        except Exception as error:  # x holds no tensor, a schedule raises
            found.append(Finding("error", "", str(error) or repr(error)))
    return PreflightReport(tuple(sorted(found, key=lambda finding: finding.severity == "warning")), works)


def _look(
    objective: PenalizedLoss, model: nn.Module, batch: tuple[Any, ...], found: list[Finding]
) -> Differentiation | None:
    """Add what is found, and return what works."""
    if not isinstance(objective, PenalizedLoss) or not isinstance(model, nn.Module):
        found.append(table.NOT_AN_OBJECTIVE.at(objective=type(objective).__name__, model=type(model).__name__))
        return None
    step, works = step_of(objective, model, *batch), None
    found += guarded(inspect(step), "warning")
    runs = not _fails(found) and not any(map(is_sharded, model.modules()))
    if runs:
        try:
            alone(nn.ModuleList([model, objective]), precise=False)
            step = replace(step, in_place=any(map(_loses_by_copying, model.modules())))
        except Exception as error:  # whatever a module's own __deepcopy__ raises
            found.append(table.UNCOPIED.at(error=error))
            step = replace(step, in_place=True)
        works = _try(step, found)
    if step.twice:
        with step.start.drawing("start"):
            found += guarded(inspect_activations(step, runs=runs and not _fails(found)), "warning")
    return works


def _try(step: Step, found: list[Finding]) -> Differentiation | None:
    """Try a step as it is, or else with finite differences."""
    trial = list(guarded(tried(step), "error"))
    works = None if _fails(trial) else step.objective.differentiation
    if works is None and step.twice:
        unit = ""
        instead = FiniteDifference()
        if not any(getattr(term.penalty, "threat", None) for term in step.objective.terms.values()):
            low, high = step.inputs.x.detach().aminmax()
            ball = Linf(float(f"{0.01 * (high - low).item() or 0.01:.2g}"))  # a hundredth of x's range
            instead, unit = FiniteDifference(threat=ball), f"threat={ball}"
        objective = copy.copy(step.objective)
        objective.differentiation = instead
        if not _fails(list(guarded(tried(replace(step, objective=objective)), "error"))):
            works = instead
            also = f"Or use differentiation=FiniteDifference({unit}), which was tried and works."
            trial = [replace(one, fix=f"{one.fix} {also}".strip()) if one.severity == "error" else one for one in trial]
    found += trial
    return works


def _loses_by_copying(module: nn.Module) -> bool:
    """Whether a copy of this module is not what it is: not compiled any more, or with parameters that are no leaves."""
    return isinstance(module, torch.jit.ScriptModule) or getattr(module, "_compiled_call_impl", None) is not None


def _fails(found: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in found)

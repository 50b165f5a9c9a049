"""A training step, tried on copies, and the reason if it breaks."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import findings as table
from gradreg.checks import GradregWarning
from gradreg.findings import CRITERION, Finding, Severity
from gradreg.preflight.comparison import compare
from gradreg.preflight.step import Step, instances_in
from gradreg.preflight.trace import COMPILED, REENTRANT, Trace, all_finite, any_nonzero
from gradreg.wrappers import is_compiled

Place = tuple[str, str]  # a part of a step, and its name
_ENGINE: Place = ("engine", "")
_FILES_OF_ENGINE = (torch.autograd.__file__, torch.autograd.graph.__file__)


def tried(step: Step) -> Iterator[Finding]:
    """Run a step, and look at what comes out; the first error ends it."""
    raised: Exception | None = None
    with step.fresh() as own, warnings.catch_warnings(record=True, action="always") as caught:
        try:
            out = own.run()
            if _holders_of_graphs(own.model):
                own.run()  # now what they hold is used
        except Exception as error:
            kept = _holders_of_graphs(own.model) if "a second time" in str(error) else []
            raised, places = error, list(_places(error.__traceback__, own))
            if isinstance(error.__cause__, Exception) and "preflight" in str(error):  # it only sends its reader here
                raised, places = error.__cause__, [*places, *_places(error.__cause__.__traceback__, own)]
            raised = raised.with_traceback(None)  # which holds the copies
        else:
            kept = [name for name, tensor in own.kept if tensor.grad is not None]
            named = [*own.model.named_parameters(), *((f"the {n}", p) for n, p in own.objective.named_parameters())]
            broken = [name for name, p in named if p.grad is not None and not all_finite(p.grad)]
    if kept:
        yield table.KEPT.at(kept)
    elif raised is not None:
        yield from _explained(step, raised, places)
    elif not all_finite(out.loss):
        where = ""
        with suppress(Exception), step.fresh() as own:
            where = Trace(own, look=True).where_not_finite()
        yield table.NOT_FINITE.at(where)
    else:
        messages = {str(one.message): None for one in caught if issubclass(one.category, GradregWarning)}
        found = list(guarded(_looked_at(step, messages, sound=not broken), "warning"))
        if broken and not any(finding.severity == "error" for finding in found):
            found.append(table.SLOPES_NOT_FINITE.at(name.rpartition(".")[0] for name in broken))
        yield from found


def guarded(look: Iterator[Finding], severity: Severity) -> Iterator[Finding]:
    """The findings, and why there are no more of them if preflight itself fails."""
    try:
        yield from look
    except Exception as error:
        yield replace(table.NOT_LOOKED_AT.at(error=f"{type(error).__name__}: {error}"), severity=severity)


def _holders_of_graphs(model: nn.Module) -> list[str]:
    """The modules with a tensor in an attribute, or in a container there, that hangs on a graph."""
    held = ((name, instances_in(vars(module), Tensor)) for name, module in model.named_modules())
    return [name for name, tensors in held if any(tensor.grad_fn is not None for tensor in tensors)]


def _looked_at(step: Step, warned: Iterable[str], *, sound: bool) -> Iterator[Finding]:
    """What is wrong with a step that runs; ``sound`` says whether its gradients are finite."""
    reached = True
    if step.takes_input_gradients:
        with step.fresh() as own:
            grad, reached = Trace(own).gradient()
        if not all_finite(grad):
            yield table.GRADIENT_NOT_FINITE.at(_turns(step, all_finite))
            return
        if not reached:
            yield table.SATURATED
        elif not any_nonzero(grad):
            yield from _beyond_blank_weights(step)
            return
    if reached and sound:
        if step.penalizes:
            yield from _idle(step)
        if step.twice and (wrong := compare(step)):
            yield wrong
        yield from (Finding("warning", "", message) for message in warned)


def _turns(step: Step, sound: Callable[[Tensor], bool]) -> str:
    """The module at which the gradient, sound at the logits, ceases to be so on the way to x."""
    with step.fresh() as own:
        return Trace(own).where_gradient_turns(sound)


def _beyond_blank_weights(step: Step) -> Iterator[Finding]:
    """The input gradient is 0: go on with random numbers where a weight is 0, or say why else."""
    where = _turns(step, any_nonzero)
    weights = step.model.get_submodule(where).named_parameters(where, recurse=False)
    blank = [name for name, weight in weights if not name.endswith("bias") and not weight.any()]
    if not set(blank) - set(step.blank):
        yield table.STEP_FUNCTION.at(where)
        return
    yield table.BLANK.at(where)
    yield from tried(replace(step, blank=(*step.blank, *blank)))


def _idle(step: Step) -> Iterator[Finding]:
    """Whether the penalties move no parameter."""
    with step.fresh() as own:
        own.objective.loss_weight = 0.0
        out = own.run()
        grads = [parameter.grad for part in (own.model, own.objective) for parameter in part.parameters()]
    if not any(grad is not None and any_nonzero(grad) for grad in grads):
        entry = table.MOVES_NOTHING if any(map(any_nonzero, out.penalties.values())) else table.INACTIVE
        yield entry.at(f"the penalty {name!r}" for name in out.penalties)


def _explained(step: Step, raised: Exception, places: list[Place]) -> list[Finding]:
    """Why a step raised; at least what, if the reason is not found."""
    kind, where = [("", ""), *places][-1]
    backward, penalties = _ENGINE in places, [name for kind, name in places if kind == "penalty"]
    error = f"{type(raised).__name__}: {raised}" if kind or backward else str(raised) or repr(raised)
    reasons: list[Finding] = []
    if backward or kind not in ("model", "criterion"):
        with suppress(Exception):  # what went wrong may go wrong again
            reasons = list(_reasons(step, str(raised), where, backward))
    elif kind == "model" and penalties:
        error += f" (in a pass that {penalties[0]} asks for)"
    return reasons or [table.RAISES["backward" if backward else kind].at(where, error=error)]


def _reasons(step: Step, message: str, where: str, backward: bool) -> Iterator[Finding]:
    with step.fresh() as own:
        trace = Trace(own)
        if not trace.losses.requires_grad and any(t.requires_grad for t in instances_in(trace.logits, Tensor)):
            yield table.NO_GRAPH.at(CRITERION)
        elif step.takes_input_gradients and not trace.depends_on_x():
            yield table.INDEPENDENT.at(trace.where_graph_ends())
        elif backward and "selective activation checkpoint" in message:
            yield table.SELECTIVE.at(where)
        elif backward:
            yield from _without_derivative(trace, own, message.rstrip("."))


def _without_derivative(trace: Trace, step: Step, message: str) -> Iterator[Finding]:
    """The operations that a backward pass cannot differentiate."""
    culprits = trace.undifferentiable(twice=step.twice)
    # With several of them the message is of the one that happened to come first.
    blanks = {"reason": f" ({message})" if len(culprits) == 1 else ""}
    for operation, owners in culprits.items():
        blanks["operation"] = operation
        if operation == REENTRANT:
            yield table.REENTRANT.at(owners)
        elif not step.twice:
            yield table.NO_DERIVATIVE.at(owners, **blanks)
        elif operation.startswith(COMPILED):
            yield table.COMPILED.at([n for n, module in step.model.named_modules() if is_compiled(module)] or owners)
        else:
            fused = operation.startswith("ScaledDotProduct")
            yield (table.FUSED_ATTENTION if fused else table.ONLY_ONCE).at(owners, **blanks)


def _places(traceback: TracebackType | None, step: Step) -> Iterator[Place]:
    """The parts of a step that an exception has gone through, outermost first."""
    criterion = step.objective.criterion
    of_criterion = criterion.modules() if isinstance(criterion, nn.Module) else [criterion]
    parts: list[tuple[Any, Place]] = [(part, ("criterion", CRITERION)) for part in of_criterion]
    parts += [(t.penalty, ("penalty", f"the penalty {name!r}")) for name, t in step.objective.terms.items()]
    parts += [(module, ("model", name)) for name, module in step.model.named_modules()]
    owners = {id(part): place for part, place in parts}
    # The code of criteria and penalties that are functions, or functools.partial of one.
    codes = {getattr(inspect.unwrap(getattr(p, "func", p)), "__code__", None): place for p, place in parts}
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        if frame.f_code.co_filename in _FILES_OF_ENGINE:
            yield _ENGINE
        elif frame.f_code.co_name == "check_scores":  # of what the criterion has returned
            yield "", CRITERION
        elif place := owners.get(id(frame.f_locals.get("self"))) or codes.get(frame.f_code):
            yield place

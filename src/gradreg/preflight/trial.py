"""A training step, tried on copies, and the reason if it breaks."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from gradreg import findings as table
from gradreg.checks import GradregWarning
from gradreg.findings import CRITERION, Finding
from gradreg.preflight.comparison import compare
from gradreg.preflight.step import Step, tensors_in
from gradreg.preflight.trace import COMPILED, REENTRANT, Trace, all_finite, any_nonzero
from gradreg.wrappers import is_compiled

_ENGINE = (torch.autograd.__file__, torch.autograd.graph.__file__)


class Place(NamedTuple):
    """What was running when a step raised.

    Attributes:
        kind: ``"model"``, ``"criterion"``, ``"penalty"``, ``"check"`` of losses, or ``"engine"``, autograd's.
        name: Of the module, or what a finding calls the place.
    """

    kind: str
    name: str


@final
@dataclass(frozen=True)
class _Outcome:
    """How a step went.

    Attributes:
        error: What it raised.
        places: What was running then, from the outside to the inside.
        kept: The modules that have used a tensor of an earlier step's graph.
        loss_is_finite: Whether the loss is finite.
        broken: The parameters whose gradient is not.
        warned: What the library has warned of.
    """

    error: Exception | None = None
    places: tuple[Place, ...] = ()
    kept: tuple[str, ...] = ()
    loss_is_finite: bool = True
    broken: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


def tried(step: Step) -> Iterator[Finding]:
    """Run a step, and look at what comes out; the first error ends it."""
    outcome = _run(step)
    if outcome.kept:
        yield table.KEPT.at(outcome.kept)
    elif outcome.error is not None:
        yield from _explained(step, outcome)
    elif not outcome.loss_is_finite:
        with step.fresh() as own:
            yield table.NOT_FINITE.at(Trace(own, look=True).where_not_finite())
    else:
        yield from _looked_at(step, outcome)


def _run(step: Step) -> _Outcome:
    with step.fresh() as own, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = own.run()
            holders = _holders_of_graphs(own.model)
            if holders:
                own.run()  # now what they hold is used
        except Exception as error:
            kept = _holders_of_graphs(own.model) if "a second time" in str(error) else []
            places = list(_places(error.__traceback__, own))
            if isinstance(error.__cause__, Exception) and "preflight" in str(error):  # it only sends its reader here
                error = error.__cause__
                places += _places(error.__traceback__, own)
            return _Outcome(error.with_traceback(None), tuple(places), tuple(kept))
        parameters = dict(own.model.named_parameters()) | {
            f"the {name}": parameter for name, parameter in own.objective.named_parameters()
        }
        return _Outcome(
            kept=tuple(name for name, tensor in own.kept if tensor.grad is not None),
            loss_is_finite=all_finite(out.loss),
            broken=tuple(n for n, p in parameters.items() if p.grad is not None and not all_finite(p.grad)),
            warned=tuple(str(one.message) for one in caught if issubclass(one.category, GradregWarning)),
        )


def _looked_at(step: Step, outcome: _Outcome) -> Iterator[Finding]:
    """What is wrong with a step that runs."""
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
    if outcome.broken:
        yield table.SLOPES_NOT_FINITE.at(name.rpartition(".")[0] for name in outcome.broken)
        return
    if not reached:
        return
    if step.penalizes and (found := _idle(step)):
        yield found
    if step.twice and (found := compare(step)):
        yield found
    yield from (Finding("warning", "", message) for message in dict.fromkeys(outcome.warned))


def _turns(step: Step, sound: Callable[[Tensor], bool]) -> str:
    """The module at which the gradient, sound at the logits, ceases to be so on the way to x."""
    with step.fresh() as own:
        return Trace(own).where_gradient_turns(sound)


def _beyond_blank_weights(step: Step) -> Iterator[Finding]:
    """The input gradient is 0: go on with random numbers where a weight is 0, or say why else."""
    where = _turns(step, any_nonzero)
    weights = step.model.get_submodule(where).named_parameters(where, recurse=False)
    blank = [name for name, weight in weights if not name.endswith("bias") and not weight.any()]
    blank = [name for name in blank if name not in step.blank]
    if not blank:
        yield table.STEP_FUNCTION.at(where)
        return
    yield table.BLANK.at(where)
    yield from tried(replace(step, blank=(*step.blank, *blank)))


def _idle(step: Step) -> Finding | None:
    """A finding if the penalties move no parameter."""
    with step.fresh() as own:
        own.objective.loss_weight = 0.0
        out = own.run()
        parameters = (*own.model.parameters(), *own.objective.parameters())
        if any(parameter.grad is not None and any_nonzero(parameter.grad) for parameter in parameters):
            return None
        names = [f"the penalty {name!r}" for name in out.penalties]
        return (table.MOVES_NOTHING if any(map(any_nonzero, out.penalties.values())) else table.INACTIVE).at(names)


def _holders_of_graphs(model: nn.Module) -> list[str]:
    """The modules with a tensor in an attribute, or in a container there, that hangs on a graph."""
    return [
        name
        for name, module in model.named_modules()
        if any(tensor.grad_fn is not None for tensor in tensors_in(vars(module)))
    ]


# Why a step raises


def _explained(step: Step, outcome: _Outcome) -> list[Finding]:
    """Why a step raised; at least what, if the reason is not found."""
    error, last = f"{type(outcome.error).__name__}: {outcome.error}", [Place("", ""), *outcome.places][-1]
    found: list[Finding] = []
    with suppress(Exception):  # what went wrong may go wrong again
        found = list(_reasons(step, outcome, error, last))
    if found:
        return found
    if Place("engine", "") in outcome.places:
        which = "double backward" if step.twice else "the backward pass"
        return [table.BACKWARD_RAISES.at(last.name, which=which, error=error)]
    if last.kind == "penalty":
        return [table.PENALTY_RAISES.at(last.name, error=error)]
    return [Finding("error", last.name, str(outcome.error))]


def _reasons(step: Step, outcome: _Outcome, error: str, last: Place) -> Iterator[Finding]:
    kinds = [place.kind for place in outcome.places]
    if last.kind == "model" and "engine" not in kinds:
        if "penalty" in kinds:
            asking = outcome.places[kinds.index("penalty")].name
            yield table.RAISES_ELSEWHERE.at(last.name, place=asking, error=error)
        else:
            yield table.RAISES.at(last.name, error=error)
        return
    if last.kind == "criterion" and "engine" not in kinds:
        yield table.CRITERION_RAISES.at(last.name, error=error)
        return
    with step.fresh() as own:
        trace = Trace(own)
        if not trace.losses.requires_grad and any(tensor.requires_grad for tensor in tensors_in(trace.logits)):
            yield table.NO_GRAPH.at(CRITERION)
        elif step.takes_input_gradients and not trace.depends_on_x:
            yield table.INDEPENDENT.at(trace.where_graph_ends())
        elif "engine" in kinds:
            yield from _without_derivative(trace, own, str(outcome.error), last)


def _without_derivative(trace: Trace, step: Step, message: str, last: Place) -> Iterator[Finding]:
    """The operations that a backward pass cannot differentiate."""
    if "selective activation checkpoint" in message:
        yield table.SELECTIVE.at(last.name)
        return
    compiled = [name for name, module in step.model.named_modules() if is_compiled(module)]
    culprits = trace.undifferentiable(twice=step.twice)
    # With several of them the message is of the one that happened to come first.
    reason = f" ({message.rstrip('.')})" if len(culprits) == 1 else ""
    for operation, owners in culprits.items():
        if operation.startswith("ScaledDotProduct") and step.twice:
            yield table.FUSED_ATTENTION.at(owners, operation=operation)
        elif operation.startswith(COMPILED) and step.twice:
            yield table.COMPILED.at(compiled or owners)
        elif operation == REENTRANT:
            yield table.REENTRANT.at(owners)
        else:
            entry = table.ONLY_ONCE if step.twice else table.NO_DERIVATIVE
            yield entry.at(owners, operation=operation, reason=reason)


def _places(traceback: TracebackType | None, step: Step) -> Iterator[Place]:
    """The parts of a step that an exception has gone through, outermost first."""
    criterion = step.objective.criterion
    of_criterion = criterion.modules() if isinstance(criterion, nn.Module) else [criterion]
    parts: list[tuple[Any, Place]] = [(part, Place("criterion", CRITERION)) for part in of_criterion]
    for name, term in step.objective.terms.items():
        parts.append((term.penalty, Place("penalty", f"the penalty {name!r}")))
    parts += [(module, Place("model", name)) for name, module in step.model.named_modules()]
    owners = {id(part): place for part, place in parts}
    codes = {code: place for part, place in parts if (code := _code_of(part)) is not None}
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        if frame.f_code.co_filename in _ENGINE:
            yield Place("engine", "")
        elif frame.f_code.co_name == "check_scores":  # of what the criterion has returned
            yield Place("check", CRITERION)
        elif place := owners.get(id(frame.f_locals.get("self"))) or codes.get(frame.f_code):
            yield place


def _code_of(part: object) -> Any:
    """The code of a criterion or penalty that is a function."""
    return getattr(inspect.unwrap(getattr(part, "func", part)), "__code__", None)

"""The training step that is tried, and how to run it without a trace."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from gradreg.copies import alone, promoted
from gradreg.model_checks import check_model
from gradreg.modes import random_state, replayed
from gradreg.objective import PenalizedLoss, PenalizedOutput
from gradreg.point import Batch
from gradreg.replay import EagerReplay, ModuleState
from gradreg.terms import needs_two_arguments
from gradreg.trees import Inputs, detached

Kind = TypeVar("Kind")
_TIMES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)  # at which a scheduled weight may be above 0


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One training step: ``objective(model, x, y, t)``."""

    objective: PenalizedLoss  # the weights of whose terms are numbers
    model: nn.Module
    x: Any
    y: Any
    t: float | None
    start: EagerReplay  # has the states of all random generators at the start
    index: Tensor | None = None
    in_place: bool = False  # whether the model itself has to be run, and no copy
    blank: tuple[str, ...] = ()  # parameters that are given random numbers
    kept: tuple[tuple[str, Tensor], ...] = ()  # in copies: modules, and tensors whose originals hang on a graph

    @property
    def inputs(self) -> Inputs:
        """What the model is given."""
        return Inputs(self.x, self.objective.perturb)

    @property
    def batch(self) -> Batch:
        """What its passes have in common."""
        objective, how = self.objective, self.objective.differentiation
        return Batch(self.model, objective.criterion, self.inputs, self.y, how, output=objective.output)

    @property
    def penalizes(self) -> bool:
        """Whether the objective has penalties."""
        return any(term.weight for term in self.objective.terms.values())

    @property
    def twice(self) -> bool:
        """Whether the model is differentiated twice."""
        return self.penalizes and self.objective.differentiation.second_order

    @property
    def takes_input_gradients(self) -> bool:
        """Whether penalties or an attack depend on the gradient with respect to the input."""
        return self.penalizes or (self.objective.at is not None and self.objective.at.uses_gradients)

    def run(self) -> PenalizedOutput:
        """Take the step up to the parameters' gradients."""
        out = self.objective(self.model, self.x, self.y, self.t, index=self.index)
        out.total.backward()
        return out

    @contextmanager
    def fresh(self, *, precise: bool = False) -> Iterator["Step"]:
        """The step on copies, always from the same state and random numbers; or in double precision, uncompiled."""
        whole = nn.ModuleList([self.model, self.objective])
        with warnings.catch_warnings(action="ignore"), self.start.drawing("start"), ExitStack() as stack:
            if self.in_place and not precise:
                stack.enter_context(_left_as_found(whole))
                model, objective = self.model, copy.copy(self.objective)
            else:
                model, objective = cast("Any", alone(whole, precise=precise))
            kept = () if model is self.model else tuple(self._kept_by(model))
            # A graph of x stays, since the objective is to refuse it.
            x = self.x if self.inputs.x.grad_fn is not None else copy.deepcopy(detached(self.x))
            y = copy.deepcopy(detached(self.y))
            if precise:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                x, y = tree_map(lambda leaf: promoted(leaf) if isinstance(leaf, Tensor) else leaf, (x, y))
            with torch.no_grad():
                for name in self.blank:
                    model.get_parameter(name).normal_(std=0.02)
            if met := check_model(objective, model, None):
                met.penalized = met.graph_seen = True  # what it would warn of is told by `inspect`
            yield replace(self, model=model, objective=objective, x=x, y=y, kept=kept)

    def _kept_by(self, copied: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Copies of what hangs on a graph, which hang on none: leaves, whose gradient tells whether they are used."""
        for (name, module), twin in zip(self.model.named_modules(), copied.modules(), strict=False):
            pairs = zip(instances_in(vars(module), Tensor), instances_in(vars(twin), Tensor), strict=False)
            for tensor, own in pairs:
                if tensor.grad_fn is not None and own.is_leaf and own.is_floating_point():
                    yield name, own.requires_grad_()


def step_of(
    objective: PenalizedLoss, model: nn.Module, x: Any, y: Any, t: float | None, index: Tensor | None = None
) -> Step:
    """The step with all its terms: a weight that a schedule has at 0 is that of another time, or else 1."""
    tried = copy.copy(objective)
    tried.measured = None  # a weight that sees it is a number here
    tried.terms = {
        name: replace(term, weight=_above_0(term.weight, t)) if callable(term.weight) else term
        for name, term in objective.terms.items()
    }
    if callable(objective.loss_weight) and (t is None or needs_two_arguments(objective.loss_weight)):
        tried.loss_weight = _above_0(objective.loss_weight, t)
    device = Inputs(x, objective.perturb).x.device
    device = torch.device("cpu") if device.type == "meta" else device
    start = EagerReplay(nn.Identity(), None, device)
    with replayed(random_state(device), device), start.drawing("start"):
        torch.rand(())  # a stage that draws nothing is not remembered
    return Step(tried, model, x, y, t, start, index=index)


def _above_0(weight: Any, t: float | None) -> float:
    """A weight that a schedule has at some time; one that has to be measured counts as 1."""
    if needs_two_arguments(weight):
        return 1.0
    value = 0.0 if t is None else weight(t)
    for time in _TIMES:
        if value > 0:
            return value
        with suppress(Exception):
            value = weight(time)
    return value or 1.0


@contextmanager
def _left_as_found(whole: nn.Module) -> Iterator[None]:
    """Run a model itself, without gradients from before and without DDP's communication; then put everything back."""
    held = nn.ModuleList(held for module in whole.modules() for held in instances_in(vars(module), nn.Module))
    modules = [*held.modules()]  # those in lists of no ModuleList too
    parallel = [module for module in modules if isinstance(module, DistributedDataParallel)]
    attributes = [dict(vars(ddp)) for ddp in parallel]
    before = [(parameter, parameter.grad, parameter.detach().clone()) for parameter in held.parameters()]
    flags = [(module, module.training) for module in modules]
    # After the first step DDP's reducer has all processes exchange the layout of its buckets.
    idle: dict[str, Any] = {"reducer": SimpleNamespace(_rebuild_buckets=lambda: False)}
    idle |= dict.fromkeys(("require_backward_grad_sync", "require_forward_param_sync"), False)
    try:
        for parameter, *_ in before:
            parameter.grad = None
        for ddp in parallel:
            vars(ddp).update(idle)
        with ModuleState([module for module in modules if module not in parallel]).copied():
            yield
    finally:
        for ddp, own in zip(parallel, attributes, strict=True):
            vars(ddp).update(own)
        for module, flag in flags:
            module.training = flag
        for parameter, grad, values in before:
            parameter.grad = grad
            if not torch.equal(parameter, values):
                parameter.data.copy_(values)


def instances_in(value: object, kind: type[Kind], seen: set[int] | None = None) -> Iterator[Kind]:
    """The tensors, say, in nested tuples, lists, dictionaries and dataclasses, but not in modules."""
    seen = set() if seen is None else seen  # a container may hold itself
    if isinstance(value, kind):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | type):
        seen.add(id(value))
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in [getattr(value, each.name, None) for each in fields(value)] if is_dataclass(value) else items:
            yield from instances_in(item, kind, seen)

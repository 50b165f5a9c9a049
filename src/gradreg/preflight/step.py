"""The training step that is tried, and how to run it without a trace."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from gradreg.copies import alone, promoted
from gradreg.differentiation import Differentiation
from gradreg.model_checks import check_model
from gradreg.modes import random_state, replayed
from gradreg.objective import PenalizedLoss, PenalizedOutput
from gradreg.point import Batch
from gradreg.replay import EagerReplay, ModuleState
from gradreg.trees import Inputs

Kind = TypeVar("Kind")
_TIMES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)  # at which a scheduled weight may be above 0


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One training step.

    Attributes:
        objective: The objective, the weights of whose terms are numbers.
        model: The model.
        x: What the objective takes as x.
        y: Its labels.
        t: The step of the optimiser.
        start: Has the states of all random generators at the start.
        in_place: Whether the model itself has to be run, and no copy.
        blank: Parameters that are given random numbers.
        kept: In copies, modules and tensors whose originals hang on a graph: leaves, to see whether they are used.
    """

    objective: PenalizedLoss
    model: nn.Module
    x: Any
    y: Any
    t: float | None
    start: EagerReplay
    in_place: bool = False
    blank: tuple[str, ...] = ()
    kept: tuple[tuple[str, Tensor], ...] = ()

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
        """Whether anything depends on the gradient with respect to the input."""
        return self.penalizes or (self.objective.at is not None and self.objective.at.uses_gradients)

    def run(self) -> PenalizedOutput:
        """Take the step up to the parameters' gradients."""
        out = self.objective(self.model, self.x, self.y, self.t)
        out.total.backward()
        return out

    def by(self, differentiation: Differentiation) -> "Step":
        """The step with another differentiation."""
        objective = copy.copy(self.objective)
        objective.differentiation = differentiation
        return replace(self, objective=objective)

    @contextmanager
    def fresh(self, *, precise: bool = False) -> Iterator["Step"]:
        """The step on copies, in double precision if need be, always from the same state and random numbers."""
        whole, x, y = nn.ModuleList([self.model, self.objective]), self._copied(self.x), self._copied(self.y)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(self.start.drawing("start"))
            if self.in_place and not precise:
                stack.enter_context(_left_as_found(whole))
                model, objective, kept = self.model, copy.copy(self.objective), ()
            else:
                model, objective = alone(whole, precise=precise)
                kept = tuple(self._kept_by(model))
            if precise:
                x, y = (tree_map(lambda leaf: promoted(leaf) if isinstance(leaf, Tensor) else leaf, t) for t in (x, y))
            with torch.no_grad():
                for name in self.blank:
                    model.get_parameter(name).normal_(std=0.02)
            if met := check_model(objective, model, None):
                met.penalized = met.graph_seen = True  # what it would warn of is told by `inspect`
            yield replace(self, model=model, objective=objective, x=x, y=y, kept=kept)

    def _copied(self, tree: Any) -> Any:
        """Inputs or labels without a graph, except for an x that has one, which the objective is to refuse."""
        x = self.inputs.x

        def copied(leaf: Any) -> Any:
            refused = leaf is x and x.grad_fn is not None
            return leaf if refused or not isinstance(leaf, Tensor) else leaf.detach().clone()

        return tree_map(copied, tree)

    def _kept_by(self, copied: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for (name, module), twin in zip(self.model.named_modules(), copied.modules(), strict=False):
            for tensor, own in zip(tensors_in(vars(module)), tensors_in(vars(twin)), strict=False):
                if tensor.grad_fn is not None and own.is_leaf and own.is_floating_point():
                    yield name, own.requires_grad_()


def step_of(objective: PenalizedLoss, model: nn.Module, x: Any, y: Any, t: float | None) -> Step:
    """The step with all its terms: a weight that a schedule has at 0 is that of another time, or else 1."""
    tried = copy.copy(objective)
    tried.terms = {
        name: replace(term, weight=_above_0(term.weight_at, t)) if callable(term.weight) else term
        for name, term in objective.terms.items()
    }
    if t is None and callable(objective.loss_weight):
        tried.loss_weight = _above_0(objective.loss_weight, t)
    device = Inputs(x, objective.perturb).x.device
    device = torch.device("cpu") if device.type == "meta" else device
    start = EagerReplay(nn.Identity(), None, device)
    with replayed(random_state(device), device), start.drawing("start"):
        torch.rand(())  # a stage that draws nothing is not remembered
    return Step(tried, model, x, y, t, start)


def _above_0(weight_at: Callable[[Any], float], t: float | None) -> float:
    value = 0.0 if t is None else weight_at(t)
    for time in _TIMES:
        if value > 0:
            return value
        with suppress(Exception):
            value = weight_at(time)
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
    try:
        for parameter, *_ in before:
            parameter.grad = None
        for ddp in parallel:
            vars(ddp).update(require_backward_grad_sync=False, require_forward_param_sync=False, reducer=_Idle())
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


@final
class _Idle:
    """Stands for DDP's reducer, which after the first step has all processes exchange the layout of its buckets."""

    def _rebuild_buckets(self) -> bool:
        return False


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


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a structure."""
    return instances_in(value, Tensor)

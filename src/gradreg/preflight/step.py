"""The training step that is tried, and how to run it without a trace."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradreg.copies import alone, promoted
from gradreg.differentiation import Differentiation
from gradreg.model_checks import check_model
from gradreg.objective import PenalizedLoss, PenalizedOutput
from gradreg.point import Batch
from gradreg.replay import EagerReplay, ModuleState
from gradreg.trees import Inputs

_TIMES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)  # at which a scheduled weight may be above 0


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One training step.

    Attributes:
        objective: The objective, all of whose weights are numbers.
        model: The model.
        x: What the objective takes as x.
        y: Its labels.
        t: The step of the optimiser.
        blank: Parameters that are given random numbers.
        copies: Whether model and objective can be copied.
        kept: In copies, the modules and tensors whose originals hang on a graph: leaves, to see whether they are used.
        start: Has the states of all random generators at the start.
    """

    objective: PenalizedLoss
    model: nn.Module
    x: Any
    y: Any
    t: float | None
    blank: tuple[str, ...] = ()
    copies: bool = True
    kept: tuple[tuple[str, Tensor], ...] = ()
    start: EagerReplay = field(default_factory=lambda: EagerReplay(nn.Identity(), torch.device("cpu")))

    @property
    def inputs(self) -> Inputs:
        """What the model is given."""
        return Inputs(self.x, self.objective.perturb)

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

    @property
    def batch(self) -> Batch:
        """What its passes have in common."""
        objective = self.objective
        how = objective.differentiation
        return Batch(self.model, objective.criterion, self.inputs, self.y, how, output=objective.output)

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
        """The step on copies of everything, always from the same state and random numbers.

        Args:
            precise: Whether the copies are in double precision.
        """
        if precise and not self.copies:
            raise RuntimeError("A model that cannot be copied has no copy in double precision.")
        whole = nn.ModuleList([self.model, self.objective])
        with self.start.drawing("start"), nullcontext() if self.copies else left_as_found(whole):
            model, objective = alone(whole, precise=precise) if self.copies else (self.model, copy.copy(self.objective))
            with torch.no_grad():
                for name in self.blank:
                    model.get_parameter(name).normal_(std=0.02)
            met = check_model(objective, model, None)
            met.penalized = met.graph_seen = True  # what it would warn of is told by `inspect`
            x, y = self._copied(self.x, precise), self._copied(self.y, precise)
            kept = tuple(self._kept_by(model)) if self.copies else ()
            yield replace(self, model=model, objective=objective, x=x, y=y, kept=kept)

    def _copied(self, tree: Any, precise: bool) -> Any:
        """Inputs or labels without a graph, except for an x that has one, which the objective is to refuse."""
        x = self.inputs.x

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or (leaf is x and leaf.grad_fn is not None):
                return leaf
            leaf = leaf.detach().clone()
            return promoted(leaf) if precise else leaf

        return tree_map(copied, tree)

    def _kept_by(self, copied: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What hangs on a graph in the model; its copies, which hang on none, are made leaves."""
        for (name, module), twin in zip(self.model.named_modules(), copied.modules(), strict=False):
            for tensor, own in zip(tensors_in(vars(module)), tensors_in(vars(twin)), strict=False):
                if tensor.grad_fn is not None and own.is_leaf and own.is_floating_point():
                    yield name, own.requires_grad_()


def step_of(objective: PenalizedLoss, model: nn.Module, x: Any, y: Any, t: float | None) -> Step:
    """The step with all its terms: a weight that a schedule has at 0 is that of another time, or else 1."""
    tried = copy.copy(objective)
    tried.terms = {name: replace(term, weight=_above_0(term.weight_at, t)) if callable(term.weight) else term
                   for name, term in objective.terms.items()}
    if t is None and callable(objective.loss_weight):
        tried.loss_weight = _above_0(objective.loss_weight, t)
    step = Step(tried, model, x, y, t)
    start = EagerReplay(nn.Identity(), step.inputs.x.device)
    with start.drawing("start"):
        return replace(step, start=start)


def _above_0(weight_at: Callable[[Any], float], t: float | None) -> float:
    value = 0.0 if t is None else weight_at(t)
    for time in _TIMES:
        if value > 0:
            return value
        with suppress(Exception):
            value = weight_at(time)
    return value or 1.0


def copying_fails(model: nn.Module, objective: PenalizedLoss) -> Exception | None:
    """Why a model and its objective cannot be copied."""
    try:
        alone(nn.ModuleList([model, objective]), precise=False)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        return error
    return None


@contextmanager
def left_as_found(whole: nn.Module) -> Iterator[None]:
    """Run a model itself, without gradients from before, and put back what that changes."""
    scripted = [module for module in whole.modules() if isinstance(module, torch.jit.ScriptModule)]
    others = [module for module in whole.modules() if module not in scripted]
    tensors = [*whole.parameters(), *(buffer for module in scripted for buffer in module.buffers())]
    before = [(tensor, tensor.grad, tensor.detach().clone()) for tensor in tensors]
    flags = [(module, module.training) for module in whole.modules()]
    try:
        for tensor in tensors:
            tensor.grad = None
        with ModuleState(others).copied():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for tensor, grad, values in before:
            tensor.grad = grad
            if not torch.equal(tensor, values):  # a graph that is still alive may need the tensor as it is
                tensor.data.copy_(values)


def tensors_in(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and dataclasses."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module):
        seen.add(id(value))  # which may hold itself
        if is_dataclass(value):
            value = [getattr(value, each.name, None) for each in fields(value)]
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in items:
            yield from tensors_in(item, seen)

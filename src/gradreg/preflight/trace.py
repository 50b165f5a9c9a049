"""Who made which node of an autograd graph: a forward pass traced by hooks at the modules' entries and exits."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradreg.findings import CRITERION
from gradreg.graphs import Node, new_nodes
from gradreg.preflight.step import Step, instances_in
from gradreg.wrappers import is_compiled

# Nodes that raise when a backward pass reaches them: operations without a derivative, or differentiable only once.
_BARRIERS = ("torch::autograd::NotImplemented", "torch::autograd::Error")
REENTRANT = "CheckpointFunctionBackward"
COMPILED = "CompiledFunction"


class _Call(NamedTuple):
    """A call of a module: where its tensors hang in the autograd graph, and whether they were finite."""

    name: str
    inputs: list[GradientEdge]
    finite_in: bool
    outputs: tuple[GradientEdge, ...] = ()
    finite_out: bool = True


@final
class Trace:
    """Model and criterion at x, with every node of the autograd graph known by the module that made it.

    A node belongs to the innermost module inside which it was made. What hangs behind a module's inputs and is not
    claimed yet was made by the module around it, and what hangs behind its outputs, by the module itself. What
    torch.compile or TorchScript made into one piece is left in one piece.

    Args:
        step: What is traced, on copies.
        look: Whether to look at the values too, which takes long.
    """

    def __init__(self, step: Step, *, look: bool = False) -> None:
        self._look = look
        self._calls: list[_Call] = []  # finished ones, innermost first
        self._open: list[_Call] = []
        self._owners: dict[Node, str] = {}
        leaf = step.inputs.x.detach().requires_grad_()
        self._source = get_gradient_edge(leaf)
        # TorchScript takes no hooks, and torch.compile would compile them with the module.
        whole = {inner for outer in step.model.modules() if is_compiled(outer) for inner in outer.modules()}
        with ExitStack() as hooks:
            for name, module in step.model.named_modules():
                if not (isinstance(module, torch.jit.ScriptModule) or module in whole):
                    before, after = partial(self._enter, name), partial(self._leave, name)
                    hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(after, with_kwargs=True))
            output = step.inputs.given_to(step.model, leaf.clone())
        self._claim(instances_in(output, Tensor), "")
        self.logits = step.batch.read(output)
        self.losses = step.objective.criterion(self.logits, step.y)
        self._claim([self.losses], CRITERION)

    def depends_on_x(self, edges: Iterable[GradientEdge] | None = None) -> bool:
        """Whether a graph leads from the logits, or from other edges, to the input."""
        edges = _edges(instances_in(self.logits, Tensor)) if edges is None else edges
        return self._source.node in new_nodes([edge.node for edge in edges], ())

    def gradient(self) -> tuple[Tensor, bool]:
        """The input gradient of the losses, and whether they have one with respect to the logits that is not 0."""
        logits = _edges(instances_in(self.logits, Tensor))
        grad, *slopes = torch.autograd.grad(self.losses.sum(), [self._source, *logits], allow_unused=True)
        return grad, any(slope is not None and any_nonzero(slope) for slope in slopes)

    def where_graph_ends(self) -> str:
        """The first module whose input hangs on x and whose output does not."""
        return self._first(lambda call: self.depends_on_x(call.inputs) and not self.depends_on_x(call.outputs))

    def where_not_finite(self) -> str:
        """The first module with a finite input and an output that is not, or the criterion; for a trace that looks."""
        found = self._first(lambda call: call.finite_in and not call.finite_out)
        return found or ("" if all_finite(self.losses) else CRITERION)

    def where_gradient_turns(self, sound: Callable[[Tensor], bool]) -> str:
        """The first module with a sound gradient at its output and none at its input."""
        edges = [edge for call in self._calls for edge in (*call.inputs, *call.outputs)]
        grads = torch.autograd.grad(self.losses.sum(), edges, allow_unused=True)
        whole = {edge for edge, grad in zip(edges, grads, strict=True) if grad is not None and sound(grad)}
        return self._first(lambda call: whole.isdisjoint(call.inputs) and not whole.isdisjoint(call.outputs))

    def undifferentiable(self, *, twice: bool) -> dict[str, list[str]]:
        """The kinds of nodes that cannot be differentiated, once or twice, and the modules that made them."""
        # The first backward pass is watched: among the nodes that it builds for the second one are the barriers. If
        # the first one raises already, the node that started last is at fault.
        found: dict[str, set[str]] = {}
        known = set(self._owners)
        started: list[Node] = []

        def start(node: Node, grad_outputs: object) -> None:
            started.append(node)

        def finish(node: Node, grad_inputs: Iterable[Tensor | None], grad_outputs: object) -> None:
            built = new_nodes([grad.grad_fn for grad in grad_inputs if grad is not None], known)
            known.update(built)
            if any(new.name() in _BARRIERS for new in built):
                found.setdefault(node.name(), set()).add(self._owners[node])

        with ExitStack() as hooks, suppress(RuntimeError):
            for node, owner in self._owners.items():
                if node.name().startswith((*_BARRIERS, REENTRANT, *([COMPILED] if twice else []))):
                    found.setdefault(node.name(), set()).add(owner)
                hooks.callback(node.register_prehook(partial(start, node)).remove)
                hooks.callback(node.register_hook(partial(finish, node)).remove)
            torch.autograd.grad(self.losses.sum(), self._source, create_graph=twice)
            started.clear()
        if not found and started:
            found[started[-1].name()] = {self._owners[started[-1]]}
        order = list(dict.fromkeys(self._owners.values()))
        return {operation: sorted(owners, key=order.index) for operation, owners in found.items()}

    def written_by_hand(self) -> list[str]:
        """The modules that ran an autograd.Function."""
        return [owner for node, owner in self._owners.items() if isinstance(node, BackwardCFunction)]

    def _claim(self, tensors: Iterable[Tensor], name: str) -> None:
        """Ascribe the nodes behind the tensors to a module, as far as no other module made them."""
        self._owners.update(dict.fromkeys(new_nodes([tensor.grad_fn for tensor in tensors], self._owners), name))

    def _first(self, condition: Callable[[_Call], bool]) -> str:
        return next((call.name for call in self._calls if condition(call)), "")

    def _enter(self, name: str, module: nn.Module, args: object, kwargs: object) -> None:
        tensors = list(instances_in([args, kwargs], Tensor))
        self._claim(tensors, self._open[-1].name if self._open else "")
        self._open.append(_Call(name, _edges(tensors), self._finite(tensors)))

    def _leave(self, name: str, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        tensors = list(instances_in(output, Tensor))
        self._claim(tensors, name)
        self._calls.append(self._open.pop()._replace(outputs=tuple(_edges(tensors)), finite_out=self._finite(tensors)))

    def _finite(self, tensors: Iterable[Tensor]) -> bool:
        return not self._look or all(map(all_finite, tensors))


def _edges(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    return [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(tensor.isfinite().all())


def any_nonzero(tensor: Tensor) -> bool:
    """Whether any value differs from 0."""
    return bool(tensor.any())

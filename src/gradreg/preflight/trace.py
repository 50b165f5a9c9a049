"""Who made which node of an autograd graph: a forward pass traced by hooks at the modules' entries and exits."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from gradreg.gradients import Node, new_nodes
from gradreg.wrappers import is_compiled

# Nodes that raise when a backward pass reaches them: operations without a derivative, or differentiable only once.
BARRIERS = ("torch::autograd::NotImplemented", "torch::autograd::Error")
# Nodes that raise by themselves, when they are differentiated again or by torch.autograd.grad.
ONLY_ONCE = (*BARRIERS, "CompiledFunction", "CheckpointFunctionBackward")


@dataclass
class Call:
    """One call of a module: where its tensors hang in the autograd graph, and whether they were finite."""

    name: str
    inputs: list[GradientEdge]
    finite_in: bool
    outputs: list[GradientEdge] = field(default_factory=list)
    finite_out: bool = True


@final
class Trace:
    """A forward pass in which every node of the autograd graph is known by the module that made it.

    A node belongs to the innermost module inside which it was made. Hooks at the entries and exits of modules
    suffice to tell: what hangs behind a module's inputs and is not claimed yet was made by the module around it,
    and what hangs behind its outputs, by the module itself. What torch.compile or TorchScript made into one piece is
    left in one piece.

    Args:
        look: Whether to look at the values too, which takes long.

    Attributes:
        calls: The finished calls, innermost first.
    """

    def __init__(self, *, look: bool = False) -> None:
        self._look = look
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._owners: dict[Node, str] = {}

    @property
    def innermost(self) -> str:
        """The module that was running when the forward pass raised."""
        return self._open[-1].name if self._open else ""

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output for a copy of x, traced."""
        leaf = x.detach().clone().requires_grad_()
        self._source = get_gradient_edge(leaf)
        handles: list[RemovableHandle] = []
        try:
            for name, module in model.named_modules():
                # TorchScript takes no hooks, and torch.compile would compile them with the module.
                if not (isinstance(module, torch.jit.ScriptModule) or is_compiled(module)):
                    handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                    handles.append(module.register_forward_hook(partial(self._leave, name), with_kwargs=True))
            output = model(leaf)
        finally:
            for handle in handles:
                handle.remove()
        self.claim(tensors_in(output), "")
        return output

    def claim(self, tensors: Iterable[Tensor], name: str) -> None:
        """Ascribe the nodes behind the tensors to a module, as far as no other module made them."""
        self._owners.update(dict.fromkeys(new_nodes([tensor.grad_fn for tensor in tensors], self._owners), name))

    def where_graph_ends(self) -> str:
        """The first module whose input hangs on x and whose output does not."""
        edges = [edge.node for call in self.calls for edge in (*call.inputs, *call.outputs)]
        users: dict[Node, list[Node]] = {}
        for node in new_nodes(edges, ()):
            for used, _ in node.next_functions:
                if used is not None:
                    users.setdefault(used, []).append(node)
        dependent, pending = set(), [self._source.node]
        while pending:
            node = pending.pop()
            if node not in dependent:
                dependent.add(node)
                pending.extend(users.get(node, ()))
        return self._first(
            lambda call: (
                any(edge.node in dependent for edge in call.inputs)
                and not any(edge.node in dependent for edge in call.outputs)
            )
        )

    def where_not_finite(self) -> str:
        """The first module with a finite input and an output that is not; for a trace that looks."""
        return self._first(lambda call: call.finite_in and not call.finite_out)

    def where_gradient_turns(self, losses: Tensor, sound: Callable[[Tensor], bool]) -> str:
        """The first module with a sound gradient at its output and none at its input."""
        edges = [edge for call in self.calls for edge in (*call.inputs, *call.outputs)]
        grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
        whole = {edge for edge, grad in zip(edges, grads, strict=True) if grad is not None and sound(grad)}
        return self._first(lambda call: whole.isdisjoint(call.inputs) and not whole.isdisjoint(call.outputs))

    def undifferentiable(self, losses: Tensor) -> dict[str, list[str]]:
        """The kinds of nodes without a second derivative, and the modules that made them.

        The first backward pass is watched: among the nodes that it builds for the second one are the barriers. If
        the first one raises already, the node that started last is at fault.
        """
        found: dict[str, set[str]] = {}
        known = set(self._owners)
        started = []

        def start(node: Node, grad_outputs: object) -> None:
            started.append(node)

        def finish(node: Node, grad_inputs: Iterable[Tensor | None], grad_outputs: object) -> None:
            built = new_nodes([grad.grad_fn for grad in grad_inputs if grad is not None], known)
            known.update(built)
            if any(new.name() in BARRIERS for new in built):
                found.setdefault(node.name(), set()).add(self._owners[node])

        handles = []
        for node, owner in self._owners.items():
            if node.name().startswith(ONLY_ONCE):
                found.setdefault(node.name(), set()).add(owner)
            handles += [node.register_prehook(partial(start, node)), node.register_hook(partial(finish, node))]
        try:
            torch.autograd.grad(losses.sum(), self._source, create_graph=True)
        except RuntimeError:
            if not found and started:
                found[started[-1].name()] = {self._owners[started[-1]]}
        finally:
            for handle in handles:
                handle.remove()
        order = list(dict.fromkeys(self._owners.values()))
        return {operation: sorted(owners, key=order.index) for operation, owners in found.items()}

    def written_by_hand(self) -> list[str]:
        """The modules that ran an autograd.Function."""
        return [owner for node, owner in self._owners.items() if isinstance(node, BackwardCFunction)]

    def _first(self, condition: Callable[[Call], bool]) -> str:
        return next((call.name for call in self.calls if condition(call)), "")

    def _enter(self, name: str, module: nn.Module, args: object, kwargs: object) -> None:
        tensors = list(tensors_in([args, kwargs]))
        self.claim(tensors, self.innermost)
        self._open.append(Call(name, _edges(tensors), self._finite(tensors)))

    def _leave(self, name: str, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        tensors = list(tensors_in(output))
        self.claim(tensors, name)
        call = self._open.pop()
        call.outputs, call.finite_out = _edges(tensors), self._finite(tensors)
        self.calls.append(call)

    def _finite(self, tensors: Iterable[Tensor]) -> bool:
        return not self._look or all(all_finite(tensor) for tensor in tensors)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _edges(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    return [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(tensor.isfinite().all())


def any_nonzero(tensor: Tensor) -> bool:
    """Whether any value differs from 0."""
    return bool(tensor.any())

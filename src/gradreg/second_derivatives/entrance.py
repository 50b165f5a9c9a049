"""What lies between the input and a model's first layers, and who looks at gradients there.

A backward pass into all leaves comes to the objective's own leaf, too. The objective has taken the gradient of that
leaf by name and reads no other, unless its alarm has set a hook there. So a first layer, which has the largest images,
need not compute the gradient of its input: it is the most expensive of all. Unless somebody looks at that gradient on
its way to the leaf: a hook on the normalised images, say. PyTorch tells nobody which hooks a graph has, so they are
looked for in three places.

* Hooks on tensors are seen when they are set, by the function mode, as long as the model runs. The tensor may be gone
  when its gradient comes.
* Later, the tensors that still exist are asked for theirs.
* The nodes of the graph are asked for theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final
from weakref import ref

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradreg.graphs import Node
from gradreg.second_derivatives.engine import has_hooks, will_run

_FEW = 16  # operations between the input and a first layer


@final
@dataclass(eq=False)
class Entrance:
    """The tensors before the first layers, in one forward pass of a model.

    Attributes:
        leaf: The tensor whose gradient is taken, which nobody else has.
        seen: The tensors that functions of PyTorch were called with. By identity, because hashing a tensor is slow;
            weakly, because this object outlives the forward pass.
        hooked: Whether a hook on a tensor has been found.
    """

    leaf: Tensor
    seen: dict[int, ref[Tensor]] = field(default_factory=dict)
    hooked: bool = False

    def see(self, arguments: Iterable[Any]) -> None:
        """Take note of the tensors that a function of PyTorch is called with.

        What lies before a layer is an argument of some call. The input of the model is the result of none.
        """
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor:
                self.seen[id(argument)] = ref(argument)
            elif kind is list or kind is tuple:
                self.see(argument)

    def see_hook(self, tensor: Tensor) -> None:
        """Take note that a hook is set on a tensor."""
        self.hooked = self.hooked or self.way_to(tensor) is not None

    def way_to(self, x: Tensor) -> "Way | None":
        """The way from the leaf to x, if nothing else lies behind x than a few operations such as a normalisation."""
        nodes, ends = [x.grad_fn], []
        for node in nodes:  # which grows meanwhile
            if node is None or len(nodes) > _FEW or _may_read_gradients(node):
                return None
            before = [used for used, _ in node.next_functions if used is not None]
            nodes += [used for used in before if used not in nodes]
            ends += [] if before else [node]
        if len(ends) != 1 or getattr(ends[0], "variable", None) is not self.leaf:
            return None
        return Way(self, nodes, ends[0])

    def has_hooks(self) -> bool:
        """Whether there is a hook on a tensor here."""
        if not self.hooked:
            self.hooked = bool(self.leaf._backward_hooks)  # the alarm for collapse has one
        if not self.hooked:
            tensors = (tensor for seen in self.seen.values() if (tensor := seen()) is not None)
            hooked = (tensor for tensor in tensors if tensor._backward_hooks or tensor.retains_grad)
            self.hooked = any(self.way_to(tensor) is not None for tensor in hooked)
        return self.hooked


@final
@dataclass(frozen=True, eq=False)
class Way:
    """The operations between the leaf and the input of a first layer.

    Attributes:
        entrance: The entrance that it is part of.
        nodes: Their nodes.
        accumulator: The last one of them, which would accumulate the leaf's gradient.
    """

    entrance: Entrance
    nodes: Sequence[Node]
    accumulator: Node

    def is_idle(self, layer: Node) -> bool:
        """Whether nobody looks at the gradient that the present backward pass would take from the layer to the leaf."""
        if not will_run(self.accumulator, by_name=False):  # not a pass into all leaves
            return False
        return not (self.entrance.has_hooks() or any(map(has_hooks, (layer, *self.nodes))))


def _may_read_gradients(node: Node) -> bool:
    """Whether code of others runs in a node: an autograd.Function, of which modules with backward hooks have one."""
    function = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
    return function is not None and not function.__module__.startswith(__package__)

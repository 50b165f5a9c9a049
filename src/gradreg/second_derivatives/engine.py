"""What the functions of this package ask of autograd's engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg.graphs import Node

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # with respect to x, weight and bias


def asked_for(ctx: Any) -> list[bool]:
    """Which inputs of a function a backward pass wants gradients of.

    ``ctx.needs_input_grad`` tells which require grad; the engine knows which of these lead to what the pass is after:
    in the inner pass the input alone. PyTorch's own nodes look that up too.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the inputs that require grad, in order
    return [needed and will_run(next(nodes), by_name=True) for needed in ctx.needs_input_grad]


def will_run(node: Node, *, by_name: bool) -> bool:
    """Whether the present backward pass comes to a node: if it is a leaf that autograd.grad asks for, ``by_name``."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return by_name


def has_hooks(node: Node) -> bool:
    """Whether hooks act on a node: ``register_hook``, ``register_prehook``. Those on its tensors are not among them."""
    # All hooks of a node are in a dictionary, to which nothing leads but the handle of one of them.
    for register in (node.register_hook, node.register_prehook):
        handle = register(_no_hook)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False


def _no_hook(*_: Any) -> None:
    return


def composed(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], v: Tensor) -> list[Tensor | None]:
    """PyTorch's own gradients of <v, function(inputs)>, which can be differentiated again."""
    # Of aliases: one of the inputs may have been computed from another one.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [alias for alias in aliases if alias is not None and alias.requires_grad]
    found = iter(torch.autograd.grad(function(*aliases), wanted, v, create_graph=True, allow_unused=True))
    return [next(found) if alias is not None and alias.requires_grad else None for alias in aliases]

"""Autograd graphs, walked from node to node."""

from collections.abc import Container, Iterable
from typing import Any

# TorchScript's nodes have the methods of torch.autograd.graph.Node, but are not of that type.
Node = Any


def new_nodes(roots: Iterable[Node | None], known: Container[Node]) -> list[Node]:
    """The nodes of the graph behind the roots, up to the known ones."""
    found: dict[Node, None] = {}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node is not None and node not in found and node not in known:
            found[node] = None
            pending.extend(used for used, _ in node.next_functions)
    return list(found)

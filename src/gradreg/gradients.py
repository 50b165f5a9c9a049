"""The one derivative that everything here is built on: of per-sample scores with respect to the input."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

ScoresAt = Callable[[Tensor], Tensor]
# TorchScript's nodes have the methods of torch.autograd.graph.Node, but are not of that type.
Node = Any


def input_gradient(
    losses: Float[Tensor, "B"], x: Float[Tensor, "B *x"], *, create_graph: bool = True
) -> Float[Tensor, "B *x"]:
    r"""Gradient of every sample's loss with respect to its own input, :math:`g_b = \nabla_{x_b} \ell_b`.

    One backward pass gives all samples' gradients, because :math:`\nabla_x \sum_b \ell_b` has
    :math:`\nabla_{x_b} \ell_b` as its b-th row: no division by the batch size, no factor to undo. In a model whose
    samples see each other (BatchNorm in training mode) the row is :math:`\nabla_{x_b} \sum_c \ell_c` instead.

    Args:
        losses: One loss (or logit, or any score) per sample, shape ``(B,)``: a criterion with ``reduction="none"``.
        x: The input that the losses were computed from, which required grad *before* the model's forward pass.
        create_graph: Whether the result can be differentiated again. A penalty needs that; an attack does not.

    Returns:
        The gradients, with the shape of x. The graph of the losses stays alive, so that they can be differentiated
        again. No parameter's ``.grad`` is touched.

    Raises:
        ValueError: If the losses are not of shape ``(B,)``.
        RuntimeError: If x does not require grad, or the losses do not depend on x.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> input_gradient((x**2).sum(1), x)
        tensor([[2., 4.],
                [6., 8.]], grad_fn=<MulBackward0>)
    """
    check_scores(losses, x)
    if not x.requires_grad:
        raise RuntimeError(
            "input_gradient: x does not require grad. Call x.requires_grad_() before the model's forward pass, not "
            "after."
        )
    if not losses.requires_grad:
        raise RuntimeError(
            "input_gradient: the losses carry no graph. Compute them with grad enabled, outside torch.no_grad() and "
            "torch.inference_mode(), and without detach() on the way from x."
        )
    return _gradient(losses.sum(), x, create_graph=create_graph)


def _gradient(total: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    try:
        (grad,) = torch.autograd.grad(total, x, create_graph=create_graph, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        fix = "gradreg.preflight(objective, model, x, y) names the module and the fix."
        if "donated buffers" in str(error):  # a compiled model whose backward pass overwrites what it has kept
            fix = (
                "The model is compiled and may be differentiated only once: set "
                "torch._functorch.config.donated_buffer = False before its first call."
            )
        raise RuntimeError(f"input_gradient: {error}\n{fix}") from error
    if grad is None:
        raise RuntimeError(
            "input_gradient: the losses do not depend on x. They must be computed from this very tensor, after "
            "x.requires_grad_(); a copy made before (x.clone(), x.to(device), mixup) is another tensor."
        )
    return grad


def input_gradient_of(
    losses_at: ScoresAt, x: Float[Tensor, "B *x"]
) -> tuple[Float[Tensor, "B *x"], Float[Tensor, "B"]]:
    r"""The gradient of :func:`input_gradient` as a transform of the function that computes the losses.

    ``x.requires_grad_()`` raises inside ``torch.func.grad``, ``vmap`` and ``jvp`` and inside a compiled region;
    this form, over ``torch.func.vjp``, works there and can be transformed and differentiated again.

    Args:
        losses_at: Function from x to one loss per sample, of shape ``(B,)``.
        x: The input; it need not require grad.

    Returns:
        The gradients, with the shape of x, and the losses.

    Raises:
        ValueError: If the losses are not of shape ``(B,)``.

    Example:
        >>> grad, losses = input_gradient_of(lambda x: (x**2).sum(1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> grad
        tensor([[2., 4.],
                [6., 8.]])
    """
    losses, pull_back = with_pull_back(losses_at, x)
    check_scores(losses, x)
    (grad,) = pull_back(torch.ones_like(losses))
    return grad, losses


def with_pull_back(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """The function's value at x, and the map from a cotangent of the value to one of x: ``torch.func.vjp``, typed."""
    value, pull_back = cast("tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]", torch.func.vjp(function, x))
    return value, pull_back


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under inference_mode, which forbids to save it for a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor


def check_scores(scores: Tensor, x: Tensor) -> None:
    """Raise unless there is one score per sample of x."""
    if scores.ndim == 0:
        raise ValueError(
            f"Expected one loss per sample, shape ({x.shape[0]},), got a single number, averaged or summed already. "
            'Use a criterion with reduction="none"; nn.CrossEntropyLoss has it, and takes mixup labels and '
            "label_smoothing."
        )
    if scores.shape != x.shape[:1]:
        raise ValueError(
            f"Expected one loss per sample, shape ({x.shape[0]},), got shape {tuple(scores.shape)}. Reduce it over all "
            "dimensions but the first, for example losses.flatten(1).mean(1)."
        )


def in_transform() -> bool:
    """Whether the code runs where requires_grad_() is not allowed: under torch.func transforms or torch.compile."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


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


class DifferentiableInput(ABC):
    """An input, one pass through a function of it, and gradients of what comes out with respect to the input."""

    @abstractmethod
    def run(self, function: Callable[[Tensor], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The function's values: its output, and anything else that it has to say. To be called once."""

    @abstractmethod
    def gradient(
        self, output: Any, scores_of: Callable[[Any], Tensor], scores: Tensor, *, create_graph: bool
    ) -> Tensor:
        """The gradient of scores, one per sample, with respect to the input.

        Args:
            output: What :meth:`run` has returned.
            scores_of: The scores as a function of the output.
            scores: Their values, with a graph.
            create_graph: Whether the result can be differentiated again.
        """


@final
class EagerInput(DifferentiableInput):
    """Autograd through a leaf: the cheaper way, which sees hooks and wrappers of the model.

    Args:
        x: The input; it is not changed, and need not require grad.
        around: Makes, from the leaf whose gradient will be taken, what the function runs within.
    """

    def __init__(self, x: Tensor, around: Callable[[Tensor], AbstractContextManager[object]] = nullcontext) -> None:
        self._leaf = x.detach().requires_grad_()
        self._around = around

    def run(self, function: Callable[[Tensor], tuple[Any, Any]]) -> tuple[Any, Any]:
        with self._around(self._leaf):
            return function(self._leaf.clone())  # a copy: a first layer may work in place, which a leaf forbids

    def gradient(
        self, output: Any, scores_of: Callable[[Any], Tensor], scores: Tensor, *, create_graph: bool
    ) -> Tensor:
        return input_gradient(scores, self._leaf, create_graph=create_graph)

    def product(self, grad: Tensor, direction: Tensor, *, create_graph: bool) -> Tensor:
        """The derivative of a gradient with respect to the input, times a direction: a Hessian's product with it."""
        (found,) = torch.autograd.grad(
            (grad * direction).sum(), self._leaf, create_graph=create_graph, retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return found


@final
class TransformedInput(DifferentiableInput):
    """``torch.func.vjp``, which works inside transforms and compiled regions, where no leaf may be made."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def run(self, function: Callable[[Tensor], tuple[Any, Any]]) -> tuple[Any, Any]:
        output, self._pull_back, rest = torch.func.vjp(lambda z: function(z.clone()), self._x, has_aux=True)
        return output, rest

    def gradient(
        self, output: Any, scores_of: Callable[[Any], Tensor], scores: Tensor, *, create_graph: bool
    ) -> Tensor:
        (grad,) = self._pull_back(torch.func.grad(lambda found: scores_of(found).sum())(output))
        return grad

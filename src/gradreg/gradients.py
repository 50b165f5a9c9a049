"""The one derivative that everything here is built on: of per-sample scores with respect to the input."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

ScoresAt = Callable[[Tensor], Tensor]


def input_gradient(
    losses: Float[Tensor, "B"], x: Float[Tensor, "B *x"], *, create_graph: bool = True, retain_graph: bool = True
) -> Float[Tensor, "B *x"]:
    r"""Gradient of every sample's loss with respect to its own input, :math:`g_b = \nabla_{x_b} \ell_b`.

    One backward pass gives all samples' gradients, because :math:`\nabla_x \sum_b \ell_b` has
    :math:`\nabla_{x_b} \ell_b` as its b-th row: no division by the batch size, no factor to undo. In a model whose
    samples see each other (BatchNorm in training mode) the row is :math:`\nabla_{x_b} \sum_c \ell_c` instead.

    Args:
        losses: One loss (or logit, or any score) per sample, shape ``(B,)``: a criterion with ``reduction="none"``.
        x: The input that the losses were computed from, which required grad *before* the model's forward pass.
        create_graph: Whether the result can be differentiated again. A penalty needs that; an attack does not.
        retain_graph: Whether the losses can be differentiated again.

    Returns:
        The gradients, with the shape of x. No parameter's ``.grad`` is touched.

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
    try:
        (grad,) = torch.autograd.grad(
            losses.sum(), x, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        raise RuntimeError(f"input_gradient: {error}\n{_fix_of(error)}") from error
    if grad is None:
        raise RuntimeError(
            "input_gradient: the losses do not depend on x. They must be computed from this very tensor, after "
            "x.requires_grad_(); a copy made before (x.clone(), x.to(device), mixup) is another tensor."
        )
    return grad


def _fix_of(error: RuntimeError) -> str:
    if "donated buffers" in str(error):  # a compiled model whose backward pass overwrites what it has kept
        return (
            "The model is compiled and may be differentiated only once: set "
            "torch._functorch.config.donated_buffer = False before its first call."
        )
    return "gradreg.preflight(objective, model, x, y) names the module and the fix."


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
    return tensor.clone() if not in_transform() and tensor.is_inference() else tensor


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

"""What is known of a model's loss at a batch of inputs: its value, its slope and its curvature."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg import checks
from gradreg.criteria import cross_entropy
from gradreg.gradients import input_gradient, outside_inference_mode
from gradreg.selectors import ClassSelector, class_scores

Model = Callable[[Tensor], Tensor]


class Point:
    """A batch of inputs of a model, and what statistics ask of it, computed once for all of them.

    Args:
        model: The model, from x to logits.
        x: Inputs, ``(B, ...)``.
        y: Labels: classes ``(B,)`` or probabilities ``(B, K)``.
        index: The number of every sample that its random numbers are drawn from; its place in the batch if None.
        twice: Whether second derivatives will be asked for. Attention then runs unfused: no fused kernel has any.

    Attributes:
        x: The inputs, without a graph.
        logits: The model's output, with a graph.
        losses: Cross-entropy of every sample, with a graph.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor, *, index: Tensor | None = None, twice: bool = False) -> None:
        checks.check_input(x)
        self.x = outside_inference_mode(x).detach()
        self.y = outside_inference_mode(y)
        self.index = torch.arange(len(x)) if index is None else index
        self._model = model
        self._twice = twice
        self._leaf = self.x.clone().requires_grad_()
        self._known: dict[Hashable, Tensor] = {}
        with self._attention():
            self.logits = model(self._leaf.clone())  # a copy, for a first layer that works in place
        checks.check_logits(self.logits)
        checks.check_labels(self.logits, self.y, look=True)
        self.losses = cross_entropy(self.logits, self.y)

    def gradient(self, of: ClassSelector | None = None) -> Tensor:
        """Every sample's gradient with respect to its input, of its loss or of the logit of a class.

        Args:
            of: What chooses the class; None for the loss.
        """

        def compute() -> Tensor:
            score = self.losses if of is None else class_scores(self.logits, of(self.logits.detach(), self.y))
            return input_gradient(score, self._leaf, create_graph=self._twice and of is None)

        return self.once(("gradient", of), compute).detach()

    def hessian_product(self, direction: Tensor) -> Tensor:
        """Every sample's Hessian of the loss with respect to its input, times a direction."""
        self.gradient()
        grad = self._known["gradient", None]
        if not grad.requires_grad:  # a loss linear in x
            return torch.zeros_like(direction)
        (product,) = torch.autograd.grad(
            (grad * direction).sum(), self._leaf, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product.detach()

    def losses_at(self, z: Tensor) -> Tensor:
        """Cross-entropy of the same samples at other inputs."""
        with torch.no_grad():
            return cross_entropy(self._model(z), self.y)

    def moved(self, z: Tensor) -> "Point":
        """The same samples at other inputs."""
        return Point(self._model, z, self.y, index=self.index, twice=self._twice)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What compute returns, which several statistics may ask for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _attention(self) -> AbstractContextManager[object]:
        return sdpa_kernel(SDPBackend.MATH) if self._twice else nullcontext()

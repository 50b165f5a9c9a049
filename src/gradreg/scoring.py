"""One forward pass of a model, and the scores that are differentiated with respect to its input.

There are two ways to take an input gradient. :class:`EagerForward` asks autograd, through a leaf tensor that requires
grad; it is the cheaper one, and sees hooks and wrappers of the model. :class:`TransformedForward` asks
``torch.func.vjp``, which also works inside transforms and compiled regions, where no leaf may be made. Both run the
model once. :class:`SplitForward` is one of them on a part of the batch, and a plain forward pass on the rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast, final

import torch
from torch import Tensor, nn

from gradreg import checks, modes
from gradreg.criteria import Criterion
from gradreg.gradients import Score, check_scores, in_one_pass, input_gradient, outside_inference_mode, with_pull_back
from gradreg.selectors import ClassSelector, class_scores
from gradreg.threat_models import at_least_float32

Model = Callable[[Tensor], Tensor]


class Forward(ABC):
    """The logits of a batch and what can be computed from them.

    Attributes:
        x: The input that scores are of, without a graph.
        logits: The model's output.
        losses: The criterion's value for every sample.
    """

    x: Tensor
    logits: Tensor
    losses: Tensor

    @abstractmethod
    def score(self, selector: ClassSelector | None, classes: Tensor | None = None) -> Score:
        """The loss, or the logit of a class.

        Args:
            selector: What chooses the class; None for the loss.
            classes: The classes, where they are given.
        """

    def finish(self) -> None:
        """Complete logits and losses, when no more scores are asked for."""
        return


class SingleForward(Forward):
    """One forward pass of a model."""

    _y: Tensor
    _criterion: Criterion

    def score(self, selector: ClassSelector | None, classes: Tensor | None = None) -> Score:
        if selector is None:
            return self._score(self.losses, lambda logits: self._criterion(logits, self._y))
        chosen = selector(self.logits.detach(), self._y) if classes is None else classes
        return self._score(class_scores(self.logits, chosen), lambda logits: class_scores(logits, chosen))

    @abstractmethod
    def _score(self, values: Tensor, score_of: Callable[[Tensor], Tensor]) -> Score:
        """The score of these values, which are ``score_of(self.logits)``."""

    def take_along(self, x: Tensor) -> None:
        """Let the model see these samples, too, when it next looks at another input: one pass in the place of two.

        To be called before anything else draws a random number.
        """
        return

    def taken_along(self) -> Tensor | None:
        """Their logits; None if the model has not seen them."""
        return None

    def _read(self, logits: Tensor, *, look: bool) -> None:
        """Take over the model's output."""
        self.logits = logits
        self.losses = _losses_of(logits, self.x, self._y, self._criterion, look=look)


@final
class EagerForward(SingleForward):
    """A forward pass under autograd.

    Args:
        model: The model.
        criterion: The per-sample loss.
        x: The input. It is not changed, and needs no grad.
        y: The labels.
        inner_scale: Factor on a score while its gradient is taken.
        differentiable: Whether input gradients will be asked for.
        replay: Whether scores will be asked for at other inputs.
        one_pass: Whether to take the gradients of the losses with respect to input and parameters at once. The graph of
            the logits is then used up, and no score but the loss has a gradient.
        losses_count: Whether the losses at x count in what is minimised; if not, one pass leaves out the parameters.
        look: Whether values may be looked at.
        around: Makes, from the tensor whose gradient will be taken, what the model runs within.
    """

    def __init__(
        self,
        model: Model,
        criterion: Criterion,
        x: Tensor,
        y: Tensor,
        inner_scale: float,
        *,
        differentiable: bool,
        replay: bool,
        one_pass: bool = False,
        losses_count: bool = True,
        look: bool,
        around: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.x = outside_inference_mode(x).detach()
        self._y = outside_inference_mode(y)
        self._model = model
        self._criterion = criterion
        self._inner_scale = inner_scale
        self._look = look
        self._leaf = self.x.detach().requires_grad_(differentiable)
        self._random_state = modes.random_state(x.device) if replay else None
        self._waiting: Tensor | None = None
        self._arrived: Tensor | None = None
        # The model gets a copy: its first operation may work in place, which a leaf forbids.
        start = self._leaf.clone() if differentiable else self._leaf
        with around(self._leaf):
            logits = model(start)
        self._read(logits, look=look)
        self._grad: Tensor | None = None
        if one_pass and differentiable:
            self.losses, self._grad = in_one_pass(self.losses, self._leaf, inner_scale, count=losses_count)

    def _score(self, values: Tensor, score_of: Callable[[Tensor], Tensor]) -> Score:
        def gradient(create_graph: bool) -> Tensor:
            grad = self._grad
            if grad is None:
                grad = input_gradient(_scaled(values, self._inner_scale), self._leaf, create_graph=create_graph)
            grad = _scaled(at_least_float32(grad), 1 / self._inner_scale)
            if self._look and _all_zero(grad):
                checks.warn(
                    "The input gradient of every sample is exactly 0, so that the penalty trains nothing. Either the "
                    "loss is saturated, or something before the first layer has no slope (rounding, quantising, "
                    "argmax)."
                )
            return grad

        return Score(self.x, values, gradient, lambda z: score_of(self._elsewhere(z)))

    def _elsewhere(self, z: Tensor) -> Tensor:
        """The logits at another input, for the same random numbers, and those of samples that ride along."""
        assert self._random_state is not None  # who asks for this has said so
        with modes.replayed(self._random_state, z.device), modes.frozen_statistics(self._model):
            if self._waiting is None:
                return self._model(z)
            logits = self._model(torch.cat([z, self._waiting]))
        self._waiting, self._arrived = None, logits[len(z) :]
        return logits[: len(z)]

    def take_along(self, x: Tensor) -> None:
        # A pass that draws random numbers would draw others for its own samples if these were among them.
        if self._random_state is not None and modes.is_state(self._random_state, x.device):
            self._waiting = x

    def taken_along(self) -> Tensor | None:
        return self._arrived


@final
class TransformedForward(SingleForward):
    """A forward pass inside a ``torch.func`` transform or a compiled region, where values cannot be looked at.

    Random numbers cannot be replayed here: with dropout, finite differences need the eager form.

    Args:
        model: The model.
        criterion: The per-sample loss.
        x: The input.
        y: The labels.
        inner_scale: Factor on a score while its gradient is taken.
    """

    def __init__(self, model: Model, criterion: Criterion, x: Tensor, y: Tensor, inner_scale: float) -> None:
        self.x = x
        self._y = y
        self._model = model
        self._criterion = criterion
        self._inner_scale = inner_scale
        logits, self._pull_back = _with_pull_back(model, x)
        self._read(logits, look=False)

    def _score(self, values: Tensor, score_of: Callable[[Tensor], Tensor]) -> Score:
        def gradient(create_graph: bool) -> Tensor:
            scaled = torch.func.grad(lambda logits: _scaled(score_of(logits), self._inner_scale).sum())(self.logits)
            (grad,) = self._pull_back(scaled)
            return _scaled(at_least_float32(grad), 1 / self._inner_scale)

        def at(z: Tensor) -> Tensor:
            if modes.dropouts(self._model):
                raise RuntimeError(
                    "FiniteDifference cannot give all its passes the same dropout masks inside a torch.func transform "
                    "or a compiled region. Call the objective eagerly, use DoubleBackward(), or leave dropout out."
                )
            if not modes.batch_norms(self._model):  # older compilers cannot trace a context manager made of a generator
                return score_of(self._model(z))
            with modes.frozen_statistics(self._model):
                return score_of(self._model(z))

        return Score(self.x, values, gradient, at)


@final
class SplitForward(Forward):
    """A forward pass whose scores are those of some samples, drawn at random; finished, its logits are those of all.

    Args:
        forward: Makes a forward pass of inputs and labels; the last argument is whether scores will be asked for.
        criterion: The per-sample loss.
        x: The inputs.
        y: The labels.
        fraction: The share of the samples to draw, above 0; at least one is drawn.
        look: Whether values may be looked at.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, bool], SingleForward],
        criterion: Criterion,
        x: Tensor,
        y: Tensor,
        fraction: float,
        *,
        look: bool,
    ) -> None:
        self._order = torch.randperm(len(x), device=x.device)
        count = drawn(len(x), fraction)
        self._drawn, others = self._order[:count], self._order[count:]
        self._others = x[others], y[others]
        self._forward = forward
        self._criterion = criterion
        self._look = look
        self._part = forward(x[self._drawn], y[self._drawn], True)
        self._part.take_along(self._others[0])
        self.x, self.logits, self.losses = self._part.x, self._part.logits, self._part.losses

    def score(self, selector: ClassSelector | None, classes: Tensor | None = None) -> Score:
        return self._part.score(selector, None if classes is None else classes[self._drawn])

    def finish(self) -> None:
        logits = self._part.taken_along()
        if logits is None:
            rest = self._forward(*self._others, False)
            logits, losses = rest.logits, rest.losses
        else:
            losses = _losses_of(logits, *self._others, self._criterion, look=self._look)
        in_order = self._order.argsort()
        self.logits = torch.cat([self._part.logits, logits])[in_order]
        self.losses = torch.cat([self._part.losses, losses])[in_order]


def drawn(count: int, fraction: float) -> int:
    """How many of so many samples are drawn."""
    return max(1, round(fraction * count))


def _losses_of(logits: Tensor, x: Tensor, y: Tensor, criterion: Criterion, *, look: bool) -> Tensor:
    """The loss of every sample."""
    checks.check_logits(logits)
    checks.check_labels(logits, y, look=look)
    losses = criterion(logits, y)
    check_scores(losses, x)
    return losses


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product, without an operation to differentiate twice where it changes nothing."""
    return tensor if factor == 1 else tensor * factor


def _all_zero(grad: Tensor) -> bool:
    """``not grad.any()``, at a third of its time."""
    low, high = grad.detach().aminmax()
    return low.item() == high.item() == 0


def _with_pull_back(model: Model, x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """The logits, and the map from their cotangent to that of x.

    A transformed function may not change a tensor that it captured, as BatchNorm changes its running statistics. So a
    module in which it would gets copies of its buffers, and takes their new values over when the transform is done.
    """
    if not isinstance(model, nn.Module) or not modes.batch_norms(model):
        return with_pull_back(lambda z: model(z.clone()), x)

    def forward(z: Tensor) -> "tuple[Tensor, dict[str, Tensor]]":
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, buffers, (z.clone(),)), buffers

    result = torch.func.vjp(forward, x, has_aux=True)
    logits, pull_back, updated = cast("tuple[Tensor, Callable[[Tensor], tuple[Tensor]], dict[str, Tensor]]", result)
    for name, buffer in model.named_buffers():
        buffer.copy_(updated[name])
    return logits, pull_back

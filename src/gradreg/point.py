"""A batch at one input under one model: what losses, penalties, attacks and measurements ask of it, computed once."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg import checks
from gradreg.criteria import Criterion, cross_entropy, is_classification
from gradreg.differentiation import Around, Differentiation, DoubleBackward, Requests
from gradreg.gradients import (
    DifferentiableInput,
    EagerInput,
    TransformedInput,
    check_scores,
    in_transform,
    outside_inference_mode,
)
from gradreg.replay import EagerReplay, Replay, TransformedReplay, without_random_numbers
from gradreg.selectors import ClassSelector, class_scores
from gradreg.threat_models import at_least_float32
from gradreg.trees import Inputs, joined, taken

Model = Callable[..., Any]
ScoreOf = ClassSelector | Callable[[Any], Tensor] | None  # None for the loss


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """What all points of one batch have in common.

    Attributes:
        model: The model.
        criterion: The loss per sample, ``criterion(logits, y) -> (B,)``.
        inputs: What the model is given, and which of it is perturbed.
        y: Labels, as the criterion takes them.
        differentiation: How input gradients depend on the weights.
        output: Reads the logits from what the model returns.
        inner_scale: Factor on a score while its gradient is taken.
        index: The number of every sample that its random numbers are drawn from; None for its place in the batch.
        look: Whether values may be looked at.
        first: Whether this is the first batch of its kind, whose graph may be looked at.
        replay: Makes every pass the same function; None for passes that draw random numbers of their own.
        requests: The input gradients that were asked for.
        classes: What each class selector has chosen, for all points; those given in advance under None.
    """

    model: Model
    criterion: Criterion
    inputs: Inputs
    y: Any
    differentiation: Differentiation
    output: Callable[[Any], Any] | None = None
    inner_scale: float = 1.0
    index: Tensor | None = None
    look: bool = False
    first: bool = False
    replay: Replay | None = None
    requests: Requests = field(default_factory=Requests)
    classes: list[tuple[ClassSelector | None, Tensor]] = field(default_factory=list)

    def rows(self, rows: Tensor) -> "Batch":
        """Some of its samples, whose passes draw random numbers of their own."""
        return replace(
            self,
            inputs=self.inputs.rows(rows),
            y=taken(self.y, rows, len(self.inputs.x)),
            index=None if self.index is None else self.index[rows.to(self.index.device)],
            replay=None if self.replay is None else self.replay.of_part(),
            classes=[(selector, chosen[rows]) for selector, chosen in self.classes],
        )


class Point:
    r"""A batch at one input: its logits, losses and input gradients, each computed when it is first asked for.

    Every penalty and every statistic is a function of a point. One forward pass serves them all, and one backward pass
    each score that is differentiated. At another input, :meth:`at`, labels, chosen classes and random numbers are the
    same and no running statistic moves: the two are values of one function.

    Args:
        model: The model. A module is used in the mode it is in.
        x: Inputs, ``(B, ...)``; or a tuple or mapping of what the model takes, in which ``perturb`` names one tensor.
        y: Labels, as the criterion takes them.
        criterion: The loss per sample, ``criterion(logits, y) -> (B,)``.
        differentiation: How input gradients depend on the weights. Default: exactly, :class:`gradreg.DoubleBackward`.
        perturb: The key or position of the tensor to perturb; see :class:`gradreg.PenalizedLoss`.
        index: The number of every sample that its random numbers are drawn from, where they are drawn by sample.

    Attributes:
        x: The input, without a graph.

    Example:
        >>> from gradreg import GradNormPenalty, Linf
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> point = Point(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> penalty = GradNormPenalty(Linf(8 / 255))(point)
        >>> (point.losses.mean() + penalty.mean()).backward()
    """

    def __init__(
        self,
        model: Model,
        x: Any,
        y: Any = None,
        criterion: Criterion = cross_entropy,
        *,
        differentiation: Differentiation | None = None,
        perturb: str | int | None = None,
        index: Tensor | None = None,
    ) -> None:
        inputs = Inputs(x, perturb)
        checks.check_input(inputs.x)
        how = DoubleBackward() if differentiation is None else differentiation
        replay = replay_of(model, inputs.x)
        self._begin(Batch(model, criterion, inputs, y, how, index=index, replay=replay), inputs.x)

    @classmethod
    def of(cls, batch: Batch, x: Tensor, *, differentiable: bool = True, counts: bool = True) -> "Point":
        """The point of a batch at an input.

        Args:
            batch: The batch.
            x: The input.
            differentiable: Whether input gradients will be asked for.
            counts: Whether its forward pass is the step's own, which may move running statistics.
        """
        point = cls.__new__(cls)
        point._begin(batch, x, differentiable=differentiable, counts=counts)
        return point

    def _begin(self, batch: Batch, x: Tensor, *, differentiable: bool = True, counts: bool = True) -> None:
        self.x = x if in_transform() else outside_inference_mode(x).detach()
        self._batch = batch
        self._differentiable = differentiable
        self._counts = counts
        self._known: dict[Hashable, Any] = {}
        self._slopes: list[tuple[ScoreOf, bool, Tensor]] = []

    @property
    def model(self) -> Model:
        """The model."""
        return self._batch.model

    @property
    def y(self) -> Any:
        """The labels."""
        return self._batch.y

    @property
    def criterion(self) -> Criterion:
        """The loss per sample."""
        return self._batch.criterion

    @property
    def index(self) -> Tensor:
        """The number of every sample, from which its random numbers are drawn."""
        return torch.arange(len(self.x)) if self._batch.index is None else self._batch.index

    @property
    def has_slope(self) -> bool:
        """Whether input gradients can be asked for."""
        return self._differentiable

    @property
    def has_drawn(self) -> bool:
        """Whether the passes so far have drawn random numbers; to be asked before anything else draws some."""
        return self._batch.replay is not None and self._batch.replay.has_drawn

    @property
    def requests(self) -> Requests:
        """The input gradients that were asked for, at this point and at others of the batch."""
        return self._batch.requests

    @property
    def logits(self) -> Any:
        """The model's output, with its graph."""
        return self.once("logits", self._run)

    @property
    def losses(self) -> Tensor:
        """The criterion's value for every sample, ``(B,)``, with its graph."""
        return self.once("losses", lambda: self._loss_of(self.logits))

    def score(self, of: ScoreOf = None) -> Tensor:
        """What is differentiated, one number per sample.

        Args:
            of: None for the loss; a class selector for the logit of a class; or a function of the logits.
        """
        return self.losses if of is None else self._score_of(of)(self.logits)

    def gradient(self, of: ScoreOf = None) -> Tensor:
        r"""Every sample's gradient of its score with respect to its input, of the shape of x, in float32 at least.

        Its own derivative with respect to the weights is what the differentiation stands for.

        Args:
            of: None for the loss; a class selector for the logit of a class; or a function of the logits.
        """
        return self._batch.differentiation.gradient(self, of)

    def at(self, z: Tensor, *, differentiable: bool = True) -> "Point":
        """The same samples at another input, taken as a constant: the same function at another place.

        Args:
            z: The input.
            differentiable: Whether input gradients will be asked for.
        """
        return Point.of(self._batch, z.detach(), differentiable=differentiable, counts=False)

    def rows(self, rows: Tensor, *, differentiable: bool = True, counts: bool = False) -> "Point":
        """Some of the samples, as a batch of their own; see :meth:`of`."""
        return Point.of(self._batch.rows(rows), self.x[rows], differentiable=differentiable, counts=counts)

    def moved_to(self, z: Tensor, *, differentiable: bool = True) -> "Point":
        """Where the step is taken: the one point whose forward pass moves running statistics."""
        return Point.of(self._batch, z.detach(), differentiable=differentiable)

    def logits_at(self, z: Tensor, rows: Tensor | None = None) -> Any:
        """The logits at other inputs, as a function that an attack differentiates.

        Args:
            z: Inputs of the samples.
            rows: Which samples they are; all in their order if None.
        """
        batch = self._batch
        if rows is not None and len(rows) < len(self.x) and not batch.inputs.is_tensor:
            batch = batch.rows(rows)
        return Point.of(batch, z, counts=False)._call(z)[0]

    def hessian_product(self, direction: Tensor) -> Tensor:
        """Every sample's Hessian of the loss with respect to its input, times a direction.

        It depends on the weights if input gradients do.

        Raises:
            RuntimeError: If these are finite differences, or inside a transform.
        """
        exact = self._batch.differentiation.second_order
        if in_transform() or not (exact or self._batch.differentiation.constant):
            raise RuntimeError("A Hessian needs DoubleBackward(), outside of transforms and compiled regions.")
        point = self if exact else self.once("twice", self._differentiated_twice)
        grad = point.slope(create_graph=True)
        if not grad.requires_grad:  # a loss linear in x
            return torch.zeros_like(direction)
        return point._input.product(grad, direction, create_graph=exact)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed when a key is first asked for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def known(self, key: Hashable) -> Any:
        """What has been computed under a key, such as ``"logits"``; None if nothing has."""
        return self._known.get(key)

    def slope(self, of: ScoreOf = None, *, create_graph: bool) -> Tensor:
        """The input gradient of a score as autograd has it: with a graph, if ``create_graph``, or without."""
        for known, has_graph, grad in self._slopes:
            if known == of and has_graph >= create_graph:
                return grad
        scale = self._batch.inner_scale
        scores, scores_of = self.score(of), self._score_of(of)
        grad = self._input.gradient(
            self.logits,
            lambda logits: _scaled(scores_of(logits), scale),
            _scaled(scores, scale),
            create_graph=create_graph,
        )
        grad = _scaled(at_least_float32(grad), 1 / scale)
        if self._batch.look and _all_zero(grad):
            checks.warn(
                "The input gradient of every sample is exactly 0, so that the penalty trains nothing. Either the loss "
                "is saturated, or something before the first layer has no slope (rounding, quantising, argmax)."
            )
        self._slopes.append((of, create_graph, grad))
        return grad

    def _run(self) -> Any:
        if not self._differentiable:
            logits, moved = self._call(self.x.clone())  # a copy: a first layer may work in place
        else:
            batch = self._batch
            self._input = differentiable_input(self.x, batch.differentiation.around(batch.model, self.x))
            logits, moved = self._input.run(self._call)
        if moved:
            self._batch.replay.take_over(moved)
        return logits

    def _call(self, z: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The logits, and the buffers that have moved as far as the model does not have them yet."""
        batch = self._batch
        if batch.replay is None:
            output, moved = batch.inputs.given_to(batch.model, z), {}
        else:
            output, moved = batch.replay.call(batch.inputs, z, counts=self._counts)
        return logits_in(output) if batch.output is None else batch.output(output), moved

    def _loss_of(self, logits: Any) -> Tensor:
        batch = self._batch
        if is_classification(batch.criterion):
            checks.check_logits(logits)
            checks.check_labels(logits, batch.y, look=batch.look)
        losses = self.loss_of(logits, batch.y, batch.criterion, again=not self._counts)
        check_scores(losses, self.x)
        return losses

    def loss_of(self, logits: Any, y: Any, criterion: Criterion, *, again: bool = True) -> Tensor:
        """A criterion's values, for which it draws the random numbers of all passes, if it draws any.

        Args:
            logits: What it takes.
            y: Labels.
            criterion: The criterion.
            again: Whether another pass may have drawn them before.
        """
        replay = self._batch.replay
        if replay is None:
            return criterion(logits, y)
        with replay.drawing("criterion"):
            return without_random_numbers(lambda found: criterion(found, y), logits) if again else criterion(logits, y)

    def _score_of(self, of: ScoreOf) -> Callable[[Any], Tensor]:
        """A score as a function of the logits."""
        if of is None:
            return lambda logits: self.loss_of(logits, self.y, self.criterion)
        if not isinstance(of, ClassSelector):
            return of
        classes = self._chosen_by(of)
        return lambda logits: class_scores(logits, classes)

    def _chosen_by(self, selector: ClassSelector) -> Tensor:
        """The classes that a selector has chosen, at whichever point of the batch was asked first."""
        for known, classes in self._batch.classes:
            if known is None or known == selector:
                return classes
        checks.check_logits(self.logits)
        classes = selector(self.logits.detach(), self.y)
        self._batch.classes.append((selector, classes))
        return classes

    def _differentiated_twice(self) -> "Point":
        """The point by a pass of its own, without fused attention, which has no second derivative."""
        batch = replace(self._batch, differentiation=DoubleBackward(fused=False))
        point = Point.of(batch, self.x, counts=False)
        with sdpa_kernel(SDPBackend.MATH):
            point.once("logits", point._run)
        return point


@final
class Parts(Point):
    """A batch of which some samples take a forward pass by themselves.

    Args:
        whole: The batch.
        parts: Points of parts of it, which together hold every sample once.
        rows: Which samples these are.
    """

    def __init__(self, whole: Point, parts: Sequence[Point], rows: Sequence[Tensor]) -> None:
        self._begin(whole._batch, joined([part.x for part in parts], rows))
        self._parts, self._rows = parts, rows

    @property
    def logits(self) -> Any:
        return self.once("logits", lambda: self._joined(lambda part: part.logits))

    @property
    def losses(self) -> Tensor:
        return self.once("losses", lambda: self._joined(lambda part: part.losses))

    def score(self, of: ScoreOf = None) -> Tensor:
        return self._joined(lambda part: part.score(of))

    def slope(self, of: ScoreOf = None, *, create_graph: bool) -> Tensor:
        return self._joined(lambda part: part.slope(of, create_graph=create_graph))

    def _joined(self, values_of: Callable[[Point], Any]) -> Any:
        return joined([values_of(part) for part in self._parts], self._rows)


def replay_of(model: Model, x: Tensor) -> Replay:
    """What makes all passes over a batch one function."""
    return TransformedReplay(model, x.device) if in_transform() else EagerReplay(model, x.device)


def differentiable_input(x: Tensor, around: Around = nullcontext) -> DifferentiableInput:
    """The input of a pass whose gradient will be taken, wherever the code runs."""
    return TransformedInput(x) if in_transform() else EagerInput(x, around)


def logits_in(output: Any) -> Any:
    """What a criterion takes of a model's output: its ``.logits`` or ``["logits"]`` if it has any, or all of it."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product, without an operation to differentiate twice where it changes nothing."""
    return tensor if factor == 1 else tensor * factor


def _all_zero(grad: Tensor) -> bool:
    """``not grad.any()``, at a third of its time."""
    low, high = grad.detach().aminmax()
    return low.item() == high.item() == 0

"""A batch at one input under one model: what losses, penalties, attacks and measurements ask of it, computed once."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.criteria import Criterion, is_classification
from gradreg.differentiation import NOTHING, Differentiation, DoubleBackward, Requests
from gradreg.gradients import check_scores, in_transform, input_gradient
from gradreg.modes import batch_norms
from gradreg.replay import EagerReplay, Replay, TransformedReplay, alike, without_random_numbers
from gradreg.selectors import ClassSelector, class_scores
from gradreg.threat_models import at_least_float32
from gradreg.trees import Inputs, detached, joined, taken, usable

Model = Callable[..., Any]
ScoreOf = ClassSelector | Callable[[Any], Tensor] | None  # None for the loss

# By model, criterion and mode: whether the samples of a batch do not see each other.
_apart: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Criterion, dict[bool, bool]]]"
_apart = weakref.WeakKeyDictionary()


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """What all points of one batch have in common."""

    model: Model
    criterion: Criterion
    inputs: Inputs
    y: Any
    differentiation: Differentiation
    output: Callable[[Any], Any] | None = None  # reads the logits from what the model returns
    of_classes: bool = False  # whether the criterion takes labels of classes, which can be checked
    inner_scale: float = 1.0  # of a score while its gradient is taken
    index: Tensor | None = None  # the number of every sample that its random numbers are drawn from
    look: bool = False  # whether values may be looked at
    checked: bool = False  # whether an objective has seen to it that x, radii and bounds are in one unit
    met: Any = None  # what the objective knows of the model
    trains_start: bool = False  # whether what an attack of one step computes where it starts is to be trained, too
    replay: Replay | None = None  # makes every pass one function; without it they draw numbers of their own
    requests: Requests = field(default_factory=Requests)
    classes: list[tuple[ClassSelector | None, Tensor]] = field(default_factory=list)  # chosen; or given, under None
    draws: dict[Hashable, Tensor] = field(default_factory=dict)  # random numbers of penalties

    def read(self, output: Any) -> Any:
        """What the criterion takes of a model's output: its ``.logits`` or ``["logits"]`` if it has any, or all."""
        if self.output is not None:
            return self.output(output)
        if hasattr(output, "logits"):
            return output.logits
        return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


class Point:
    r"""A batch at one input: its logits, losses and input gradients, each computed when it is first asked for.

    Every penalty and every statistic is a function of a point. One forward pass serves them all, and one backward pass
    each score that is differentiated. At another input, :meth:`at`, labels and random numbers are the same and no
    running statistic moves: the two are values of one function. Classes are chosen once, at the point that asks first.

    Args:
        model: The model. A module is used in the mode it is in.
        criterion: The loss per sample, ``criterion(logits, y) -> (B,)``.
        x: Inputs, ``(B, ...)``; or a tuple or mapping of what the model takes, in which ``perturb`` names one tensor.
        y: Labels, as the criterion takes them.
        differentiation: How input gradients depend on the weights. Default: exactly, :class:`gradreg.DoubleBackward`.
        perturb: The key or position of the tensor to perturb; see :class:`gradreg.PenalizedLoss`.
        index: The number of every sample that its random numbers are drawn from, where they are drawn by sample.
        look: Whether to look at values: labels out of range, gradients that are all 0.

    Attributes:
        x: The input, without a graph.
        known: What has been computed so far, by name: ``"logits"``, ``"losses"`` and what :meth:`once` has kept.

    Example:
        >>> from gradreg import GradNormPenalty, Linf, cross_entropy
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
        >>> point = Point(model, cross_entropy, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> penalty = GradNormPenalty(Linf(8 / 255))(point)
        >>> (point.losses.mean() + penalty.mean()).backward()
    """

    x: Tensor
    batch: Batch
    differentiable: bool
    counts: bool
    known: dict[Hashable, Any]
    leaf: Tensor  # the tensor whose gradient is taken, once the pass has run
    freed: bool = False  # whether the graph is gone that what is known hangs on
    moved_from: "Point | None" = None  # the clean point, where an attack has moved the batch
    first_step: "FirstStep | None" = None  # what that attack found where it started
    _slopes: list[tuple[ScoreOf, bool, Tensor]]

    def __init__(
        self,
        model: Model,
        criterion: Criterion,
        x: Any,
        y: Any = None,
        *,
        differentiation: Differentiation | None = None,
        perturb: str | int | None = None,
        index: Tensor | None = None,
        look: bool = True,
    ) -> None:
        inputs = Inputs(x, perturb)
        checks.check_input(inputs.x)
        how = DoubleBackward() if differentiation is None else differentiation
        if how.looks_elsewhere:
            raise ValueError(f"{how} is completed by an objective: PenalizedLoss(terms=..., differentiation={how}).")
        known, transformed = is_classification(criterion), in_transform()
        replay = (TransformedReplay if transformed else EagerReplay)(model, criterion, inputs.x.device)
        batch = Batch(
            model, criterion, inputs, usable(y), how, of_classes=known, index=index,
            look=look and not transformed, replay=replay,
        )  # fmt: skip
        made = Point.of(batch, inputs.x)
        self.__class__ = type(made)  # another one inside a transform
        vars(self).update(vars(made))

    @staticmethod
    def of(batch: Batch, x: Tensor, *, differentiable: bool = True, counts: bool = True) -> "Point":
        """The point of a batch at an input.

        Args:
            batch: The batch.
            x: The input.
            differentiable: Whether input gradients will be asked for.
            counts: Whether its forward pass is the step's own, which alone may move running statistics.
        """
        transformed = in_transform()
        point = object.__new__(_TransformedPoint if transformed else Point)
        if not transformed:
            x = x.clone() if x.is_inference() else x.detach()
        point.x, point.batch = x, batch
        point.differentiable, point.counts = differentiable, counts
        point.known, point._slopes = {}, []
        return point

    @property
    def y(self) -> Any:
        """The labels, as the criterion takes them."""
        return self.batch.y

    @property
    def origin(self) -> "Point | None":
        """The clean point of a batch that an attack has moved, with the same random numbers; None without an attack."""
        clean = self.moved_from
        if clean is None:
            return None
        origin = self.once("origin", lambda: self.at(clean.x))
        if "constant logits" in clean.known:  # those of an attack that has begun there, whose graph is gone
            origin.known.setdefault("constant logits", clean.known["constant logits"])
            origin._slopes = origin._slopes or list(clean._slopes)
        return origin

    @property
    def logits(self) -> Any:
        """The model's output, with its graph."""
        if self.freed:
            self.release()
        if "logits" not in self.known:
            self.known["logits"] = self._run()
        return self.known["logits"]

    def constant_logits(self) -> Any:
        """The model's output without a graph, from a pass without one unless there has been one with it."""
        if "logits" in self.known:
            return detached(self.known["logits"])
        return self.once("constant logits", self._without_graph)

    def _without_graph(self) -> Any:
        with torch.no_grad():
            return detached(Point.of(self.batch, self.x, counts=False)._call(self.x.clone())[0])

    @property
    def losses(self) -> Tensor:
        """The criterion's value for every sample, ``(B,)``, with its graph."""
        if self.freed:
            self.release()
        if "losses" not in self.known:
            logits, batch = self.logits, self.batch
            if batch.of_classes:
                checks.check_labels(logits, batch.y, look=batch.look)
            alone = batch.replay is None
            losses = batch.criterion(logits, batch.y) if alone else self.loss_of(logits, again=not self.counts)
            check_scores(losses, self.x)
            self.known["losses"] = losses
        return self.known["losses"]

    def score(self, of: ScoreOf = None) -> Tensor:
        """What is differentiated, one number per sample.

        Args:
            of: None for the loss; a class selector for the logit of a class; or a function of the logits.
        """
        if of is None:
            return self.losses
        score_of, replay = self._score_of(of), self.batch.replay
        if replay is None or isinstance(of, ClassSelector):
            return score_of(self.logits)
        with replay.drawing(("score", of)):  # a function may draw random numbers: a projection
            return without_random_numbers(score_of, self.logits)

    def gradient(self, of: ScoreOf = None, *, constant: bool = False) -> Tensor:
        r"""Every sample's gradient of its score with respect to its input, of the shape of x, in float32 at least.

        Its own derivative with respect to the weights is what the differentiation stands for.

        Args:
            of: None for the loss; a class selector for the logit of a class; or a function of the logits.
            constant: Whether the gradient is held constant, as a direction is: that costs no second derivative.
        """
        if constant:
            return self.slope(of, create_graph=False).detach()
        return self.batch.differentiation.gradient(self, of)

    def at(self, z: Tensor, *, differentiable: bool = True, counts: bool = False) -> "Point":
        """The same samples at another input, a constant: another value of the same function; see :meth:`of`."""
        if self.batch.checked and self.batch.replay is None:
            raise RuntimeError(
                "A penalty that says looks_elsewhere=False has asked for another point, where random numbers and "
                "buffers would not be the same. Leave looks_elsewhere=True."
            )
        return Point.of(self.batch, z.detach(), differentiable=differentiable, counts=counts)

    def losses_at(self, *inputs: Tensor) -> list[Tensor]:
        """The losses at several inputs, in one pass where the model treats samples apart and draws no random numbers.

        Whether a model does is looked at once, by a pass without a graph.
        """
        if self._samples_are_apart(inputs):
            rows = torch.arange(len(self.x), device=self.x.device).repeat(len(inputs))
            together = self.rows(rows).at(torch.cat(inputs), differentiable=False)
            return list(together.losses.chunk(len(inputs)))
        return [self.at(z, differentiable=False).losses for z in inputs]

    def _samples_are_apart(self, inputs: Sequence[Tensor]) -> bool:
        model, replay = self.batch.model, self.batch.replay
        if torch.compiler.is_compiling():  # which cannot look at what is remembered of other steps
            return False
        if replay is None or "logits" not in self.known or not isinstance(model, nn.Module) or batch_norms(model):
            return False
        if {"model", "criterion"} & replay.drawn_from.keys():  # then two copies of a sample would draw other numbers
            return False
        try:
            known = _apart.setdefault(model, weakref.WeakKeyDictionary()).setdefault(self.batch.criterion, {})
        except TypeError:  # of a criterion that cannot be remembered
            return False
        if model.training not in known and not in_transform():
            known[model.training] = self._is_apart((inputs[0], inputs[-1]))
        return known.get(model.training, False)

    def _is_apart(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the losses at two inputs are the same in one pass and in two."""
        rows = torch.arange(len(self.x), device=self.x.device).repeat(2)
        with torch.no_grad():
            try:
                twice = self.rows(rows).at(torch.cat(list(inputs)), differentiable=False).losses
            except Exception:  # of a model that takes batches of one size
                return False
            return alike(torch.cat([self.at(z, differentiable=False).losses for z in inputs]), twice)

    def drawn(self, key: Hashable, draw: Callable[[], Tensor]) -> Tensor:
        """Random numbers of a penalty, drawn once for the batch, so that all its points and passes have the same."""
        draws = self.batch.draws
        if key not in draws:
            draws[key] = draw()
        return draws[key]

    def rows(self, rows: Tensor, *, differentiable: bool = True, counts: bool = False) -> "Point":
        """Some of the samples, as a batch whose passes draw random numbers of their own; see :meth:`of`."""
        if not isinstance(rows, Tensor) or rows.dtype == torch.bool:
            rows = torch.arange(len(self.x), device=self.x.device)[rows]
        whole = self.batch
        part = replace(
            whole,
            inputs=whole.inputs.rows(rows),
            y=taken(whole.y, rows, len(self.x)),
            index=None if whole.index is None else whole.index[rows.to(whole.index.device)],
            replay=None if whole.replay is None else whole.replay.of_part(),
            classes=[(selector, chosen[rows]) for selector, chosen in whole.classes] if whole.classes else [],
            draws={},
        )
        point = Point.of(part, self.x[rows], differentiable=differentiable, counts=counts)
        point.moved_from = None if self.moved_from is None else self.moved_from.rows(rows)
        return point

    def logits_at(self, z: Tensor, rows: Tensor | None = None) -> Any:
        """The logits of some samples at other inputs, as a function that an attack differentiates."""
        batch = self.batch
        if rows is not None and len(rows) < len(self.x) and not batch.inputs.is_tensor:
            batch = self.rows(rows).batch
        return Point.of(batch, z, counts=False)._call(z)[0]

    def with_loss(self, criterion: Criterion, y: Any) -> "Point":
        """The same samples and passes with another loss, for an attack to raise."""
        batch = replace(self.batch, criterion=criterion, y=y, of_classes=False)
        return Point.of(batch, self.x, counts=False)

    def loss_of(self, logits: Any, y: Any = None, criterion: Criterion | None = None, *, again: bool = True) -> Tensor:
        """The values of a criterion, by default the batch's, with the random numbers that it draws in every pass."""
        batch = self.batch
        labels = batch.y if y is None else y
        criterion = batch.criterion if criterion is None else criterion
        if batch.replay is None:
            return criterion(logits, labels)
        with batch.replay.drawing("criterion"), batch.replay.aside(counts=not again):
            if again and torch.compiler.is_compiling():
                return without_random_numbers(lambda found: criterion(found, labels), logits)
            return criterion(logits, labels)

    def slope(self, of: ScoreOf = None, *, create_graph: bool, last: bool = False) -> Tensor:
        """The input gradient of a score as autograd has it, with a graph or not; the ``last`` one frees the rest."""
        for known, has_graph, grad in self._slopes:
            if known == of and has_graph >= create_graph:
                return grad
        scale = self.batch.inner_scale
        grad = at_least_float32(self._differentiated(of, scale, create_graph, retain_graph=not last))
        self.freed = last
        if scale != 1:
            grad = grad / scale
        if self.batch.look:
            low, high = grad.detach().aminmax()
            if low.item() == high.item() == 0:
                checks.warn(
                    "The input gradient of every sample is exactly 0: a penalty on it trains nothing, and an attack "
                    "along it does nothing. Either the loss is saturated (a margin of logits is not), or something "
                    "before the first layer has no slope (rounding, quantising, argmax: give it a straight-through "
                    "gradient)."
                )
        self._slopes.append((of, create_graph, grad))
        return grad

    def release(self) -> None:
        """Free all graphs; logits and gradients stay known as constants. Whoever asks for more runs the model anew."""
        known = self.known
        self.known = {"constant logits": detached(known["logits"])} if "logits" in known else {}
        self._slopes = [(of, False, grad.detach()) for of, _, grad in self._slopes]
        self.leaf, self.freed = self.x, False

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed when a key is first asked for."""
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def _run(self) -> Any:
        """The forward pass, through a leaf if input gradients will be asked for."""
        leaf, around = self.x.detach(), NOTHING
        if self.differentiable:
            leaf.requires_grad_()
            around = self.batch.differentiation.around(self.batch.model, leaf)
        self.leaf = leaf
        # At another point a measurement, which trains nothing, may ask for values alone.
        graph = self.differentiable or self.counts or self.batch.checked or not self.batch.differentiation.constant
        with around(leaf), nullcontext() if graph else torch.no_grad():
            return self._call(leaf.clone())[0]  # a copy: a first layer may work in place, which a leaf forbids

    def _call(self, z: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The logits at z; and the buffers that have moved, as far as the model does not have them yet."""
        batch = self.batch
        moved: dict[str, Tensor] = {}
        if batch.replay is None:
            output = batch.inputs.given_to(batch.model, z)
        else:
            output, moved = batch.replay.call(batch.inputs, z, counts=self.counts)
        return output if isinstance(output, Tensor) and batch.output is None else batch.read(output), moved

    def _differentiated(self, of: ScoreOf, scale: float, create_graph: bool, *, retain_graph: bool) -> Tensor:
        """The input gradient of a scaled score."""
        scores = self.losses if of is None else self.score(of)
        scores = scores if scale == 1 else scores * scale
        return input_gradient(scores, self.leaf, create_graph=create_graph, retain_graph=retain_graph)

    def _score_of(self, of: ScoreOf) -> Callable[[Any], Tensor]:
        """A score as a function of the logits."""
        if not isinstance(of, ClassSelector):
            return self.loss_of if of is None else of
        for known, classes in self.batch.classes:
            if known is None or known == of:
                return lambda logits: class_scores(logits, classes)
        self.batch.classes.append((of, of(checks.check_logits(self.logits).detach(), self.batch.y)))
        return self._score_of(of)


@final
@dataclass(frozen=True, eq=False)
class FirstStep:
    """Where an attack has started, and the gradient that it found there: constants.

    Attributes:
        start: The samples that it moves, where it started.
        gradient: Of what it raises, with respect to their input.
        rows: Which samples these are, where it moves only some; None for all.
        evaluated: Whether the model was in evaluation mode.
    """

    start: Point
    gradient: Tensor
    rows: Tensor | None = None
    evaluated: bool = False

    @property
    def x(self) -> Tensor:
        """The inputs that it started from."""
        return self.start.x

    @property
    def logits(self) -> Any:
        """The model's output there."""
        return self.start.constant_logits()

    @property
    def losses(self) -> Tensor:
        """The losses there."""
        known = self.start.known.get("losses")
        return self.start.loss_of(self.logits) if known is None else known.detach()


@final
class _TransformedPoint(Point):
    """A point inside a ``torch.func`` transform or a compiled region, where no leaf may be made."""

    def _run(self) -> Any:
        result: Any = torch.func.vjp(lambda z: self._call(z.clone()), self.x, has_aux=True)
        logits, self._pull_back, moved = result
        if self.batch.replay is not None:
            self.batch.replay.take_over(moved)
        return logits

    def _differentiated(self, of: ScoreOf, scale: float, create_graph: bool, *, retain_graph: bool) -> Tensor:
        logits, score_of = self.logits, self._score_of(of)
        replay = self.batch.replay
        with nullcontext() if replay is None or of is None else replay.drawing(("score", of)):
            (grad,) = self._pull_back(torch.func.grad(lambda found: scale * score_of(found).sum())(logits))
        return grad


@final
class Parts(Point):
    """A batch in parts that take forward passes of their own, and the rows of each."""

    def __init__(self, whole: Point, parts: Sequence[Point], rows: Sequence[Tensor]) -> None:
        vars(self).update(vars(Point.of(whole.batch, joined([part.x for part in parts], rows))))
        self.parts, self.part_rows = parts, rows

    @property
    def losses(self) -> Tensor:
        return self.once("losses", lambda: self._joined(lambda part: part.losses))

    def at(self, z: Tensor, *, differentiable: bool = True, counts: bool = False) -> Point:
        parts = [part.at(z[rows], differentiable=differentiable, counts=counts) for part, rows in self._pairs()]
        return Parts(self, parts, self.part_rows)

    def with_loss(self, criterion: Criterion, y: Any) -> Point:
        parts = [part.with_loss(criterion, taken(y, rows, len(self.x))) for part, rows in self._pairs()]
        return Parts(super().with_loss(criterion, y), parts, self.part_rows)

    def losses_at(self, *inputs: Tensor) -> list[Tensor]:
        return [self.at(z, differentiable=False).losses for z in inputs]

    def logits_at(self, z: Tensor, rows: Tensor | None = None) -> Any:
        if rows is not None and len(rows) < len(self.x):
            return super().logits_at(z, rows)
        return joined([part.logits_at(z[of_part]) for part, of_part in self._pairs()], self.part_rows)

    def score(self, of: ScoreOf = None) -> Tensor:
        scores = [part.score(self._of_part(of, rows)) for part, rows in self._pairs()]
        return joined(scores, self.part_rows)

    def _run(self) -> Any:
        return self._joined(lambda part: part.logits)

    def _without_graph(self) -> Any:
        return self._joined(lambda part: part.constant_logits())

    def _differentiated(self, of: ScoreOf, scale: float, create_graph: bool, *, retain_graph: bool) -> Tensor:
        grads = [
            part._differentiated(self._of_part(of, rows), scale, create_graph, retain_graph=retain_graph)
            for part, rows in self._pairs()
        ]
        return joined(grads, self.part_rows)

    def _of_part(self, of: ScoreOf, rows: Tensor) -> ScoreOf:
        """A function of the logits of all samples, which may hold a number for each, as one of some of them."""
        if of is None or isinstance(of, ClassSelector) or not isinstance(self.logits, Tensor):
            return of
        others = self.logits.detach()
        return lambda logits: of(others.index_copy(0, rows, logits))[rows]

    def _pairs(self) -> Iterator[tuple[Point, Tensor]]:
        return zip(self.parts, self.part_rows, strict=True)

    def _joined(self, values_of: Callable[[Point], Any]) -> Any:
        return joined([values_of(part) for part in self.parts], self.part_rows)

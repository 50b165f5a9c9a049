"""What an attack on a model with labels is: a frozen configuration."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from gradreg import checks, modes
from gradreg.attacks.search import LossesAt, OutOfBounds, check_attackable, grad_enabled, may_look
from gradreg.criteria import Criterion, cross_entropy, is_classification
from gradreg.differentiation import InputOnly
from gradreg.gradients import in_transform, outside_inference_mode
from gradreg.point import Batch, Model, Point
from gradreg.threat_models import Bounds, Eps, ThreatModel
from gradreg.trees import Inputs, detached, taken


@dataclass(frozen=True, eq=False)
class Attack(ABC):
    """A configuration that turns a batch into a perturbed batch: ``attack(model, x, y) -> x_adv``.

    It stores no model and has no state. No parameter's ``.grad``, no running statistic of a normalisation layer and no
    module's mode is changed (a model given as a function hides its modules: give an ``nn.Module`` where there is one).

    Attributes:
        threat: The perturbations allowed, in the units of x.
        bounds: Lowest and highest value of an input; None for no bounds.
        out_of_bounds: ``"check"`` or ``"clamp"``, see :func:`pgd`.
        mode: ``"keep"`` attacks the model in the mode it is in, with a warning if that is BatchNorm or dropout in
            training mode, which make the gradients of a batch depend on each other or on chance. ``"eval"`` attacks it
            in evaluation mode and then gives every module its own mode back; the model must then be an ``nn.Module``.
    """

    threat: ThreatModel
    bounds: Bounds | None = field(default=(0.0, 1.0), kw_only=True)
    out_of_bounds: OutOfBounds = field(default="check", kw_only=True)
    mode: Literal["keep", "eval"] = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"{type(self).__name__}: expected a threat model such as Linf(8 / 255), got "
                f"{type(self.threat).__name__}. The model is given when the attack is called: attack(model, x, y)."
            )
        if self.mode not in ("keep", "eval"):
            raise ValueError(f'{type(self).__name__}: mode is "keep" or "eval", got {self.mode!r}.')

    @property
    @abstractmethod
    def name(self) -> str:
        """What a table calls it."""

    @property
    def uses_gradients(self) -> bool:
        """Whether it asks for gradients of the model; one that does not should never do better than one that does."""
        return True

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, index: Tensor | None = None) -> Tensor:
        """Perturb a batch.

        Args:
            model: Any function from x to logits.
            x: Clean inputs ``(B, ...)``, float32 or float64.
            y: Labels as the attack's loss takes them; the classes to reach if targeted.
            index: With a seed, the position of each sample in its data set.

        Returns:
            The perturbed inputs, detached.

        Raises:
            ValueError: If x lies outside of the bounds or is not finite, eps is in another unit, or labels do not fit.
            TypeError: If x is in half precision, the model returns no tensor, or it is no module for ``mode="eval"``.
            RuntimeError: If the losses are NaN or do not depend on the input, or if samples leave inside a transform.
        """
        with self._ready(model):
            return self._perturb(self._point(model, x, y), index)

    def move(self, point: Point, *, differentiable: bool = True) -> Point:
        """The point to which the attack moves a batch, and where a training step is then taken.

        What it has found where it started is left in ``point.first_step``, a :class:`gradreg.point.FirstStep`.
        Unless it has a criterion of its own, the attack raises the loss of the point. Its passes draw the same random
        numbers as the step's own pass.

        Args:
            point: The batch, at its clean input.
            differentiable: Whether input gradients will be asked for there.
        """
        return point.at(self.perturb(point), differentiable=differentiable, counts=True)

    def perturb(self, point: Point) -> Tensor:
        """The perturbed inputs of a point, detached."""
        with self._ready(point.batch.model, warns=False):
            return self._perturb(point, self._index(point))

    def _index(self, point: Point) -> Tensor | None:
        """The numbers that noise from a seed is drawn by; without a seed it is drawn for the batch."""
        return None if getattr(self, "seed", None) is None else point.batch.index

    def check(self, x: Tensor) -> None:
        """Raise unless x is a batch that can be attacked: finite, within the bounds, eps in its units.

        Raises:
            ValueError: If it is not.
            TypeError: If it is in half precision, or no floating-point tensor.
        """
        check_attackable(x, self.threat, self.bounds, self.out_of_bounds, look=True)

    def seeded(self, seed: int) -> "Attack":
        """The attack with noise from this seed, if it draws any and has no seed of its own."""
        changes: dict[str, Any] = {"seed": seed}
        return replace(self, **changes) if getattr(self, "seed", seed) is None else self

    def for_evaluation(self, seed: int) -> "Attack":
        """The attack as an evaluation runs it, which scores the result itself."""
        return self.seeded(seed)

    def scaled(self, factor: Eps) -> "Attack":
        """The same attack on a ball ``factor`` times as large, with steps as much longer."""
        return replace(self, threat=self.threat.scaled(factor))

    @abstractmethod
    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        """The attack itself, on the labels and by the forward passes of a point."""

    def _point(self, model: Model, x: Tensor, y: Tensor) -> Point:
        """The batch to attack, by passes that draw random numbers of their own, as a randomised defence does."""
        if isinstance(y, Tensor):
            y = outside_inference_mode(y).to(x.device)
        checks.check_input(x)
        look = may_look(self, x)
        batch = Batch(model, cross_entropy, Inputs(x), y, InputOnly(), of_classes=True, look=look)
        return Point.of(batch, x, counts=False)

    def _check(self, point: Point) -> bool:
        """Raise unless the batch of a point can be attacked; returns whether values may be looked at."""
        look = point.batch.look and not point.batch.checked
        check_attackable(point.x, self.threat, self.bounds, self.out_of_bounds, look)
        return look

    @contextmanager
    def _ready(self, model: object, *, warns: bool = True) -> Iterator[None]:
        """The model in the mode to attack it in, nothing of it moving, and grad enabled."""
        # In a transform it is copies of the buffers that move.
        still = nullcontext() if in_transform() else modes.frozen_statistics(model)
        with self._mode(model, warns), still, grad_enabled():
            yield

    def _mode(self, model: object, warns: bool) -> AbstractContextManager[None]:
        if self.mode == "eval":
            return modes.evaluating(model)
        if not warns:
            return nullcontext()
        norms = [module for module in modes.batch_norms(model) if module.training]
        for modules, effect in (
            (norms, "the gradient of a sample depends on the other samples of its batch"),
            (modes.dropouts(model), "every step sees another model"),
        ):
            if modules:
                checks.warn(
                    f"{type(self).__name__}: {type(modules[0]).__name__} is in training mode, so that {effect}. "
                    'Attack in evaluation mode with mode="eval", or call model.eval() first.'
                )
        return nullcontext()


@dataclass(frozen=True, eq=False)
class LossAttack(Attack):
    """An attack that raises a loss of the model's logits.

    Attributes:
        criterion: Per-sample loss ``(logits, y) -> (B,)`` to raise. Labels may be classes or probabilities wherever it
            takes them. Default: cross-entropy; inside an objective, the objective's own.
        targeted: Whether y are classes to reach: the loss is then lowered.
    """

    criterion: Criterion | None = field(default=None, kw_only=True)
    targeted: bool = field(default=False, kw_only=True)

    def _losses_at(self, point: Point) -> LossesAt:
        """The function to ascend; looks at the labels' values once, if at all."""
        criterion = point.batch.criterion if self.criterion is None else self.criterion
        known, count = is_classification(criterion), len(point.x)
        look, around = point.batch.look, InputOnly().around(point.batch.model, point.x)

        def losses_at(z: Tensor, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            nonlocal look
            with around(z):
                logits = point.logits_at(z, rows)
            point.known.setdefault("first logits", detached(logits))
            labels = point.batch.y if len(rows) == count else taken(point.batch.y, rows, count)
            if known:
                checks.check_labels(logits, labels, look=look)
                look = False
            losses = point.loss_of(logits, labels, criterion)
            done = self._done(logits, labels)
            losses = -losses if self.targeted else losses
            return losses if done is None else (losses, done)

        return losses_at

    def _slope(self, point: Point) -> Tensor:
        """The gradient of what is to be raised at a point, which computes it unless it has it."""
        criterion, batch, of = self.criterion, point.batch, None
        if criterion is not None:
            if is_classification(criterion):
                checks.check_labels(point.logits, batch.y, look=batch.look)
            of = partial(point.loss_of, criterion=criterion)
        # The graph of the step's own point is still needed.
        grad = point.slope(of, create_graph=False, last=not (point.counts or point.batch.trains_start))
        if batch.look and not batch.checked and bool(grad.isnan().any()):
            raise RuntimeError(
                "The gradient is NaN, so that there is nothing to ascend. Look at the model's logits on clean inputs."
            )
        return -grad.detach() if self.targeted else grad.detach()

    def _done(self, logits: Any, y: Any) -> Tensor | None:
        """Which samples need no further search; None for an attack that searches to its end."""
        return None

    def _loss_name(self) -> str:
        """How a table calls the criterion; nothing for cross-entropy."""
        if self.criterion is None or self.criterion is cross_entropy:
            return ""
        return getattr(self.criterion, "__name__", type(self.criterion).__name__)

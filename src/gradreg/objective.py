"""The training objective: the loss that you have, where it is taken, and penalties."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradreg import checks, model_checks, modes
from gradreg.attacks import Attack, RememberedStart
from gradreg.collapse import CollapseAlarm
from gradreg.controllers import Controller, Measured, Measurement
from gradreg.criteria import Criterion, cross_entropy, is_classification
from gradreg.differentiation import Differentiation, DoubleBackward, InputOnly, Requests
from gradreg.gradients import in_transform
from gradreg.passes import IN, Cost, count
from gradreg.point import Batch, Model, Parts, Point
from gradreg.replay import EagerReplay, TransformedReplay
from gradreg.selectors import ClassSelector
from gradreg.terms import Term, Weight, checked_weight, needs_two_arguments, scheduled
from gradreg.trees import Inputs, usable

_NUMBER = (int, float)
_TRIED = 60  # samples of the step that cost() takes: shares of them are whole numbers


class PenalizedOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        total: What to call ``backward()`` on: ``loss_weight * loss + sum of weight * mean penalty``.
        loss: The batch mean of the criterion, where the loss was taken.
        logits: The model's output there.
        penalties: By name, the penalties that had a weight at this step: per sample ``(B,)``, unweighted, without a
            graph. With a ``fraction`` of the batch, only of the samples that were drawn.
        x: Where the loss was taken: the input itself, or the noisy or attacked one.
        clean_logits: The model's output for the input itself, if the step has computed it.
    """

    total: Float[Tensor, ""]
    loss: Float[Tensor, ""]
    logits: Any
    penalties: dict[str, Tensor]
    x: Tensor
    clean_logits: Any = None


@final
class PenalizedLoss(nn.Module):
    r"""A loss, taken at clean, noisy or attacked inputs, with penalties: ``objective(model, x, y).total.backward()``.

    .. math:: L = \lambda_0 \frac1B \sum_b \ell(f(z_b), y_b) + \sum_k \lambda_k(t) \frac1B \sum_b R_k(z_b)

    with :math:`z_b` the input itself or where ``at`` moves it. Three objectives in one line each:

        >>> from gradreg import NFGSM, GradNormPenalty, Linf, PGDAttack
        >>> recommended = PenalizedLoss(at=NFGSM(Linf(8 / 255), share=0.5))
        >>> thesis = PenalizedLoss(terms={"grad_norm": Term(GradNormPenalty(Linf(4 / 255)), 1.2)}, loss_weight=0.8)
        >>> adversarial = PenalizedLoss(at=PGDAttack(Linf(8 / 255), steps=3, best=False))

    The first is the cheapest that is robust: half of the batch is noisy, the other half attacked by one step from
    noise, at 1.33 natural steps. The second is equation 4.1 of Rodríguez Muñoz, "Adversarial robustness without
    perturbations" (MIT 2024).

    Works eagerly, and under ``torch.func`` transforms and whole-step ``torch.compile``, where ``model`` may be a
    function such as ``lambda x: functional_call(module, params, (x,))``. Under ``DistributedDataParallel`` wrap a
    :class:`PenalizedModel`.

    Args:
        criterion: The loss, ``criterion(logits, y) -> (B,)``: any PyTorch loss with ``reduction="none"``, or any
            function of what the model returns and y. Labels are checked only for losses of classes.
        terms: The penalties by name.
        at: Where loss and penalties are taken: None for the input itself, :class:`gradreg.Noise`, or any attack. The
            attack raises this very loss unless it has a criterion of its own. It finds the model in the mode that it
            is in, with the step's own random numbers, and moves no running statistic; ``mode="eval"`` attacks in
            evaluation mode. One forward pass of the whole batch then trains (two, where a part was attacked by a
            network that draws random numbers).
        loss_weight: Factor of the loss's batch mean: a number or a schedule.
        differentiation: How the input gradients in penalties depend on the weights: :class:`gradreg.DoubleBackward`
            (exact) or :class:`gradreg.FiniteDifference`.
        fraction: The share of the batch whose penalties are computed, drawn anew at every call. The expected gradient
            is that of all samples, for penalties and criteria of one sample at a time. Not for models that normalise
            by the statistics of the batch.
        perturb: Where x is a tuple, given as ``model(*x)``, or a mapping, given as ``model(**x)``: the position or key
            of the tensor to perturb. Default: the first one of real numbers, in a mapping the only one.
        output: Reads from the model's output what the criterion takes. Default: its ``.logits`` or ``["logits"]`` if it
            has any, and all of it if not.
        inner_scale: Factor on a score while its input gradient is taken, divided out in float32. For float16, whose
            range ends at 6e-8: a constant such as ``2**10`` keeps small gradients from flushing to 0.
        alarm: Warns when training against an attack of one step collapses: :class:`gradreg.CollapseAlarm`.
        validate: Whether to look at the values of x and y at every call also where that synchronises (on a GPU).

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> out = thesis(model, torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> out.total.backward()
        >>> out.penalties["grad_norm"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        criterion: Criterion = cross_entropy,
        terms: Mapping[str, Term] | None = None,
        *,
        at: Attack | None = None,
        loss_weight: Weight = 1.0,
        differentiation: Differentiation | None = None,
        fraction: float = 1.0,
        perturb: str | int | None = None,
        output: Callable[[Any], Any] | None = None,
        inner_scale: float = 1.0,
        alarm: CollapseAlarm | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(criterion, {} if terms is None else terms, at, differentiation)
        if isinstance(loss_weight, int | float):
            checked_weight(loss_weight)
        if not inner_scale > 0:
            raise ValueError(f"PenalizedLoss: inner_scale must be above 0, got {inner_scale}.")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"PenalizedLoss: fraction is the share of the batch that is penalised, in (0, 1]; got {fraction}. "
                "Without any, pass no terms."
            )
        self.criterion = criterion
        self._of_classes = is_classification(criterion)
        self.terms = dict(terms or {})
        # Registered, so that objective.to(device) moves what they hold, and the state of controllers is saved with it.
        parts: list[object] = [part for term in self.terms.values() for part in (term.penalty, term.weight)]
        attacks = [at, *(getattr(term.penalty, "at", None) for term in self.terms.values())]
        starts = [getattr(attack, "start", None) for attack in attacks]
        parts += [loss_weight, *starts]
        self._parts = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.at = at
        self.loss_weight = loss_weight
        self.alarm = alarm
        weights = [loss_weight, *(term.weight for term in self.terms.values())]
        see_measured = any(map(needs_two_arguments, weights))
        self.measured = Measurement(_measured_names(weights, self.terms, at)) if see_measured else None
        self.differentiation = DoubleBackward() if differentiation is None else differentiation
        self.fraction = fraction
        self.perturb = perturb
        self.output = output
        self.inner_scale = inner_scale
        self.validate = validate

    def forward(
        self,
        model: Model,
        x: Any,
        y: Any = None,
        t: float | None = None,
        *,
        classes: Tensor | None = None,
        index: Tensor | None = None,
    ) -> PenalizedOutput:
        """The objective on one batch.

        Args:
            model: Any function from x to logits; its modes and parameters are used as they are. Give an ``nn.Module``
                where there is one: what a plain function calls cannot be checked.
            x: Inputs, ``(B, ...)``, or a tuple or mapping of them. They need not require grad, and no gradient is
                accumulated in them.
            y: Labels, as the criterion takes them.
            t: The optimiser step, for the schedules.
            classes: Classes ``(B,)`` instead of every class selector's choice, where none may be drawn
                (``torch.func.vmap``) or two models are to be compared on the same ones.
            index: The numbers ``(B,)`` of the samples in their data set, for what is kept or drawn by sample.

        Returns:
            Total, loss, logits and penalties, and where they were taken.

        Raises:
            TypeError: If x is not real, or the model returns no tensor, or labels are of the wrong type.
            ValueError: If the criterion does not return one loss per sample, labels or pixels are out of range, eps
                is in another unit than x, a schedule is used without t.
            RuntimeError: If nothing could be trained: grad is disabled, all parameters are frozen, x carries a graph,
                or the model is wrapped in a way that makes double backward wrong (each message names the fix).
        """
        transformed, at = in_transform(), self.at
        measured, weights = None if self.measured is None else self._last_measured(transformed), {}
        own = self.loss_weight
        loss_weight = own if isinstance(own, _NUMBER) else scheduled(own, t, measured)
        for name, term in self.terms.items():
            weight = term.weight if isinstance(term.weight, _NUMBER) else scheduled(term.weight, t, measured)
            if isinstance(weight, Tensor) or weight:  # one that is a tensor is not looked at
                weights[name] = weight
        batch = self._batch_of(model, x, y, classes, index, weights, transformed)
        point = Point.of(batch, batch.inputs.x, differentiable=bool(at or weights), counts=at is None)
        where = point if at is None else at.move(point, differentiable=bool(weights) or self.alarm is not None)
        if point is not where:
            # Taken from the clean point, which would else hold a point that holds it.
            where.moved_from, where.first_step, point.first_step = point, point.first_step, None
            if point.known and not batch.trains_start:  # what is known of the clean input is not needed any more
                point.release()
        where, part = self._split(where) if weights and self.fraction < 1 else (where, where)
        loss = where.losses.mean()
        penalties: dict[str, Tensor] = {}

        def total_of_terms() -> Tensor:
            total = loss_weight * loss
            for name, weight in weights.items():
                values = self.terms[name].penalty(part)
                if not isinstance(values, Tensor) or values.shape != part.x.shape[:1]:
                    raise _wrong_shape(name, values, part.x)
                total = total + weight * values.mean()
                penalties.setdefault(name, values.detach())  # of the first time: inside a transform there is a second
            return total

        total = batch.differentiation.completed(total_of_terms, batch.requests)
        if batch.met is not None and not batch.met.graph_seen and weights:
            model_checks.check_graph(batch.met, part.logits, self.differentiation.second_order)
        if self.training and (self.measured is not None or self.alarm is not None):
            self._measure(where, loss, penalties)
        clean = where.known.get("origin", point).known
        clean_logits = clean.get("logits", clean.get("constant logits"))
        return PenalizedOutput(total, loss, where.logits, penalties, where.x, clean_logits)

    def cost(self, t: float | None = None, *, shape: Sequence[int] = (3, 16, 16), classes: int = 10) -> Cost:
        """What a step runs, counted before there is a model: forward and backward passes, and their sum.

        The objective takes one step on random images and a small network without dropout or BatchNorm. Random numbers,
        controllers and remembered starts are left as they are. An attack with ``early_stop`` costs less than it says.

        Args:
            t: The optimiser step, for the schedules.
            shape: Of an image, where penalties, radii or bounds need a certain one.
            classes: Of the network, for penalties that depend on their number.

        Raises:
            RuntimeError: If a penalty cannot be taken on images of this shape and labels 0.

        Example:
            >>> from gradreg import NFGSM, Linf
            >>> cost = PenalizedLoss(at=NFGSM(Linf(8 / 255), share=0.5)).cost()
            >>> cost
            Cost(forward=1.5, input_backward=1.5, weight_backward=1.0, double_backward=0.0)
            >>> round(cost.natural_steps, 2)
            1.33
        """
        if classes > IN:
            raise ValueError(f"PenalizedLoss.cost: passes are counted with at most {IN} classes, got {classes}.")
        cpu, starts = torch.device("cpu"), [part for part in self._parts if isinstance(part, RememberedStart)]
        shape = tuple(starts[0].perturbations.shape[1:] if starts else shape)
        tried = copy.copy(self)
        tried._modules = {name: module for name, module in self._modules.items() if name != "criterion"}
        tried.criterion, tried._of_classes, tried.perturb, tried.output = cross_entropy, True, None, None
        with modes.evaluating(tried), modes.replayed(modes.random_state(cpu), cpu), torch.enable_grad():
            # Between -1/2 and 1/2, where neither radii nor bounds in any unit look wrong.
            x, y = torch.rand(_TRIED, *shape) - 0.5, torch.zeros(_TRIED, dtype=torch.int64)
            model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.GELU(), nn.Linear(8, classes))
            try:
                return count(model, lambda probe: tried(probe, x, y, t, index=y).total.backward(), _TRIED)
            except Exception as error:
                raise RuntimeError(
                    f"PenalizedLoss.cost: a step on images of shape {tuple(shape)} with {classes} classes raised "
                    f"{type(error).__name__}: {error} Say the step, cost(t=...), or another shape=."
                ) from error

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        settings = ("terms", "at", "loss_weight", "differentiation", "fraction")
        return ", ".join(f"{name}={getattr(self, name)}" for name in settings)

    def _last_measured(self, transformed: bool) -> Measured:
        """What the last step has measured, for the weights that see it."""
        assert self.measured is not None
        if transformed and not torch.compiler.is_compiling():
            raise RuntimeError(
                "PenalizedLoss: a weight that sees what was measured has a state, which a torch.func transform cannot "
                "change. Take the step eagerly, or give the weight as a schedule of t."
            )
        return self.measured.latest()

    @torch.no_grad()
    def _measure(self, where: Point, loss: Tensor, penalties: Mapping[str, Tensor]) -> None:
        """Remember for the next step what this one has found."""
        if self.alarm is not None:
            self.alarm.observe(where, alone=not penalties)
        if self.measured is not None:
            start = {} if where.first_step is None else {"start": where.first_step.losses.mean()}
            means = {"loss": loss, **start, **{name: values.mean() for name, values in penalties.items()}}
            self.measured.take(means, loss.device)

    def _batch_of(
        self,
        model: Model,
        x: Any,
        y: Any,
        classes: Tensor | None,
        index: Tensor | None,
        weights: Mapping[str, float | Tensor],
        transformed: bool,
    ) -> Batch:
        """The batch, checked."""
        inputs, look, met = Inputs(x, self.perturb), False, None
        checks.check_input(inputs.x)
        how = self.differentiation if weights else InputOnly()
        repeats = transformed or self.at is not None or self.fraction < 1 or how.looks_elsewhere
        unit, trains_start = None, False
        places: list[object] = [self.at]
        for name in weights:
            penalty = self.terms[name].penalty
            unit = unit or getattr(penalty, "threat", None)
            repeats = repeats or getattr(penalty, "looks_elsewhere", True)
            places.append(penalty)
            trains_start = trains_start or getattr(penalty, "trains_start", False)
        if not transformed:
            if inputs.x.grad_fn is not None:
                raise RuntimeError(
                    "x carries a graph, which a gradient with respect to it would cut. Make what computes x a part of "
                    "the model, or pass x.detach() if nothing before it is to be trained."
                )
            if not isinstance(y, Tensor) or y.is_inference():
                y = usable(y)
            look = checks.may_look(self, inputs.x, self.validate)
            met = model_checks.check_model(self, model, how if weights else None)
            if look:
                checks.check_units(inputs.x, places, normalized=met is not None and met.normalizes)
        kind = TransformedReplay if transformed else EagerReplay
        replay = kind(model, self.criterion, inputs.x.device) if repeats else None
        known: list[tuple[ClassSelector | None, Tensor]] = [] if classes is None else [(None, classes)]
        return Batch(
            model, self.criterion, inputs, y, how, self.output, self._of_classes, self.inner_scale,
            index=index, look=look, checked=True, met=met, replay=replay, requests=Requests(replay, unit),
            classes=known, trains_start=trains_start,
        )  # fmt: skip

    def _split(self, whole: Point) -> tuple[Point, Point]:
        """The batch in two parts, and the one whose penalties are computed: a share of the samples, drawn at random."""
        count = max(1, round(self.fraction * len(whole.x)))
        if count == len(whole.x):
            return whole, whole
        model_checks.check_samples_are_apart(whole.batch.model)
        if self.at is not None and whole.batch.replay is not None and whole.batch.replay.drawn_from:
            raise RuntimeError(
                "PenalizedLoss: the model draws random numbers, and with a fraction the parts of the batch draw others "
                "than the attack has met. Leave fraction=1."
            )
        if coupled := [name for name, term in self.terms.items() if getattr(term.penalty, "of_batch", False)]:
            raise ValueError(
                f"PenalizedLoss: term {coupled[0]!r} is of the whole batch, and of a part of it another function. "
                "Leave fraction=1, or take a penalty of each sample."
            )
        self._check_radii(whole.x)
        rows = torch.randperm(len(whole.x), device=whole.x.device).tensor_split([count])
        parts = [whole.rows(rows[0], counts=True), whole.rows(rows[1], differentiable=False)]
        together = Parts(whole, parts, rows)
        together.moved_from, together.first_step = whole.moved_from, whole.first_step
        return together, parts[0]

    def _check_radii(self, x: Tensor) -> None:
        for name, term in self.terms.items():
            eps = getattr(getattr(term.penalty, "threat", None), "eps", None)
            if isinstance(eps, Tensor) and eps.ndim == x.ndim and eps.shape[0] != 1:
                raise ValueError(
                    f"PenalizedLoss: term {name!r} has a radius for each sample, {tuple(eps.shape)}, and with fraction="
                    f"{self.fraction} only some samples are penalised, drawn inside. Give one radius, or fraction=1."
                )


@final
class PenalizedModel(nn.Module):
    """A model and its objective as one module: ``forward(x, y, t)`` returns the :class:`PenalizedOutput`.

    Wrappers that act on a module's forward pass, such as ``DistributedDataParallel``, then see one forward in which the
    input gradient is already taken. That is right under every option of DDP; an input gradient taken outside of the
    wrapped forward is not (``static_graph=True`` silently stops synchronising).

    Args:
        model: The model. Its parameters are named ``model.*`` here; save ``penalized.model.state_dict()``.
        objective: What to train it with.

    Example:
        >>> from gradreg import NFGSM, Linf
        >>> objective = PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))
        >>> penalized = PenalizedModel(nn.Linear(4, 3), objective)  # DistributedDataParallel(penalized)
        >>> penalized(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).total.backward()
    """

    def __init__(self, model: nn.Module, objective: PenalizedLoss) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        x: Any,
        y: Any = None,
        t: float | None = None,
        *,
        classes: Tensor | None = None,
        index: Tensor | None = None,
    ) -> PenalizedOutput:
        """The objective of the model on one batch; see :meth:`PenalizedLoss.forward`."""
        return self.objective(self.model, x, y, t, classes=classes, index=index)


def _check_settings(
    criterion: Criterion, terms: Mapping[str, Term], at: Attack | None, differentiation: Differentiation | None
) -> None:
    reduction = getattr(criterion, "reduction", "none")
    if reduction != "none":
        raise ValueError(
            f"PenalizedLoss: the criterion has reduction={reduction!r}, and every sample's own loss is needed: "
            f'{type(criterion).__name__}(reduction="none").'
        )
    if not isinstance(terms, Mapping):
        raise TypeError(f'PenalizedLoss: terms are named, {{"grad_norm": Term(...)}}; got {type(terms).__name__}.')
    wrong = {name: type(term).__name__ for name, term in terms.items() if not isinstance(term, Term)}
    if wrong:
        raise TypeError(f"PenalizedLoss: terms are Term(penalty, weight), got {wrong}.")
    if not isinstance(at, Attack | None):
        raise TypeError(
            f"PenalizedLoss: at is an attack or Noise, such as NFGSM(Linf(8 / 255), share=0.5); got {at!r}."
        )
    if not isinstance(differentiation, Differentiation | None) or (differentiation and differentiation.constant):
        raise TypeError(
            f"PenalizedLoss: differentiation is DoubleBackward() or FiniteDifference(0.25), got {differentiation!r}."
        )


def _measured_names(weights: Sequence[object], terms: Mapping[str, Term], at: Attack | None) -> list[str]:
    """What the weights see: raises where a name or a controller would stand for two things."""
    if taken := {"loss", "start"} & terms.keys():
        raise ValueError(
            f"PenalizedLoss: a weight sees what was measured, and {min(taken)!r} is the loss there: give the term "
            "another name."
        )
    controllers = [weight for weight in weights if isinstance(weight, Controller)]
    if at is None and any(getattr(controller, "name", None) == "start" for controller in controllers):
        raise ValueError(
            'PenalizedLoss: a weight watches "start", where an attack starts, and there is none: give at=....'
        )
    if len(set(controllers)) < len(controllers):
        raise ValueError("PenalizedLoss: a controller of two terms would move twice a step. Give each one of its own.")
    return ["loss", "start", *terms]


def _wrong_shape(name: str, values: object, x: Tensor) -> ValueError:
    found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    return ValueError(
        f"PenalizedLoss: the penalty of term {name!r} returned {found}; expected one number per sample, ({len(x)},). "
        "Reduce it over all dimensions but the first."
    )

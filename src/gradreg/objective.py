"""The training objective: the loss that the user already has, plus penalties on input gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradreg import checks, model_checks
from gradreg.criteria import Criterion
from gradreg.differentiation import Differentiation, DoubleBackward, FiniteDifference, PenaltyFunction
from gradreg.gradients import in_transform
from gradreg.normalization import normalizes
from gradreg.penalties import GradNormPenalty
from gradreg.schedules import Schedule
from gradreg.scoring import EagerForward, Forward, Model, SingleForward, SplitForward, TransformedForward, drawn
from gradreg.second_derivatives import FirstDerivatives, SecondDerivatives
from gradreg.selectors import ClassSelector
from gradreg.threat_models import Bounds, Linf, ThreatModel, bounds_like, clamped_


@final
@dataclass(frozen=True)
class Term:
    """One penalty of an objective.

    Attributes:
        penalty: A :class:`gradreg.penalties.Penalty`, or any function of ``(grad, x)`` that returns one number per
            sample.
        weight: Factor of the penalty's batch mean in the total, at least 0: a number, or a schedule of the step ``t``.
            At steps where it is 0 the term costs nothing.
        of: What is differentiated with respect to the input: the loss (default), or the logit of the class that a
            selector chooses.

    Example:
        >>> from gradreg import EdgeAlignmentPenalty, linear_ramp, sampled_class
        >>> Term(EdgeAlignmentPenalty(), weight=linear_ramp(0.5, duration=100), of=sampled_class(0.5)).weight_at(50)
        0.25
    """

    penalty: PenaltyFunction
    weight: float | Schedule = 1.0
    of: ClassSelector | None = None

    def __post_init__(self) -> None:
        if not callable(self.penalty):
            raise TypeError(
                f"Term: a penalty is a function of (grad, x), such as GradNormPenalty(Linf(4 / 255)); got "
                f"{self.penalty!r}."
            )
        if self.of is not None and not isinstance(self.of, ClassSelector):
            raise TypeError(
                f"Term: `of` is None for the loss, or a class selector such as sampled_class(0.5); got {self.of!r}."
            )
        if not callable(self.weight):
            _checked_weight(self.weight, "Term")

    def weight_at(self, t: float | None) -> float:
        """The weight at step t."""
        return _weight_at(self.weight, t, "Term")


class PenalizedOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        total: What to call ``backward()`` on: ``loss_weight * loss + sum of weight * mean penalty``.
        loss: The batch mean of the user's own loss.
        logits: The model's output.
        penalties: Each penalty that had a weight at this step, per sample ``(B,)`` and unweighted, by the name of its
            term. With a ``fraction`` of the batch, only of the samples that were drawn.
    """

    total: Float[Tensor, ""]
    loss: Float[Tensor, ""]
    logits: Tensor
    penalties: dict[str, Tensor]


@final
class PenalizedLoss(nn.Module):
    r"""A loss with penalties on input gradients: ``objective(model, x, y).total`` for ``criterion(model(x), y)``.

    .. math:: L = \lambda_0 \frac1B \sum_b \ell_b + \sum_k \lambda_k(t) \frac1B \sum_b R_k(\nabla_{x_b} s_{k,b},\, x_b)

    where the score :math:`s_k` is the loss :math:`\ell` or the logit of a chosen class. The model runs once; each
    distinct score is differentiated once, whatever the number of its penalties. The thesis's objective (Rodríguez
    Muñoz, "Adversarial robustness without perturbations", MIT 2024, equation 4.1) has one term, a
    :class:`gradreg.GradNormPenalty` of ``Linf(4 / 255)`` with weight 1.2, and ``loss_weight=0.8``.

    Works eagerly, and under ``torch.func`` transforms and whole-step ``torch.compile``, where ``model`` is a function
    such as ``lambda x: functional_call(module, params, (x,))``. Under ``DistributedDataParallel`` wrap a
    :class:`PenalizedModel`.

    Args:
        criterion: The loss, ``criterion(logits, y) -> (B,)``: any PyTorch loss with ``reduction="none"``. Hard labels,
            class probabilities and mixup labels all work if they work there.
        terms: The penalties by name.
        loss_weight: Factor of the loss's batch mean: a number or a schedule.
        differentiation: How the penalties' gradients reach the weights: :class:`gradreg.DoubleBackward` (exact) or
            :class:`gradreg.FiniteDifference`.
        noise: A ball in which the whole objective, loss and penalties, is taken at a random point around x, one for
            each sample: ``Linf(4 / 255)``. In expectation that is the objective smoothed over the ball. The points are
            clamped to the bounds of the penalties, if these have any.
        fraction: The share of the batch whose penalties are computed, drawn anew at every call: 0.25 is a quarter, at
            a quarter of the cost beside the loss. The expected gradient is that of all samples, for penalties and
            criteria of one sample at a time. Not for models that normalise by the statistics of the batch; and
            running statistics of InstanceNorm are moved by parts of the batch.
        inner_scale: Factor on the score while the input gradient is taken, divided out in float32. For float16, whose
            range ends at 6e-8: a constant such as ``2**10`` keeps small gradients from flushing to 0. Any other type
            needs none.
        validate: Whether to look at the values of x and y at every call also where that synchronises (on a GPU).

    Example:
        >>> from gradreg import GradNormPenalty, Linf
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        >>> objective = PenalizedLoss(
        ...     nn.CrossEntropyLoss(reduction="none"),
        ...     {"grad_norm": Term(GradNormPenalty(Linf(8 / 255)), weight=1.2)},
        ...     loss_weight=0.8,
        ... )
        >>> out = objective(model, torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> out.total.backward()
        >>> out.penalties["grad_norm"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        criterion: Criterion,
        terms: Mapping[str, Term],
        *,
        loss_weight: float | Schedule = 1.0,
        differentiation: Differentiation | None = None,
        noise: ThreatModel | None = None,
        fraction: float = 1.0,
        inner_scale: float = 1.0,
        validate: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(terms, Mapping):
            raise TypeError(f'PenalizedLoss: terms are named, {{"grad_norm": Term(...)}}; got {type(terms).__name__}.')
        if not isinstance(differentiation, Differentiation | None):
            raise TypeError(
                "PenalizedLoss: differentiation is DoubleBackward() or FiniteDifference(0.25), got "
                f"{differentiation!r}."
            )
        reduction = getattr(criterion, "reduction", "none")
        if reduction != "none":
            raise ValueError(
                f"PenalizedLoss: the criterion has reduction={reduction!r}; a penalty needs every sample's own loss: "
                f'{type(criterion).__name__}(reduction="none").'
            )
        wrong = {name: type(term).__name__ for name, term in terms.items() if not isinstance(term, Term)}
        if wrong:
            raise TypeError(f"PenalizedLoss: terms are Term(penalty, weight), got {wrong}.")
        if not callable(loss_weight):
            _checked_weight(loss_weight, "loss_weight")
        if not inner_scale > 0:
            raise ValueError(f"PenalizedLoss: inner_scale must be above 0, got {inner_scale}.")
        if not isinstance(noise, ThreatModel | None):
            raise TypeError(f"PenalizedLoss: noise is a ball to draw from, such as Linf(4 / 255); got {noise!r}.")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"PenalizedLoss: fraction is the share of the batch that is penalised, in (0, 1]; got {fraction}. "
                "Without any, pass no terms."
            )
        self._one_pass = isinstance(differentiation, FiniteDifference) and differentiation.one_pass
        for name, term in terms.items():
            if self._one_pass and (term.of is not None or not isinstance(term.penalty, GradNormPenalty)):
                raise ValueError(
                    f"PenalizedLoss: term {name!r} is not a GradNormPenalty of the loss, and FiniteDifference(one_pass="
                    "True) works for no other. Use one_pass=False."
                )
        self.criterion = criterion
        self.terms = dict(terms)
        self._names_by_score = _grouped(self.terms)
        # Registered, so that objective.to(device) moves what a penalty of the user's own may hold.
        self._penalties = nn.ModuleList(t.penalty for t in self.terms.values() if isinstance(t.penalty, nn.Module))
        self.loss_weight = loss_weight
        self.differentiation = DoubleBackward() if differentiation is None else differentiation
        self.noise = noise
        self._bounds = _common_bounds(self.terms) if noise is not None else None
        self.fraction = fraction
        self.inner_scale = inner_scale
        self.validate = validate

    def forward(
        self, model: Model, x: Tensor, y: Tensor, t: float | None = None, *, classes: Tensor | None = None
    ) -> PenalizedOutput:
        """The objective on one batch.

        Args:
            model: Any function from x to logits; its modes and parameters are used as they are. Give an ``nn.Module``
                where there is one: what a plain function calls cannot be checked.
            x: Inputs, ``(B, ...)``. They need not require grad, and no gradient is accumulated in them.
            y: Labels, as the criterion takes them.
            t: The optimiser step, for the schedules.
            classes: Classes ``(B,)`` to use in the place of every class selector's choice, where none may be drawn
                (``torch.func.vmap``) or two models are to be compared on the same ones.

        Returns:
            Total, loss, logits and penalties, all with their graph.

        Raises:
            TypeError: If x is not real, or the model returns no tensor, or labels are of the wrong type.
            ValueError: If the criterion does not return one loss per sample, labels or pixels are out of range, eps
                is in another unit than x, a schedule is used without t.
            RuntimeError: If nothing could be trained: grad is disabled, all parameters are frozen, x carries a graph,
                or the model is wrapped in a way that makes double backward wrong (each message names the mend).
        """
        loss_weight = _weight_at(self.loss_weight, t, "loss_weight")
        weights = {name: term.weight_at(t) for name, term in self.terms.items()}
        active = [name for name, weight in weights.items() if weight > 0]
        checks.check_input(x)
        transformed = in_transform()
        look = not transformed and checks.may_look(self, x, self.validate)
        first = not transformed and bool(active) and model_checks.is_first_meeting(self, model, self.differentiation)
        if look:
            self._check_values(model, x, active)
        if not transformed:
            checks.check_no_graph(x)
            x = x.detach()
        if self.noise is not None:
            x = x + self.noise.sample_like(x)
            if self._bounds is not None:
                x = clamped_(x, bounds_like(self._bounds, x))

        count = drawn(len(x), self.fraction)
        # A compiled region takes no gradient in one pass, and cannot ask for the value of a weight that changes.
        losses_count = transformed or not self.differentiation.cancels(
            loss_weight, sum(weights.values()) * len(x) / count
        )

        def forward_of(x: Tensor, y: Tensor, penalised: bool) -> SingleForward:
            if transformed:
                return TransformedForward(model, self.criterion, x, y, self.inner_scale)
            return EagerForward(
                model,
                self.criterion,
                x,
                y,
                self.inner_scale,
                differentiable=penalised,
                replay=penalised and self.differentiation.looks_elsewhere,
                one_pass=penalised and self._one_pass,
                losses_count=losses_count,
                look=look,
                around=self._around(model, x) if penalised else nullcontext,
            )

        if active and count < len(x):
            model_checks.check_samples_are_apart(model)
            self._check_radii(x, active)
            forward: Forward = SplitForward(forward_of, self.criterion, x, y, self.fraction, look=look)
        else:
            forward = forward_of(x, y, bool(active))
        if first and isinstance(self.differentiation, DoubleBackward):
            model_checks.warn_of_fused_attention(forward.logits)
        penalties: dict[str, Tensor] = {}
        for selector, group in self._names_by_score:
            names = [name for name in group if name in active]
            if not names:
                continue
            functions = [self.terms[name].penalty for name in names]
            values = self.differentiation.penalties(forward.score(selector, classes), functions)
            for name, value in zip(names, values, strict=True):
                if value.shape != forward.x.shape[:1]:
                    raise ValueError(
                        f"PenalizedLoss: the penalty of term {name!r} returned shape {tuple(value.shape)}; expected "
                        f"one number per sample, ({len(forward.x)},). Reduce it over all dimensions but the first."
                    )
                penalties[name] = value
        forward.finish()
        loss = forward.losses.mean()
        total = loss_weight * loss
        for name, value in penalties.items():
            total = total + weights[name] * value.mean()
        logits = forward.logits
        if self._one_pass and active and not transformed:  # the graph of some of them is used up
            loss, logits = loss.detach(), logits.detach()
            penalties = {name: value.detach() for name, value in penalties.items()}
        return PenalizedOutput(total, loss, logits, penalties)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        settings = ("terms", "loss_weight", "differentiation", "noise", "fraction")
        return ", ".join(f"{name}={getattr(self, name)}" for name in settings)

    def _around(self, model: Model, x: Tensor) -> Callable[[Tensor], AbstractContextManager[object]]:
        """What the model runs within, while its input gradient is to be taken."""
        if isinstance(self.differentiation, DoubleBackward):
            return SecondDerivatives if self.differentiation.fused else nullcontext
        # A compiled model would be compiled once more for it; and it is on a CPU that there is something to gain.
        return FirstDerivatives if x.device.type == "cpu" and model_checks.is_eager(model) else nullcontext

    def _check_radii(self, x: Tensor, active: Sequence[str]) -> None:
        for name in active:
            eps = getattr(getattr(self.terms[name].penalty, "threat", None), "eps", None)
            if isinstance(eps, Tensor) and eps.ndim == x.ndim and eps.shape[0] != 1:
                raise ValueError(
                    f"PenalizedLoss: term {name!r} has a radius for each sample, {tuple(eps.shape)}, and with fraction="
                    f"{self.fraction} only some samples are penalised, drawn inside. Give one radius, or fraction=1."
                )

    def _check_values(self, model: Model, x: Tensor, active: Sequence[str]) -> None:
        lowest, highest = checks.finite_range(x)
        if isinstance(model, nn.Module) and normalizes(model):
            checks.check_not_normalized_twice(lowest, highest)
        penalties = [self.terms[name].penalty for name in active]
        balls = [(getattr(penalty, "threat", None), getattr(penalty, "bounds", None)) for penalty in penalties]
        for threat, bounds in [*balls, (self.noise, self._bounds)]:
            if bounds is not None:
                low, high = (torch.as_tensor(side) for side in bounds)
                checks.check_unit_of_bounds(lowest, highest, low.min().item(), high.max().item())
                if isinstance(threat, Linf):
                    checks.check_radius(threat.eps, high - low)
            elif isinstance(threat, Linf) and lowest >= 0 and highest <= 1:
                checks.check_radius(threat.eps, 1.0)
            elif isinstance(threat, Linf) and highest > 16 and torch.as_tensor(threat.eps).max().item() < 1:
                checks.warn(
                    f"PenalizedLoss: x reaches {highest:.3g}, as bytes do, but {threat} is in units of pixels in [0, "
                    "1]. Pass x / 255, or Linf(255 * eps)."
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
        >>> from gradreg import GradNormPenalty, L2
        >>> criterion = nn.CrossEntropyLoss(reduction="none")
        >>> objective = PenalizedLoss(criterion, {"grad_norm": Term(GradNormPenalty(L2(0.1)))})
        >>> penalized = PenalizedModel(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), objective)
        >>> penalized(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).total.backward()
    """

    def __init__(self, model: nn.Module, objective: PenalizedLoss) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, x: Tensor, y: Tensor, t: float | None = None, *, classes: Tensor | None = None
    ) -> PenalizedOutput:
        """The objective of the model on one batch; see :meth:`PenalizedLoss.forward`."""
        return self.objective(self.model, x, y, t, classes=classes)


def _common_bounds(terms: Mapping[str, Term]) -> Bounds | None:
    """The bounds that the penalties have, if any.

    Raises:
        ValueError: If they have several.
    """
    found = [bounds for term in terms.values() if (bounds := getattr(term.penalty, "bounds", None)) is not None]
    sides = [[torch.as_tensor(side) for side in bounds] for bounds in found]
    if any(not all(map(torch.equal, other, sides[0])) for other in sides):
        raise ValueError(f"PenalizedLoss: noisy points can be clamped to one range, and the penalties have {found}.")
    return found[0] if found else None


def _grouped(terms: Mapping[str, Term]) -> list[tuple[ClassSelector | None, list[str]]]:
    """The names of the terms of each distinct score, so that its gradient is taken once."""
    groups: dict[ClassSelector | None, list[str]] = {}
    for name, term in terms.items():
        groups.setdefault(term.of, []).append(name)
    return list(groups.items())


def _weight_at(weight: float | Schedule, t: float | None, name: str) -> float:
    """The value of a weight at step t."""
    if not callable(weight):
        return weight
    if t is None:
        raise ValueError(
            f"{name}: the weight is a schedule of the optimiser step; call objective(model, x, y, t=step)."
        )
    return _checked_weight(weight(t), name)


def _checked_weight(weight: float, name: str) -> float:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}: a weight must be finite and at least 0, got {weight}.")
    return weight

"""Attacks of many gradient steps."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from gradreg import checks
from gradreg.attacks.adaptive import Ascent, Halving, climb
from gradreg.attacks.attack import Attack, LossAttack
from gradreg.attacks.search import LossesAt, Search, check_index, check_search
from gradreg.attacks.starts import RememberedStart, Start, start_of
from gradreg.criteria import targeted_dlr
from gradreg.noise import noise_for
from gradreg.point import FirstStep, Model, Point
from gradreg.threat_models import Eps, rows_of, times


@dataclass(frozen=True, eq=False)
class IteratedAttack(LossAttack):
    """An attack of many gradient steps on a loss of the model's logits.

    Attributes:
        steps: Gradient steps of each restart.
        random_start: Start at uniform noise in the ball instead of at x.
        restarts: How many starts.
        best: Return the point with the highest loss of all visited, for one more forward pass, instead of the last
            point.
        early_stop: Let samples leave the search as soon as they are misclassified (targeted: classified as the target).
            Labels must then be classes, or probabilities whose largest counts.
        seed: Makes the noise reproducible, see :func:`pgd`.
    """

    steps: int = field(default=10, kw_only=True)
    random_start: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    best: bool = field(default=True, kw_only=True)
    early_stop: bool = field(default=False, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, index: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Perturb a batch, as every :class:`Attack` does.

        Args:
            model: Any function from x to logits.
            x: Clean inputs ``(B, ...)``, float32 or float64.
            y: Labels as the criterion takes them; the classes to reach if targeted.
            index: With a seed, the position of each sample in its data set.
            start: Perturbations to start at, in the place of the first random start.
        """
        with self._ready(model):
            return self._perturb(self._point(model, x, y), index, start)

    def for_evaluation(self, seed: int) -> "IteratedAttack":
        """The same search, in which fooled samples leave and the last point is scored by the evaluation alone."""
        own = self.seed if self.seed is not None else seed
        return replace(self, early_stop=True, best=self.restarts > 1, seed=own)

    def scaled(self, factor: Eps) -> "IteratedAttack":
        return replace(self, threat=self.threat.scaled(factor))

    def _done(self, logits: Any, y: Any) -> Tensor | None:
        if not self.early_stop:
            return None
        if not (isinstance(logits, Tensor) and isinstance(y, Tensor) and logits.ndim == 2 and logits.shape[1] > 1):
            raise ValueError(
                f"{type(self).__name__}: early_stop compares classes and needs logits of shape (B, K), K > 1, and "
                "labels of classes. Use early_stop=False, or pgd with a losses_at that says who is done."
            )
        reached = logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))
        return reached if self.targeted else ~reached

    def _perturb(self, point: Point, index: Tensor | None, start: Tensor | None = None) -> Tensor:
        name, x = type(self).__name__, point.x
        check_search(
            name, x, steps=self.steps, restarts=self.restarts, best=self.best, random_start=self.random_start,
            seed=self.seed, index=index,
        )  # fmt: skip
        look = self._check(point)
        search = Search(self._losses_at(point), x, self.threat, self.bounds, best=self.best, look=look)
        for delta in search.starts(
            self.restarts, start=start, random_start=self.random_start, seed=self.seed, index=index
        ):
            self._run(search, delta)
        if search.first is not None:
            z, grad = search.first
            begin = Point.of(point.batch, z, counts=False)
            begin.known["constant logits"] = point.known.pop("first logits")
            point.first_step = FirstStep(begin, grad, evaluated=self.mode == "eval")
        return search.result()

    @abstractmethod
    def _run(self, search: Search, start: Tensor) -> None:
        """The steps from one start."""


@final
@dataclass(frozen=True, eq=False)
class PGDAttack(IteratedAttack):
    """Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018).

    The default is an attack for evaluation. Adversarial training as in the thesis is
    ``PGDAttack(Linf(4 / 255), steps=3, step_size=8 / 255 / 3, best=False)``.

    Attributes:
        step_size: Length of a step in the units of eps. Default: ``2.5 * eps / steps``.
        start: Perturbations to which the noise of a random start is added: a tensor that broadcasts against x, or a
            :class:`RememberedStart`. Used only inside a :class:`gradreg.PenalizedLoss`; an attack that is called
            directly starts without it.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> x_adv = PGDAttack(Linf(8 / 255), steps=10)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    step_size: Eps | None = field(default=None, kw_only=True)
    start: Start | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        return f"PGD-{self.steps} {self._loss_name()}".strip()

    def scaled(self, factor: Eps) -> "PGDAttack":
        step_size = None if self.step_size is None else times(self.step_size, factor)
        return replace(self, threat=self.threat.scaled(factor), step_size=step_size)

    def for_evaluation(self, seed: int) -> "IteratedAttack":
        return super(PGDAttack, replace(self, start=None)).for_evaluation(seed)

    def _perturb(self, point: Point, index: Tensor | None, start: Tensor | None = None) -> Tensor:
        if start is not None or self.start is None or not point.batch.checked:
            return super()._perturb(point, index, start)
        x = point.x
        noise = noise_for(x, self.threat, self.seed, index) if self.random_start else torch.zeros_like(x)
        z = super()._perturb(point, index, start_of(self.start, point) + noise)
        if isinstance(self.start, RememberedStart):
            assert point.first_step is not None
            self.start.update(point, point.first_step.gradient, self.threat)
        return z

    def _run(self, search: Search, start: Tensor) -> None:
        step_size = self.threat.eps * (2.5 / self.steps) if self.step_size is None else self.step_size
        search.run(start, self.steps, step_size)


@final
@dataclass(frozen=True, eq=False)
class APGDAttack(IteratedAttack):
    """Auto-PGD, which chooses its own step size: see :func:`apgd` (Croce & Hein, ICML 2020).

    On cross-entropy it is their APGD-CE, with ``criterion=dlr`` their APGD-DLR.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> x_adv = APGDAttack(Linf(8 / 255), steps=20)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    steps: int = field(default=100, kw_only=True)

    @property
    def name(self) -> str:
        return f"APGD-{self._loss_name() or 'CE'}".replace("-dlr", "-DLR")

    def _run(self, search: Search, start: Tensor) -> None:
        climb(search, start, self.steps)


@final
@dataclass(frozen=True, eq=False)
class TargetedAPGDAttack(Attack):
    """APGD-T: :func:`apgd` on :func:`targeted_dlr` towards the most probable other classes, one after the other.

    (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
    ICML 2020.) Fooled samples leave at once. y are the true classes.

    Attributes:
        targets: How many classes to try, at most all others, in the order of their logits on x.
        steps: Gradient steps towards each.
        halving: Try all targets of a sample side by side, and drop the half of them that came less far after 22, 41
            and 57 % of the steps. With 9 targets and 100 steps that is 349 gradient passes for a robust sample,
            instead of 900. It is a weaker search: report it under its own name.
        seed: Makes the noise reproducible, see :func:`pgd`.

    Raises:
        ValueError: With fewer than four classes, where the loss is not defined, or if y are class probabilities.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5))
        >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 4])
        >>> x_adv = TargetedAPGDAttack(Linf(8 / 255), targets=4, steps=20)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    targets: int = field(default=9, kw_only=True)
    steps: int = field(default=100, kw_only=True)
    halving: bool = field(default=False, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1 or self.steps < 1:
            raise ValueError(
                f"TargetedAPGDAttack: targets and steps must be at least 1, got {self.targets} and {self.steps}."
            )

    @property
    def name(self) -> str:
        return "APGD-T (halving)" if self.halving else "APGD-T"

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        x, y = point.x, point.batch.y
        check_index("TargetedAPGDAttack", x, self.seed, index)
        look = self._check(point)
        with torch.no_grad():
            logits = point.logits_at(x.clone())
        checks.check_logits(logits)
        checks.check_labels(logits, y, look=look)
        targeted_dlr(logits, y, y)  # says what it needs
        others = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True)
        targets = others[:, : min(self.targets, logits.shape[1] - 1)]
        if self.halving:
            return self._side_by_side(point, targets, index, look)
        search = Search(_towards(point, y, targets[:, 0]), x, self.threat, self.bounds, best=True, look=look)
        for rank in range(targets.shape[1]):
            if not search.active.numel():
                break
            search.losses_at = _towards(point, y, targets[:, rank])
            start = noise_for(search.x, self.threat, self.seed, index, rank, search.active)
            climb(search, start, self.steps)
        return search.result()

    def _side_by_side(self, point: Point, targets: Tensor, index: Tensor | None, look: bool) -> Tensor:
        """Groups of samples, as many lanes together as the batch has samples: one lane for each target of a sample."""
        x = point.x
        group = max(1, x.shape[0] // targets.shape[1])
        index = torch.arange(x.shape[0]) if index is None and self.seed is not None else index
        parts = [self._race(point, targets, rows, index, look) for rows in torch.arange(len(x)).split(group)]
        return torch.cat(parts)

    def _race(self, point: Point, targets: Tensor, rows: Tensor, index: Tensor | None, look: bool) -> Tensor:
        """The samples ``rows``: all of their targets at once, the less promising half dropped at checkpoints."""
        x, y = point.x, point.batch.y
        lanes = targets.shape[1]
        of_lane = rows.to(x.device).repeat_interleave(lanes)
        threat = self.threat.rows(of_lane, x)
        bounds = None
        if self.bounds is not None:
            bounds = rows_of(self.bounds[0], of_lane, x), rows_of(self.bounds[1], of_lane, x)
        losses_at = _towards(point, y[of_lane], targets[rows.to(x.device)].flatten())
        search = Search(losses_at, x[of_lane], threat, bounds, best=True, look=look)
        every = torch.arange(len(rows), device=x.device)
        of_rows = None if index is None else index[rows.to(index.device)]
        noise = [
            noise_for(x[rows], self.threat.rows(rows, x), self.seed, of_rows, rank, every) for rank in range(lanes)
        ]
        ascent = Ascent(search, torch.stack(noise, 1).flatten(0, 1), self.steps)
        left, rounds = lanes, Halving(self.steps).checkpoints
        while search.active.numel() and ascent.taken < self.steps:
            if ascent.taken in rounds and left > 1:
                left = left // 2
                progress = torch.full_like(search.highest, -torch.inf)
                progress[search.active] = ascent.state.highest
                rank = progress.view(-1, lanes).argsort(1, descending=True).argsort(1).flatten()
                ascent.drop(rank[search.active] >= left)
            ascent.advance()
            fooled = search.done.view(-1, lanes).any(1).repeat_interleave(lanes)
            if bool(fooled[search.active].any()):
                ascent.drop(fooled[search.active])
        ascent.finish()
        score = torch.where(search.done, torch.inf, search.highest).view(-1, lanes)
        return search.result()[score.argmax(1) + lanes * every]


def _towards(point: Point, y: Tensor, target: Tensor) -> LossesAt:
    """The targeted difference of logits ratio of some samples, and whether each is misclassified."""

    def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = point.logits_at(z)
        return targeted_dlr(logits, y[rows], target[rows]), logits.detach().argmax(1) != y[rows]

    return losses_at

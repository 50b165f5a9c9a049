"""Attacks of one gradient step, and of none."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from gradreg import modes
from gradreg.attacks.attack import Attack, LossAttack
from gradreg.attacks.search import check_index, grad_enabled
from gradreg.attacks.starts import RememberedStart, Start, start_of
from gradreg.noise import noise_for
from gradreg.point import FirstStep, Parts, Point
from gradreg.threat_models import clamped_, room, rows_of


@final
@dataclass(frozen=True, eq=False)
class Noise(Attack):
    """Uniform noise in the ball, clamped to the bounds: no attack at all, but a place to take a loss.

    ``PenalizedLoss(at=Noise(Linf(8 / 255)))`` smooths loss and penalties over the ball, in expectation.

    Attributes:
        seed: Makes the noise reproducible, see :func:`pgd`.

    Example:
        >>> from gradreg import Linf
        >>> x = torch.full((1, 2), 0.5)
        >>> bool(((Noise(Linf(0.1))(torch.nn.Linear(2, 2), x, torch.tensor([0])) - x).abs() <= 0.1).all())
        True
    """

    seed: int | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        return "noise"

    @property
    def uses_gradients(self) -> bool:
        return False

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        x = point.x
        check_index("Noise", x, self.seed, index)
        self._check(point)
        return clamped_(x + noise_for(x, self.threat, self.seed, index), self.bounds)


@final
@dataclass(frozen=True, eq=False)
class FGSM(LossAttack):
    """The fast gradient sign method, one full step from x to the boundary of the ball.

    Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015; for other norms than Linf
    the step goes along their maximiser.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Linear(2, 2)
        >>> x = torch.full((1, 2), 0.5)
        >>> (FGSM(Linf(0.1))(model, x, torch.tensor([0])) - x).abs()
        tensor([[0.1000, 0.1000]])
    """

    @property
    def name(self) -> str:
        return f"FGSM {self._loss_name()}".strip()

    def perturb(self, point: Point) -> Tensor:
        """The perturbed inputs of a point, whose own pass serves for the gradient if it is in the mode to attack in."""
        if self.mode == "keep" and point.counts:
            _ = point.losses  # here, as statistics do not move while an attack runs
        return super().perturb(point)

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        x, whole = point.x, point
        if self.mode == "eval":
            point = point.at(x)
        self._check(point)
        box = None if self.bounds is None else room(x, self.bounds)
        grad = self._slope(point)
        whole.first_step = FirstStep(point, grad, evaluated=self.mode == "eval")
        return clamped_(x + self.threat.ascent(grad, torch.zeros_like(x), box), self.bounds)


@final
@dataclass(frozen=True, eq=False)
class NFGSM(LossAttack):
    """Noise, then one full step that is *not* projected back onto the ball.

    Single-step adversarial training without the collapse of FGSM: de Jorge et al., "Make Some Noise: Reliable and
    Efficient Single-Step Adversarial Training", NeurIPS 2022. The perturbation reaches up to ``1 + noise`` times eps:
    it is for training, not for evaluation.

    With ``share=0.5`` half of the samples, drawn anew each time, take the step, and the others stay noisy. As the
    point at which a loss is taken, ``PenalizedLoss(at=NFGSM(Linf(8 / 255), share=0.5))``, that is the objective which
    gradreg recommends: 1.33 natural steps, as only half of the batch needs a gradient for its images. (It is also the
    thesis's gradient penalty at noisy images, with half of the loss's weight, by a finite difference of one full step:
    the two cancel the loss at the noisy images that move.)

    Attributes:
        noise: Size of the uniform noise in units of the ball; the paper has 2, without ``bounds``.
        start: Perturbations to which the noise is added: a tensor that broadcasts against x, or a
            :class:`RememberedStart`. Used only inside a :class:`gradreg.PenalizedLoss`; an attack that is called
            directly starts without it.
        share: The share of the samples that take the step, in (0, 1].
        seed: Makes the noise reproducible, see :func:`pgd`.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Linear(2, 2)
        >>> x = torch.full((1, 2), 0.5)
        >>> moved = (NFGSM(Linf(0.1))(model, x, torch.tensor([0])) - x).abs()
        >>> bool((moved <= 0.2 + 1e-6).all())
        True
    """

    noise: float = field(default=1.0, kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    start: Start | None = field(default=None, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise >= 0:
            raise ValueError(f"NFGSM: noise is a multiple of eps and must be at least 0, got {self.noise}.")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"NFGSM: share is how much of the batch takes the step, in (0, 1], got {self.share}. Without any, use "
                "Noise(threat)."
            )

    @property
    def name(self) -> str:
        return f"N-FGSM {self._loss_name()}".strip()

    def for_evaluation(self, seed: int) -> "NFGSM":
        return replace(self, share=1.0, start=None, seed=self.seed if self.seed is not None else seed)

    def move(self, point: Point, *, differentiable: bool = True) -> Point:
        model, replay = point.batch.model, point.batch.replay
        # Replay keeps statistics still in forward passes; a checkpoint runs them once more in the backward pass.
        still = modes.frozen_statistics(model) if replay is None or replay.frozen else nullcontext()
        with grad_enabled(), still, modes.evaluating(model) if self.mode == "eval" else nullcontext():
            z, rows, part = self._stepped(point, None if self.seed is None else point.batch.index)
        replay = part.batch.replay
        if part is point or replay is None or not replay.drawn_from or modes.batch_norms(point.batch.model):
            return point.at(z, differentiable=differentiable, counts=True)
        # Those that moved are to be seen by the very network that was attacked, whose random numbers are theirs alone.
        whole = point.at(z, counts=True)
        moved = part.at(z[rows[0]], differentiable=differentiable, counts=True)
        return Parts(whole, [moved, whole.rows(rows[1], differentiable=differentiable)], rows)

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        check_index("NFGSM", point.x, self.seed, index)
        return self._stepped(point, index)[0]

    def _stepped(self, point: Point, index: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...], Point]:
        """The perturbed batch; which of its samples have moved, and which not; and those that have, as a batch."""
        x, threat, bounds, whole = point.x, self.threat, self.bounds, point
        rows: tuple[Tensor, ...] = ()
        if not point.batch.checked or x.dtype not in (torch.float32, torch.float64):
            self._check(point)
        ball = threat if self.noise == 1 else threat.scaled(self.noise)
        noise = noise_for(x, ball, self.seed, index)
        if self.start is not None and point.batch.checked:
            noise = noise + start_of(self.start, point)
        z = noisy = clamped_(x + noise, bounds)
        count = max(1, round(self.share * len(x)))
        if count < len(x):
            rows = torch.randperm(len(x), device=x.device).tensor_split([count])
            threat, noisy, x = threat.rows(rows[0], x), z[rows[0]], x[rows[0]]
            point = point.rows(rows[0])
            if bounds is not None and (isinstance(bounds[0], Tensor) or isinstance(bounds[1], Tensor)):
                bounds = rows_of(bounds[0], rows[0], z), rows_of(bounds[1], rows[0], z)
        there = point.at(noisy)
        grad = self._slope(there)
        whole.first_step = FirstStep(there, grad, rows[0] if rows else None, self.mode == "eval")
        if isinstance(self.start, RememberedStart) and point.batch.checked:
            self.start.update(there, grad, threat)
        moved = clamped_(noisy + threat.ascent(grad, noisy - x), bounds)
        return z.index_copy(0, rows[0], moved) if rows else moved, rows, point

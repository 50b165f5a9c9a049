"""The alarm for catastrophic overfitting: training against one step that no longer is an attack."""

import math
from typing import final

import torch
from torch import Tensor

from gradreg import checks
from gradreg.controllers import KeptInFull
from gradreg.gradients import in_transform
from gradreg.point import Parts, Point
from gradreg.threat_models import cosine


@final
class CollapseAlarm(KeptInFull):
    r"""Warns when training against an attack of one step collapses: ``PenalizedLoss(at=NFGSM(...), alarm=...)``.

    A network can learn to make one step useless: robust accuracy under a real attack falls to 0 within some hundred
    steps while that under the step rises (catastrophic overfitting; Wong, Rice & Kolter, "Fast is better than free",
    ICLR 2020). Two signs of it are known from the step itself, and cost no further pass:

    * the share of samples with a *lower* loss after the attack's step than before (Lin, Yu & Liu, "Eliminating
      Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization", NeurIPS 2023);
    * the cosine of the loss's gradients where the attack starts and where it ends, which falls to 0 as the loss curls
      up (Andriushchenko & Flammarion, "Understanding and Improving Fast Adversarial Training", NeurIPS 2020). The
      second gradient comes from the backward pass of the training, which then goes on to the image.

    Means over ``period`` steps are looked at when the period is over: one synchronisation. The warning holds both, with
    their best values before. State is in the objective's ``state_dict``.

    It needs an attack that starts somewhere and takes its step there: :class:`gradreg.NFGSM`, :class:`gradreg.FGSM`, or
    :class:`gradreg.PGDAttack`. The cosine is measured where the objective has no
    penalties, and not inside a compiled step; else it is NaN. It sees no collapse of a training
    that has no such attack.

    Args:
        period: Steps between two looks.
        most_fallen: Share of samples whose loss falls from which on it warns.
        least_cosine: Cosine below which it warns, as a share of the best one of any period before. The defaults of both
            are chosen on runs of `examples/collapse.py`, which collapse or do not.

    Raises:
        ValueError: If period is below 1; when called, if the attack runs in evaluation mode.
        RuntimeError: When called, if the attack keeps no start, or inside a transform.

    Attributes:
        fallen: Share of samples whose loss fell, mean of the last period; NaN before the first is over.
        cosine: Mean cosine of the last period; NaN where it is not known.

    Example:
        >>> from gradreg import Linf, NFGSM, PenalizedLoss
        >>> alarm = CollapseAlarm(period=1)
        >>> objective = PenalizedLoss(at=NFGSM(Linf(0.1)), alarm=alarm)
        >>> for _ in range(2):
        ...     objective(nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).total.backward()
        >>> float(alarm.fallen)
        0.0
    """

    sums: Tensor
    found: Tensor

    def __init__(self, period: int = 50, *, most_fallen: float = 0.2, least_cosine: float = 0.2) -> None:
        super().__init__()
        if period < 1:
            raise ValueError(f"CollapseAlarm: period is at least one step, got {period}.")
        self.period, self.most_fallen, self.least_cosine = period, most_fallen, least_cosine
        # Sums since the last look: of falls, steps with a loss to compare, cosines, steps with a cosine.
        self.register_buffer("sums", torch.zeros(4))
        # Falls and cosine of the last period, and the least falls and the best cosine of any before.
        self.register_buffer("found", torch.tensor([torch.nan, torch.nan, torch.nan, torch.nan]))
        self.steps = 0

    @property
    def fallen(self) -> Tensor:
        return self.found[0]

    @property
    def cosine(self) -> Tensor:
        return self.found[1]

    def observe(self, where: Point, *, alone: bool) -> None:
        """Take in one step: the point to which the attack has moved the batch.

        Args:
            where: The point, its losses computed.
            alone: Whether the backward pass of the objective is that of the loss alone.
        """
        step = where.first_step
        if step is None:
            raise RuntimeError(
                "CollapseAlarm: the objective's attack takes no step from a start that it knows. It works for NFGSM, "
                "FGSM and PGDAttack; with at=None or Noise there is no single-step attack to watch: leave it out."
            )
        if in_transform() and not torch.compiler.is_compiling():
            raise RuntimeError("CollapseAlarm: a torch.func transform cannot change its counts. Take the step eagerly.")
        if step.evaluated:
            raise ValueError(
                'CollapseAlarm: an attack in evaluation mode has the losses of another network. Use mode="keep".'
            )
        if self.sums.device != where.x.device:
            self.sums, self.found = self.sums.to(where.x.device), self.found.to(where.x.device)
        self._count()
        losses, rows = where.losses.detach(), step.rows
        self.sums[0] += ((losses if rows is None else losses[rows]) < step.losses).float().mean()
        self.sums[1] += 1
        if isinstance(where, Parts) and rows is not None:  # those that were moved have a pass of their own
            where, rows = where.parts[0], None
        leaf = getattr(where, "leaf", None)
        if alone and leaf is not None and leaf.requires_grad:
            leaf.register_hook(lambda grad: self._compare(step.gradient, grad if rows is None else grad[rows]))

    def _compare(self, start: Tensor, end: Tensor) -> None:
        # By directions of length 1: the gradient of a mean loss, scaled for half precision or not, has any size.
        self.sums[2] += cosine(start, end.detach().to(start.dtype)).mean()
        self.sums[3] += 1

    def _count(self) -> None:
        """At the end of a period, look; before the step that begins the next, whose backward pass is still to come."""
        if self.steps and self.steps % self.period == 0:
            falls, cosine = self.sums[0] / self.sums[1], self.sums[2] / self.sums[3]  # NaN where there are none
            self.found[0], self.found[1] = falls, cosine
            self._look(*self.found.tolist())
            self.found[2], self.found[3] = torch.fmin(self.found[2], falls), torch.fmax(self.found[3], cosine)
            self.sums.zero_()
        self.steps += 1

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state

    def _look(self, falls: float, cosine: float, least_falls: float, best_cosine: float) -> None:
        if not (falls > self.most_fallen or cosine < self.least_cosine * best_cosine):  # no comparison of NaN is true
            return
        evidence = f"over {self.period} steps it has lowered the loss of {100 * falls:.0f} % of the samples"
        if not math.isnan(least_falls):
            evidence += f" ({100 * least_falls:.0f} % at best before)"
        if not math.isnan(cosine):
            evidence += f", and the cosine between the gradients at its start and end is {cosine:.2f}"
            if not math.isnan(best_cosine):
                evidence += f" ({best_cosine:.2f} at best before)"
        checks.warn(
            f"The attack of one step does not attack any more (catastrophic overfitting): {evidence}. Robust accuracy "
            "is falling, whatever the training loss says. Go back to a checkpoint from before; then use more noise "
            "(NFGSM(noise=2.0, bounds=None)), a GradientAlignment term, or PGDAttack."
        )

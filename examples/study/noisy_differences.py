"""Noisy differences: what lies between the thesis's penalty and single-step adversarial training.

A forward difference of step h along u, the perturbation along which the loss rises most, gives the thesis's objective
with loss weight l and penalty weight w, on a share f of the batch, the gradient of (docs/cost.md)

    (l - w / (h f)) loss(x) + w / (h f) loss(x + h u)   at the samples drawn, and   l loss(x)   at the others.

``NFGSM(threat, share=f)`` is the member with noise, bounds, h = 1 and w = f l: nothing is left of the first point.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import FiniteDifference, Noise, PenalizedOutput, Schedule, ThreatModel, cross_entropy


@dataclass(frozen=True, eq=False)
class NoisyDifferences:
    """Cross-entropy with its penalty by a finite difference, whose first point takes one backward pass.

    The whole batch costs two natural steps, and the first graph is freed before the second is made. For models like
    those of the study: their samples do not see each other, and no pass draws random numbers.

    Attributes:
        threat: The perturbations to be robust to.
        weight: Of the penalty, at a step of the training.
        loss_weight: Of the loss.
        step: Of the difference, in units of the threat model.
        noise: Radius of the noise that the images get first, in units of the threat model.
        bounds: Of the pixels; None for no bounds.
        share: Of the batch that is penalised, drawn anew at every step.
    """

    threat: ThreatModel
    weight: Schedule
    loss_weight: float = 0.8
    step: float = 1.0
    noise: float = 1.0
    bounds: tuple[float, float] | None = (0.0, 1.0)
    share: float = 1.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, t: float) -> PenalizedOutput:
        """The objective on one batch; only its total carries a graph."""
        if self.noise:
            x = Noise(self.threat.scaled(self.noise), bounds=self.bounds)(model, x, y)
        size, weight = len(x), self.weight(t)
        if not weight:
            logits = model(x)
            loss = cross_entropy(logits, y).mean()
            return PenalizedOutput(self.loss_weight * loss, loss.detach(), logits.detach(), {}, x)
        count = max(1, round(self.share * size))
        order = torch.randperm(size) if count < size else torch.arange(size)
        leaf, labels = x[order[:count]].requires_grad_(), y[order]
        far = weight / self.step * size / count
        near = 0.0 if math.isclose(far, self.loss_weight) else self.loss_weight - far
        with FiniteDifference().around(model, leaf)(leaf):
            first = model(leaf)
        losses = cross_entropy(first, labels[:count])
        parameters = list(model.parameters()) if near else []
        grad, *grads = torch.autograd.grad(losses.sum(), [leaf, *parameters])
        at_first = _Known.apply(losses.detach().sum(), grads, *parameters)

        start = leaf.detach()
        box = None if self.bounds is None else (self.bounds[0] - start, self.bounds[1] - start)
        stepped = start + self.step * self.threat.maximizer(grad, box)
        second = model(torch.cat([stepped, x[order[count:]]]))
        after = cross_entropy(second, labels)
        others = after[count:]
        total = near * at_first + far * after[:count].sum() + self.loss_weight * others.sum()
        logits = torch.cat([first, second[count:]]).detach()[order.argsort()]
        loss = torch.cat([losses, others]).detach().mean()
        return PenalizedOutput(total / size, loss, logits, {"grad_norm": self.threat.dual_norm(grad, box)}, x)


class _Known(torch.autograd.Function):
    """A value whose gradients with respect to the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(factor * grad for grad in ctx.grads)

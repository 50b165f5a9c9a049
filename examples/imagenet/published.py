"""What only the released code of the thesis does, so that its recipes can be run as they were."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from gradreg import Linf, cross_entropy, input_gradient
from gradreg.modes import evaluating


@final
@dataclass(frozen=True)
class BatchBestPGD:
    """PGD that returns, for all images alike, the iterate at which the loss of the whole batch was largest.

    The released code compares losses that are already averaged, and so chooses one iterate for the batch. The last one
    it gives to the model in pixels, without the normalisation that the model needs, and compares that loss with the
    others.

    Attributes:
        threat: The ball, in the units of the model's input.
        steps: Gradient steps, from uniform noise in the ball.
        step_size: In the units of the model's input.
        bounds: Of the input; what leaves them is clamped.
        undo: Mean and standard deviation of each channel, with which the last iterate is brought back to pixels before
            its loss is taken; None takes it as it is.
    """

    threat: Linf
    steps: int
    step_size: float | Tensor
    bounds: tuple[Any, Any]
    undo: tuple[tuple[float, ...], tuple[float, ...]] | None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The perturbed batch, from a model that is in evaluation mode meanwhile."""
        with evaluating(model):
            return self._perturb(model, x, y)

    def _perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        step, low, high = (torch.as_tensor(value).to(x) for value in (self.step_size, *self.bounds))
        x_adv = (x + self.threat.sample_like(x)).clamp(low, high)
        candidates, losses = [], []
        for _ in range(self.steps):
            leaf = x_adv.detach().requires_grad_()
            at_leaf = cross_entropy(model(leaf), y)
            candidates.append(leaf.detach())
            losses.append(at_leaf.detach().mean())
            moved = leaf.detach() + step * input_gradient(at_leaf, leaf, create_graph=False).sign()
            x_adv = (x + self.threat.project(moved - x)).clamp(low, high)
        candidates.append(x_adv)
        with torch.no_grad():
            losses.append(cross_entropy(model(self._as_checked(x_adv)), y).mean())
        return candidates[int(torch.stack(losses).argmax())]

    def _as_checked(self, x_adv: Tensor) -> Tensor:
        if self.undo is None:
            return x_adv
        mean, std = (torch.tensor(values).to(x_adv).view(-1, 1, 1) for values in self.undo)
        return x_adv * std + mean

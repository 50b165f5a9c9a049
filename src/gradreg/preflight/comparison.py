"""Whether double backward gives the derivative of the input gradient: it is compared with a finite difference."""

from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradreg.findings import RECOMPUTED, WRONG, Finding
from gradreg.point import Point
from gradreg.preflight.step import Step
from gradreg.preflight.trace import Trace

_DIRECTIONS = 2
_STEPS = (1e-8, 1e-7)  # in units of each weight's size: so short that hardly a ReLU changes sides
_AGREE, _DIFFER = 1e-5, 1e-3  # relative
_SCATTER = 0.05  # of finite differences among each other, as a part of what they differ from double backward


def compare(step: Step) -> Finding | None:
    r"""Compare double backward with finite differences; None if they agree, or if that cannot be told.

    With :math:`F(w) = \langle v, \nabla_x \ell \rangle` for a random v, :math:`\langle \nabla_w F, d \rangle` is held
    against :math:`(F(w + hd) - F(w - hd)) / 2h` for random directions d of the trained weights, in double precision and
    always from the same state and random numbers. A model that cannot do so is not compared.

    At a kink the difference may be off, so double backward is wrong only if all differences agree with each other, for
    several h and d and to both sides, and not with it. Nor is it wrong where the loss's own gradient is not the loss's
    derivative either: such surrogates, as the straight-through estimator, are meant. The exception is a forward pass
    whose forward-mode derivative is another than its backward pass: then the latter went through something else.
    """
    try:
        return _Comparison(step).wrong()
    except Exception:  # whatever a copy in double precision raises: the step itself has been tried
        return None


@final
class _Comparison:
    """Two functions of the trained weights of a copy in double precision, in one tensor: the loss and F."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._random = torch.Generator().manual_seed(0)
        self._v = self._noise(step.inputs.x)

    def wrong(self) -> Finding | None:
        is_derivative = True
        for _ in range(_DIRECTIONS):
            d = [
                self._noise(weight) * (weight.detach().abs().square().mean().sqrt().double() or 1e-2)
                for weight in _trained(self._step)
            ]
            here, exact = self._at(d, 0.0, slopes=True)
            loss_errors, differences = [], []
            for size in _STEPS:
                (ahead, _), (behind, _) = self._at(d, size), self._at(d, -size)
                central = (ahead - behind) / (2 * size)
                loss_error, error = _relative(central, exact).tolist()
                if not error > _DIFFER:  # also where both are 0
                    return None
                loss_errors.append(loss_error)
                differences += [one[1].item() for one in (central, (ahead - here) / size, (here - behind) / size)]
            if max(differences) - min(differences) > _SCATTER * abs(differences[0] - exact[1].item()):
                return None
            is_derivative &= min(loss_errors) < _AGREE
        if is_derivative:
            with self._step.fresh() as step:
                return WRONG.at(Trace(step).written_by_hand(), found=exact[1].item(), expected=differences[0])
        return RECOMPUTED if _relative(self._by_forward_mode(), here[1]) > _DIFFER else None

    def _at(self, d: list[Tensor], size: float, *, slopes: bool = False) -> tuple[Tensor, Tensor]:
        """The values for weights that many steps along d, and with ``slopes`` their derivatives along d."""
        with self._step.fresh(precise=True) as step:
            weights = _trained(step)
            with torch.no_grad():
                for weight, along in zip(weights, d, strict=True):
                    weight.add_(along, alpha=size)
            point = Point.of(step.batch, step.inputs.x)
            grad = point.slope(create_graph=slopes)
            values = torch.stack([point.losses.sum(), (self._v * grad).sum()])
            derivatives = [_slope(value, weights, d) for value in values] if slopes else list(values)
            return values.detach(), torch.stack(derivatives).detach()

    def _by_forward_mode(self) -> Tensor:
        """F without a backward pass, and so without what that computes again or has been told to do."""
        with self._step.fresh(precise=True) as step, torch.no_grad(), forward_ad.dual_level():
            batch = step.batch
            output = batch.inputs.given_to(step.model, forward_ad.make_dual(batch.inputs.x.clone(), self._v))
            return forward_ad.unpack_dual(batch.criterion(batch.read(output), step.y).sum()).tangent

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=torch.float64, generator=self._random).to(like.device)


def _trained(step: Step) -> list[Tensor]:
    return [parameter for parameter in step.model.parameters() if parameter.requires_grad]


def _slope(value: Tensor, weights: list[Tensor], d: list[Tensor]) -> Tensor:
    slopes = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
    return torch.stack([(slope * along).sum().real for slope, along in zip(slopes, d, strict=True)]).sum()


def _relative(value: Tensor, other: Tensor) -> Tensor:
    return (value - other).abs() / torch.maximum(value.abs(), other.abs())

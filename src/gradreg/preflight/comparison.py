"""Whether double backward gives the derivative of the input gradient: it is compared with a finite difference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradreg.copies import alone
from gradreg.criteria import Criterion
from gradreg.gradients import input_gradient
from gradreg.preflight.report import OR_FINITE_DIFFERENCE
from gradreg.preflight.restore import left_as_found

_DIRECTIONS = 2
_STEPS = (1e-8, 1e-7)  # in units of each weight's size: so short that hardly a ReLU changes sides
_AGREE, _DIFFER = 1e-5, 1e-3  # relative
_SCATTER = 0.05  # of finite differences among each other, as a part of what they differ from double backward
_PROBLEM = (
    "double backward is not the derivative of the input gradient: along a random direction of the weights it gives "
    "{:.4g}, and finite differences {:.4g}."
)
_MEND = (
    "Write the backward of an autograd.Function of differentiable operations on ctx.saved_tensors, and hooks on "
    f"gradients likewise, without detach() and .data; {OR_FINITE_DIFFERENCE}."
)
_RECOMPUTED = (
    "double backward is not the derivative of the input gradient, nor is the input gradient that of the loss: what "
    "the backward pass computes again, as checkpointing does, is not what the forward pass computed.",
    "Do not change what checkpointed code computes: enter modes and contexts inside of the checkpointed function, "
    "leave preserve_rng_state=True, or do without checkpointing.",
)


@final
@dataclass(frozen=True)
class Wrong:
    """What double backward gets wrong.

    Attributes:
        problem: In words.
        mend: What to do about it.
        by_hand: Whether a backward written by hand may be at fault.
    """

    problem: str
    mend: str
    by_hand: bool


def compare(model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion) -> Wrong | None:
    r"""Compare double backward with finite differences; None if they agree, or if that cannot be told.

    With :math:`F(w) = \langle v, \nabla_x \ell \rangle` for a random v, :math:`\langle \nabla_w F, d \rangle` is held
    against :math:`(F(w + hd) - F(w - hd)) / 2h` for random directions d of the trained weights. This runs on a copy in
    double precision, always from the same state and random numbers; a model that cannot do so is not compared.

    At a kink the difference may be off, so double backward is wrong only if all differences agree with each other, for
    several h and d and to both sides, and not with it. Nor is it wrong where the loss's own gradient is not the loss's
    derivative either: such surrogates, as the straight-through estimator, are meant. The exception is a forward pass
    whose forward-mode derivative is another than its backward pass: then the latter went through something else.
    """
    try:
        return _Copy(model, x, y, criterion).wrong()
    except Exception:  # whatever a copy in double precision raises: the model itself has passed its trial
        return None


@final
class _Copy:
    """A copy in double precision, and two functions of its trained weights, in one tensor: the loss and F."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion) -> None:
        self._net = alone(model, precise=True)
        self._weights = [parameter for parameter in self._net.parameters() if parameter.requires_grad]
        self._x = x.detach().double()
        self._y = y.double() if y.is_floating_point() else y
        self._criterion = copy.deepcopy(criterion).double() if isinstance(criterion, nn.Module) else criterion
        self._random = torch.Generator().manual_seed(0)
        self._v = self._noise(self._x)

    def wrong(self) -> Wrong | None:
        is_derivative = True
        for _ in range(_DIRECTIONS):
            d = [
                self._noise(weight) * (weight.detach().abs().square().mean().sqrt() or 1e-2) for weight in self._weights
            ]
            here, exact = self._differentiated(d)
            loss_errors, differences = [], []
            for step in _STEPS:
                ahead, behind = self._at(d, step), self._at(d, -step)
                central = (ahead - behind) / (2 * step)
                loss_error, error = _relative(central, exact).tolist()
                if not error > _DIFFER:  # also where both are 0
                    return None
                loss_errors.append(loss_error)
                differences += [one[1].item() for one in (central, (ahead - here) / step, (here - behind) / step)]
            if max(differences) - min(differences) > _SCATTER * abs(differences[0] - exact[1].item()):
                return None
            is_derivative &= min(loss_errors) < _AGREE
        if is_derivative:
            return Wrong(_PROBLEM.format(exact[1].item(), differences[0]), _MEND, by_hand=True)
        if _relative(self._by_forward_mode(), here[1]) > _DIFFER:
            return Wrong(*_RECOMPUTED, by_hand=False)
        return None

    def _differentiated(self, d: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The values, and their derivatives along d."""
        with self._fresh():
            values = self._values(create_graph=True)
            return values.detach(), torch.stack([self._slope(value, d) for value in values])

    def _slope(self, value: Tensor, d: list[Tensor]) -> Tensor:
        slopes = torch.autograd.grad(value, self._weights, retain_graph=True, materialize_grads=True)
        return torch.stack([(slope * along).sum().real for slope, along in zip(slopes, d, strict=True)]).sum()

    def _at(self, d: list[Tensor], step: float) -> Tensor:
        """The values for weights that many steps along d."""
        with self._fresh():
            with torch.no_grad():
                for weight, along in zip(self._weights, d, strict=True):
                    weight.add_(along, alpha=step)
            return self._values(create_graph=False).detach()

    def _values(self, *, create_graph: bool) -> Tensor:
        leaf = self._x.clone().requires_grad_()
        losses = self._criterion(self._net(leaf), self._y)
        grad = input_gradient(losses, leaf, create_graph=create_graph)
        return torch.stack([losses.sum(), (self._v * grad).sum()])

    def _by_forward_mode(self) -> Tensor:
        """F without a backward pass, and so without what that computes again or has been told to do."""
        with self._fresh(), torch.no_grad(), forward_ad.dual_level():
            losses = self._criterion(self._net(forward_ad.make_dual(self._x.clone(), self._v)), self._y)
            return forward_ad.unpack_dual(losses.sum()).tangent

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """From the same state and random numbers each time, weights included, and without compiling."""
        with left_as_found(self._net, self._x.device), torch.compiler.set_stance("force_eager"):
            yield

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=torch.float64, generator=self._random).to(like.device)


def _relative(value: Tensor, other: Tensor) -> Tensor:
    return (value - other).abs() / torch.maximum(value.abs(), other.abs())

"""Projected gradient ascent for a function of perturbed inputs, whatever that function is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradreg import checks
from gradreg.gradients import check_scores, in_transform, outside_inference_mode, with_pull_back
from gradreg.noise import noise_for
from gradreg.threat_models import (
    Bounds,
    Eps,
    Linf,
    ThreatModel,
    bounds_like,
    check_bounds_form,
    clamped_,
    room,
    rows_of,
)

LossesAt = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
OutOfBounds = Literal["check", "clamp"]


def pgd(
    losses_at: LossesAt,
    x: Float[Tensor, "B *x"],
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: Eps | None = None,
    random_start: bool = True,
    start: Float[Tensor, "B *x"] | None = None,
    restarts: int = 1,
    best: bool = True,
    bounds: Bounds | None = (0.0, 1.0),
    out_of_bounds: OutOfBounds = "check",
    seed: int | None = None,
    index: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B *x"]:
    r"""Projected gradient ascent inside a threat model.

    .. math:: \delta \leftarrow \Pi\bigl(\delta + \alpha\, \mathrm{argmax}_{\|v\| \le 1} \langle g, v \rangle\bigr),
              \qquad g = \nabla_\delta\, \ell(x + \delta)

    for every sample on its own, with :math:`\Pi` the projection onto ball and bounds (Madry et al., "Towards Deep
    Learning Models Resistant to Adversarial Attacks", ICLR 2018). No parameter's ``.grad`` is touched; it works with
    grad disabled; the perturbation is kept in the type of x whatever autocast does.

    Args:
        losses_at: ``losses_at(z, rows)`` returns the losses ``(n,)`` to ascend, of the samples with indices ``rows``
            ``(n,)`` of the batch at the inputs z ``(n, ...)``. It may return a pair ``(losses, done)``: samples whose
            boolean ``done`` is true keep the point they are at and leave the search.
        x: Clean inputs in float32 or float64.
        threat: The perturbations allowed, in the units of x.
        steps: Gradient steps of each restart.
        step_size: Length of a step, in the units of eps, per sample or channel like eps. Default:
            ``2.5 * eps / steps``.
        random_start: Start at uniform noise in the ball instead of at x.
        start: Perturbations to start at, in the place of the first random start: those of an earlier attack, say.
        restarts: How many starts. More than one needs ``best`` and ``random_start``.
        best: Return every sample's point with the highest loss among all that were visited. That costs one forward
            pass, for the last point. Without it the last point is returned, as adversarial training has it.
        bounds: Lowest and highest value of an input, numbers or tensors that broadcast against x; None for no bounds.
        out_of_bounds: What to do about an x outside of its bounds: ``"check"`` raises; ``"clamp"`` returns the
            perturbed input clamped to the bounds (augmentation such as random erasing leaves [0, 1]).
        seed: Makes noise a function of seed, sample and restart alone, independent of batch size, order, device or
            rank; it is drawn sample by sample on the CPU. None draws from PyTorch's default generator.
        index: With a seed, the position of each sample in its data set. Default: its position in the batch.

    Returns:
        The perturbed inputs, detached, in the shape and type of x.

    Raises:
        ValueError: If an argument is out of its range, x is not finite or outside of its bounds, or losses have a wrong
            shape.
        TypeError: If x is in half precision, where pixels are further apart than the steps of an attack.
        RuntimeError: If the losses are NaN or do not depend on the input; or if samples may leave inside a transform or
            compiled region, where values are not known.

    Example:
        A linear loss rises most in a corner of the ball:

        >>> from gradreg import Linf
        >>> slope = torch.tensor([[1.0, -2.0]])
        >>> pgd(lambda z, rows: (z * slope).sum(1), torch.full((1, 2), 0.5), Linf(0.1), steps=5)
        tensor([[0.6000, 0.4000]])
    """
    check_search("pgd", x, steps=steps, restarts=restarts, best=best, random_start=random_start, seed=seed, index=index)
    look = may_look(pgd, x)
    check_attackable(x, threat, bounds, out_of_bounds, look)
    with grad_enabled():
        search = Search(losses_at, x, threat, bounds, best=best, look=look)
        step_size = threat.eps * (2.5 / steps) if step_size is None else step_size
        for delta in search.starts(restarts, start=start, random_start=random_start, seed=seed, index=index):
            search.run(delta, steps, step_size)
        return search.result()


class Search:
    """The state of one attack on one batch: who is still in play, and every sample's perturbation to return.

    Attributes:
        x: The clean batch.
        losses_at: The function to ascend.
        threat: The perturbations allowed.
        bounds: Lowest and highest value of an input, both as numbers or both as tensors.
        best: Whether the highest point of all is to be returned, or the last one.
        look: Whether the values of the next gradient may be looked at.
        active: The samples still in play; what has one row for each of them is said to be of the active samples.
        delta: Every sample's perturbation to return.
        highest: Every sample's loss there, as far as ``best`` needs it.
        done: The samples that left because ``losses_at`` said so.
        ball: The threat model of the active samples.
        first: The inputs that the first gradient was taken at, and that gradient.
    """

    first: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, losses_at: LossesAt, x: Tensor, threat: ThreatModel, bounds: Bounds | None, *, best: bool, look: bool
    ) -> None:
        self.x = outside_inference_mode(x).detach()
        self.losses_at = losses_at
        self.threat = threat
        self.bounds = None if bounds is None else bounds_like(bounds, self.x)
        self.best = best
        self.look = look
        self.active = torch.arange(x.shape[0], device=x.device)
        self.delta = torch.zeros_like(self.x)
        self.highest = self.x.new_full(x.shape[:1], -torch.inf)
        self.done = self.active < 0
        self._settle()

    def starts(
        self, restarts: int, *, start: Tensor | None, random_start: bool, seed: int | None, index: Tensor | None
    ) -> Iterator[Tensor]:
        """Where to start, one after the other while somebody is in play: a row for each sample of the batch."""
        if start is not None and (start.shape, start.dtype) != (self.x.shape, self.x.dtype):
            raise ValueError(
                f"start is a perturbation of x, {self.x.dtype} of shape {tuple(self.x.shape)}; got {start.dtype} of "
                f"shape {tuple(start.shape)}."
            )
        for restart in range(restarts):
            if not self.active.numel():
                return
            if restart == 0 and start is not None:
                yield start.detach()
            elif random_start:
                yield noise_for(self.x, self.threat, seed, index, restart, self.active)
            else:
                yield torch.zeros_like(self.x)

    def run(self, start: Tensor, steps: int, step_size: Eps) -> None:
        """One start: steps of one length, from the active samples' rows of ``start``."""
        delta = self.enter(start)
        for _ in range(steps):
            losses, done, grad = self.slope(delta)
            self.record(losses, done, delta)
            delta, grad = self.leave(done, delta, grad)
            if not self.active.numel():
                return
            delta = self.step(delta, grad, self.threat.with_eps(rows_of(step_size, self.active, self.x)))
        self.finish(delta)

    def enter(self, start: Tensor) -> Tensor:
        """The active samples' rows of ``start``, inside their balls and boxes."""
        return self.ball.project(start[self.active], self._box)

    def slope(self, delta: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Losses of the active samples at their perturbations, who of them is done (None: nobody), and the gradient.

        The gradient is taken at the clamped input: taken through the clamp it would be 0 for pixels out of bounds.
        """
        z = self._point(delta)
        losses, done, grad = self._differentiated(z)
        if self.first is None:
            self.first = z.detach(), grad
        if self.look:
            self._check_ascent(losses.detach(), grad)
            self.look = False
        return losses.detach(), done, grad

    def _differentiated(self, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if in_transform():
            losses, pull_back = with_pull_back(lambda z: self._losses(z.clone())[0], z)
            return losses.detach(), None, pull_back(torch.ones_like(losses))[0].detach()
        leaf = z.requires_grad_()
        losses, done = self._losses(leaf.clone())  # a copy, for a first layer that works in place
        if not losses.requires_grad:
            raise RuntimeError(
                "The losses do not depend on the input. The model detaches it, or runs its forward under "
                "torch.no_grad()."
            )
        (grad,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        if grad is None:
            raise RuntimeError("The losses do not depend on the input: the model detaches it.")
        return losses, done, grad

    def step(self, delta: Tensor, grad: Tensor, stride: ThreatModel) -> Tensor:
        """The active samples' next perturbations: further up by the ascent of ``stride``."""
        return self.ball.project(stride.ascent(grad, delta, self._box).add_(delta), self._box)

    def project(self, delta: Tensor) -> Tensor:
        """The active samples' perturbations, brought back into their balls and boxes."""
        return self.ball.project(delta, self._box)

    def leave(self, done: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take those who are done out of play; returns the tensors' rows of the others."""
        if done is None:
            return tensors
        self.done[self.active[done]] = True
        self.retire(done)
        return tuple(tensor[~done] for tensor in tensors)

    def retire(self, gone: Tensor) -> None:
        """Take active samples out of play."""
        self.active = self.active[~gone]
        self._settle()

    def in_units(self, length: Tensor) -> Tensor:
        """A length for each active sample, given in radii, in the units of eps."""
        eps = self.ball.eps
        return length.view(-1, *[1] * (self.x.ndim - 1)) * (eps.to(length) if isinstance(eps, Tensor) else eps)

    def record(self, losses: Tensor, done: Tensor | None, delta: Tensor) -> None:
        """Keep the points that beat all before; one that is done beats any."""
        if not self.best and done is None:
            return
        rows, losses = self.active, losses.to(self.highest.dtype)
        better = losses > self.highest[rows] if self.best else torch.zeros_like(losses, dtype=torch.bool)
        if done is not None:
            better = better | done
        # By where and not by boolean indices, which would wait for the device.
        self.highest[rows] = torch.where(better, losses, self.highest[rows])
        self.delta[rows] = torch.where(better.view(-1, *[1] * (delta.ndim - 1)), delta, self.delta[rows])

    def finish(self, delta: Tensor) -> None:
        """The last points of a start: one more forward pass to score them, or nothing but to return them."""
        if not self.best:
            self.delta[self.active] = delta
            return
        with torch.no_grad():
            losses, done = self._losses(self._point(delta))
        self.record(losses, done, delta)
        self.leave(done)

    def result(self) -> Tensor:
        """The perturbed batch."""
        return clamped_(self.x + self.delta, self.bounds)

    def _settle(self) -> None:
        """What depends on who is in play: their inputs, their balls, and how far they may move."""
        rows = self.active
        self._x = self.x[rows]
        self.ball = self.threat.rows(rows, self.x)
        if self.bounds is None:
            self._sides, self._box = None, None
            return
        self._sides = rows_of(self.bounds[0], rows, self.x), rows_of(self.bounds[1], rows, self.x)
        self._box = room(self._x, self._sides)

    def _point(self, delta: Tensor) -> Tensor:
        """The active samples, perturbed, and clamped: rounding, or an x outside of its bounds, may have left them."""
        return clamped_(self._x + delta, self._sides)

    def _losses(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.losses_at(z, self.active)
        losses, done = found if isinstance(found, tuple) else (found, None)
        check_scores(losses, z)
        if done is not None and (done.dtype != torch.bool or done.shape != losses.shape):
            raise ValueError(
                f"done says of each sample whether it leaves, bool of shape {tuple(losses.shape)}; got "
                f"{done.dtype} of shape {tuple(done.shape)}."
            )
        if done is None:
            return losses, None
        if in_transform():
            raise RuntimeError(
                "Whether a sample leaves an attack depends on its value, which is not known inside a torch.func "
                "transform or a compiled region: use early_stop=False there."
            )
        # Asked once: on a GPU the answer takes until all work before it is done.
        return losses, done if bool(done.any()) else None

    def _check_ascent(self, losses: Tensor, grad: Tensor) -> None:
        if bool(losses.isnan().any()):
            raise RuntimeError(
                f"The losses of {int(losses.isnan().sum())} samples are NaN, so that there is nothing to ascend. "
                "Look at the model's logits on clean inputs."
            )
        if not bool(grad.any()):
            checks.warn(
                "The gradient of every sample is exactly 0, so that this attack does nothing. Either the loss is "
                "saturated (ascend a margin of logits instead of cross-entropy), or something before the first layer "
                "has no slope (rounding, quantising: give it a straight-through gradient)."
            )


def may_look(owner: object, x: Tensor) -> bool:
    """Whether an attack may look at values."""
    return not in_transform() and checks.may_look(owner, x, validate=False)


@contextmanager
def grad_enabled() -> Iterator[None]:
    """Gradients inside, whatever the caller has disabled."""
    if in_transform():  # where they are there
        yield
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check_search(
    name: str,
    x: Tensor,
    *,
    steps: int,
    restarts: int,
    best: bool,
    random_start: bool,
    seed: int | None,
    index: Tensor | None,
) -> None:
    """Raise unless the arguments of an iterated attack fit each other."""
    if steps < 1 or restarts < 1:
        raise ValueError(f"{name}: steps and restarts must be at least 1, got {steps} and {restarts}.")
    if restarts > 1 and not (best and random_start):
        raise ValueError(
            f"{name}: several restarts need best=True, to choose among them, and random_start=True, to differ."
        )
    check_index(name, x, seed, index)


def check_index(name: str, x: Tensor, seed: int | None, index: Tensor | None) -> None:
    """Raise unless positions, if there are any, are one for each sample, and a seed makes noise of them."""
    if index is not None and (seed is None or index.shape != x.shape[:1]):
        raise ValueError(
            f"{name}: index holds one position per sample, shape ({len(x)},), for the noise of a seed; got shape "
            f"{tuple(index.shape)} and seed={seed}."
        )


def check_attackable(
    x: Tensor, threat: ThreatModel, bounds: Bounds | None, out_of_bounds: OutOfBounds, look: bool
) -> None:
    """Raise unless x can be attacked within its bounds."""
    checks.check_input(x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x is in {x.dtype}, where neighbouring pixel values near 1 are up to 1/256 apart, about an attack's "
            "step. Keep x in float32 and run the model under torch.autocast, or cast inside the model."
        )
    if out_of_bounds not in ("check", "clamp"):
        raise ValueError(f'out_of_bounds is "check" or "clamp", got {out_of_bounds!r}.')
    if bounds is not None:
        check_bounds_form(bounds)
    if not look:
        return
    if bounds is None:
        checks.finite_range(x)
        return
    low, high = (torch.as_tensor(side).to(x) for side in bounds)
    if not bool((low < high).all()):
        raise ValueError(f"bounds are (lowest, highest) with lowest < highest, got {bounds}.")
    if isinstance(threat, Linf):
        checks.check_radius(threat.eps, high - low)
    if out_of_bounds == "check":
        checks.check_bounds(x, low, high)
    else:
        checks.finite_range(x)

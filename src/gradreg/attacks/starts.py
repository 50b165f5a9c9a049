"""Starts that remember: perturbations from which an attack sets out, kept from one step of the training to the next."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, distributed, nn

from gradreg.gradients import in_transform
from gradreg.point import Point
from gradreg.threat_models import ThreatModel, rows_of
from gradreg.wrappers import in_process_group

Transform = Callable[[Tensor, Tensor], Tensor]  # of perturbations and the numbers of their samples


@final
class RememberedStart(nn.Module):
    r"""A perturbation for all samples, for each class or for each sample, from which an attack starts.

    With every step that an attack takes from it inside an objective in training mode, the perturbation :math:`s_k` of
    the samples k moves by gradient ascent of their loss,

    .. math:: m_k \leftarrow \mu\, m_k + \operatorname{mean}_{b \in k} \frac{g_b}{\|g_b\|_1},\qquad
              s_k \leftarrow \Pi\bigl(s_k + \alpha \operatorname{argmax}_{v} \langle v, m_k \rangle\bigr)

    with v within, and :math:`\Pi` onto, the attack's threat model. For each sample that is the prior of FGSM-EP, and
    with momentum of FGSM-MEP (Jia et al., "Prior-Guided Fast Adversarial Training", ECCV 2022) and of ATTA (Zheng et
    al., CVPR 2020); for all samples a universal perturbation as in FGSM-UAP, for each class one as in LIET. None of
    their releases moves the perturbation of a sample with its random crop or flip; ``transforms`` does.

    Samples are told apart by their numbers in the data set: ``objective(model, x, y, t, index=numbers)``. What is kept
    is in the ``state_dict`` of the objective. It is no buffer: it stays on the device where it was made, and
    DistributedDataParallel does not exchange it. With several processes the gradients of a class, or of all, are
    averaged over them; what is kept of each sample is of those that a process has seen, which a sampler that shuffles
    deals out anew: give each process its own part of the data.

    Args:
        shape: Of one sample, ``(C, H, W)``.
        per: ``"all"``, ``"class"`` or ``"sample"``.
        count: How many classes or samples there are.
        momentum: :math:`\mu`, in [0, 1).
        step: :math:`\alpha`, as a multiple of a full step to the boundary of the ball.
        device: Where it is kept. 50,000 images of 32x32 pixels in colour are 0.6 GB.
        transforms: Two functions of perturbations and the numbers of their samples: how the loader has cropped or
            flipped them, and back. The perturbation is kept as the image lies in the data set.

    Raises:
        ValueError: If an argument is out of its range; when called, if there are no numbers of samples, or no classes.

    Example:
        >>> from gradreg import Linf, NFGSM, PenalizedLoss
        >>> start = RememberedStart((4,), per="class", count=3)
        >>> objective = PenalizedLoss(at=NFGSM(Linf(0.1), noise=0.5, start=start))
        >>> _ = objective(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 0, 0, 1, 1]))
        >>> start.perturbations.abs().amax(1)
        tensor([0.1000, 0.1000, 0.0000])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        per: Literal["all", "class", "sample"] = "all",
        count: int = 1,
        momentum: float = 0.0,
        step: float = 1.0,
        device: torch.device | str | None = None,
        transforms: tuple[Transform, Transform] | None = None,
    ) -> None:
        super().__init__()
        if per not in ("all", "class", "sample") or count < 1 or (per == "all" and count != 1):
            raise ValueError(
                f'RememberedStart: per is "all", "class" or "sample", and count how many of these there are; got '
                f"{per!r} and {count}."
            )
        if not (0 <= momentum < 1 and step > 0):
            raise ValueError(f"RememberedStart: momentum is in [0, 1) and step above 0, got {momentum} and {step}.")
        self.per, self.count, self.momentum, self.step, self.transforms = per, count, momentum, step, transforms
        self.perturbations = torch.zeros(count, *shape, device=device)
        self.momentum_buffer = torch.zeros_like(self.perturbations) if momentum else None

    def forward(self, point: Point) -> Tensor:
        """The perturbations of a batch, of the shape of x."""
        keys = self._keys(point)
        found = self.perturbations[keys.to(self.perturbations.device)].to(point.x)
        if found.shape != point.x.shape:
            raise ValueError(
                f"RememberedStart: made for samples of shape {tuple(self.perturbations.shape[1:])}, got "
                f"{tuple(point.x.shape[1:])}."
            )
        return found if self.transforms is None else self.transforms[0](found, keys)

    def update(self, point: Point, gradient: Tensor, threat: ThreatModel) -> None:
        """Take in the gradients of a batch, in evaluation mode nothing."""
        if not self.training:
            return
        if in_transform() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "RememberedStart: a torch.func transform cannot change what is kept. Take the step eagerly, or put the "
                "objective into evaluation mode."
            )
        keys, slope = self._keys(point), gradient.detach()
        if self.transforms is not None:
            slope = self.transforms[1](slope, keys)
        slope = slope / slope.flatten(1).abs().sum(1).clamp(min=1e-30).view(-1, *[1] * (slope.ndim - 1))
        keys, slope = keys.to(self.perturbations.device), slope.to(self.perturbations)
        if self.per == "sample":
            met, present = keys, torch.ones_like(keys, dtype=torch.bool)
        else:
            slope, met, present = self._means(keys, slope)
            if rows_of(threat.eps, [0], point.x) is not threat.eps:
                raise ValueError("RememberedStart: with a radius for each sample it can be kept for each sample alone.")
        # What is not finite, or not in the batch, stays as it was.
        present = (present & slope.flatten(1).isfinite().all(1)).view(-1, *[1] * (slope.ndim - 1))
        if self.momentum_buffer is not None:
            slope = torch.where(present, self.momentum * self.momentum_buffer[met] + slope, self.momentum_buffer[met])
            self.momentum_buffer[met] = slope
        moved = threat.project(self.perturbations[met] + self.step * threat.maximizer(slope)).to(self.perturbations)
        self.perturbations[met] = torch.where(present, moved, self.perturbations[met])

    def _means(self, keys: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean slope of each class over all processes, the classes, and which of them are in the batch."""
        total = torch.zeros_like(self.perturbations).index_add_(0, keys, slope)
        times = total.new_zeros(self.count).index_add_(0, keys, total.new_ones(len(keys)))  # waits for no device
        if in_process_group():
            distributed.all_reduce(total)
            distributed.all_reduce(times)
        mean = total / times.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
        return mean, torch.arange(self.count, device=keys.device), times > 0

    def _keys(self, point: Point) -> Tensor:
        x, y, index = point.x, point.y, point.batch.index
        if self.per == "all":
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.per == "sample":
            if index is None:
                raise ValueError(
                    "RememberedStart: which samples these are is not known. Let the loader return their numbers, and "
                    "call objective(model, x, y, t, index=numbers)."
                )
            if point.batch.look and bool((index < 0).any()):
                raise ValueError("RememberedStart: numbers of samples are at least 0.")
            return index
        if not isinstance(y, Tensor):
            raise ValueError(
                f"RememberedStart: a start for each class needs labels of classes, got {type(y).__name__}."
            )
        if y.ndim == 1 and y.is_floating_point():
            raise ValueError(f"RememberedStart: labels are classes, of torch.int64; got {y.dtype}.")
        return y if y.ndim == 1 else y.argmax(1)

    def get_extra_state(self) -> dict[str, Tensor | None]:
        return {"perturbations": self.perturbations, "momentum": self.momentum_buffer}

    def set_extra_state(self, state: Any) -> None:
        same_shape = state["perturbations"].shape == self.perturbations.shape
        if not same_shape or (state["momentum"] is None) != (self.momentum_buffer is None):
            raise ValueError(
                f"RememberedStart: what was saved is of shape {tuple(state['perturbations'].shape)}, this one of "
                f"{tuple(self.perturbations.shape)}; or one of them has momentum and the other has none."
            )
        self.perturbations.copy_(state["perturbations"])
        if self.momentum_buffer is not None:
            self.momentum_buffer.copy_(state["momentum"])

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{tuple(self.perturbations.shape[1:])}, per={self.per!r}, count={self.count}, momentum={self.momentum}"


Start = Tensor | RememberedStart


def start_of(start: Start, point: Point) -> Tensor:
    """The perturbations from which an attack starts."""
    if isinstance(start, RememberedStart):
        return start(point)
    return start.to(point.x)

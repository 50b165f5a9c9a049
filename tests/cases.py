"""Small models and batches that the tests share."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg import (
    L1,
    L2,
    EdgeAlignmentPenalty,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    Term,
    linear_ramp,
    true_class,
)

import passes

CLASSES = 4
per_sample_cross_entropy = nn.CrossEntropyLoss(reduction="none")


class MathAttention(nn.Module):
    """One block of self-attention over the pixels of a 6x6 image, on the backend that has second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(tokens + mixed).mean(1)


class SharedModules(nn.Module):
    """The same convolution and activation used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.SiLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.stem(x))
        for _ in range(2):
            z = z + self.act(self.block(z))
        return self.head(z.mean((2, 3)))


def _conv(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), *between, nn.GELU(), nn.Flatten(), nn.Linear(96, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 10), nn.Tanh(), nn.Linear(10, CLASSES)),
    "conv": _conv,
    "group_norm": lambda: _conv(nn.GroupNorm(2, 6)),
    "batch_norm_eval": lambda: _conv(nn.BatchNorm2d(6)).eval(),
    "batch_norm_train": lambda: _conv(nn.BatchNorm2d(6)),
    "dropout_eval": lambda: _conv(nn.Dropout(0.5)).eval(),
    "attention": MathAttention,
    "shared": SharedModules,
}


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A small model on images of shape (2, 6, 6) with CLASSES classes."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)


def make_batch(size: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] of shape (2, 6, 6) and hard labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (size,), generator=generator)


def soft_labels(y: Tensor, dtype: torch.dtype = torch.float64, smoothing: float = 0.1) -> Tensor:
    """Mixup of every label with the next one's, smoothed."""
    hard = F.one_hot(y, CLASSES).to(dtype)
    mixed = 0.7 * hard + 0.3 * hard.roll(1, 0)
    return (1 - smoothing) * mixed + smoothing / CLASSES


def parameters_of(model: nn.Module) -> list[Tensor]:
    """The trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def passes_of_a_step(model: nn.Module, step: Callable[[nn.Module], object], samples: int) -> dict[str, float]:
    """Passes through the model for each sample, by kind, of a step that is not the first one.

    The first step with a model of the user's own has more of them: it proves that two passes are one function.
    """
    once = passes.count(copy.deepcopy(model), step, samples)
    twice = passes.count(model, lambda probe: (step(probe), step(probe)), samples)
    return {kind: twice[kind] - once[kind] for kind in passes.KINDS}


def relative_error(found: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> float:
    """Largest difference relative to the largest expected value, over all tensors."""
    found = [found] if isinstance(found, Tensor) else found
    expected = [expected] if isinstance(expected, Tensor) else expected
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return difference / max(b.abs().max().item() for b in expected)


OBJECTIVES = {
    "grad_norm Linf": {"p": Term(GradNormPenalty(Linf(0.1)), 1.2)},
    "grad_norm L2": {"p": Term(GradNormPenalty(L2(0.4)), 1.2)},
    "grad_norm L1": {"p": Term(GradNormPenalty(L1(2.0)), 1.2)},
    "edges": {"p": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class()), 0.5)},
    "both": {
        "g": Term(GradNormPenalty(Linf(0.1)), linear_ramp(1.2, duration=10)),
        "e": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class()), 0.5),
    },
}
FUNCTIONAL = [name for name in MODELS if name != "batch_norm_train"]  # torch.func forbids moving statistics


def make_objective(name: str, **options: Any) -> PenalizedLoss:
    """One of OBJECTIVES on cross-entropy."""
    return PenalizedLoss(per_sample_cross_entropy, OBJECTIVES[name], loss_weight=0.8, **options)


def objective_gradient(objective: PenalizedLoss, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of the total at step 5 with respect to the trainable parameters, taken eagerly."""
    return list(torch.autograd.grad(objective(model, x, y, t=5).total, parameters_of(model)))

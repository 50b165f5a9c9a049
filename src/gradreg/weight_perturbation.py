"""Adversarial weight perturbation: a step of the training at weights that are the worst nearby."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase

from gradreg.modes import frozen_statistics
from gradreg.wrappers import in_process_group


@contextmanager
def adversarial_weights(model: nn.Module, loss: Tensor, gamma: float = 5e-3) -> Iterator[None]:
    r"""Inside, every weight has moved to where the loss is higher; afterwards it is what it was.

    .. math:: w \leftarrow w + \gamma \|w\| \frac{\nabla_w \ell}{\|\nabla_w \ell\|}

    Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020), with a ``gamma`` of
    0.005 to 0.01. Norms are taken over each parameter of two or more dimensions; biases and the parameters of
    normalisations stay as they are, and running statistics stand still inside. With several processes the slopes are
    averaged over them, so that all have the same weights. Call ``backward()`` inside and the optimiser's step outside.
    A step costs one natural step more: the loss of the same images at both weights.

    Args:
        model: The model whose weights move.
        loss: What they raise: the training loss, of which this uses up the graph.
        gamma: How far, relative to the size of each weight.

    Raises:
        RuntimeError: If the loss carries no graph.

    Example:
        >>> from gradreg import Linf, PenalizedLoss, PGDAttack
        >>> model, x, y = nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> x_adv = PGDAttack(Linf(8 / 255), steps=3, best=False)(model, x, y)
        >>> objective = PenalizedLoss()
        >>> with adversarial_weights(model, objective(model, x_adv, y).total):
        ...     objective(model, x_adv, y).total.backward()
    """
    kinds = _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm
    still = {weight for module in model.modules() if isinstance(module, kinds) for weight in module.parameters()}
    weights = [
        weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1 and weight not in still
    ]
    slopes = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            if in_process_group():
                distributed.all_reduce(slope)
            weight.add_(slope * (gamma * weight.norm() / slope.norm().clamp(min=1e-30)))
    try:
        with frozen_statistics(model):
            yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)

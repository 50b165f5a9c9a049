"""Per-sample losses: what a criterion is here, the default one, and those that attacks ascend.

Each returns a number per sample, ``(B,)``, that is larger the worse the logits fit the labels. Which to ascend matters:
cross-entropy loses its slope where a model is confident, :func:`margin` and :func:`dlr` do not, and only :func:`dlr` is
also indifferent to the scale of the logits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample, ``(B,)``, for classes ``(B,)`` or class probabilities ``(B, K)``.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(logits, y, reduction="none")


def boosted_cross_entropy(logits: Float[Tensor, "B K"], y: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    r"""Cross-entropy with a margin, :math:`-\log p_y - \log(1 - \max_{k \ne y} p_k)`: the loss of MART.

    Wang, Zou, Yi, Bailey, Ma & Gu, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples" (ICLR
    2020). The second term counts what the best other class still has.

    Example:
        >>> import torch
        >>> boosted_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([1.3863])
    """
    _check_classes("boosted_cross_entropy", logits, y, at_least=2)
    logs = logits.log_softmax(1)
    # log(1 - p), for p up to 1: the sum of the other probabilities, by their logarithms.
    best = logs.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1, keepdim=True)
    rest = logs.scatter(1, best, -torch.inf).logsumexp(1)
    return -_of(logs, y) - rest


def kl_divergence(logits: Float[Tensor, "B K"], y: Tensor) -> Float[Tensor, "B"]:
    r"""Divergence of the model's prediction from y, :math:`\mathrm{KL}(y \,\|\, \mathrm{softmax}(z))`, in nats.

    With y the prediction on the clean image it is what TRADES ascends (Zhang et al., "Theoretically Principled
    Trade-off between Robustness and Accuracy", ICML 2019, eq. 5). With labels it is cross-entropy less their entropy:
    the same gradient, but 0 where the prediction equals the label, also a soft one.

    Args:
        logits: The model's output z.
        y: Class probabilities ``(B, K)``, or classes ``(B,)``, for which it is the cross-entropy.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor([0.])
    """
    if y.ndim == 1:
        return cross_entropy(logits, y)
    return F.kl_div(logits.log_softmax(1), y, reduction="none").sum(1)


def margin(logits: Float[Tensor, "B K"], y: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    r"""By how much the best other class beats the true one, :math:`\max_{k \ne y} z_k - z_y`.

    Positive if and only if the sample is misclassified (Carlini & Wagner, "Towards Evaluating the Robustness of Neural
    Networks", S&P 2017, their :math:`f_6` without the confidence).

    Raises:
        ValueError: If y are class probabilities: a margin is between two classes. Use ``y.argmax(1)``.

    Example:
        >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-1.])
    """
    _check_classes("margin", logits, y, at_least=2)
    return _best_other(logits, y) - _of(logits, y)


def dlr(logits: Float[Tensor, "B K"], y: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    r"""Difference of logits ratio, a margin that does not change if the logits are scaled or shifted.

    .. math:: \frac{\max_{k \ne y} z_k - z_y}{z_{(1)} - z_{(3)}}

    with :math:`z_{(i)}` the i-th largest logit (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks", ICML 2020, eq. 6).

    Raises:
        ValueError: With fewer than three classes, where the ratio is constant, or if y are class probabilities.

    Example:
        >>> dlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-0.5000])
    """
    _check_classes("dlr", logits, y, at_least=3)
    top = logits.topk(3, 1).values
    return (_best_other(logits, y) - _of(logits, y)) / (top[:, 0] - top[:, 2] + _tiny(logits))


def targeted_dlr(logits: Float[Tensor, "B K"], y: Int[Tensor, "B"], target: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    r"""The difference of logits ratio towards one class t, to be raised until it is positive.

    .. math:: \frac{z_t - z_y}{z_{(1)} - (z_{(3)} + z_{(4)}) / 2}

    (Croce & Hein, ICML 2020, eq. 7).

    Raises:
        ValueError: With fewer than four classes, or if y are class probabilities.

    Example:
        >>> targeted_dlr(torch.tensor([[4.0, 1.0, 0.0, 2.0]]), torch.tensor([0]), torch.tensor([3]))
        tensor([-0.5714])
    """
    _check_classes("targeted_dlr", logits, y, at_least=4)
    top = logits.topk(4, 1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _tiny(logits)
    return (_of(logits, target) - _of(logits, y)) / scale


def is_classification(criterion: object) -> bool:
    """Whether a criterion is known to take logits of classes and their labels: those of PyTorch and of this module."""
    return isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) or criterion in _OF_CLASSES


def _tiny(logits: Tensor) -> float:
    """What keeps equal logits from dividing by 0."""
    return max(1e-12, torch.finfo(logits.dtype).tiny)


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes.unsqueeze(1)).squeeze(1)


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)


def _check_classes(name: str, logits: Tensor, y: Tensor, at_least: int) -> None:
    if y.ndim != 1:
        raise ValueError(
            f"{name} compares one true class with others, and has no meaning for class probabilities of shape "
            f"{tuple(y.shape)}. Use y.argmax(1), or cross_entropy or kl_divergence, which take them."
        )
    if logits.ndim != 2 or logits.shape[1] < at_least:
        raise ValueError(
            f"{name} needs logits of shape (B, K) with K of at least {at_least}, got shape {tuple(logits.shape)}. With "
            f"fewer classes use {'margin or ' if at_least > 2 else ''}cross_entropy."
        )


_OF_CLASSES = (cross_entropy, boosted_cross_entropy, kl_divergence, margin, dlr, F.cross_entropy, F.nll_loss)

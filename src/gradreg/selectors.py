"""Which class's logit a penalty differentiates, where it is not the loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor


def class_scores(logits: Float[Tensor, "B K"], classes: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Every sample's logit of its class: a score to differentiate, in the place of the loss.

    Raises:
        ValueError: If logits and classes are not of shapes (B, K) and (B,).

    Example:
        >>> class_scores(torch.tensor([[0.0, 3.0], [2.0, 1.0]]), torch.tensor([1, 0]))
        tensor([3., 2.])
    """
    if logits.ndim != 2 or classes.shape != logits.shape[:1]:
        raise ValueError(
            f"The score of a class needs logits of shape (B, K) and classes of shape (B,), got {tuple(logits.shape)} "
            f"and {tuple(classes.shape)}."
        )
    return logits.gather(1, classes.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class ClassSelector(ABC):
    """Chooses one class per sample. Two equal selectors in one objective share one choice and one gradient."""

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "B K"], y: Tensor) -> Int[Tensor, "B"]:
        """The chosen classes.

        Args:
            logits: The model's output.
            y: Classes ``(B,)`` or class probabilities ``(B, K)``.
        """


@final
@dataclass(frozen=True)
class true_class(ClassSelector):  # noqa: N801  (used as a function)
    """The labelled class; of class probabilities (mixup, label smoothing), the most probable.

    Example:
        >>> true_class()(torch.zeros(2, 3), torch.tensor([2, 0]))
        tensor([2, 0])
    """

    def __call__(self, logits: Float[Tensor, "B K"], y: Tensor) -> Int[Tensor, "B"]:
        return y if y.ndim == 1 else y.argmax(1)


@final
@dataclass(frozen=True)
class predicted_class(ClassSelector):  # noqa: N801
    """The class with the largest logit.

    Example:
        >>> predicted_class()(torch.tensor([[0.0, 3.0], [2.0, 1.0]]), torch.tensor([0, 0]))
        tensor([1, 0])
    """

    def __call__(self, logits: Float[Tensor, "B K"], y: Tensor) -> Int[Tensor, "B"]:
        return logits.argmax(1)


@final
@dataclass(frozen=True)
class sampled_class(ClassSelector):  # noqa: N801
    r"""A class drawn from the model's own prediction, :math:`t \sim \mathrm{softmax}(f(x) / T)`.

    Rodríguez Muñoz ("Adversarial robustness without perturbations", MIT 2024, equation 5.2), with T = 0.5. Draws from
    the default generator of the logits' device.

    Attributes:
        temperature: T, above 0. Towards 0 it becomes :class:`predicted_class`.

    Example:
        >>> sampled_class(temperature=0.5)(torch.tensor([[0.0, 100.0], [100.0, 0.0]]), torch.tensor([0, 0]))
        tensor([1, 0])
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"sampled_class: temperature must be above 0, got {self.temperature}.")

    def __call__(self, logits: Float[Tensor, "B K"], y: Tensor) -> Int[Tensor, "B"]:
        # The Gumbel-max trick: unlike torch.multinomial it neither synchronises nor depends on the batch it stands in.
        logits = logits.detach().float()
        uniform = torch.rand_like(logits)
        return (logits / self.temperature - (-uniform.log()).log()).argmax(1)

"""How much a network with other activations still says what the original said."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from gradreg.criteria import kl_divergence
from gradreg.intervals import Proportion
from gradreg.modes import evaluating

DIFFERS = 0.1  # of the size of an output: from here on a layer is said to differ


@final
@dataclass(frozen=True)
class Agreement:
    """What :func:`agreement` found.

    Attributes:
        same: On how many inputs both decide for the same class.
        kl: Mean Kullback-Leibler divergence of the predictions, original from smooth, in nats.
        layers: By the name of every module that both have, in the order in which they end: the root mean square of the
            difference of their outputs, as a share of that of the original's output. Of the first batch.
    """

    same: Proportion
    kl: float
    layers: dict[str, float]

    @property
    def first_to_differ(self) -> str | None:
        """The first layer whose output is off by a tenth of its size; None if none is."""
        return next((name for name, share in self.layers.items() if share > DIFFERS), None)

    def __str__(self) -> str:
        text = f"same class on {self.same}, KL {self.kl:.3f}"
        first = self.first_to_differ
        return text if first is None else f"{text}, differs from {first!r} on (by {self.layers[first]:.0%})"


def agreement(original: nn.Module, smooth: nn.Module, loader: Iterable[Any]) -> Agreement:
    r"""Compare the decisions of a network and of its smooth version, both in evaluation mode.

    .. math:: KL = \frac1n \sum_i \sum_k p_{ik} \log \frac{p_{ik}}{q_{ik}},\qquad
              d_l = \frac{\|h_l - h'_l\|_2}{\|h_l\|_2}

    with p and q the predictions of original and smooth network, h and h' the outputs of layer l. The divergence says
    more than the share of equal decisions where inputs are few, or the network is unsure of them.

    Args:
        original: The network.
        smooth: What :func:`gradreg.smoothify` made of it; any network with layers of the same names.
        loader: Batches: inputs, or tuples that begin with them.

    Raises:
        ValueError: If there are no batches.
        TypeError: If a model returns no logits.

    Example:
        >>> from gradreg import smoothify
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = agreement(model, smoothify(model, sharpness=1000.0), [torch.rand(10, 2)])
        >>> found.same.value, found.first_to_differ
        (1.0, None)
    """
    same = count = 0
    divergence, layers = 0.0, {}
    with evaluating(original), evaluating(smooth), torch.no_grad():
        for batch in loader:
            x = batch if isinstance(batch, Tensor) else batch[0]
            if not count:
                layers = _differences(original, smooth, x)
            ours, theirs = (_logits(model(x)) for model in (original, smooth))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            divergence += float(kl_divergence(theirs, ours.softmax(1)).sum())
            count += len(x)
    if not count:
        raise ValueError("agreement: the loader has no batches.")
    return Agreement(Proportion(same, count), divergence / count, layers)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(f"agreement: a model has to return logits of shape (B, K), got {type(logits).__name__}.")
    return logits.double()


def _differences(original: nn.Module, smooth: nn.Module, x: Tensor) -> dict[str, float]:
    """How much the outputs of modules of one name differ."""
    ours, theirs = _outputs(original, x), _outputs(smooth, x)
    found = {}
    for name, output in ours.items():
        other = theirs.get(name)
        if other is not None and other.shape == output.shape:
            found[name] = float((other - output).norm() / output.norm().clamp(min=1e-30))
    return found


def _outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs of all modules that return a tensor, those of the last call of each."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                outputs.pop(name, None)
                outputs[name] = output.detach().clone()

        return hook

    with ExitStack() as handles:
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                handles.callback(module.register_forward_hook(keep(name)).remove)
        model(x)
    return outputs

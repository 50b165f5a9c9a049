"""Normalisation as the first layer of the model, so that everything outside of it lives in pixels of [0, 1]."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

Channels = Sequence[float] | Tensor


@final
class Normalize(nn.Module):
    """Per-channel normalisation of images, ``(x - mean) / std``.

    Mean and standard deviation move with the module but are no part of its ``state_dict``.

    Args:
        mean: One number per channel, in pixels of [0, 1].
        std: One number per channel, above 0, in pixels of [0, 1].

    Shape:
        ``(B, C, H, W)`` to the same, with as many channels as there are means (or any number, for a single mean).

    Raises:
        TypeError: If mean or std is a single number.
        ValueError: If mean and std differ in length, a std is not above 0, or, when called, the channels do not fit.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.ones(1, 1, 2, 2)).unique()
        tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if isinstance(values, (int, float)):
                raise TypeError(f"Normalize: {name} is {values}, expected one number per channel: [{values}] for gray.")
        if len(mean) != len(std):
            raise ValueError(f"Normalize: mean has {len(mean)} channels, std has {len(std)}.")
        if not all(deviation > 0 for deviation in std):
            raise ValueError(f"Normalize: every std must be above 0, got {list(std)}.")
        if min(_as_floats(mean)) > 1 and min(_as_floats(std)) > 1:
            raise ValueError(
                f"Normalize: mean {list(mean)} and std {list(std)} are in units of 0 to 255; the layer takes pixels "
                "in [0, 1], so divide both by 255."
            )
        self._values = {"mean": _as_floats(mean), "std": _as_floats(std)}
        for name in self._values:
            self.register_buffer(name, self._buffer(name, torch.get_default_dtype()), persistent=False)

    def _buffer(self, name: str, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return torch.tensor(self._values[name], dtype=dtype, device=device).view(-1, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalize":
        # A module made double after it was made in float32 has the numbers given, not their roundings to float32.
        super()._apply(fn, recurse)
        for name in self._values:
            moved = getattr(self, name)
            setattr(self, name, self._buffer(name, moved.dtype, moved.device))
        return self

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The normalised images."""
        if x.ndim != 4 or len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"Normalize: expected images of shape (B, {len(self.mean)}, H, W), got {tuple(x.shape)}.")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Mean and std, for ``repr``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def with_normalization(model: nn.Module, mean: Channels, std: Channels) -> nn.Sequential:
    """The model, taking pixels in [0, 1] and normalising them itself.

    eps, bounds, noise and pictures then share one unit, whatever the model was trained on. The loader must not
    normalise too; where it cannot be changed, keep the model as it is and give ``eps / std`` and the normalised bounds
    instead.

    Args:
        model: A model of normalised images. It is wrapped, not copied; its parameters are named ``model.*``.
        mean: One number per channel.
        std: One number per channel.

    Returns:
        ``nn.Sequential`` with the layers ``normalize`` and ``model``.

    Example:
        >>> net = with_normalization(nn.Flatten(), mean=[0.5], std=[0.5])
        >>> net(torch.zeros(1, 1, 1, 2))
        tensor([[-1., -1.]])
    """
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def normalizes(model: nn.Module) -> bool:
    """Whether a layer of the model is :class:`Normalize`, so that it takes pixels in [0, 1]."""
    return any(isinstance(module, Normalize) for module in model.modules())


def _as_floats(values: Channels) -> list[float]:
    return [float(value) for value in values]

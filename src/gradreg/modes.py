"""What a forward pass depends on apart from its input: training flags, running statistics, random numbers.

Each context manager here changes one of them for a while and restores exactly what it found, also after an exception.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

RandomState = tuple[Tensor, Tensor | None]

# Of timm and torchvision, neither of which is imported here.
_RANDOM_DEPTH = ("DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d")


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its *own* flag back.

    ``model.train()`` afterwards would not do: it would also set modules training that the user had frozen with
    ``eval()``.

    Raises:
        TypeError: If model is not a module: the modes of what a function calls cannot be seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Evaluation mode needs an nn.Module, got {type(model).__name__}: the modes of the modules that a "
            "function calls cannot be seen. Wrap the model in a module, or call model.eval() and attack it with "
            'mode="keep".'
        )
    modules = list(model.modules())
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


@contextmanager
def frozen_statistics(model: object) -> Iterator[None]:
    """Batch statistics are used as before, but no running statistic moves: for passes other than the step's own.

    Other buffers that a forward pass changes, such as the vectors of ``spectral_norm`` in training mode, do move.

    Args:
        model: A module. Anything else (a function) hides its modules and is left alone.
    """
    norms = [m for m in _modules(model) if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [module.momentum for module in norms]
    try:
        for module in norms:
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
            else:  # InstanceNorm updates whatever it has, with this momentum
                module.momentum = 0.0
        yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.track_running_stats = True
            module.momentum = momentum


def batch_norms(model: object) -> list[nn.Module]:
    """The layers that normalise with the statistics of the batch at hand, and so let its samples see each other.

    Of other libraries: layers in training mode that keep a running statistic by its usual name (EvoNorm, say).
    """
    return [module for module in _modules(model) if _uses_batch(module)]


def _uses_batch(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    if isinstance(module, _NormBase):  # InstanceNorm, which has the same names
        return False
    return module.training and any(name in module._buffers for name in ("running_mean", "running_var"))


def dropouts(model: object) -> list[nn.Module]:
    """The layers that drop something at random: dropout in training mode, and stochastic depth by its usual names."""
    return [module for module in _modules(model) if module.training and _drop_rate(module) > 0]


def _modules(model: object) -> list[nn.Module]:
    """The modules of a model; none of a function, which hides them."""
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _drop_rate(module: nn.Module) -> float:
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    if isinstance(module, _DropoutNd) or type(module).__name__ in _RANDOM_DEPTH:
        return float(getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0)
    return 0.0


def random_state(device: torch.device) -> RandomState:
    """The state of the generators that a forward pass on this device draws from."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    generators = torch.get_device_module(device)
    return torch.get_rng_state(), generators.get_rng_state(*_of_many(device))


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw inside the block the random numbers that were drawn after ``state`` was taken; then go on as if not."""
    now = random_state(device)
    try:
        set_random_state(state, device)
        yield
    finally:
        set_random_state(now, device)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put the generators back to where they were."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.get_device_module(device).set_rng_state(on_device, *_of_many(device))


def _of_many(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that names one device of a kind, where there can be several."""
    return () if device.type == "mps" else (device,)

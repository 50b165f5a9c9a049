"""Activations that change their sharpness while a network trains."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from gradreg.smooth.calls import BUFFER, hooked
from gradreg.smooth.replace import REPLACED, set_fast_paths
from gradreg.smooth.survey import operation_of_module
from gradreg.smooth.twins import SmoothActivation


@final
class SharpnessAnnealing:
    """Sets the sharpness of a model's activations: call it with the step, before the forward pass.

    Attributes:
        model: The model.
        schedule: The sharpness at a step.
    """

    def __init__(self, model: nn.Module, schedule: Callable[[float], float]) -> None:
        self.model, self.schedule = model, schedule

    def __call__(self, t: float) -> float:
        """Set the sharpness of step t, and return it."""
        factor = self.schedule(t)
        if not factor > 0:
            raise ValueError(f"anneal_sharpness: sharpness must be above 0, and the schedule says {factor} at t={t}.")
        for module in self.model.modules():
            if isinstance(module, SmoothActivation) and isinstance(module.sharpness, Tensor):
                module.sharpness.fill_(factor * module.scale)
            elif isinstance(buffer := module._buffers.get(BUFFER), Tensor):
                buffer.fill_(factor)
        return factor


def anneal_sharpness(model: nn.Module, schedule: Callable[[float], float]) -> SharpnessAnnealing:
    """Let the activations of a smooth model change their sharpness with the optimiser's steps.

    A trained ReLU network that begins with sharp twins is nearly itself; as they get smoother, the penalty acts through
    more and more of it, and the weights follow. The sharpness is a buffer from now on: ``state_dict`` holds it,
    ``torch.compile`` does not compile anew when it changes, and ``torch.export`` takes it along. Call this before a
    state is loaded, and before the model is wrapped or compiled; then, at each step::

        sharpness = anneal_sharpness(model, linear_ramp(1.0, duration=1000, start=8.0))
        for t, (x, y) in enumerate(loader):
            sharpness(t)
            objective(model, x, y, t).total.backward()

    Args:
        model: What :func:`gradreg.smoothify` returned; it is changed in place.
        schedule: The sharpness at step t: :func:`gradreg.linear_ramp`, :func:`gradreg.cosine_ramp` or any function.

    Raises:
        ValueError: If nothing in the model is of smoothify, or the schedule has a value that is not above 0.

    Example:
        >>> from gradreg import linear_ramp, smoothify
        >>> model = smoothify(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> sharpness = anneal_sharpness(model, linear_ramp(1.0, duration=100, start=8.0))
        >>> sharpness(50), model[1].sharpness
        (4.5, tensor(4.5000))
    """
    found = 0
    for module in list(model.modules()):  # plain activations first get a sharpness
        for key, child in list(module._modules.items()):
            if child is not None and REPLACED in vars(child) and not isinstance(child, SmoothActivation):
                setattr(module, key, _with_sharpness(child))
                if key == "activation":
                    set_fast_paths(model, {module})
    for module in model.modules():
        if isinstance(module, SmoothActivation) and not isinstance(module.sharpness, Tensor):
            sharpness = module.sharpness
            del module.sharpness
            module.register_buffer("sharpness", torch.tensor(sharpness, device=_device(model)))
        elif (entered := hooked(module)) and entered.act is not None and BUFFER not in module._buffers:
            module.register_buffer(BUFFER, torch.tensor(entered.sharpness, device=_device(model)))
        found += _is_ours(module)
    if not found:
        raise ValueError("anneal_sharpness: there is nothing of smoothify in this model.")
    annealing = SharpnessAnnealing(model, schedule)
    annealing(0)
    return annealing


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, SmoothActivation) or BUFFER in module._buffers


def _with_sharpness(child: nn.Module) -> SmoothActivation:
    """A plain activation of smoothify's as one whose sharpness can change."""
    old = vars(child)[REPLACED]
    made = SmoothActivation(operation_of_module(old) if isinstance(old, nn.Module) else "relu", child).train(
        child.training
    )
    vars(made)[REPLACED] = vars(child).pop(REPLACED)
    vars(made).update({name: value for name, value in vars(child).items() if "_hook" in name})
    return made


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in model.parameters()), None)

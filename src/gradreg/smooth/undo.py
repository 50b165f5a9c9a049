"""Takes smooth activations out of a model again."""

from typing import Any

from torch import nn

from gradreg.smooth.calls import unhook
from gradreg.smooth.replace import FLAGS, REPLACED, copied
from gradreg.smooth.survey import check_module


def unsmoothify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put back the activations that :func:`smoothify` replaced, with the weights that the model has now.

    Args:
        model: A model that smoothify returned, or one that has such models in it.
        inplace: Change the model and return it, instead of a copy.

    Returns:
        The model as it was before: the same activations, shared where they were shared.

    Raises:
        TypeError: If the model is not an ``nn.Module``.
        ValueError: If the model itself is a replaced activation and inplace is set. The model is then as it was.

    Example:
        >>> from gradreg import smoothify
        >>> unsmoothify(smoothify(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Hardsigmoid())))
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
          (2): Hardsigmoid()
        )
    """
    check_module(model, "unsmoothify")
    if REPLACED in vars(model) and inplace:
        raise ValueError("unsmoothify: the model is itself an activation and cannot become another: leave inplace out.")
    target = model if inplace else copied(model, "unsmoothify")
    for module in list(target.modules()):
        _put_back(module)
    return _before(target) if REPLACED in vars(target) else target


def _put_back(module: nn.Module) -> None:
    for key, child in list(module._modules.items()):
        if child is not None and REPLACED in vars(child):
            if isinstance(before := _before(child), nn.Module):
                module._modules[key] = before  # in its place: a container runs its modules in their order
            else:
                delattr(module, key)
                setattr(module, key, before)
    for name, flag in vars(module).pop(FLAGS, {}).items():
        setattr(module, name, flag)
    unhook(module)


def _before(smooth: nn.Module) -> Any:
    """What an activation stands for, in the mode that it is in."""
    before = vars(smooth)[REPLACED]
    return before.train(smooth.training) if isinstance(before, nn.Module) else before

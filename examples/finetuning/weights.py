"""Weights: those to begin with, and those of a fine-tuned network, which ``load`` makes into a network again."""

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from gradreg import smoothify, with_normalization
from gradreg.state import replacing

from evaluate import read_weights


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace a file whole or not at all."""
    with replacing(path) as new:
        torch.save(content, new)


def load_weights(network: nn.Module, path: str) -> None:
    """Weights of a file, all but the classifier's: by their names, or by their order if the names are others."""
    found, expected = read_weights(Path(path)), network.state_dict()
    if not found.keys() & expected.keys():
        if len(found) != len(expected):
            raise SystemExit(f"--weights {path}: {len(found)} tensors, and the model has {len(expected)}.")
        found = dict(zip(expected, found.values(), strict=True))
    fitting = {name: value for name, value in found.items() if name in expected and value.shape == expected[name].shape}
    network.load_state_dict(fitting, strict=False)
    print(f"{path}: {len(fitting)} of {len(expected)} tensors; new: {', '.join(expected.keys() - fitting.keys())}")


def load(path: str | Path) -> nn.Module:
    """The fine-tuned network, taking pixels in [0, 1]."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model(saved["model"], num_classes=saved["num_classes"])
    if saved["act"]:
        network = smoothify(network, act=saved["act"], sharpness=saved["sharpness"])
    network.load_state_dict(saved["state_dict"])
    return with_normalization(network, saved["mean"], saved["std"]).eval()


def export(path: Path, model: nn.Module, about: dict[str, Any], *, pt2: bool) -> None:
    """Write the weights of a model for :func:`load`, and see that the same logits come out.

    Args:
        path: The file.
        model: As it was trained.
        about: Its ``model``, ``num_classes``, ``act``, ``sharpness``, ``mean``, ``std`` and ``size``, and what else is
            to be known of it.
        pt2: Whether to write a program of ``torch.export`` beside it.
    """
    expected = timm.create_model(about["model"], num_classes=about["num_classes"]).state_dict()
    weights = {name.removeprefix("model."): value.cpu() for name, value in model.state_dict().items()}
    save(path, {**about, "state_dict": {name: value for name, value in weights.items() if name in expected}})
    x = torch.rand(4, 3, about["size"], about["size"])
    loaded, trained = load(path), copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained(x), rtol=1e-4, atol=1e-4)
    if pt2:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(loaded, (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, path.with_suffix(".pt2"))

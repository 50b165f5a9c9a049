"""Checkpoints: written whole or not at all, read as data and never as code, refused if they belong to another run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradreg.state import replacing


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used. The last good one is left as it is."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by a checkpoint: after a kill or on a full disk the old one is still there."""
    _put(path, lambda new: torch.save(dict(content), new))


def export(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, as ``timm.create_model(..., checkpoint_path=path)`` reads them."""
    _put(path, lambda new: save_file({name: value.contiguous() for name, value in weights.items()}, new))


def _put(path: Path, write: Callable[[Path], None]) -> None:
    for half in path.parent.glob(f".{path.name}.*"):  # of a run that was killed while it wrote
        half.unlink(missing_ok=True)
    try:
        with replacing(path) as new:
            write(new)
    except Exception as error:
        kept = f"; {path} of before is intact" if path.exists() else ""
        raise CheckpointError(f"{path} could not be written: {error}{kept}.") from error


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; tensors and plain values alone are read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or "settings" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this script.")
    return content


def check_same_run(content: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Raise, naming what differs, unless a checkpoint was made with these settings."""
    before, now = _flat(content["settings"]), _flat(settings)
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if different:
        told = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:5])
        raise CheckpointError(
            f"{path} was made by another run: {told}. Give another --output, or the settings of before."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights in an exported file, or in a checkpoint: there the raw ones, of the model as timm builds it."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.suffix == ".safetensors":
        return load_file(path)
    weights = load(path)["model"]
    inside = all(name.startswith("model.") for name in weights)  # of the layer that normalises
    return {name.removeprefix("model.") if inside else name: value for name, value in weights.items()}

"""Normalisation as a layer: values, checkpoints, moves, composition with a model, and what it refuses."""

import copy
import math
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from gradreg import L1, L2, Linf, Normalize, ThreatModel, input_gradient, with_normalization

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_values() -> None:
    x = torch.rand(2, 3, 4, 5)
    normalised = Normalize(MEAN, STD)(x)
    for channel in range(3):
        torch.testing.assert_close(normalised[:, channel], (x[:, channel] - MEAN[channel]) / STD[channel])


def test_one_mean_for_any_number_of_channels() -> None:
    x = torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(Normalize([0.5], [0.25])(x), (x - 0.5) / 0.25)


def test_whole_numbers_are_numbers() -> None:
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(Normalize([0], [1])(x), x)


def test_checkpoints_of_the_model_keep_their_keys() -> None:
    model = nn.Linear(4, 2)
    wrapped = with_normalization(model, MEAN, STD)
    assert set(wrapped.state_dict()) == {"model.weight", "model.bias"}
    assert not Normalize(MEAN, STD).state_dict()
    wrapped.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()})
    assert not list(Normalize(MEAN, STD).parameters())


def test_wraps_and_does_not_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    wrapped = with_normalization(model, MEAN, STD)
    x = torch.rand(2, 3, 4, 4)
    assert wrapped.model is model
    assert isinstance(wrapped.normalize, Normalize)
    assert torch.equal(wrapped(x), model(Normalize(MEAN, STD)(x)))
    assert [name for name, _ in wrapped.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_penalty_on_pixels_is_one_on_normalised_images_of_radius_eps_over_std(kind: type[ThreatModel]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 2)).double()
    wrapped = with_normalization(model, MEAN, STD).double()
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    normalised = wrapped.normalize(pixels).detach().requires_grad_()
    in_pixels = kind(4 / 255).dual_norm(input_gradient(wrapped(pixels)[:, 0], pixels))
    outside = kind(4 / 255 / wrapped.normalize.std).dual_norm(input_gradient(model(normalised)[:, 0], normalised))
    torch.testing.assert_close(in_pixels, outside, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_moves_with_the_model(dtype: torch.dtype) -> None:
    moved = Normalize(MEAN, STD).to(dtype)
    assert moved.mean.dtype == moved.std.dtype == dtype
    assert moved(torch.rand(1, 3, 2, 2, dtype=dtype)).dtype == dtype
    on_meta = with_normalization(nn.Flatten(), MEAN, STD).to("meta")
    assert on_meta.normalize.mean.is_meta
    assert on_meta.normalize.std.is_meta


def test_copies_and_prints() -> None:
    layer, x = Normalize([0.5, 0.25], [0.25, 0.5]), torch.rand(1, 2, 3, 3)
    assert repr(layer) == "Normalize(mean=[0.5, 0.25], std=[0.25, 0.5])"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), eval(repr(layer))):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], "Normalize: mean has 1 channels, std has 2."),
        (MEAN, [0.5], "Normalize: mean has 3 channels, std has 1."),
        ([0.5, 0.5], [0.5, 0.0], "Normalize: every std must be above 0, got [0.5, 0.0]."),
        ([0.5, 0.5], [-0.5, 0.5], "Normalize: every std must be above 0, got [-0.5, 0.5]."),
        ([0.5, 0.5], [0.5, math.nan], "Normalize: every std must be above 0, got [0.5, nan]."),
    ],
)
def test_refuses(mean: Sequence[float], std: Sequence[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Normalize(mean, std)
    with pytest.raises(ValueError, match=re.escape(message)):
        with_normalization(nn.Flatten(), mean, std)


@pytest.mark.parametrize(("mean", "std"), [(0.5, [0.5]), ([0.5], 0.5)])
def test_refuses_a_single_number(mean: Any, std: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"0\.5, expected one number per channel: \[0\.5\]"):
        with_normalization(nn.Flatten(), mean, std)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4, 4), (2, 3), (2, 7), (3, 4, 4)], ids=str)
def test_refuses_images_of_other_channels(shape: tuple[int, ...], unchecked: None) -> None:
    with pytest.raises(ValueError, match=rf"^Normalize: .*{re.escape(str(shape))}"):
        Normalize(MEAN, STD)(torch.rand(shape))


def test_in_float64_it_has_the_numbers_given() -> None:
    layer = Normalize([0.45, 0.1], [0.225, 0.3]).double()
    assert layer.mean.flatten().tolist() == [0.45, 0.1]
    assert layer.std.flatten().tolist() == [0.225, 0.3]
    assert layer.float().std.dtype == torch.float32


def test_statistics_of_bytes() -> None:
    with pytest.raises(ValueError, match="divide both by 255"):
        Normalize([124, 117, 104], [58, 57, 57])

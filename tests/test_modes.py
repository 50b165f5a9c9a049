"""Modes, running statistics and random numbers: changed inside a block, restored afterwards, also on an exception."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from gradreg.modes import batch_norms, dropouts, evaluating, frozen_statistics, random_state, replayed

CPU = torch.device("cpu")


class SampleError(Exception):
    """Raised inside a block by the tests."""


def mixed_modes() -> nn.Sequential:
    """In training, but for one normalisation and one dropout that its user froze, and the container that holds them."""
    frozen = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)).eval()
    frozen[2].train()
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), frozen)


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_buffers(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# Flags


def test_evaluating_gives_every_module_its_own_flag_back() -> None:
    model = mixed_modes()
    before = flags(model)
    with evaluating(model):
        assert not any(flags(model))
    assert flags(model) == before
    assert len(set(before)) == 2


def test_evaluating_restores_after_an_exception() -> None:
    model = mixed_modes()
    before = flags(model)
    with pytest.raises(SampleError), evaluating(model):
        raise SampleError
    assert flags(model) == before


def test_evaluating_restores_what_was_changed_inside() -> None:
    model = mixed_modes()
    before = flags(model)
    with evaluating(model):
        model.train()
    assert flags(model) == before


def test_evaluating_nests_and_knows_shared_modules() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.Linear(2, 2).eval(), shared)
    before = flags(model)
    with evaluating(model):
        with evaluating(model):
            pass
        assert not any(flags(model))
    assert flags(model) == before


def test_evaluating_makes_the_model_deterministic() -> None:
    model, x = mixed_modes(), torch.randn(3, 2, 4, 4)
    before = buffers(model)
    with evaluating(model):
        assert torch.equal(model(x), model(x))
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
    assert same_buffers(model, before)


def test_functions_hide_their_modules() -> None:
    with pytest.raises(TypeError, match="function"), evaluating(lambda x: x):
        pass
    with frozen_statistics(lambda x: x):
        pass
    assert batch_norms(torch.sin) == dropouts(torch.sin) == []


# Running statistics

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32)),
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "cumulative": lambda: nn.BatchNorm2d(2, momentum=None),
    "without affine map": lambda: nn.BatchNorm2d(2, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(2, track_running_stats=False),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(2, track_running_stats=True),
    "timm": lambda: timm.layers.BatchNormAct2d(2),
    "nested": mixed_modes,
}
every_norm = pytest.mark.parametrize("make", list(NORMS.values()), ids=list(NORMS))


@every_norm
def test_frozen_statistics_are_not_updated(make: Callable[[], nn.Module]) -> None:
    model = make()
    model(torch.randn(3, 2, 4, 4))
    settings = [(getattr(m, "track_running_stats", None), getattr(m, "momentum", None)) for m in model.modules()]
    before, modes = buffers(model), flags(model)
    with frozen_statistics(model):
        model(5 + torch.randn(3, 2, 4, 4))
        assert flags(model) == modes
    assert same_buffers(model, before)
    assert settings == [
        (getattr(m, "track_running_stats", None), getattr(m, "momentum", None)) for m in model.modules()
    ]


@every_norm
def test_frozen_statistics_change_neither_output_nor_gradient(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(3, 2, 4, 4, requires_grad=True)

    def output_and_gradient() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        output = model(x)
        (gradient,) = torch.autograd.grad(output.square().sum() + output[0].sum(), x)
        return output, gradient

    with frozen_statistics(model):
        frozen = output_and_gradient()
    free = output_and_gradient()
    assert all(torch.equal(inside, outside) for inside, outside in zip(frozen, free, strict=True))


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "cumulative", "InstanceNorm2d", "timm"])
def test_statistics_are_updated_again_afterwards(name: str) -> None:
    model = NORMS[name]()
    before = buffers(model)
    with pytest.raises(SampleError), frozen_statistics(model):
        raise SampleError
    model(5 + torch.randn(3, 2, 4, 4))
    assert not same_buffers(model, before)


def test_frozen_statistics_leave_evaluation_mode_alone() -> None:
    model, x = nn.BatchNorm2d(2).eval(), torch.randn(3, 2, 4, 4)
    with frozen_statistics(model):
        assert model.track_running_stats
        assert torch.equal(model(x[:1]), model(x)[:1])
    assert model.track_running_stats


# What the batch and the generator have a hand in


def samples_see_each_other(model: nn.Module) -> bool:
    x = torch.randn(4, 2, 4, 4)

    def first_two(batch: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(batch)[:2]

    other = torch.cat([x[:2], 3 * x[2:]])
    with frozen_statistics(model):
        return not torch.allclose(first_two(x), first_two(other), atol=1e-6)


COUPLING: dict[str, Callable[[], nn.Module]] = {
    **NORMS,
    "BatchNorm in evaluation": lambda: nn.BatchNorm2d(2).eval(),
    "BatchNorm without statistics in evaluation": lambda: nn.BatchNorm2d(2, track_running_stats=False).eval(),
    "InstanceNorm without statistics": lambda: nn.InstanceNorm2d(2),
    "GroupNorm": lambda: nn.GroupNorm(1, 2),
    "LayerNorm": lambda: nn.LayerNorm((2, 4, 4)),
}


@pytest.mark.parametrize("make", list(COUPLING.values()), ids=list(COUPLING))
def test_batch_norms_are_the_layers_through_which_samples_see_each_other(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert bool(batch_norms(model)) == samples_see_each_other(model)


def test_batch_norms_names_the_modules_in_training() -> None:
    model = mixed_modes()
    assert batch_norms(model) == [model[1]]
    assert batch_norms(nn.SyncBatchNorm(4))
    assert batch_norms(model.eval()) == []


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout of nothing": lambda: nn.Dropout(0.0),
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "DropPath": lambda: timm.layers.DropPath(0.5),
    "DropPath of nothing": lambda: timm.layers.DropPath(0.0),
    "DropBlock2d of timm": lambda: timm.layers.DropBlock2d(0.5, block_size=3),
    "StochasticDepth": lambda: torchvision.ops.StochasticDepth(0.5, mode="row"),
    "StochasticDepth of nothing": lambda: torchvision.ops.StochasticDepth(0.0, mode="row"),
    "DropBlock2d of torchvision": lambda: torchvision.ops.DropBlock2d(0.5, block_size=3),
    "nested": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5)),
    "Conv2d": lambda: nn.Conv2d(2, 2, 1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
}


@pytest.mark.parametrize("make", list(DRAWING.values()), ids=list(DRAWING))
@pytest.mark.parametrize("training", [True, False])
def test_dropouts_are_the_layers_that_draw(make: Callable[[], nn.Module], training: bool) -> None:
    model, x = make().train(training), torch.randn(8, 2, 8, 8)
    outputs = [model(x) for _ in range(20)]
    assert bool(dropouts(model)) == any(not torch.equal(output, outputs[0]) for output in outputs)


def test_dropouts_are_found_in_a_model_of_timm() -> None:
    def model(**rates: float) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **rates)

    assert dropouts(model()) == []
    assert {type(module).__name__ for module in dropouts(model(drop_rate=0.1, drop_path_rate=0.1))} == {
        "Dropout",
        "DropPath",
    }
    assert dropouts(model(drop_rate=0.1, drop_path_rate=0.1).eval()) == []


# Random numbers


def test_replayed_draws_the_same_numbers_and_goes_on_as_if_not() -> None:
    torch.manual_seed(3)
    state = random_state(CPU)
    first, second, third = torch.rand(5), torch.rand(5), torch.rand(5)
    torch.manual_seed(3)
    with replayed(state, CPU):
        assert torch.equal(torch.rand(5), first)
        assert torch.equal(torch.rand(5), second)
    assert torch.equal(torch.rand(5), first)
    with replayed(state, CPU):
        assert torch.equal(torch.rand(5), first)
    assert torch.equal(torch.rand(5), second)
    assert torch.equal(torch.rand(5), third)


def test_replayed_drops_the_same_units() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), timm.layers.DropPath(0.5)), torch.ones(6, 10)
    state = random_state(CPU)
    output = model(x)
    assert not torch.equal(model(x), output)
    with replayed(state, CPU):
        assert torch.equal(model(x), output)
    with replayed(state, CPU):
        assert torch.equal(model(2 * x), 2 * output)


def test_replayed_restores_after_an_exception() -> None:
    state = random_state(CPU)
    torch.rand(3)
    now = torch.get_rng_state()

    def draw_and_raise() -> None:
        torch.rand(7)
        raise SampleError

    with pytest.raises(SampleError), replayed(state, CPU):
        draw_and_raise()
    assert torch.equal(torch.get_rng_state(), now)


def test_random_state_is_a_copy() -> None:
    state = random_state(CPU)
    saved = state[0].clone()
    torch.rand(3)
    assert torch.equal(state[0], saved)
    assert state[1] is None

"""The recipes: every number that the sources give, typed again, and what is refused.

``paper-facts`` stands for what was found in the thesis and in its released code; the numbers here are those of its
sections 1, 2 and 4, and not read from the recipes.
"""

import fnmatch
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
import yaml
from pydantic import BaseModel
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from gradreg import Linf, contour_energy, oriented_energy, sampled_class

from imagenet import data
from imagenet.building import (
    build_attack,
    build_model,
    build_objective,
    build_optimizer,
    build_schedule,
    peak_lr,
    validation_attack,
)
from imagenet.checkpoints import _flat
from imagenet.data import Images, Parts, Place, mixed
from imagenet.recipe import FOLDER, FORMS, Recipe, RecipeError, load, names
from imagenet.training import Options, Training, World

ACTIVATIONS = ("relu", "gelu", "silu")
FORMS_OF = {name: [form for form in FORMS if form in yaml.safe_load((FOLDER / f"{name}.yaml").read_text())]
            for name in names()}  # fmt: skip
ALL = [(name, form) for name, forms in FORMS_OF.items() for form in forms]
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
TINY_SWIN = [
    "model.name=swin_tiny_patch4_window7_224", "model.pretrained=false", "model.starts_from=null",
    "model.options={img_size: 56, embed_dim: 24, depths: [1, 1], num_heads: [2, 4]}", "data.size=56",
]  # fmt: skip

# paper-facts 4: epochs, lrb, warm-up lr, images of a step, parts, clip.
AUTHOR_CODE: dict[str, tuple[int, float, float, int, int, float | None]] = {
    "swin_b_gradnorm": (100, 0.625e-3, 1e-5, 38 * 2 * 7, 2, 1.0),
    "swin_l_gradnorm": (100, 0.625e-3, 1e-5, 38 * 2 * 7, 2, 1.0),
    "swin_b_gradnorm_pareto": (30, 2.5e-5, 1e-5, 38 * 2 * 7, 2, 1.0),
    "swin_b_edges": (100, 0.625e-3, 1e-5, 38 * 2 * 7, 2, 1.0),
    "swin_b_adversarial": (100, 1.25e-3, 1e-6, 64 * 8, 1, None),
    "swin_b_adversarial1": (100, 1.25e-3, 1e-6, 64 * 8, 1, None),
    "swin_b_natural": (100, 0.625e-3, 1e-6, 74 * 8, 1, 1.0),
    "resnet50_relu_gradnorm": (50, 0.625e-3, 1e-6, 64 * 4, 1, 1.0),
    "resnet50_gelu_gradnorm": (83, 1.25e-3, 1e-6, 64 * 4, 1, 1.0),
    "resnet50_silu_gradnorm": (50, 1.25e-3, 1e-6, 32 * 2 * 4, 2, 1.0),
    "resnet50_gelu_edges": (100, 1.25e-3, 1e-6, 38 * 7, 1, 1.0),
    "resnet50_gelu_adversarial1": (50, 1.25e-3, 1e-6, 64 * 4, 1, None),
    **{f"resnet50_{name}_adversarial": (50, 1.25e-3, 1e-6, 64 * 4, 1, None) for name in ACTIVATIONS},
    **{f"resnet50_{name}_natural": (50, 1.25e-3, 1e-6, 64 * 4, 1, None) for name in ACTIVATIONS},
    **{f"resnet50_{name}_finetune": (4, 1.25e-3, 1e-6, 64 * 4, 1, 1.0) for name in ACTIVATIONS},
}
# The thesis's appendix B and sections 4.3 and 5: epochs, lrb, warm-up lr, batch. It has no clipping and no parts.
THESIS: dict[str, tuple[int, float, float, int]] = {
    "swin_b_gradnorm": (100, 0.625e-3, 1e-5, 532),
    "swin_b_adversarial": (100, 1.25e-3, 1e-6, 512),
    "swin_b_natural": (100, 0.625e-3, 1e-6, 512),
    "swin_b_edges": (128, 0.625e-3, 1e-5, 532),
    **{f"resnet50_{name}_gradnorm": (50, 1.25e-3, 1e-6, 256) for name in ACTIVATIONS},
    **{f"resnet50_{name}_adversarial": (50, 1.25e-3, 1e-6, 256) for name in ACTIVATIONS},
    **{f"resnet50_{name}_finetune": (3, 1.25e-3, 1e-6, 256) for name in ACTIVATIONS},
}
PEAKS = {  # of the released code, as they come out
    "swin_b_gradnorm": 6.494140625e-4,
    "swin_b_gradnorm_pareto": 2.59765625e-5,
    "swin_b_adversarial": 1.25e-3,
    "swin_b_natural": 7.2265625e-4,
    "resnet50_gelu_gradnorm": 6.25e-4,
    "resnet50_relu_gradnorm": 3.125e-4,
    "resnet50_gelu_edges": 6.494140625e-4,
}
# paper-facts 4: weight of the loss, weight of the penalty, and alpha's start, slope and end.
GRADNORM = {
    ("swin_b_gradnorm", "thesis"): (0.8, 1.2, 0.0, 0.2, 1.0),
    ("swin_b_gradnorm", "author_code"): (0.8, 1.2, 0.0, 0.2, 1.0),
    ("swin_b_gradnorm", "pixel"): (0.8, 1.2, 0.0, 0.2, 1.0),
    ("swin_l_gradnorm", "author_code"): (0.8, 1.2, 0.0, 0.2, 1.0),
    ("swin_b_gradnorm_pareto", "author_code"): (0.6, 1.4, 1.0, 0.0, 1.0),
    ("resnet50_relu_gradnorm", "thesis"): (0.5, 0.5, 0.0, 0.2, 1.0),
    ("resnet50_gelu_gradnorm", "thesis"): (0.5, 0.5, 0.0, 0.2, 1.0),
    ("resnet50_silu_gradnorm", "thesis"): (0.5, 0.5, 0.0, 0.2, 1.0),
    ("resnet50_relu_gradnorm", "author_code"): (0.5, 0.5, 0.0, 0.1, 1.0),
    ("resnet50_gelu_gradnorm", "author_code"): (0.8, 1.2, 0.0, 0.2, 1.0),
    ("resnet50_silu_gradnorm", "author_code"): (0.5, 0.5, 0.0, 0.2, 1.0),
}
# paper-facts 4: steps and step size.
ATTACKS = {
    "swin_b_adversarial": (3, 8 / 255 / 3),
    "swin_b_adversarial1": (1, 5 / 255),
    "resnet50_gelu_adversarial1": (1, 5 / 255),
    **{f"resnet50_{name}_adversarial": (3, 8 / 255 / 3) for name in ACTIVATIONS},
}
# paper-facts 1.1, 1.3, 1.8 and Table 4.4 of the thesis: clean, and AutoAttack at 1/255, 2/255 and 4/255.
NOT = "not published"
PUBLISHED = {
    "swin_b_natural": (84.19, {"1/255": 0.0, "2/255": 0.0, "4/255": 0.0}),
    "swin_b_gradnorm": (77.78, {"1/255": 72.04, "2/255": 66.20, "4/255": 51.58}),
    "swin_b_adversarial": (77.20, {"1/255": 72.46, "2/255": 67.38, "4/255": 56.12}),
    "swin_b_edges": (76.80, {"1/255": NOT, "2/255": NOT, "4/255": 35.02}),
    "swin_l_gradnorm": (79.36, {"4/255": 53.82}),
    "resnet50_relu_gradnorm": (16.94, {"4/255": 6.82}),
    "resnet50_gelu_gradnorm": (60.34, {"4/255": 30.00}),
    "resnet50_silu_gradnorm": (61.84, {"4/255": 30.58}),
    "resnet50_relu_adversarial": (59.46, {"4/255": 31.60}),
    "resnet50_gelu_adversarial": (59.34, {"4/255": 32.64}),
    "resnet50_silu_adversarial": (60.58, {"4/255": 33.40}),
}


class FakeImages:
    """As many images as asked for, none of which can be read."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count


# Loading


@pytest.mark.parametrize(("name", "form"), ALL)
def test_every_recipe_loads_in_every_form(name: str, form: str) -> None:
    recipe = load(name, form)
    assert (recipe.recipe, recipe.form) == (name, form)
    assert recipe.published["source"]
    assert yaml.safe_load(str(recipe)) == recipe.model_dump(mode="json")
    assert recipe.settings().keys() == Recipe.model_fields.keys() - {"published", "notes", "title", "validation"}


def test_every_experiment_has_its_forms() -> None:
    assert {name for name, form in ALL if form == "author_code"} == set(AUTHOR_CODE)
    assert {name for name, form in ALL if form == "thesis"} == set(THESIS)
    assert {name for name, form in ALL if form == "pixel"} == set(names())


def _parts(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield kind
    for field in kind.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _parts(inner)


def test_no_key_has_a_default_outside_of_the_files() -> None:
    kinds = list(_parts(Recipe))
    assert len(kinds) == 13  # with the ramp of either penalty
    assert [(kind.__name__, name) for kind in kinds for name, field in kind.model_fields.items()
            if not field.is_required()] == []  # fmt: skip


@pytest.mark.parametrize("place", [(), ("model",), ("objective",), ("validation",), ("data",)])
def test_a_key_that_is_nowhere_is_missing(place: tuple[str, ...]) -> None:
    from imagenet.recipe import parse

    whole = load("swin_b_gradnorm", "pixel").model_dump()
    section: dict[str, Any] = whole
    for name in place:
        section = section[name]
    for key in list(section):
        value = section.pop(key)
        with pytest.raises(RecipeError, match=f"^here: {'.'.join((*place, key))} is missing$"):
            parse(whole, "here")
        section[key] = value


def test_a_change_is_laid_over_all_else() -> None:
    recipe = load("swin_b_gradnorm", "author_code", ["optimizer.lr=1e-3", "objective.grad_norm.eps=2/255", "ema=null"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.objective.grad_norm is not None
    assert recipe.objective.grad_norm.eps == 2 / 255
    assert recipe.objective.grad_norm.weight == 1.2
    assert recipe.ema is None


# Numbers of the sources


@pytest.mark.parametrize("name", AUTHOR_CODE)
def test_the_released_configuration(name: str) -> None:
    recipe = load(name, "author_code")
    epochs, lr, warmup_lr, total, parts, clip = AUTHOR_CODE[name]
    found = recipe.schedule.epochs, recipe.optimizer.lr, recipe.schedule.warmup_lr, recipe.batch.total
    assert found == (epochs, lr, warmup_lr, total)
    assert (recipe.batch.accumulation, recipe.optimizer.clip_grad, recipe.optimizer.lr_batch) == (parts, clip, 512)
    assert recipe.batch.reduction == ("sum" if parts > 1 else "mean")
    trains = "edges" in name or name == "swin_b_adversarial"  # paper-facts 3, row 4
    assert recipe.model.mode == ("train" if trains else "eval")
    assert recipe.ema == (None if "finetune" in name else 0.9998)


@pytest.mark.parametrize("name", THESIS)
def test_the_printed_configuration(name: str) -> None:
    recipe = load(name, "thesis")
    found = recipe.schedule.epochs, recipe.optimizer.lr, recipe.schedule.warmup_lr, recipe.batch.total
    assert found == THESIS[name]
    assert (recipe.batch.accumulation, recipe.optimizer.clip_grad, recipe.optimizer.lr_batch) == (1, None, None)
    assert peak_lr(recipe) == THESIS[name][1]
    assert recipe.model.mode == ("eval" if "resnet50" in name else "train")


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ALL if "tiny" not in name])
def test_what_all_have_in_common(name: str, form: str) -> None:
    recipe = load(name, form)
    optimizer, schedule, images = recipe.optimizer, recipe.schedule, recipe.data
    assert (optimizer.name, optimizer.weight_decay, optimizer.eps) == ("adamw", 0.05, 1e-8)
    assert (schedule.warmup_epochs, schedule.min_lr) == (5, 1e-5)
    assert (images.mean, images.std, images.size) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
    assert images.inputs == ("pixel" if form == "pixel" else "normalized")
    assert recipe.model.options == {"drop_rate": 0.0, "drop_path_rate": 0.0}
    assert (recipe.precision, recipe.seed, recipe.objective.differentiation) == ("float32", 0, "exact")
    assert recipe.validation.model_dump() == {
        "every": 1, "eps": 4 / 255, "steps": 10, "step_size": 1 / 255, "images": None,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ALL if "tiny" not in name])
def test_the_model_and_where_it_starts(name: str, form: str) -> None:
    model = load(name, form).model
    if "resnet50" in name:
        activation = next(part for part in ACTIVATIONS if part in name)
        starts_from = None if "finetune" in name else f"resnet50_{activation}_finetune"
        expected = "resnet50.a1_in1k", None if activation == "relu" else activation, starts_from
    else:
        size = "large" if "swin_l" in name else "base"
        starts_from = "swin_b_gradnorm" if "pareto" in name else None
        expected = f"swin_{size}_patch4_window7_224.ms_in22k_ft_in1k", None, starts_from
    assert (model.name, model.activation, model.starts_from) == expected
    assert model.pretrained == (starts_from is None)
    assert starts_from is None or form in FORMS_OF[starts_from] or form == "pixel"


@pytest.mark.parametrize(("name", "expected"), PEAKS.items())
def test_the_peak_learning_rate(name: str, expected: float) -> None:
    assert peak_lr(load(name, "author_code")) == pytest.approx(expected, rel=1e-14)


def test_the_peak_learning_rate_of_swin_b_gradnorm() -> None:
    assert peak_lr(load("swin_b_gradnorm", "author_code")) == pytest.approx(0.625e-3 * 532 / 512, rel=1e-15)
    assert f"{peak_lr(load('swin_b_gradnorm', 'author_code')):.3e}" == "6.494e-04"


def learning_rates(recipe: Recipe) -> list[float]:
    optimizer = build_optimizer(recipe, nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    schedule = build_schedule(recipe, optimizer)
    rates = []
    for epoch in range(recipe.schedule.epochs):
        schedule.step(epoch)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _formula(epoch: int, epochs: int, peak: float, warmup_lr: float) -> float:
    """Section 2.1 of paper-facts."""
    if epoch < 5:
        return warmup_lr + epoch * (peak - warmup_lr) / 5
    return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / epochs))


@pytest.mark.parametrize("name", AUTHOR_CODE)
def test_the_learning_rate_of_every_epoch_of_the_released_code(name: str) -> None:
    epochs, lr, warmup_lr, total, _, _ = AUTHOR_CODE[name]
    expected = [_formula(epoch, epochs, lr * total / 512, warmup_lr) for epoch in range(epochs)]
    assert learning_rates(load(name, "author_code")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", THESIS)
def test_the_learning_rate_of_every_epoch_of_the_text(name: str) -> None:
    epochs, lr, warmup_lr, _ = THESIS[name]
    expected = [_formula(epoch, epochs, lr, warmup_lr) for epoch in range(epochs)]
    assert learning_rates(load(name, "thesis")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 1e-5),
        (1, 1.378828125e-4),
        (4, 5.215312500e-4),
        (5, 6.454779384e-4),
        (50, 3.297070312e-4),
        (99, 1.0157756121e-5),
    ],
)
def test_the_learning_rate_of_swin_b_gradnorm_in_digits(epoch: int, expected: float) -> None:
    """The same formula, worked out beforehand."""
    assert learning_rates(load("swin_b_gradnorm", "author_code"))[epoch] == pytest.approx(expected, rel=1e-7)


def test_fine_tuning_ends_before_its_warm_up_does() -> None:
    rates = learning_rates(load("resnet50_gelu_finetune", "author_code"))
    assert rates == sorted(rates)
    assert rates == pytest.approx([1e-6, 1.258e-4, 2.506e-4, 3.754e-4])


# Optimiser


@pytest.mark.parametrize(("form", "prefix"), [("author_code", ""), ("pixel", "model.")])
def test_what_decays_of_a_swin(form: str, prefix: str) -> None:
    recipe = load("swin_b_gradnorm", form, TINY_SWIN)
    model = build_model(recipe, classes=4)
    optimizer = build_optimizer(recipe, model)
    parameters = dict(model.named_parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(parameters)
    exempt = "relative_position_bias_table", "absolute_pos_embed"
    for name, parameter in parameters.items():
        spared = parameter.ndim == 1 or name.endswith(".bias") or any(part in name for part in exempt)
        assert decay[id(parameter)] == (0.0 if spared else 0.05), name
    assert {name.removeprefix(prefix) for name, p in parameters.items() if decay[id(p)]} == {
        "patch_embed.proj.weight",
        "layers.0.blocks.0.attn.qkv.weight",
        "layers.0.blocks.0.attn.proj.weight",
        "layers.0.blocks.0.mlp.fc1.weight",
        "layers.0.blocks.0.mlp.fc2.weight",
        "layers.1.downsample.reduction.weight",
        "layers.1.blocks.0.attn.qkv.weight",
        "layers.1.blocks.0.attn.proj.weight",
        "layers.1.blocks.0.mlp.fc1.weight",
        "layers.1.blocks.0.mlp.fc2.weight",
        "head.fc.weight",
    }


def test_the_optimiser_is_adamw_as_published() -> None:
    group = build_optimizer(load("swin_b_gradnorm", "author_code"), nn.Linear(2, 2)).param_groups[0]
    assert group["betas"] == (0.9, 0.999)
    assert group["eps"] == 1e-8


def trained(recipe: Recipe, steps: int) -> tuple[Training, list[dict[str, Tensor]]]:
    """A run on noise, and the state of its model before the first step and after each."""
    world = World(rank=0, processes=1, device=torch.device("cpu"))
    training = Training(recipe, FakeImages(100, classes=4), world, Options(Path("unused")))
    states = [{name: value.clone() for name, value in training.model.state_dict().items()}]
    size = recipe.batch.of_a_part(1)
    stream = ((torch.randn(size, 3, 32, 32), torch.arange(size) % 4) for _ in range(steps * recipe.batch.accumulation))
    for _ in range(steps):
        training.take_step(stream)
        states.append({name: value.clone() for name, value in training.model.state_dict().items()})
    return training, states


def test_every_entry_of_the_state_is_averaged_with_9998() -> None:
    small = ["model.name=resnet10t", "model.pretrained=false", "model.starts_from=null", "batch.total=4"]
    recipe = load("resnet50_gelu_natural", "author_code", [*small, "model.mode=train", "optimizer.lr_batch=null"])
    training, states = trained(recipe, steps=2)
    assert training.ema is not None
    averaged = training.ema.module.state_dict()
    assert averaged.keys() == states[0].keys()
    moved = [name for name in averaged if not states[0][name].equal(states[2][name])]
    assert sum("running" in name for name in moved) == sum("running" in name for name in averaged) > 10
    assert len(moved) == len(averaged)
    for name, value in averaged.items():
        if value.is_floating_point():
            expected = states[0][name].double()
            for state in states[1:]:
                expected = 0.9998 * expected + 0.0002 * state[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-7)


# Objective


@pytest.mark.parametrize(("name", "form"), GRADNORM)
def test_the_weight_of_the_gradient_norm_at_every_iteration(name: str, form: str) -> None:
    loss_weight, weight, start, slope, end = GRADNORM[name, form]
    objective = build_objective(load(name, form), steps_per_epoch=7)
    assert objective.loss_weight == loss_weight
    assert list(objective.terms) == ["grad_norm"]
    for epoch in (0, 1, 4, 5, 9, 10, 49):
        for iteration in (0, 1, 3, 6):
            alpha = min(max(start + (epoch + iteration / 7) * slope, 0), end)
            found = objective.terms["grad_norm"].weight_at(7 * epoch + iteration)
            assert found == pytest.approx(weight * alpha, rel=1e-12, abs=1e-15)


def test_the_weight_of_the_gradient_norm_in_digits() -> None:
    weight_at = build_objective(load("swin_b_gradnorm", "author_code"), steps_per_epoch=10).terms["grad_norm"].weight_at
    found = [weight_at(t) for t in (0, 1, 10, 25, 49, 50, 999)]
    assert found == pytest.approx([0, 0.024, 0.24, 0.6, 1.176, 1.2, 1.2])


@pytest.mark.parametrize(
    ("name", "form", "factor"),
    [
        ("swin_b_edges", "author_code", 2.0),
        ("swin_b_edges", "thesis", 1.0),
        ("swin_b_edges", "pixel", 2.0),
        ("resnet50_gelu_edges", "author_code", 2.0),
    ],
)
def test_the_weight_of_the_edges(name: str, form: str, factor: float) -> None:
    """Twice the published weight of a mean squared error, in the place of one minus a cosine."""
    objective = build_objective(load(name, form), steps_per_epoch=7)
    assert objective.loss_weight == 1
    assert list(objective.terms) == ["edges"]
    weight_at = objective.terms["edges"].weight_at
    for epoch, iteration in ((0, 0), (0, 3), (1, 0), (64, 2), (99, 6)):
        assert weight_at(7 * epoch + iteration) == pytest.approx(factor * (1 + 0.09 * (epoch + iteration / 7)))
    assert weight_at(7 * 100) == pytest.approx(factor * 10)
    assert weight_at(7 * 128) == pytest.approx(factor * 12.52)
    assert weight_at(7 * 200 - 1) < factor * 19
    assert weight_at(7 * 200) == weight_at(7 * 300) == pytest.approx(factor * 19)


@pytest.mark.parametrize(
    ("name", "form", "energy", "level"),
    [
        ("swin_b_edges", "thesis", oriented_energy, "sample"),
        ("swin_b_edges", "author_code", contour_energy, "batch"),
        ("resnet50_gelu_edges", "author_code", contour_energy, "batch"),
    ],
)
def test_the_edges_that_a_gradient_is_aligned_with(name: str, form: str, energy: Any, level: str) -> None:
    term = build_objective(load(name, form), steps_per_epoch=7).terms["edges"]
    assert (term.penalty.energy, term.penalty.level, term.penalty.sigma) == (energy, level, 1.0)
    assert term.penalty.of == sampled_class(0.5)


@pytest.mark.parametrize("form", ["thesis", "author_code"])
@pytest.mark.parametrize("name", ["swin_b_gradnorm", "resnet50_gelu_gradnorm"])
def test_the_factor_of_the_penalty_is_eps_over_one_sigma(name: str, form: str) -> None:
    threat = build_objective(load(name, form), steps_per_epoch=7).terms["grad_norm"].penalty.threat
    assert isinstance(threat, Linf)
    assert threat.eps == pytest.approx(0.069717, abs=5e-7)
    assert threat.eps == pytest.approx(4 / 255 / 0.225, rel=1e-14)


def test_without_a_sigma_each_channel_has_its_own() -> None:
    recipe = load("swin_b_gradnorm", "author_code", ["objective.grad_norm.sigma=null"])
    threat = build_objective(recipe, steps_per_epoch=7).terms["grad_norm"].penalty.threat
    torch.testing.assert_close(threat.eps, 4 / 255 / STD)


def test_pixels_are_penalised_in_pixels() -> None:
    threat = build_objective(load("swin_b_gradnorm", "pixel"), steps_per_epoch=7).terms["grad_norm"].penalty.threat
    assert threat.eps == 4 / 255


# Attack


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("form", FORMS)
def test_the_attack_of_every_epoch(name: str, form: str) -> None:
    if form not in FORMS_OF[name]:
        form = "author_code"
    steps, size = ATTACKS[name]
    unit = torch.ones(3, 1, 1) if form == "pixel" else STD
    for epoch in (0, 1, 2, 4, 5, 6, 99):
        attack = build_attack(load(name, form), epoch)
        assert attack.steps == steps
        torch.testing.assert_close(attack.threat.eps * unit, 4 / 255 * torch.ones(3, 1, 1))
        torch.testing.assert_close(attack.step_size * unit, size * min(epoch, 5) / 5 * torch.ones(3, 1, 1))
    low, high = (torch.as_tensor(bound) for bound in attack.bounds)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) if form != "pixel" else torch.zeros(3, 1, 1)
    torch.testing.assert_close(low * unit + mean, torch.zeros(3, 1, 1))
    torch.testing.assert_close(high * unit + mean, torch.ones(3, 1, 1))


@pytest.mark.parametrize(
    ("form", "best", "final_check"), [("thesis", "last", "normalized"), ("author_code", "batch", "raw")]
)
@pytest.mark.parametrize("name", [name for name in ATTACKS if name in THESIS])
def test_which_point_adversarial_training_takes(name: str, form: str, best: str, final_check: str) -> None:
    attack = load(name, form).objective.attack
    assert attack is not None
    assert (attack.best, attack.final_check) == (best, final_check)


def test_the_first_epoch_of_adversarial_training_has_noise_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.zeros(2, 3, 2, 2)
    x_adv = build_attack(load("swin_b_adversarial", "thesis"), 0)(model, x, torch.tensor([0, 1]))
    torch.manual_seed(1)
    other = build_attack(load("swin_b_adversarial", "thesis"), 0)(model, x, torch.tensor([1, 0]))
    pixels = (x_adv * STD, other * STD)
    assert all(0.5 * 4 / 255 < noise.abs().max() <= 4 / 255 * (1 + 1e-6) for noise in pixels)
    assert not pixels[0].equal(pixels[1])


@pytest.mark.parametrize("form", ["author_code", "pixel"])
def test_validation_is_with_ten_steps_of_one(form: str) -> None:
    attack = validation_attack(load("swin_b_gradnorm", form))
    unit = 1 if form == "pixel" else STD
    assert attack.steps == 10
    for length, pixels in ((attack.threat.eps, 4 / 255), (attack.step_size, 1 / 255)):
        found = torch.as_tensor(length) * unit
        torch.testing.assert_close(found, torch.full_like(found, pixels))
    assert attack.random_start
    assert attack.best is False


# Batch


def test_the_batch_of_532() -> None:
    batch = load("swin_b_gradnorm", "author_code").batch
    assert batch.total == 38 * 2 * 7
    assert batch.of_a_part(processes=7) == 38
    assert load("swin_b_gradnorm", "thesis").batch.of_a_part(processes=7) == 76
    assert load("swin_b_natural", "author_code").batch.of_a_part(processes=8) == 74
    assert load("resnet50_silu_gradnorm", "author_code").batch.of_a_part(processes=4) == 32
    assert load("resnet50_gelu_edges", "author_code").batch.of_a_part(processes=7) == 38


@pytest.mark.parametrize("processes", [3, 8, 532])
def test_a_batch_that_cannot_be_shared_is_refused(processes: int) -> None:
    match = f"batch: 532 images cannot be shared by {processes} processes of 2 parts each. Set batch.total"
    with pytest.raises(RecipeError, match=match):
        load("swin_b_gradnorm", "author_code").batch.of_a_part(processes)


def test_mixup_of_an_odd_part_is_refused() -> None:
    recipe = load("swin_b_gradnorm", "author_code", ["batch.total=14"])
    with pytest.raises(RecipeError, match="batch: mixup pairs the images of a part, and 7 is odd"):
        Parts(100, recipe, rank=0, processes=1, start=0)
    plain = load("swin_b_gradnorm", "author_code", ["batch.total=14", "data.mixup=0", "data.cutmix=0"])
    assert len(next(iter(Parts(100, plain, rank=0, processes=1, start=0)))) == 7


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"data: 531 training images make no batch of 532\. Set batch"):
        Parts(531, load("swin_b_gradnorm", "author_code"), rank=0, processes=7, start=0)


def test_an_epoch_leaves_out_the_rest() -> None:
    parts = Parts(1_281_167, load("swin_b_gradnorm", "author_code"), rank=0, processes=7, start=0)
    assert parts.steps_per_epoch == 2408
    assert parts.steps == 240_800
    assert len(parts) == 481_600


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_images_of_a_step_hang_on_neither_processes_nor_parts(processes: int, accumulation: int) -> None:
    def of_steps(processes: int, accumulation: int, start: int = 0) -> list[list[tuple[int, int]]]:
        recipe = load("swin_b_natural", "pixel", ["batch.total=12", f"batch.accumulation={accumulation}",
                                                 "schedule.epochs=2"])  # fmt: skip
        ranks = [list(Parts(40, recipe, rank, processes, start)) for rank in range(processes)]
        steps = range(len(ranks[0]) // accumulation)
        return [
            sorted(key for rank in ranks for part in rank[accumulation * s : accumulation * (s + 1)] for key in part)
            for s in steps
        ]

    expected = of_steps(1, 1)
    assert of_steps(processes, accumulation) == expected
    assert of_steps(processes, accumulation, start=4) == expected[4:]
    for epoch, steps in enumerate((expected[:3], expected[3:])):
        seen = [key for step in steps for key in step]
        assert len(set(seen)) == len(seen) == 36
        assert {when for when, _ in seen} == {epoch}
    assert sorted(i for _, i in expected[0]) != sorted(i for _, i in expected[3])


# Images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 30), "red").save(folder / split / name / "image.png")
    return folder


def test_the_augmentation_of_the_sources_in_its_order(folder: Path) -> None:
    steps = Images(folder, "train", load("swin_b_gradnorm", "author_code")).transform.transforms
    crop, flip, augment, to_tensor, normalise, erase = steps
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(augment, RandAugment)
    assert augment.num_layers == 2
    assert len(augment.ops) == 15
    for op in augment.ops:
        assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
        assert (op.hparams["translate_const"], op.hparams["img_mean"]) == (100, (124, 116, 104))
    assert {op.name for op in augment.ops} >= {"PosterizeIncreasing", "SolarizeAdd", "ColorIncreasing"}
    assert isinstance(to_tensor, MaybeToTensor)
    assert isinstance(normalise, transforms.Normalize)
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert isinstance(erase, RandomErasing)
    assert (erase.probability, erase.per_pixel, erase.rand_color) == (0.25, True, False)
    assert (erase.min_area, erase.max_area, erase.min_count, erase.max_count) == (0.02, 1 / 3, 1, 1)


def test_pixels_are_augmented_alike_and_brought_back(folder: Path) -> None:
    published = Images(folder, "train", load("swin_b_gradnorm", "author_code"))
    pixels = Images(folder, "train", load("swin_b_gradnorm", "pixel"))
    kinds = [type(step) for step in published.transform.transforms]
    assert [type(step) for step in pixels.transform.transforms] == [*kinds, transforms.Normalize]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    for epoch in range(3):
        torch.testing.assert_close(pixels[epoch, 1][0], published[epoch, 1][0] * STD + mean, rtol=0, atol=1e-6)


def test_the_crop_of_validation_images(folder: Path) -> None:
    resize, crop, to_tensor, normalise = Images(folder, "val", load("swin_b_gradnorm", "thesis")).transform.transforms
    assert (resize.size, resize.interpolation) == (256, InterpolationMode.BICUBIC)
    assert crop.size == (224, 224)
    assert isinstance(to_tensor, MaybeToTensor)
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_augmentation_is_a_function_of_seed_epoch_and_image(folder: Path) -> None:
    images = Images(folder, "train", load("swin_b_gradnorm", "author_code"))
    again = Images(folder, "train", load("swin_b_gradnorm", "author_code"))
    other = Images(folder, "train", load("swin_b_gradnorm", "author_code", ["seed=1"]))
    first = [images[epoch, index][0] for epoch in range(4) for index in range(2)]
    torch.rand(7)  # moves the state of a generator that nothing should look at
    backwards = [again[epoch, index][0] for epoch in reversed(range(4)) for index in reversed(range(2))]
    assert all(a.equal(b) for a, b in zip(first, reversed(backwards), strict=True))
    assert all(not a.equal(b) for i, a in enumerate(first) for b in first[:i])
    assert not any(first[2 * epoch + index].equal(other[epoch, index][0]) for epoch in range(4) for index in range(2))


def test_mixup_has_the_published_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    kind = data.Mixup

    def noted(*args: Any, **more: Any) -> Any:
        made.append(kind(*args, **more))
        return made[-1]

    monkeypatch.setattr(data, "Mixup", noted)
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    _, y = mixed(x, labels, load("swin_b_gradnorm", "author_code"), 1000, Place(0, 0, 0))
    (mixup,) = made
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.mix_prob) == (0.8, 1.0, 0.5, 1.0)
    assert (mixup.label_smoothing, mixup.num_classes, mixup.mode, mixup.cutmix_minmax) == (0.1, 1000, "batch", None)
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    torch.testing.assert_close(y.min(1).values, torch.full((4,), 0.1 / 1000))


def test_labels_are_smoothed_without_mixup_too() -> None:
    recipe = load("swin_b_gradnorm", "author_code", ["data.mixup=0", "data.cutmix=0"])
    _, y = mixed(torch.randn(2, 3, 8, 8), torch.tensor([3, 0]), recipe, 5, Place(0, 0, 0))
    expected = torch.full((2, 5), 0.02)
    expected[0, 3] = expected[1, 0] = 0.92
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("other", [Place(1, 0, 0), Place(0, 1, 0), Place(0, 0, 1)])
def test_mixup_is_a_function_of_its_place(other: Place) -> None:
    recipe, x, labels = load("swin_b_gradnorm", "author_code"), torch.randn(4, 3, 8, 8), torch.arange(4)
    first = mixed(x.clone(), labels, recipe, 4, Place(0, 0, 0))[0]
    torch.rand(7)
    assert mixed(x.clone(), labels, recipe, 4, Place(0, 0, 0))[0].equal(first)
    assert not mixed(x.clone(), labels, recipe, 4, other)[0].equal(first)
    assert not first.equal(x)


# Published results


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_results(name: str) -> None:
    published = load(name, "author_code").published
    assert (published["clean"], published["autoattack"]) == PUBLISHED[name]
    assert published["weights"] == "ema"


def test_the_published_results_of_the_sweep() -> None:
    """Section 1.8 of paper-facts, by the weight of the penalty, without the row that the author calls a placeholder."""
    weights = [0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 1.9]
    clean = [79.86, 78.90, 78.52, 77.94, 77.10, 75.82, 74.20, 70.56, 40.02, 0.1]
    attacked = [46.22, 49.67, 50.76, 51.49, 51.96, 52.52, 52.42, 51.18, 29.02, 0.1]
    published = load("swin_b_gradnorm_pareto", "author_code").published
    assert published["clean"] == dict(zip(weights, clean, strict=True))
    assert published["autoattack_4_255"] == dict(zip(weights, attacked, strict=True))


def test_the_published_collapse_of_one_step() -> None:
    published = load("swin_b_adversarial1", "author_code").published
    assert (published["clean"], published["pgd10"]) == (72.89, {"4/255": 9.73})


def test_nothing_else_is_said_to_be_published() -> None:
    elsewhere = {"swin_b_gradnorm_pareto", "swin_b_adversarial1"}
    for name in set(names()) - PUBLISHED.keys() - elsewhere:
        published = load(name, FORMS_OF[name][0]).published
        assert published["clean"] == NOT, name
        assert published.get("autoattack", NOT) == NOT, name
    assert load("swin_b_gradnorm", "thesis").published["seconds_per_batch"] == NOT


# Refused


@pytest.mark.parametrize(
    ("name", "form", "match"),
    [
        ("swin_b_gradnom", "pixel", "no recipe 'swin_b_gradnom'; did you mean swin_b_gradnorm?; there are resnet50_"),
        ("nowhere.yaml", "pixel", "no recipe 'nowhere.yaml'"),
        ("differences", "pixel", "no recipe 'differences'"),
        ("swin_b_nfgsm", "thesis", "swin_b_nfgsm.yaml has no form 'thesis'; it has pixel."),
        ("swin_b_gradnorm", "pixels", "no form 'pixels'; it has thesis, author_code, pixel."),
        ("swin_b_gradnorm", "all", "no form 'all'"),
    ],
)
def test_what_is_not_there_is_refused(name: str, form: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match.replace("?", r"\?")):
        load(name, form)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("optimizer.lrr=1", r"there is no key optimizer.lrr; did you mean lr\?"),
        ("objectve.loss_weight=1", r"there is no key objectve; did you mean objective\?"),
        ("objective.grad_norm.ramp.ends=1", r"there is no key objective.grad_norm.ramp.ends; did you mean end\?"),
        ("objective.attack.radius=1", "there is no key objective.attack.radius"),
        ("objective.edges.sigma=1", "objective.edges.weight is missing\n.*objective.edges.ramp is missing"),
        ("batch.total=many", "batch.total: .*valid integer.*got 'many'"),
        ("batch.total=0", "batch.total: .*greater than 0, got 0"),
        ("batch.total=2.5", "batch.total: .*integer.*got 2.5"),
        ("optimizer.lr=0", "optimizer.lr: .*greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        ("optimizer.clip_grad=.inf", "optimizer.clip_grad: .*finite"),
        ("objective.loss_weight=-1", "objective.loss_weight: .*greater than or equal to 0, got -1"),
        ("objective.grad_norm.eps=4/0", "objective.grad_norm.eps: a fraction of 0, got '4/0'"),
        ("objective.grad_norm.eps=four/255", "objective.grad_norm.eps: .*four/255"),
        ("objective.grad_norm=null x", "objective.grad_norm: .*got 'null x'"),
        ("objective.differentiation=inexact", "objective.differentiation: .*'exact' or 'finite_difference'"),
        ("data.hflip=2", "data.hflip: .*less than or equal to 1, got 2"),
        ("data.crop_scale=[1]", "data.crop_scale.1 is missing"),
        ("data.mean=[0.5, 0.5]", "data.mean.2 is missing"),
        ("data.inputs=raw", "data.inputs: .*got 'raw'"),
        ("model.activation=relu6", "model.activation: .*got 'relu6'"),
        ("model.mode=evaluation", "model.mode: .*got 'evaluation'"),
        ("ema=1", "ema: .*less than 1, got 1"),
        ("ema.decay=0.9", "ema: .*number"),
        ("seed=-1", "seed: .*got -1"),
        ("precision=float64", "precision: .*got 'float64'"),
        ("seed", "written section.key=value, got 'seed'"),
        ("=1", "written section.key=value, got '=1'"),
        ("seed=[", r"seed: '\[' is no value in YAML"),
        ("form=thesis", "recipe and form are chosen by their names"),
        ("recipe=mine", "recipe and form are chosen by their names"),
    ],
)
def test_a_change_that_is_no_change_is_refused_by_its_key(change: str, match: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){match}"):
        load("swin_b_gradnorm", "pixel", [change])


@pytest.mark.parametrize(
    ("name", "form", "changes", "match"),
    [
        (
            "swin_b_gradnorm",
            "pixel",
            ["objective.grad_norm.sigma=0.225"],
            "objective.grad_norm.sigma is for normalized",
        ),
        ("swin_b_gradnorm", "author_code", ["data.inputs=pixel"], "objective.grad_norm.sigma is for normalized"),
        ("swin_b_adversarial", "pixel", ["objective.attack.final_check=raw"], "objective.attack.final_check: raw is a"),
        ("swin_b_adversarial", "author_code", ["objective.attack.best=last"], "final_check: raw .* best is last; set"),
        ("swin_b_adversarial", "author_code", ["objective.attack.best=sample"], "final_check: raw .* best is sample"),
        ("swin_b_nfgsm", "pixel", ["objective.attack.steps=2"], "objective.attack: nfgsm takes one full step"),
        ("swin_b_nfgsm", "pixel", ["objective.attack.step_size=5/255"], "objective.attack: nfgsm takes one full step"),
        ("swin_b_nfgsm", "pixel", ["objective.attack.warmup_epochs=5"], "objective.attack: nfgsm takes one full step"),
        ("swin_b_nfgsm", "pixel", ["objective.attack.best=sample"], "objective.attack: nfgsm takes one full step"),
        ("swin_b_natural", "thesis", ["objective.loss_weight=0"], "objective.loss_weight is 0 and there is no penalty"),
        ("swin_b_edges", "pixel", ["objective.differentiation=finite_difference"], "objective.differentiation: finite"),
        ("swin_b_natural", "pixel", ["objective.differentiation=finite_difference"], "there is no penalty"),
        (
            "resnet50_gelu_gradnorm",
            "pixel",
            ["model.pretrained=true"],
            "model.pretrained and model.starts_from are two",
        ),
        ("swin_b_gradnorm", "pixel", ["model.starts_from=swin_l"], "model.pretrained and model.starts_from are two"),
        ("swin_b_gradnorm", "pixel", ["objective.grad_norm.ramp.start=2"], "objective.grad_norm.ramp: a ramp from 2.0"),
        ("swin_b_gradnorm", "pixel", ["objective.grad_norm.ramp.per_epoch=0"], "grad_norm.ramp: .* rise by 0.0"),
        ("swin_b_gradnorm", "pixel", ["objective.grad_norm.ramp.start=1"], "grad_norm.ramp: .* rise by 0.2 per epoch"),
        ("swin_b_edges", "pixel", ["objective.edges.ramp.end=0.5"], "objective.edges.ramp: a ramp from 1.0 to 0.5"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(name: str, form: str, changes: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load(name, form, changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("title: a\npublished: {}\nal: {}\npixel: {}\n", r"mine.yaml: there is no key al; did you mean all\?"),
        ("title: a\npublished: {}\nautor_code: {}\n", r"there is no key autor_code; did you mean author_code\?"),
        ("published: {}\npixel: {}\n", "mine.yaml: title is missing"),
        ("title: a\npixel: {}\n", "mine.yaml: published is missing"),
        ("title: a\npublished: {}\npixel: {ema: [}\n", "mine.yaml is no YAML"),
        ("a list\n", "mine.yaml: expected keys with values, got 'a list'"),
        ("title: a\npublished: {}\npixel: {modle: {}}\n", r"there is no key modle; did you mean model\?"),
    ],
)
def test_a_file_of_ones_own_is_read_as_closely(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=match):
        load(str(path), "pixel")


def test_a_file_of_ones_own_lies_over_what_is_common(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: mine\npublished: {clean: not published, source: none}\npixel: {data: {inputs: pixel}}\n")
    recipe = load(str(path), "pixel", ["seed=3"])
    assert (recipe.recipe, recipe.title, recipe.seed, recipe.data.inputs) == ("mine", "mine", 3, "pixel")
    assert recipe.data.size == 224


def test_a_recipe_that_starts_from_another_wants_its_weights() -> None:
    with pytest.raises(
        RecipeError, match=r"starts from the result of resnet50_gelu_finetune.*--set model.weights=FILE"
    ):
        build_model(load("resnet50_gelu_gradnorm", "pixel"), classes=4)


def test_a_model_that_timm_does_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.name: timm cannot build 'swine_base'"):
        build_model(load("swin_b_gradnorm", "pixel", ["model.name=swine_base"]), classes=4)


# Differences between the text and its code, and the README


def differences() -> list[dict[str, Any]]:
    return yaml.safe_load((FOLDER / "differences.yaml").read_text())


def _recipes(pattern: str) -> list[str]:
    return [name for name in fnmatch.filter(names(), pattern) if {"thesis", "author_code"} <= set(FORMS_OF[name])]


def _plain(value: Any) -> Any:
    return float(Fraction(value)) if isinstance(value, str) and "/" in value else value


def test_all_34_differences_are_there_and_say_where() -> None:
    rows = differences()
    assert [row["number"] for row in rows] == list(range(1, 35))
    for row in rows:
        assert row.keys() <= {"number", "topic", "keys", "elsewhere", "not_expressible"}, row
        assert row["topic"]
        assert ("not_expressible" in row) != bool({"keys", "elsewhere"} & row.keys()), row


KEYS = [(row["number"], key) for row in differences() for key in row.get("keys", [])]


@pytest.mark.parametrize(
    ("number", "key"), KEYS, ids=[f"{number}-{key['recipe']}-{key['key']}" for number, key in KEYS]
)
def test_a_difference_is_the_one_between_the_forms(number: int, key: dict[str, Any]) -> None:
    assert key.keys() == {"recipe", "key", "thesis", "author_code"}
    assert _recipes(key["recipe"])
    for name in _recipes(key["recipe"]):
        for form in ("thesis", "author_code"):
            flat = _flat(load(name, form).model_dump())
            assert key["key"] in flat
            assert flat[key["key"]] == _plain(key[form]), (name, form)


def test_no_recipe_differs_otherwise() -> None:
    told = {(name, key["key"]) for _, key in KEYS for name in _recipes(key["recipe"])}
    for name in _recipes("*"):
        thesis, code = (_flat(load(name, form).settings()) for form in ("thesis", "author_code"))
        differ = {key for key in thesis.keys() | code.keys() if thesis.get(key) != code.get(key)}
        assert differ - {"form"} <= {key for recipe, key in told if recipe == name}, name


def tables() -> str:
    """The two tables of ``examples/recipes/README.md``."""
    lines = ["| recipe | forms | what | clean | AutoAttack | source |", "|---|---|---|---|---|---|"]
    for name in names():
        recipe = load(name, FORMS_OF[name][0])
        published = dict(recipe.published)
        attacked = published.get("autoattack", published.get("autoattack_4_255", NOT))
        more = [f"PGD-10 {_numbers(published['pgd10'], 'at')}"] if "pgd10" in published else []
        more += [published["note"]] if "note" in published else []
        source = "; ".join([published["source"], *more])
        cells = name, ", ".join(FORMS_OF[name]), recipe.title, _numbers(published["clean"], "at"), _numbers(
            attacked, "at"), source  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| # | what | recipe and key | `thesis` | `author_code` |", "|---|---|---|---|---|"]
    for row in differences():
        first = f"{row['number']} | {row['topic']}"
        for key in row.get("keys", []):
            values = " | ".join(_value(key[form]) for form in ("thesis", "author_code"))
            lines.append(f"| {first} | `{key['recipe']}` `{key['key']}` | {values} |")
            first = " | "
        if "elsewhere" in row:
            lines.append(f"| {first} | {row['elsewhere']} | | |")
        if "not_expressible" in row:
            lines.append(f"| {first} | not expressible: {row['not_expressible']} | | |")
    return "\n".join(lines) + "\n"


def _numbers(value: Any, word: str) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_numbers(number, word)} {word} {key}" for key, number in value.items())
    return value if isinstance(value, str) else f"{value:.2f}"


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_the_readme_has_the_tables_of_the_files() -> None:
    readme = (FOLDER / "README.md").read_text()
    for table in tables().split("\n\n"):
        assert table.strip() in readme, f"examples/recipes/README.md should have:\n\n{table}"


def test_the_readme_names_every_form() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{form}`" in readme for form in FORMS)
    assert timm.__name__ in readme

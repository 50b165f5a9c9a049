"""From a recipe to the parts of a run: model, objective, attack, optimiser, schedule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from gradreg import (
    NFGSM,
    DoubleBackward,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    contour_energy,
    cross_entropy,
    linear_ramp,
    oriented_energy,
    sampled_class,
    smoothify,
    with_normalization,
)

from imagenet.checkpoints import weights_in
from imagenet.published import BatchBestPGD
from imagenet.recipe import Attack, GradNorm, Ramp, Recipe, RecipeError

ENERGIES = {"oriented": oriented_energy, "contour": contour_energy}


def build_model(recipe: Recipe, classes: int) -> nn.Module:
    """The model, taking inputs as ``data.inputs`` says, in the mode in which it is trained."""
    if recipe.model.starts_from and recipe.model.weights is None:
        raise RecipeError(
            f"{recipe.recipe} starts from the result of {recipe.model.starts_from}: run that first, then give its "
            "file as --set model.weights=FILE, or start from timm's weights by --set model.starts_from=null "
            "model.pretrained=true."
        )
    try:
        net = timm.create_model(
            recipe.model.name, pretrained=recipe.model.pretrained, num_classes=classes, **recipe.model.options
        )
    except RuntimeError as error:
        raise RecipeError(f"model.name: timm cannot build {recipe.model.name!r}: {error}") from error
    if recipe.model.activation is not None:
        net = smoothify(net, recipe.model.activation)
    if recipe.model.weights is not None:
        _load(net, recipe.model.weights)
    if recipe.penalized and recipe.objective.differentiation == "exact":
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # the kernels have no second derivative
    if recipe.data.inputs == "pixel":
        net = with_normalization(net, recipe.data.mean, recipe.data.std)
    return set_mode(net, recipe)


def set_mode(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model in the mode in which the recipe trains it."""
    return model.train(recipe.model.mode == "train")


def timm_model(model: nn.Module) -> nn.Module:
    """The model as timm built it, without the layer that normalises."""
    return model.get_submodule("model") if "normalize" in model._modules else model


def _load(net: nn.Module, path: Path) -> None:
    weights = weights_in(path)
    own = net.state_dict()
    wrong = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    if weights.keys() != own.keys() or wrong:
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise RecipeError(
            f"model.weights: {path} holds another model. Missing: {_some(missing)}; unknown: {_some(unknown)}; of "
            f"another shape: {_some(wrong)}."
        )
    net.load_state_dict(weights)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"


@dataclass(frozen=True)
class Units:
    """Pixels of [0, 1] in the units of the model's input: per channel, where the loader normalises."""

    recipe: Recipe

    def radius(self, pixels: float) -> float | Tensor:
        """A length along a channel."""
        return pixels / self._channels(self.recipe.data.std) if self._normalized else pixels

    @property
    def bounds(self) -> tuple[Any, Any]:
        """What black and white are."""
        if not self._normalized:
            return 0.0, 1.0
        mean, std = self._channels(self.recipe.data.mean), self._channels(self.recipe.data.std)
        return -mean / std, (1 - mean) / std

    @property
    def _normalized(self) -> bool:
        return self.recipe.data.inputs == "normalized"

    @staticmethod
    def _channels(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1)


def build_objective(recipe: Recipe, steps_per_epoch: int) -> PenalizedLoss:
    """Loss and penalties; the clock counts optimiser steps."""
    terms: dict[str, Term] = {}
    if (grad_norm := recipe.objective.grad_norm) is not None:
        penalty = GradNormPenalty(_threat(grad_norm, recipe))
        terms["grad_norm"] = Term(penalty, weight=_weight(grad_norm.weight, grad_norm.ramp, steps_per_epoch))
    if (edges := recipe.objective.edges) is not None:
        of = None if edges.temperature is None else sampled_class(edges.temperature)
        alignment = EdgeAlignmentPenalty(edges.sigma, energy=ENERGIES[edges.energy], level=edges.level, of=of)
        terms["edges"] = Term(alignment, weight=_weight(edges.weight, edges.ramp, steps_per_epoch))
    return PenalizedLoss(
        cross_entropy,
        terms,
        loss_weight=recipe.objective.loss_weight,
        differentiation=_differentiation(recipe),
        inner_scale=2.0**10 if recipe.precision == "float16" else 1.0,
    )


def _threat(grad_norm: GradNorm, recipe: Recipe) -> Linf:
    if grad_norm.sigma is not None:
        return Linf(grad_norm.eps / grad_norm.sigma)
    return Linf(Units(recipe).radius(grad_norm.eps))


def _weight(weight: float, ramp: Ramp, steps_per_epoch: int) -> Any:
    if ramp.start == ramp.end:
        return weight * ramp.end
    duration = (ramp.end - ramp.start) / ramp.per_epoch * steps_per_epoch
    return linear_ramp(weight * ramp.end, duration=duration, start=weight * ramp.start)


def _differentiation(recipe: Recipe) -> DoubleBackward | FiniteDifference:
    if recipe.objective.differentiation == "exact":
        return DoubleBackward()
    grad_norm = recipe.objective.grad_norm
    return FiniteDifference(0.25, None if grad_norm is None else _threat(grad_norm, recipe))


def build_attack(recipe: Recipe, epoch: int) -> Any:
    """The attack of an epoch, ``attack(model, x, y) -> x_adv``; None where images stay clean.

    Images that random erasing took out of their bounds are clamped, and the model is attacked in evaluation mode.
    """
    if (attack := recipe.objective.attack) is None:
        return None
    units = Units(recipe)
    threat, step_size = Linf(units.radius(attack.eps)), units.radius(attack.step_size * _warmth(attack, epoch))
    common: dict[str, Any] = {"bounds": units.bounds, "out_of_bounds": "clamp", "mode": "eval"}
    if attack.kind == "nfgsm":
        return NFGSM(threat, noise=2.0, **common)
    if attack.best == "batch":
        seen_raw = attack.final_check == "raw"
        undo = (recipe.data.mean, recipe.data.std) if seen_raw else None
        return BatchBestPGD(threat, attack.steps, step_size, units.bounds, undo)
    return PGDAttack(threat, steps=attack.steps, step_size=step_size, best=attack.best == "sample", **common)


def _warmth(attack: Attack, epoch: int) -> float:
    return min(epoch, attack.warmup_epochs) / attack.warmup_epochs if attack.warmup_epochs else 1.0


def validation_attack(recipe: Recipe) -> PGDAttack:
    """PGD as the recipe validates with: of its iterates the last counts, as published."""
    units, validation = Units(recipe), recipe.validation
    return PGDAttack(
        Linf(units.radius(validation.eps)),
        steps=validation.steps,
        step_size=units.radius(validation.step_size),
        bounds=units.bounds,
        best=False,
    )


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser; biases, vectors and what the model exempts do not decay."""
    optimizer = recipe.optimizer
    return create_optimizer_v2(
        timm_model(model), opt=optimizer.name, lr=peak_lr(recipe), weight_decay=optimizer.weight_decay,
        **({"eps": optimizer.eps} if "adam" in optimizer.name else {}),
    )  # fmt: skip


def peak_lr(recipe: Recipe) -> float:
    """The learning rate after the warm-up, for the batch that the recipe has."""
    scale = recipe.batch.total / recipe.optimizer.lr_batch if recipe.optimizer.lr_batch else 1.0
    return recipe.optimizer.lr * scale


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    """The learning rate of each epoch, set by ``step(epoch)``: it has no state."""
    schedule = recipe.schedule
    return CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs,
        lr_min=schedule.min_lr,
        warmup_t=schedule.warmup_epochs,
        warmup_lr_init=schedule.warmup_lr,
    )

"""The loop: steps, checkpoints, validation, log."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gradreg import PenalizedModel, RobustnessReport, evaluate

from imagenet import checkpoints
from imagenet.building import (
    build_attack,
    build_model,
    build_objective,
    build_optimizer,
    build_schedule,
    timm_model,
    validation_attack,
)
from imagenet.data import (
    Images,
    Parts,
    Place,
    Use,
    check_same_classes,
    keyed,
    mixed,
    training_loader,
    validation_loader,
)
from imagenet.recipe import Recipe, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun started them; one if it did not."""

    rank: int
    processes: int
    device: torch.device

    @classmethod
    def join(cls) -> "World":
        """Meet the other processes."""
        rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if processes > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, processes, device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes."""
        if self.processes == 1:
            return values
        both = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        return dict(zip(values, (both / self.processes).tolist(), strict=True))


@dataclass(frozen=True)
class Options:
    """What changes nothing about the trained weights, or next to nothing."""

    output: Path
    workers: int = 8
    save_every: int = 500
    log_every: int = 50
    compile: bool = False
    channels_last: bool = False
    tensorboard: bool = False


class Training:
    """Model, averaged weights, optimiser and clock of a run.

    Args:
        recipe: What is trained, and how.
        images: The training images.
        world: The processes.
        options: The rest.
    """

    def __init__(self, recipe: Recipe, images: Images, world: World, options: Options) -> None:
        self.recipe, self.world, self.options, self.images = recipe, world, options, images
        self.parts = Parts(len(images), recipe, world.rank, world.processes, start=0)
        torch.manual_seed(recipe.seed)
        memory = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = build_model(recipe, images.classes).to(world.device, memory_format=memory)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema) if recipe.ema else None
        self.optimizer = build_optimizer(recipe, self.model)
        self.schedule = build_schedule(recipe, self.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "float16")
        self.step = 0  # how many optimiser steps have been taken
        self.objective = build_objective(recipe, self.parts.steps_per_epoch)
        self._memory = memory
        self._penalized = self._wrapped()

    def _wrapped(self) -> nn.Module:
        penalized: nn.Module = PenalizedModel(self.model, self.objective)
        if self.options.compile:
            penalized = torch.compile(penalized)
        if self.world.processes == 1:
            return penalized
        return DistributedDataParallel(penalized)

    @property
    def _settings(self) -> dict[str, Any]:
        """All that decides the trained weights."""
        return self.recipe.settings() | {"processes": self.world.processes}

    @property
    def epoch(self) -> int:
        """The epoch that the next step is in."""
        return self.step // self.parts.steps_per_epoch

    def take_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One optimiser step on the next parts; returns what is logged of it, as far as this process knows."""
        self.schedule.step(self.epoch)
        attack, parts = build_attack(self.recipe, self.epoch), self.recipe.batch.accumulation
        sums: dict[str, float] = {}
        for part in range(parts):
            x, labels = (tensor.to(self.world.device, non_blocking=True) for tensor in next(batches))
            place = Place(self.step, part, self.world.rank)
            x, y = mixed(x.contiguous(memory_format=self._memory), labels, self.recipe, self.images.classes, place)
            torch.manual_seed(keyed(Use.STEP, self.recipe.seed, self.step, part, self.world.rank))
            if attack is not None:
                x = attack(self.model, x, y)
            last = part == parts - 1
            together = contextlib.nullcontext() if last or self.world.processes == 1 else self._penalized.no_sync()
            with together:
                with self._precision():
                    out = self._penalized(x, y, self.step)
                share = 1 / parts if self.recipe.batch.reduction == "mean" else 1.0
                self.scaler.scale(out.total * share).backward()
            told = {"loss": out.loss} | {name: values.mean() for name, values in out.penalties.items()}
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value.item() / parts
        norm = self._update()
        self.step += 1
        return sums | {"grad_norm_of_weights": norm, "lr": max(group["lr"] for group in self.optimizer.param_groups)}

    def _precision(self) -> Any:
        dtype = DTYPES[self.recipe.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _update(self) -> float:
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return norm.item()

    def share_statistics(self) -> None:
        """Give all processes the first one's buffers: those of BatchNorm are of its own images in each process."""
        if self.world.processes == 1:
            return
        for model in (self.model, *([] if self.ema is None else [self.ema.module])):
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def state(self) -> dict[str, Any]:
        """All that the next steps hang on."""
        return {
            "settings": self._settings,
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this very run."""
        content = checkpoints.load(path)
        checkpoints.check_same_run(content, self._settings, path)
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]


def train(recipe: Recipe, folder: Path, options: Options, world: World) -> None:
    """Run a recipe from where its output folder stands to its end, and export the weights."""
    images = Images(folder, "train", recipe)
    held_out = Images(folder, "val", recipe)
    check_same_classes(images, held_out)
    training = Training(recipe, images, world, options)
    last = options.output / "last.pt"
    if last.exists():
        training.resume(last)
    if world.leads:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "recipe.yaml").write_text(str(recipe))
    log = Log(options, training.step, world)
    parts = replace(training.parts, start=training.step)
    batches = iter(training_loader(images, parts, options.workers))
    bar = tqdm(initial=training.step, total=parts.steps, unit="step", disable=not world.leads, smoothing=0.05)
    with bar:
        while training.step < parts.steps:
            start = time.perf_counter()
            told = training.take_step(batches)
            ends = training.step % parts.steps_per_epoch == 0
            saves = training.step % options.save_every == 0 or ends
            if saves or training.step % options.log_every == 0:
                told = world.mean(told)
                _check_finite(told, training)
                log.write(training.step, told | {"seconds": time.perf_counter() - start})
                bar.set_postfix({name: f"{value:.3g}" for name, value in told.items()}, refresh=False)
            bar.update()
            if (ends and training.epoch % recipe.validation.every == 0) or training.step == parts.steps:
                for name, report in validate(training, held_out).items():
                    attacked = next(iter(report.attacks.values()))
                    log.write(
                        training.step,
                        {f"{name} clean": report.clean_accuracy.value, f"{name} PGD": attacked.alone.value},
                    )
            if world.leads and saves:
                checkpoints.save(last, training.state())
    if world.leads:
        checkpoints.export(options.output / "raw.safetensors", timm_model(training.model).state_dict())
        if training.ema is not None:
            checkpoints.export(options.output / "ema.safetensors", timm_model(training.ema.module).state_dict())


def _check_finite(told: dict[str, float], training: Training) -> None:
    # The scaler of float16 leaves out a step whose gradient is not finite, and halves its scale.
    names = told.keys() - ({"grad_norm_of_weights"} if training.scaler.is_enabled() else set())
    if wrong := sorted(name for name in names if not math.isfinite(told[name])):
        raise RuntimeError(
            f"Step {training.step}: {', '.join(wrong)} is not finite. The last checkpoint is intact. A learning rate, "
            "that of the warm-up above all, or a penalty that is too large does this (section 4.3 of the thesis); "
            "float16 may need bfloat16."
        )


def validate(training: Training, images: Images) -> dict[str, RobustnessReport]:
    """Clean and PGD accuracy of the raw and the averaged weights, shared by the processes."""
    recipe = training.recipe
    training.share_statistics()
    size = recipe.batch.of_a_part(training.world.processes)
    models = {"raw": training.model} | ({} if training.ema is None else {"ema": training.ema.module})
    loader = validation_loader(images, recipe.validation.images, size, training.options.workers)
    attack = validation_attack(recipe)
    return {
        name: evaluate(model, loader, attack, seed=recipe.seed, masking=0, device=training.world.device, progress=False)
        for name, model in models.items()
    }


class Log:
    """``log.jsonl``, one line per entry, cut back to the step at which a run goes on; TensorBoard on demand."""

    def __init__(self, options: Options, step: int, world: World) -> None:
        self.path = options.output / "log.jsonl"
        self.writer = None
        if not world.leads:
            self.path = Path(os.devnull)
            return
        options.output.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept))
        if options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RecipeError("--tensorboard: install it first, pip install tensorboard.") from error
            self.writer = SummaryWriter(str(options.output), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add an entry."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

"""The command line of imagenet_swin.py and imagenet_resnet.py."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from gradreg import preflight

from imagenet.checkpoints import CheckpointError
from imagenet.data import Images, Place, mixed, training_loader
from imagenet.recipe import FORMS, Recipe, RecipeError, load, names
from imagenet.training import Options, Training, World, train

TIMED = 3  # steps of a dry run, after one that is not counted


def main(default: str, description: str, argv: Sequence[str] | None = None) -> None:
    """Run a recipe, or say what it would do."""
    args = _parser(default, description).parse_args(argv)
    if args.list:
        print("\n".join(names()))
        return
    try:
        recipe = load(args.recipe, args.form, args.set)
        if args.data is None:
            raise RecipeError("Give the folder of the data, with train and val in it; --list names the recipes.")
        world = World.join()
        options = Options(
            args.output or Path("results") / recipe.recipe / recipe.form, args.workers, args.save_every,
            args.log_every, args.compile, args.channels_last, args.tensorboard,
        )  # fmt: skip
        if args.dry_run:
            dry_run(recipe, args.data, options, world)
            return
        if world.leads:
            print(recipe)
        train(recipe, args.data, options, world)
    except (RecipeError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _parser(default: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with train and val, each with a folder per class")
    parser.add_argument("--recipe", default=default, help=f"a name from --list, or a YAML file (default: {default})")
    parser.add_argument("--form", default="pixel", choices=FORMS, help="which form of the recipe (default: pixel)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--list", action="store_true", help="name the recipes")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, what it needs and how long")
    parser.add_argument("--output", type=Path, help="default: results/RECIPE/FORM; a run that is there is gone on with")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images, for each GPU")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole forward pass with its penalty")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--tensorboard", action="store_true")
    return parser


def dry_run(recipe: Recipe, folder: Path, options: Options, world: World) -> None:
    """Print the recipe, the model, what preflight finds, memory, and hours from a few timed steps."""
    images = Images(folder, "train", recipe)
    training = Training(recipe, images, world, options)
    parts = training.parts
    size = recipe.batch.of_a_part(world.processes)
    x, labels = next(iter(training_loader(images, parts, workers=0)))
    x, y = mixed(x, labels, recipe, images.classes, Place(0, 0, world.rank))
    few = min(4, size)
    batch = x[:few].to(world.device), y[:few].to(world.device)
    report = preflight(training.objective, training.model, *batch, training.step)
    stream = iter(training_loader(images, parts, options.workers))
    seconds = []
    for _ in range(min(TIMED + 1, parts.steps)):
        start = time.perf_counter()
        training.take_step(stream)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not world.leads:
        return
    of_a_step = sorted(seconds[1:] or seconds)[len(seconds[1:] or seconds) // 2]
    weights = sum(p.numel() * p.element_size() for p in training.model.parameters())
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if world.device.type == "cuda" else (
        f"{(3 + bool(training.ema)) * weights / 2**30:.2f} GiB for weights, averages and AdamW, activations not counted"
    )  # fmt: skip
    print(recipe)
    print(f"model: {recipe.model.name}, {images.classes} classes, {weights / 4e6:.2f} million parameters")
    print(report)
    print(f"data: {len(images)} images; {parts.steps_per_epoch} steps of {recipe.batch.total} images in an epoch")
    print(f"batch: {world.processes} processes x {recipe.batch.accumulation} parts x {size} images")
    print(f"memory of a process: {peak}")
    hours = parts.steps * of_a_step / 3600
    print(
        f"time: {of_a_step:.2f} s a step (median of {len(seconds[1:]) or 1}), {hours:.1f} hours for {parts.steps} steps"
    )

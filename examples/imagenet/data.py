"""Images, augmented and mixed, each as a function of seed, epoch and place: nothing random has a state.

The loader is one endless stream of batches for one process, from any step of the run on. What a killed run had read
need not be read again, and what it would have read next comes next.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from imagenet.recipe import Recipe, RecipeError


class Use(IntEnum):
    """What randomness is for, so that no two uses share a key."""

    ORDER = 1
    AUGMENTATION = 2
    MIXUP = 3
    STEP = 4


def keyed(use: Use, *key: int) -> int:
    """A seed of 63 bits that hangs on the use and all of the key."""
    return int(np.random.SeedSequence((use, *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def randomness(use: Use, *key: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU generators, started from a key, and as they were afterwards."""
    seed = keyed(use, *key)
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class Images(Dataset[tuple[Tensor, int]]):
    """The images of one split; an item is asked for by (epoch, index), and the same for the same key.

    Args:
        folder: With ``train`` and ``val``, each with one folder per class.
        split: Which.
        recipe: How they are cropped and augmented.
    """

    def __init__(self, folder: Path, split: str, recipe: Recipe) -> None:
        if not (folder / split).is_dir():
            raise RecipeError(
                f"data: {folder} has no folder {split!r}. Expected {folder}/train and {folder}/val, each with a "
                "folder of images per class; `python examples/photographs.py FOLDER --split` makes a small one."
            )
        try:
            self.reader = create_dataset("", str(folder / split), split="", is_training=split == "train").reader
        except RuntimeError as error:
            raise RecipeError(f"data: no images were found in {folder / split}: {error}") from error
        self.classes = len(self.reader.class_to_idx)
        self.seed = recipe.seed
        self.transform = _augmentation(recipe) if split == "train" else _centre(recipe)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file).convert("RGB")
        except Exception as error:  # a decoder raises what it likes
            raise RecipeError(f"data: {self.reader.filename(index)} cannot be read as an image: {error}") from error
        with randomness(Use.AUGMENTATION, self.seed, epoch, index):
            return self.transform(image), label


def check_same_classes(train: Images, val: Images) -> None:
    """Raise, unless both splits have the same classes, and so the same numbers for them."""
    first, second = (set(images.reader.class_to_idx) for images in (train, val))
    if first != second:
        one = sorted(first ^ second)[0]
        raise RecipeError(
            f"data: {len(first)} classes in train, {len(second)} in val; {one!r} is only in "
            f"{'train' if one in first else 'val'}."
        )


def _augmentation(recipe: Recipe) -> transforms.Compose:
    """The training pipeline of timm; erasing comes after normalisation, which pixel inputs then undo."""
    data = recipe.data
    steps = create_transform(
        data.size, is_training=True, scale=data.crop_scale, hflip=data.hflip, interpolation=data.interpolation,
        auto_augment=data.auto_augment, color_jitter=None, re_prob=data.erase, re_mode=data.erase_mode,
        mean=data.mean, std=data.std,
    )  # fmt: skip
    return transforms.Compose([*steps.transforms, *_in_pixels(recipe)])


def _centre(recipe: Recipe) -> transforms.Compose:
    data = recipe.data
    steps = create_transform(data.size, interpolation="bicubic", crop_pct=data.eval_crop, mean=data.mean, std=data.std)
    return transforms.Compose([*steps.transforms, *_in_pixels(recipe)])


def _in_pixels(recipe: Recipe) -> list[transforms.Normalize]:
    if recipe.data.inputs == "normalized":
        return []
    pairs = list(zip(recipe.data.mean, recipe.data.std, strict=True))
    return [transforms.Normalize([-mean / std for mean, std in pairs], [1 / std for _, std in pairs])]


@dataclass(frozen=True)
class Place:
    """Where in a run a part of a batch stands.

    Attributes:
        step: The optimiser step.
        part: Which part of the step's batch, of those taken one after the other.
        rank: Which process.
    """

    step: int
    part: int
    rank: int


@dataclass(frozen=True)
class Parts(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of every image of every part that one process takes, from a step of the run on.

    An epoch is a permutation of all images, cut into the batches of its steps; a rest that makes no batch is left out.
    The batch of a step is the same for any number of processes and parts.
    """

    images: int
    recipe: Recipe
    rank: int
    processes: int
    start: int

    def __post_init__(self) -> None:
        if not self.steps_per_epoch:
            raise RecipeError(
                f"data: {self.images} training images make no batch of {self.recipe.batch.total}. Set batch.total."
            )
        size = self.recipe.batch.of_a_part(self.processes)
        if size % 2 and (self.recipe.data.mixup or self.recipe.data.cutmix):
            raise RecipeError(f"batch: mixup pairs the images of a part, and {size} is odd. Set batch.total.")

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.recipe.batch.total

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.schedule.epochs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        total, size = self.recipe.batch.total, self.recipe.batch.of_a_part(self.processes)
        order, shuffled = torch.empty(0), -1
        for step in range(self.start, self.steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(keyed(Use.ORDER, self.recipe.seed, epoch))
                order, shuffled = torch.randperm(self.images, generator=generator), epoch
            batch = order[within * total : (within + 1) * total].view(-1, self.processes, size)
            for part in batch[:, self.rank]:
                yield [(epoch, index) for index in part.tolist()]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.recipe.batch.accumulation


def training_loader(images: Images, parts: Parts, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """The stream of one process."""
    return DataLoader(
        images, batch_sampler=parts, num_workers=workers, pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0, multiprocessing_context=_context(workers),
    )  # fmt: skip


def _context(workers: int) -> str | None:
    """How workers are started: they end with a trainer that was killed, which those of a forkserver would outlive."""
    return "spawn" if workers else None


def validation_loader(images: Images, count: int | None, size: int, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Validation images in order, or as many of them as asked for, spread evenly; the same for every process."""
    spread = np.linspace(0, len(images) - 1, min(count or len(images), len(images))).round().astype(int)
    batches = [[(0, int(index)) for index in part] for part in np.array_split(spread, -(-len(spread) // size))]
    return DataLoader(
        images, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
        multiprocessing_context=_context(workers),
    )  # fmt: skip


def mixed(x: Tensor, labels: Tensor, recipe: Recipe, classes: int, place: Place) -> tuple[Tensor, Tensor]:
    """A part of a batch after mixup or cutmix, with soft labels: a function of seed and place."""
    data = recipe.data
    if not (data.mixup or data.cutmix):
        return x, mixup_target(labels, classes, smoothing=data.label_smoothing)
    mixup = Mixup(
        mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, switch_prob=data.mixup_switch,
        label_smoothing=data.label_smoothing, num_classes=classes,
    )  # fmt: skip
    with randomness(Use.MIXUP, recipe.seed, place.step, place.part, place.rank):
        return mixup(x, labels)

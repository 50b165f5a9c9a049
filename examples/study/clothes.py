"""Fashion-MNIST as a folder of images, for demonstrations that read ``torchvision.datasets.ImageFolder``."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from study.data import load

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def write(folder: Path, train: int = 5000, val: int = 500, test: int = 1000) -> int:
    """Write folders train, val and test: the first images of each part; returns how many there are.

    ``val`` is cut from the training set's last 5,000 images, of which ``train`` has none.
    """
    validation, final = load("validation"), load("test")
    for part, x, y, count in (
        ("train", validation.train_x, validation.train_y, train),
        ("val", validation.x, validation.y, val),
        ("test", final.x, final.y, test),
    ):
        _write_part(folder / part, x[:count], y[:count])
    return train + val + test


def _write_part(folder: Path, x: Tensor, y: Tensor) -> None:
    for number, (image, label) in enumerate(zip((255 * x).round().byte(), y.tolist(), strict=True)):
        place = folder / f"{label}-{CLASSES[label]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{number:05d}.png")

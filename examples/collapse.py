"""Catastrophic overfitting, and the alarm that detects it: single-step training at a large radius on Fashion-MNIST.

    python examples/collapse.py                # some minutes; a picture in results/collapse

A small network with ReLU, eps 0.2: accuracy under one step goes on rising while that under PGD falls to nothing, unless
the noise is large enough. What `CollapseAlarm` measures in the training step itself is drawn below the accuracies.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from gradreg import FGSM, NFGSM, Attack, CollapseAlarm, GradregWarning, Linf, PenalizedLoss, PGDAttack
from gradreg.state import write_atomically

from study.data import Data, load, numbers_of_batches
from study.models import build

THREAT = Linf(0.2)
ATTACKS: dict[str, Attack] = {
    "FGSM": FGSM(THREAT),
    "N-FGSM": NFGSM(THREAT),
    "N-FGSM, half": NFGSM(THREAT, share=0.5),
    "N-FGSM, noise 2": NFGSM(THREAT, noise=2.0, bounds=None),
}
IMAGES = 500


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def train(name: str, data: Data, steps: int, every: int) -> dict[str, list[float]]:
    """Train, and note every so many steps how accurate the network is and what the alarm has found."""
    alarm = CollapseAlarm(period=every)
    objective = PenalizedLoss(at=ATTACKS[name], alarm=alarm)
    model = build("convnet", "relu", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 200))
    found: dict[str, list[float]] = {
        key: [] for key in ("step", "clean", "FGSM", "PGD-10", "fallen", "cosine", "warnings")
    }
    x, y, heard = data.x[:IMAGES], data.y[:IMAGES], 0
    for t, rows in enumerate(tqdm(numbers_of_batches(data, steps, 0), desc=name, total=steps, unit="step")):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True, action="always") as caught:
            objective(model, data.train_x[rows], data.train_y[rows]).total.backward()
        heard += sum(issubclass(one.category, GradregWarning) for one in caught)
        optimizer.step()
        schedule.step()
        if t % every == 0 and t:
            attacked = [attack(model.eval(), x, y) for attack in (FGSM(THREAT), PGDAttack(THREAT, steps=10, seed=0))]
            row = [t, *(accuracy(model, z, y) for z in (x, *attacked)), float(alarm.fallen), float(alarm.cosine), heard]
            model.train()
            for key, value in zip(found, row, strict=True):
                found[key].append(round(value, 4))
    return found


def figure(runs: dict[str, dict[str, list[float]]]) -> Figure:
    """Accuracies above, what the alarm measures below."""
    picture = Figure(figsize=(7.5, 5.2), layout="constrained", dpi=150)
    rows = picture.subplots(2, len(runs), sharex=True, sharey="row")
    for (above, below), (name, run) in zip(rows.T, runs.items(), strict=True):
        for key, color in (("clean", "0.6"), ("FGSM", "#E69F00"), ("PGD-10", "#0072B2")):
            above.plot(run["step"], run[key], color=color, label=f"accuracy, {key}, %")
        below.plot(run["step"], run["cosine"], color="#009E73", label="cosine of the gradients at start and end")
        below.plot(run["step"], run["fallen"], color="#D55E00", label="share of samples whose loss the attack lowers")
        first = next((step for step, heard in zip(run["step"], run["warnings"], strict=True) if heard), None)
        for panel in (above, below):
            if first is not None:
                panel.axvline(first, color="0.3", linestyle=":", label="first warning")
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
        above.set_title(name, fontsize=9)
        below.set(xlabel="step")
    handles = dict(pair[::-1] for panel in rows[:, 0] for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Train all, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2401)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="with the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path("results/collapse"))
    args = parser.parse_args(argv)
    data = load("validation", args.folder)
    runs = {name: train(name, data, args.steps, args.every) for name in ATTACKS}
    write_atomically(args.output / "runs.json", json.dumps(runs, indent=1) + "\n")
    figure(runs).savefig(args.output / "collapse.png")
    for name, run in runs.items():
        last = {key: values[-1] for key, values in run.items()}
        print(f"{name}: FGSM {last['FGSM']:.0f} %, PGD-10 {last['PGD-10']:.0f} %, {last['warnings']} warnings")


if __name__ == "__main__":
    main()

"""What each regulariser of the menu is worth: every one trained at equal compute, and at equal steps, on Fashion-MNIST.

    python examples/menu.py                    # all of it: some ten hours of one core; --shard 0/2 does half
    python examples/menu.py --report           # tables and figures from what there is

For two networks and two radii every entry of `study/menu.py` is trained with three weights, or four if the best one is
the largest or the smallest, and the one with the most robust accuracy on validation images is taken. With it and three
seeds follow trainings of the compute of 500 steps of PGD-3, and of 500 steps, which are evaluated on the test images.
Every run is a file; those that have one are not repeated. The entries whose starts remember follow for ten epochs, in
one setting.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from gradreg import FGSM, APGDAttack, GradregWarning, PGDAttack, TargetedAPGDAttack, evaluate
from gradreg.state import write_atomically

from study import menu_report
from study.data import Data, load, numbers_of_batches
from study.menu import EQUAL_STEPS, LONG_ENTRIES, LONG_STEPS, MENU, Training, steps_of
from study.models import build, quick
from study.runs import Run, chunks, learning_rate, pack

IMAGES = 1000
MOST_WEIGHTS = 4
LONG_SETTING = ("convnet", "0.1")
EASY = {"FGSM": FGSM, "PGD-20": lambda threat: PGDAttack(threat, steps=20, seed=0)}
SETTINGS = [("convnet", "0.1"), ("vit", "8/255"), ("convnet", "8/255"), ("vit", "0.1")]


def method_of(entry: str, weight: float) -> str:
    """How a run calls an entry with one of its weights."""
    return f"{entry}, {weight:g}"


def perform(run: Run, entry: str, weight: float, data: Data, bar: tqdm) -> dict[str, Any]:
    """Train and attack."""
    model, training = train(run, entry, weight, data, bar)
    with torch.no_grad():
        clean = int(sum((model(x).argmax(1) == y).sum() for x, y in chunks(data, len(data.x))))
    attacks, images = attacks_on(run)
    report = evaluate(model, chunks(data, images), attacks, masking=0, progress=False)
    alarm = training.kept.alarm if training.entry.collapses else None
    return {
        **vars(run),
        "entry": entry,
        "weight": weight,
        "cost": round(training.cost, 3),
        "clean": clean,
        "clean_of": len(data.x),
        "robust": sum(report.robust),
        "robust_of": report.n,
        "verdicts": pack(report.robust),
        **({} if run.split == "validation" else {name: right(model, run, data, name) for name in EASY}),
        **({} if alarm is None else {"alarm": [round(value, 3) for value in alarm.found.tolist()]}),
    }


def train(run: Run, entry: str, weight: float, data: Data, bar: tqdm) -> tuple[nn.Module, Training]:
    """All entries see the same batches, and start from the same weights."""
    model = quick(build(run.net, "gelu", run.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step / run.steps, start=0.0))
    training = Training(MENU[entry], weight, run.threat, warm_up=0.2 * run.steps)
    torch.manual_seed(run.seed)
    for t, rows in enumerate(numbers_of_batches(data, run.steps, run.seed)):
        optimizer.zero_grad()
        training(model, data.train_x[rows], data.train_y[rows], t, rows).backward()
        optimizer.step()
        schedule.step()
        bar.update()
    model.requires_grad_(False)
    return model.eval(), training


def attacks_on(run: Run) -> tuple[Any, int]:
    """The attacks that a run is judged by, and on how many images."""
    if run.split == "validation":
        return {"APGD-CE": APGDAttack(run.threat, steps=50, seed=0)}, 500
    targeted = TargetedAPGDAttack(run.threat, steps=30, halving=True, seed=0)
    return {"APGD-CE": APGDAttack(run.threat, seed=0), "APGD-T": targeted}, IMAGES


def right(model: nn.Module, run: Run, data: Data, name: str) -> int:
    """How many of the images are right under an attack that is easily fooled."""
    return sum(evaluate(model, chunks(data, IMAGES), [EASY[name](run.threat)], masking=0, progress=False).robust)


class Study:
    """The runs of one process, and where they are kept."""

    def __init__(self, folder: Path, shard: str) -> None:
        index, count = map(int, shard.split("/"))
        self.folder = folder
        self.chains = [(*setting, entry) for setting in SETTINGS for entry in MENU][index::count]
        self.data = {split: load(split) for split in ("validation", "test")}
        self.steps = {entry: steps_of(entry, Run("convnet", "0.1", 1, "", 0).threat) for entry in MENU}

    def known(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, if there is one: in the folder, or on record."""
        path = self.folder / "runs" / f"{run.name}.json"
        return json.loads(path.read_text()) if path.exists() else menu_report.on_record().get(run.name)

    def runs(self, seeds: Sequence[int]) -> Iterator[tuple[Run, str, float]]:
        """All runs that are missing, in an order in which what one needs comes before it."""
        for net, eps in SETTINGS:
            own = [entry for of_net, of_eps, entry in self.chains if (of_net, of_eps) == (net, eps)]
            for entry in own:
                for weight in self.weights(net, eps, entry):
                    yield Run(net, eps, self.steps[entry], method_of(entry, weight), 0, "validation"), entry, weight
            for seed in seeds:
                for entry in own:
                    weight = self.best(net, eps, entry)
                    yield Run(net, eps, self.steps[entry], method_of(entry, weight), seed), entry, weight
        for seed in seeds:
            for net, eps, entry in self.chains:
                weight = self.best(net, eps, entry)
                yield Run(net, eps, EQUAL_STEPS, method_of(entry, weight), seed), entry, weight
        for seed in seeds:
            for net, eps, entry in self.chains:
                if (net, eps) == LONG_SETTING and entry in LONG_ENTRIES:
                    weight = self.best(net, eps, entry)
                    yield Run(net, eps, LONG_STEPS, method_of(entry, weight), seed), entry, weight

    def weights(self, net: str, eps: str, entry: str) -> Iterator[float]:
        """The weights to try: those of the entry, and further ones as long as the best is the largest or smallest."""
        yield from MENU[entry].weights
        tried = sorted(MENU[entry].weights)
        while 1 < len(tried) < MOST_WEIGHTS:
            best = self._best_of(tried, net, eps, entry)
            if best not in (tried[0], tried[-1]):
                return
            inner = tried[1] if best == tried[0] else tried[-2]
            further = float(f"{best * best / inner:.3g}")
            yield further
            tried = sorted([*tried, further])

    def best(self, net: str, eps: str, entry: str) -> float:
        """The weight that is the best one on validation images."""
        return self._best_of(self.weights(net, eps, entry), net, eps, entry)

    def _best_of(self, weights: Iterable[float], net: str, eps: str, entry: str) -> float:
        runs = (Run(net, eps, self.steps[entry], method_of(entry, weight), 0, "validation") for weight in weights)
        results = [self.known(run) for run in runs]
        assert None not in results
        return menu_report.best_weight(result for result in results if result is not None)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/menu"), help="folder to write into")
    parser.add_argument("--shard", default="0/1", help="K/N: this process does every N-th entry, from the K-th on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="gather, tabulate and draw; train nothing")
    args = parser.parse_args(argv)
    if args.report:
        menu_report.write(args.output)
        return
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="The attack of one step does not attack", category=GradregWarning)
    study = Study(args.output, args.shard)
    total = sum(
        study.steps[entry] * (len(MENU[entry].weights) + len(args.seeds))
        + len(args.seeds) * (EQUAL_STEPS + LONG_STEPS * ((net, eps) == LONG_SETTING and entry in LONG_ENTRIES))
        for net, eps, entry in study.chains
    )
    with tqdm(total=total, unit="step", smoothing=0.01) as bar:
        for run, entry, weight in study.runs(args.seeds):
            if study.known(run) is not None:
                bar.update(run.steps)
                continue
            bar.set_description(f"{run.net} {run.eps} {run.method} {run.split}")
            result = perform(run, entry, weight, study.data[run.split], bar)
            write_atomically(args.output / "runs" / f"{run.name}.json", json.dumps(result) + "\n")
            tqdm.write(
                f"{run.net:8s} {run.eps:6s} {run.steps:5d} {run.split:10s} seed {run.seed} {run.method:30s} clean "
                f"{100 * result['clean'] / result['clean_of']:.1f} %, robust "
                f"{100 * result['robust'] / result['robust_of']:.1f} %",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()

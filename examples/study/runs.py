"""One run of the study: a network trained in one way and attacked, kept in a file of its own."""

import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import gradreg
from gradreg import APGDAttack, AutoAttack, Linf, TargetedAPGDAttack, evaluate
from gradreg.state import replacing, write_atomically

from study.data import FASHION_MNIST, Data, batches
from study.methods import ALL, Method
from study.models import build

IMAGES = 1000  # attacked by APGD-CE and APGD-T
AUTOATTACK_IMAGES = 200


@dataclass(frozen=True, order=True)
class Run:
    """What makes a run what it is."""

    net: str
    eps: str  # as it is written: "8/255"
    steps: int
    method: str
    seed: int
    split: str = "test"
    data: str = FASHION_MNIST

    @property
    def threat(self) -> Linf:
        """The perturbations to be robust to."""
        return Linf(float(Fraction(self.eps)))

    @property
    def name(self) -> str:
        """A name for files."""
        parts = (self.net, self.eps.replace("/", "in"), self.steps, self.method, self.seed, self.split)
        of_data = () if self.data == FASHION_MNIST else (self.data,)
        return "_".join(str(part) for part in (*of_data, *parts)).replace(", ", "-").replace(" ", "-")


def train(run: Run, data: Data, progress: tqdm | None = None) -> nn.Module:
    """Train a network; all methods see the same batches, and start from the same weights or what one made of them."""
    method = ALL[run.method]
    model = build(run.net, method.activation, run.seed)
    if method.start is not None:
        model.load_state_dict(train(replace(run, method=method.start), data).state_dict())
    optimizer = method.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step / run.steps, start=method.first_rate)
    )
    step_of = stepper(method, run.threat, warm_up=0.2 * run.steps)
    torch.manual_seed(run.seed)  # of noise and of the samples drawn
    for t, (x, y) in enumerate(batches(data, run.steps, run.seed)):
        step_of(model, optimizer, x, y, t)
        schedule.step()
        if progress is not None:
            progress.update()
    return model.eval()


def stepper(method: Method, threat: Linf, warm_up: float) -> Any:
    """One training step of a method, ``step(model, optimizer, x, y, t)``."""
    objective = method.objective(threat, warm_up)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, t: int) -> None:
        optimizer.zero_grad()
        objective(model, x, y, t).total.backward()
        optimizer.step()

    return step


def learning_rate(progress: float, start: float) -> float:
    """Up in the first tenth of the training, then down along half a cosine wave; of the largest rate."""
    if progress < 0.1:
        return start + (1 - start) * progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def perform(run: Run, data: Data, folder: Path, *, autoattack: bool, bar: tqdm | None = None) -> dict[str, Any]:
    """Train, attack, and write what came out; weights and result are in the folder afterwards."""
    start = time.process_time()
    model = train(run, data, bar)
    trained = time.process_time()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        clean = int(sum((model(x).argmax(1) == y).sum() for x, y in chunks(data, len(data.x))))
    attacks = {
        "APGD-CE": APGDAttack(run.threat, seed=0),
        "APGD-T": TargetedAPGDAttack(run.threat, halving=True, seed=0),
    }
    report = evaluate(model, chunks(data, IMAGES), attacks, masking=0, progress=False)
    attacked = time.process_time()
    result: dict[str, Any] = {
        **asdict(run),
        "clean": clean,
        "clean_of": len(data.x),
        "robust": sum(report.robust),
        "robust_of": report.n,
        "verdicts": pack(report.robust),
        "cpu_seconds": {"training": round(trained - start, 1), "attacks": round(attacked - trained, 1)},
        "versions": {"gradreg": gradreg.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if autoattack:
        standard = evaluate(
            model, chunks(data, AUTOATTACK_IMAGES), [AutoAttack(run.threat, seed=0)], masking=0, progress=False
        )
        result |= {"autoattack": sum(standard.robust), "autoattack_of": standard.n}
        result["cpu_seconds"]["AutoAttack"] = round(time.process_time() - attacked, 1)
    with replacing(folder / "weights" / f"{run.name}.pt") as path:
        torch.save(model.state_dict(), path)
    write_atomically(folder / "runs" / f"{run.name}.json", json.dumps(result) + "\n")
    return result


def chunks(data: Data, images: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first images to evaluate on, in batches."""
    return zip(data.x[:images].split(500), data.y[:images].split(500), strict=True)


def pack(verdicts: list[bool]) -> str:
    """Booleans, as many as 4 divides, as hexadecimal digits, the first one the highest bit."""
    if len(verdicts) % 4:
        raise ValueError(f"{len(verdicts)} verdicts are no whole number of hexadecimal digits.")
    return f"{int(''.join('1' if verdict else '0' for verdict in verdicts), 2):0{len(verdicts) // 4}x}"


def unpack(digits: str) -> list[bool]:
    """What :func:`pack` packed."""
    return [bit == "1" for bit in f"{int(digits, 16):0{4 * len(digits)}b}"]

"""Runs the ImageNet example in processes of its own; test_imagenet.py reads what they left.

``imagenet_worker.py PHOTOGRAPHS OUTPUT`` takes every run of RUNS in as many gloo processes as it says, some of them
killed and started again. Each process is a fork of this one, which has imported everything and computed nothing.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradreg import evaluate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import imagenet.training  # noqa: E402
from imagenet.command import main  # noqa: E402
from processes import leave  # noqa: E402

SWIN = {"recipe": "tiny_swin_gradnorm"}
RESNET = {"recipe": "tiny_resnet_gradnorm", "data.size": 48, "schedule.epochs": 5}
MIXED = {
    "data.auto_augment": "rand-m9-mstd0.5-inc1", "data.erase": 0.5, "data.mixup": 0.8, "data.cutmix": 1.0,
    "schedule.epochs": 3, "validation.every": 3,
}  # fmt: skip
# Five steps of all images. Of a gradient that is 0, as that of the keys' bias, Adam sees the rounding alone: below eps.
FIVE = {"batch.total": 36, "schedule.epochs": 5, "optimizer.eps": 1e-4, "schedule.warmup_epochs": 1}
EDGES = {
    "objective.loss_weight": 0, "objective.grad_norm": "null", "schedule.epochs": 2, "optimizer.lr": 1e-2,
    "objective.edges": "{weight: 1.0, ramp: {start: 1.0, per_epoch: 0.0, end: 1.0}, energy: oriented, sigma: 1.0, "
    "level: sample, temperature: 0.5}",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A command line, how many processes follow it, and how often they are killed on the way."""

    keys: dict[str, object]
    processes: int = 2
    workers: int = 0
    kills: int = 0
    save_every: int = 4
    more: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimiser steps of it all."""
        total, epochs = int(str(self.keys.get("batch.total", 12))), int(str(self.keys.get("schedule.epochs", 8)))
        return 36 // total * epochs

    def arguments(self, photographs: Path, output: Path) -> list[str]:
        keys = {
            "batch.total": 12, "schedule.epochs": 8, "validation.every": 2, "validation.steps": 2,
            "validation.images": 12,
        } | {key: value for key, value in self.keys.items() if key != "recipe"}  # fmt: skip
        changes = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        options = ["--workers", self.workers, "--save-every", self.save_every, "--log-every", 1, "--output", output]
        return [str(photographs), "--recipe", str(self.keys["recipe"]), *map(str, options), *changes, *self.more]


RUNS = {
    "swin": Run(SWIN),
    "swin, killed": Run(SWIN, kills=2),
    "resnet": Run(RESNET),
    "resnet, killed": Run(RESNET, kills=2, save_every=3),
    "mixed": Run(SWIN | MIXED),
    "mixed, killed": Run(SWIN | MIXED, workers=1, kills=1, save_every=2),
    "five, one process": Run(SWIN | FIVE, processes=1),
    "five, two processes": Run(SWIN | FIVE),
    "five, two parts": Run(SWIN | FIVE | {"batch.accumulation": 2}, processes=1),
    "edges alone": Run(SWIN | EDGES),
}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def note_what_is_validated(file: Path) -> None:
    """From now on write a line for each model that is evaluated: a digest of its state."""

    def noted(model: nn.Module, *args: Any, **more: Any) -> Any:
        content = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        with file.open("a") as lines:
            lines.write(hashlib.sha256(content).hexdigest() + "\n")
        return evaluate(model, *args, **more)

    imagenet.training.evaluate = noted


def start(run: Run, photographs: Path, output: Path) -> list[int]:
    """The processes of a run, as torchrun would start them."""
    port = _free_port()
    children = []
    for rank in range(run.processes):
        if child := os.fork():
            children.append(child)
            continue
        try:
            torch.set_num_threads(1)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run.processes), "LOCAL_RANK": str(rank)}
            note_what_is_validated(output / f"{rank}.validated.txt")
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with (
                (output / f"{rank}.txt").open("a") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                main("none", "", run.arguments(photographs, output))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        leave()
    return children


def last_step(output: Path) -> int:
    """The step of the last line of the log that is whole."""
    log = output / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def ended(process: int) -> bool:
    """Whether it is gone, or waits to be buried."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def follow(name: str, photographs: Path, output: Path) -> dict[str, object]:
    """A run to its end; says at which steps it was killed, and how its processes ended."""
    run = RUNS[name]
    output.mkdir(parents=True)
    moments = random.Random(name)
    killed, read = [], 0
    for wanted in sorted(moments.sample(range(2, run.steps - 1), run.kills)):
        children = start(run, photographs, output)
        while last_step(output) < wanted:
            if any(os.waitpid(child, os.WNOHANG)[0] for child in children):
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                raise RuntimeError(f"{name}: a process ended before step {wanted}")
            time.sleep(0.01)
        time.sleep(0.1 * moments.random())
        started = [process for child in children for process in descendants(child)]
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} == {-signal.SIGKILL}
        killed.append(last_step(output))
        patience = time.monotonic() + 60
        while not all(map(ended, started)):  # those that read images look for their trainer every five seconds
            if time.monotonic() > patience:
                raise RuntimeError(f"{name}: processes outlived their trainer: {started}")
            time.sleep(0.05)
        read += len(started)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start(run, photographs, output)]
    return {"killed": killed, "ends": ends, "steps": run.steps, "outlived by none of": read}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    chosen = sys.argv[3:] or list(RUNS)
    told = {}
    for name in chosen:
        began = sum(os.times()[:4])
        told[name] = follow(name, Path(sys.argv[1]), folder / name)
        print(name, told[name], f"{sum(os.times()[:4]) - began:.1f} s of CPU", flush=True)
    (folder / "told.json").write_text(json.dumps(told))

"""The examples with training frameworks are short, run, and train what the loop of the README trains.

Run as a script by each of two processes, this file records what the examples do there.
"""

import functools
import importlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from gradreg import GradNormPenalty, Linf, PenalizedLoss, Term, linear_ramp

from processes import leave

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where they find quickstart.py, as they do when they are run

STEPS = 4
WEIGHT = 300.0  # of the penalty: high, so that gradients are clipped in so few steps
CPU = {
    "with_accelerate": ["--cpu"],
    "with_timm_task": ["--device", "cpu"],
    "with_fabric": ["--accelerator", "cpu"],
    "with_lightning": ["--accelerator", "cpu"],
}
MIXED = [
    ("with_accelerate", ["--precision", "bf16"], torch.bfloat16),
    ("with_timm_task", ["--amp-dtype", "bfloat16"], torch.bfloat16),
    ("with_timm_task", ["--amp-dtype", "float16"], torch.float16),  # which the other frameworks refuse on a CPU
    ("with_fabric", ["--precision", "bf16-mixed"], torch.bfloat16),
    ("with_lightning", ["--precision", "bf16-mixed"], torch.bfloat16),
]

Batch = tuple[Tensor, Tensor, int]


@contextmanager
def recorded() -> Iterator[list[Batch]]:
    """What every objective is called with: images, labels, and the step of its schedules."""
    batches: list[Batch] = []
    original = PenalizedLoss.forward

    def forward(self: PenalizedLoss, model: Any, x: Tensor, y: Tensor, t: int, **more: Any) -> Any:
        batches.append((x.clone(), y.clone(), t))
        return original(self, model, x, y, t, **more)

    PenalizedLoss.forward = forward
    try:
        yield batches
    finally:
        PenalizedLoss.forward = original


@functools.cache
def load_digits(split: str) -> tuple[Tensor, ...]:
    """The digits of the quickstart, which take longer to read than an example to run here."""
    return importlib.import_module("quickstart").load_digits(split)


def run(name: str, weights: Path, *more: str) -> list[Batch]:
    """The batches of a short run of an example, which saves its weights."""
    example = importlib.import_module(name)
    example.load_digits = load_digits
    with recorded() as batches:
        AcceleratorState._reset_state(reset_partial_state=True)  # else a process has one precision for ever
        short = ["--steps", str(STEPS), "--weight", str(WEIGHT), "--images", "20", "--output", str(weights)]
        example.main([*short, *CPU[name], *more])
    return batches


def explicit(
    name: str, batches: list[Batch], weight: float = WEIGHT, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights after the README's loop on these batches, with what the examples have besides.

    That is a schedule of the learning rate, clipping, accumulation over the batches of a step, autocast with a scaler,
    and, with timm, no weight decay of biases and a moving average of the weights.
    """
    quickstart = importlib.import_module("quickstart")
    torch.manual_seed(0)
    model = quickstart.build_model("gelu")
    term = Term(GradNormPenalty(Linf(quickstart.EPS)), weight=linear_ramp(weight, duration=1))
    half = dtype == torch.float16
    objective = PenalizedLoss(quickstart.CROSS_ENTROPY, {"grad_norm": term}, inner_scale=2.0**10 if half else 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    timm = name == "with_timm_task"
    groups = [
        {"params": [parameter], "weight_decay": 0 if timm and parameter.ndim < 2 else 0.05}
        for parameter in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    schedule = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2)
        if timm
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS, pct_start=0.1)
    )
    saved: dict[str, Tensor] = {}
    for step in range(STEPS):
        of_step = [(x, y) for x, y, t in batches if t == step]
        optimizer.zero_grad()
        for x, y in of_step:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                out = objective(model, x, y, t=step)
            scaler.scale(out.total / len(of_step)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        for key, value in model.state_dict().items():
            saved[key] = saved[key].lerp(value, 0.05) if timm and step > 0 else value.clone()
    return saved


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def imported() -> None:
    """Imported outside of any test, because Lightning's log holds on to the stderr that it finds."""
    for name in CPU:
        importlib.import_module(name)


@pytest.mark.parametrize("name", CPU)
def test_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 100


@pytest.mark.filterwarnings(
    # Of Lightning: advice on speed, a size in its table, and what it uses of a newer PyTorch.
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:Precision bf16-mixed is not supported by the model summary",
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
@pytest.mark.parametrize(("name", "more", "dtype"), [*((name, [], None) for name in CPU), *MIXED], ids=str)
def test_equals_the_explicit_loop(
    name: str,
    more: list[str],
    dtype: torch.dtype | None,
    imported: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = run(name, tmp_path / "weights.pt", *more)

    weights = torch.load(tmp_path / "weights.pt")
    per_step = len(batches) // STEPS
    assert [t for *_, t in batches] == [t for t in range(STEPS) for _ in range(per_step)]
    assert {len(x) for x, *_ in batches} == {100 // per_step}
    assert largest_difference(weights, explicit(name, batches, dtype=dtype)) < 1e-6
    assert largest_difference(weights, explicit(name, batches, dtype=dtype, weight=0.0)) > 1e-4
    printed = capsys.readouterr().out
    assert "| clean |" in printed
    assert "| PGD-10 |" in printed


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes trained, and on what; they are started once, as torchrun would."""
    folder = tmp_path_factory.mktemp("two_processes")
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in CPU]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    together = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with ExitStack() as opened:
        logs = [opened.enter_context((folder / f"{rank}.log").open("w")) for rank in range(2)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(folder), *ports],
                env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            opened.callback(process.kill)
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=200) == 0, Path(log.name).read_text()[-4000:]
    return folder


@pytest.mark.parametrize("name", CPU)
def test_two_processes_equal_the_explicit_loop_in_one(name: str, two_processes: Path) -> None:
    ranks = [torch.load(two_processes / f"{name}_{rank}.pt") for rank in range(2)]
    assert not ranks[0][0][0].equal(ranks[1][0][0])
    batches = [(torch.cat([x0, x1]), torch.cat([y0, y1]), t) for (x0, y0, t), (x1, y1, _) in zip(*ranks, strict=True)]
    assert {len(x) for x, *_ in batches} == {100 * STEPS // len(batches)}
    weights = torch.load(two_processes / f"{name}.pt")
    # Rounding differs, and AdamW divides by the size of a gradient: 1e-5 at most was seen.
    assert largest_difference(weights, explicit(name, batches)) < 1e-4
    assert largest_difference(weights, explicit(name, ranks[0])) > 1e-3  # one process on its own


def work(folder: Path, ports: list[str]) -> None:
    """Run every example as one of two processes.

    Each has a port of its own: a second process group would find the addresses of the first in a store shared with it.
    """
    for name, port in zip(CPU, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        devices = ["--devices", "2"] if name in {"with_fabric", "with_lightning"} else []
        batches = run(name, folder / f"{name}.pt", *devices)
        torch.save(batches, folder / f"{name}_{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])

"""Evaluates in processes of its own; test_evaluation_processes.py reads what they found.

``evaluation_worker.py alone STATE LOG OUTPUT`` evaluates in one process, slowly, to be killed: it writes a line to LOG
for every batch that it attacks, and its report to OUTPUT. ``evaluation_worker.py ranks OUTPUT`` runs every case of
CASES in two gloo ranks, and writes what each rank found, or the message of the exception that it raised.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from gradreg import (
    GradNormPenalty,
    HessianNorm,
    Linf,
    PGDAttack,
    RandomSearch,
    RobustnessReport,
    accuracy_curve,
    evaluate,
)
from gradreg.statistics import gradient_histograms, measure

from processes import leave

RANKS = 2
SAMPLES, BATCH = 47, 5  # ten batches, the last of two samples
ATTACKS = {"pgd": PGDAttack(Linf(0.03), steps=3), "search": RandomSearch(Linf(0.03), queries=10)}
attacked: list[int] = []  # how many samples PGD was run on, batch by batch
_attack = PGDAttack.__call__


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.Linear(96, 4)]
    return nn.Sequential(*layers).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES, 2, 6, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = model()(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def content(report: RobustnessReport) -> dict[str, Any]:
    """What of a report does not depend on who did it."""
    passes = {name: [cost["forward"], cost["backward"]] for name, cost in report.costs.items()}
    flags = [str(flag) for flag in report.flags]
    return {"samples": report.samples, "verdicts": report.verdicts, "passes": passes, "flags": flags}


def watched(attack: PGDAttack, model: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """The attack, noted."""
    attacked.append(len(x))
    return _attack(attack, model, x, *args, **options)


def found(loader: Any = None, net: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """What an evaluation finds, and what this process did for it."""
    attacked.clear()
    options = {"masking": 0, "progress": False} | options
    report = evaluate(model() if net is None else net, batches() if loader is None else loader, ATTACKS, **options)
    return content(report) | {"attacked": list(attacked)}


# In one process


def alone(state: str, log: str, output: str) -> None:
    """An evaluation that takes its time, most of all where it writes."""
    replace = os.replace

    def slowly(*paths: Any) -> None:
        time.sleep(0.02)
        replace(*paths)

    def noted(attack: PGDAttack, *args: Any, **options: Any) -> Tensor:
        with Path(log).open("a") as file:
            file.write("attacked\n")
        time.sleep(0.02)
        return _attack(attack, *args, **options)

    os.replace, PGDAttack.__call__ = slowly, noted
    Path(output).write_text(json.dumps(found(state=state)))


# In two ranks


def _failing(number: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader that breaks at one batch, in one rank."""
    for position, batch in enumerate(batches()):
        if position == number and dist.get_rank() == rank:
            raise OSError("a damaged file")
        yield batch


def _interrupted(state: Path, number: int, rank: int) -> str:
    try:
        found(_failing(number, rank), state=state)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _from_one_to_two(folder: Path) -> dict[str, Any]:
    return found(state=folder / "one.json")  # of which one process did four batches


def _from_two_to_two(folder: Path) -> dict[str, Any]:
    raised = _interrupted(folder / "two.json", 6, 1)
    return found(state=folder / "two.json") | {"raised": raised}


def _from_two_to_one(folder: Path) -> dict[str, Any]:
    return {"raised": _interrupted(folder / "three.json", 6, 1)}  # and main goes on


def _different_order(folder: Path) -> dict[str, Any]:
    return found(batches() if dist.get_rank() == 0 else batches()[::-1])


def _different_end(folder: Path) -> dict[str, Any]:
    return found(batches()[: SAMPLES // BATCH - dist.get_rank()])


def _different_label(folder: Path) -> dict[str, Any]:
    loader = batches()
    loader[4][1][2] += dist.get_rank()
    loader[4][1][2] %= 4
    return found(loader)


def _sampler(folder: Path) -> dict[str, Any]:
    data = TensorDataset(*(torch.cat(tensors) for tensors in zip(*batches(), strict=True)))
    return found(DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data)))


def _sharded(folder: Path) -> dict[str, Any]:
    net = model()
    fully_shard(net)
    return found(net=net)


def _bar(folder: Path) -> dict[str, Any]:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        found(progress=True)
    return {"shown": shown.getvalue()}


def _curve(folder: Path) -> dict[str, Any]:
    curve = accuracy_curve(model(), batches(), ATTACKS["pgd"], [0.01, 0.02, 0.04], progress=False)
    return {"samples": curve.samples, "distances": [str(distance) for distance in curve.distances]}


def _statistics(folder: Path) -> dict[str, Any]:
    quantities = [GradNormPenalty(Linf(1.0)), HessianNorm(3)]
    measured = measure(model(), batches(), quantities, attack=ATTACKS["pgd"], progress=False)
    histogram = gradient_histograms(model(), batches(), progress=False)["all"]
    return {"values": measured.values, "attacked": measured.attacked, "histogram": sorted(histogram.counts.items())}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda folder: found(),
    "masking": lambda folder: found(masking=8),
    "generator": lambda folder: found(iter(batches())),
    "one batch": lambda folder: found(batches()[:1]),
    "ddp": lambda folder: found(net=DistributedDataParallel(model())),
    "from one to two": _from_one_to_two,
    "from two to two": _from_two_to_two,
    "from two to one": _from_two_to_one,
    "other seed": lambda folder: found(state=folder / "two.json", seed=1),
    "different order": _different_order,
    "different end": _different_end,
    "different label": _different_label,
    "sampler": _sampler,
    "sharded": _sharded,
    "bar": _bar,
    "curve": _curve,
    "statistics": _statistics,
}
ALONE = ("plain", "masking", "one batch", "curve", "statistics")  # what one process does to compare with


def _run(rank: int, folder: str, output: str) -> None:
    torch.set_num_threads(1)
    PGDAttack.__call__ = watched
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(Path(folder))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, results)
    if rank == 0:
        Path(output).write_text(json.dumps(gathered))
    dist.destroy_process_group()
    leave()


def ranks(output: str) -> None:
    """All cases in two ranks, and in one process before and after."""
    PGDAttack.__call__ = watched
    with tempfile.TemporaryDirectory() as folder:
        single = {name: CASES[name](Path(folder)) for name in ALONE}
        found(batches()[:4], state=Path(folder) / "one.json")
        mp.spawn(_run, args=(folder, output), nprocs=RANKS)
        single["from two to one"] = found(state=Path(folder) / "three.json")
        single["files"] = sorted(path.name for path in Path(folder).glob("*.json"))
    Path(output).write_text(json.dumps({"alone": single, "ranks": json.loads(Path(output).read_text())}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"alone": alone, "ranks": ranks}[sys.argv[1]](*sys.argv[2:])

"""What the benchmarks share: taking turns in one process, ratios with their spread, the machine, files and pictures."""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Round = dict[str, dict[str, float]]  # seconds of every contender, by clock
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: safe for colour-blind eyes
MARKERS = "osD^"


@dataclass(frozen=True)
class Turn:
    """What a contender does in a round.

    Attributes:
        run: One turn.
        steps: Over how many steps the seconds of a turn are shared out.
        parameters: Those whose gradients are left behind.
    """

    run: Callable[[], object]
    steps: int = 1
    parameters: Sequence[nn.Parameter] = ()


def seconds_of(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds by clock: CPU time of the process and wall time, or time between two events on a GPU and wall time."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return {"device": start.elapsed_time(end) / 1e3, "wall": time.perf_counter() - wall}
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def take_turns(
    turns: Mapping[str, Turn], rounds: int, *, warm_up: int, seed: int, device: torch.device, title: str
) -> list[Round]:
    """Seconds of every contender in each round.

    In each round each takes one turn, in a new random order: no contender always inherits the caches and the free
    memory of the same other one. Rounds that warm up come first and are left out.
    """
    shuffled = random.Random(seed)
    measured: list[Round] = []
    for index in tqdm(range(warm_up + rounds), desc=title, unit="round"):
        seconds: Round = {}
        for name in shuffled.sample(list(turns), len(turns)):
            for clock, value in seconds_of(turns[name].run, device).items():
                seconds.setdefault(clock, {})[name] = value / turns[name].steps
        if index >= warm_up:
            measured.append(seconds)
    return measured


def ratios(repeats: Sequence[Sequence[Round]], name: str, base: str) -> dict[str, dict[str, object]]:
    """Ratios of two contenders within each round, by clock: quartiles over all rounds, and each repeat's median."""
    found: dict[str, dict[str, object]] = {}
    for clock in repeats[0][0]:
        of_repeats = [[seconds[clock][name] / seconds[clock][base] for seconds in repeat] for repeat in repeats]
        found[clock] = {
            **quartiles(list(itertools.chain(*of_repeats))),
            "median_of_repeats": [statistics.median(of_repeat) for of_repeat in of_repeats],
        }
    return found


def medians(repeats: Sequence[Sequence[Round]], name: str) -> dict[str, float]:
    """Median seconds of a contender over all rounds, by clock."""
    rounds = list(itertools.chain(*repeats))
    return {clock: statistics.median(seconds[clock][name] for seconds in rounds) for clock in rounds[0]}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return dict(zip(("quartile_1", "median", "quartile_3"), cuts, strict=True))


def gradient_error(turn: Turn, reference: Turn) -> float:
    """Distance of the gradients that two turns leave behind, by the norm of the second; both draw the same numbers."""
    found = []
    for each in (turn, reference):
        torch.manual_seed(0)
        each.run()
        found.append(torch.cat([p.grad.double().flatten() for p in each.parameters if p.grad is not None]))
    return float((found[0] - found[1]).norm() / found[1].norm())


def point(value: float) -> dict[str, float]:
    """A number that has no spread, for `plot`."""
    return quartiles([value])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that PyTorch has allocated during a run, above what was allocated before it.

    On the CPU it is the highest sum of the allocations and releases that the profiler records: every tensor to the
    byte, whatever the C library does with the memory afterwards. What oneDNN and MKL allocate for themselves is not
    in it, and what was allocated before is taken to stay. On a GPU it is the caching allocator's own count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports every start and stop
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        warnings.simplefilter("ignore")  # what the profiler says about itself
        run()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = sorted((event for event in results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def machine(device: torch.device) -> dict[str, object]:
    """Where a measurement was made, and what may have disturbed it."""
    found: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, gradreg, PyTorch and these packages."""
    present = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    names = ("gradreg", "torch", *packages)
    return {"python": platform.python_version(), **{name: present.get(name, "not installed") for name in names}}


def parser_of(description: str | None, *, output: str, rounds: int, warm_up: int) -> argparse.ArgumentParser:
    """The options that all benchmarks of a training step have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of each repeat (default {rounds})")
    parser.add_argument("--warm-up", type=int, default=warm_up, help=f"rounds before that (default {warm_up})")
    parser.add_argument("--repeats", type=int, default=3, help="runs, each with a fresh copy of the model (default 3)")
    parser.add_argument("--batch-size", type=int, help="a multiple of 4; default: the model's own, for a CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "tf32", "bfloat16"], default="float32", help="see README.md")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder to write into (default {output})")
    return parser


def prepare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """Check the options of `parser_of`, set threads and precision, and return the device."""
    device = torch.device(args.device)
    if args.rounds < 1 or args.repeats < 1 or args.warm_up < 0:
        parser.error("--rounds and --repeats are at least 1, --warm-up at least 0")
    if args.batch_size is not None and (args.batch_size < 4 or args.batch_size % 4):
        parser.error("--batch-size is a multiple of 4, so that half of it and a quarter are whole numbers")
    if args.dtype == "tf32" and device.type != "cuda":
        parser.error("--dtype tf32 is for a GPU: --device cuda")
    if device.type == "cuda":  # PyTorch's own choice is TF32 for convolutions and float32 for products
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return device


def command(script: str, argv: Sequence[str] | None) -> str:
    """The command that is running."""
    return shlex.join(["python", f"benchmarks/{script}.py", *(sys.argv[1:] if argv is None else argv)])


def circumstances(
    script: str, argv: Sequence[str] | None, args: argparse.Namespace, device: torch.device, *packages: str
) -> dict[str, object]:
    """What every report begins with: the command, its options as they were taken, the machine, and versions."""
    return {
        "command": command(script, argv),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "machine": machine(device),
        "versions": versions(*packages),
    }


def stem(model: str, dtype: str, device: torch.device) -> str:
    """The name of a report's files: other settings, another name."""
    return "-".join([model, *([dtype] if dtype != "float32" else []), *([device.type] if device.type != "cpu" else [])])


def write(report: Mapping[str, object], path: Path) -> None:
    """A report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column holds names."""
    lines = [header, ["---", *[":-:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(found: Mapping[str, object], digits: int = 3) -> list[str]:
    """Two cells of a table: median with quartiles, and smallest and largest of the medians of the repeats."""
    low, median, high = (found[key] for key in ("quartile_1", "median", "quartile_3"))
    of_repeats = found["median_of_repeats"]
    middle = f"**{median:.{digits}f}** ({low:.2f}-{high:.2f})"
    return [middle, f"{min(of_repeats):.{digits}f}-{max(of_repeats):.{digits}f}"]


def plot(
    series: Mapping[str, Mapping[str, Mapping[str, float]]], floors: Mapping[str, float], label: str, path: Path
) -> None:
    """Medians with quartiles as dots beside their names.

    Args:
        series: For each kind of dot its values by name: dicts of ``quartile_1``, ``median`` and ``quartile_3``.
        floors: What each name cannot be below; drawn as a tick.
        label: Of the axis.
        path: Where to write the picture.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys([*itertools.chain(*series.values())]))
    place = {name: index for index, name in enumerate(names)}
    figure = Figure(figsize=(7, 1.1 + 0.27 * len(names)), layout="constrained", dpi=150)
    axes = figure.subplots()
    if floors:
        at = [place[name] for name in floors]
        axes.plot(list(floors.values()), at, "|", color="0.35", markersize=11, markeredgewidth=1.5, label="floor")
    looks = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=True)
    for (kind, values), (color, marker) in zip(series.items(), looks, strict=False):
        at = [place[name] for name in values]
        middle = [value["median"] for value in values.values()]
        low = [value["median"] - value["quartile_1"] for value in values.values()]
        high = [value["quartile_3"] - value["median"] for value in values.values()]
        axes.errorbar(middle, at, xerr=[low, high], fmt=marker, color=color, markersize=5, elinewidth=1.2, label=kind)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=1 + len(series), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

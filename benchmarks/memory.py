"""Peak memory of one training step of every method, as a multiple of a natural step, and what it costs in time.

    python benchmarks/memory.py --threads 1
    python benchmarks/memory.py --threads 1 --model resnet18
    python benchmarks/memory.py --device cuda --model swin_b --batch-size 64 --dtype bfloat16

The memory is what PyTorch has allocated at the most during the step, beyond model, images and the optimiser's state.
README.md beside this file says how to read the table.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import turns
from step_cost import METHODS, MODELS, RECOMMENDED, Method, batch_of, frozen_optimizer, turn_of

TARGET = 1.05  # of a natural step, for an exact gradient
PARTS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Contender:
    """A method on some form of the model.

    Attributes:
        method: The method.
        form: What is done to a copy of the model before.
        same_as: The contender whose gradients it should have.
    """

    method: Method
    form: Callable[[nn.Module], nn.Module] = lambda model: model
    same_as: str | None = None


class Checkpointed(nn.Module):
    """A module that keeps its input alone, and runs again when it is differentiated."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """What the module returns."""
        return checkpoint(self.module, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with the blocks of its outermost sequences checkpointed: residual or transformer blocks, stages."""
    if isinstance(model, nn.Sequential):
        return nn.Sequential(*(Checkpointed(block) for block in model))
    for name, child in model.named_children():
        setattr(model, name, checkpointed(child))
    return model


exact = METHODS["GradNorm, PenalizedLoss"]
CONTENDERS: dict[str, Contender] = {
    "natural": Contender(METHODS["natural"]),
    "exact": Contender(exact),
    **{f"exact, {parts} parts": Contender(dataclasses.replace(exact, parts=parts), same_as="exact") for parts in PARTS},
    "exact, half of the batch": Contender(METHODS["GradNorm, half of the batch"]),
    "exact, quarter of the batch": Contender(METHODS["GradNorm, quarter of the batch"]),
    "finite differences": Contender(METHODS["finite differences"]),
    RECOMMENDED: Contender(METHODS[RECOMMENDED]),
    "natural, checkpointed": Contender(METHODS["natural"], checkpointed, same_as="natural"),
    "exact, checkpointed": Contender(exact, checkpointed, same_as="exact"),
    "PGD-3": Contender(METHODS["PGD-3"]),
}


def measure(
    contenders: Mapping[str, Contender], model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, title: str
) -> dict[str, dict[str, object]]:
    """Peak memory, time and gradient of each contender beside those of the first."""
    base = next(iter(contenders))

    def fresh() -> dict[str, turns.Turn]:
        models = {name: contender.form(copy.deepcopy(model)) for name, contender in contenders.items()}
        return {
            name: turn_of(contender.method, models[name], frozen_optimizer(models[name]), x, y, args.dtype)
            for name, contender in contenders.items()
        }

    repeats = [
        turns.take_turns(
            fresh(), args.rounds, warm_up=args.warm_up, seed=seed, device=x.device, title=f"{title}, repeat {seed + 1}"
        )
        for seed in range(args.repeats)
    ]
    taken = fresh()
    peaks = {}
    for name, turn in taken.items():
        turn.run()  # the optimiser's state is allocated in the first step
        for parameter in turn.parameters:
            parameter.grad = None
        peaks[name] = turns.peak_bytes(turn.run, x.device)
    found: dict[str, dict[str, object]] = {}
    for name, contender in contenders.items():
        found[name] = {
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[base],
            "seconds": turns.medians(repeats, name),
            "time_ratio": turns.ratios(repeats, name, base),
        }
        if contender.same_as is not None:
            found[name]["same_as"] = contender.same_as
            found[name]["gradient_error"] = turns.gradient_error(taken[name], taken[contender.same_as])
    return found


def table_of(found: Mapping[str, dict]) -> str:
    """The rows as a Markdown table."""
    base = next(iter(found))
    clock = next(iter(found[base]["seconds"]))
    header = ["step", "peak, MiB", f"peak / {base}", f"{clock} time / {base}: median (quartiles)", "repeats"]
    header += ["difference of gradients"]
    rows = []
    for name, row in found.items():
        error = f"{row['gradient_error']:.1e} ({row['same_as']})" if "same_as" in row else ""
        peak = [f"{row['peak_bytes'] / 2**20:.1f}", f"**{row['peak_ratio']:.2f}**"]
        rows.append([name, *peak, *turns.spread(row["time_ratio"][clock], 2), error])
    return turns.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    parser = turns.parser_of(__doc__, output="results/memory", rounds=5, warm_up=1)
    parser.add_argument("--model", choices=MODELS, default="convnet")
    args = parser.parse_args(argv)
    device = turns.prepare(parser, args)

    model, x, y = batch_of(args.model, args.batch_size, device)
    contenders = {name: contender for name, contender in CONTENDERS.items() if contender.method.parts <= len(x)}
    found = measure(contenders, model, x, y, args, args.model)
    enough = [
        contenders[name].method.parts
        for name, row in found.items()
        if name.startswith("exact") and name.endswith("parts") and row["peak_ratio"] <= TARGET
    ]
    parts = min(enough, default=None)
    report = {
        **turns.circumstances("memory", argv, args, device, "torchvision", "timm"),
        "model": args.model,
        "input": list(x.shape),
        "gradients_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "target": TARGET,
        "parts_that_reach_it": parts,
        "steps": found,
    }
    path = args.output / turns.stem(args.model, args.dtype, device)
    turns.write(report, path.with_suffix(".json"))
    print(table_of(found))
    print(f"\nExact gradients within {TARGET} of natural: {f'{parts} parts' if parts else 'with none of these parts'}")
    print(f"\nGradients of the parameters: {report['gradients_bytes'] / 2**20:.1f} MiB; {report['machine']}")
    peaks = {name: turns.point(row["peak_ratio"]) for name, row in found.items()}
    label = f"peak memory / natural step ({args.model}, {args.dtype})"
    turns.plot({"peak memory": peaks}, {}, label, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

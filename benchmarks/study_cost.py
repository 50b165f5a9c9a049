"""Cost of a training step of every method of the Fashion-MNIST study, as a multiple of a natural step.

    python benchmarks/study_cost.py --threads 1

The methods and networks are those of `examples/fashion_mnist.py`, whose tables take the numbers from
`docs/fashion-mnist/costs.json`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import turns

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gradreg import Linf

from study.data import BATCH_SIZE
from study.methods import ALL, Method
from study.models import NETS, build
from study.runs import stepper

EVERY = 4  # steps: after so many every method begins anew


def turn_of(method: Method, net: str, x: torch.Tensor, y: torch.Tensor) -> turns.Turn:
    """EVERY steps of a method, with a learning rate of 0."""
    model = build(net, method.activation, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step = stepper(method, Linf(0.1), warm_up=1)

    def run() -> None:
        for t in range(EVERY, 2 * EVERY):  # when the weight has risen to its full size
            step(model, optimizer, x, y, t)

    return turns.Turn(run, EVERY, list(model.parameters()))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the numbers."""
    parser = turns.parser_of(__doc__, output="docs/fashion-mnist", rounds=25, warm_up=2)
    args = parser.parse_args(argv)
    device = turns.prepare(parser, args)
    x = torch.rand(args.batch_size or BATCH_SIZE, 1, 28, 28)
    y = torch.arange(len(x)) % 10
    report: dict[str, object] = {
        **turns.circumstances("study_cost", argv, args, device),
    }
    for net in NETS:
        repeats = []
        for seed in range(args.repeats):
            contenders = {name: turn_of(method, net, x, y) for name, method in ALL.items()}
            title = f"{net}, repeat {seed + 1}"
            repeats.append(
                turns.take_turns(contenders, args.rounds, warm_up=args.warm_up, seed=seed, device=device, title=title)
            )
        ratios = {name: turns.ratios(repeats, name, "natural")["cpu"] for name in ALL}
        natural = turns.medians(repeats, "natural")
        report[net] = {"natural_seconds": natural, "cpu_ratio_to_natural": ratios}
        print(f"\n{net}: a natural step takes {1000 * natural['cpu']:.1f} ms of CPU\n")
        print(
            turns.table(["step", "CPU time / natural", "repeats"], [[n, *turns.spread(r)] for n, r in ratios.items()])
        )
    turns.write(report, args.output / "costs.json")


if __name__ == "__main__":
    main()

"""Cost of one training step of every method, as a multiple of a natural step.

    python benchmarks/step_cost.py --threads 1
    python benchmarks/step_cost.py --threads 1 --model resnet18 --rounds 10
    python benchmarks/step_cost.py --device cuda --model swin_b --batch-size 64 --dtype bfloat16 --compile

All methods run in one process and take turns; README.md beside this file says how to read the table.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg import (
    NFGSM,
    Attack,
    Differentiation,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Schedule,
    Term,
    every,
    grad_norm,
    input_gradient,
    smoothify,
)

import passes
import turns

EPS = 4 / 255
CRITERION = nn.CrossEntropyLoss(reduction="none")

Total = Callable[[nn.Module, Tensor, Tensor, int], Tensor]  # of model, images, labels and the number of the step


def natural(model: nn.Module, x: Tensor, y: Tensor, t: int = 0) -> Tensor:
    """The loss alone."""
    return CRITERION(model(x), y).mean()


def explicit(model: nn.Module, x: Tensor, y: Tensor, t: int) -> Tensor:
    """GradNorm written by hand."""
    x = x.detach().requires_grad_()
    losses = CRITERION(model(x), y)
    return 0.8 * losses.mean() + 1.2 * grad_norm(input_gradient(losses, x), Linf(EPS)).mean()


def by_object(objective: PenalizedLoss) -> Total:
    """An objective of the library."""
    return lambda model, x, y, t: objective(model, x, y, t).total


def penalized(
    differentiation: Differentiation | None = None, *, weight: float | Schedule = 1.2, fraction: float = 1.0
) -> Total:
    """GradNorm by the object."""
    terms = {"grad_norm": Term(GradNormPenalty(Linf(EPS)), weight=weight)}
    return by_object(
        PenalizedLoss(CRITERION, terms, loss_weight=0.8, differentiation=differentiation, fraction=fraction)
    )


def edge_alignment() -> Total:
    """The thesis's edge term on the logit of a sampled class."""
    return by_object(PenalizedLoss(CRITERION, {"edges": Term(EdgeAlignmentPenalty(), weight=0.5)}))


def adversarial(attack: Attack) -> Total:
    """The loss of attacked images; the attack asks for input gradients alone."""
    return by_object(PenalizedLoss(CRITERION, at=attack))


def published_pgd(steps: int) -> Total:
    """Adversarial training as it is published: the attack calls backward(), which builds parameter gradients too."""

    def total(model: nn.Module, x: Tensor, y: Tensor, t: int) -> Tensor:
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        for _ in range(steps):
            x_adv = (x + delta).clamp(0, 1).detach().requires_grad_()
            natural(model, x_adv, y).backward()
            delta = (delta + 2 * EPS / steps * x_adv.grad.sign()).clamp(-EPS, EPS)
        model.zero_grad()
        return natural(model, (x + delta).clamp(0, 1), y)

    return total


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        total: What is differentiated.
        floor: How many forward passes the arithmetic of a step is worth (README.md).
        steps: After how many steps the method begins anew: its cost is their mean.
        parts: In how many parts the batch is taken, one after the other, their gradients added up.
        double: Whether it differentiates twice, as fused attention cannot.
        compiled: Whether ``--compile`` measures it too.
    """

    total: Total
    floor: float
    steps: int = 1
    parts: int = 1
    double: bool = False
    compiled: bool = False


exact = functools.partial(Method, double=True)
RECOMMENDED = "recommended (N-FGSM on half)"
METHODS: dict[str, Method] = {
    "natural": Method(natural, 3, compiled=True),
    "GradNorm, explicit loop": exact(explicit, 6),
    "GradNorm, PenalizedLoss": exact(penalized(), 6, compiled=True),
    "GradNorm, half of the batch": exact(penalized(fraction=0.5), 3 + 3 / 2),
    "GradNorm, quarter of the batch": exact(penalized(fraction=0.25), 3 + 3 / 4),
    "GradNorm, every 2nd step": exact(penalized(weight=every(2, 1.2)), 3 + 3 / 2, steps=2),
    "GradNorm, every 4th step": exact(penalized(weight=every(4, 1.2)), 3 + 3 / 4, steps=4),
    "finite differences": Method(penalized(FiniteDifference(0.25)), 7, compiled=True),
    "finite differences, central": Method(penalized(FiniteDifference(0.25, scheme="central")), 10),
    RECOMMENDED: Method(adversarial(NFGSM(Linf(EPS), share=0.5)), 3 + 2 / 2, compiled=True),
    "edge alignment": exact(edge_alignment(), 6),
    "N-FGSM": Method(adversarial(NFGSM(Linf(EPS))), 5, compiled=True),
    "PGD-1": Method(adversarial(PGDAttack(Linf(EPS), steps=1, step_size=EPS, best=False)), 5),
    "PGD-3": Method(adversarial(PGDAttack(Linf(EPS), steps=3, step_size=2 * EPS / 3, best=False)), 9, compiled=True),
    "PGD-1, parameter gradients too": Method(published_pgd(1), 6),
    "PGD-3, parameter gradients too": Method(published_pgd(3), 12),
}


def convnet() -> nn.Module:
    """A small GELU network for gray images of 28x28 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 100), nn.GELU()),
        nn.Linear(100, 10),
    )


def resnet(name: str) -> nn.Module:
    """A ResNet of torchvision, GELU instead of ReLU."""
    import torchvision

    return smoothify(torchvision.models.get_model(name, num_classes=10), act="gelu")


def transformer(name: str, **options: object) -> nn.Module:
    """A network of timm whose activations are GELU."""
    import timm

    return timm.create_model(name, num_classes=10, **options)


# Each with the shape of its images and the size of a batch that a CPU can do.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "convnet": (convnet, (1, 28, 28), 128),
    "resnet18": (lambda: resnet("resnet18"), (3, 64, 64), 16),
    "resnet50": (lambda: resnet("resnet50"), (3, 64, 64), 8),
    "vit_tiny": (lambda: transformer("vit_tiny_patch16_224"), (3, 224, 224), 4),
    "swin_tiny": (lambda: transformer("swin_tiny_patch4_window7_224"), (3, 224, 224), 4),
    "swin_b": (lambda: transformer("swin_base_patch4_window7_224"), (3, 224, 224), 4),
}


def batch_of(name: str, batch_size: int | None, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with random weights in evaluation mode, as the thesis trains its ResNets, and a batch of noise."""
    make, shape, default = MODELS[name]
    x = torch.rand(batch_size or default, *shape)
    return make().eval().to(device), x.to(device), (torch.arange(len(x)) % 10).to(device)


def frozen_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a learning rate of 0, so that every round does the same work."""
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def turn_of(
    method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, dtype: str
) -> turns.Turn:
    """A round of a method."""
    fused = any(getattr(module, "fused_attn", False) for module in model.modules())
    attention = functools.partial(sdpa_kernel, SDPBackend.MATH) if method.double and fused else nullcontext
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def run() -> None:
        for t in range(method.steps):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(method.parts), y.chunk(method.parts), strict=True):
                with attention(), autocast():
                    total = method.total(model, part_x, part_y, t)
                (total * (len(part_x) / len(x))).backward()
            optimizer.step()

    return turns.Turn(run, method.steps, list(model.parameters()))


def turns_of(model: nn.Module, x: Tensor, y: Tensor, dtype: str, backend: str | None) -> dict[str, turns.Turn]:
    """A round of every method, and of those that are to be compiled, whose whole steps are.

    All share one copy of the model, whose weights do not change.
    """
    model = copy.deepcopy(model)
    optimizer = frozen_optimizer(model)
    found = {name: turn_of(method, model, optimizer, x, y, dtype) for name, method in METHODS.items()}
    if backend is None:
        return found
    torch.compiler.reset()
    inductor.fallback_random = True  # the eager step's random numbers, so that gradients can be compared
    for name, method in METHODS.items():
        if method.compiled:
            whole = torch.compile(method.total, fullgraph=True, dynamic=False, backend=backend)
            found[f"{name}, compiled"] = turn_of(
                dataclasses.replace(method, total=whole), model, optimizer, x, y, dtype
            )
    return found


def count(method: Method, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Passes of an eager step in float32 by kind, and floating-point operations, for each image."""

    def run(probe: nn.Module) -> None:
        turn_of(method, probe, frozen_optimizer(probe), x, y, "float32").run()

    return passes.count(copy.deepcopy(model), run, method.steps * len(x))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    parser = turns.parser_of(__doc__, output="results/step_cost", rounds=100, warm_up=3)
    parser.add_argument("--model", choices=MODELS, default="convnet")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compiled forms too")
    args = parser.parse_args(argv)
    device = turns.prepare(parser, args)
    if args.compile and args.warm_up < 1:
        parser.error("--warm-up is at least 1 with --compile, which happens in the first round")

    model, x, y = batch_of(args.model, args.batch_size, device)
    # Four images are enough to count with: halves and quarters of them are whole.
    counts = {name: count(method, model, x[:4], y[:4]) for name, method in METHODS.items()}
    repeats = []
    for seed in range(args.repeats):
        contenders = turns_of(model, x, y, args.dtype, args.compile)
        title = f"{args.model}, repeat {seed + 1}"
        repeats.append(
            turns.take_turns(contenders, args.rounds, warm_up=args.warm_up, seed=seed, device=device, title=title)
        )
    compiled = {name: name.removesuffix(", compiled") for name in contenders if name not in METHODS}
    report = {
        **turns.circumstances("step_cost", argv, args, device, "torchvision", "timm"),
        "model": args.model,
        "input": list(x.shape),
        "floor": {name: method.floor / 3 for name, method in METHODS.items()},
        "counted": {
            name: {**of_step, "flops_of_natural": of_step["flops"] / counts["natural"]["flops"]}
            for name, of_step in counts.items()
        },
        "gradient_error_of_compiled": {
            name: turns.gradient_error(contenders[name], contenders[eager]) for name, eager in compiled.items()
        },
        "seconds": {name: turns.medians(repeats, name) for name in contenders},
        "ratio_to_natural": {name: turns.ratios(repeats, name, "natural") for name in contenders},
        "ratio_to_compiled_natural": {name: turns.ratios(repeats, name, "natural, compiled") for name in compiled},
        "object_to_explicit": turns.ratios(repeats, "GradNorm, PenalizedLoss", "GradNorm, explicit loop"),
    }
    stem = turns.stem(args.model, args.dtype, device)
    turns.write(report, args.output / f"{stem}.json")
    print(table_of(report))
    picture(report, args.output / f"{stem}.png")


def table_of(report: dict) -> str:
    """The report as a Markdown table."""
    clocks = list(report["object_to_explicit"])
    header = ["step", "forward / to inputs / to weights / second", "passes", "FLOPs", "floor", "seconds"]
    header += [title for clock in clocks for title in (f"{clock} time: median (quartiles)", "repeats")]

    def row(name: str, ratios: dict, eager: str | None = None) -> list[str]:
        cells = [""] * 4
        if eager is not None:
            counted = report["counted"][eager]
            kinds = [counted[kind] for kind in passes.KINDS]
            numbers = (f"{sum(kinds):g}", f"{counted['flops_of_natural']:.2f}", f"{report['floor'][eager]:.2f}")
            cells = [" / ".join(f"{kind:g}" for kind in kinds), *numbers]
        seconds = report["seconds"][name][clocks[0]] if name in report["seconds"] else None
        cells.append("" if seconds is None else f"{seconds:.4f}")
        return [name, *cells, *[cell for clock in clocks for cell in turns.spread(ratios[clock])]]

    rows = [row(name, found, name if name in METHODS else None) for name, found in report["ratio_to_natural"].items()]
    rows.append(row("*PenalizedLoss / explicit loop*", report["object_to_explicit"]))
    for name, found in report["ratio_to_compiled_natural"].items():
        rows.append(row(f"*{name} / natural, compiled*", found))
    return f"{turns.table(header, rows)}\n\n{report['machine']}"


def picture(report: dict, path: Path) -> None:
    """The ratios of the first clock, eager and compiled, and the floors."""
    clock = next(iter(report["object_to_explicit"]))
    series: dict[str, dict] = {"eager": {}, "compiled": {}}
    for name, found in report["ratio_to_natural"].items():
        eager = name.removesuffix(", compiled")
        series["eager" if eager == name else "compiled"][eager] = found[clock]
    series = {kind: values for kind, values in series.items() if values}
    label = f"{clock} time / natural step, median and quartiles ({report['model']}, {report['dtype']})"
    turns.plot(series, report["floor"], label, path)


if __name__ == "__main__":
    main()

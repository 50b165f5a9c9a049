"""Cost of an evaluation under attack, against its floor and against other libraries.

    python benchmarks/attack_cost.py --threads 1
    python benchmarks/attack_cost.py --threads 1 --model resnet18 --rounds 5

`make attack-cost` installs the other libraries in an environment of their own (one of them pins old packages) and runs
both. All contenders run in one process and take turns on the same model and images; README.md beside this file says how
to read the tables.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gradreg import APGDAttack, Attack, Linf, PGDAttack, TargetedAPGDAttack, evaluate, smoothify
from gradreg.attacks import IteratedAttack

import turns

CRITERION = nn.CrossEntropyLoss(reduction="none")
Contender = Callable[[nn.Module, Tensor, Tensor], Tensor]  # which samples are robust
TOO_SMALL = 1e-6  # an eps at which nobody is fooled, so that all contenders do all of the work


def floor(steps: int) -> Contender:
    """What no evaluation of so many steps can do without: the clean pass, the gradients, and a pass for the verdict."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            right = model(x).argmax(1) == y
        z, labels = x[right], y[right]
        for _ in range(steps):
            leaf = z.detach().requires_grad_()
            torch.autograd.grad(CRITERION(model(leaf), labels).sum(), leaf)
        with torch.no_grad():
            right[right.clone()] = model(z).argmax(1) == labels
        return right

    return run


def evaluation(*attacks: Attack) -> Contender:
    """`evaluate`: fooled samples leave."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(evaluate(model, [(x, y)], attacks, masking=0, progress=False).robust)

    return run


def perturbed(attack: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Contender:
    """The way users of an attack library write it: attack every sample that is classified right, then score."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            right = model(x).argmax(1) == y
        x_adv = attack(model, x[right], y[right])
        with torch.no_grad():
            right[right.clone()] = model(x_adv).argmax(1) == y[right]
        return right

    return run


def plain(attack: IteratedAttack) -> Contender:
    """One of gradreg's attacks on its own: every sample stays to the end."""
    return perturbed(attack)


def of_torchattacks(name: str, **options: object) -> Contender:
    """PGD or APGD of torchattacks."""
    import torchattacks

    return perturbed(lambda model, x, y: getattr(torchattacks, name)(model, **options)(x, y))


def of_foolbox(eps: float, steps: int) -> Contender:
    """PGD of foolbox, with the same step size as the others."""
    import foolbox

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        pgd = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=2.5 * eps / steps)
        return pgd(wrapped, x, y, epsilons=eps)[1]

    return perturbed(attack)


def of_pyautoattack(eps: float, attacks: list[str]) -> Contender:
    """The authors' own APGD."""
    import pyautoattack

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        adversary = pyautoattack.AutoAttack(model, eps=eps, version="custom", attacks=attacks, seed=0, device="cpu")
        adversary.apgd.n_restarts = 1  # as in its standard version; a custom one has 5
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        with torch.no_grad():
            return model(x_adv).argmax(1) == y

    return run


def installed(**makers: Callable[[], Contender]) -> dict[str, Contender]:
    """The contenders whose packages are installed."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return found


def of_steps(eps: float, steps: int) -> dict[str, Contender]:
    """PGD with so many steps."""
    threat = Linf(eps)
    alpha = 2.5 * eps / steps
    return {
        "floor": floor(steps),
        "gradreg, evaluate": evaluation(PGDAttack(threat, steps=steps, seed=0)),
        "gradreg, attack alone": plain(PGDAttack(threat, steps=steps, seed=0, best=False)),
        **installed(
            torchattacks=lambda: of_torchattacks("PGD", eps=eps, alpha=alpha, steps=steps),
            foolbox=lambda: of_foolbox(eps, steps),
        ),
    }


def adaptive(eps: float, steps: int) -> dict[str, Contender]:
    """APGD on cross-entropy."""
    threat = Linf(eps)
    return {
        "floor": floor(steps),
        "gradreg, evaluate": evaluation(APGDAttack(threat, steps=steps, seed=0)),
        "gradreg, attack alone": plain(APGDAttack(threat, steps=steps, seed=0, best=False)),
        **installed(
            torchattacks=lambda: of_torchattacks("APGD", eps=eps, steps=steps),
            # which always takes 100 steps
            **({"pyautoattack": lambda: of_pyautoattack(eps, ["apgd-ce"])} if steps == 100 else {}),
        ),
    }


def verdicts(eps: float) -> dict[str, Contender]:
    """The full verdict of APGD-CE and APGD-T, 100 steps, 9 targets."""
    threat = Linf(eps)
    return {
        **installed(pyautoattack=lambda: of_pyautoattack(eps, ["apgd-ce", "apgd-t"])),
        "gradreg, evaluate": evaluation(APGDAttack(threat), TargetedAPGDAttack(threat)),
        "gradreg, evaluate, halving": evaluation(APGDAttack(threat), TargetedAPGDAttack(threat, halving=True)),
    }


def compare(
    contenders: dict[str, Contender], model: nn.Module, x: Tensor, y: Tensor, rounds: int, title: str
) -> dict[str, dict[str, object]]:
    """CPU time of each contender over that of the first in the same round, and how many samples it finds robust."""
    base = next(iter(contenders))
    robust: dict[str, int] = {}

    def turn_of(name: str) -> turns.Turn:
        def run() -> None:
            torch.manual_seed(0)
            robust[name] = int(contenders[name](model, x, y).sum())

        return turns.Turn(run)

    taking = {name: turn_of(name) for name in contenders}
    measured = [turns.take_turns(taking, rounds, warm_up=1, seed=0, device=torch.device("cpu"), title=title)]
    found: dict[str, dict[str, object]] = {}
    for name in contenders:
        ratio = turns.ratios(measured, name, base)["cpu"]
        found[name] = {
            "ratio": ratio["median"],
            "quartiles": [ratio["quartile_1"], ratio["quartile_3"]],
            "robust": robust[name],
            "seconds": turns.medians(measured, name)["cpu"],
        }
    return found


def table(title: str, found: dict[str, dict[str, object]], n: int) -> str:
    """One comparison as a Markdown table."""
    rows = []
    for name, row in found.items():
        low, high = row["quartiles"]
        robust = "" if name == "floor" else str(row["robust"])
        rows.append([name, f"**{row['ratio']:.3f}** ({low:.3f}-{high:.3f})", robust])
    header = ["", f"time / {next(iter(found))} (quartiles)", f"robust of {n}"]
    return f"\n{title}\n\n{turns.table(header, rows)}"


def digits(images: int) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The quickstart's natural and GradNorm networks, trained anew, and its validation images."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import quickstart

    train_x, train_y, x, y = quickstart.load_digits("validation")
    names = {"natural": "natural", "GradNorm": "GradNorm, GELU"}
    models = {short: quickstart.train(name, train_x, train_y, 350, 0) for short, name in names.items()}
    return models, x[:images], y[:images]


def resnet18(images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A GELU ResNet-18 with random weights, and noise that it classifies right by definition."""
    import torchvision

    torch.manual_seed(0)
    model = smoothify(torchvision.models.resnet18(num_classes=10), act="gelu").eval()
    x = torch.rand(images, 3, 64, 64)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["digits", "resnet18"], default="digits")
    parser.add_argument("--images", type=int, help="default: 200 digits, or 16 for the ResNet")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100], help="of PGD")
    parser.add_argument("--rounds", type=int, default=20, help="in which all contenders take turns")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--output", type=Path, default=Path("results/attack_cost"), help="folder to write into")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    adaptive_steps = max(args.steps)

    comparisons: dict[str, tuple[nn.Module, dict[str, Contender]]] = {}
    if args.model == "resnet18":
        model, x, y = resnet18(args.images or 16)
        models = {"random": model}
    else:
        models, x, y = digits(args.images or 200)
        model = models["GradNorm"]
    for steps in args.steps:
        comparisons[f"PGD-{steps}, nobody is fooled"] = model, of_steps(TOO_SMALL, steps)
    comparisons[f"APGD-CE ({adaptive_steps}), nobody is fooled"] = model, adaptive(TOO_SMALL, adaptive_steps)
    if args.model == "digits":
        for level, name, eps in (("high", "GradNorm", 0.1), ("low", "natural", 0.15)):
            where = f"{level} robust accuracy ({name}, eps {eps})"
            for steps in args.steps:
                comparisons[f"PGD-{steps}, {where}"] = models[name], of_steps(eps, steps)
            comparisons[f"APGD-CE ({adaptive_steps}), {where}"] = models[name], adaptive(eps, adaptive_steps)
            comparisons[f"APGD-CE and APGD-T, {where}"] = models[name], verdicts(eps)
    found = {}
    for title, (net, contenders) in comparisons.items():
        rounds = args.rounds if "APGD-T" not in title else max(1, args.rounds // 5)
        found[title] = compare(contenders, net, x, y, rounds, title)
        print(table(title, found[title], len(x)), flush=True)

    report = {
        "command": turns.command("attack_cost", argv),
        "model": args.model,
        "input": list(x.shape),
        "rounds": args.rounds,
        "machine": turns.machine(torch.device("cpu")),
        "versions": turns.versions("torchattacks", "foolbox", "pyautoattack"),
        "comparisons": found,
    }
    turns.write(report, args.output / f"{args.model}.json")


if __name__ == "__main__":
    main()

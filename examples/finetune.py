r"""Fine-tune a timm model that you have until it is robust.

    python examples/finetune.py resnet50.a1_in1k DATA --eps 2/255
    python examples/finetune.py tf_efficientnet_lite0 results/clothes --demo --weights WEIGHTS.pth --size 48 \
        --eps 4/255 --budget 400 --natural 120 --adapt-batch-norm

DATA has folders train and val (and perhaps test), each with a folder of images per class. First a natural phase, in
which a new classifier learns the classes; then the radius rises from 0 and the activations, if ``--act`` exchanges
them, get smoother. Methods are compared at equal arithmetic: ``--budget`` counts natural steps, and a robust step costs
what ``PenalizedLoss.cost()`` says. The report has clean and robust accuracy before (after the natural phase) and after.

A run that was stopped goes on where it stood when the same command is given again, to the same weights. OUTPUT then
holds ``log.jsonl``, ``report-val.md``, its numbers as JSON, and ``finetuned.pt``, which ``finetuning.weights.load``
reads; its ``state_dict`` is what timm's own model of that name loads. Choose settings on val; then the same command
with ``--split test`` takes no step more and evaluates on images that no choice has seen.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from gradreg import (
    NFGSM,
    CollapseAlarm,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    anneal_sharpness,
    linear_ramp,
    preflight,
    smoothify,
    with_normalization,
)
from gradreg.state import write_atomically

from finetuning.data import Images, loader_of, numbers_of_batches
from finetuning.report import predicted_classes, robustness, warn_if_constant
from finetuning.weights import export, load_weights, save

METHODS = ("noisy", "penalty", "pgd3", "natural")
# What changes nothing about the trained weights.
FREE = ("output", "save_every", "workers", "demo", "images", "split", "autoattack_images", "pt2")


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The network, taking pixels in [0, 1], with the weights that it had and a new classifier."""
    pretrained = args.weights == "timm"
    network = timm.create_model(args.model, pretrained=pretrained, num_classes=classes)
    if args.weights not in ("timm", "none"):
        load_weights(network, args.weights)
    with torch.no_grad():  # timm begins with logits so large that undoing them costs the network what it knows
        network.get_classifier().weight.mul_(0.01)
    config = timm.data.resolve_model_data_config(network)
    if args.act:
        network = smoothify(network, act=args.act, sharpness=args.sharpness_start)
    return with_normalization(network, config["mean"], config["std"])


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep the statistics of BatchNorm as they are, in a model that is otherwise in training mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def objective_of(args: argparse.Namespace, share: float = 1.0) -> PenalizedLoss:
    """What the robust phase minimises, at a share of the radius."""
    criterion = nn.CrossEntropyLoss(reduction="none", label_smoothing=args.label_smoothing)
    threat = Linf(args.train_eps * share)
    if args.method == "noisy":
        bounds = (0.0, 1.0) if args.noise <= 1 else None  # as the paper of N-FGSM has its noise of 2
        at = NFGSM(threat, share=0.5, noise=args.noise, bounds=bounds)
        return PenalizedLoss(criterion, at=at, alarm=CollapseAlarm())
    if args.method == "pgd3":
        step_size = 2 / 3 * threat.eps
        return PenalizedLoss(
            criterion, at=PGDAttack(threat, steps=3, step_size=step_size, random_start=False, best=False)
        )
    if args.method == "penalty":
        penalty = Term(GradNormPenalty(threat), weight=args.penalty_weight)
        return PenalizedLoss(criterion, {"grad_norm": penalty}, loss_weight=args.loss_weight)
    return PenalizedLoss(criterion)


@dataclass(frozen=True)
class Plan:
    """How many steps of which kind, and what they have at step t."""

    args: argparse.Namespace
    robust: int  # steps

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Plan":
        """As many robust steps as the rest of the budget pays for."""
        cost = objective_of(args).cost(0, shape=(3, args.size, args.size)).natural_steps
        return cls(args, int((args.budget - args.natural) / cost + 1e-9))

    @property
    def steps(self) -> int:
        return self.args.natural + self.robust

    def eps_share(self, step: int) -> float:
        """Of the radius: rises from 0 during a share of the robust phase."""
        return min(1.0, (step + 1 - self.args.natural) / max(1.0, self.args.ramp * self.robust))

    def learning_rate(self, step: int) -> float:
        """A short warm-up and a cosine to 0, in each of the phases."""
        robust = step >= self.args.natural
        begin, length = (self.args.natural, self.robust) if robust else (0, self.args.natural)
        progress = (step - begin + 1) / (length + 1)
        warm = min(1.0, (step - begin + 1) / max(1.0, 0.1 * length))
        return (self.args.lr if robust else self.args.natural_lr) * warm * (1 + math.cos(math.pi * progress)) / 2


class Training:
    """Model, averaged weights, optimiser and clock of a run."""

    def __init__(self, args: argparse.Namespace, classes: list[str], device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.classes, self.device, self.step = args, classes, device, 0
        self.plan = Plan.of(args)
        self.model = build(args, len(classes)).to(device).to(memory_format=torch.channels_last)
        self.anneal = None
        if args.act:
            ramp = linear_ramp(
                args.sharpness, duration=max(1.0, args.ramp * self.plan.robust), start=args.sharpness_start
            )
            self.anneal = anneal_sharpness(self.model, ramp)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
        options = {"weight_decay": args.weight_decay} | ({"momentum": 0.9} if args.optimizer == "sgd" else {})
        head = {id(parameter) for parameter in self.model.model.get_classifier().parameters()}
        parameters = list(self.model.parameters())
        self.optimizer = kind(
            [
                {"params": [p for p in parameters if id(p) not in head], "factor": 1.0},
                {"params": [p for p in parameters if id(p) in head], "factor": args.head_lr},
            ],
            lr=0.0,
            **options,
        )
        self.natural = PenalizedLoss(nn.CrossEntropyLoss(reduction="none", label_smoothing=args.label_smoothing))
        self.objective = objective_of(args)

    def settings(self) -> dict[str, Any]:
        """All that decides the trained weights."""
        settings = vars(self.args) | {"data": str(self.args.data)}
        return {name: value for name, value in settings.items() if name not in FREE}

    def look_ahead(self, x: Tensor, y: Tensor) -> None:
        """Take the robust step on a copy, say what is wrong with it, and differentiate in the way that works."""
        freeze_batch_norm(self.model.train())
        report = preflight(self.objective, self.model, x[:4].to(self.device), y[:4].to(self.device), t=0)
        print(report)
        if self.objective.terms:
            self.objective.differentiation = report.differentiation()

    def take_step(self, x: Tensor, y: Tensor) -> float:
        """One optimiser step; returns the loss."""
        args, robust = self.args, self.step >= self.args.natural
        torch.manual_seed(hash((args.seed, self.step)))  # all that is random in a step follows from its number
        self.model.train()
        if robust or not args.adapt_batch_norm:
            freeze_batch_norm(self.model)
        objective = self.objective if robust else self.natural
        if robust:
            now = objective_of(args, self.plan.eps_share(self.step))
            objective.at, objective.terms = now.at, now.terms
        if self.anneal is not None:
            self.anneal(max(0, self.step - args.natural))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.step) * group["factor"]
        self.optimizer.zero_grad()
        x, y = x.to(self.device, memory_format=torch.channels_last), y.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=args.amp):
            out = objective(self.model, x, y, self.step)
        out.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return out.loss.item()

    def state(self) -> dict[str, Any]:
        """All that the next steps hang on."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return {"settings": self.settings(), "step": self.step, **states}

    def parts(self) -> dict[str, Any]:
        """What has a state."""
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "objective": self.objective}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this very run."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        now = self.settings()
        if different := [name for name in now if saved["settings"].get(name) != now[name]]:
            raise SystemExit(f"{path} was made with another {', '.join(different)}: name another --output.")
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]


def train(training: Training, folder: Path, output: Path) -> None:
    """Take the steps that are left, with a checkpoint every so often."""
    args, plan = training.args, training.plan
    images = Images(folder / "train", args.size, train=True)
    checked = loader_of(Images(folder / "val", args.size, train=False), None, 2 * args.batch_size, args.workers)
    steps = range(training.step, plan.steps)
    rows = list(numbers_of_batches(len(images), args.batch_size, steps, args.seed))
    batches = iter(DataLoader(images, batch_sampler=rows, num_workers=args.workers))
    if steps and args.method != "natural":
        training.look_ahead(*next(iter(checked)))
    started = time.perf_counter()
    with tqdm(initial=training.step, total=plan.steps, unit="step", smoothing=0.05) as bar:
        while training.step < plan.steps:
            loss = training.take_step(*next(batches))
            bar.update()
            if training.step % args.save_every == 0 or training.step in (args.natural, plan.steps):
                accuracy, predicted, frequent = predicted_classes(training.ema.module, checked, training.device)
                told = {"loss": loss, "clean": accuracy, "predicted most": predicted}
                bar.set_postfix({name: f"{value:.2f}" for name, value in told.items()})
                seconds = round(time.perf_counter() - started, 1)
                with (output / "log.jsonl").open("a") as file:
                    file.write(json.dumps({"step": training.step, **told, "seconds": seconds}) + "\n")
                if training.step > args.natural:
                    warn_if_constant(predicted, frequent)
                if training.step == args.natural:
                    save(output / "natural.pt", training.ema.module.state_dict())
                save(output / "last.pt", training.state())


def report_robustness(training: Training, folder: Path, output: Path) -> None:
    """Evaluate the weights of before and after the robust phase, and write the report."""
    args, model = training.args, training.ema.module
    images = Images(folder / args.split, args.size, train=False)
    count = len(images) if args.images is None else min(args.images, len(images))
    spread = torch.linspace(0, len(images) - 1, count).long().tolist()  # of all classes, which come in order
    rows = {"all": loader_of(images, spread, 2 * args.batch_size, args.workers)}
    if args.autoattack_images:
        rows["few"] = loader_of(
            images, spread[:: max(1, count // args.autoattack_images)], 2 * args.batch_size, args.workers
        )
    before = copy.deepcopy(model)
    before.load_state_dict(torch.load(output / "natural.pt", map_location=training.device, weights_only=True))
    lines = [
        f"{args.model}, {args.method}, {training.step} steps of {args.batch_size} images ({args.natural} natural) for "
        f"{args.budget} natural steps; Linf, eps {args.eps:.4f}; {count} images of {args.split}, seed {args.seed}",
        "",
        "| | clean | robust | predicted most often | AutoAttack |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, weights in (("before", before), ("after", model)):
        found = robustness(weights, Linf(args.eps), output / f"{name}-{args.split}.json", rows, training.device)
        most, strong = found.about["predicted most"], found.about.get("AutoAttack", "")
        lines.append(f"| {name} | {found.clean_accuracy} | {found.robust_accuracy} | {most} | {strong} |")
    text = "\n".join(lines) + "\n"
    write_atomically(output / f"report-{args.split}.md", text)
    print(text)


def about(training: Training) -> dict[str, Any]:
    """What :func:`finetuning.weights.load` needs to know, beside the weights."""
    args, config = training.args, timm.data.resolve_model_data_config(training.model.model)
    known = {"model": args.model, "num_classes": len(training.classes), "classes": training.classes, "size": args.size}
    sharpness = None if training.anneal is None else training.anneal.schedule(max(0, training.step - 1 - args.natural))
    return known | {"act": args.act, "sharpness": sharpness, "mean": config["mean"], "std": config["std"]}


def number(text: str) -> float:
    """A number, perhaps as a fraction."""
    return float(Fraction(text))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("model", help="name of a timm model")
    add("data", type=Path, help="folder with train and val, each with a folder of images per class")
    add("--demo", action="store_true", help="write the demonstration's images into DATA first (Fashion-MNIST)")
    add("--weights", default="timm", help="timm (downloads), none, or a file of weights")
    add("--method", choices=METHODS, default="pgd3", help="default: pgd3; see docs/finetune/table.md for why")
    add("--eps", type=number, default=2 / 255, help="radius to be robust to, Linf, such as 2/255")
    add("--train-eps", type=number, help="radius to train with (default: eps)")
    add("--budget", type=int, default=600, help="natural steps that all of the training may cost")
    add("--natural", type=int, default=150, help="natural steps of these to begin with")
    add("--ramp", type=float, default=0.3, help="share of the robust phase in which the radius rises")
    add("--size", type=int, default=224, help="of the images")
    add("--noise", type=float, default=2.0, help="of the noisy method, in radii")
    add("--batch-size", type=int, default=32)
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--natural-lr", type=float, default=1e-3, help="largest learning rate of the natural phase")
    add("--lr", type=float, default=1e-3, help="largest learning rate of the robust phase")
    add("--head-lr", type=float, default=1.0, help="factor of the classifier's learning rate")
    add("--weight-decay", type=float, default=1e-2)
    add("--clip-grad", type=float, default=1.0, help="largest norm of a gradient")
    add("--label-smoothing", type=float, default=0.0)
    add("--ema", type=float, default=0.95, help="decay of the averaged weights")
    add("--adapt-batch-norm", action="store_true", help="let the natural phase move the statistics of BatchNorm")
    add("--act", help="gelu, silu, softplus or blend instead of ReLU and its like; the penalty wants it")
    add("--sharpness-start", type=float, default=8.0)
    add("--sharpness", type=float, default=2.0, help="at the end")
    add("--loss-weight", type=float, default=0.8, help="of the penalty's objective")
    add("--penalty-weight", type=float, default=1.2)
    add("--amp", action="store_true", help="bfloat16 where autocast allows it")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that read images")
    add("--save-every", type=int, default=50, help="steps")
    add("--split", default="val", help="folder to evaluate on: val while choosing settings, test once")
    add("--images", type=int, help="evaluate on this many")
    add("--autoattack-images", type=int, default=0, help="AutoAttack on this many of them")
    add("--pt2", action="store_true", help="export a torch.export program too")
    add("--output", type=Path, default=Path("results/finetune"), help="folder to write into")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, evaluate, export."""
    args = parser().parse_args(argv)
    args.train_eps = args.train_eps or args.eps
    if args.demo and not args.data.exists():
        from study import clothes

        print(f"{clothes.write(args.data)} images in {args.data}")
    classes = ImageFolder(str(args.data / "train")).classes
    args.output.mkdir(parents=True, exist_ok=True)
    training = Training(args, classes, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if (args.output / "last.pt").exists():
        training.resume(args.output / "last.pt")
    train(training, args.data, args.output)
    export(args.output / "finetuned.pt", training.ema.module, about(training), pt2=args.pt2)
    report_robustness(training, args.data, args.output)


if __name__ == "__main__":
    main()

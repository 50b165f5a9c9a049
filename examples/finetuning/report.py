"""What a classifier is worth: clean and robust accuracy, and whether it is one at all."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from gradreg import APGDAttack, AutoAttack, Linf, RobustnessReport, TargetedAPGDAttack, evaluate


@torch.no_grad()
def predicted_classes(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[float, float, float]:
    """Accuracy, the share of the class that is predicted most often, and of the one that is most frequent."""
    model.eval()
    batches = [(model(x.to(device)).argmax(1).tolist(), y.tolist()) for x, y in loader]
    guesses, labels = ([value for batch in column for value in batch] for column in zip(*batches, strict=True))
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    return (right / len(labels), *(max(Counter(of).values()) / len(labels) for of in (guesses, labels)))


def warn_if_constant(predicted: float, frequent: float) -> None:
    """Warn of a classifier that says nearly always the same: its accuracies are those of a guess, attacked or not."""
    if predicted > (1 + frequent) / 2:
        warnings.warn(
            f"The model predicts one class for {predicted:.0%} of the images, and no class has more than "
            f"{frequent:.0%} of them: it is all but constant, and its robust accuracy means nothing. Lower the "
            "learning rate or the weight of the penalty, or let the radius rise more slowly.",
            stacklevel=2,
        )


def robustness(
    model: nn.Module, threat: Linf, path: Path, rows: dict[str, DataLoader[Any]], device: torch.device
) -> RobustnessReport:
    """Clean and robust accuracy, and that under AutoAttack of some images; what was evaluated before is read."""
    if path.exists():
        return RobustnessReport.load(path)
    attacks = [APGDAttack(threat, steps=20), TargetedAPGDAttack(threat, steps=10, targets=3)]
    report = evaluate(model, rows["all"], attacks, masking=0, device=device)
    _, predicted, frequent = predicted_classes(model, rows["all"], device)
    report.about.update({"predicted most": f"{predicted:.3f}", "most frequent": f"{frequent:.3f}"})
    warn_if_constant(predicted, frequent)
    if "few" in rows:
        strong = evaluate(model, rows["few"], AutoAttack(threat), masking=0, device=device)
        report.about["AutoAttack"] = f"{strong.robust_accuracy}, n = {strong.n}"
    report.save(path)
    return report

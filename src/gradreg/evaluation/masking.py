"""Signs of gradient masking: attacks that fail because there is no gradient to follow, not because there is no way."""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from gradreg import modes
from gradreg.attacks import FGSM, Attack, PGDAttack, RandomSearch, TransferAttack, pgd
from gradreg.checks import GradregWarning
from gradreg.criteria import cross_entropy, margin
from gradreg.differentiation import InputOnly
from gradreg.evaluation.report import Flag
from gradreg.point import Point
from gradreg.streaming import Model, is_correct
from gradreg.threat_models import Bounds, Linf, ThreatModel

_STEPS = 50


def masking_checks(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    bounds: Bounds | None = (0.0, 1.0),
    black_box: Attack | None = None,
    surrogate: nn.Module | None = None,
    seed: int = 0,
) -> list[Flag]:
    """Look for signs that gradient attacks on a model fail for want of a gradient.

    The signs of Athalye, Carlini & Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML 2018, section
    3.1) and Carlini et al., "On Evaluating Adversarial Robustness" (2019), on samples that the model classifies right:

    * *random outputs*: two forward passes differ;
    * *softmax outputs*: the model returns probabilities, in which cross-entropy is flat;
    * *zero gradients*: the input gradient of cross-entropy is exactly 0 (rounding front ends, saturated logits);
    * *loss does not rise with steps*: PGD of 50 small steps comes less high than it was on the way, or nowhere;
    * *one step beats iterative*: FGSM fools more samples than PGD;
    * *black box beats white box*: a random search, or a transferred attack, fools samples that PGD did not;
    * *survives any perturbation*: more than 5 % stay right in a ball that holds every image.

    A raised flag asks for an attack made for this model. None is a proof of robustness either.

    Args:
        model: The model, evaluated in evaluation mode if it is an ``nn.Module``.
        x: A batch of inputs, some dozens.
        y: Their classes, or probabilities, of which the largest counts.
        threat: The perturbations of the evaluation.
        bounds: Lowest and highest value of an input.
        black_box: A stronger search without gradients, such as ``AutoAttack(threat, attacks=("square",))``. Default:
            :class:`RandomSearch`.
        surrogate: Another model of the same task, to transfer PGD from.
        seed: Of all noise.

    Returns:
        One flag for every sign.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x = torch.rand(8, 1, 4, 4)
        >>> flags = masking_checks(lambda z: model((255 * z).round() / 255), x, model(x).argmax(1), Linf(8 / 255))
        >>> [flag.name for flag in flags if flag.raised and "zero" in flag.name]
        ['zero gradients']
    """
    evaluated = modes.evaluating(model) if isinstance(model, nn.Module) else nullcontext()
    before = modes.random_state(x.device)
    try:
        with evaluated, torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", GradregWarning)  # what they would say is what the flags say
            return _flags(model, x, y if y.ndim == 1 else y.argmax(1), threat, bounds, black_box, surrogate, seed)
    finally:
        modes.set_random_state(before, x.device)


def _flags(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    bounds: Bounds | None,
    black_box: Attack | None,
    surrogate: nn.Module | None,
    seed: int,
) -> list[Flag]:
    flags = [*_outputs(model, x)]
    with torch.no_grad():
        right = model(x).argmax(1) == y
    if not bool(right.any()):
        return [*flags, Flag("zero gradients", False, "not looked at: no sample is classified right")]
    threat = threat.rows(right.nonzero().squeeze(1), x)
    x, y = x[right].detach(), y[right]

    def connected(z: Tensor) -> Tensor:
        """The model, with a gradient of 0 where it has none: it may detach its input, or run without autograd."""
        return model(z) + 0 * z.flatten(1).sum(1, keepdim=True)

    flags.append(_zero_gradients(connected, x, y))
    steps, robust = _small_steps(connected, x, y, threat, bounds)
    single = FGSM(threat, bounds=bounds, out_of_bounds="clamp")
    flags += [steps, _one_step(robust, is_correct(model, single(connected, x, y), y))]
    search = black_box or RandomSearch(threat, bounds=bounds, out_of_bounds="clamp")
    flags.append(_black_box(search.for_evaluation(seed), model, x, y, robust))
    if surrogate is not None:
        pgd_there = PGDAttack(threat, steps=20, bounds=bounds, out_of_bounds="clamp", seed=seed, mode="eval")
        flags.append(_black_box(TransferAttack(pgd_there, surrogate), model, x, y, robust))
    return [*flags, _any_perturbation(connected, x, y, threat, bounds, seed)]


def _outputs(model: Model, x: Tensor) -> tuple[Flag, Flag]:
    with torch.no_grad():
        first, second = model(x), model(x)
    scale = first.abs().amax().clamp(min=1e-12)
    difference = ((first - second).abs().amax() / scale).item()
    changed = int((first.argmax(1) != second.argmax(1)).sum())
    random = Flag(
        "random outputs",
        difference > 1e-4 or changed > 0,
        f"two passes over {len(x)} samples differ by up to {difference:.1e} of the largest logit, and in {changed} "
        "classes",
    )
    sums = first.sum(1)
    softmax = bool((first >= 0).all() and (first <= 1).all() and ((sums - 1).abs() < 1e-4).all())
    outputs = Flag(
        "softmax outputs",
        softmax,
        f"outputs lie in [{first.min().item():.3g}, {first.max().item():.3g}], and those of a sample add up to "
        f"{sums.min().item():.4g} to {sums.max().item():.4g}",
    )
    return random, outputs


def _zero_gradients(model: Model, x: Tensor, y: Tensor) -> Flag:
    grad = Point(model, cross_entropy, x, y, differentiation=InputOnly(), look=False).gradient()
    flat = int((grad.flatten(1).abs().amax(1) == 0).sum())
    return Flag("zero gradients", flat > 0, f"{flat} of {len(x)} samples have an input gradient of exactly 0")


def _small_steps(model: Model, x: Tensor, y: Tensor, threat: ThreatModel, bounds: Bounds | None) -> tuple[Flag, Tensor]:
    """The mean loss on the way of one long attack, and which samples stayed correct at every step."""
    path: list[float] = []
    robust = torch.ones_like(y, dtype=torch.bool)

    def losses_at(z: Tensor, rows: Tensor) -> Tensor:
        nonlocal robust
        logits = model(z)
        losses = cross_entropy(logits, y[rows])
        path.append(losses.detach().double().mean().item())
        robust = robust & (logits.detach().argmax(1) == y)
        return losses

    pgd(
        losses_at,
        x,
        threat,
        steps=_STEPS,
        step_size=threat.eps / 4,
        random_start=False,
        bounds=bounds,
        out_of_bounds="clamp",
    )
    top = max(path)
    shown = ", ".join(f"{path[step]:.4g}" for step in (0, 1, 5, 20, _STEPS))
    flag = Flag(
        "loss does not rise with steps",
        path[-1] < top - 0.05 * abs(top) or path[-1] <= path[0],
        f"mean cross-entropy after 0, 1, 5, 20 and {_STEPS} steps: {shown}; highest {top:.4g}",
    )
    return flag, robust


def _one_step(robust: Tensor, robust_to_one: Tensor) -> Flag:
    one, many, n = int(robust_to_one.sum()), int(robust.sum()), len(robust)
    return Flag(
        "one step beats iterative",
        one < many,
        f"of {n} samples {one} are robust to one step (FGSM) and {many} to {_STEPS} (PGD)",
    )


def _black_box(attack: Attack, model: Model, x: Tensor, y: Tensor, robust: Tensor) -> Flag:
    x_adv = attack(model, x, y, index=torch.arange(len(x)))
    fooled = int((robust & ~is_correct(model, x_adv, y)).sum())
    return Flag(
        "black box beats white box",
        fooled > 0,
        f"{attack.name} fools {fooled} of the {int(robust.sum())} samples that are robust to PGD with {_STEPS} steps",
    )


def _any_perturbation(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    bounds: Bounds | None,
    seed: int,
) -> Flag:
    name = "survives any perturbation"
    if bounds is None:
        return Flag(name, False, "not looked at: the inputs have no bounds")
    low, high = (torch.as_tensor(side).to(x) for side in bounds)
    reach = threat.norm((high - low).expand_as(x).contiguous()).max().item()
    everything = Linf(high - low) if isinstance(threat, Linf) else threat.scaled(reach)
    left = torch.ones_like(y, dtype=torch.bool)
    for criterion in (cross_entropy, margin):
        attack = PGDAttack(
            everything, criterion=criterion, steps=20, bounds=bounds, out_of_bounds="clamp", early_stop=True, seed=seed
        )
        left = left & is_correct(model, attack(model, x, y), y)
    survivors = int(left.sum())
    return Flag(
        name,
        survivors > 0.05 * len(x),
        f"{survivors} of {len(x)} samples are robust to PGD in a ball {reach:.3g} times as large, which holds every "
        "input",
    )

"""Robust accuracy: every sample's verdict under every attack."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradreg import checks
from gradreg.attacks import FGSM, Attack, IteratedAttack
from gradreg.evaluation.masking import masking_checks
from gradreg.evaluation.report import MASKING, SPARED, Flag, RobustnessReport
from gradreg.gradients import outside_inference_mode
from gradreg.streaming import (
    RIGHT,
    WRONG,
    Batch,
    Cost,
    Counted,
    Model,
    Record,
    as_text,
    check_batch,
    classified,
    describe,
    is_correct,
    work_through,
)
from gradreg.threat_models import ThreatModel

AttackLike = Callable[[Model, Tensor, Tensor], Tensor]

_BLACK_BOX_SLACK = 0.002  # share of all samples that a search without gradients may add to one with them


def evaluate(
    model: Model,
    loader: Iterable[Any],
    attacks: AttackLike | Sequence[Attack] | Mapping[str, AttackLike],
    *,
    early_exit: bool = True,
    seed: int = 0,
    masking: int = 32,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Robust accuracy of a classifier under one or several attacks.

    Every batch is classified; the samples that are right are attacked; what an attack returns is checked to lie inside
    its threat model and classified again, which is the verdict. A sample is robust if no attack fools it, so the worst
    case over attacks is the AND of their verdicts, and an upper bound of the true robust accuracy. Samples leave an
    attack as soon as they are fooled.

    Data are read one batch at a time, and integers are counted, so that batches of any size add up right. Noise is
    drawn from the seed and each sample's own values: verdicts do not depend on batch size, order, early exit, or the
    number of processes, up to the rounding of the model. AutoAttack, attacks given as functions and models that draw
    random numbers draw for the batch as a whole: the same batches give the same verdicts.

    Started by ``torchrun`` with an initialised process group, the ranks share the batches and return the same report.
    Every rank is given the whole loader, unshuffled.

    Args:
        model: An ``nn.Module`` from inputs to logits ``(B, K)``. It is evaluated in evaluation mode, and every module
            then has its own mode back. A plain function is evaluated as it is.
        loader: Batches ``(x, y)``: inputs in the units of the attacks' threat models, and classes (or probabilities, of
            which the largest counts).
        attacks: One attack, several, or a mapping from names to attacks. Anything callable as ``attack(model, x, y)``
            will do, such as one of another library; of an :class:`~gradreg.Attack` the result is also checked.
        early_exit: Spare later attacks the samples that an earlier one fooled. Without it every attack is run on every
            sample that was classified right, and reported alone too.
        seed: Of the noise of attacks that have no seed of their own.
        masking: On how many samples of the first batch to look for signs of gradient masking, see
            :func:`masking_checks`; 0 for none.
        state: File to which every finished batch is written, and from which an interrupted evaluation goes on. It is
            refused if model, attacks, settings or data are not the same.
        device: Where batches are moved. Default: where the model's first parameter is; for a function they stay where
            they are.
        progress: Whether to show a bar.

    Returns:
        Verdicts, accuracies with 95 % intervals, costs and flags.

    Raises:
        ValueError: If the loader is empty, labels do not fit the logits, or inputs do not fit the attack's bounds.
        TypeError: If the model returns no tensor.
        StateError: If the state file is damaged or belongs to something else; it is left as it is.
        RuntimeError: If an attack left its threat model, or another process failed.

    Example:
        >>> from gradreg import APGDAttack, Linf, PGDAttack
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> loader = [(torch.rand(8, 1, 2, 2), torch.randint(0, 3, (8,))) for _ in range(3)]
        >>> attacks = [PGDAttack(Linf(0.1), steps=5), APGDAttack(Linf(0.1), steps=10)]
        >>> report = evaluate(model, loader, attacks, progress=False)
        >>> report.n, report.robust_accuracy.count <= report.clean_accuracy.count
        (24, True)
    """
    named = _named(attacks, seed)
    setting = f"attacks={list(named)}, early_exit={early_exit}, seed={seed}, masking={masking}"
    about = {"evaluation": setting, **{f"attack {name!r}": _described(attack) for name, attack in named.items()}}
    told: set[str] = set()

    def work(counted: Counted, batch: Batch) -> Record:
        return _verdicts(counted, batch, named, early_exit, seed, masking if batch.number == 0 else 0, told)

    records, about = work_through(
        model,
        loader,
        work,
        about=about,
        seed=seed,
        state=state,
        device=device,
        progress=progress,
        title="robust accuracy",
    )
    return _report(records, ["clean", *named], about, named)


def _verdicts(
    model: Counted,
    batch: Batch,
    attacks: Mapping[str, AttackLike],
    early_exit: bool,
    seed: int,
    masking: int,
    told: set[str],
) -> Record:
    """One batch: a verdict for every sample and attack, costs, and flags."""
    costs: dict[str, Cost] = {}
    flags: list[Flag] = []
    x, y = outside_inference_mode(batch.x), outside_inference_mode(batch.y)
    checks.finite_range(x)
    for attack in attacks.values():
        if isinstance(attack, Attack):
            check_batch(attack, x)
    with model.cost() as costs["clean"]:
        classes, clean = classified(model, x, y)
    found = {"clean": as_text(clean)}
    robust = clean.clone()
    for name, attack in attacks.items():
        rows = (robust if early_exit else clean).nonzero().squeeze(1)
        verdicts = [SPARED] * len(x)
        with model.cost() as costs[name], _collected(flags, name, told):
            if len(rows):
                x_adv = _attacked(attack, model, x[rows], y[rows], batch.index[rows.to(batch.index.device)])
                held = is_correct(model, x_adv, classes[rows])
                robust[rows[~held]] = False
                for row, verdict in zip(rows.tolist(), as_text(held), strict=True):
                    verdicts[row] = verdict
        found[name] = "".join(verdicts)
    if masking:
        first = next((attack for attack in attacks.values() if isinstance(attack, Attack)), None)
        if first is not None:
            some = slice(0, masking)
            with model.cost() as costs[MASKING]:
                flags += masking_checks(model, x[some], y[some], first.threat, bounds=first.bounds, seed=seed)
    return {
        "verdicts": found,
        "costs": costs,
        "flags": [vars(flag) for flag in flags],
        "summary": [int(robust.sum()), len(x)],
    }


def _attacked(attack: AttackLike, model: Counted, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The attack's result, checked: a verdict on anything outside of the threat model would be worth nothing."""
    if not isinstance(attack, Attack):
        with torch.inference_mode(False), torch.enable_grad():
            x_adv = attack(model, x, y)
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or not bool(x_adv.isfinite().all()):
            raise RuntimeError(f"The attack {attack!r} returned no finite tensor of the shape {tuple(x.shape)} of x.")
        return x_adv.detach()
    x_adv = attack(model, x, y, index=index)
    origin = x
    if attack.bounds is not None:
        low, high = (torch.as_tensor(side).to(x) for side in attack.bounds)
        origin = x.clamp(low, high)
        slack = 1e-6 * (high - low)  # as an input has it
        if bool(((x_adv < low - slack) | (x_adv > high + slack)).any()):
            raise RuntimeError(
                f"The attack {attack.name} left its bounds {attack.bounds}: it returned values from "
                f"{x_adv.min().item():.4g} to {x_adv.max().item():.4g}. Its verdicts would be worth nothing."
            )
    delta = x_adv - origin
    size = attack.threat.norm(delta)
    if not bool((size <= 1 + 1e-3).all()):
        excess = (delta - attack.threat.project(delta)).abs().max()
        if not bool(excess <= 4 * torch.finfo(x.dtype).eps * origin.abs().max()):  # more than the rounding of x + delta
            raise RuntimeError(
                f"The attack {attack.name} left its threat model: it moved a sample {size.max().item():.4g} times as "
                "far as allowed. Its verdicts would be worth nothing. (NFGSM does so on purpose, and is for training.)"
            )
    return x_adv


def _report(
    records: list[Record], names: list[str], about: dict[str, str], attacks: Mapping[str, AttackLike]
) -> RobustnessReport:
    verdicts = {name: "".join(record["verdicts"][name] for record in records) for name in names}
    costs: dict[str, Cost] = {}
    for record in records:
        for name, cost in record["costs"].items():
            total = costs.setdefault(name, dict.fromkeys(cost, 0))
            costs[name] = {key: total[key] + cost[key] for key in cost}
    flags = {(flag["name"], flag["evidence"]): Flag(**flag) for record in records for flag in record["flags"]}
    samples = [sample for record in records for sample in record["samples"]]
    report = RobustnessReport(samples, verdicts, costs, list(flags.values()), about)
    report.flags.extend(_order_flags(report, attacks))
    return report


def _order_flags(report: RobustnessReport, attacks: Mapping[str, AttackLike]) -> list[Flag]:
    """Signs of masking in the verdicts themselves: attacks that should be weaker and were not."""
    flags, results = [], report.attacks
    known = {name: attack for name, attack in attacks.items() if isinstance(attack, Attack)}
    for name, attack in known.items():
        rivals = [report.verdicts[n] for n, other in known.items() if other.uses_gradients and _alike(other, attack)]
        if rivals and not attack.uses_gradients:
            rows = zip(report.verdicts[name], *rivals, strict=True)
            broken = sum(mine == WRONG and RIGHT in theirs and WRONG not in theirs for mine, *theirs in rows)
            flags.append(
                Flag(
                    "black box beats white box",
                    broken > _BLACK_BOX_SLACK * report.n,
                    f"{name}, which uses no gradients, fooled {broken} of {report.n} samples that attacks with "
                    "gradients had not",
                )
            )
    for single in (name for name, attack in attacks.items() if isinstance(attack, FGSM)):
        for iterated in (name for name, attack in attacks.items() if isinstance(attack, IteratedAttack)):
            one, many = results[single].alone, results[iterated].alone
            if one is not None and many is not None and _alike(known[single], known[iterated]):
                flags.append(
                    Flag(
                        "one step beats iterative",
                        one.count < many.count,
                        f"accuracy {one} under {single}, {many} under {iterated}",
                    )
                )
    return flags


def _alike(one: Attack, other: Attack) -> bool:
    """Whether two attacks may do the same, so that they can be compared."""
    return describe((one.threat, one.bounds)) == describe((other.threat, other.bounds))


def _described(attack: AttackLike) -> str:
    """The attack's own name, which says whose and which version it is, and its settings."""
    return f"{attack.name}: {describe(attack)}" if isinstance(attack, Attack) else describe(attack)


def _named(attacks: AttackLike | Sequence[Attack] | Mapping[str, AttackLike], seed: int) -> dict[str, AttackLike]:
    """The attacks by name, as an evaluation runs them."""
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:
        several = list(attacks) if isinstance(attacks, Sequence) else [attacks]
        labels = [attack.name if isinstance(attack, Attack) else getattr(attack, "__name__", type(attack).__name__)
                  for attack in several]  # fmt: skip
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"Two attacks are called {label!r}. Give them names: {{'name': attack, ...}}.")
        named = dict(zip(labels, several, strict=True))
    for taken in ("clean", MASKING):
        if taken in named:
            raise ValueError(f"{taken!r} is a name of the report's own: give the attack another one.")
    for name, attack in named.items():
        if not callable(attack):
            fix = f" Give an attack of it: APGDAttack({attack!r})." if isinstance(attack, ThreatModel) else ""
            raise TypeError(f"The attack {name!r} is {attack!r}, which cannot be called as attack(model, x, y).{fix}")
        if getattr(attack, "targeted", False):
            raise ValueError(
                f"The attack {name!r} is targeted, and would move every sample towards its own label. Use "
                "TargetedAPGDAttack, which chooses its targets."
            )
    return {
        name: attack.for_evaluation(seed) if isinstance(attack, Attack) else attack for name, attack in named.items()
    }


@contextmanager
def _collected(flags: list[Flag], name: str, told: set[str]) -> Iterator[None]:
    """What the attack warns of becomes a flag, too; it is said once, not for every batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        message = str(warning.message)
        if issubclass(warning.category, checks.GradregWarning):
            flags.append(Flag(f"warning of {name}", True, message))
        if message not in told:
            told.add(message)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

"""Statistics over a data set: streamed, resumable, shared by several processes, grouped by an attack's success."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from gradreg import checks
from gradreg.attacks import Attack
from gradreg.criteria import cross_entropy
from gradreg.differentiation import InputOnly
from gradreg.gradients import outside_inference_mode
from gradreg.intervals import Proportion
from gradreg.penalties import Penalty
from gradreg.point import Point
from gradreg.state import read_state, write_atomically
from gradreg.statistics.summary import LogHistogram, Summary
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

KIND = "gradreg measurements"
VERSION = 1

Group = Literal["all", "robust", "fooled"]
Statistic = Callable[[Point], Tensor]  # a penalty, or any function of a point


@final
@dataclass(frozen=True)
class Measurements:
    """Values of statistics for every sample of a data set.

    Attributes:
        samples: What each sample is told by, in the order of the loader.
        values: For every statistic one value per sample; NaN where it is undefined.
        units: Of the statistics.
        floors: What is added to a value before its logarithm is taken.
        clean: For every sample ``1`` if the model gets it right, ``0`` if not.
        attacked: The same under the attack; empty without one.
        cost: Seconds, added over processes; forward and backward passes, one for each sample.
        about: Model, statistics and settings, as texts.
    """

    samples: list[str]
    values: dict[str, list[float]]
    units: dict[str, str]
    floors: dict[str, float]
    clean: str
    attacked: str = ""
    cost: Cost = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.samples)

    @property
    def accuracy(self) -> Proportion:
        """Without an attack."""
        return Proportion(self.clean.count(RIGHT), self.n)

    @property
    def robust_accuracy(self) -> Proportion:
        """Under the attack.

        Raises:
            ValueError: If there was none.
        """
        self._check_group("robust")
        return Proportion(self.attacked.count(RIGHT), self.n)

    def summary(self, name: str, group: Group = "all") -> Summary:
        """A statistic over all samples, or over those that are robust to the attack, or are not.

        Args:
            name: Of the statistic.
            group: ``"fooled"`` are the samples that the model gets wrong under the attack, which include those that it
                gets wrong without.

        Raises:
            KeyError: If there is no such statistic.
            ValueError: If there was no attack to group by.
        """
        self._check_group(group)
        kept = {"robust": RIGHT, "fooled": WRONG}.get(group)
        found = self.values[name]
        if kept is not None:
            found = [value for value, verdict in zip(found, self.attacked, strict=True) if verdict == kept]
        summary = Summary(floor=self.floors[name])
        summary.add(found)
        return summary

    def __str__(self) -> str:
        """A Markdown table."""
        lines = [
            f"| n = {self.n} | mean | 95 % interval | std | median | log10: mean, std | undefined |",
            "|---|--:|:-:|--:|--:|:-:|--:|",
        ]
        for name in self.values:
            s = self.summary(name)
            low, high = s.interval
            lines.append(
                f"| {name} | {s.mean:.4g} | {low:.4g} to {high:.4g} | {s.std:.4g} | {s.quantile(0.5):.4g} "
                f"| {s.log10.mean:.3f}, {s.log10.std:.3f} | {s.undefined} |"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the summaries, as JSON holds it; what is undefined is null."""
        groups: list[Group] = ["all", "robust", "fooled"] if self.attacked else ["all"]
        return {
            "kind": KIND,
            "version": VERSION,
            "n": self.n,
            "summaries": {
                name: {group: _numbers(self.summary(name, group)) for group in groups} for name in self.values
            },
            "units": self.units,
            "floors": self.floors,
            "clean": self.clean,
            "attacked": self.attacked,
            "cost": self.cost,
            "about": self.about,
            "values": {name: [_or_none(value) for value in found] for name, found in self.values.items()},
            "samples": self.samples,
        }

    def save(self, path: str | Path) -> None:
        """Write the measurements as JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Measurements":
        """Read measurements that were saved.

        Raises:
            StateError: If the file is damaged or holds none.
        """
        fields = ("samples", "values", "units", "floors", "clean", "attacked", "cost", "about")
        content = read_state(Path(path), KIND, VERSION, fields)
        return cls(**{name: content[name] for name in fields} | {"values": _restored(content["values"])})

    def _check_group(self, group: Group) -> None:
        if group not in ("all", "robust", "fooled"):
            raise ValueError(f'group is "all", "robust" or "fooled", got {group!r}.')
        if group != "all" and not self.attacked:
            raise ValueError("There was no attack to group the samples by: measure(..., attack=PGDAttack(...)).")


def measure(
    model: Model,
    loader: Iterable[Any],
    penalties: Sequence[Statistic] | Mapping[str, Statistic],
    *,
    attack: Attack | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Measurements:
    """Values of penalties for every sample of a data set.

    One forward pass, one gradient and one power iteration serve all penalties that ask for them; a Hessian takes a
    forward pass of its own. Data are read one batch at a time. Noise is drawn from a seed and the sample's own values,
    the same for every model and in batches of any size and order; classes that are drawn, as in
    :class:`gradreg.sampled_class`, are drawn by batch. Interrupted, resumed and shared by the ranks of ``torchrun`` as
    :func:`gradreg.evaluate` is.

    A value is NaN, and counted as undefined, where a penalty means nothing (:meth:`gradreg.Penalty.undefined`).

    Args:
        model: An ``nn.Module`` from inputs to logits, which is looked at in evaluation mode; or a function.
        loader: Batches ``(x, y)``, in the units in which gradients are to be taken: pixels in [0, 1].
        penalties: What to measure: penalties, or functions of a :class:`gradreg.Point` to one number per sample. A
            mapping gives them other names than their own.
        attack: Groups the samples by whether they are robust to it (Table 4.1 of the thesis).
        seed: Of all noise that has no seed of its own: of the attack and of the penalties.
        state: File to which every finished batch is written, and from which an interrupted run goes on.
        device: Where batches are moved. Default: where the model's first parameter is.
        progress: Whether to show a bar.

    Raises:
        ValueError: If two penalties have one name, the loader is empty, or x is not what a penalty is defined for.
        StateError: If the state file is damaged or belongs to something else; it is left as it is.

    Example:
        >>> from gradreg import GradNormPenalty, Linf, PGDAttack
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> loader = [(torch.rand(8, 1, 2, 2), torch.randint(0, 3, (8,))) for _ in range(3)]
        >>> l1_norm = GradNormPenalty(Linf(1.0))
        >>> found = measure(model, loader, [l1_norm], attack=PGDAttack(Linf(0.1)), progress=False)
        >>> found.summary("gradient L1 norm").n
        24
    """
    named = _named(penalties, seed)
    attack = None if attack is None else attack.for_evaluation(seed)

    def work(counted: Counted, batch: Batch) -> Record:
        with counted.cost() as cost:
            x, y, classes, right = _read(counted, batch, attack)
            record = {"clean": as_text(right), "values": _measured(counted, x, y, batch.index, named)}
            if attack is not None:
                record["attacked"] = as_text(_robust(counted, x, y, classes, right, batch.index, attack))
        return {**record, "cost": cost}

    records, about = work_through(
        model, loader, work, about=_about(named, attack), seed=seed, state=state, device=device, progress=progress,
        title="statistics",
    )  # fmt: skip
    return _gathered(records, [record["values"] for record in records], named, about)


def measure_along(
    model: Model,
    loader: Iterable[Any],
    attack: Attack,
    scales: Sequence[float],
    penalties: Sequence[Statistic] | Mapping[str, Statistic],
    *,
    seed: int = 0,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[float, Measurements]:
    r"""Values of penalties along the way from every sample to its attacked one and beyond, :math:`x + s\,(x' - x)`.

    Fig. A.3 of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024): loss, gradient norm and
    curvature at 16 scales from 0 to 2 of PGD-5. Points are not clamped, so that beyond s = 1 they may be no images.

    Args:
        model: As for :func:`measure`.
        loader: As for :func:`measure`.
        attack: Finds x'. Give it ``early_stop=False``, its default, so that every sample moves as far as it can.
        scales: Where to look, in units of the perturbation.
        penalties: What to measure there.
        seed: Of all noise that has no seed of its own: of the attack and of the penalties.
        state: File to which every finished batch is written, and from which an interrupted run goes on.
        device: Where batches are moved.
        progress: Whether to show a bar.

    Returns:
        Measurements at every scale. Their ``clean`` is the model at scale 0, ``attacked`` at scale 1.

    Example:
        >>> from gradreg import FGSM, Linf
        >>> from gradreg.statistics import Loss
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> loader = [(torch.rand(8, 1, 2, 2), torch.randint(0, 3, (8,)))]
        >>> along = measure_along(model, loader, FGSM(Linf(0.1)), [0.0, 1.0, 2.0], [Loss()], progress=False)
        >>> bool(along[0.0].summary("loss").mean <= along[1.0].summary("loss").mean)
        True
    """
    named = _named(penalties, seed)
    places = [float(scale) for scale in scales]
    if not places or len(set(places)) < len(places) or not all(map(math.isfinite, places)):
        raise ValueError(f"measure_along: scales are some different numbers, got {scales}.")
    attack = attack.for_evaluation(seed)
    about = {**_about(named, attack), "scales": str(places)}

    def work(counted: Counted, batch: Batch) -> Record:
        with counted.cost() as cost:
            x, y, classes, right = _read(counted, batch, attack)
            x_adv = attack(counted, x, y, index=batch.index)
            attacked = is_correct(counted, x_adv, classes)
            values = [_measured(counted, x + scale * (x_adv - x), y, batch.index, named) for scale in places]
        return {"clean": as_text(right), "attacked": as_text(attacked), "along": values, "cost": cost}

    records, about = work_through(
        model, loader, work, about=about, seed=seed, state=state, device=device, progress=progress,
        title="statistics along an attack",
    )  # fmt: skip
    return {
        scale: _gathered(records, [record["along"][place] for record in records], named, about)
        for place, scale in enumerate(places)
    }


def gradient_histograms(
    model: Model,
    loader: Iterable[Any],
    *,
    bins_per_decade: int = 20,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, LogHistogram]:
    """How large the entries of the loss's input gradients are, over all samples and pixels.

    Fig. 4.4 of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024).

    Args:
        model: As for :func:`measure`.
        loader: As for :func:`measure`.
        bins_per_decade: How many bins a factor of 10 has.
        state: File to which every finished batch is written, and from which an interrupted run goes on.
        device: Where batches are moved.
        progress: Whether to show a bar.

    Returns:
        A histogram for ``"all"`` entries, and for images one for each channel, ``"channel 0"`` and on.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> loader = [(torch.rand(8, 3, 2, 2), torch.randint(0, 3, (8,)))]
        >>> found = gradient_histograms(model, loader, progress=False)
        >>> list(found), found["all"].n
        (['all', 'channel 0', 'channel 1', 'channel 2'], 96)
    """
    if bins_per_decade < 1:
        raise ValueError(f"gradient_histograms: bins_per_decade is at least 1, got {bins_per_decade}.")

    def work(counted: Counted, batch: Batch) -> Record:
        x, y, *_ = _read(counted, batch, None)
        with torch.inference_mode(False), torch.enable_grad():
            grad = _point(counted, x, y).gradient()
        parts = {"all": grad}
        if grad.ndim == 4:
            parts |= {f"channel {channel}": part for channel, part in enumerate(grad.unbind(1))}
        histograms = {name: LogHistogram(bins_per_decade) for name in parts}
        for name, part in parts.items():
            histograms[name].add(part)
        return {"histograms": {name: [h.counts, h.zeros] for name, h in histograms.items()}}

    records, _ = work_through(
        model, loader, work, about={"gradients": f"bins_per_decade={bins_per_decade}"}, seed=0, state=state,
        device=device, progress=progress, title="gradients",
    )  # fmt: skip
    found: dict[str, LogHistogram] = {}
    for record in records:
        for name, (counts, zeros) in record["histograms"].items():
            of_batch = Counter({int(number): count for number, count in counts.items()})
            found.setdefault(name, LogHistogram(bins_per_decade)).merge(LogHistogram(bins_per_decade, of_batch, zeros))
    return found


def _about(named: Mapping[str, Penalty], attack: Attack | None) -> dict[str, str]:
    """What the values depend on besides model and data, as texts."""
    about = {f"statistic {name!r}": describe(penalty) for name, penalty in named.items()}
    return about if attack is None else {**about, "attack": f"{attack.name}: {describe(attack)}"}


def _read(counted: Counted, batch: Batch, attack: Attack | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, their classes, and which of them the model gets right."""
    x, y = outside_inference_mode(batch.x), outside_inference_mode(batch.y)
    checks.finite_range(x)
    if attack is not None:
        check_batch(attack, x)
    return x, y, *classified(counted, x, y)


def _point(counted: Counted, x: Tensor, y: Tensor, index: Tensor | None = None) -> Point:
    """A batch to measure, in which a gradient of 0 is a finding and nothing to warn of."""
    return Point(counted, cross_entropy, x, y, differentiation=InputOnly(), index=index, look=False)


def _measured(
    counted: Counted, x: Tensor, y: Tensor, index: Tensor, named: Mapping[str, Penalty]
) -> dict[str, list[float | None]]:
    with torch.inference_mode(False), torch.enable_grad():
        point = _point(counted, x, y, index)
        return {name: _values(name, penalty, point) for name, penalty in named.items()}


def _values(name: str, penalty: Penalty, point: Point) -> list[float | None]:
    """The values of a batch as JSON holds them; says which are undefined."""
    values = penalty(point).detach().double()
    if values.shape != point.x.shape[:1]:
        raise ValueError(
            f"The penalty {name!r} returned shape {tuple(values.shape)}; expected one number per sample, "
            f"({len(point.x)},)."
        )
    undefined = penalty.undefined(point)
    if undefined is not None and bool(undefined.any()):
        why = f": {penalty.why_undefined}" if penalty.why_undefined else ""
        checks.warn(f"{name} is undefined (NaN) for {int(undefined.sum())} of {len(values)} samples{why}.")
        values = values.masked_fill(undefined, torch.nan)
    return [_or_none(value) for value in values.tolist()]


def _robust(
    counted: Counted, x: Tensor, y: Tensor, classes: Tensor, right: Tensor, index: Tensor, attack: Attack
) -> Tensor:
    """Which samples the model gets right under the attack; those that it gets wrong without one it does not."""
    robust = right.clone()
    if bool(right.any()):
        rows = right.nonzero().squeeze(1)
        x_adv = attack(counted, x[rows], y[rows], index=index[rows.to(index.device)])
        robust[rows] = is_correct(counted, x_adv, classes[rows])
    return robust


def _gathered(
    records: list[Record],
    of_batches: list[dict[str, list[float | None]]],
    named: Mapping[str, Penalty],
    about: dict[str, str],
) -> Measurements:
    values = {name: [value for of_batch in of_batches for value in of_batch[name]] for name in named}
    return Measurements(
        samples=[sample for record in records for sample in record["samples"]],
        values=_restored(values),
        units={name: penalty.unit for name, penalty in named.items()},
        floors={name: penalty.floor for name, penalty in named.items()},
        clean="".join(record["clean"] for record in records),
        attacked="".join(record.get("attacked", "") for record in records),
        cost={key: sum(record["cost"][key] for record in records) for key in ("seconds", "forward", "backward")},
        about=about,
    )


@final
@dataclass(frozen=True)
class _Function(Penalty):
    """A plain function of a point."""

    function: Statistic

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, point: Point) -> Tensor:
        return self.function(point)


def _named(given: Sequence[Statistic] | Mapping[str, Statistic], seed: int) -> dict[str, Penalty]:
    """Penalties by name, those that draw random numbers with a seed."""
    entries = list(given.items()) if isinstance(given, Mapping) else [(None, penalty) for penalty in given]
    named: dict[str, Penalty] = {}
    for key, penalty in entries:
        if not callable(penalty) or isinstance(penalty, type):
            raise TypeError(
                f"Expected penalties, such as GradNormPenalty(Linf(1.0)), or functions of a point; got {penalty!r}."
            )
        found = penalty if isinstance(penalty, Penalty) else _Function(penalty)
        if found.of_batch:
            raise ValueError(
                f"{found.name} is of a whole batch, and a sample has no value of its own: it cannot be measured over a "
                "data set. Take a penalty of each sample."
            )
        name = found.name if key is None else key
        if name in named:
            raise ValueError(f"Two penalties are called {name!r}. Give them names: {{'name': penalty, ...}}.")
        named[name] = found.seeded(seed)
    if not named:
        raise ValueError("There is no penalty to measure.")
    return named


def _numbers(summary: Summary) -> dict[str, Any]:
    """A summary as JSON holds it."""
    log10_mean = summary.log10.mean if summary.log10.n else math.nan
    return {
        "n": summary.n,
        "undefined": summary.undefined,
        "mean": _or_none(summary.mean),
        "interval": [_or_none(side) for side in summary.interval],
        "std": _or_none(summary.std),
        "log10_mean": _or_none(log10_mean),
        "log10_std": _or_none(summary.log10.std),
        "quantiles": {str(q): _or_none(summary.quantile(q)) for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
    }


def _or_none(value: float) -> float | None:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else None


def _restored(values: Mapping[str, list[float | None]]) -> dict[str, list[float]]:
    return {name: [math.nan if value is None else value for value in found] for name, found in values.items()}

"""Accuracy as a function of eps: for every sample, the smallest radius at which an attack is known to fool it."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from gradreg.attacks import IteratedAttack
from gradreg.gradients import outside_inference_mode
from gradreg.intervals import Proportion
from gradreg.state import read_state, write_atomically
from gradreg.streaming import (
    Batch,
    Cost,
    Counted,
    Model,
    Record,
    check_batch,
    classified,
    describe,
    is_correct,
    work_through,
)
from gradreg.threat_models import Linf

KIND = "gradreg robustness curve"
VERSION = 1


@final
@dataclass(frozen=True)
class RobustnessCurve:
    """For every sample, the smallest radius at which it was fooled.

    Attributes:
        samples: What each sample is told by, in the order of the loader.
        distances: The radius of every sample, in the units of the attack's eps: 0 if it is misclassified without an
            attack, infinite if no attack that was tried fooled it.
        eps: The radii asked for, in ascending order. Between them, and beyond the largest, accuracy is an upper bound.
        cost: Seconds, added over processes; forward and backward passes, one for each sample of each batch.
        about: Model, attack and settings, as texts.
    """

    samples: list[str]
    distances: list[float]
    eps: list[float]
    cost: Cost = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.samples)

    def accuracy(self, eps: float) -> Proportion:
        """How many samples stay correct under every perturbation tried up to a radius; at 0, the clean accuracy."""
        return Proportion(sum(distance > eps for distance in self.distances), self.n)

    def __str__(self) -> str:
        """A Markdown table."""
        lines = [f"| eps | accuracy %, n = {self.n} | 95 % interval |", "|--:|--:|:-:|"]
        for eps in [0.0, *self.eps]:
            low, high = (accuracy := self.accuracy(eps)).interval
            lines.append(f"| {eps:.5g} | {100 * accuracy.value:.1f} | {100 * low:.1f}-{100 * high:.1f} |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the accuracies drawn from it, as JSON holds it; an infinite distance is null."""
        return {
            "kind": KIND,
            "version": VERSION,
            "n": self.n,
            "eps": self.eps,
            "accuracy": {str(eps): self.accuracy(eps).value for eps in [0.0, *self.eps]},
            "cost": self.cost,
            "about": self.about,
            "distances": [None if math.isinf(distance) else distance for distance in self.distances],
            "samples": self.samples,
        }

    def save(self, path: str | Path) -> None:
        """Write the curve as JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessCurve":
        """Read a curve that was saved.

        Raises:
            StateError: If the file is damaged or no curve.
        """
        content = read_state(Path(path), KIND, VERSION, ("samples", "distances", "eps", "cost", "about"))
        distances = [math.inf if distance is None else distance for distance in content["distances"]]
        return cls(content["samples"], distances, content["eps"], content["cost"], content["about"])


def accuracy_curve(
    model: Model,
    loader: Iterable[Any],
    attack: IteratedAttack,
    eps: Sequence[float],
    *,
    seed: int = 0,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> RobustnessCurve:
    r"""Accuracy at a list of radii, for far less than an attack at each.

    A sample that is fooled in a ball is fooled in every larger one, so its verdicts along the list are settled by
    bisection: :math:`\lceil\log_2(m + 1)\rceil` attacks for m radii at most, fewer where an attack ends well inside of
    its ball. Each attack starts from the perturbation of the one before, brought into its own ball. Steps grow with the
    radius.

    Args:
        model: The model, as for :func:`evaluate`.
        loader: Batches ``(x, y)``, as for :func:`evaluate`.
        attack: :class:`~gradreg.PGDAttack` or :class:`~gradreg.APGDAttack`. The list is in the units of its eps; if
            that is a tensor (a radius per channel, say), the list multiplies it.
        eps: Radii, positive, in ascending order.
        seed: Of the attack's noise, if it has no seed of its own.
        state: File to which every finished batch is written, and from which an interrupted search goes on.
        device: Where batches are moved. Default: where the model's first parameter is.
        progress: Whether to show a bar.

    Example:
        >>> from gradreg import Linf, PGDAttack
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> loader = [(torch.rand(8, 1, 2, 2), torch.randint(0, 3, (8,)))]
        >>> curve = accuracy_curve(model, loader, PGDAttack(Linf(0.1)), [0.05, 0.1, 0.2], progress=False)
        >>> curve.accuracy(0.2).count <= curve.accuracy(0.05).count <= curve.accuracy(0.0).count
        True
    """
    radii = [float(radius) for radius in eps]
    if not radii or radii[0] <= 0 or sorted(set(radii)) != radii:
        raise ValueError(f"accuracy_curve: eps is a list of positive radii in ascending order, got {eps}.")

    def search(hunt: "_Hunt") -> Tensor:
        grid = torch.tensor(radii, dtype=torch.float64, device=hunt.x.device)
        low = torch.zeros(len(hunt.x), dtype=torch.long, device=grid.device)  # the sample is robust at so many radii
        high = torch.full_like(low, len(grid))  # the sample is fooled at the radius of this number
        distances = torch.full_like(low, torch.inf, dtype=torch.float64)
        while bool((low < high).any()):
            rows = (low < high).nonzero().squeeze(1)
            middle = (low[rows] + high[rows]) // 2
            fooled, size = hunt.attack(rows, grid[middle])
            size = torch.minimum(size, grid[middle])
            high[rows] = torch.where(fooled, torch.searchsorted(grid, size), high[rows])
            low[rows] = torch.where(fooled, low[rows], middle + 1)
            distances[rows] = torch.where(fooled, size, distances[rows])
        return distances

    title = f"accuracy at {len(radii)} radii"
    return _curve(model, loader, attack, radii, search, f"eps={radii}", seed, state, device, progress, title)


def minimal_distortion(
    model: Model,
    loader: Iterable[Any],
    attack: IteratedAttack,
    *,
    doublings: int = 5,
    bisections: int = 10,
    seed: int = 0,
    state: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> RobustnessCurve:
    """For every sample, the size of the smallest perturbation that an attack finds, by doubling and bisection.

    The radius begins at the attack's own eps and is doubled until the sample is fooled; then the interval between the
    largest radius at which the attack failed and the smallest perturbation that fools is halved. What is returned is
    the size of that perturbation, not the radius it was searched in. This is how Fig. 4.1 of Rodríguez Muñoz,
    "Adversarial robustness without perturbations" (MIT 2024), was drawn, with ``PGDAttack(Linf(2 / 255), steps=100,
    step_size=0.5 / 255)``.

    Args:
        model: The model, as for :func:`evaluate`.
        loader: Batches ``(x, y)``, as for :func:`evaluate`.
        attack: The attack, at the radius to begin with.
        doublings: How often the radius is doubled at most; a sample not fooled then has an infinite distance.
        bisections: How often the interval is halved.
        seed: Of the attack's noise, if it has no seed of its own.
        state: File to which every finished batch is written, and from which an interrupted search goes on.
        device: Where batches are moved. Default: where the model's first parameter is.
        progress: Whether to show a bar.

    Example:
        A linear classifier of two classes is fooled at its margin over the dual norm of its weights:

        >>> from gradreg import Linf, PGDAttack
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> curve = minimal_distortion(model, [(x, y)], PGDAttack(Linf(0.02)), progress=False)
        >>> round(curve.distances[0], 3)
        0.1
    """
    if doublings < 0 or bisections < 0:
        raise ValueError(
            f"minimal_distortion: doublings and bisections are at least 0, got {doublings} and {bisections}."
        )

    def search(hunt: "_Hunt") -> Tensor:
        low = torch.zeros(len(hunt.x), dtype=torch.float64, device=hunt.x.device)  # robust so far
        high = torch.full_like(low, torch.inf)  # fooled
        for doubling in range(doublings + 1):
            if doubling and unit_of(attack) * 2 ** (doubling - 1) >= hunt.reach:
                break  # that was everything
            rows = high.isinf().nonzero().squeeze(1)
            radius = torch.full_like(low[rows], min(unit_of(attack) * 2**doubling, hunt.reach))
            _narrow(hunt, low, high, rows, radius)
        for _ in range(bisections):
            rows = (~high.isinf()).nonzero().squeeze(1)
            _narrow(hunt, low, high, rows, (low[rows] + high[rows]) / 2)
        return high

    setting = f"doublings={doublings}, bisections={bisections}"
    return _curve(model, loader, attack, [], search, setting, seed, state, device, progress, "minimal distortion")


def _narrow(hunt: "_Hunt", low: Tensor, high: Tensor, rows: Tensor, radius: Tensor) -> None:
    if len(rows):
        fooled, size = hunt.attack(rows, radius)
        high[rows] = torch.where(fooled, torch.minimum(torch.minimum(size, radius), high[rows]), high[rows])
        low[rows] = torch.where(fooled, low[rows], radius)


def unit_of(attack: IteratedAttack) -> float:
    """What a distance of one ball is called: the attack's eps, or 1 if that is a tensor."""
    return 1.0 if isinstance(attack.threat.eps, Tensor) else float(attack.threat.eps)


class _Hunt:
    """Attacks on samples of one batch, each in a ball of its own, each from the perturbation of the one before.

    Attributes:
        x: The samples.
        reach: The largest radius of any use, from the lowest to the highest value of an input.
    """

    def __init__(self, model: Counted, x: Tensor, y: Tensor, index: Tensor, attack: IteratedAttack) -> None:
        self.x = x
        self._model, self._y, self._index, self._attack = model, y, index, attack
        self._unit = unit_of(attack)
        self._delta: Tensor | None = None
        self.reach = math.inf
        if isinstance(attack.threat, Linf) and attack.bounds is not None:  # nothing moves further than from end to end
            low, high = (torch.as_tensor(side).to(x) for side in attack.bounds)
            eps = torch.as_tensor(attack.threat.eps).to(x)
            self.reach = ((high - low) / eps).min().item() * self._unit

    def attack(self, rows: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these samples are fooled within their radii, and how far they were moved."""
        x, y = self.x[rows], self._y[rows]
        factor = (radius / self._unit).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        attack = self._attack.scaled(factor)
        start = None if self._delta is None else self._delta[rows]
        x_adv = attack(self._model, x, y, index=self._index[rows.to(self._index.device)], start=start)
        fooled = ~is_correct(self._model, x_adv, y if y.ndim == 1 else y.argmax(1))
        if self._delta is None:
            self._delta = torch.zeros_like(self.x)
        self._delta[rows] = x_adv - x
        return fooled, self._attack.threat.norm(x_adv - x).double() * self._unit


def _curve(
    model: Model,
    loader: Iterable[Any],
    attack: IteratedAttack,
    radii: list[float],
    search: Callable[[_Hunt], Tensor],
    setting: str,
    seed: int,
    state: str | Path | None,
    device: torch.device | str | None,
    progress: bool,
    title: str,
) -> RobustnessCurve:
    if not isinstance(attack, IteratedAttack) or attack.targeted:
        raise TypeError(f"Expected an untargeted PGDAttack or APGDAttack, whose radius can be chosen, got {attack!r}.")
    if unit_of(attack) == 0:
        raise ValueError("The attack's own eps is 0, which is no unit to measure distances in.")
    attack = attack.for_evaluation(seed)
    about = {"curve": f"{setting}, seed={seed}", "attack": describe(attack)}

    def work(counted: Counted, batch: Batch) -> Record:
        x, y = outside_inference_mode(batch.x), outside_inference_mode(batch.y)
        check_batch(attack, x)
        distances = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with counted.cost() as cost:
            _, right = classified(counted, x, y)
            if bool(right.any()):
                index = batch.index[right.to(batch.index.device)]
                distances[right] = search(_Hunt(counted, x[right], y[right], index, attack))
        return {"distances": [None if math.isinf(found) else found for found in distances.tolist()], "cost": cost}

    records, about = work_through(
        model, loader, work, about=about, seed=seed, state=state, device=device, progress=progress, title=title
    )
    found = [distance for record in records for distance in record["distances"]]
    return RobustnessCurve(
        samples=[sample for record in records for sample in record["samples"]],
        distances=[math.inf if distance is None else distance for distance in found],
        eps=radii,
        cost={key: sum(record["cost"][key] for record in records) for key in ("seconds", "forward", "backward")},
        about=about,
    )

"""Attacks that use no gradient of the model they fool: checks of those that do."""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.attacks.attack import Attack
from gradreg.attacks.search import Search, check_attackable, check_index
from gradreg.criteria import margin
from gradreg.noise import generator_of
from gradreg.point import Point
from gradreg.threat_models import ThreatModel


@final
@dataclass(frozen=True, eq=False)
class RandomSearch(Attack):
    """Random windows, each pushed to the boundary of the ball by one random sign per channel, kept if the margin rises.

    In the manner of the Square Attack (Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial
    attack via random search", ECCV 2020), but simpler and weaker: where it fools samples that a gradient attack did
    not, the gradients are masked. For a strong attack of this kind take ``AutoAttack(threat, attacks=("square",))``.
    Samples that are fooled leave. y are classes.

    Attributes:
        queries: Forward passes for each sample.
        window: Share of the image that the first windows cover; it is halved three times on the way.
        seed: Makes the search reproducible, sample by sample, see :func:`pgd`.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> x_adv = RandomSearch(Linf(8 / 255), queries=20, seed=0)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    queries: int = field(default=100, kw_only=True)
    window: float = field(default=0.5, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1 or not 0 < self.window <= 1:
            raise ValueError(
                f"RandomSearch: queries is at least 1 and window in (0, 1], got {self.queries} and {self.window}."
            )

    @property
    def name(self) -> str:
        return f"random search ({self.queries})"

    @property
    def uses_gradients(self) -> bool:
        return False

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        x, y = point.x, point.batch.y
        check_index("RandomSearch", x, self.seed, index)
        look = point.batch.look
        check_attackable(x, self.threat, self.bounds, self.out_of_bounds, look)

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = point.logits_at(z, rows), y[rows]
            checks.check_logits(logits)
            checks.check_labels(logits, labels, look=look)
            losses = margin(logits, labels)
            return losses, losses > 0

        search = Search(losses_at, x, self.threat, self.bounds, best=True, look=False)
        draws = self._draws(search.x, index)
        with torch.no_grad():
            search.finish(search.enter(torch.zeros_like(search.x)))
            for query in range(self.queries):
                if not search.active.numel():
                    break
                kept = search.delta[search.active]
                search.finish(search.project(self._candidate(kept, draws[search.active, query], query, search)))
        return search.result()

    def _draws(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Uniform numbers for every sample and query: the corner of the window, and a sign for every channel."""
        positions = torch.arange(len(x)) if index is None else index
        needed = 2 + (x.shape[1] if x.ndim == 4 else 1)
        drawn = [
            torch.rand(self.queries, needed, generator=generator_of(self.seed, position, 0))
            for position in positions.tolist()
        ]
        return torch.stack(drawn).to(x)

    def _candidate(self, delta: Tensor, draws: Tensor, query: int, search: Search) -> Tensor:
        """The perturbations with one window of each pushed to the boundary."""
        images = delta if delta.ndim == 4 else delta.flatten(1)[:, None, None]
        height, width = images.shape[-2:]
        share = self.window * 0.5 ** (4 * query // self.queries)
        side = share**0.5 if height > 1 else share
        tall, wide = max(1, round(side * height)), max(1, round(side * width))
        top = (draws[:, 0, None] * (height - tall + 1)).floor()
        left = (draws[:, 1, None] * (width - wide + 1)).floor()
        rows = torch.arange(height, device=delta.device)
        columns = torch.arange(width, device=delta.device)
        inside = ((rows >= top) & (rows < top + tall))[:, None, :, None]
        inside = inside & ((columns >= left) & (columns < left + wide))[:, None, None, :]
        signs = (draws[:, 2:] - 0.5).sign()[:, :, None, None].expand_as(images)
        pushed = search.ball.maximizer(signs.reshape_as(delta) * inside.expand_as(images).reshape_as(delta))
        return torch.where(inside.expand_as(images).reshape_as(delta), pushed, delta)


@final
@dataclass(frozen=True, eq=False)
class TransferAttack(Attack):
    """An attack on another model, whose result is tried on this one.

    Where it fools samples that the attack on the model itself did not, the model masks its gradients (Athalye, Carlini
    & Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018).

    Attributes:
        attack: The attack; its threat model and bounds are those of the transfer.
        surrogate: The model to attack, in evaluation mode.

    Example:
        >>> from gradreg import Linf, PGDAttack
        >>> model, surrogate = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> attack = TransferAttack(PGDAttack(Linf(0.1)), surrogate.eval())
        >>> attack(model, torch.full((1, 2), 0.5), torch.tensor([0])).shape
        torch.Size([1, 2])
    """

    threat: ThreatModel = field(init=False)
    attack: Attack
    surrogate: nn.Module

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack) or not isinstance(self.surrogate, nn.Module):
            raise TypeError(
                "TransferAttack: expected an attack and the module that it attacks, got "
                f"{type(self.attack).__name__} and {type(self.surrogate).__name__}."
            )
        for name in ("threat", "bounds", "out_of_bounds"):
            object.__setattr__(self, name, getattr(self.attack, name))
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"{self.attack.name}, transferred"

    @property
    def uses_gradients(self) -> bool:
        return False

    def for_evaluation(self, seed: int) -> "Attack":
        # A sample that fools the surrogate does not leave: further on it may fool the model too.
        return TransferAttack(self.attack.seeded(seed), self.surrogate)

    def scaled(self, factor: float | Tensor) -> "Attack":
        return TransferAttack(self.attack.scaled(factor), self.surrogate)

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        seeded = getattr(self.attack, "seed", None) is not None
        return self.attack(self.surrogate, point.x, point.batch.y, index=index if seeded else None)

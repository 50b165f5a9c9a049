"""What an evaluation found: one verdict per sample and attack, counted."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from gradreg.intervals import PairedComparison, Proportion
from gradreg.state import read_state, write_atomically
from gradreg.streaming import RIGHT, WRONG, Cost

KIND = "gradreg robustness report"
VERSION = 1
MASKING = "masking checks"  # what their cost is called
SPARED = "-"  # written for a sample that was not attacked


@final
@dataclass(frozen=True)
class Flag:
    """One sign that an attack's failure need not mean robustness.

    Attributes:
        name: Which sign.
        raised: Whether it was seen.
        evidence: What was seen, in numbers.
    """

    name: str
    raised: bool
    evidence: str

    def __str__(self) -> str:
        return f"{'RAISED' if self.raised else 'ok'}: {self.name}: {self.evidence}"


@final
@dataclass(frozen=True)
class AttackResult:
    """What one attack did.

    Attributes:
        attacked: How many samples it was run on.
        broken: How many of them it fooled.
        after: Accuracy under this attack and all before it.
        alone: Accuracy under this attack alone; None if samples that an earlier attack had fooled were spared.
        seconds: Time it took, added over processes.
        forward: Forward passes, one for each sample of each batch.
        backward: Backward passes, likewise.
    """

    attacked: int
    broken: int
    after: Proportion
    alone: Proportion | None
    seconds: float
    forward: int
    backward: int


@final
@dataclass(frozen=True)
class RobustnessReport:
    """Verdicts of every sample under every attack, what they cost, and signs that they may be wrong.

    Attributes:
        samples: What each sample is told by, in the order of the loader.
        verdicts: For ``"clean"`` and every attack, a text with a character for each sample: ``1`` if it was classified
            right, ``0`` if not, ``-`` if it was not attacked.
        costs: For ``"clean"``, every attack and the masking checks: seconds, forward and backward passes.
        flags: Signs of gradient masking that were looked for, and warnings of attacks.
        about: Model, attacks and settings, as texts.
    """

    samples: list[str]
    verdicts: dict[str, str]
    costs: dict[str, Cost]
    flags: list[Flag] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.samples)

    @property
    def clean_accuracy(self) -> Proportion:
        """Accuracy without an attack."""
        return Proportion(self.verdicts["clean"].count(RIGHT), self.n)

    @property
    def robust(self) -> list[bool]:
        """Of every sample, whether it was classified right and no attack fooled it."""
        return self._robust_after(len(self.verdicts))

    @property
    def robust_accuracy(self) -> Proportion:
        """Accuracy if each sample meets the attack that is worst for it: an upper bound of the true robust accuracy."""
        return Proportion(sum(self.robust), self.n)

    @property
    def attacks(self) -> dict[str, AttackResult]:
        """What every attack did, in the order they were run."""
        found = {}
        for position, (name, verdicts) in enumerate(self.verdicts.items()):
            if name == "clean":
                continue
            complete = verdicts.count(SPARED) == self.verdicts["clean"].count(WRONG)
            cost = self.costs[name]
            found[name] = AttackResult(
                attacked=self.n - verdicts.count(SPARED),
                broken=verdicts.count(WRONG),
                after=Proportion(sum(self._robust_after(position + 1)), self.n),
                alone=Proportion(verdicts.count(RIGHT), self.n) if complete else None,
                seconds=cost["seconds"],
                forward=int(cost["forward"]),
                backward=int(cost["backward"]),
            )
        return found

    @property
    def seconds(self) -> float:
        """Time of all of it, added over processes and sessions."""
        return sum(cost["seconds"] for cost in self.costs.values())

    @property
    def raised(self) -> list[Flag]:
        """The flags that were raised."""
        return [flag for flag in self.flags if flag.raised]

    def compare(self, other: "RobustnessReport") -> PairedComparison:
        """This model and another on the same samples, by robust accuracy.

        Raises:
            ValueError: If the reports are not about the same samples.
        """
        robust = dict(zip(self.samples, self.robust, strict=True))
        robust_other = dict(zip(other.samples, other.robust, strict=True))
        if sorted(self.samples) != sorted(other.samples):
            common = len(robust.keys() & robust_other.keys())
            raise ValueError(
                f"The reports are about different samples: {self.n} and {other.n}, of which {common} are common. A "
                "paired comparison needs both models evaluated on the same data."
            )
        pairs = [(robust[sample], robust_other[sample]) for sample in self.samples]
        return PairedComparison(
            both=pairs.count((True, True)),
            first=pairs.count((True, False)),
            second=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )

    def __str__(self) -> str:
        """A Markdown table, and the flags that were raised.

        Accuracies are those under an attack and all above it; ``alone`` is that under an attack alone, if it was run on
        every sample. Passes are forward + backward.
        """
        clean, robust = self.clean_accuracy, self.robust_accuracy
        lines = [
            f"| n = {self.n} | accuracy % | 95 % interval | alone % | attacked | fooled | passes per sample | s |",
            "|---|--:|:-:|--:|--:|--:|--:|--:|",
            self._row("clean", clean, None, self.n, self.n - clean.count, self.costs["clean"]),
        ]
        for name, result in self.attacks.items():
            row = self._row(name, result.after, result.alone, result.attacked, result.broken, self.costs[name])
            lines.append(row)
        total = {key: sum(cost[key] for cost in self.costs.values()) for key in ("seconds", "forward", "backward")}
        if MASKING in self.costs:
            lines.append(self._row(MASKING, None, None, "", "", self.costs[MASKING]))
        lines.append(self._row("**worst case**", robust, None, self.n, self.n - robust.count, total))
        lines += [f"\n{flag}" for flag in self.raised]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, and the numbers drawn from it, as JSON holds it."""

        def numbers(proportion: Proportion) -> dict[str, Any]:
            return {"correct": proportion.count, "accuracy": proportion.value, "interval": list(proportion.interval)}

        return {
            "kind": KIND,
            "version": VERSION,
            "n": self.n,
            "clean_accuracy": numbers(self.clean_accuracy),
            "robust_accuracy": numbers(self.robust_accuracy),
            "attacks": {
                name: {
                    "attacked": result.attacked,
                    "broken": result.broken,
                    "after": numbers(result.after),
                    "alone": None if result.alone is None else numbers(result.alone),
                }
                for name, result in self.attacks.items()
            },
            "flags": [vars(flag) for flag in self.flags],
            "costs": self.costs,
            "about": self.about,
            "verdicts": self.verdicts,
            "samples": self.samples,
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessReport":
        """Read a report that was saved.

        Raises:
            StateError: If the file is damaged or no report.
        """
        content = read_state(Path(path), KIND, VERSION, ("samples", "verdicts", "costs", "flags", "about"))
        flags = [Flag(**flag) for flag in content["flags"]]
        return cls(content["samples"], content["verdicts"], content["costs"], flags, content["about"])

    def _robust_after(self, attacks: int) -> list[bool]:
        """Of every sample, whether it is right in each of the first entries of the verdicts, the clean one included."""
        rows = zip(*list(self.verdicts.values())[:attacks], strict=True)
        return [row[0] == RIGHT and WRONG not in row for row in rows]

    def _row(
        self,
        name: str,
        accuracy: Proportion | None,
        alone: Proportion | None,
        attacked: object,
        fooled: object,
        cost: Cost,
    ) -> str:
        percent, interval = "", ""
        if accuracy is not None:
            low, high = accuracy.interval
            percent, interval = f"{100 * accuracy.value:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"
        by_itself = "" if alone is None else f"{100 * alone.value:.1f}"
        passes = f"{cost['forward'] / self.n:.1f} + {cost['backward'] / self.n:.1f}"
        cells = [name, percent, interval, by_itself, attacked, fooled, passes, f"{cost['seconds']:.1f}"]
        return f"| {' | '.join(str(cell) for cell in cells)} |"

"""What preflight says: findings, and the report that holds them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, final

from gradreg.differentiation import Differentiation, DoubleBackward, FiniteDifference

Severity = Literal["error", "warning"]

OR_FINITE_DIFFERENCE = "or take FiniteDifference(), which needs no second derivative"
_NAMES_SHOWN = 4


@final
@dataclass(frozen=True)
class Finding:
    """One thing that preflight found.

    Attributes:
        severity: ``"error"``: the exact penalty raises, trains nothing, or trains wrongly. ``"warning"``: it
            works, but hardly as intended.
        where: Qualified names of the modules, as in ``model.named_modules()``, joined by commas, or
            ``"the criterion"``; empty for the model or the batch as a whole.
        problem: What is wrong.
        mend: What to do about it; empty where the problem's text ends in it.
        second_only: Whether only the second derivative is at fault, so that finite differences work.
    """

    severity: Severity
    where: str
    problem: str
    mend: str = ""
    second_only: bool = False

    def __str__(self) -> str:
        names = self.where.split(", ") if self.where else []
        shown = ", ".join(names[:_NAMES_SHOWN])
        if len(names) > _NAMES_SHOWN:
            shown += f", ... ({len(names)} modules)"
        lines = [f"{self.severity}: {shown}: {self.problem}" if shown else f"{self.severity}: {self.problem}"]
        return "\n  mend: ".join([*lines, self.mend] if self.mend else lines)


@final
@dataclass(frozen=True)
class PreflightReport:
    """What :func:`preflight` found, errors first. ``str(report)`` is for reading.

    Attributes:
        findings: The findings.
    """

    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep the exact penalty from working."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether the exact penalty works and its gradient reaches the parameters."""
        return not self.errors

    def differentiation(self, *, one_pass: bool = False) -> Differentiation:
        """What to give :class:`gradreg.PenalizedLoss`: the exact gradient where it works, else finite differences.

        A transformer keeps its fused attention so, and a compiled model stays compiled. Warnings are not weighed: a
        network of ReLUs can be differentiated twice, to little use. The trial ended at the first error; what comes
        after it in the model was run forwards and backwards once.

        Args:
            one_pass: As of :class:`gradreg.FiniteDifference`, for objectives whose terms are all a
                :class:`gradreg.GradNormPenalty` of the loss.

        Raises:
            RuntimeError: If there is an error that finite differences do not spare; it holds the whole report.
        """
        if self.ok:
            return DoubleBackward()
        if not all(finding.second_only for finding in self.errors):
            self.raise_for_errors()
        return FiniteDifference(one_pass=one_pass)

    def raise_for_errors(self) -> None:
        """Raise a RuntimeError that holds the whole report, if there is an error in it."""
        if not self.ok:
            raise RuntimeError(str(self))

    def __str__(self) -> str:
        verdict = "preflight: the exact penalty " + ("works" if self.ok else "does not work")
        return "\n".join([verdict, *map(str, self.findings)])


class FoundError(Exception):
    """Ends the trial at its first error, since nothing after it can be tried."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__(*findings)
        self.findings = findings


def failure(where: str, problem: str, mend: str = "", *, second_only: bool = False) -> FoundError:
    """The exception for one error."""
    return FoundError(Finding("error", where, problem, mend, second_only))


def modules_of(parameters: Iterable[str]) -> str:
    """The modules that hold these parameters."""
    return join(name.rpartition(".")[0] for name in parameters)


def join(names: Iterable[str]) -> str:
    """Names of modules as a finding holds them; the model itself has none."""
    return ", ".join(dict.fromkeys(filter(None, names)))


def complaint_of(check: Callable[..., object], *args: object) -> str | None:
    """What a check of :mod:`gradreg.checks` complains of."""
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        return str(error)
    return None

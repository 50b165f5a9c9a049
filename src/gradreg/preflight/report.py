"""The report of what preflight has found, and of what works."""

from dataclasses import dataclass
from typing import final

from gradreg.differentiation import Differentiation
from gradreg.findings import Finding


@final
@dataclass(frozen=True)
class PreflightReport:
    """What :func:`preflight` found, errors first. ``str(report)`` is for reading.

    Attributes:
        findings: The findings.
        works: The differentiation with which the step was tried and works: the objective's own, or finite differences
            instead of second derivatives. None if nothing that was tried works.
    """

    findings: tuple[Finding, ...]
    works: Differentiation | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep the objective, as it is, from working."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether nothing keeps the objective, as it is, from working."""
        return not self.errors

    def differentiation(self) -> Differentiation:
        """What to give :class:`gradreg.PenalizedLoss`: :attr:`works`. Warnings are not weighed.

        Raises:
            RuntimeError: If nothing that was tried works; it holds the whole report.
        """
        if self.works is None:
            raise RuntimeError(str(self))
        return self.works

    def raise_for_errors(self) -> None:
        """Raise a RuntimeError that holds the whole report, if there is an error in it."""
        if not self.ok:
            raise RuntimeError(str(self))

    def __str__(self) -> str:
        verdict = (
            "works" if self.ok else "does not work" if self.works is None else "works with finite differences only"
        )
        return "\n".join([f"preflight: the objective {verdict}", *map(str, self.findings)])

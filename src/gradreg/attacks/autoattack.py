"""AutoAttack as its authors publish it, in the form of the attacks here."""

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from gradreg import checks, modes
from gradreg.attacks.attack import Attack
from gradreg.attacks.search import check_attackable
from gradreg.point import Point
from gradreg.threat_models import L1, L2, Linf

_NORMS = {Linf: "Linf", L2: "L2", L1: "L1"}
_KNOWN = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_NEED_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


@final
@dataclass(frozen=True, eq=False)
class AutoAttack(Attack):
    """AutoAttack, run by the package ``pyautoattack`` (``pip install gradreg[eval]``); none of it is re-written here.

    Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
    ICML 2020. Its noise is drawn for the batch as a whole: the same batches give the same verdicts, in another order or
    batch size a few may differ. With fewer than ten classes it tries as many targets as there are. y are classes, x
    float32 in [0, 1].

    Attributes:
        version: ``"standard"`` (APGD-CE, APGD-T, FAB-T, Square), ``"plus"``, ``"rand"`` for models with random
            outputs, or ``"custom"`` with ``attacks``.
        attacks: For ``"custom"``, of ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``.
        seed: Of its noise. PyTorch's own generators are given back as they were.

    Raises:
        ImportError: When called without the package.
        ValueError: If the threat model has no single eps, bounds are not (0, 1), an attack is unknown, or there are too
            few classes for one of them.

    Example:
        >>> from gradreg import Linf
        >>> AutoAttack(Linf(8 / 255)).name.startswith("AutoAttack standard (pyautoattack ")
        True
    """

    version: Literal["standard", "plus", "rand", "custom"] = field(default="standard", kw_only=True)
    attacks: Sequence[str] = field(default=(), kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if self.attacks and self.version == "standard":
            object.__setattr__(self, "version", "custom")
        if self.version not in ("standard", "plus", "rand", "custom") or (self.version == "custom") != bool(
            self.attacks
        ):
            raise ValueError(
                'AutoAttack: version is "standard", "plus" or "rand", or "custom" with a list of attacks; got '
                f"{self.version!r} and {self.attacks}."
            )
        if unknown := [name for name in self.attacks if name not in _KNOWN]:
            raise ValueError(f"AutoAttack: unknown attacks {unknown}; known are {', '.join(_KNOWN)}.")
        if isinstance(self.threat.eps, Tensor):
            raise ValueError("AutoAttack: pyautoattack takes one eps for all samples and channels, a number.")
        if self.bounds != (0.0, 1.0):
            raise ValueError(
                f"AutoAttack: pyautoattack keeps inputs in [0, 1] and knows no other bounds, got {self.bounds}. Let "
                "the model normalise: with_normalization(model, mean, std)."
            )

    @property
    def name(self) -> str:
        kind = f"custom ({', '.join(self.attacks)})" if self.version == "custom" else self.version
        return f"AutoAttack {kind} (pyautoattack {_version()})"

    @property
    def uses_gradients(self) -> bool:
        return self.attacks != ("square",)

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        x, y = point.x, point.batch.y
        look = point.batch.look
        check_attackable(x, self.threat, self.bounds, self.out_of_bounds, look)
        if y.ndim != 1:
            raise ValueError("AutoAttack compares classes, not class probabilities: use y.argmax(1).")
        package = _package()
        with _undisturbed(x.device), _warnings_of_its_log():
            adversary = package.AutoAttack(
                point.logits_at,
                norm=_NORMS[type(self.threat)],
                eps=float(self.threat.eps),
                version=self.version,
                attacks=list(self.attacks) if self.version == "custom" else None,
                seed=self.seed,
                device=x.device,
            )
            with torch.no_grad():
                logits = point.logits_at(x)
            checks.check_logits(logits)
            checks.check_labels(logits, y, look=look)
            self._fit_to_classes(adversary, logits.shape[1])
            x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        return x_adv.detach()

    def _fit_to_classes(self, adversary: Any, classes: int) -> None:
        for name in adversary.attacks_to_run:
            needed = _NEED_CLASSES.get(name, 2)
            if classes < needed:
                raise ValueError(
                    f"AutoAttack: {name} needs {needed} classes, the model has {classes}. Give a list without it: "
                    'attacks=("apgd-ce", "fab", "square").'
                )
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)


def _package() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ImportError as error:
        raise ImportError("AutoAttack needs the package pyautoattack: pip install gradreg[eval].") from error


def _version() -> str:
    try:
        return importlib.metadata.version("pyautoattack")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """The package seeds PyTorch's own generators, and ends a debugger's trace; both then go on as if it had not."""
    before, trace = modes.random_state(device), sys.gettrace()
    try:
        yield
    finally:
        modes.set_random_state(before, device)
        sys.settrace(trace)


class _Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _warnings_of_its_log() -> Iterator[None]:
    """The package logs its doubts (random outputs, zero gradients, ...): they are warnings here, each of them once."""
    log, recorder = logging.getLogger("auto-attack"), _Recorder()
    propagate, log.propagate = log.propagate, False
    log.addHandler(recorder)
    try:
        yield
    finally:
        log.removeHandler(recorder)
        log.propagate = propagate
    for message in dict.fromkeys(recorder.messages):
        checks.warn(f"AutoAttack: {message}")

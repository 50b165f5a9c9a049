"""The model under evaluation: unwrapped, undisturbed, and with everything counted that is asked of it."""

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradreg import checks, modes
from gradreg.attacks import Attack
from gradreg.streaming.identity import describe_model
from gradreg.streaming.ledger import Batch, Ranks, Record, stream
from gradreg.wrappers import is_sharded

Model = Callable[[Tensor], Tensor]
Cost = dict[str, float]

RIGHT, WRONG = "1", "0"  # how a verdict on a sample is written


class Counted(nn.Module):
    """The model, with its passes counted; what it returns is checked to be logits.

    Attributes:
        model: The model: a module, or a function.
        passes: Forward and backward passes so far, one for each sample of each batch.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.training = False  # its own flag: an attack that gives back the mode it found must find this one
        self.model = model
        # In an object of its own: passes at other points put back what a module keeps, and are to be counted too.
        self.passes = SimpleNamespace(forward=0, backward=0)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits."""
        logits = self.model(x)
        checks.check_logits(logits)
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(
                f"The model returned shape {tuple(logits.shape)} for {x.shape[0]} inputs; an evaluation counts classes "
                "and needs logits of shape (B, K)."
            )
        self.passes.forward += x.shape[0]
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """Seconds and passes of what is done inside; complete when the block ends."""
        found: Cost = {}
        start, forward, backward = time.perf_counter(), self.passes.forward, self.passes.backward
        yield found
        found["seconds"] = time.perf_counter() - start
        found["forward"] = self.passes.forward - forward
        found["backward"] = self.passes.backward - backward

    def _count_backward(self, grad: Tensor) -> None:
        self.passes.backward += grad.shape[0]


def work_through(
    model: Model,
    loader: Iterable[Any],
    work: Callable[[Counted, Batch], Record],
    *,
    about: dict[str, str],
    seed: int,
    state: str | Path | None,
    device: torch.device | str | None,
    progress: bool,
    title: str,
) -> tuple[list[Record], dict[str, str]]:
    """What ``work`` finds in every batch, and all that it depends on apart from the data.

    Args:
        model: The model; ``work`` gets it counted and in evaluation mode.
        loader: Batches ``(x, y)``.
        work: What to find out about a batch, see :func:`stream`.
        about: Attacks and settings, as texts.
        seed: Of PyTorch's own generators, from which attacks of others and random models draw: anew for every batch.
        state: File to resume from and to write to, or None.
        device: Where batches go. Default: where the model's tensors are; for a function they stay where they are.
        progress: Whether to show a bar.
        title: Of the bar.
    """
    inner = _unwrapped(model)
    about = {"gradreg": _installed_version(), **about, **({} if state is None else _told_apart(inner))}
    place = torch.device(device) if device is not None else _device_of(inner)
    counted = Counted(inner)

    def seeded(batch: Batch) -> Record:
        torch.manual_seed((seed * 2**32 + batch.number) % 2**63)
        return work(counted, batch)

    with _undisturbed(inner, place):
        records = stream(loader, seeded, about=about, state=state, device=place, progress=progress, title=title)
    return records, about


def classified(model: Counted, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of the labels, and which samples the model gets right.

    Raises:
        ValueError: If labels and logits do not fit each other.
        RuntimeError: If the model returns NaN: argmax would take that for a class.
    """
    with torch.no_grad():
        logits = model(x)
    checks.check_labels(logits, y, look=True)
    if bool(logits.isnan().any()):
        raise RuntimeError(
            f"The model's logits of {int(logits.isnan().any(1).sum())} of {len(logits)} clean samples are NaN. Look at "
            "its weights, its normalisation and its precision."
        )
    classes = y if y.ndim == 1 else y.argmax(1)
    return classes, logits.argmax(1) == classes


def is_correct(model: Model, x: Tensor, classes: Tensor) -> Tensor:
    """Which samples the model gets right; one whose logits are NaN it does not."""
    with torch.no_grad():
        logits = model(x)
    return (logits.argmax(1) == classes) & ~logits.isnan().any(1)


def as_text(verdicts: Tensor) -> str:
    """One character for each sample."""
    return "".join(RIGHT if verdict else WRONG for verdict in verdicts.tolist())


def check_batch(attack: Attack, x: Tensor) -> None:
    """Raise unless a whole batch can be attacked.

    Also those who are misclassified, whom nobody attacks: data in another unit make most samples so. And eps may not be
    one for each sample, which would be those of one batch.
    """
    eps = attack.threat.eps
    if isinstance(eps, Tensor) and eps.ndim == x.ndim and eps.shape[0] > 1:
        raise ValueError(
            f"eps of shape {tuple(eps.shape)} is one radius per sample, and belongs to one batch. Give one, or one "
            "per channel, (C, 1, 1)."
        )
    attack.check(x)


def _unwrapped(model: Model) -> Model:
    """The model itself: ranks that take turns at their own pace cannot run a wrapper that has them talk."""
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    if isinstance(model, nn.Module) and any(is_sharded(module) for module in model.modules()) and Ranks().size > 1:
        raise RuntimeError(
            "The model is sharded (FSDP), so that every forward pass is one of all ranks together, but here every rank "
            "works on batches of its own. Load the full weights into an ordinary model on every rank first."
        )
    return model


def _told_apart(model: Model) -> dict[str, str]:
    """What a state file tells the model by.

    Raises:
        TypeError: If it is a function, whose weights cannot be seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A state file tells models apart by their weights, and {type(model).__name__} shows none. Give the "
            "nn.Module itself, or leave state out."
        )
    return describe_model(model)


def _device_of(model: Model) -> torch.device | None:
    """Where the model's first parameter or buffer is; None for a function, whose tensors cannot be seen."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else None


def _installed_version() -> str:
    """Of this library: another one may attack in another way."""
    try:
        return importlib.metadata.version("gradreg")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def _undisturbed(model: Model, device: torch.device | None) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes and random numbers are as if nothing had been done."""
    device = device or torch.device("cpu")
    before = modes.random_state(device)
    try:
        if isinstance(model, nn.Module):
            with modes.evaluating(model):
                yield
        else:
            yield
    finally:
        modes.set_random_state(before, device)

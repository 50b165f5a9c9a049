"""Work on a data set batch by batch: in one process or several, resumed where it was interrupted.

A batch is the unit. What is found in it is recorded whole or not at all, and does not depend on which process works on
it, or when. So a run that was killed and resumed, and one that was shared by several processes, end with the records
of one that was neither.
"""

import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from gradreg import checks
from gradreg.state import StateError, read_state, write_atomically
from gradreg.streaming.identity import fingerprints, keys
from gradreg.wrappers import in_process_group

Record = dict[str, Any]
Result = TypeVar("Result")
KIND = "gradreg evaluation"
VERSION = 1


@dataclass(frozen=True)
class Batch:
    """One batch of the loader.

    Attributes:
        number: Its position.
        x: Inputs.
        y: Labels.
        samples: What each sample is told by.
        index: The number of every sample that its noise is drawn from.
    """

    number: int
    x: Tensor
    y: Tensor
    samples: list[str]
    index: Tensor

    def to(self, device: torch.device | None) -> "Batch":
        """The batch on a device; as it is for None."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))


def stream(
    loader: Iterable[Any],
    work: Callable[[Batch], Record],
    *,
    about: dict[str, str],
    state: str | Path | None,
    device: torch.device | None,
    progress: bool,
    title: str,
) -> list[Record]:
    """The records of all batches, in order, in every process.

    Args:
        loader: Batches ``(x, y)``, the same ones in the same order in every process.
        work: What to find out about a batch: a record that JSON can hold.
        about: What the records depend on apart from the data; a state file of anything else is refused.
        state: File to resume from and to write to, or None.
        device: Where the batches go.
        progress: Whether to show a bar.
        title: Of the bar.

    Raises:
        StateError: If the state file is damaged, or about something else.
        ValueError: If the loader has no batch, or a batch is no pair (x, y).
        RuntimeError: If another process failed, or the processes read different data.
    """
    with Ranks() as ranks:
        ledger, first, batches = ranks.together(lambda: _open(loader, state, about, ranks))
        ranks.agree(first.samples)

        def finish() -> tuple[int, str]:
            total, read = 0, hashlib.blake2b(digest_size=16)
            with _bar(loader, ledger, title, progress and ranks.rank == 0) as bar:
                for batch in itertools.chain([first], batches):
                    total += 1
                    read.update("".join(batch.samples).encode())
                    if ledger.holds(batch):
                        continue
                    if batch.number % ranks.size == ranks.rank:
                        ledger.add(batch, work(batch.to(device)))
                        bar.set_postfix_str(ledger.summary())
                    bar.update()
            ledger.check_end(total)
            return total, read.hexdigest()

        total, read = ranks.together(finish)
        ranks.agree((total, read))
        records: dict[int, Record] = {}
        for found in ranks.gather(ledger.records):
            records |= found
        return [records[number] for number in range(total)]


class Ranks:
    """The processes that share the work, as torchrun starts them; one, without ``torch.distributed``.

    They talk when all is done, over a group of their own: a rank that has less to do must be able to wait for hours.
    """

    def __init__(self) -> None:
        together = in_process_group()
        if not together and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised, so that every "
                "process would do all of the work. Call torch.distributed.init_process_group() first."
            )
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._group: Any = None

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def together(self, task: Callable[[], Result]) -> Result:
        """Do something in every rank, and wait for all.

        Raises:
            RuntimeError: In every rank, if one failed: the others would wait for it forever.
        """
        if self.size == 1:
            return task()
        result, failure = None, None
        try:
            result = task()
        except Exception as error:
            failure = error
        if failure is not None:
            print(
                f"Rank {self.rank} failed, and waits for the others to finish: {failure}", file=sys.stderr, flush=True
            )
        failures = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise RuntimeError(f"Rank {rank} failed, so that this rank stops too: {message}")
        return cast("Result", result)

    def agree(self, read: Any) -> None:
        """Raise, in every rank, unless what was read is the same in all."""
        found = self.gather(read)
        if any(other != found[0] for other in found):
            raise RuntimeError(
                "The processes read different data: every rank has to be given the whole loader, in the same order "
                "(shuffle=False and no DistributedSampler); the batches are shared out here."
            )


class Ledger:
    """The records of the batches that are finished, and the file that holds them.

    Every rank writes a file of its own and reads those of all, also of a run with another number of processes.
    """

    def __init__(self, path: Path | None, about: dict[str, str], ranks: Ranks) -> None:
        self.records: dict[int, Record] = {}
        self._added: list[int] = []
        self._about = about
        self._path = path
        if path is None:
            return
        for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}")) + [path] * path.exists():
            content = read_state(file, KIND, VERSION, ("about", "batches"))
            _check_about(file, content["about"], about)
            self.records |= {int(number): record for number, record in content["batches"].items()}
        if ranks.size > 1:
            self._path = path.with_name(f"{path.stem}.rank{ranks.rank}{path.suffix}")

    def holds(self, batch: Batch) -> bool:
        """Whether a batch is finished.

        Raises:
            StateError: If it was another batch.
        """
        record = self.records.get(batch.number)
        if record is None:
            return False
        if record["samples"] != batch.samples:
            self._take_back()
            raise StateError(
                f"The state file was made from other data, or from another order or batch size: batch {batch.number} "
                "is not the one recorded. It was not changed. Give the same loader, without shuffling, or name another "
                "file to begin anew."
            )
        return True

    def add(self, batch: Batch, record: Record) -> None:
        """Record a finished batch, and write the file."""
        self.records[batch.number] = {"samples": batch.samples, **record}
        self._added.append(batch.number)
        self._write()

    def check_end(self, total: int) -> None:
        """Raise if the loader ended before the batches that are recorded."""
        if beyond := [number for number in self.records if number >= total]:
            self._take_back()
            raise StateError(
                f"The state file was made from other data: it holds batch {max(beyond)}, and the loader ends after "
                f"{total}. It was not changed. Give the same loader, or name another file to begin anew."
            )

    def _write(self) -> None:
        if self._path is not None:
            content = {"kind": KIND, "version": VERSION, "about": self._about, "batches": self.records}
            write_atomically(self._path, json.dumps(content))

    def _take_back(self) -> None:
        """Forget what was added before the data turned out to be others."""
        for number in self._added:
            del self.records[number]
        if self._added:
            self._write()
        self._added.clear()

    def summary(self) -> str:
        """What the bar says in addition to the time left."""
        counts = [record["summary"] for record in self.records.values() if "summary" in record]
        good, n = sum(count for count, _ in counts), sum(n for _, n in counts)
        return f"{100 * good / n:.1f} % of {n}" if n else ""


def _open(
    loader: Iterable[Any], state: str | Path | None, about: dict[str, str], ranks: Ranks
) -> tuple[Ledger, Batch, Iterator[Batch]]:
    """What is recorded so far, the first batch, and the others."""
    if isinstance(loader, Tensor) or (isinstance(loader, tuple) and loader and isinstance(loader[0], Tensor)):
        raise TypeError("loader is a tensor, or a pair of them: for one batch give a list of it, [(x, y)].")
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise ValueError(
            "The loader has a DistributedSampler, which repeats samples to fill the last batch, so that they would "
            "count twice. Give every rank the whole loader (shuffle=False); the batches are shared out here."
        )
    ledger = Ledger(None if state is None else Path(state), about, ranks)
    batches = _batches(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("The loader has no batch: there is nothing to evaluate. Look at its data set and sampler.")
    return ledger, first, batches


def _batches(loader: Iterable[Any]) -> Iterator[Batch]:
    for number, found in enumerate(loader):
        if not isinstance(found, (list, tuple)) or len(found) < 2 or not all(isinstance(t, Tensor) for t in found[:2]):
            raise ValueError(
                f"The loader gives {type(found).__name__}, expected batches (x, y) of two tensors. Write a collate_fn, "
                "or map it: [(batch['image'], batch['label']) for batch in loader]."
            )
        x, y = found[:2]
        if y.ndim == 0:
            raise ValueError(
                "The loader gives single samples, as a data set does. Give it batches: DataLoader(dataset, "
                "batch_size=256)."
            )
        checks.check_input(x)
        if len(x) != len(y):
            raise ValueError(f"Batch {number} has {len(x)} inputs and {len(y)} labels.")
        samples = fingerprints(x, y)
        yield Batch(number, x, y, samples, keys(samples))


def _bar(loader: Iterable[Any], ledger: Ledger, title: str, shown: bool) -> "tqdm[Any]":
    """Progress in batches; those of an earlier session are behind it, and do not count for the time left."""
    total = None
    if isinstance(loader, Sized):
        with suppress(TypeError):  # a DataLoader over a stream says that it has a length, and then raises
            total = len(loader)
    return tqdm(total=total, initial=len(ledger.records), desc=title, unit="batch", disable=not shown)


def _check_about(file: Path, found: dict[str, str], about: dict[str, str]) -> None:
    different = [name for name in {**about, **found} if found.get(name) != about.get(name)]
    if different:
        lines = "".join(f"\n  {name}: recorded {found.get(name)}, now {about.get(name)}" for name in different)
        raise StateError(
            f"{file} belongs to another evaluation; these differ:{lines}\nIt was not changed. Name another file to "
            "begin anew."
        )

"""Files that survive whatever happens: written whole or not at all, and read with a sentence if they are damaged."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class StateError(RuntimeError):
    """A state file cannot be used: it is damaged, or belongs to other work. It is left as it is."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to be written in the block, which then takes the place of another.

    After a crash at any moment either the old file is there or the new one, whole.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.umask(mask := os.umask(0))
        os.chmod(name, 0o666 & ~mask)  # as any file is made; a temporary one is for its owner alone
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    if os.name == "posix":  # the new name is on the disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one with this text; see :func:`replacing`."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def read_state(path: Path, kind: str, version: int, fields: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a state file of a kind, in which these fields have to be.

    Raises:
        StateError: If it is damaged, of another kind or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateError(
            f"{path} is damaged: {error}. It was not changed. If nothing else writes to it, it was cut short by "
            "something else than this library, which replaces it whole. Restore it, or move it away to begin anew."
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise StateError(f"{path} is no file of {kind}. It was not changed. Name another file.")
    if content.get("version") != version:
        raise StateError(
            f"{path} was written in version {content.get('version')} of its format, and this is version {version}. Go "
            "on with the release that wrote it, or name another file to begin anew."
        )
    if missing := [field for field in fields if field not in content]:
        raise StateError(f"{path} is damaged: it holds no {', '.join(missing)}. It was not changed. Name another file.")
    return content

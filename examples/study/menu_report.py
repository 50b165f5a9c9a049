"""Tables and figures of the menu, from the files of its runs."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.points import key
from study.runs import Run

RECORD = Path("docs/menu")


@functools.cache
def on_record() -> Mapping[Run, dict[str, Any]]:
    """The runs that are committed."""
    path = RECORD / "runs.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else []
    return {key(result): result for result in found}


def write(folder: Path) -> None:
    """Put all results on record, and tables and figures beside them."""
    raise NotImplementedError

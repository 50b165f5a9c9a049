"""Tables and figure of the study, from the files of its runs."""

import json
from pathlib import Path
from typing import Any

from study.runs import Run

RECORD = Path("docs/fashion-mnist/runs.json")


def key(result: dict[str, Any]) -> Run:
    """The run that a result is of."""
    return Run(**{name: result[name] for name in ("net", "eps", "steps", "method", "seed", "split")})


def gathered(folder: Path) -> list[dict[str, Any]]:
    """All results: those on record, and those in the folder."""
    on_record = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []
    results = {key(result): result for result in on_record}
    for path in sorted((folder / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        results[key(result)] = result
    return [results[run] for run in sorted(results)]


def write(folder: Path) -> None:
    """Put all results on record."""
    raise NotImplementedError

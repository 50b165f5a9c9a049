"""The Python blocks of a Markdown page, run in the order of the page; as a Sphinx extension, when the page is built.

python docs/extensions/executed.py README.md docs/concepts.md
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def has_blocks(page: Path) -> bool:
    """Whether there is anything to run."""
    return BLOCK.search(page.read_text()) is not None


def run(page: Path) -> None:
    """The blocks of one page share their names, as a reader's session would; an error names the page's own line."""
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__document__"}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(page), "exec"), names)


def setup(app: Any) -> dict[str, bool]:
    """Run every page that Sphinx reads; one that raises ends the build."""

    def read(app: Any, name: str, source: list[str]) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(Path(app.env.doc2path(name)))

    app.connect("source-read", read)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run(Path(argument))

"""Runs compiled.py in a process without run-time checks of annotations, which dynamo cannot trace."""

import subprocess
import sys
from pathlib import Path


def test_compiled_objectives() -> None:
    file = Path(__file__).with_name("compiled.py")
    options = ["-q", "-o", "addopts=--import-mode=importlib", "-W", "error", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)], cwd=file.parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

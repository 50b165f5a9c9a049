"""What every test starts from: one thread, a fixed seed, and shapes checked at run time unless told otherwise."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import jaxtyping
import pytest
import torch

import gradreg

hypothesis.settings.register_profile("gradreg", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("gradreg")
torch.set_num_threads(1)
with warnings.catch_warnings():
    # PyTorch's first use of forward-mode AD compiles its rules with its own, deprecated, torch.jit.script.
    warnings.simplefilter("ignore", FutureWarning)
    torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks", type=int, default=200, help="how many random networks to try")
    parser.addoption("--zoo", action="store_true", help="test all models of tests/zoo.py and not a sample")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run the library: no run-time check of annotations, so that its own messages are what is raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gradreg.smooth as users import it: torch.compile cannot trace the type checks that these tests put into it."""
    finders = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(gradreg, "smooth", gradreg.smooth)
    for name in [name for name in sys.modules if name.startswith("gradreg.smooth")]:
        monkeypatch.delitem(sys.modules, name)
    torch.compiler.reset()
    return importlib.import_module("gradreg.smooth")

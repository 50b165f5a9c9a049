"""The documents run: every Python block of README and docs, in the order of its page, from the text itself."""

import re
import tomllib
from pathlib import Path

import pytest

import gradreg
from gradreg import plots, statistics

import executed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", [page for page in PAGES if executed.has_blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: Path) -> None:
    executed.run(page)


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    found: list[str] = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            else:
                found.append(f"{module}.{name}")
    public = {f"gradreg.{name}" for name in gradreg.__all__}
    public |= {f"gradreg.statistics.{name}" for name in statistics.__all__}
    public |= {
        f"gradreg.plots.{name}"
        for name, value in vars(plots).items()
        if getattr(value, "__module__", None) == plots.__name__ and not name.startswith("_")
    }
    assert len(found) == len(set(found))
    assert public <= set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert broken == []


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("make quickstart", "make test"):
        assert f"\n{command}" in readme
        assert f"\n{command}\n" in ci


def test_the_workflow_tries_the_versions_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    versions = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert versions == set(re.findall(r'"(3\.\d+)"', workflow))
    (torch,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    assert f'"torch=={torch}.*"' in workflow

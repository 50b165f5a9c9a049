"""The documents run: every Python block of README and docs, in the order of its page, from the text itself."""

import argparse
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

import gradreg
from gradreg import plots, statistics

import executed
import summary
from study import report

ROOT = Path(__file__).parents[1]
INCLUDED = ("CONTRIBUTING.md", "benchmarks/README.md", "examples/recipes/README.md")  # in pages of the site
PAGES = [ROOT / "README.md", *(ROOT / name for name in INCLUDED), *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
SCRIPT = re.compile(r"((?:examples|benchmarks)/\w+\.py)((?: [^`|#\n]*)?)")


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


@every_page
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = page.read_text()
    for included in re.findall(r"^```{include} (\S+)", text, re.MULTILINE):
        text += (page.parent / included).read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class ParsedError(Exception):
    """The options of a command were understood."""


@every_page
def test_commands_in_documents_have_the_options_of_their_scripts(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        parse(parser, args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for script, options in SCRIPT.findall(page.read_text().replace("\\\n", " ")):
        if "with_X" in script:
            continue
        assert (ROOT / script).exists(), script
        if options.strip():
            monkeypatch.setattr("sys.argv", [script, *shlex.split(options)])
            with pytest.raises(ParsedError):
                runpy.run_path(str(ROOT / script), run_name="__main__")


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


def test_the_tables_of_benchmarks_are_those_of_their_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = summary.FOLDER
    for path in committed.rglob("*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    summary.main()
    assert (tmp_path / "tables.md").read_text() == (committed / "tables.md").read_text()


def test_tables_and_claims_of_the_study_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = ROOT / report.RECORD
    for name in ("runs.json", "costs.json"):
        shutil.copy(committed / name, tmp_path)
    monkeypatch.setattr(report, "RECORD", tmp_path)
    report.write(tmp_path)
    for name in ("runs.json", "tables.md", "claims.md"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name

"""The tables of docs/benchmarks/tables.md, from the reports beside it.

python benchmarks/summary.py                   # after copying new reports from results/ to docs/benchmarks/
"""

import json
from collections.abc import Iterable
from pathlib import Path

import memory
import turns

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
FORMER = "release de0dc25"  # which had other methods
TITLES = {
    "convnet": "ConvNet",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_tiny": "ViT-Ti",
    "swin_tiny": "Swin-T",
}


def reports(benchmark: str) -> dict[str, dict]:
    """The reports of a benchmark by their names, in the order of TITLES."""
    found = {path.stem: json.loads(path.read_text()) for path in (FOLDER / benchmark).glob("*.json")}
    order = list(TITLES)
    return dict(
        sorted(
            found.items(), key=lambda item: (order.index(item[1]["model"]) if item[1]["model"] in order else 9, item[0])
        )
    )


def step_cost() -> str:
    """All methods on all models: CPU time as a multiple of a natural step."""
    found = reports("step_cost")
    first = next(iter(found.values()))
    columns = [_title(report) for report in found.values()]
    rows = []
    for name, floor in first["floor"].items():
        counted = first["counted"][name]
        kinds = (counted[kind] for kind in ("forward", "to inputs", "to weights", "second"))
        cells = [_ratio(report["ratio_to_natural"][name]) for report in found.values()]
        rows.append([name, " / ".join(f"{kind:g}" for kind in kinds), f"{floor:.2f}", *cells])
    rows.append(
        ["natural step, ms", "", "", *(f"{1000 * _first(r['seconds']['natural']):.1f}" for r in found.values())]
    )
    header = ["step", "forward / to inputs / to weights / second", "floor", *columns]
    return "\n\n".join(["## What a step costs", turns.table(header, rows), *_former(first["floor"]), _origin(found)])


def compiled() -> str:
    """What was compiled, as a multiple of the eager natural step and of the compiled one."""
    found = {name: report for name, report in reports("step_cost").items() if report["ratio_to_compiled_natural"]}
    if not found:
        return ""
    names = next(iter(found.values()))["ratio_to_compiled_natural"]
    header = ["step"]
    for report in found.values():
        header += [f"{_title(report)}: natural = 1", "compiled natural = 1"]
    rows = [
        [
            name,
            *(
                _ratio(report[which][name])
                for report in found.values()
                for which in ("ratio_to_natural", "ratio_to_compiled_natural")
            ),
        ]
        for name in names
    ]
    errors = [error for report in found.values() for error in report["gradient_error_of_compiled"].values()]
    note = f"Gradients of compiled steps differ from the eager ones by at most {max(errors):.0e}, relatively."
    return "\n\n".join(["## What a compiled step costs", turns.table(header, rows), note, *_former_compiled(names)])


def peaks() -> str:
    """Peak memory of every method on every model."""
    found = reports("memory")
    parts = []
    for report in found.values():
        parts += [f"### {_title(report)}", memory.table_of(report["steps"])]
    former = _former(next(iter(found.values()))["steps"])
    return "\n\n".join(["## What a step needs in memory", *parts, *former, _origin(found)])


def attention() -> str:
    """Time and peak memory of a ViT with and without fused attention."""
    found = reports("attention")
    parts = []
    for report in found.values():
        for tokens, rows in report["tokens"].items():
            parts += [f"### {report['model']}, {tokens} tokens, batch {report['batch_size']}", memory.table_of(rows)]
    former = _former(next(iter(next(iter(found.values()))["tokens"].values())))
    return "\n\n".join(["## What fused attention saves", *parts, *former, _origin(found)])


def _former(rows: Iterable[str]) -> list[str]:
    """A note on the rows of an earlier release, if there are any."""
    if not _has_former(rows):
        return []
    return [
        f"Measured with {FORMER}. Finite differences *in one pass*, noisy or not, are no longer part of the library."
    ]


def _former_compiled(rows: Iterable[str]) -> list[str]:
    """A note on how an earlier release was compiled, if these are its rows."""
    if not _has_former(rows):
        return []
    return [f"Measured with {FORMER}: the whole step of the exact penalty, and the model alone of everything else."]


def _has_former(rows: Iterable[str]) -> bool:
    return any("one pass" in row for row in rows)


def _title(report: dict) -> str:
    """The model, and what it is given."""
    count, *image = report["input"]
    dtype = "" if report["dtype"] == "float32" else f", {report['dtype']}"
    return f"{TITLES.get(report['model'], report['model'])}, {count} of {image[-2]}x{image[-1]}{dtype}"


def _first(of_clocks: dict[str, float]) -> float:
    return next(iter(of_clocks.values()))


def _ratio(of_clocks: dict[str, dict]) -> str:
    found = next(iter(of_clocks.values()))
    return f"**{found['median']:.2f}** ({min(found['median_of_repeats']):.2f}-{max(found['median_of_repeats']):.2f})"


def _origin(found: dict[str, dict]) -> str:
    """Commands, machine and versions."""
    lines = [
        f"* `{report['command']}`, {report['repeats']} repeats of {report['rounds']} rounds"
        for report in found.values()
    ]
    last = list(found.values())[-1]
    machine = ", ".join(
        f"{name} {value}" for name, value in last["machine"].items() if name not in ("load_average", "allocator")
    )
    kept = "memory kept by glibc (the variables of the Makefile)" if last["machine"]["allocator"] else "glibc as it is"
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return "\n".join([*lines, "", f"{machine}; {kept}; {versions}."])


def main() -> None:
    """Write the tables."""
    intro = (
        "# Benchmarks: the tables\n\n"
        "Made by `python benchmarks/summary.py` from the reports in this folder: ratios to a\n"
        "natural step, medians over all rounds, with the smallest and largest of the medians of the repeats.\n"
        "[How to read them](index.md)."
    )
    parts = [step_cost(), compiled(), peaks(), *([attention()] if (FOLDER / "attention").exists() else [])]
    (FOLDER / "tables.md").write_text("\n\n".join([intro, *filter(None, parts)]) + "\n")


if __name__ == "__main__":
    main()

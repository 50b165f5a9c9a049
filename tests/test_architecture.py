"""The package as a whole: who may import whom, what an import loads, what is public, and that every example runs."""

import ast
import doctest
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradreg
from gradreg import statistics

SOURCE = Path(gradreg.__file__).parent
LAYERS: list[set[str]] = [
    {
        "controllers",
        "copies",
        "criteria",
        "edges",
        "findings",
        "gradients",
        "graphs",
        "intervals",
        "modes",
        "normalization",
        "passes",
        "schedules",
        "selectors",
        "state",
        "threat_models",
        "wrappers",
    },
    {"agreement", "checks", "noise", "second_derivatives", "trees", "weight_perturbation"},
    {"differentiation", "replay", "smooth"},
    {"model_checks", "point"},
    {"attacks", "collapse", "terms"},
    {"objective", "penalties", "streaming"},
    {"evaluation", "preflight", "statistics"},
    {"plots"},
]
PARTS = sorted(
    path.stem for path in SOURCE.iterdir() if path.stem[0] != "_" and (path.is_dir() or path.suffix == ".py")
)
MODULES = [
    ".".join(["gradreg", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
]

PUBLIC = [
    "APGDAttack",
    "Agreement",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "ClassSelector",
    "CollapseAlarm",
    "Controller",
    "ConvergenceWeight",
    "Curvature",
    "Differentiation",
    "DoubleBackward",
    "EdgeAlignmentPenalty",
    "FGSM",
    "Finding",
    "FiniteDifference",
    "Flag",
    "GradNormPenalty",
    "GradientAlignment",
    "GradientPenalty",
    "GradregWarning",
    "HessianNorm",
    "IteratedAttack",
    "JacobianPenalty",
    "L1",
    "L2",
    "Linf",
    "LocalLinearity",
    "LogitPairing",
    "NFGSM",
    "Noise",
    "NonSmooth",
    "Normalize",
    "NormalizedCurvature",
    "PGDAttack",
    "PairedComparison",
    "PenalizedLoss",
    "PenalizedModel",
    "PenalizedOutput",
    "Penalty",
    "Point",
    "PreflightReport",
    "Proportion",
    "RandomSearch",
    "RememberedStart",
    "RobustnessCurve",
    "RobustnessReport",
    "SaliencyAlignment",
    "Schedule",
    "SmoothReport",
    "SpikeWeight",
    "StateError",
    "TargetedAPGDAttack",
    "Term",
    "ThreatModel",
    "TransferAttack",
    "WorstLocalLinearity",
    "accuracy_curve",
    "adversarial_weights",
    "agreement",
    "anneal_sharpness",
    "apgd",
    "boosted_cross_entropy",
    "class_scores",
    "constant",
    "contour_energy",
    "cosine_ramp",
    "cross_entropy",
    "dlr",
    "edge_alignment",
    "evaluate",
    "every",
    "find_nonsmooth",
    "grad_norm",
    "input_gradient",
    "input_gradient_of",
    "join",
    "kl_divergence",
    "linear_ramp",
    "margin",
    "masking_checks",
    "mcnemar",
    "minimal_distortion",
    "oriented_energy",
    "pgd",
    "predicted_class",
    "preflight",
    "sampled_class",
    "smoothify",
    "targeted_dlr",
    "true_class",
    "unsmoothify",
    "wilson",
    "with_normalization",
]


ALIASES, WARNINGS = {"Schedule"}, {"GradregWarning", "StateError"}
RESULTS = {
    "Agreement",
    "AttackResult",
    "Finding",
    "Flag",
    "Measurements",
    "Moments",
    "NonSmooth",
    "PenalizedOutput",
    "PreflightReport",
    "RobustnessCurve",
    "RobustnessReport",
    "SmoothReport",
}  # shown in the examples of the functions that return them


def files_of(part: str) -> list[Path]:
    """A part of the package is a file, or a folder of files with one purpose."""
    return sorted((SOURCE / part).rglob("*.py")) or [SOURCE / f"{part}.py"]


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            nested = node.module == "gradreg"  # from gradreg import checks
            found |= {f"gradreg.{alias.name}" for alias in node.names} if nested else {str(node.module)}
    assert "gradreg" not in found, f"{file.name} imports the package that imports it"
    return {name for name in found if name.startswith("gradreg.")}


# Layers


def test_layers_are_those_that_are_documented() -> None:
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    for level, names in enumerate(LAYERS):
        assert f"\n| {level} | {' '.join(f'`{name}`' for name in sorted(names))} |\n" in text


def test_every_module_is_in_one_layer() -> None:
    assert sorted(name for layer in LAYERS for name in layer) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_module_imports_from_lower_layers_only(part: str) -> None:
    level = next(level for level, names in enumerate(LAYERS) if part in names)
    lower = {f"gradreg.{name}" for names in LAYERS[:level] for name in names}
    others = {name for file in files_of(part) for name in imports(file) if name.split(".")[1] != part}
    assert others <= lower  # and of a folder, the public names only: from gradreg.smooth, not gradreg.smooth.survey


@pytest.mark.parametrize("part", [part for part in PARTS if (SOURCE / part).is_dir()])
def test_files_of_a_folder_import_each_other_in_one_order(part: str) -> None:
    inside = {f"gradreg.{part}.{file.stem}": imports(file) for file in files_of(part)}
    assert f"gradreg.{part}" not in set.union(*inside.values())
    assert set(graphlib.TopologicalSorter(inside).static_order()) >= set(inside)  # raises CycleError


def test_init_holds_the_public_names_and_the_version_only() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    names = {"__version__", "__all__"}
    for statement in tree.body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_import = isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("gradreg.")
        is_name = isinstance(statement, ast.Assign) and {target.id for target in statement.targets} <= names
        assert is_docstring or is_import or is_name, ast.unparse(statement)


def test_import_loads_torch_and_nothing_heavy() -> None:
    """Nothing beyond what torch and jaxtyping load themselves."""
    program = (
        "import sys, torch, torch.utils.checkpoint, jaxtyping\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import gradreg\n"
        "after = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted((after - before - set(sys.stdlib_module_names)) | after & {heavy}))\n"
    )
    heavy = {"beartype", "hypothesis", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "timm", "torchvision"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program.replace("{heavy}", repr(heavy))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["gradreg"]


# Size


def _functions() -> list[tuple[str, ast.FunctionDef]]:
    trees = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
    nodes = ((path.stem, node) for path, tree in trees.items() for node in ast.walk(tree))
    return [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]


def _lines(function: ast.FunctionDef) -> int:
    """Of its body, without the docstring."""
    first, last = function.body[0], function.body[-1]
    start = first.end_lineno + 1 if ast.get_docstring(function) else first.lineno
    return last.end_lineno - start + 1


def test_functions_fit_on_a_screen() -> None:
    assert {f"{name}.{f.name}": _lines(f) for name, f in _functions() if _lines(f) > 50} == {}
    (forward,) = (f for name, f in _functions() if name == "objective" and f.name == "forward" and _lines(f) > 5)
    assert _lines(forward) < 40


@pytest.mark.parametrize(
    ("objective", "most"),
    [
        ("PenalizedLoss(terms={'p': Term(GradNormPenalty(Linf(0.1)))})", 45),
        ("PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5))", 55),
    ],
)
def test_a_step_enters_few_functions(objective: str, most: int) -> None:
    """Whoever follows a step in a debugger meets so many functions of the library (without these tests' checks)."""
    program = f"""
import gradreg, os, sys, torch
from torch import nn
from gradreg import GradNormPenalty, Linf, NFGSM, PenalizedLoss, Term
home = os.path.dirname(gradreg.__file__)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(288, 10))
x, y, objective, entered = torch.rand(8, 3, 8, 8), torch.randint(0, 10, (8,)), {objective}, set()
objective(model, x, y).total.backward()
def enter(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(home):
        entered.add((frame.f_code.co_filename, frame.f_code.co_qualname))
sys.setprofile(enter)
objective(model, x, y)
sys.setprofile(None)
print(len(entered))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= most


# What is public


def test_inventory() -> None:
    found = {name: value for name, value in vars(gradreg).items() if not name.startswith("_")}
    assert sorted(name for name, value in found.items() if not isinstance(value, ModuleType)) == PUBLIC
    assert sorted(gradreg.__all__) == PUBLIC


@pytest.mark.parametrize(
    ("module", "name"), [(gradreg, name) for name in PUBLIC] + [(statistics, name) for name in statistics.__all__]
)
def test_public_object_is_documented(module: ModuleType, name: str) -> None:
    """What a user calls shows how; base classes, results and warnings say what they are."""
    value = getattr(module, name)
    if name in ALIASES:
        return
    text = inspect.getdoc(value)
    assert text is not None
    assert not inspect.isclass(value) or text != inspect.getdoc(value.__base__)
    assert (">>> " in text) != (inspect.isabstract(value) or name in RESULTS | WARNINGS)


def test_version_is_one_of_a_release_or_of_development() -> None:
    parts = gradreg.__version__.split(".")
    assert all(part.isdigit() for part in parts[:3])
    assert len(parts) == 3 or parts[3].startswith(("dev", "a", "b", "rc"))


# Examples


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, unchecked: None) -> None:
    module = importlib.import_module(name)
    written = sum(line.lstrip().startswith(">>> ") for line in inspect.getsource(module).splitlines())
    names = {**vars(module), "torch": torch, "nn": nn, "F": F}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, name, globs=names):
        torch.manual_seed(0)
        runner.run(test)
    assert runner.summarize(verbose=False) == (0, written)

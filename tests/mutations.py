"""Breaks modules of the library in small ways, one at a time, and reports what no test notices.

``python tests/mutations.py replay.py attacks/single_step.py`` tries a sample of the changes that each module's syntax
tree offers. Some of them change nothing that could be noticed, so a share may survive.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from difflib import unified_diff
from itertools import accumulate, pairwise
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
JOBS, LIMIT = 2, 600  # changes that are tried at once, and for how many seconds
GUARDED_BY = {  # by module or package: its test files, the fastest first; any other has the one of its own name
    "attacks": "point attacks black_box estimators",
    "checks": "checks objective attacks",
    "copies": "probe preflight",
    "differentiation": "point differentiation estimators",
    "evaluation": "evaluation curves masking integration/test_evaluation_processes",
    "gradients": "gradients transforms estimators",
    "model_checks": "objective estimators integration/test_distributed",
    "noise": "statistics attacks",
    "objective": "objective second_derivatives estimators integration/test_distributed",
    "replay": "trees replay point",
    "second_derivatives": "second_derivatives differentiation estimators integration/test_compile",
    "smooth": "smooth smooth_limits probe",
    "streaming": "evaluation curves integration/test_evaluation_processes",
    "wrappers": "preflight integration/test_distributed",
}
OTHERS = {
    **{"<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",)},
    **{"is": ("is not",), "is not": ("is",), "in": ("not in",), "not in": ("in",)},
    **{"and": ("or",), "or": ("and",), "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",)},
}
LOOPED = {"items", "values", "keys", "modules", "named_modules"}  # without which a loop only fails
LEFT_ALONE = {"decorator_list", "annotation", "returns", "bases"}  # fields of the syntax tree
TEXTS = re.compile(r"(.*\.)?(__repr__|extra_repr|warn|warn_explicit|cast)")  # functions and calls, for what they say
Change = tuple[int, int, bytes]  # from where to where in the source, and what is put there


def changes(source: bytes) -> list[Change]:
    """What could be changed."""
    lines = list(accumulate(map(len, source.splitlines(keepends=True)), initial=0))

    def span(node: ast.AST) -> tuple[int, int]:
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> bytes:
        return source[slice(*span(node))]

    def of(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Compare() | ast.BoolOp() | ast.BinOp():
                for left, right in pairwise(
                    child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)
                ):
                    (_, start), (end, _) = span(left), span(right)
                    sign = re.search(rb"not\s+in|is\s+not|[a-z]+|[^\s()]+", source[start:end])
                    for other in OTHERS.get(sign[0].decode(), ()):
                        yield start + sign.start(), start + sign.end(), other.encode()
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield *span(node), b"(" + text(operand) + b")"
            case ast.Constant(value=int(value) | float(value)):
                yield *span(node), str(not value if isinstance(value, bool) else value + 1).encode()
            case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
                yield from ((*span(test), forced) for forced in (b"True", b"False"))
            case ast.Return(value=ast.Call(args=[first, *_]) as call):
                yield *span(call), text(first)
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]) if name not in LOOPED:
                yield *span(node), text(value)
            case ast.Call(args=[*_, last], keywords=[*_, keyword]) if keyword.arg != "strict":
                yield span(last)[1], span(keyword)[1], b""

    def under(node: ast.AST) -> Iterator[Change]:
        name = getattr(node, "name", None) or (ast.unparse(node.func) if isinstance(node, ast.Call) else "")
        if not isinstance(node, ast.Raise | ast.JoinedStr) and not TEXTS.fullmatch(name):
            yield from of(node)
            for field, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and field not in LEFT_ALONE:
                        yield from under(child)

    return list(dict.fromkeys(under(ast.parse(source))))


def applied(source: bytes, change: Change) -> bytes:
    """The source with the change in it."""
    return source[: change[0]] + change[2] + source[change[1] :]


def survives(trees: SimpleQueue[Path], module: str, tests: list[str], change: Change) -> bool:
    """Whether the tests pass, in time, in a copy of the work tree with the change."""
    file = (tree := trees.get()) / "src" / "gradreg" / module
    source = file.read_bytes()
    file.write_bytes(applied(source, change))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    try:
        return not subprocess.run(command, cwd=tree, env=environment, stdout=-3, stderr=-3, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return False
    finally:
        file.write_bytes(source)
        trees.put(tree)


def main() -> int:
    """Try a sample of each module's changes, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="below src/gradreg")
    parser.add_argument("--most", type=int, default=30, help="changes of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tolerate", type=float, default=0.1, help="the share that may survive")
    args = parser.parse_args()
    tried, survivors, trees = {}, 0, SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        for job in range(JOBS):
            trees.put(tree := Path(folder, str(job)))
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "results"))
        for module in args.modules:
            part = module.split("/")[0].removesuffix(".py")
            names = GUARDED_BY.get(part, part).split()
            tests = [f"tests/{name}.py" if "/" in name else f"tests/test_{name}.py" for name in names]
            if not survives(trees, module, tests, (0, 0, b"")):
                sys.exit(f"This fails as it is: pytest {' '.join(tests)}")
            found = changes(source := (tree / "src" / "gradreg" / module).read_bytes())
            for change in random.Random(args.seed).sample(found, min(args.most, len(found))):
                tried[pool.submit(survives, trees, module, tests, change)] = module, source, change
        for outcome in tqdm(as_completed(tried), total=len(tried), unit="change"):
            if outcome.result():
                survivors += 1
                module, source, change = tried[outcome]
                texts = (text.decode().splitlines() for text in (source, applied(source, change)))
                difference = list(unified_diff(*texts, n=0, lineterm=""))[3:]
                tqdm.write(
                    "\n".join([f"src/gradreg/{module}:{source[: change[0]].decode().count(chr(10)) + 1}", *difference])
                )
    print(f"{survivors} of {len(tried)} changes survived")
    return int(survivors > args.tolerate * len(tried))


if __name__ == "__main__":
    sys.exit(main())

"""Breaks modules of the library in small ways, one at a time, and reports what no test notices."""

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
from difflib import unified_diff
from itertools import accumulate, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
JOBS, LIMIT = 2, 600  # changes that are tried at once, and for how many seconds
GUARDED_BY = {  # by module or package: its test files, the fastest first; any other has the one of its own name
    "attacks": "test_point test_attacks test_black_box test_estimators",
    "checks": "test_checks test_objective test_attacks",
    "copies": "test_survey test_preflight",
    "differentiation": "test_point test_differentiation test_transforms test_estimators",
    "evaluation": "test_evaluation test_curves test_masking integration/test_evaluation_processes",
    "model_checks": "test_objective test_estimators integration/test_distributed",
    "noise": "test_statistics test_attacks",
    "objective": "test_objective test_second_derivatives test_estimators integration/test_distributed",
    "replay": "test_trees test_replay test_point test_transforms",
    "second_derivatives": "test_second_derivatives test_differentiation test_estimators integration/test_compile",
    "smooth": "test_smooth test_smooth_limits test_survey",
    "streaming": "test_evaluation test_curves integration/test_evaluation_processes",
    "wrappers": "test_preflight integration/test_distributed",
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
    """What could be changed, as far as the syntax tree tells."""
    lines = list(accumulate(map(len, source.splitlines(keepends=True)), initial=0))

    def span(node: ast.AST) -> tuple[int, int]:
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    def of(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Compare() | ast.BoolOp() | ast.BinOp():
                operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                for left, right in pairwise(operands):
                    (_, start), (end, _) = span(left), span(right)
                    sign = re.search(rb"not\s+in|is\s+not|[a-z]+|[^\s()]+", source[start:end])
                    for other in OTHERS.get(sign[0].decode(), ()):
                        yield start + sign.start(), start + sign.end(), other.encode()
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield *span(node), b"(%b)" % source[slice(*span(operand))]
            case ast.Constant(value=int(value) | float(value)):
                yield *span(node), str(not value if isinstance(value, bool) else value + 1).encode()
            case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
                yield from ((*span(test), forced) for forced in (b"True", b"False"))
            case ast.Return(value=ast.Call(args=[first, *_]) as call):
                yield *span(call), source[slice(*span(first))]
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]) if name not in LOOPED:
                yield *span(node), source[slice(*span(value))]
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


def survivor(trees: SimpleQueue[Path], module: str, tests: list[str], start: int, end: int, new: bytes) -> str | None:
    """The change as a difference of lines, if the tests pass with it in a copy of the work tree; else None."""
    file = (tree := trees.get()) / "src" / "gradreg" / module
    source = file.read_bytes()
    mutated = source[:start] + new + source[end:]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    try:
        file.write_bytes(mutated)
        subprocess.run(command, cwd=tree, env=environment, stdout=-3, stderr=-3, timeout=LIMIT, check=True)
    except subprocess.SubprocessError:  # a test fails, or takes too long
        return None
    finally:
        file.write_bytes(source)
        trees.put(tree)
    lines = unified_diff(source.decode().splitlines(), mutated.decode().splitlines(), n=0, lineterm="")
    return "\n".join([f"src/gradreg/{module}:{len(source[: start + 1].splitlines())}", *list(lines)[3:]])


def main() -> int:
    """Try a sample of each module's changes, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="as replay.py or attacks/single_step.py")
    parser.add_argument("--most", type=int, default=30, help="changes of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--tolerate", type=float, default=0.1, help="the share that may survive: some changes are no mistakes"
    )
    args = parser.parse_args()
    attempts, trees = [], SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPool(JOBS) as pool:
        for job in range(JOBS):
            trees.put(tree := Path(folder, str(job)))
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "results"))
        for module in args.modules:
            part = module.removesuffix(".py").split("/")[0]
            tests = [f"tests/{name}.py" for name in GUARDED_BY.get(part, f"test_{part}").split()]
            if survivor(trees, module, tests, 0, 0, b"") is None:
                sys.exit(f"This fails as it is: pytest {' '.join(tests)}")
            found = changes((tree / "src" / "gradreg" / module).read_bytes())
            random.Random(args.seed).shuffle(found)
            attempts += [(trees, module, tests, *change) for change in found[: args.most]]
        outcomes = pool.imap_unordered(lambda attempt: survivor(*attempt), attempts)
        survivors = list(filter(None, tqdm(outcomes, total=len(attempts), unit="change")))
    print(*survivors, f"{len(survivors)} of {len(attempts)} changes survived", sep="\n")
    return int(len(survivors) > args.tolerate * len(attempts))


if __name__ == "__main__":
    sys.exit(main())

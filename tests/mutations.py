"""Breaks the library in many small ways, one at a time, and reports which test notices each.

``python tests/mutations.py`` (or ``make mutations``) ends with status 1 if a mutation survives, or no longer applies.
``python tests/mutations.py WORD ...`` runs only the mutations that mention one of the words.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One change: in a module of the package, a text that stands there once, and what to put in its place."""

    module: str
    old: str
    new: str

    @property
    def tests(self) -> list[str]:
        """The test files that guard the module."""
        part = self.module.split("/")[0].removesuffix(".py")
        names = (f"test_{part}", *ALSO_GUARDED_BY.get(part, ()))
        return [f"tests/{name}.py" for name in names if (ROOT / "tests" / f"{name}.py").exists()]


# Test files beside the module's own; those of an integration last, for they take longest.
ALSO_GUARDED_BY = {
    "threat_models": ("test_attacks",),
    "gradients": ("test_transforms",),
    "modes": ("test_attacks",),
    "checks": ("test_objective", "test_attacks"),
    "objective": ("integration/test_distributed",),
    "wrappers": ("test_preflight", "integration/test_distributed"),
    "scoring": ("test_objective", "test_transforms", "test_differentiation", "integration/test_compile"),
}

MUTATIONS = [
    # threat models
    Mutation(
        "threat_models.py",
        "return _samples(self._stretch(at_least_float32(grad))).abs().sum(1)",
        "return _samples(self._stretch(at_least_float32(grad))).abs().mean(1)",
    ),
    Mutation("threat_models.py", "return self._stretch(grad.sign())", "return grad.sign()"),
    Mutation("threat_models.py", "return inside if box is None else inside.clamp(*box)", "return inside"),
    Mutation("threat_models.py", "uniform.pow(1 / max(1, x[0].numel()))", "uniform"),
    Mutation(
        "threat_models.py",
        "nearest = torch.where(length(clipped).unsqueeze(1) > 1, shortened, clipped)",
        "nearest = shortened",
    ),
    Mutation("threat_models.py", "value.shape[0] == x.shape[0]:", "False:"),
    Mutation(
        "threat_models.py",
        "largest = largest.where((largest > 0) & largest.isfinite(), 1.0)",
        "largest = largest.clamp(min=1.0)",
    ),
    Mutation(
        "threat_models.py",
        "return torch.where(delta == 0, 0.0, delta / self._eps_like(delta))",
        "return delta / self._eps_like(delta)",
    ),
    # gradients and differentiation
    Mutation(
        "gradients.py",
        "torch.autograd.grad(losses.sum(), x, create_graph=create_graph",
        "torch.autograd.grad(losses.mean(), x, create_graph=create_graph",
    ),
    Mutation("gradients.py", "retain_graph=True, allow_unused=True", "retain_graph=create_graph, allow_unused=True"),
    Mutation("gradients.py", "    check_scores(losses, x)\n    if not x.requires_grad", "    if not x.requires_grad"),
    Mutation("differentiation.py", "return values.detach() + derivative - derivative.detach()", "return derivative"),
    Mutation(
        "differentiation.py",
        "derivative = torch.where(moves, rise * size, 0.0)",
        "derivative = torch.where(moves, rise, 0.0)",
    ),
    Mutation("differentiation.py", "/ (2 * self.step)", "/ self.step"),
    Mutation("differentiation.py", "grad = score.gradient(True)", "grad = score.gradient(True).detach()"),
    # penalties, edges, selectors, schedules
    Mutation("penalties.py", "return 1 - len(grad) * (unit(grad[None])", "return 1 - (unit(grad[None])"),
    Mutation(
        "penalties.py",
        "return 1 - (unit(grad) * unit(edges)).flatten(1).sum(1)",
        "return 1 - (unit(grad) * unit(edges)).flatten(1).sum(1).abs()",
    ),
    Mutation("edges.py", "/ (slope * offsets).sum()", "/ slope.abs().sum()"),
    Mutation("edges.py", 'mode="reflect"', 'mode="replicate"'),
    Mutation("edges.py", "return _filter(root, gaussian, gaussian)", "return root"),
    Mutation("selectors.py", "/ self.temperature - (-uniform.log()).log()", "- (-uniform.log()).log()"),
    Mutation("schedules.py", "min(max(t / self.duration, 0.0), 1.0)", "min(t / self.duration, 1.0)"),
    Mutation("normalization.py", "return (x - self.mean) / self.std", "return (x - self.mean) * self.std"),
    # scoring and objective
    Mutation("scoring.py", "model(self._leaf.clone() if differentiable else self._leaf)", "model(self._leaf)"),
    Mutation("scoring.py", "grad = _scaled(at_least_float32(grad), 1 / self._inner_scale)", "pass"),
    Mutation(
        "scoring.py",
        "with modes.replayed(self._random_state, z.device), modes.frozen_statistics(self._model):",
        "with modes.frozen_statistics(self._model):",
    ),
    Mutation(
        "scoring.py",
        "with modes.replayed(self._random_state, z.device), modes.frozen_statistics(self._model):",
        "with modes.replayed(self._random_state, z.device):",
    ),
    Mutation("scoring.py", "        buffer.copy_(updated[name])", "        pass"),
    Mutation("objective.py", "if weight > 0]", "]"),
    Mutation("objective.py", "total = loss_weight * forward.losses", "total = forward.losses"),
    Mutation("objective.py", "total = total + weights[name] * value", "total = total + value"),
    Mutation(
        "objective.py",
        "return list(groups.items())",
        "return [(selector, [name]) for selector, group in groups.items() for name in group]",
    ),
    Mutation("objective.py", "if any(is_static(module) for module in model.modules()):", "if False:"),
    Mutation("objective.py", "if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():", "if False:"),
    Mutation("objective.py", "checks.check_radius(threat.eps, 1.0)", "pass"),
    # attacks and modes
    Mutation("attacks/configurations.py", "losses = -losses if self.targeted else losses", "losses = losses"),
    Mutation(
        "attacks/search.py",
        "delta = threat.project(delta + stride.ascent(grad, delta, box), box)",
        "delta = delta + stride.ascent(grad, delta, box)",
    ),
    Mutation("attacks/search.py", "better = better | done", "pass"),
    Mutation("attacks/search.py", "return z.clamp(low, high)", "return z"),
    Mutation(
        "attacks/search.py",
        'key = hashlib.blake2b(f"{seed}/{position}/{restart}"',
        'key = hashlib.blake2b(f"{seed}/{row}/{restart}"',
    ),
    Mutation(
        "attacks/search.py",
        'key = hashlib.blake2b(f"{seed}/{position}/{restart}"',
        'key = hashlib.blake2b(f"{seed}/{position}"',
    ),
    Mutation(
        "attacks/configurations.py", "self.threat.scaled(1 + self.noise), self.bounds", "self.threat, self.bounds"
    ),
    Mutation("attacks/search.py", "(2.5 / steps)", "(2.0 / steps)"),
    Mutation(
        "attacks/search.py",
        "        self._record(losses, done, delta)\n        if done is not None:",
        "        if done is not None:",
    ),
    Mutation("attacks/search.py", "self._losses(leaf.clone())", "self._losses(leaf)"),
    Mutation("modes.py", "            module.training = flag", "            module.training = True"),
    Mutation("modes.py", "                module.track_running_stats = False", "                pass"),
    Mutation("modes.py", "        _set_random_state(now, device)", "        pass"),
    Mutation("attacks/configurations.py", "return reached if self.targeted else ~reached", "return ~reached"),
    Mutation("attacks/configurations.py", "return modes.evaluating(model)", "return nullcontext()"),
    # smoothify, preflight, wrappers
    Mutation("smooth/calls.py", "return x.copy_(", "return ("),
    Mutation("smooth/replace.py", "copy.deepcopy(model)", "model"),
    Mutation("preflight/trial.py", "copy_(value)", "clone()"),
    Mutation("wrappers.py", "isinstance(module, DistributedDataParallel) and bool(module.static_graph)", "False"),
    # checks
    Mutation("checks.py", "if low < 0 or high >= classes:", "if high >= classes:"),
    Mutation("checks.py", "if lowest < -0.75 or highest > 2:", "if lowest < -0.75:"),
    Mutation("checks.py", "if not (math.isfinite(low) and math.isfinite(high)):", "if False:"),
]


def _run(mutation: Mutation) -> str:
    """The test that noticed the mutation, or what is wrong."""
    source = (ROOT / "src" / "gradreg" / mutation.module).read_text()
    if source.count(mutation.old) != 1:
        return f"DOES NOT APPLY: the text stands there {source.count(mutation.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "gradreg"
        shutil.copytree(ROOT / "src" / "gradreg", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / mutation.module).write_text(source.replace(mutation.old, mutation.new))
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        where = "import gradreg; print(gradreg.__file__)"
        imported = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True)
        if imported.returncode == 0 and folder not in imported.stdout:
            return f"NOT TRIED: python imports {imported.stdout.strip()}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    noticed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return noticed.group(1) if noticed else f"SURVIVED {', '.join(mutation.tests)}"


def main(words: list[str]) -> int:
    """Run the mutations two at a time and print a line for each."""
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.module} {m.old} {m.new}" for word in words)]
    failures = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for number, (mutation, outcome) in enumerate(zip(chosen, pool.map(_run, chosen), strict=True), start=1):
            bad = outcome.startswith(("SURVIVED", "DOES NOT", "NOT TRIED"))
            failures += bad
            change = f"{mutation.old.strip()[:60]!r} -> {mutation.new.strip()[:60]!r}"
            print(f"[{number}/{len(chosen)}] {mutation.module}: {change}\n    {outcome}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mutations were noticed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

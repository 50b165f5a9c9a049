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
    "differentiation": ("test_estimators",),
    "gradients": ("test_transforms", "test_estimators"),
    "copies": ("test_probe", "test_preflight"),
    "modes": ("test_attacks",),
    "checks": ("test_objective", "test_attacks"),
    "model_checks": ("test_objective", "test_estimators", "integration/test_distributed"),
    "objective": ("test_estimators", "test_second_derivatives", "integration/test_distributed"),
    "wrappers": ("test_preflight", "integration/test_distributed"),
    "scoring": (
        "test_second_derivatives",
        "test_objective",
        "test_transforms",
        "test_differentiation",
        "test_estimators",
        "integration/test_compile",
    ),
    "attacks": ("test_black_box",),
    "noise": ("test_attacks", "test_statistics"),
    "streaming": ("test_evaluation", "test_curves", "integration/test_evaluation_processes"),
    "smooth": ("test_smooth_limits", "test_probe"),
    "evaluation": ("test_curves", "test_masking", "integration/test_evaluation_processes"),
}

MUTATIONS = [
    # threat models
    Mutation(
        "threat_models.py",
        "return _samples(self._stretch(at_least_float32(grad))).abs().sum(1)",
        "return _samples(self._stretch(at_least_float32(grad))).abs().mean(1)",
    ),
    Mutation("threat_models.py", "best = signs * eps if isinstance(eps, Tensor) else signs.mul_(eps)", "best = signs"),
    Mutation("threat_models.py", "return best if box is None else best.clamp(*box)", "return best"),
    Mutation(
        "threat_models.py",
        "self.project(self._stretch(direction * _FAR), box)",
        "self.project(self._stretch(direction), box)",
    ),
    Mutation("threat_models.py", "self._capped(capacity, scaled, (side.expand_as(grad) for side in box))", "capacity"),
    Mutation(
        "threat_models.py", "(side.expand_as(delta) - delta for side in box)", "(side.expand_as(delta) for side in box)"
    ),
    Mutation("threat_models.py", "torch.where(direction < 0, -low, high)", "high"),
    Mutation("threat_models.py", "self.maximizer(grad.detach(), box)", "self.maximizer(grad.detach())"),
    Mutation(
        "threat_models.py", "return (low - x).clamp(max=0.0), (high - x).clamp(min=0.0)", "return low - x, high - x"
    ),
    Mutation("penalties.py", "box=room(at_least_float32(x), self.bounds)", "box=room(grad, self.bounds)"),
    Mutation("penalties.py", "            check_bounds_form(bounds)", "            pass"),
    Mutation("differentiation.py", "size = moves.to(size.dtype)", "pass"),
    Mutation("objective.py", "x = clamped_(x, bounds_like(self._bounds, x))", "pass"),
    Mutation("objective.py", "if any(not all(map(torch.equal, other, sides[0])) for other in sides):", "if False:"),
    Mutation("objective.py", "[*balls, (self.noise, self._bounds)]", "balls"),
    Mutation("objective.py", "checks.check_radius(threat.eps, high - low)", "checks.check_radius(threat.eps, 1.0)"),
    Mutation(
        "objective.py", "checks.check_unit_of_bounds(lowest, highest, low.min().item(), high.max().item())", "pass"
    ),
    Mutation("checks.py", "(slack := 0.75 * (high - low))", "(slack := 0.25 * (high - low))"),
    Mutation("threat_models.py", "return inside if box is None else inside.clamp_(*box)", "return inside"),
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
    # statistics
    Mutation(
        "statistics/gradients.py",
        "torch.linalg.vector_norm(point.gradient(self.of).double().flatten(1), self.p, dim=1)",
        "torch.linalg.vector_norm(point.gradient().double().flatten(1), self.p, dim=1)",
    ),
    Mutation(
        "statistics/gradients.py",
        "point.gradient().sign() == moved.gradient().sign()",
        "point.gradient().sign() != moved.gradient().sign()",
    ),
    Mutation(
        "statistics/gradients.py",
        "noise_for(point.x, ball, seed, point.index, draw,",
        "noise_for(point.x, ball, seed, None, draw,",
    ),
    Mutation("statistics/point.py", "create_graph=self._twice and of is None", "create_graph=False"),
    Mutation("statistics/point.py", "sdpa_kernel(SDPBackend.MATH) if self._twice else nullcontext()", "nullcontext()"),
    Mutation("statistics/point.py", "        if key not in self._known:", "        if True:"),
    Mutation("statistics/statistic.py", "values.masked_fill(undefined, torch.nan)", "values"),
    Mutation(
        "statistics/curvature.py",
        "found.append(length(product).double())",
        "found.append(length(product).double() ** 2)",
    ),
    Mutation("statistics/curvature.py", "            direction = unit(product)", "            pass"),
    Mutation(
        "statistics/curvature.py",
        "            return unit(gradient)",
        "            return unit(torch.ones_like(gradient))",
    ),
    Mutation(
        "statistics/curvature.py",
        "(length(point.gradient()).double() + self.offset)",
        "length(point.gradient()).double()",
    ),
    Mutation("statistics/curvature.py", "for draw in (0, 1))", "for draw in (0, 0))"),
    Mutation("statistics/curvature.py", "error.square() if self.squared else error", "error.square()"),
    Mutation("statistics/edges.py", "cosine = 1 - edge_alignment", "cosine = edge_alignment"),
    Mutation(
        "statistics/edges.py",
        "counted = energy > self.clamp if self.edges_only",
        "counted = energy > 0 if self.edges_only",
    ),
    Mutation("statistics/edges.py", 'size.sum(1) if self.channels == "sum" else size.amax(1)', "size.sum(1)"),
    Mutation("statistics/edges.py", "energy.clamp(min=self.clamp).log10()", "energy.clamp(min=1e-12).log10()"),
    Mutation("statistics/edges.py", "spread.where(spread > 1e-9 * size, torch.nan)", "spread"),
    Mutation("statistics/edges.py", "~grad.flatten(1).any(1) | ", ""),
    Mutation("statistics/summary.py", "step * step * self.n * other.n / total", "0"),
    Mutation(
        "statistics/summary.py",
        "math.sqrt(self.squares / (self.n - 1) / self.n)",
        "math.sqrt(self.squares / (self.n - 1))",
    ),
    Mutation("statistics/summary.py", "logs[found + self.floor > 0]", "logs"),
    Mutation("statistics/summary.py", "key=lambda key: (key[0], key[0] * key[1])", "key=lambda key: key"),
    Mutation("statistics/summary.py", "self.zeros += other.zeros", "pass"),
    Mutation("statistics/measurements.py", "attack = None if attack is None else attack.for_evaluation(seed)", "pass"),
    Mutation("statistics/measurements.py", "withstood = right.clone()", "withstood = torch.ones_like(right)"),
    Mutation("statistics/measurements.py", "x + scale * (x_adv - x)", "x + scale * x_adv"),
    Mutation("statistics/measurements.py", "if values.shape != x.shape[:1]:", "if False:"),
    Mutation("statistics/measurements.py", "value if math.isfinite(value) else None", "value"),
    Mutation("streaming/setting.py", "RIGHT if verdict else WRONG for", "WRONG if verdict else RIGHT for"),
    # plots
    Mutation("plots.py", "found = -input_gradient(", "found = input_gradient("),
    Mutation("plots.py", "[100 * accuracy.value for accuracy in found]", "[accuracy.value for accuracy in found]"),
    Mutation("plots.py", "axes.axvline(found.median().item()", "axes.axvline(found.mean().item()"),
    Mutation("plots.py", "if not best or 100 * accuracy.value > best[-1][1]:", "if True:"),
    Mutation("plots.py", "sorted(found.items())}", "sorted(found.items(), reverse=True)}"),
    Mutation(
        "plots.py",
        "energies[counted].tolist(), sizes[counted].tolist()",
        "energies.flatten().tolist(), sizes.flatten().tolist()",
    ),
    # second derivatives
    Mutation(
        "objective.py",
        "return SecondDerivatives if self.differentiation.fused else nullcontext",
        "return SecondDerivatives",
    ),
    Mutation("objective.py", "return SecondDerivatives if self.differentiation.fused else", "return"),
    Mutation(
        "second_derivatives/affine.py",
        "if ctx.accumulator is not None and will_run(ctx.accumulator, by_name=False):",
        "if False:",
    ),
    Mutation(
        "second_derivatives/affine.py",
        "linear, mask = ctx.layer.linear_part(statistics),",
        "linear, mask = statistics,",
    ),
    Mutation("second_derivatives/affine.py", "if to_x and torch.is_grad_enabled():", "if False:"),
    Mutation(
        "second_derivatives/affine.py",
        "ctx.save_for_backward(x, weight, *statistics)",
        "ctx.saved = (x, weight, *statistics)",
    ),
    Mutation("second_derivatives/affine.py", ".flip(2, 4)", ""),
    Mutation("second_derivatives/affine.py", "padding=(high - 1, wide - 1)", "padding=(wide - 1, high - 1)"),
    Mutation("second_derivatives/affine.py", "down + x.shape[2] - spread.shape[2]", "x.shape[2] - spread.shape[2]"),
    Mutation("second_derivatives/affine.py", "return strided and self.groups == 1 and", "return strided and"),
    Mutation("second_derivatives/activations.py", "value=math.log(2)", "value=1.0"),
    Mutation("second_derivatives/activations.py", "x.clamp(-16, 16) if x.dtype == torch.float16 else x", "x"),
    Mutation("second_derivatives/activations.py", "value=3 * b", "value=b"),
    Mutation(
        "second_derivatives/activations.py",
        "return torch.autograd.grad(self.value(x), x, factor, create_graph=True)[0]",
        "return self.slope(factor, x)",
    ),
    Mutation("second_derivatives/engine.py", "tensor.view_as(tensor)", "tensor"),
    Mutation("second_derivatives/engine.py", "needed and will_run(next(nodes), by_name=True)", "needed"),
    Mutation("second_derivatives/engine.py", "        return by_name", "        return False"),
    Mutation("second_derivatives/layer_norm.py", ".addcmul_(z, with_weighted)", ""),
    Mutation("second_derivatives/layer_norm.py", "keepdim=True).mul_(rstd).neg_()", "keepdim=True).mul_(rstd)"),
    Mutation("second_derivatives/calls.py", "not in_transform()", "True"),
    Mutation("second_derivatives/calls.py", "not _saves_are_hooked()", "True"),
    Mutation("second_derivatives/calls.py", "and forward_ad._current_level < 0", ""),
    Mutation(
        "second_derivatives/calls.py", "type(tensor) not in (Tensor, nn.Parameter)", "not isinstance(tensor, Tensor)"
    ),
    Mutation("second_derivatives/calls.py", 'if padding == "same" or not', "if not"),
    Mutation("second_derivatives/calls.py", "is leaf else None", "is not None else None"),
    Mutation("second_derivatives/calls.py", "len(accumulators) == 1 and", ""),
    Mutation(
        "second_derivatives/calls.py",
        "return Affine.apply(layer, _accumulator(input, leaf), *_under_autocast(input, weight, bias))",
        "return Affine.apply(layer, _accumulator(input, leaf), input, weight, bias)",
    ),
    Mutation(
        "second_derivatives/calls.py",
        "if layer.groups > 1 and height * width > 9:",
        "if layer.groups > 1 and height * width > 99:",
    ),
    Mutation("second_derivatives/calls.py", "if not inplace and _is_large(input)", "if _is_large(input)"),
    # gradients and differentiation
    Mutation(
        "gradients.py",
        "_gradients(losses.sum(), x, create_graph=create_graph",
        "_gradients(losses.mean(), x, create_graph=create_graph",
    ),
    Mutation(
        "gradients.py",
        "create_graph=create_graph, retain_graph=True)",
        "create_graph=create_graph, retain_graph=create_graph)",
    ),
    Mutation("gradients.py", "    check_scores(losses, x)\n    if not x.requires_grad", "    if not x.requires_grad"),
    Mutation("differentiation.py", "return values.detach() + derivative - derivative.detach()", "return derivative"),
    Mutation(
        "differentiation.py",
        "else torch.where(moves, rise * size, 0.0)",
        "else torch.where(moves, rise, 0.0)",
    ),
    Mutation("differentiation.py", "rise if self.one_pass else torch", "torch"),
    Mutation("gradients.py", "if any(leaf._backward_hooks for leaf in leaves):", "if False:"),
    Mutation("gradients.py", "of_leaf if scale == 1 else of_leaf / scale", "of_leaf"),
    Mutation(
        "gradients.py",
        "_CarriesGradients.apply(losses.detach(), grads",
        "_CarriesGradients.apply(losses, grads",
    ),
    Mutation("gradients.py", "if torch.is_grad_enabled():  # under", "if False:  # under"),
    Mutation("gradients.py", "factor = cotangents[0]", "factor = cotangents.sum()"),
    Mutation("gradients.py", "    if not count:\n", "    if False:\n"),
    Mutation("differentiation.py", "return math.isclose(loss_weight, taken)", "return True"),
    Mutation("differentiation.py", "return math.isclose(loss_weight, taken)", "return loss_weight == penalty_weight"),
    Mutation("differentiation.py", ' if self.scheme == "forward" else 0.0', ""),
    Mutation("objective.py", "sum(weights.values()) * len(x) / count", "sum(weights.values())"),
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
    Mutation("scoring.py", "start = self._leaf.clone() if differentiable else self._leaf", "start = self._leaf"),
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
    Mutation("scoring.py", "in_order = self._order.argsort()", "in_order = torch.arange(len(self._order))"),
    Mutation("scoring.py", "None if classes is None else classes[self._drawn]", "classes"),
    Mutation("scoring.py", "order = torch.randperm(len(x), device=x.device)", "order = torch.arange(len(x))"),
    Mutation("scoring.py", "return max(1, round(fraction * count))", "return round(fraction * count)"),
    Mutation("objective.py", "loss, logits = loss.detach(), logits.detach()", "loss = loss.detach()"),
    Mutation("scoring.py", "is not None and modes.is_state(self._random_state, x.device):", "is not None:"),
    Mutation("objective.py", "total = loss_weight * loss", "total = loss"),
    Mutation("objective.py", "total = total + weights[name] * value.mean()", "total = total + value.mean()"),
    Mutation("objective.py", "x = x + self.noise.sample_like(x)", "pass"),
    Mutation("objective.py", "if active and drawn(", "if drawn("),
    Mutation("objective.py", "if self._one_pass and active and not transformed:", "if False:"),
    Mutation("objective.py", "if not 0 < fraction <= 1:", "if not 0 <= fraction <= 1:"),
    Mutation("objective.py", "if self._one_pass and (term.of is not None or", "if self._one_pass and ("),
    Mutation("schedules.py", "return self.steps * (self.value", "return 1 * (self.value"),
    Mutation(
        "objective.py",
        "return list(groups.items())",
        "return [(selector, [name]) for selector, group in groups.items() for name in group]",
    ),
    Mutation("model_checks.py", "if any(is_static(module) for module in model.modules()):", "if False:"),
    Mutation("model_checks.py", "if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():", "if False:"),
    Mutation("objective.py", "checks.check_radius(threat.eps, 1.0)", "pass"),
    Mutation(
        "model_checks.py",
        "    if coupled := batch_norms(model):\n        raise",
        "    if coupled := []:\n        raise",
    ),
    Mutation("model_checks.py", "        and differentiation.one_pass\n", ""),
    # criteria
    Mutation("criteria.py", "return logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)", "return logits.amax(1)"),
    Mutation("criteria.py", "top[:, 0] - top[:, 2]", "top[:, 0] - top[:, 1]"),
    Mutation("criteria.py", "(top[:, 2] + top[:, 3]) / 2", "top[:, 2]"),
    Mutation("criteria.py", "(_of(logits, target) - _of(logits, y))", "(_best_other(logits, y) - _of(logits, y))"),
    Mutation("criteria.py", '_check_classes("dlr", logits, y, at_least=3)', "pass"),
    Mutation("criteria.py", "1e-12", "0.0"),
    Mutation("criteria.py", "F.kl_div(logits.log_softmax(1), y,", "F.kl_div(y.log(), logits.softmax(1),"),
    Mutation("criteria.py", "    if y.ndim != 1:", "    if False:"),
    # attacks and modes
    Mutation("attacks/attack.py", "losses = -losses if self.targeted else losses", "losses = losses"),
    Mutation("attacks/attack.py", 'getattr(self, "seed", seed) is None else self', 'hasattr(self, "seed") else self'),
    Mutation("attacks/attack.py", "return replace(self, threat=self.threat.scaled(factor))", "return self"),
    Mutation("attacks/attack.py", "return modes.evaluating(model)", "return nullcontext()"),
    Mutation(
        "attacks/search.py",
        "return self.ball.project(stride.ascent(grad, delta, self._box).add_(delta), self._box)",
        "return delta + stride.ascent(grad, delta, self._box)",
    ),
    Mutation("attacks/search.py", "stride.ascent(grad, delta, self._box)", "stride.ascent(grad, delta)"),
    Mutation(
        "attacks/search.py", "return self.ball.project(start[self.active], self._box)", "return start[self.active]"
    ),
    Mutation("attacks/search.py", "return self.ball.project(delta, self._box)", "return delta"),
    Mutation("attacks/search.py", "better = better | done", "pass"),
    Mutation("attacks/search.py", "return z if self.bounds is None else clamped_(z, self.bounds)", "return z"),
    Mutation("attacks/search.py", "return z if self._sides is None else clamped_(z, self._sides)", "return z"),
    Mutation("noise.py", "torch.arange(x.shape[0]) if index is None else index", "torch.arange(x.shape[0])"),
    Mutation("noise.py", 'f"{seed}/{position}/{restart}"', 'f"{seed}/{position}"'),
    Mutation("attacks/search.py", "if restart == 0 and start is not None:", "if start is not None:"),
    Mutation("attacks/search.py", "(2.5 / steps)", "(2.0 / steps)"),
    Mutation(
        "attacks/search.py",
        "        self.record(losses, done, delta)\n        self.leave(done)",
        "        self.leave(done)",
    ),
    Mutation(
        "attacks/search.py",
        "        self.record(losses, done, delta)\n        self.leave(done)",
        "        self.record(losses, done, delta)",
    ),
    Mutation("attacks/search.py", "self.done[self.active[done]] = True", "pass"),
    Mutation("attacks/search.py", "self.ball = self.threat.rows(rows, self.x)", "self.ball = self.threat"),
    Mutation("attacks/search.py", "self._losses(leaf.clone())", "self._losses(leaf)"),
    Mutation("attacks/single_step.py", "reach = self.threat.scaled(1 + self.noise)", "reach = self.threat"),
    Mutation("attacks/adaptive.py", "self.length = 2.0", "self.length = 1.0"),
    Mutation("attacks/adaptive.py", "self.momentum = 0.25", "self.momentum = 0.0"),
    Mutation("attacks/adaptive.py", "math.floor(0.03 * steps)", "math.floor(0.04 * steps)"),
    Mutation("attacks/adaptive.py", "s.rises <= 0.75 * period", "s.rises < 0.75 * period"),
    Mutation("attacks/adaptive.py", "stuck = ~s.settled & (s.highest <= s.then)", "stuck = s.highest <= s.then"),
    Mutation("attacks/adaptive.py", "halved = too_few | stuck", "halved = too_few"),
    Mutation("attacks/adaptive.py", "sparser = moved < 0.95 * s.then", "sparser = moved < s.then"),
    Mutation("attacks/adaptive.py", "(s.length / 1.5).clamp(min=self.length / 10)", "s.length / 1.5"),
    Mutation(
        "attacks/adaptive.py", "density = moved / (1.5 * s.summit[0].numel())", "density = moved / s.summit[0].numel()"
    ),
    Mutation("attacks/adaptive.py", "torch.full_like(each, 0.2)", "torch.full_like(each, 0.1)"),
    Mutation("attacks/adaptive.py", "return L1(eps, density)", "return L1(eps)"),
    Mutation("attacks/adaptive.py", "_where(back, s.summit, delta), _where(back, s.slope, grad)", "delta, grad"),
    Mutation("attacks/adaptive.py", "_where(back, s.slope, grad)", "grad"),
    Mutation("attacks/adaptive.py", "s = replace(s, rises=torch.zeros_like(s.rises))", "pass"),
    Mutation(
        "attacks/adaptive.py",
        "s.rises + (losses > s.last) if self.taken",
        "s.rises + (losses > s.highest) if self.taken",
    ),
    Mutation("attacks/adaptive.py", "stride.ascent(grad, delta).add_", "stride.ascent(grad, delta, search._box).add_"),
    Mutation("attacks/adaptive.py", "torch.where(higher, losses, s.highest)", "torch.maximum(losses, s.highest)"),
    Mutation("attacks/adaptive.py", "if self.taken and self.policy.momentum:", "if self.policy.momentum:"),
    Mutation("attacks/adaptive.py", "moved = search.project(ahead)", "moved = ahead"),
    Mutation(
        "attacks/adaptive.py",
        "            self._record_summits()\n            self._search.finish",
        "            self._search.finish",
    ),
    Mutation("attacks/adaptive.py", "            search.record(losses, done, self.state.delta)\n", ""),
    Mutation("attacks/iterated.py", "return reached if self.targeted else ~reached", "return ~reached"),
    Mutation("attacks/iterated.py", "own = self.seed if self.seed is not None else seed", "own = seed"),
    Mutation("attacks/iterated.py", "best=self.restarts > 1", "best=False"),
    Mutation("attacks/iterated.py", "replace(self, early_stop=True, best", "replace(self, best"),
    Mutation(
        "attacks/iterated.py", "None if self.step_size is None else times(self.step_size, factor)", "self.step_size"
    ),
    Mutation("attacks/iterated.py", "targeted_dlr(logits, y, y)  # says what it needs", "pass"),
    Mutation(
        "attacks/iterated.py", "-torch.inf).argsort(1, descending=True)", "-torch.inf).argsort(1).flip(1).roll(-1, 1)"
    ),
    Mutation("attacks/iterated.py", "min(self.targets, logits.shape[1] - 1)", "self.targets"),
    Mutation("attacks/iterated.py", "self.seed, index, rank, search.active", "self.seed, index, 0, search.active"),
    Mutation("attacks/iterated.py", "search.losses_at = _towards(model, y, targets[:, rank])", "pass"),
    Mutation("attacks/iterated.py", "Halving(self.steps).checkpoints", "ascent.policy.checkpoints"),
    Mutation("attacks/iterated.py", "left = left // 2", "left = left - 1"),
    Mutation(
        "attacks/iterated.py", "-1, lanes).argsort(1, descending=True).argsort(1)", "-1, lanes).argsort(1).argsort(1)"
    ),
    Mutation("attacks/iterated.py", "if bool(fooled[search.active].any()):", "if False:"),
    Mutation(
        "attacks/iterated.py", "score = torch.where(search.done, torch.inf, search.highest)", "score = search.highest"
    ),
    Mutation(
        "attacks/iterated.py", "of_rows = None if index is None else index[rows.to(index.device)]", "of_rows = None"
    ),
    Mutation(
        "attacks/iterated.py",
        "bounds = rows_of(self.bounds[0], of_lane, x)",
        "bounds = rows_of(self.bounds[0], rows.repeat(lanes), x)",
    ),
    Mutation(
        "attacks/iterated.py",
        "threat = self.threat.rows(of_lane, x)",
        "threat = self.threat.rows(rows.repeat(lanes), x)",
    ),
    Mutation(
        "attacks/iterated.py",
        "y[of_lane], targets[rows.to(x.device)].flatten()",
        "y[of_lane], targets[rows.to(x.device)].T.flatten()",
    ),
    Mutation(
        "attacks/iterated.py", "logits.detach().argmax(1) != y[rows]", "logits.detach().argmax(1) == target[rows]"
    ),
    Mutation("modes.py", "            module.training = flag", "            module.training = True"),
    Mutation("modes.py", "                module.track_running_stats = False", "                pass"),
    Mutation("modes.py", "        set_random_state(now, device)", "        pass"),
    # smoothify, preflight, wrappers
    Mutation("smooth/calls.py", "return x.copy_(", "return ("),
    Mutation("smooth/replace.py", "copy.deepcopy(model)", "model"),
    Mutation("smooth/replace.py", "if all(_is_kept(site, keep) for site in found):", "if not found:"),
    Mutation("smooth/replace.py", "for site in there if not _is_kept(site, keep)", "for site in there"),
    Mutation("smooth/replace.py", "new.train((old if isinstance(old, nn.Module) else site.owner).training)", "pass"),
    Mutation("smooth/replace.py", 'for name, value in vars(old).items() if "_hook" in name', "for name, value in ()"),
    Mutation("smooth/replace.py", "if isinstance(module, torch.jit.ScriptModule) and is_whole:", "if False:"),
    Mutation("smooth/replace.py", "if is_quantized(module):", "if False:"),
    Mutation("smooth/replace.py", "if is_exported(module):", "if False:"),
    Mutation("smooth/replace.py", 'site.key in KERNELS and site.operation == "relu"', "False"),
    Mutation("smooth/replace.py", '_set_flag(layer, "activation_relu_or_gelu", 2 if exact_gelu else 0)', "pass"),
    Mutation(
        "smooth/undo.py", "module._modules[key] = before  #", "delattr(module, key), setattr(module, key, before)  #"
    ),
    Mutation("smooth/undo.py", "        setattr(module, name, flag)\n", "        pass\n"),
    Mutation("smooth/undo.py", "before.train(smooth.training) if isinstance(before, nn.Module) else before", "before"),
    Mutation("smooth/undo.py", "    take_off(module)\n", ""),
    Mutation("smooth/undo.py", 'target = model if inplace else copied(model, "unsmoothify")', "target = model"),
    Mutation("smooth/undo.py", "if has_another_class(module):", "if False:"),
    Mutation("smooth/calls.py", "lambda self: PlainCalls()", "lambda self: nullcontext()"),
    Mutation("smooth/calls.py", "torch._C.DisableTorchFunction() if", "nullcontext() if"),
    Mutation("smooth/calls.py", "def __init_subclass__(cls, **kwargs: Any) -> None:", "def _unused(cls) -> None:"),
    Mutation("smooth/replace.py", "plain = [*checkpointing(model), *", "plain = [*"),
    Mutation("smooth/replace.py", "*(_plainly(site) for site in kept)]", "]"),
    Mutation("smooth/replace.py", "derivation_of(module).base,", "type(module),"),
    Mutation("smooth/replace.py", "sites(made) if site.where or site.found.flat]", "sites(made) if site.where]"),
    Mutation("smooth/replace.py", "kept = [*made.parameters(), *made.buffers()]", "kept = [*made.parameters()]"),
    Mutation("smooth/reading.py", "self.reading.checkpoint |= value in _CHECKPOINTS", "pass"),
    Mutation("smooth/reading.py", 'value = _its_class(value) if opname == "LOAD_GLOBAL" else value', "pass"),
    Mutation("smooth/reading.py", "else _its_class(value)", "else value"),
    Mutation("smooth/reading.py", "value = sys.modules.get(name, _UNKNOWN)", "value = _UNKNOWN"),
    Mutation(
        "smooth/survey.py",
        '    if reading.checkpoint:\n        return "checkp',
        '    if False:\n        return "checkp',
    ),
    Mutation("smooth/survey.py", "    if is_parametrized(owner):", "    if False:"),
    Mutation("smooth/survey.py", "yield from _held_sites(held, name, owner, key)", "pass"),
    Mutation(
        "smooth/survey.py",
        "kind = derivation_of(module).base\n    if isinstance",
        "kind = type(module)\n    if isinstance",
    ),
    Mutation("smooth/activations.py", 'case "hardtanh" if math.isfinite(max_val - min_val):', 'case "hardtanh":'),
    Mutation("smooth/breaks.py", "orders = strength.gt(0).double().argmax(0)", "orders = strength.argmax(0)"),
    Mutation("smooth/breaks.py", "(_COARSE / _FINE) ** (order + 0.5)", "(_COARSE / _FINE) ** (order + 1.5)"),
    Mutation("smooth/breaks.py", "(fine > rounding * size) & ", ""),
    Mutation("smooth/breaks.py", "(fine > _NEGLIGIBLE * typical)", "(fine > 0)"),
    Mutation("smooth/breaks.py", "if rounding < 1e-12 else _ORDERS[:2]", "if rounding < 1 else _ORDERS[:2]"),
    Mutation("smooth/breaks.py", "jumps[-1] > 2**-1.5 * jumps[-4]", "jumps[-1] > 2**-4.5 * jumps[-4]"),
    Mutation("smooth/breaks.py", "bends > floor).double().mean() < 0.25", "bends > floor).double().mean() < 1.0"),
    Mutation("smooth/probe.py", "float(near.std(correction=0)) or 1.0", "1.0"),
    Mutation("smooth/probe.py", "found.linear and moved.is_elementwise and", "found.linear and"),
    Mutation("smooth/probe.py", "min(before.order, found.order)", "found.order"),
    Mutation("smooth/survey.py", "return trial.flat and trial.order == 1", "return trial.flat"),
    Mutation("smooth/probe.py", "kept = not _is_smooth(func) or _chooses(leaves)", "kept = not _is_smooth(func)"),
    Mutation("smooth/probe.py", "and (moved.chooses or not _is_smooth(func)):", "and not _is_smooth(func):"),
    Mutation("smooth/probe.py", "max(before.share or 0.0, found.share), flat", "found.share, flat"),
    Mutation("smooth/probe.py", "moved = first_to_run(self._origins.together(moved), moved)", "pass"),
    Mutation("smooth/probe.py", "torch.inference_mode(False), ", ""),
    Mutation("smooth/probe.py", "return keys - passed - gradients.through", "return set()"),
    Mutation("smooth/probe.py", "if not call.alone:", "if True:"),
    Mutation("smooth/runs.py", "x.clone()  #", "x  #"),
    Mutation("copies.py", "args = (args[0].detach(), *args[1:])", "pass"),
    Mutation("copies.py", "return net._apply(promoted) if precise else net", "return net"),
    Mutation("smooth/runs.py", "register_forward_hook(leave, always_call=True)", "register_forward_hook(leave)"),
    Mutation("smooth/runs.py", "        random.setstate(python)\n", ""),
    Mutation("smooth/paths.py", "if origin is None or left == 0 or", "if origin is None or"),
    Mutation(
        "smooth/paths.py", "torch.where(self.start == self.end, 0.0, self.end - self.start)", "self.end - self.start"
    ),
    Mutation("smooth/paths.py", "if index in used] or results.values()", "] or results.values()"),
    Mutation("smooth/survey.py", "if site.found.mend == _UNREADABLE:", "if False:"),
    Mutation("preflight/restore.py", "            tensor.copy_(content)", "            tensor.clone()"),
    Mutation(
        "preflight/restore.py",
        "            vars(ddp).update(before)\n        put_back()",
        "            vars(ddp).update(before)",
    ),
    Mutation("preflight/restore.py", "        value.extend(items)", "        pass"),
    Mutation(
        "preflight/restore.py",
        "    value.clear()\n    value.update(items)\n    return value\n\n\ndef _fill(",
        "    return value\n\n\ndef _fill(",
    ),
    Mutation("preflight/restore.py", "            setattr(module, name, value)", "            pass"),
    Mutation("preflight/restore.py", "reducer=_Idle()", "require_backward_grad_sync=False"),
    Mutation("preflight/restore.py", "with replayed(random_state(device), device):", "if True:"),
    Mutation("preflight/restore.py", "            parameter.data = value\n", "            pass\n"),
    Mutation("preflight/comparison.py", "if not error > _DIFFER:", "if True:"),
    Mutation("preflight/comparison.py", "is_derivative &= min(loss_errors) < _AGREE", "pass"),
    Mutation("preflight/comparison.py", "if _relative(self._by_forward_mode(), here[1]) > _DIFFER:", "if True:"),
    Mutation("preflight/comparison.py", "if max(differences) - min(differences) > _SCATTER", "if False and _SCATTER"),
    Mutation("preflight/trial.py", "            self._differentiated()  #", "            pass  #"),
    Mutation("preflight/trial.py", "        with filled(blank):", "        if True:"),
    Mutation("preflight/trial.py", 'if name != "bias" and not p.any()', "if not p.any()"),
    Mutation("preflight/trial.py", '"a second time" in message and ', "False and "),
    Mutation("preflight/inspection.py", "if site.flat or site.share != 0:", "if True:"),
    Mutation("preflight/inspection.py", "tensor.is_meta for tensor in", "False for tensor in"),
    Mutation("preflight/inspection.py", "    if quantized:", "    if False:"),
    Mutation("wrappers.py", "isinstance(module, DistributedDataParallel) and bool(module.static_graph)", "False"),
    # checks
    Mutation("checks.py", "if low < 0 or high >= classes:", "if high >= classes:"),
    Mutation("checks.py", "if lowest < -0.75 or highest > 2:", "if lowest < -0.75:"),
    Mutation("checks.py", "if not (math.isfinite(low) and math.isfinite(high)):", "if False:"),
    # intervals and state
    Mutation("intervals.py", "math.sqrt(count * (n - count) / n + z**2 / 4)", "math.sqrt(count * (n - count) / n)"),
    Mutation("intervals.py", "return min(1.0, 2 * math.fsum(", "return min(1.0, math.fsum("),
    Mutation("intervals.py", "range(min(first, second) + 1)", "range(min(first, second))"),
    Mutation("intervals.py", "excess = max(agree - n / 2, 0.0) if agree > 0 else agree", "excess = agree"),
    Mutation("intervals.py", "(one / n - low_1, high_2 - two / n)", "(one / n - low_1, two / n - low_2)"),
    Mutation("state.py", "            os.fsync(file.fileno())\n", "            pass\n"),
    Mutation("state.py", "        os.replace(name, path)", "        path.write_bytes(Path(name).read_bytes())"),
    Mutation("state.py", 'or content.get("kind") != kind:', "or False:"),
    # evaluation
    Mutation("streaming/identity.py", "kind + image + label", "kind + image"),
    Mutation(
        "streaming/identity.py",
        "torch.tensor([int(sample, 16) >> 1 for sample in samples])",
        "torch.arange(len(list(samples)))",
    ),
    Mutation("streaming/identity.py", "_without_addresses(module.extra_repr())", "''"),
    Mutation("streaming/identity.py", 'f"{type(module).__module__}.{type(module).__qualname__}(', 'f"('),
    Mutation("streaming/identity.py", "if id(value) in inside:", "if False:"),
    Mutation("streaming/identity.py", "[bound, value.__defaults__, value.__kwdefaults__]", "[bound]"),
    Mutation("streaming/identity.py", "join(sorted(", "join(("),
    Mutation("streaming/setting.py", "        self.training = False  #", "        #"),
    Mutation("streaming/ledger.py", "        ranks.agree((total, read))\n", ""),
    Mutation("evaluation/verdicts.py", "            check_batch(attack, x)\n", "            pass\n"),
    Mutation("evaluation/curves.py", "        check_batch(attack, x)\n", ""),
    Mutation("evaluation/masking.py", "        modes.set_random_state(before, x.device)", "        pass"),
    Mutation("evaluation/masking.py", "return model(z) + 0 * z.flatten(1).sum(1, keepdim=True)", "return model(z)"),
    Mutation("attacks/autoattack.py", "        sys.settrace(trace)\n", ""),
    Mutation("streaming/ledger.py", "if batch.number % ranks.size == ranks.rank:", "if True:"),
    Mutation("streaming/ledger.py", 'if record["samples"] != batch.samples:', "if False:"),
    Mutation("streaming/ledger.py", "[number for number in self.records if number >= total]", "[]"),
    Mutation("streaming/ledger.py", '            _check_about(file, content["about"], about)\n', ""),
    Mutation("streaming/ledger.py", "initial=len(ledger.records)", "initial=0"),
    Mutation("streaming/setting.py", "logits.register_hook(self._count_backward)", "pass"),
    Mutation("streaming/setting.py", "            with modes.evaluating(model):", "            if True:"),
    Mutation("streaming/setting.py", "        modes.set_random_state(before, device)", "        pass"),
    Mutation("evaluation/verdicts.py", "(robust if early_exit else clean).nonzero()", "clean.nonzero()"),
    Mutation("evaluation/verdicts.py", "robust[rows[~withstood]] = False", "pass"),
    Mutation("evaluation/verdicts.py", "if not bool((size <= 1 + 1e-3).all()):", "if False:"),
    Mutation("evaluation/verdicts.py", "masking if batch.number == 0 else 0", "masking"),
    Mutation("evaluation/verdicts.py", "broken > _BLACK_BOX_SLACK * report.n", "False"),
    Mutation(
        "evaluation/verdicts.py",
        "warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)",
        "pass",
    ),
    Mutation(
        "evaluation/report.py",
        "row[0] == RIGHT and WRONG not in row for row in rows",
        "row[-1] == RIGHT for row in rows",
    ),
    Mutation(
        "evaluation/report.py", 'verdicts.count(SPARED) == self.verdicts["clean"].count(WRONG)', "SPARED in verdicts"
    ),
    Mutation(
        "evaluation/report.py",
        "[(robust[sample], robust_other[sample]) for sample in self.samples]",
        "list(zip(self.robust, other.robust, strict=True))",
    ),
    Mutation("evaluation/curves.py", "attack = self._attack.scaled(factor)", "attack = self._attack"),
    Mutation("evaluation/curves.py", ".norm(x_adv - x).double() * self._unit", ".norm(x_adv - x).double()"),
    Mutation("evaluation/curves.py", "min(unit_of(attack) * 2**doubling, hunt.reach)", "unit_of(attack) * 2**doubling"),
    Mutation("evaluation/masking.py", "difference > 1e-4 or changed > 0,", "False,"),
    Mutation("evaluation/masking.py", "        one < many,", "        one > many,"),
    Mutation("evaluation/masking.py", 'Flag("zero gradients", flat > 0,', 'Flag("zero gradients", False,'),
    Mutation("evaluation/masking.py", "top - 0.05 * abs(top) or path[-1] <= path[0],", "top - 0.05 * abs(top),"),
    Mutation("evaluation/masking.py", "survivors > 0.05 * len(x)", "False"),
    # black boxes and AutoAttack
    Mutation("streaming/setting.py", "torch.manual_seed((seed * 2**32 + batch.number) % 2**63)", "pass"),
    Mutation(
        "evaluation/verdicts.py", "if other.uses_gradients and _alike(other, attack)]", "if other.uses_gradients]"
    ),
    Mutation("evaluation/verdicts.py", "RIGHT in theirs and WRONG not in theirs", "WRONG not in theirs"),
    Mutation("evaluation/verdicts.py", "attacks={list(named)}, ", ""),
    Mutation("streaming/ledger.py", "            del self.records[number]\n", "            pass\n"),
    Mutation("attacks/black_box.py", "return losses, losses > 0", "return losses, losses > 1e9"),
    Mutation("attacks/black_box.py", "self.window * 0.5 ** (4 * query // self.queries)", "self.window"),
    Mutation("attacks/black_box.py", "generator_of(self.seed, position, 0)", "generator_of(self.seed, 0, 0)"),
    Mutation("attacks/black_box.py", "self.attack.seeded(seed)", "self.attack.for_evaluation(seed)"),
    Mutation("attacks/black_box.py", "index=index if seeded else None", "index=None"),
    Mutation("attacks/autoattack.py", "        modes.set_random_state(before, device)", "        pass"),
    Mutation("attacks/autoattack.py", "min(part.n_target_classes, classes - 1)", "part.n_target_classes"),
    Mutation("attacks/autoattack.py", "in dict.fromkeys(recorder.messages):", "in ():"),
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

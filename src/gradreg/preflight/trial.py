"""The exact penalty run once on a batch, and the reason if it breaks."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from gradreg.checks import check_labels, check_logits
from gradreg.criteria import Criterion
from gradreg.gradients import check_scores, input_gradient, new_nodes
from gradreg.penalties import grad_norm
from gradreg.preflight.comparison import compare
from gradreg.preflight.report import OR_FINITE_DIFFERENCE, Finding, FoundError, complaint_of, failure, join, modules_of
from gradreg.preflight.restore import filled
from gradreg.preflight.trace import BARRIERS, Trace, all_finite, any_nonzero, tensors_in
from gradreg.threat_models import Linf
from gradreg.wrappers import is_compiled

_CRITERION = "the criterion"
_MEND_FIRST = "Mend this first; it fails without a penalty too."
_INSTEAD = "Take FiniteDifference(), which needs no second derivative."
_MEND_NAN = "Keep norms, square roots and divisions away from 0 by an epsilon."
_STEP_FUNCTION = (
    "the input gradient is exactly 0, though the loss changes with the logits: a step function is on the way.",
    "Take round(), sign(), quantisation and the like off the way from x, or give them a straight-through gradient.",
)
_KEPT = (
    "it keeps tensors of one forward pass for the next, whose graph is gone by then: the second step raises, with or "
    "without a penalty, and what is kept does not follow the weights.",
    "timm keeps attention biases in eval mode alone: call model.train(), then eval() on the modules that need it, such "
    "as BatchNorm; in a model of your own, keep nothing that has a graph.",
)
_BLANK = (
    "its weight is 0, as of a fresh classifier: nothing of the loss reaches x before the optimiser's first step. The "
    "rest was tried with random numbers in its place.",
    "Nothing has to be done for training from scratch; otherwise look at the checkpoint.",
)
_SATURATED = (
    "the loss is saturated, its gradient exactly 0 at the logits: the penalty's values could not be checked.",
    "Try samples that the model gets wrong, or a criterion that does not saturate, such as a margin of logits.",
)


@final
@dataclass(frozen=True)
class Trial:
    """The exact penalty on one batch: raises FoundError where it breaks."""

    model: nn.Module
    x: Tensor
    y: Tensor
    criterion: Criterion

    def findings(self) -> Iterator[Finding]:
        """Run it; what comes out are warnings."""
        logits, grad, slopes = self._differentiated()
        if _holders_of_graphs(self.model):
            self._differentiated()  # now what they hold is used
        if not grad.isfinite().all():
            raise failure(self._turns(all_finite), "the input gradient is NaN or infinite here.", _MEND_NAN)
        if grad.any():
            _check_slopes(slopes)
            self._compare()
        elif self._slope(logits.detach().requires_grad_()).any():
            yield from self._beyond_blank_weights()
        else:
            yield Finding("warning", "", *_SATURATED)

    def _differentiated(self) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """The logits, the input gradient, and the gradient of the penalty on it for every trainable parameter."""
        leaf = self.x.detach().clone().requires_grad_()
        logits = self._logits(leaf)
        losses = self._losses(logits)
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        slopes: tuple[Tensor | None, ...] = ()
        try:
            grad = input_gradient(losses, leaf)
            penalty = grad_norm(grad, Linf(1.0)).sum()
            if penalty.requires_grad:
                slopes = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
        except RuntimeError as error:
            raise self._explained(str(error).rstrip(".")) from error
        # torch.autograd.grad passes by a once_differentiable function in silence, where total.backward() raises.
        if any(node.name() in BARRIERS for node in new_nodes([penalty.grad_fn], ())):
            raise self._explained("its backward is marked once_differentiable")
        return logits, grad, dict(zip(trained, slopes, strict=False))

    def _compare(self) -> None:
        """Raise if double backward has run, but gives something else than the derivative of the input gradient."""
        if wrong := compare(self.model, self.x, self.y, self.criterion):
            trace = Trace()
            trace.run(self.model, self.x)
            where = join(trace.written_by_hand()) if wrong.by_hand else ""
            raise failure(where, wrong.problem, wrong.mend, second_only=wrong.by_hand)

    def _beyond_blank_weights(self) -> Iterator[Finding]:
        """The input gradient is 0: go on with random numbers where a weight is 0, or raise."""
        where = self._turns(any_nonzero)
        module = self.model.get_submodule(where)
        blank = [p for name, p in module.named_parameters(recurse=False) if name != "bias" and not p.any()]
        if not blank:
            raise failure(where, *_STEP_FUNCTION)
        yield Finding("warning", where, *_BLANK)
        with filled(blank):
            yield from self.findings()

    def _slope(self, logits: Tensor) -> Tensor:
        return torch.autograd.grad(self.criterion(logits, self.y).sum(), logits)[0]

    def _logits(self, leaf: Tensor) -> Tensor:
        try:
            logits = self.model(leaf)
        except Exception as error:
            trace = Trace()
            with suppress(Exception):
                trace.run(self.model, self.x)
            raise failure(trace.innermost, *_why_no_forward(error)) from error
        if complaint := complaint_of(check_logits, logits):
            raise failure("", complaint)
        if not any(getattr(node, "variable", None) is leaf for node in new_nodes([logits.grad_fn], ())):
            trace = Trace()
            trace.run(self.model, self.x)
            raise failure(
                trace.where_graph_ends(),
                "the logits do not depend on x: the graph ends on the way.",
                "Take no_grad(), inference_mode(), detach(), .data, argmax and integer casts off the way from x.",
            )
        return logits

    def _losses(self, logits: Tensor) -> Tensor:
        if complaint := complaint_of(_check_labels, logits, self.y):
            raise failure("", complaint)
        try:
            losses = self.criterion(logits, self.y)
        except Exception as error:
            raise failure(_CRITERION, f"it raises {type(error).__name__}: {error}", _MEND_FIRST) from error
        if complaint := complaint_of(check_scores, losses, self.x):
            raise failure(_CRITERION, complaint)
        if not losses.requires_grad:
            raise failure(
                _CRITERION, "its losses carry no graph.", "Compute them from the logits by differentiable steps."
            )
        if not losses.isfinite().all():
            trace = Trace(look=True)
            trace.run(self.model, self.x)
            raise failure(
                trace.where_not_finite() or _CRITERION,
                "NaN or infinity comes out, though what goes in is finite.",
                "Look at its parameters and at the range of its input.",
            )
        return losses

    def _turns(self, sound: Callable[[Tensor], bool]) -> str:
        """The module at which the gradient, sound at the logits, ceases to be so on the way to x."""
        trace = Trace()
        losses = self.criterion(trace.run(self.model, self.x), self.y)
        return trace.where_gradient_turns(losses, sound)

    def _explained(self, message: str) -> FoundError:
        """Why double backward raised, found by repeating it with a trace."""
        if "a second time" in message and (kept := _holders_of_graphs(self.model)):
            return failure(join(kept), *_KEPT)
        trace = Trace()
        losses = self.criterion(trace.run(self.model, self.x), self.y)
        trace.claim([losses], _CRITERION)
        compiled = [name for name, module in self.model.named_modules() if is_compiled(module)]
        culprits = trace.undifferentiable(losses)
        sound = self._has_a_sound_first_derivative()
        findings = []
        for operation, owners in culprits.items():
            names = compiled if compiled and operation.startswith("CompiledFunction") else owners
            # With several of them the message is of the one that happened to come first.
            problem, mend, second_only = _diagnosis(operation, message if len(culprits) == 1 else "")
            second_only &= sound
            mend = f"{mend}; {OR_FINITE_DIFFERENCE}." if second_only else f"{mend}."
            findings.append(Finding("error", join(names), problem, mend, second_only))
        instead = _INSTEAD if sound else "Mend the first derivative."
        return FoundError(*(findings or [Finding("error", "", f"double backward raises: {message}.", instead, sound)]))

    def _has_a_sound_first_derivative(self) -> bool:
        leaf = self.x.detach().clone().requires_grad_()
        try:
            (grad,) = torch.autograd.grad(self.criterion(self.model(leaf), self.y).sum(), leaf)
        except RuntimeError:
            return False
        return bool(grad.isfinite().all())


def _holders_of_graphs(model: nn.Module) -> list[str]:
    """The modules with a tensor in an attribute, or in a container there, that hangs on a graph."""
    return [
        name
        for name, module in model.named_modules()
        if any(tensor.grad_fn is not None for tensor in tensors_in(list(vars(module).values())))
    ]


def _check_slopes(slopes: dict[str, Tensor | None]) -> None:
    """Raise unless the penalty's gradients are finite and some parameter is moved by them."""
    if broken := [name for name, slope in slopes.items() if slope is not None and not slope.isfinite().all()]:
        raise failure(
            modules_of(broken),
            "the penalty's gradient is NaN or infinite, though the input gradient is finite.",
            _MEND_NAN,
        )
    if not any(slope is not None and slope.any() for slope in slopes.values()):
        raise failure(
            "",
            "the penalty's gradient is 0 for every trainable parameter: it would train nothing.",
            "Unfreeze parameters that the input gradient depends on; train smoothify(model) if its activations are "
            "piecewise linear.",
        )


def _check_labels(logits: Tensor, y: Tensor) -> None:
    check_labels(logits, y, look=True)


def _why_no_forward(error: Exception) -> tuple[str, str]:
    """Problem and mend for an exception of the forward pass."""
    if "a leaf Variable that requires grad" in str(error):
        return (
            "it changes x in place, but x must keep its value for the gradient.",
            "Make the operation out of place (nn.ReLU(inplace=False)), or train smoothify(model).",
        )
    return f"the forward pass raises {type(error).__name__}: {error}", _MEND_FIRST


def _diagnosis(operation: str, message: str) -> tuple[str, str, bool]:
    """Problem and mend for an autograd node that cannot be differentiated again, and whether it can be once."""
    if operation.startswith("ScaledDotProduct"):
        return (
            f"fused attention ({operation}) has no second derivative.",
            "Run the forward pass `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`; in a timm model set "
            "`module.fused_attn = False` on these modules, or call timm.layers.set_fused_attn(False) before it is "
            "built",
            True,
        )
    if operation.startswith("CompiledFunction"):
        return (
            "torch.compile makes a backward pass that cannot be differentiated again.",
            "Penalise the uncompiled model and compile the whole step instead",
            True,
        )
    if operation == "CheckpointFunctionBackward":
        return (
            "reentrant checkpointing cannot take part in torch.autograd.grad.",
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            False,
        )
    return (
        f"{operation} cannot be differentiated twice" + (f" ({message})." if message else "."),
        "If it is an activation, train smoothify(model); if it is an autograd.Function, write its backward of "
        "differentiable operations, without once_differentiable",
        True,
    )

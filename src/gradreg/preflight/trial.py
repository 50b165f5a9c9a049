"""The exact penalty run once on a batch, and the reason if it breaks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg.checks import check_labels, check_logits
from gradreg.criteria import Criterion
from gradreg.gradients import check_scores, input_gradient, new_nodes
from gradreg.modes import random_state, replayed
from gradreg.penalties import grad_norm
from gradreg.preflight.report import OR_FINITE_DIFFERENCE, Finding, FoundError, complaint_of, failure, join, modules_of
from gradreg.preflight.trace import BARRIERS, Trace, all_finite, any_nonzero
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
        if not grad.isfinite().all():
            raise self._turned(all_finite, "the input gradient is NaN or infinite here.", _MEND_NAN)
        if grad.any():
            _check_slopes(dict(zip(trained, slopes, strict=False)))
        elif self._slope(logits.detach().requires_grad_()).any():
            raise self._turned(any_nonzero, *_STEP_FUNCTION)
        else:
            yield Finding("warning", "", *_SATURATED)

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

    def _turned(self, sound: Callable[[Tensor], bool], problem: str, mend: str) -> FoundError:
        """The error that a gradient, sound at the logits, is not so at x."""
        trace = Trace()
        losses = self.criterion(trace.run(self.model, self.x), self.y)
        return failure(trace.where_gradient_turns(losses, sound), problem, mend)

    def _explained(self, message: str) -> FoundError:
        """Why double backward raised, found by repeating it with a trace."""
        trace = Trace()
        losses = self.criterion(trace.run(self.model, self.x), self.y)
        trace.claim([losses], _CRITERION)
        compiled = [name for name, module in self.model.named_modules() if is_compiled(module)]
        culprits = trace.undifferentiable(losses)
        findings = []
        for operation, owners in culprits.items():
            names = compiled if compiled and operation.startswith("CompiledFunction") else owners
            # With several of them the message is of the one that happened to come first.
            findings.append(
                Finding("error", join(names), *_diagnosis(operation, message if len(culprits) == 1 else ""))
            )
        return FoundError(*(findings or [Finding("error", "", f"double backward raises: {message}.", _INSTEAD)]))


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


def _diagnosis(operation: str, message: str) -> tuple[str, str]:
    """Problem and mend for an autograd node that cannot be differentiated again."""
    if operation.startswith("ScaledDotProduct"):
        return (
            f"fused attention ({operation}) has no second derivative.",
            "Run the forward pass `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):`; in a timm model set "
            "`module.fused_attn = False` on these modules, or call timm.layers.set_fused_attn(False) before it is "
            f"built; {OR_FINITE_DIFFERENCE}.",
        )
    if operation.startswith("CompiledFunction"):
        return (
            "torch.compile makes a backward pass that cannot be differentiated again.",
            f"Penalise the uncompiled model and compile the whole step instead; {OR_FINITE_DIFFERENCE}.",
        )
    if operation == "CheckpointFunctionBackward":
        return (
            "reentrant checkpointing cannot take part in torch.autograd.grad.",
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
        )
    return (
        f"{operation} cannot be differentiated twice" + (f" ({message})." if message else "."),
        "If it is an activation, train smoothify(model); if it is an autograd.Function, write its backward of "
        f"differentiable operations, without once_differentiable; {OR_FINITE_DIFFERENCE}.",
    )


@contextmanager
def left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what forward passes do to a model and to the random states; keep DDP from communicating."""
    # Of all buffers, as named_buffers() leaves out those that are None, which a forward pass may fill.
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in buffers]
    flags = [(module, module.training) for module in model.modules()]
    parallel = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    synced = [(ddp, ddp.require_backward_grad_sync, ddp.require_forward_param_sync) for ddp in parallel]
    try:
        for ddp in parallel:
            ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False
        with replayed(random_state(device), device):
            yield
    finally:
        for ddp, backward, forward in synced:
            ddp.require_backward_grad_sync, ddp.require_forward_param_sync = backward, forward
        for module, flag in flags:
            module.training = flag
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # Only what changed: a graph that is still alive may have saved the buffer in its present version.
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

"""What keeps an objective from working on a model, in words.

One table for :func:`gradreg.preflight`, which tries a step before training, and for the checks of an objective's first
step.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, final

Severity = Literal["error", "warning"]
_NAMES_SHOWN = 4


@final
@dataclass(frozen=True)
class Finding:
    """One thing that :func:`gradreg.preflight` found.

    Attributes:
        severity: ``"error"``: the step raises, trains nothing, or trains wrongly. ``"warning"``: it works, but hardly
            as intended.
        where: Qualified names of the modules, as in ``model.named_modules()``, joined by commas; ``"the criterion"``;
            ``"the penalty 'name'"``; empty for the model or the batch as a whole.
        problem: What is wrong.
        fix: What to do about it; empty where the problem says it.
        second_only: Whether only second derivatives are at fault.
    """

    severity: Severity
    where: str
    problem: str
    fix: str = ""
    second_only: bool = False

    def at(self, where: str | Iterable[str] = "", **values: object) -> "Finding":
        """The same problem at a place, its blanks filled in.

        Args:
            where: The place, or the names of modules, of which the model itself has none.
            values: What the blanks stand for.
        """
        names = [where] if isinstance(where, str) else filter(None, dict.fromkeys(where))
        return replace(self, where=", ".join(names), problem=self.problem.format(**values) if values else self.problem)

    @property
    def message(self) -> str:
        """The text of an exception or a warning."""
        return f"PenalizedLoss: {self.problem} {self.fix} {_INSTEAD if self.second_only else ''}".rstrip()

    def __str__(self) -> str:
        names = self.where.split(", ") if self.where else []
        shown = ", ".join(names[:_NAMES_SHOWN])
        if len(names) > _NAMES_SHOWN:
            shown += f", ... ({len(names)} modules)"
        lines = [f"{self.severity}: {shown}: {self.problem}" if shown else f"{self.severity}: {self.problem}"]
        return "\n  fix: ".join([*lines, self.fix] if self.fix else lines)


def _error(problem: str, fix: str = "", *, second_only: bool = False) -> Finding:
    return Finding("error", "", problem, fix, second_only)


def _warning(problem: str, fix: str = "") -> Finding:
    return Finding("warning", "", problem, fix)


_INSTEAD = (
    "Or use differentiation=FiniteDifference(), which needs no second derivative. gradreg.preflight(objective, model, "
    "x, y) names the modules, and says what works."
)
CRITERION = "the criterion"
_EPSILON = "Keep norms, square roots and divisions away from 0 by an epsilon."

# The model and the batch

NOT_AN_OBJECTIVE = _error(
    "objective and model are a {objective} and a {model}; expected a PenalizedLoss and an nn.Module.",
    "The order is preflight(objective, model, x, y). Wrap a function in a module whose forward calls it.",
)
META = _error(
    "there are no values to run on the meta device.",
    "Call model.to_empty(device=...), then initialise or load the weights; take x and y from a loader.",
)
IDS = _error(
    "x is of type {dtype}; a gradient needs real numbers.",
    "Token ids have no gradient, but their vectors have: take x = embedding(ids).detach(), and as the model what comes "
    "after the embedding. For 8-bit images take x.float() / 255.",
)
LAZY = _error("not initialised yet.", "Run model(x) once.")
INFERENCE_PARAMETERS = _error(
    "parameters made inside torch.inference_mode() cannot be trained.",
    "Build or load the model outside of inference mode.",
)
QUANTIZED = _error(
    "quantised: its weights are integers, which no gradient moves.",
    "Train the model in floating point, then quantise it.",
)
FROZEN = _error(
    "all parameters are frozen (requires_grad=False), so nothing would be trained.",
    "Unfreeze those to train, for example by model.requires_grad_().",
)
UNCOPIED = _warning(
    "the model or the objective cannot be copied ({error}): the step was tried on the model itself, and everything was "
    "put back.",
)

# Distributed training

STATIC_GRAPH = _error(
    "with DistributedDataParallel(static_graph=True), an input gradient taken outside of the wrapped forward pass "
    "stops gradients from being synchronised, without an error.",
    "Wrap model and objective together: DistributedDataParallel(PenalizedModel(model, objective), static_graph=True).",
)
FREED_PARAMETERS = _error(
    "fully_shard frees the parameters after the first backward pass, and double backward needs them again.",
    "Call model.set_reshard_after_backward(False, recurse=True) once, and reshard() on every FSDPModule between "
    "backward and the optimiser's step (without it the step trains stale weights).",
    second_only=True,
)
SHARDED = _warning(
    "a sharded model is not run by preflight: nothing was tried.",
    "Run preflight before fully_shard, and remember reshard() between backward and the optimiser's step.",
)
SYNC_BATCH_NORM = _error(
    "SyncBatchNorm has no second derivative, and no CPU kernel.",
    "Use GroupNorm, plain BatchNorm, or these modules in evaluation mode.",
)
SYNC_BATCH_NORM_ALONE = _warning(
    "SyncBatchNorm has no second derivative: this will fail once there is more than one process.",
    SYNC_BATCH_NORM.fix,
)

# What a penalty asks of a model

BATCH_STATISTICS = _warning(
    "normalisation layers use the statistics of the batch ({count} {kind}): part of a sample's input gradient belongs "
    "to the other samples{rank}.",
    "Use GroupNorm, or leave it so, knowing it.",
)
FREEZE = "Or set them to evaluation mode, as the thesis does."
PIECEWISE_LINEAR = _warning(
    "the model has piecewise linear activations ({count} calls, such as {example}): their second derivative is 0 "
    "almost everywhere, and the penalty is known to collapse.",
    "Train smoothify(model) instead. find_nonsmooth(model, x) tells which of them x reaches.",
)
NOT_SMOOTH = _warning("{kinds} is not smooth: {reason}.")
READ_FROM_CODE = _warning(
    "activations were judged by the types of modules alone, which shows no function that is called, and not which of "
    "them x meets: find_nonsmooth(model, x) raises {error}",
    "The penalty does not need this. To see the rest, fix what keeps a copy of the model from running.",
)
FUSED_ATTENTION = _error(
    "fused attention ({operation}) has no second derivative.",
    "Run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or in a timm model set "
    "module.fused_attn = False on these modules (timm.layers.set_fused_attn(False) before it is built).",
    second_only=True,
)
COMPILED = _error(
    "the model is compiled, and torch.compile makes a backward pass that cannot be differentiated again.",
    "Penalise the model that is not compiled, and compile the whole step.",
    second_only=True,
)
REENTRANT = _error(
    "reentrant checkpointing cannot take part in an input gradient.",
    "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
)
SELECTIVE = _error(
    "selective checkpointing allows one backward pass only, and an input gradient takes one more.",
    "Checkpoint without context_fn, or do without checkpointing.",
)
ONLY_ONCE = _error(
    "{operation} cannot be differentiated twice{reason}.",
    "If it is an activation, train smoothify(model). If it is an autograd.Function, write its backward of "
    "differentiable operations, without once_differentiable.",
)
NO_DERIVATIVE = _error("{operation} has no derivative{reason}.", "Replace it on the way from x to the loss.")
KEPT = _error(
    "it keeps tensors of one forward pass for the next, whose graph is gone by then: the second step raises, with or "
    "without a penalty, and what is kept does not follow the weights.",
    "timm keeps attention biases in evaluation mode only: call model.train(), then eval() on the modules that need it, "
    "such as BatchNorm. In a model of your own, keep nothing that has a graph.",
)

# What a step does

RAISES = {
    "model": _error("the forward pass raises {error}", "Fix this first; it fails without a penalty too."),
    "criterion": _error("it raises {error}", "Fix this first; it fails without a penalty too."),
    "penalty": _error("it raises {error}", "Try it alone: penalty(Point(model, criterion, x, y))."),
    "backward": _error("the backward pass raises {error}"),
    "": _error("{error}"),
}
NO_GRAPH = _error("its losses carry no graph.", "Compute them from the logits by differentiable steps.")
INDEPENDENT = _error(
    "the logits do not depend on x: the graph ends on the way.",
    "Keep no_grad(), inference_mode(), detach(), .data, argmax and integer casts off the way from x.",
)
NOT_FINITE = _error(
    "NaN or infinity comes out, though what goes in is finite.", "Look at its parameters and at the range of its input."
)
GRADIENT_NOT_FINITE = _error("the input gradient is NaN or infinite here.", _EPSILON)
SLOPES_NOT_FINITE = _error(
    "the gradient of the step is NaN or infinite, though the loss and its input gradient are finite.", _EPSILON
)
STEP_FUNCTION = _error(
    "the input gradient is exactly 0, though the loss changes with the logits: a step function is on the way.",
    "Take round(), sign(), quantisation and the like off the way from x, or give them a straight-through gradient.",
)
MOVES_NOTHING = _error(
    "the penalty's gradient is 0 for every trainable parameter: it would train nothing.",
    "Unfreeze parameters that the input gradient depends on. If the activations are piecewise linear, train "
    "smoothify(model).",
)
INACTIVE = _warning(
    "the penalty is 0 on this batch, and so is its gradient: what it trains was not tried.", "Try other samples."
)
BLANK = _warning(
    "its weight is 0, as of a fresh classifier: nothing of the loss reaches x before the optimiser's first step. The "
    "rest was tried with random numbers instead.",
    "For training from scratch nothing has to be done. Otherwise look at the checkpoint.",
)
SATURATED = _warning(
    "the loss is saturated, with a gradient of exactly 0 at the logits: what depends on it was not tried.",
    "Try samples that the model gets wrong, or a criterion that does not saturate, such as a margin of logits.",
)
WRONG = _error(
    "double backward is not the derivative of the input gradient: along a random direction of the weights it gives "
    "{found:.4g}, and finite differences {expected:.4g}.",
    "Write the backward of an autograd.Function of differentiable operations on ctx.saved_tensors, and hooks on "
    "gradients likewise, without detach() and .data.",
)
RECOMPUTED = _error(
    "double backward is not the derivative of the input gradient, and this is not that of the loss: what the backward "
    "pass computes again, as checkpointing does, is not what the forward pass computed.",
    "Do not change what checkpointed code computes: enter modes and contexts inside of the checkpointed function, "
    "leave preserve_rng_state=True, or do without checkpointing.",
)
NOT_LOOKED_AT = _warning("preflight could not look further: {error}")

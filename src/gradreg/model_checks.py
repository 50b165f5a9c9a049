"""What a model must be for a penalty to be right, and to do something: looked at when an objective first meets it."""

import itertools
import weakref

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.differentiation import Differentiation, DoubleBackward, FiniteDifference
from gradreg.gradients import new_nodes
from gradreg.modes import batch_norms
from gradreg.smooth import find_nonsmooth
from gradreg.wrappers import frees_parameters, is_compiled, is_sharded, is_stale, is_static

# The models that an objective has found fit to be penalised, and has warned of.
_inspected: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]" = weakref.WeakKeyDictionary()
_sharded: "weakref.WeakKeyDictionary[nn.Module, list[str]]" = weakref.WeakKeyDictionary()  # the names of their units


def is_first_meeting(objective: nn.Module, model: object, differentiation: Differentiation) -> bool:
    """Raise where the penalty would be wrong without an error, or train nothing; warn where it hardly helps.

    Args:
        objective: Who meets the model, with the parameters that it brings.
        model: The model. Of a function nothing can be seen.
        differentiation: How the objective differentiates its penalties.

    Returns:
        Whether this is the objective's first meeting with the model.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise RuntimeError(
            "PenalizedLoss: grad is disabled, and a penalty needs it. Leave torch.no_grad() or "
            "torch.inference_mode() out, or for a validation loss call the criterion alone."
        )
    if not isinstance(model, nn.Module):
        return False
    trained = itertools.chain(model.parameters(), objective.parameters())
    if not any(parameter.requires_grad for parameter in trained) and next(model.parameters(), None) is not None:
        raise RuntimeError(
            "PenalizedLoss: all parameters of the model are frozen (requires_grad=False), so that nothing would be "
            "trained."
        )
    first = model not in _inspected.setdefault(objective, weakref.WeakSet())
    if first:
        _inspect(model, differentiation)
        _inspected[objective].add(model)
        _sharded[model] = [name for name, module in model.named_modules() if is_sharded(module)]
    if stale := [name for name in _sharded[model] if is_stale(model.get_submodule(name))]:
        raise RuntimeError(
            f"PenalizedLoss: the optimiser has changed the shards of {stale[0] or 'the model'}, which still holds "
            "its full parameters of before: the step would train stale weights. Call reshard() on every FSDPModule "
            "between backward and the optimiser's step."
        )
    return first


def is_eager(model: object) -> bool:
    """Whether this is a module, and no part of it is compiled."""
    return isinstance(model, nn.Module) and not any(map(is_compiled, model.modules()))


def check_samples_are_apart(model: object) -> None:
    """Raise if the model gives another output for a sample when it sees a part of its batch."""
    if coupled := batch_norms(model):
        raise RuntimeError(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that a part of the batch is another function of each sample than "
            "the whole. Set them to evaluation mode, use GroupNorm, or leave fraction=1."
        )


def warn_of_fused_attention(logits: Tensor) -> None:
    """Warn if the graph of the logits has an attention kernel: total.backward() will raise there, without a mend."""
    if any(node.name().startswith("ScaledDotProduct") for node in new_nodes([logits.grad_fn], ())):
        checks.warn(
            "PenalizedLoss: the model runs fused attention, which has no second derivative, so that total.backward() "
            "will raise. Use differentiation=FiniteDifference(one_pass=True), which keeps it and costs less; or do "
            "without it, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or with module.fused_attn = False in a "
            "timm model. gradreg.preflight(model, x, y) names the modules."
        )


def _inspect(model: nn.Module, differentiation: Differentiation) -> None:
    """Raise or warn where modules of the model make the penalty wrong, or do less than it says."""
    exact = isinstance(differentiation, DoubleBackward)
    if any(is_static(module) for module in model.modules()):
        raise RuntimeError(
            "PenalizedLoss: with DistributedDataParallel(static_graph=True) an input gradient taken outside of the "
            "wrapped forward stops gradients from being synchronised, without an error. Wrap model and objective "
            "together: DistributedDataParallel(PenalizedModel(model, objective), static_graph=True)."
        )
    if exact and any(is_sharded(module) and frees_parameters(module) for module in model.modules()):
        raise RuntimeError(
            "PenalizedLoss: fully_shard frees the parameters after the first backward, which double backward needs "
            "again. Call model.set_reshard_after_backward(False, recurse=True) once, and reshard() on every "
            "FSDPModule between backward and the optimiser's step (without it the step trains stale weights); or use "
            "differentiation=FiniteDifference()."
        )
    if (
        isinstance(differentiation, FiniteDifference)
        and differentiation.one_pass
        and any(map(is_sharded, model.modules()))
    ):
        raise RuntimeError(
            "PenalizedLoss: the parameters of a fully sharded model are not the leaves that a gradient can be taken of "
            "in the middle of a step. Use FiniteDifference(one_pass=False)."
        )
    coupled = batch_norms(model)
    if coupled:
        checks.warn(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that part of a sample's input gradient is the other samples'. Set them "
            "to evaluation mode, as the thesis does, or use GroupNorm; or leave it so, knowing it."
        )
    if not exact:
        return
    if any(is_compiled(module) for module in model.modules()):
        checks.warn(
            "PenalizedLoss: the model is compiled, and torch.compile has no double backward outside of the compiled "
            "region. Compile the whole step instead, use differentiation=FiniteDifference(), or see "
            "gradreg.preflight(model, x, y)."
        )
    flat = [site for site in find_nonsmooth(model) if site.flat]
    if flat:
        checks.warn(
            f"PenalizedLoss: {len(flat)} activations of the model are piecewise linear ({flat[0].name or 'the model'}: "
            f"{flat[0].kind}, ...). Their second derivative is 0 almost everywhere, and the penalty is known to "
            "collapse; train smoothify(model) instead. find_nonsmooth(model, x) tells which of them x reaches."
        )

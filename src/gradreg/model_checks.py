"""What a model must be for a penalty to be right, and to do something: looked at when an objective first meets it."""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradreg import checks, findings
from gradreg.differentiation import Differentiation
from gradreg.findings import Finding
from gradreg.graphs import new_nodes
from gradreg.modes import batch_norms
from gradreg.normalization import normalizes
from gradreg.smooth import find_nonsmooth
from gradreg.wrappers import frees_parameters, is_compiled, is_sharded, is_stale, is_static

# For each objective the models that it has met, whether it has penalised them, and whether they normalise their input.
_met: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, Meeting]]"
_met = weakref.WeakKeyDictionary()


@dataclass
class Meeting:
    """What an objective knows of a model.

    Attributes:
        normalizes: Whether a layer of the model is :class:`gradreg.Normalize`.
        units: The names of its sharded units.
        penalized: Whether it has been found fit to be penalised.
        graph_seen: Whether its graph has been looked at.
    """

    normalizes: bool
    units: list[str]
    penalized: bool = False
    graph_seen: bool = False


def check_model(objective: nn.Module, model: object, differentiation: Differentiation | None) -> Meeting | None:
    """Raise where a penalty would be wrong without an error, or train nothing; warn where it hardly helps.

    Args:
        objective: Who meets the model, with the parameters that it brings.
        model: The model. Of a function nothing can be seen.
        differentiation: How the objective differentiates its penalties; None if it has none at this step.
    """
    if differentiation is not None and (torch.is_inference_mode_enabled() or not torch.is_grad_enabled()):
        raise RuntimeError(
            "PenalizedLoss: grad is disabled, and a penalty needs it. Leave torch.no_grad() or "
            "torch.inference_mode() out, or for a validation loss call the criterion alone."
        )
    if not isinstance(model, nn.Module):
        return None
    met = _met.setdefault(objective, weakref.WeakKeyDictionary()).get(model)
    if met is None:
        if getattr(getattr(objective, "at", None), "uses_gradients", False):
            _refuse(model, second_order=False)
        units = [name for name, module in model.named_modules() if is_sharded(module)]
        met = _met[objective][model] = Meeting(normalizes(model), units)
    if differentiation is not None:
        if not met.penalized:
            _refuse(model, differentiation.second_order)
            _warn(model, differentiation.second_order)
            met.penalized = True
        _check_parameters(objective, model, met.units)
    return met


def _check_parameters(objective: nn.Module, model: nn.Module, units: list[str]) -> None:
    """Raise if no parameter is to be trained, or a sharded unit holds parameters of before the optimiser's step."""
    parameter = None
    for parameter in itertools.chain(model.parameters(), objective.parameters()):
        if parameter.requires_grad:
            break
    else:
        if parameter is not None:
            raise RuntimeError(findings.FROZEN.message)
    for name in units:
        if is_stale(model.get_submodule(name)):
            raise RuntimeError(
                f"PenalizedLoss: the optimiser has changed the shards of {name or 'the model'}, which still holds its "
                "full parameters of before: the step would train stale weights. Call reshard() on every FSDPModule "
                "between backward and the optimiser's step."
            )


def check_graph(met: Meeting, logits: object, second_order: bool) -> None:
    """Warn if the graph of the logits has an attention kernel, at which total.backward() will raise."""
    met.graph_seen = True
    if not second_order:
        return
    graph = logits.grad_fn if isinstance(logits, Tensor) else None
    fused = [node.name() for node in new_nodes([graph], ()) if node.name().startswith("ScaledDotProduct")]
    if fused:
        _warn_of(findings.FUSED_ATTENTION.at(operation=fused[0]))


def check_samples_are_apart(model: object) -> None:
    """Raise if the model gives another output for a sample when it sees a part of its batch."""
    if coupled := batch_norms(model):
        raise RuntimeError(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that a part of the batch is another function of each sample than the "
            "whole. Set them to evaluation mode, use GroupNorm, or leave fraction=1."
        )


def batch_statistics(coupled: Sequence[nn.Module], rank: str = "") -> Finding:
    """What to say of layers that use the statistics of the batch."""
    found = findings.BATCH_STATISTICS.at(count=len(coupled), kind=type(coupled[0]).__name__, rank=rank)
    # Statistics that nothing has moved yet are not to be frozen: they are those of no data.
    counts = [getattr(layer, "num_batches_tracked", None) for layer in coupled]
    if any(count is None or count == 0 for count in counts):
        return found
    return replace(found, fix=f"{found.fix} {findings.FREEZE}")


def _refuse(model: nn.Module, second_order: bool) -> None:
    if any(is_static(module) for module in model.modules()):
        raise RuntimeError(findings.STATIC_GRAPH.message)
    if second_order and any(is_sharded(module) and frees_parameters(module) for module in model.modules()):
        raise RuntimeError(f"{findings.FREED_PARAMETERS.message} {findings.OR_FINITE_DIFFERENCE}")


def _warn(model: nn.Module, second_order: bool) -> None:
    if coupled := batch_norms(model):
        checks.warn(batch_statistics(coupled).message)
    if not second_order:
        return
    if any(is_compiled(module) for module in model.modules()):
        _warn_of(findings.COMPILED)
    flat = [site for site in find_nonsmooth(model) if site.flat]
    if flat:
        example = f"{flat[0].name or 'the model'}: {flat[0].kind}"
        checks.warn(findings.PIECEWISE_LINEAR.at(count=len(flat), example=example).message)


def _warn_of(finding: Finding) -> None:
    """Warn of what has no second derivative."""
    names = "gradreg.preflight(objective, model, x, y) names the modules, and says what works."
    checks.warn(f"{finding.message} {findings.OR_FINITE_DIFFERENCE} {names}")

"""What a model must be for a penalty to be right, and to do something: looked at when an objective first meets it."""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg import checks, findings
from gradreg.differentiation import Differentiation
from gradreg.findings import Finding
from gradreg.graphs import new_nodes
from gradreg.modes import batch_norms
from gradreg.normalization import normalizes
from gradreg.smooth import FLAT_NODES
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
            _heed(seen_in(model, penalizes=False, second_order=False))
        units = [name for name, module in model.named_modules() if is_sharded(module)]
        met = _met[objective][model] = Meeting(normalizes(model), units)
    if differentiation is not None:
        if not met.penalized:
            second_order = differentiation.second_order
            _heed(seen_in(model, penalizes=True, second_order=second_order))
            _heed(_suspected_of(model) if second_order else ())
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
    """Warn if the graph of the logits has an attention kernel, at which total.backward() will raise, or kinks."""
    met.graph_seen = True
    if not second_order:
        return
    graph = logits.grad_fn if isinstance(logits, Tensor) else None
    names = [node.name().split("Backward")[0] for node in new_nodes([graph], ())]
    if fused := [name for name in names if name.startswith("ScaledDotProduct")]:
        checks.warn(findings.FUSED_ATTENTION.at(operation=fused[0]).message)
    if flat := [name for name in names if name in FLAT_NODES]:
        checks.warn(findings.PIECEWISE_LINEAR.at(count=len(flat), example=flat[0]).message)


def check_samples_are_apart(model: object) -> None:
    """Raise if the model gives another output for a sample when it sees a part of its batch."""
    if coupled := batch_norms(model):
        raise RuntimeError(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that a part of the batch is another function of each sample than the "
            "whole. Set them to evaluation mode, use GroupNorm, or leave fraction=1."
        )


def seen_in(model: nn.Module, *, penalizes: bool, second_order: bool) -> Iterator[Finding]:
    """What can be seen in a model whose input gradients are taken: of wrappers, and of BatchNorm.

    Args:
        model: The model.
        penalizes: Whether a penalty takes them, and no attack alone.
        second_order: Whether they are differentiated again.
    """
    modules = dict(model.named_modules())
    if static := [name for name, module in modules.items() if is_static(module)]:
        yield findings.STATIC_GRAPH.at(static)
    sharded = {name: module for name, module in modules.items() if is_sharded(module)}
    if second_order and any(map(frees_parameters, sharded.values())):
        yield findings.FREED_PARAMETERS.at(sharded)
    if penalizes and (coupled := set(batch_norms(model))):
        layers = {name: module for name, module in modules.items() if module in coupled}
        kind = type(next(iter(layers.values()))).__name__
        rank = " on its rank" if any(isinstance(module, DistributedDataParallel) for module in modules.values()) else ""
        found = findings.BATCH_STATISTICS.at(layers, count=len(layers), kind=kind, rank=rank)
        # Statistics that nothing has moved yet, those of no data, are not to be frozen.
        counts = [getattr(layer, "num_batches_tracked", None) for layer in coupled]
        fresh = any(count is None or count == 0 for count in counts)
        yield found if fresh else replace(found, fix=f"{found.fix} {findings.FREEZE}")


def _suspected_of(model: nn.Module) -> Iterator[Finding]:
    """What may break second derivatives, which only a run would show."""
    if any(is_compiled(module) for module in model.modules()):
        yield replace(findings.COMPILED, severity="warning")


def _heed(found: Iterable[Finding]) -> None:
    for finding in found:
        if finding.severity == "error":
            raise RuntimeError(finding.message)
        checks.warn(finding.message)

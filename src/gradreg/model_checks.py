"""What a model must be for a penalty to be right, and to do something: looked at when an objective first meets it."""

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.differentiation import Differentiation
from gradreg.gradients import new_nodes
from gradreg.modes import batch_norms
from gradreg.normalization import normalizes
from gradreg.smooth import find_nonsmooth
from gradreg.threat_models import Linf
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
            raise RuntimeError(
                "PenalizedLoss: all parameters of the model are frozen (requires_grad=False), so that nothing would be "
                "trained."
            )
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
    if any(node.name().startswith("ScaledDotProduct") for node in new_nodes([graph], ())):
        checks.warn(
            "PenalizedLoss: the model runs fused attention, which has no second derivative, so that total.backward() "
            "will raise. Keep it with differentiation=FiniteDifference() or with at=NFGSM(...) instead of a penalty; "
            "or do without it, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or with module.fused_attn = "
            "False in a timm model. gradreg.preflight(objective, model, x, y) names the modules."
        )


def check_units(x: Tensor, places: Iterable[object], *, normalized: bool) -> None:
    """Raise or warn if x, radii and bounds are in different units.

    Args:
        x: The input.
        places: Penalties and attacks, of which those count that have a ``threat`` or ``bounds``.
        normalized: Whether the model normalises pixels of [0, 1] by itself.
    """
    lowest, highest = checks.finite_range(x)
    if normalized:
        checks.check_not_normalized_twice(lowest, highest)
    for place in places:
        threat, bounds = getattr(place, "threat", None), getattr(place, "bounds", None)
        span: float | Tensor | None = 1.0 if lowest >= 0 and highest <= 1 else None
        if bounds is not None:
            low, high = torch.as_tensor(bounds[0]), torch.as_tensor(bounds[1])
            checks.check_unit_of_bounds(lowest, highest, low.min().item(), high.max().item())
            span = high - low
        if not isinstance(threat, Linf):
            continue
        if span is not None:
            checks.check_radius(threat.eps, span)
        elif highest > 16 and torch.as_tensor(threat.eps).max().item() < 1:
            checks.warn(
                f"x reaches {highest:.3g}, as bytes do, but {threat} is in units of pixels in [0, 1]. Pass x / 255, or "
                "Linf(255 * eps)."
            )


def check_samples_are_apart(model: object) -> None:
    """Raise if the model gives another output for a sample when it sees a part of its batch."""
    if coupled := batch_norms(model):
        raise RuntimeError(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that a part of the batch is another function of each sample than the "
            "whole. Set them to evaluation mode, use GroupNorm, or leave fraction=1."
        )


def _refuse(model: nn.Module, second_order: bool) -> None:
    if any(is_static(module) for module in model.modules()):
        raise RuntimeError(
            "PenalizedLoss: with DistributedDataParallel(static_graph=True) an input gradient taken outside of the "
            "wrapped forward stops gradients from being synchronised, without an error. Wrap model and objective "
            "together: DistributedDataParallel(PenalizedModel(model, objective), static_graph=True)."
        )
    if second_order and any(is_sharded(module) and frees_parameters(module) for module in model.modules()):
        raise RuntimeError(
            "PenalizedLoss: fully_shard frees the parameters after the first backward, which double backward needs "
            "again. Call model.set_reshard_after_backward(False, recurse=True) once, and reshard() on every "
            "FSDPModule between backward and the optimiser's step (without it the step trains stale weights); or use "
            "differentiation=FiniteDifference()."
        )


def _warn(model: nn.Module, second_order: bool) -> None:
    if coupled := batch_norms(model):
        checks.warn(
            f"PenalizedLoss: {len(coupled)} normalisation layers use the statistics of the batch "
            f"({type(coupled[0]).__name__}), so that part of a sample's input gradient is the other samples'. Set them "
            "to evaluation mode, as the thesis does, or use GroupNorm; or leave it so, knowing it."
        )
    if not second_order:
        return
    if any(is_compiled(module) for module in model.modules()):
        checks.warn(
            "PenalizedLoss: the model is compiled, and torch.compile has no double backward outside of the compiled "
            "region. Compile the whole step instead, use differentiation=FiniteDifference(), or see "
            "gradreg.preflight(objective, model, x, y)."
        )
    flat = [site for site in find_nonsmooth(model) if site.flat]
    if flat:
        checks.warn(
            f"PenalizedLoss: {len(flat)} activations of the model are piecewise linear ({flat[0].name or 'the model'}: "
            f"{flat[0].kind}, ...). Their second derivative is 0 almost everywhere, and the penalty is known to "
            "collapse; train smoothify(model) instead. find_nonsmooth(model, x) tells which of them x reaches."
        )

"""What can be said of a model without running it."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gradreg.checks import check_input, check_not_normalized_twice, finite_range
from gradreg.modes import batch_norms
from gradreg.normalization import normalizes
from gradreg.preflight.report import OR_FINITE_DIFFERENCE, Finding, complaint_of, join, modules_of
from gradreg.smooth import NonSmooth, find_nonsmooth
from gradreg.wrappers import frees_parameters, is_quantized, is_sharded, is_static

_MEND_IDS = (
    "Token ids have no gradient, but their vectors have: take x = embedding(ids).detach(), and as the model what comes "
    "after the embedding."
)


def inspect(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """What can be seen without running the model."""
    yield from _inspect_tensors(model, x, y)
    yield from _inspect_wrappers(model)
    yield from _inspect_batch_norm(model, x.device)


def _inspect_tensors(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Finding]:
    if any(tensor.is_meta for tensor in (x, y, *model.parameters(), *model.buffers())):
        yield Finding(
            "error",
            "",
            "on the meta device there are no values to run.",
            "Call model.to_empty(device=...) and initialise or load the weights; take x and y from a loader.",
        )
    elif x.is_inference() or y.is_inference():
        yield Finding(
            "error",
            "",
            "x or y was made inside torch.inference_mode() and can take no part in a backward pass.",
            "Load the batch outside of inference mode, or clone() it there.",
        )
    elif complaint := complaint_of(check_input, x) or complaint_of(finite_range, x):
        yield Finding("error", "", complaint, "" if x.is_floating_point() else _MEND_IDS)
    elif normalizes(model) and (complaint := complaint_of(lambda x: check_not_normalized_twice(*finite_range(x)), x)):
        yield Finding("error", "", complaint)
    parameters = dict(model.named_parameters())
    if lazy := [name for name, parameter in parameters.items() if is_lazy(parameter)]:
        yield Finding("error", modules_of(lazy), "not initialised yet.", "Run model(x) once.")
    if inference := [name for name, parameter in parameters.items() if name not in lazy and parameter.is_inference()]:
        yield Finding(
            "error",
            modules_of(inference),
            "parameters made inside torch.inference_mode() cannot be trained.",
            "Build or load the model outside of inference mode.",
        )
    quantized = [name for name, module in model.named_modules() if is_quantized(module) and "_packed" not in name]
    if quantized:
        yield Finding(
            "error",
            join(quantized),
            "quantised: its weights are integers, which no gradient moves.",
            "Train the model in floating point, then quantise it.",
        )
    elif not any(parameter.requires_grad for parameter in parameters.values()):
        yield Finding(
            "error",
            "",
            "no parameter requires grad: the loss has a graph, through x, but nothing would be trained.",
            "Unfreeze the parameters to train, for example model.requires_grad_().",
        )


def _inspect_wrappers(model: nn.Module) -> Iterator[Finding]:
    static = [name for name, module in model.named_modules() if is_static(module)]
    if static:
        yield Finding(
            "error",
            join(static),
            "DDP(static_graph=True) takes the input gradient for the step's backward pass and never synchronises the "
            "real one: every rank trains on its own, without an error.",
            "Let DDP see one forward pass, DistributedDataParallel(PenalizedModel(model, objective), "
            "static_graph=True), or leave static_graph out.",
        )
    sharded = {name: module for name, module in model.named_modules() if is_sharded(module)}
    if sharded:
        frees = any(frees_parameters(module) for module in sharded.values())
        yield Finding(
            "error" if frees else "warning",
            join(sharded),
            "FSDP frees the parameters after the first backward pass, but the second needs them."
            if frees
            else "a sharded model is not run by preflight: whether double backward works is not tried.",
            "Run preflight before fully_shard. With FSDP2 call model.set_reshard_after_backward(False, recurse=True) "
            "once, and reshard() on every FSDPModule after each backward(), before the optimiser's step (without it "
            f"the weights go stale, without an error); {OR_FINITE_DIFFERENCE}.",
            second_only=True,
        )


def inspect_activations(model: nn.Module, x: Tensor | None) -> Iterator[Finding]:
    """What is not smooth: what the batch meets of it, or what the code shows if there is none, or it cannot be run."""
    sites: dict[tuple[str, str], list[NonSmooth]] = {}
    found, error = _nonsmooth(model, x)
    if error is not None:
        yield Finding(
            "warning",
            "",
            "the activations were read from the code alone, which hides some and does not show what x meets of them: "
            f"find_nonsmooth(model, x) raises {type(error).__name__}: {error}",
            "The penalty needs nothing of it; to see the rest, mend what keeps a copy of the model from running.",
        )
    for site in found:
        if site.flat or site.share != 0:
            sites.setdefault((site.reason, site.mend), []).append(site)
    for (reason, mend), alike in sites.items():
        kinds = ", ".join(dict.fromkeys(site.kind for site in alike))
        yield Finding(
            "warning",
            join(site.name for site in alike),
            f"{kinds} is not smooth: {reason}.",
            mend,
        )


def _nonsmooth(model: nn.Module, x: Tensor | None) -> tuple[tuple[NonSmooth, ...], Exception | None]:
    """What a run meets, or what the code shows if there is no run; and why there is none, though there is an x."""
    if x is None:
        return find_nonsmooth(model), None
    try:
        return find_nonsmooth(model, x.clone()), None
    except Exception as error:  # a model that cannot be copied, say
        return find_nonsmooth(model), error


def _inspect_batch_norm(model: nn.Module, device: torch.device) -> Iterator[Finding]:
    coupling = set(batch_norms(model))
    live = {name: module for name, module in model.named_modules() if module in coupling}
    if live:
        parallel = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        yield Finding(
            "warning",
            join(live),
            "BatchNorm takes its statistics from the batch: a sample's input gradient depends on the others"
            + (" on its rank." if parallel else "."),
            "Set these modules to eval(), or use GroupNorm; or leave them so, knowing it.",
        )
    sync = {name: module for name, module in live.items() if isinstance(module, nn.SyncBatchNorm) and module.training}
    if sync:
        fails = any(_synchronizes(module, device) for module in sync.values())
        yield Finding(
            "error" if fails else "warning",
            join(sync),
            "SyncBatchNorm has no second derivative"
            + (", and no CPU kernel." if fails else "; it will fail once there is more than one process."),
            "Use GroupNorm, plain BatchNorm, or these modules in eval mode.",
        )


def _synchronizes(module: nn.SyncBatchNorm, device: torch.device) -> bool:
    """Whether the layer leaves plain BatchNorm's path; on a CPU that raises, whatever the number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return device.type == "cpu" or dist.get_world_size(module.process_group) > 1

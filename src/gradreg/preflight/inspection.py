"""What can be said of a step without running it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gradreg import findings as table
from gradreg.findings import Finding
from gradreg.model_checks import batch_statistics
from gradreg.modes import batch_norms
from gradreg.preflight.step import Step, tensors_in
from gradreg.smooth import NonSmooth, find_nonsmooth
from gradreg.trees import Inputs
from gradreg.wrappers import frees_parameters, is_quantized, is_sharded, is_static


def inspect(step: Step) -> Iterator[Finding]:
    """What can be seen without running the model."""
    yield from _inspect_tensors(step)
    modules = dict(step.model.named_modules())
    static = [name for name, module in modules.items() if is_static(module)]
    if static and step.takes_input_gradients:
        yield table.STATIC_GRAPH.at(static)
    sharded = {name: module for name, module in modules.items() if is_sharded(module)}
    if step.twice and any(map(frees_parameters, sharded.values())):
        yield table.FREED_PARAMETERS.at(sharded)
    if sharded:
        yield table.SHARDED.at(sharded)
    yield from _inspect_batch_norm(step, modules)


def _inspect_tensors(step: Step) -> Iterator[Finding]:
    x, parameters = step.inputs.x, dict(step.model.named_parameters())
    batch = list(tensors_in([step.x, step.y]))
    if any(tensor.is_meta for tensor in (*batch, *parameters.values(), *step.model.buffers())):
        yield table.META
    elif any(tensor.is_inference() and tensor is not x for tensor in batch):
        yield table.MADE_IN_INFERENCE_MODE
    elif not x.is_floating_point():
        yield table.IDS.at(dtype=x.dtype)
    if lazy := [name for name, parameter in parameters.items() if is_lazy(parameter)]:
        yield table.LAZY.at(_modules_of(lazy))
    if inference := [name for name, parameter in parameters.items() if name not in lazy and parameter.is_inference()]:
        yield table.INFERENCE_PARAMETERS.at(_modules_of(inference))
    named = step.model.named_modules()
    if quantized := [name for name, module in named if is_quantized(module) and "_packed" not in name]:
        yield table.QUANTIZED.at(quantized)
    elif not any(parameter.requires_grad for parameter in (*parameters.values(), *step.objective.parameters())):
        yield table.FROZEN


def _modules_of(parameters: list[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in parameters]


def _inspect_batch_norm(step: Step, modules: dict[str, nn.Module]) -> Iterator[Finding]:
    coupling = set(batch_norms(step.model))
    live = {name: module for name, module in modules.items() if module in coupling}
    if live and step.penalizes:
        parallel = any(isinstance(module, DistributedDataParallel) for module in modules.values())
        yield batch_statistics(list(live.values()), " on its rank" if parallel else "").at(live)
    sync = {name: module for name, module in live.items() if isinstance(module, nn.SyncBatchNorm) and module.training}
    if not sync:
        return
    communicates = dist.is_available() and dist.is_initialized()
    on_cpu = step.inputs.x.device.type == "cpu"
    if communicates and (on_cpu or step.twice and _has_several(sync)):
        yield table.SYNC_BATCH_NORM.at(sync)
    elif communicates and _has_several(sync):
        yield table.SYNC_BATCH_NORM_WAITS.at(sync)
    elif step.twice:
        yield table.SYNC_BATCH_NORM_ALONE.at(sync)


def _has_several(sync: dict[str, nn.SyncBatchNorm]) -> bool:
    return any(dist.get_world_size(module.process_group) > 1 for module in sync.values())


def inspect_activations(step: Step, *, runs: bool) -> Iterator[Finding]:
    """What is not smooth: what the batch meets of it, or what the code shows if the model cannot be run."""
    sites: dict[tuple[str, str], list[NonSmooth]] = {}
    found: tuple[NonSmooth, ...] | None = None
    if runs:
        try:
            found = _met(step.model, step.inputs)
        except Exception as error:  # a model that cannot be copied, say
            yield table.READ_FROM_CODE.at(error=f"{type(error).__name__}: {error}")
    for site in find_nonsmooth(step.model) if found is None else found:
        if site.flat or site.share != 0:
            sites.setdefault((site.reason, site.fix), []).append(site)
    for (reason, fix), alike in sites.items():
        kinds = ", ".join(dict.fromkeys(site.kind for site in alike))
        yield replace(table.NOT_SMOOTH.at([site.name for site in alike], kinds=kinds, reason=reason), fix=fix)


def _met(model: nn.Module, inputs: Inputs) -> tuple[NonSmooth, ...]:
    x = inputs.x.detach().clone()
    if inputs.is_tensor:
        return find_nonsmooth(model, x)
    sites = find_nonsmooth(_OfOneInput(model, inputs), x)
    return tuple(replace(site, name=site.name.removeprefix("model").removeprefix(".")) for site in sites)


@final
class _OfOneInput(nn.Module):
    """A model as a function of the input that is perturbed."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, x: Tensor) -> Any:
        return self.inputs.given_to(self.model, x)

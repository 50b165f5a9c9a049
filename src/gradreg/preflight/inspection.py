"""What can be said of a step without running it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradreg import findings as table
from gradreg.findings import Finding
from gradreg.model_checks import seen_in
from gradreg.preflight.step import Step, instances_in
from gradreg.smooth import NonSmooth, find_nonsmooth
from gradreg.trees import Inputs
from gradreg.wrappers import in_process_group, is_quantized, is_sharded


def inspect(step: Step) -> Iterator[Finding]:
    """What can be seen without running the model."""
    yield from _inspect_tensors(step)
    modules = dict(step.model.named_modules())
    if step.takes_input_gradients:
        yield from seen_in(step.model, penalizes=step.penalizes, second_order=step.twice)
    if sharded := [name for name, module in modules.items() if is_sharded(module)]:
        yield table.SHARDED.at(sharded)
    sync = {name: module for name, module in modules.items() if isinstance(module, nn.SyncBatchNorm)}
    if any(module.training for module in sync.values()):
        group = in_process_group()
        several = group and any(dist.get_world_size(module.process_group) > 1 for module in sync.values())
        if group and (several or step.inputs.x.device.type == "cpu"):
            yield table.SYNC_BATCH_NORM.at(sync)
        elif step.twice:
            yield table.SYNC_BATCH_NORM_ALONE.at(sync)


def _inspect_tensors(step: Step) -> Iterator[Finding]:
    x, parameters = step.inputs.x, dict(step.model.named_parameters())
    batch = instances_in([step.x, step.y], Tensor)
    if any(tensor.is_meta for tensor in (*batch, *parameters.values(), *step.model.buffers())):
        yield table.META
    elif not x.is_floating_point():
        yield table.IDS.at(dtype=x.dtype)
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    inference = [name for name, parameter in parameters.items() if name not in lazy and parameter.is_inference()]
    for names, entry in ((lazy, table.LAZY), (inference, table.INFERENCE_PARAMETERS)):
        if names:
            yield entry.at(name.rpartition(".")[0] for name in names)
    quantized = [name for name, module in step.model.named_modules() if is_quantized(module) and "_packed" not in name]
    if quantized:
        yield table.QUANTIZED.at(quantized)
    elif not any(parameter.requires_grad for parameter in (*parameters.values(), *step.objective.parameters())):
        yield table.FROZEN


def inspect_activations(step: Step, *, runs: bool) -> Iterator[Finding]:
    """What is not smooth: what the batch meets of it, or what the code shows if the model cannot be run."""
    sites: dict[tuple[str, str], list[NonSmooth]] = {}
    try:
        found = _met(step.model, step.inputs) if runs else find_nonsmooth(step.model)
    except Exception as error:  # a model that cannot be copied, say
        yield table.READ_FROM_CODE.at(error=f"{type(error).__name__}: {error}")
        found = find_nonsmooth(step.model)
    for site in found:
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
        self.model, self.inputs = model, inputs

    def forward(self, x: Tensor) -> Any:
        return self.inputs.given_to(self.model, x)

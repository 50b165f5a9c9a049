"""Trains the same model on two gloo ranks in every supported way; test_distributed.py reads what each way gave.

Every case returns the largest relative error of its parameter gradients (or, after steps, of its parameters) against
one process on the whole batch, in float64, or the message of the exception that it raised.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradreg import (
    NFGSM,
    Attack,
    Curvature,
    EdgeAlignmentPenalty,
    FiniteDifference,
    GradientAlignment,
    GradNormPenalty,
    JacobianPenalty,
    Linf,
    LocalLinearity,
    LogitPairing,
    PenalizedLoss,
    PenalizedModel,
    PGDAttack,
    RememberedStart,
    SpikeWeight,
    Term,
    WorstLocalLinearity,
    find_nonsmooth,
    true_class,
)

from processes import leave

RANKS = 2
CRITERION = nn.CrossEntropyLoss(reduction="none")


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.Linear(96, 24), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(24, 4)).double()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4 * RANKS, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (len(x),), generator=generator)


def _shard(tensor: Tensor) -> Tensor:
    return tensor.chunk(RANKS)[dist.get_rank()]


def _objective(**options: object) -> PenalizedLoss:
    terms = {
        "grad_norm": Term(GradNormPenalty(Linf(0.1)), weight=1.2),
        "edges": Term(EdgeAlignmentPenalty(sigma=0.6, of=true_class()), weight=0.5),
    }
    return PenalizedLoss(CRITERION, terms, loss_weight=0.8, **options)


def _reference(objective: PenalizedLoss) -> list[Tensor]:
    model, (x, y) = _model(), _batch()
    return list(torch.autograd.grad(objective(model, x, y).total, list(model.parameters())))


def _reference_by_parts(objective: PenalizedLoss, make: Callable[[], nn.Module] = _model) -> list[Tensor]:
    """One process that goes through the parts of all ranks, with the random numbers of each.

    For what depends on who is in a batch: random numbers, and the step of a finite difference, which is one for all.
    """
    gradients = []
    for rank, part in enumerate(zip(*(tensor.chunk(RANKS) for tensor in _batch()), strict=True)):
        single = make()
        torch.manual_seed(rank)
        gradients.append(torch.autograd.grad(objective(single, *part).total, list(single.parameters())))
    return [sum(parts) / RANKS for parts in zip(*gradients, strict=True)]


def _error(model: nn.Module, expected: list[Tensor]) -> float:
    largest = max(value.abs().max().item() for value in expected)
    found = [parameter.grad for parameter in model.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) / largest


def _together(**options: object) -> float:
    """Model and objective in one module, wrapped: the recommended form."""
    objective, (x, y) = _objective(), _batch()
    wrapped = DistributedDataParallel(PenalizedModel(_model(), objective), **options)
    for _ in range(3):  # static_graph learns in the first iteration and acts from the second on
        wrapped.zero_grad()
        wrapped(_shard(x), _shard(y)).total.backward()
    return _error(wrapped, _reference(objective))


def _outside(**options: object) -> float:
    """The model alone is wrapped; the objective takes its gradient outside."""
    objective, (x, y) = _objective(), _batch()
    wrapped = DistributedDataParallel(_model(), **options)
    for _ in range(3):
        wrapped.zero_grad()
        objective(wrapped, _shard(x), _shard(y)).total.backward()
    return _error(wrapped, _reference(objective))


def _five_steps(dtype: torch.dtype, **options: object) -> float:
    """The parameters after five optimiser steps, each on two parts of its batch; SGD does not divide by noise."""
    objective, (x, y) = _objective(), _batch()
    single, model = _model().to(dtype), _model().to(dtype)
    wrapped = DistributedDataParallel(PenalizedModel(model, objective), **options)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (model, single)]
    parts = list(zip(_shard(x.to(dtype)).chunk(2), _shard(y).chunk(2), strict=True))
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with wrapped.no_sync():
            (wrapped(*parts[0]).total / 2).backward()
        (wrapped(*parts[1]).total / 2).backward()
        objective(single, x.to(dtype), y).total.backward()
        for optimizer in optimizers:
            optimizer.step()
    largest = max(parameter.abs().max().item() for parameter in single.parameters())
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs) / largest


def _accumulated(objective: PenalizedLoss) -> float:
    """Two parts of each rank's batch, of which only the second exchanges gradients."""
    x, y = _batch()
    wrapped = DistributedDataParallel(PenalizedModel(_model(), objective))
    first, second = (list(zip(_shard(x).chunk(2), _shard(y).chunk(2), strict=True))[i] for i in (0, 1))
    with wrapped.no_sync():
        (wrapped(*first).total / 2).backward()
    (wrapped(*second).total / 2).backward()
    return _error(wrapped, _reference(objective))


def _finite_difference(**options: object) -> float:
    objective, (x, y) = _objective(differentiation=FiniteDifference(0.1, Linf(0.1))), _batch()
    wrapped = DistributedDataParallel(PenalizedModel(_model(), objective), **options)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(_shard(x), _shard(y)).total.backward()
    return _error(wrapped, _reference_by_parts(objective))


RECOMMENDED = NFGSM(Linf(0.1), share=0.5)
STEADY = NFGSM(Linf(0.1), noise=0.0)  # draws nothing that two ranks would draw otherwise than one
PGD = PGDAttack(Linf(0.1), steps=2, best=False)


def _dropping() -> nn.Module:
    model = _model()
    model[5] = nn.Sequential(nn.SiLU(), nn.Dropout(0.3))
    return model


def _normalising() -> nn.Module:
    model = _model()
    model[1] = nn.BatchNorm2d(6).double()
    return model


def _drawn_by_each_rank(
    objective: PenalizedLoss, make: Callable[[], nn.Module], *, outside: bool, **options: object
) -> float:
    """Each rank draws numbers of its own, which one process then draws for each part."""
    x, y = _batch()
    model = make()
    wrapped = DistributedDataParallel(model if outside else PenalizedModel(model, objective), **options)
    for _ in range(3):
        wrapped.zero_grad()
        torch.manual_seed(dist.get_rank())
        out = objective(wrapped, _shard(x), _shard(y)) if outside else wrapped(_shard(x), _shard(y))
        out.total.backward()
    return _error(wrapped, _reference_by_parts(objective, make))


def _at(at: Attack, make: Callable[[], nn.Module] = _model, *, outside: bool = False, **options: object) -> float:
    """The loss where an attack goes; each rank draws numbers of its own, which one process then draws for each part."""
    penalised = bool(options.pop("penalised", False))
    objective = _objective(at=at) if penalised else PenalizedLoss(CRITERION, at=at)
    return _drawn_by_each_rank(objective, make, outside=outside, **options)


def _half_of_equal_samples(**options: object) -> float:
    """Whichever half of each rank's samples is attacked, it is what one process does with the whole batch."""
    objective, (x, y) = PenalizedLoss(CRITERION, at=NFGSM(Linf(0.1), noise=0.0, share=0.5)), _batch()
    x, y = x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone()
    together = DistributedDataParallel(PenalizedModel(_model(), objective), **options)
    outside = DistributedDataParallel(_model())
    for _ in range(3):
        together.zero_grad()
        outside.zero_grad()
        together(_shard(x), _shard(y)).total.backward()
        objective(outside, _shard(x), _shard(y)).total.backward()
    model = _model()
    expected = list(torch.autograd.grad(objective(model, x, y).total, list(model.parameters())))
    return max(_error(together, expected), _error(outside, expected))


def _after_an_attack() -> float:
    """An attack through the wrapper leaves its reducer as it was."""
    objective, (x, y) = _objective(), _batch()
    wrapped = DistributedDataParallel(_model())
    PGDAttack(Linf(0.1), steps=2, seed=0)(wrapped, _shard(x), _shard(y))
    objective(wrapped, _shard(x), _shard(y)).total.backward()
    return _error(wrapped, _reference(objective))


def _sharded(objective: PenalizedLoss, prepare: Callable[[nn.Module], None], reshard: bool) -> float:
    """Three optimiser steps of a fully sharded model against the same of one process."""
    x, y = _batch()
    model, single = _model(), _model()
    for block in (model[0], model[4]):
        fully_shard(block)
    fully_shard(model)
    prepare(model)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in (model, single)]
    for _ in range(3):
        objective(model, _shard(x), _shard(y)).total.backward()
        if reshard:
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        for part in zip(x.chunk(RANKS), y.chunk(RANKS), strict=True):
            (objective(single, *part).total / RANKS).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = [parameter.full_tensor().detach() for parameter in model.parameters()]
    return max((a - b.detach()).abs().max().item() for a, b in zip(found, single.parameters(), strict=True))


def _menu(
    make: Callable[[], nn.Module] = _model,
    *,
    outside: bool = False,
    differentiation: FiniteDifference | None = None,
    **options: object,
) -> float:
    """Penalties of one gradient and of several, of values and of pairs, and of the half that an attack has moved."""
    threat = Linf(0.1)
    penalties = [
        GradNormPenalty(threat, squared=True),
        JacobianPenalty(),
        Curvature(threat),
        GradientAlignment(threat),
        LocalLinearity(threat),
        WorstLocalLinearity(threat),
        LogitPairing("kl", PGD),
        LogitPairing("logits", "clean"),
        LogitPairing("js", "start"),
    ]
    terms = {penalty.name: Term(penalty) for penalty in penalties}
    objective = PenalizedLoss(CRITERION, terms, at=RECOMMENDED, differentiation=differentiation)
    return _drawn_by_each_rank(objective, make, outside=outside, **options)


def _remembered(per: str) -> float:
    """The starts of all ranks are those of one process with the whole batch, after three steps."""
    kept = []
    for alone in (True, False):
        start = RememberedStart((2, 6, 6), per=per, count=1 if per == "all" else 4, momentum=0.5, step=0.3)
        objective = PenalizedLoss(CRITERION, at=replace(STEADY, start=start, bounds=None))
        model, (x, y) = _model(), _batch()
        wrapped = model if alone else DistributedDataParallel(PenalizedModel(model, objective))
        for _ in range(3):
            if alone:  # on both ranks alike, so that their average is that of one
                objective(wrapped, x, y)
            else:
                wrapped(_shard(x), _shard(y)).total.backward()
        kept.append(start.perturbations)
    return (kept[0] - kept[1]).abs().max().item()


def _controlled() -> float:
    """What is measured differs by rank; the weight that follows from it does not."""
    weight = SpikeWeight("line", peak=1.0, deviations=0.1)
    objective = PenalizedLoss(CRITERION, {"line": Term(LocalLinearity(Linf(0.5)), weight)})
    wrapped, (x, y) = DistributedDataParallel(PenalizedModel(_model(), objective)), _batch()
    for step in range(8):
        torch.manual_seed(10 * step + dist.get_rank())
        wrapped(_shard(x), _shard(y)).total.backward()
    weights = [torch.zeros(()) for _ in range(RANKS)]
    dist.all_gather(weights, weight.weight)
    return (weights[0] - weights[1]).abs().item() if any(weights) else 1.0


def _kinks_found_by_one_rank() -> float:
    """One rank alone looks into models whose forward would wait for the other; 1 if it finds something else."""
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(2)]
    inside, outside = map(DistributedDataParallel, layers)
    if dist.get_rank():
        return 0.0
    models = nn.Sequential(nn.Identity(), inside), torch.compile(outside)
    found = [site.name for model in models for site in find_nonsmooth(model, torch.randn(8, 6))]
    return float(found != ["1.module.2", "_orig_mod.module.2"])


CASES: dict[str, Callable[[], float]] = {
    "ddp together": _together,
    "ddp together, static_graph": lambda: _together(static_graph=True),
    "ddp together, find_unused_parameters": lambda: _together(find_unused_parameters=True),
    "ddp together, gradient_as_bucket_view": lambda: _together(gradient_as_bucket_view=True),
    "ddp together, tiny buckets": lambda: _together(bucket_cap_mb=1e-4),
    "ddp together, no_sync accumulation": lambda: _accumulated(_objective()),
    "ddp five steps, float64": lambda: _five_steps(torch.float64),
    "ddp five steps, float32": lambda: _five_steps(torch.float32),
    "ddp five steps, find_unused_parameters": lambda: _five_steps(torch.float64, find_unused_parameters=True),
    "ddp outside": _outside,
    "ddp outside, static_graph": lambda: _outside(static_graph=True),
    "ddp finite differences": _finite_difference,
    "ddp finite differences, static_graph": lambda: _finite_difference(static_graph=True),
    "ddp recommended together": lambda: _at(RECOMMENDED),
    "ddp recommended together, static_graph": lambda: _at(RECOMMENDED, static_graph=True),
    "ddp recommended together, find_unused_parameters": lambda: _at(RECOMMENDED, find_unused_parameters=True),
    "ddp recommended together, tiny buckets": lambda: _at(RECOMMENDED, bucket_cap_mb=1e-4),
    "ddp recommended together, dropout": lambda: _at(RECOMMENDED, _dropping),
    "ddp recommended together, dropout, static_graph": lambda: _at(RECOMMENDED, _dropping, static_graph=True),
    "ddp recommended together, BatchNorm": lambda: _at(RECOMMENDED, _normalising),
    "ddp recommended together, with penalties": lambda: _at(RECOMMENDED, penalised=True),
    "ddp recommended together, no_sync accumulation": lambda: _accumulated(PenalizedLoss(CRITERION, at=STEADY)),
    "ddp recommended outside": lambda: _at(RECOMMENDED, outside=True),
    "ddp recommended outside, static_graph": lambda: _at(RECOMMENDED, outside=True, static_graph=True),
    "ddp recommended outside, find_unused_parameters": lambda: _at(
        RECOMMENDED, outside=True, find_unused_parameters=True
    ),
    "ddp recommended outside, dropout": lambda: _at(RECOMMENDED, _dropping, outside=True),
    "ddp recommended outside, BatchNorm": lambda: _at(RECOMMENDED, _normalising, outside=True),
    "ddp recommended outside, with penalties": lambda: _at(RECOMMENDED, outside=True, penalised=True),
    "ddp recommended on equal samples": _half_of_equal_samples,
    "ddp recommended on equal samples, static_graph": lambda: _half_of_equal_samples(static_graph=True),
    "ddp recommended on equal samples, find_unused_parameters": lambda: _half_of_equal_samples(
        find_unused_parameters=True
    ),
    "ddp PGD together": lambda: _at(PGD),
    "ddp PGD together, static_graph": lambda: _at(PGD, static_graph=True),
    "ddp PGD outside": lambda: _at(PGD, outside=True),
    "ddp PGD outside, static_graph": lambda: _at(PGD, outside=True, static_graph=True),
    "ddp PGD outside, BatchNorm": lambda: _at(PGD, _normalising, outside=True),
    "ddp menu together": _menu,
    "ddp menu together, static_graph": lambda: _menu(static_graph=True),
    "ddp menu together, dropout": lambda: _menu(_dropping),
    "ddp menu together, finite differences": lambda: _menu(differentiation=FiniteDifference(0.1, Linf(0.1))),
    "ddp menu outside": lambda: _menu(outside=True),
    "ddp start for all": lambda: _remembered("all"),
    "ddp start for each class": lambda: _remembered("class"),
    "ddp controller": _controlled,
    "ddp after an attack": _after_an_attack,
    "ddp kinks found by one rank": _kinks_found_by_one_rank,
    "fsdp2 double backward, defaults": lambda: _sharded(_objective(), lambda model: None, False),
    "fsdp2 double backward, recipe": lambda: _sharded(
        _objective(), lambda model: model.set_reshard_after_backward(False, recurse=True), True
    ),
    "fsdp2 double backward, reshard forgotten": lambda: _sharded(
        _objective(), lambda model: model.set_reshard_after_backward(False, recurse=True), False
    ),
    "fsdp2 finite differences": lambda: _sharded(
        _objective(differentiation=FiniteDifference(0.1, Linf(0.1))), lambda model: None, False
    ),
    "fsdp2 central finite differences": lambda: _sharded(
        _objective(differentiation=FiniteDifference(0.1, Linf(0.1), "central")), lambda model: None, False
    ),
    "fsdp2 recommended": lambda: _sharded(PenalizedLoss(CRITERION, at=STEADY), lambda model: None, False),
    "fsdp2 recommended, with finite differences": lambda: _sharded(
        _objective(at=STEADY, differentiation=FiniteDifference(0.1, Linf(0.1))), lambda model: None, False
    ),
    "fsdp2 PGD": lambda: _sharded(
        PenalizedLoss(CRITERION, at=replace(PGD, random_start=False)), lambda model: None, False
    ),
}


def _run(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    results: dict[str, float | str] = {}
    for name, case in CASES.items():
        try:
            results[name] = case()
        except (RuntimeError, AttributeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    gathered: list[object] = [None] * RANKS
    dist.all_gather_object(gathered, copy.deepcopy(results))
    if rank == 0:
        Path(output).write_text(json.dumps(gathered))
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(str(Path(folder) / "store"), sys.argv[1]), nprocs=RANKS)

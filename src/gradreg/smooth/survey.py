"""Lists what is not smooth in a model, and where each such thing could be replaced.

A site is either an attribute that holds an activation, or a method that calls one: the two things that ``replace`` can
change. It is found from the types of the modules and from the code of the methods that their forwards reach, so that a
survey needs no input, costs milliseconds and leaves the model alone. What smoothify leaves is therefore what a second
survey finds. With a batch at hand, ``probe`` says of each site whether it matters, and finds what cannot be read.
"""

import dataclasses
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gradreg.smooth.activations import BELOW, BY_HAND, FUNCTIONS, OFF_THE_WAY, OPERATIONS, Operation, operation_of
from gradreg.smooth.calls import derivation_of, is_smooth
from gradreg.smooth.probe import Tried, probe
from gradreg.smooth.reading import Reading, mentions, read

_UNREADABLE = "Smoothify the model before torch.jit.trace, or look into it by find_nonsmooth(model, x)."
_RECURRENT = 'Make it with nonlinearity="tanh".'
_QUANTIZED = "Smoothify the model before it is prepared for quantisation."
_OBSTRUCTED = "smoothify does not reach it: fix what keeps it from there, or put a smooth activation in by hand."
_BRANCH = "It may stay if both sides agree where they meet."


@final
@dataclass(frozen=True)
class NonSmooth:
    """Something in a model that is not twice continuously differentiable in its input.

    Attributes:
        name: The module, as ``named_modules`` calls it; empty for the model itself.
        kind: The class of the module (``"ReLU"``), or the call in its code (``"F.relu"``).
        reason: What is wrong with it, and where :func:`smoothify` leaves it, why.
        fix: What to do about it.
        flat: Whether its second derivative is zero almost everywhere, so that a gradient penalty cannot act through it:
            ReLU and its like, hard gates, shrinkage. Not so for an ELU or max pooling, which are smooth in between,
            for clamping, which may limit anything, nor for rounding, which has no gradient at all.
        share: With a batch, the part of its outputs that has a kink or a step on the way from the batch to its
            neighbour; None without one, or where it could not be tried.
    """

    name: str
    kind: str
    reason: str
    fix: str
    flat: bool
    share: float | None = None

    def __str__(self) -> str:
        measured = "" if self.share is None else f" (met in {self.share:.1%} of its outputs)"
        return f"{self.name or '(model)'}: {self.kind}: {self.reason}{measured}"


def find_nonsmooth(model: nn.Module, x: Tensor | None = None) -> tuple[NonSmooth, ...]:
    """List what in a model is not twice continuously differentiable in its input.

    **From its code**, without x, it looks at the types of the modules and at the byte code of their forward, and runs
    nothing. It sees

    * activation and max pooling modules of torch, and the hard gates of timm,
    * ReLUs in recurrent layers, and in layers prepared for quantisation,
    * calls of functions and tensor methods by name (``F.relu``, ``x.relu_()``, ``F.max_pool2d``, ``torch.round``) in
      the forward of a module and in methods, nested functions and Python helpers that it mentions, and functions held
      in plain attributes (``self.act = F.relu``).

    It names what it finds in lists and dictionaries, and code compiled by ``torch.jit``, but cannot look further there.
    It cannot see what is reached through ``getattr(F, name)``, properties, default arguments, hooks or objects that are
    called, operators and masks (``x * (x > 0)``, ``torch.where``), and code in C++. A name counts even where its branch
    is never taken. Max pooling and clamping have kinks, but most of their second derivative is that of what they
    select, so they matter less than a ReLU: :attr:`NonSmooth.flat` tells.

    **From its behaviour**, with x, it also runs copies of the model, on x and on x plus noise of x's own standard
    deviation. Each operation is then tried at 33 points of the straight line between what it was given in the two runs,
    and ever more closely where its value, slope or curvature seem to jump. What the code names and x does not reach is
    left out: a branch not taken, an activation of a position table. What it reaches has its :attr:`NonSmooth.share`,
    which is 0 for a guard that is not met. What the code does not show is named by its operation (``aten.topk``). A
    kink that lies elsewhere is not met; another batch may meet it.

    * A module that runs other operations for x plus noise is named as a branch. The rest of its operations cannot be
      tried, so that what its code names has no share; the modules that it calls in both runs are tried.
    * A step with a straight-through gradient is listed, because its values do jump. Its reason says that no gradient
      passes through it, and its fix that it may stay.
    * The copies run in double precision; a model that cannot runs as it is.
    * The cost is that of up to five forward passes, and of 33 calls of every operation that is not known to be smooth.
      It grows with the batch: give a few inputs (``x[:16]``) rather than thousands.
    * No copy of ``DistributedDataParallel`` talks to other processes, so that one rank may call this alone. With
      ``SyncBatchNorm`` in training mode all ranks have to.

    Args:
        model: The model; it is not changed. With x, the modes that it is in are those that are tried.
        x: A small batch of inputs, of shape ``(B, ...)``; without one, the code alone is looked at.

    Returns:
        What was found: first modules, then calls, each in the order of ``model.named_modules()``, then what only the
        run showed, in its order. A smooth model gives an empty tuple.

    Raises:
        TypeError: If the model is not an ``nn.Module``, or x not a tensor of real numbers.
        ValueError: If x is not a finite batch, or the model is sharded or has no values (meta device).

    Example:
        >>> for found in find_nonsmooth(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.MaxPool1d(2))):
        ...     print(found.name, found.kind, found.flat)
        1 ReLU True
        2 MaxPool1d False
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return abs(x) / x.norm(dim=1, keepdim=True).clamp(min=1e-6)
        >>> for found in find_nonsmooth(Model(), torch.randn(100, 5)):
        ...     print(found.kind, found.share > 0)
        torch.clamp False
        aten.abs True
    """
    check_module(model, "find_nonsmooth")
    surveyed = sites(model)
    if x is None:
        return tuple(dict.fromkeys(site.found for site in surveyed))
    return tuple(dict.fromkeys(_measured(model, surveyed, probe(model, x))))


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def check_module(model: object, caller: str) -> None:
    """Raise a TypeError if the model is not an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected the model to be an nn.Module, got {type(model).__name__}.")


@final
@dataclass(frozen=True)
class Site:
    """One non-smooth thing, and where it is.

    Attributes:
        found: What is told of it.
        operation: Its name in the table of operations; empty for what cannot be read.
        owner: The module that holds or calls it.
        key: The attribute or the method of the owner; empty if the model itself is the activation.
        where: Whether the attribute or the method is to be replaced; None if it stays.
        untraced: Whether the method mentions a function that ``torch.compile`` hides from function modes.
    """

    found: NonSmooth
    operation: str
    owner: nn.Module
    key: str
    where: Literal["attribute", "method"] | None
    untraced: bool = False


def sites(model: nn.Module) -> list[Site]:
    """Everything in a model that is not smooth."""
    names = {module: name for name, module in model.named_modules()}
    found = [*root_sites(model)]
    for owner, name in names.items():
        found += _attribute_sites(owner, name, names)
    for (owner, method), reading in _readings(names).items():
        found += _method_sites(owner, names[owner], method, reading)
    return found


def root_sites(model: nn.Module) -> Iterator[Site]:
    """The model itself, if it is an activation."""
    yield from _module_sites(model, "", model, "")


def _module_sites(module: nn.Module, name: str, owner: nn.Module, key: str) -> Iterator[Site]:
    operation, described = _describe(module)
    if described is not None:
        found = NonSmooth(name, type(module).__name__, described.reason, described.fix, described.flat)
        yield Site(found, operation, owner, key, "attribute" if described.replaceable else None)


def _describe(module: nn.Module) -> tuple[str, Operation | None]:
    if isinstance(module, torch.jit.ScriptModule):
        return "", Operation("compiled by torch.jit: its code cannot be read or replaced", _UNREADABLE)
    kind = derivation_of(module).base
    if isinstance(module, nn.RNN | nn.RNNCell) and module.nonlinearity == "relu":
        return "", Operation(OPERATIONS["relu"].reason, _RECURRENT, flat=True)
    if any("qat" in base.__module__.split(".") and "ReLU" in base.__name__ for base in kind.__mro__):
        return "", Operation(OPERATIONS["relu"].reason, _QUANTIZED, flat=True)
    operation = None if "forward" in vars(module) else operation_of(kind)
    return operation or "", OPERATIONS.get(operation or "")


def _attribute_sites(owner: nn.Module, name: str, registered: Container[nn.Module]) -> Iterator[Site]:
    if isinstance(owner, torch.jit.ScriptModule):
        return
    for key, child in owner._modules.items():
        if child is not None:
            yield from _module_sites(child, _join(name, key), owner, key)
    for key, value in vars(owner).items():
        if key not in _OF_EVERY_MODULE and isinstance(value, (list, tuple, dict)):
            for held in value.values() if isinstance(value, dict) else value:
                if not (isinstance(held, nn.Module) and held in registered):
                    yield from _held_sites(held, name, owner, key)
    # Held by these as a function, and read by a kernel that knows no function modes.
    if isinstance(owner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) and "activation" in vars(owner):
        operation = FUNCTIONS.get(owner.activation, "")
        where: Literal["attribute"] | None = "attribute" if operation else None
        for mentioned in [operation] if operation else sorted(mentions(owner.activation)):
            if (described := OPERATIONS[mentioned]).replaceable:
                fix = described.fix if where else _OBSTRUCTED
                found = NonSmooth(_join(name, "activation"), f"F.{mentioned}", described.reason, fix, described.flat)
                yield Site(found, mentioned, owner, "activation", where)


def _held_sites(held: object, name: str, owner: nn.Module, key: str) -> Iterator[Site]:
    """What is held in a container that is no part of the model, where nothing is replaced."""
    if isinstance(held, nn.Module):
        found = [(type(held).__name__, *_describe(held))]
    else:
        found = [(_kind(operation), operation, OPERATIONS[operation]) for operation in sorted(mentions(held))]
    for kind, operation, described in found:
        if described is not None and (described.flat or described.replaceable):
            reason = f"{described.reason}; held in ``{key}``, where smoothify does not look"
            yield Site(NonSmooth(name, kind, reason, _OBSTRUCTED, described.flat), operation, owner, key, None)


def _readings(modules: Iterable[nn.Module]) -> dict[tuple[nn.Module, str], Reading]:
    """Read the forward of every module, and each method of these modules that a method read so far mentions."""
    known = dict.fromkeys(modules)
    pending = deque((module, "forward") for module in known if _describe(module)[1] is None)
    readings: dict[tuple[nn.Module, str], Reading] = {}
    while pending:
        module, method = pending.popleft()
        if module in known and (module, method) not in readings:
            readings[module, method] = read(module, method)
            pending += readings[module, method].methods
    return readings


def checkpointing(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The methods that mention checkpointing."""
    return [place for place, reading in _readings(model.modules()).items() if reading.checkpoint]


def _method_sites(owner: nn.Module, name: str, method: str, reading: Reading) -> Iterator[Site]:
    for operation in sorted(reading.own | reading.within):
        described, obstacle = OPERATIONS[operation], ""
        if described.replaceable:
            if is_smooth(owner, method):
                continue
            obstacle = _obstacle(owner, method, reading)
        reason = f"{described.reason}; {obstacle}" if obstacle else described.reason
        fix = _OBSTRUCTED if obstacle else described.fix
        where: Literal["method"] | None = "method" if described.replaceable and not obstacle else None
        found = NonSmooth(name, _kind(operation), reason, fix, described.flat)
        yield Site(found, operation, owner, method, where, reading.untraced)
    if reading.scripted:
        reason = "compiled by torch.jit: what it computes cannot be read or replaced"
        yield Site(NonSmooth(name, "torch.jit.script", reason, _UNREADABLE, flat=False), "", owner, method, None)


def _kind(operation: str) -> str:
    return f"F.{operation}" if hasattr(F, operation) else f"torch.{operation}"


def _obstacle(owner: nn.Module, method: str, reading: Reading) -> str:
    kind = derivation_of(owner).base
    if derivation_of(owner).smooth:
        return "added after smoothify"
    if method in vars(owner):
        return f"``{method}`` was set on the instance: set it after smoothify"
    if is_parametrized(owner):
        return "this module is parametrised: smoothify the model before that"
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return "this class pickles in its own way: smoothify the model before it is traced or wrapped"
    if reading.checkpoint:
        return "checkpointing may run it again in the backward pass: move it into a method without checkpointing"
    return ""


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _measured(model: nn.Module, surveyed: Iterable[Site], tried: Iterable[Tried]) -> Iterator[NonSmooth]:
    """What the code shows and the run reached, with what it met; then what only the run showed."""
    names = {module: name for name, module in model.named_modules()}
    unread = [trial for trial in tried if trial.order is not None]
    for site in surveyed:
        own = [trial for trial in tried if _is_of(trial, site, names)]
        unread = [trial for trial in unread if trial not in own]
        flat = site.found.flat or (site.operation != "softsign" and any(map(_is_flat, own)))
        if site.found.fix == _UNREADABLE:  # it takes no hooks: what it runs is named after the module around it
            yield site.found
        elif own:
            share = max((trial.share for trial in own if trial.share is not None), default=None)
            broken = [trial for trial in own if trial.order is not None]
            found = dataclasses.replace(site.found, flat=flat, share=share)
            yield _detached(found) if broken and all(trial.detached for trial in broken) else found
    yield from map(_unread, unread)


def _is_of(trial: Tried, site: Site, names: Mapping[nn.Module, str]) -> bool:
    held = getattr(site.owner, site.key) if site.key else site.owner
    if isinstance(held, nn.Module):
        return trial.name == names[held]
    return trial.name == names[site.owner] and site.operation in BELOW.get(trial.operation, {trial.operation})


def _is_flat(trial: Tried) -> bool:
    return trial.flat and trial.order == 1


_JUMPS = "value jumps: a step, or a choice that depends on the input", "derivative jumps", "second derivative jumps"
_UNSURE = "value or derivative jumps: it chooses between numbers that may agree where the choice changes"
_DETACHED = "It may stay if that is meant, as in a straight-through gradient."


def _unread(trial: Tried) -> NonSmooth:
    if not trial.operation:
        reason = "for another input it runs other operations, or on other shapes: a branch, at which its value may jump"
        return NonSmooth(trial.name, "branch", reason, _BRANCH, flat=False, share=trial.share)
    order = trial.order or 0
    jump = Operation(f"its {_JUMPS[order] if trial.exact else _UNSURE}", BY_HAND if order else OFF_THE_WAY)
    known = OPERATIONS.get(trial.operation, jump)
    fix = _OBSTRUCTED if known.replaceable else known.fix
    found = NonSmooth(trial.name, f"aten.{trial.operation}", known.reason, fix, _is_flat(trial), trial.share)
    return _detached(found) if trial.detached else found


def _detached(found: NonSmooth) -> NonSmooth:
    return dataclasses.replace(found, reason=f"{found.reason}; no gradient passes through it", fix=_DETACHED)

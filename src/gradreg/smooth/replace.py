"""Puts smooth activations into a model, and reports what it replaced and what it left.

Everything is planned before anything is changed: the user's function that makes activations may raise, and the model
is then as it was. Every attribute gets a module of its own, also where one module was used several times: what is later
measured or changed at one site says nothing of another. Methods get a derived class, see ``calls``.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, final, overload

import torch
from torch import nn

from gradreg.smooth.activations import ACTIVATIONS, KERNELS, twin
from gradreg.smooth.calls import Derivation, derivation_of, derive, put_on
from gradreg.smooth.survey import NonSmooth, Site, check_module, checkpointing, find_nonsmooth, sites
from gradreg.wrappers import is_exported, is_quantized

# Attributes that unsmoothify reads: of an activation, what it stands for; of a transformer layer, its flags before.
REPLACED, FLAGS = "_gradreg_replaced", "_gradreg_flags"


@final
@dataclass(frozen=True)
class Replacement:
    """One exchange made by :func:`smoothify`.

    Attributes:
        name: As in :class:`NonSmooth`.
        old: What was there, as in :attr:`NonSmooth.kind`.
        new: The class of the activation that took its place.
    """

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.old} -> {self.new}"


@final
@dataclass(frozen=True)
class SmoothReport:
    """What :func:`smoothify` did.

    Attributes:
        replaced: The exchanges.
        remaining: What it left, :func:`find_nonsmooth` of the result.
    """

    replaced: tuple[Replacement, ...]
    remaining: tuple[NonSmooth, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}:", *(f"  {entry}" for entry in self.replaced)]
        lines += [f"remaining {len(self.remaining)}:", *(f"  {entry}" for entry in self.remaining)]
        return "\n".join(lines)


@overload
def smoothify(
    model: nn.Module,
    act: str | Callable[[], nn.Module] = "gelu",
    *,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: Literal[False] = False,
) -> nn.Module: ...
@overload
def smoothify(
    model: nn.Module,
    act: str | Callable[[], nn.Module] = "gelu",
    *,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: Literal[True],
) -> tuple[nn.Module, SmoothReport]: ...
def smoothify(
    model: nn.Module,
    act: str | Callable[[], nn.Module] = "gelu",
    *,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, SmoothReport]:
    r"""Replace the non-smooth activations of a model by smooth ones.

    With ReLU the input gradient is piecewise constant, its derivative is zero almost everywhere, and a penalty on it
    hardly reaches the weights; with GELU, SiLU, Softplus or Mish it does (Rodríguez Muñoz, "Adversarial robustness
    without perturbations", MIT 2024, section 4.3).

    ReLU, ReLU6, LeakyReLU, RReLU, ELU, CELU and SELU become ``act``. A gate becomes its own smooth twin: Hardsigmoid
    σ(x), Hardtanh the tanh between the same limits, Hardswish SiLU, timm's HardMish Mish. The ReLU kernel of a linear
    attention (``kernel_func`` in timm) becomes a Softplus, because it has to stay positive. Each site has its own
    activation; weights, training flags, hooks and the keys of the ``state_dict`` stay. PReLU stays, because its slope
    is a parameter, and so do max pooling, thresholds and shrinkage: see :attr:`SmoothReport.remaining`.
    :func:`unsmoothify` undoes it.

    Functional calls (``F.relu``, ``torch.relu``, ``x.relu_()``) become smooth as well: the methods that make them, or
    call Python helpers that do, run under a ``torch.overrides.TorchFunctionMode``, and other modules pay nothing. The
    class of such a module is then a subclass of its own, of the same name; pickling, copying, ``torch.func`` and
    ``torch.compile(fullgraph=True)`` work, a trace by ``torch.fx`` keeps ``x.relu()`` as it is. From function modes
    ``torch.compile`` hides ``F.hardsigmoid``, ``F.hardswish`` and in-place functions such as ``F.relu_``: methods that
    mention these are not compiled. What is replaced holds for everything run during the method, children
    included, but not for what ``keep`` names nor for what is checkpointed there. An in-place call still overwrites its
    input. A call in a method that checkpoints is left and reported, because it may be run again outside of the method.

    An ``nn.ReLU(inplace=True)`` module, however, becomes an activation that leaves its input alone, as it would when
    written by hand: a forward that ignores its return value needs an assignment.

    A replaced model is another function: train it, or fine-tune the weights of the old one. Fresh weights that no
    normalisation layers follow (VGG, SqueezeNet) are made to keep the scale of signals through ReLUs; a GELU halves
    signals that are small, and after the ten layers of VGG-11 they are 60 times smaller. Steeper activations keep it:
    ``act=functools.partial(nn.Softplus, beta=50)``.

    Args:
        model: The model. Give it before ``torch.compile``, ``torch.export``, ``torch.jit.trace`` or a parametrisation;
            ``torch.jit.script`` reads the code of functional calls as it was, and refuses the result.
        act: ``"gelu"`` (the exact one, with erf), ``"silu"``, ``"softplus"`` (with beta = 4·√(2/π) ≈ 3.19, whose
            second derivative at 0 is GELU's), ``"mish"``, or a function without arguments that returns a new
            ``nn.Module``, such as ``functools.partial(nn.Softplus, beta=10)``.
        keep: Names of what is to stay as it is, with ``*`` for any part, as a report or :func:`find_nonsmooth` gives
            them. A pretrained Swin V2, for one, has ReLUs that act on a table of positions and not on the input:
            ``keep=["*.cpb_mlp.*"]`` leaves that table as it was learnt.
        inplace: Change the model and return it, instead of a copy.
        return_report: Return ``(model, report)``.

    Returns:
        The smooth model, and the :class:`SmoothReport` if it was asked for.

    Raises:
        TypeError: If the model is not an ``nn.Module``, or is compiled, exported or quantised; or ``act`` is neither a
            name nor a function that returns an ``nn.Module``.
        ValueError: If the name is unknown; nothing is there to replace, or nothing of a name to keep; ``act`` returns
            an activation that is not smooth, the same module twice, or one with parameters, buffers or dropout for a
            functional call; or the model is itself an activation and ``inplace`` is set. The model is then as it was.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model, report = smoothify(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Hardsigmoid()), return_report=True)
        >>> print(report)
        replaced 2:
          1: ReLU -> GELU
          2: Hardsigmoid -> Sigmoid
        remaining 0:
    """
    check_module(model, "smoothify")
    _check_changeable(model)
    fresh = _Factory(act)
    found = [site for site in sites(model) if site.where]
    _check_kept(keep, found)
    if all(_is_kept(site, keep) for site in found):
        raise ValueError(
            f"smoothify: no activation that can be replaced was found in {type(model).__name__}. If the model is "
            "already smooth, leave smoothify out; otherwise find_nonsmooth(model) names what it sees and why that "
            "stays."
        )
    if inplace and not all(site.key for site in found):
        raise ValueError(
            f"smoothify: {type(model).__name__} is itself an activation and cannot become another: leave inplace out."
        )
    target = model if inplace else copied(model, "smoothify")
    there = sites(target)
    planned = _plan((site for site in there if not _is_kept(site, keep)), fresh)
    result = _apply(target, planned, [site for site in there if site.where and _is_kept(site, keep)])
    if not return_report:
        return result
    replaced = dict.fromkeys(_replacement(site, new) for site, new in planned)
    return result, SmoothReport(tuple(replaced), find_nonsmooth(result))


def copied(model: nn.Module, caller: str) -> nn.Module:
    """A copy of a model, or an error that says what to do about one that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{caller}: {type(model).__name__} cannot be copied ({error}). Pass inplace=True to change it itself."
        ) from error


def _check_changeable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if state := _unchangeable(module, is_whole=module is model):
            raise TypeError(
                f"smoothify: {name or 'the model'} is {state[0]} and cannot be changed: smoothify the model {state[1]}."
            )


def _unchangeable(module: nn.Module, *, is_whole: bool) -> tuple[str, str] | None:
    """What was done to a module, and when it should have been smoothified."""
    if isinstance(module, torch.jit.ScriptModule) and is_whole:  # a part of a model stays, and is reported
        return "compiled by torch.jit", "before torch.jit.trace"
    if "_orig_mod" in module._modules:
        return "compiled by torch.compile", "first, then compile it"
    if is_exported(module):
        return "exported by torch.export", "first, then export it"
    if is_quantized(module):
        return "quantised", "in floating point, train it, then quantise it"
    return None


def _check_kept(keep: Collection[str], found: Iterable[Site]) -> None:
    if isinstance(keep, str):
        raise TypeError(f"smoothify: expected keep to be a list of names, got the string {keep!r}.")
    names = [site.found.name for site in found]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            inside = any(fnmatchcase(name, f"{pattern}.*") for name in names)
            raise ValueError(
                f"smoothify: nothing that could be replaced is called {pattern!r}"
                + (f"; for all that is inside of it, write {pattern + '.*'!r}." if inside else f"; there are {names}.")
            )


def _is_kept(site: Site, keep: Iterable[str]) -> bool:
    return any(fnmatchcase(site.found.name, pattern) for pattern in keep)


@final
class _Factory:
    """Makes activations from the ``act`` of :func:`smoothify`, and checks each."""

    def __init__(self, act: str | Callable[[], nn.Module]) -> None:
        if isinstance(act, str):
            if act not in ACTIVATIONS:
                raise ValueError(
                    f"smoothify: expected act to be one of {', '.join(map(repr, ACTIVATIONS))} or a function that "
                    f"returns an nn.Module, got {act!r}."
                )
            act = ACTIVATIONS[act]
        if not callable(act) or isinstance(act, nn.Module):
            raise TypeError(
                "smoothify: expected act to be a name or a function without arguments that returns a new nn.Module, "
                f"such as nn.GELU, got {act!r}."
            )
        self._act = act
        self._made: list[nn.Module] = []

    def __call__(self) -> nn.Module:
        made = self._act()
        if not isinstance(made, nn.Module):
            raise TypeError(f"smoothify: act must return an nn.Module, as nn.GELU does; it returned {made!r}.")
        if any(made is other for other in self._made):
            raise ValueError("smoothify: act must return a new module at each call, and returned the same one twice.")
        # Its own call of F.relu, say, would be taken for one of the module around it.
        if unsmooth := [site.found for site in sites(made) if site.where or site.found.flat]:
            raise ValueError(f"smoothify: act must return a smooth activation, and returned one with {unsmooth[0]}.")
        self._made.append(made)
        return made

    def without_state(self) -> nn.Module:
        """An activation for functional calls: no part of the model, so that nothing of it moves with the model."""
        made = self()
        kept = [*made.parameters(), *made.buffers()]
        if kept or any(isinstance(module, nn.modules.dropout._DropoutNd) for module in made.modules()):
            raise ValueError(
                f"smoothify: {type(made).__name__} has parameters, buffers or dropout and cannot stand for a "
                "functional call: use an activation without, or make the call a module of the model."
            )
        return made


def _plan(found: Iterable[Site], fresh: _Factory) -> list[tuple[Site, nn.Module]]:
    """Each site with its activation; the methods of one module share one."""
    calling: dict[nn.Module, nn.Module] = {}
    planned = []
    for site in found:
        if site.where == "attribute":
            planned.append((site, _successor(site, fresh)))
        elif site.where == "method":
            if site.owner not in calling:
                calling[site.owner] = fresh.without_state()
            planned.append((site, calling[site.owner]))
    return planned


def _successor(site: Site, fresh: _Factory) -> nn.Module:
    old = getattr(site.owner, site.key) if site.key else site.owner
    operation = "kernel" if site.key in KERNELS and site.operation == "relu" else site.operation
    new = twin(operation, fresh, getattr(old, "min_val", -1.0), getattr(old, "max_val", 1.0))
    new.train((old if isinstance(old, nn.Module) else site.owner).training)
    vars(new)[REPLACED] = old
    if isinstance(old, nn.Module):
        # The same dictionaries and not copies of them, so that the handles of the hooks still remove them.
        vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})
    return new


def _apply(model: nn.Module, planned: list[tuple[Site, nn.Module]], kept: list[Site]) -> nn.Module:
    calling = {site.owner: new for site, new in planned if site.where == "method"}
    # Classes are made before anything is changed: a metaclass of the user's may raise.
    kinds = {module: derive(derivation) for module, derivation in _derivations(model, planned, kept).items()}
    for site, new in planned:
        if not site.key:
            return new
        if site.where == "attribute":
            setattr(site.owner, site.key, new)
    for module, kind in kinds.items():
        put_on(module, kind, calling.get(module))
    _set_fast_paths(model, {site.owner for site, _ in planned if site.key == "activation"})
    return model


def _derivations(
    model: nn.Module, planned: list[tuple[Site, nn.Module]], kept: list[Site]
) -> dict[nn.Module, Derivation]:
    """The modules that need a class of their own: with smooth methods, and with those that must not become so.

    What holds for a method holds for all that runs during it. So what is kept, or run again by checkpointing, has to be
    taken out of it.
    """
    smooth = [site for site, _ in planned if site.where == "method"]
    if not smooth:
        return {}
    plain = [*checkpointing(model), *(_plainly(site) for site in kept)]
    derivations: dict[nn.Module, Derivation] = {}
    for module in dict.fromkeys([*(site.owner for site in smooth), *(module for module, _ in plain)]):
        own = [site for site in smooth if site.owner is module]
        derivations[module] = Derivation(
            derivation_of(module).base,
            frozenset(site.key for site in own),
            frozenset(method for other, method in plain if other is module),
            any(site.untraced for site in own),
        )
    return derivations


def _plainly(site: Site) -> tuple[nn.Module, str]:
    """The method that has to stay as it is for a site to stay so."""
    if site.where == "method":
        return site.owner, site.key
    held = getattr(site.owner, site.key) if site.key else site.owner
    return (held if isinstance(held, nn.Module) else site.owner), "forward"


def _set_fast_paths(model: nn.Module, changed: set[nn.Module]) -> None:
    """Set the flags by which torch runs transformer layers, in eval mode without grad, in a kernel of its own.

    The kernel knows ReLU (1) and GELU (2); nested tensors, which an encoder makes of padded batches, need it.
    """
    for layer in changed:
        if isinstance(layer, nn.TransformerEncoderLayer):
            exact_gelu = isinstance(layer.activation, nn.GELU) and layer.activation.approximate == "none"
            _set_flag(layer, "activation_relu_or_gelu", 2 if exact_gelu else 0)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.layers[0] in changed:
            known = bool(module.layers[0].activation_relu_or_gelu)
            _set_flag(module, "use_nested_tensor", module.use_nested_tensor and known)


def _set_flag(module: nn.Module, name: str, flag: int) -> None:
    vars(module).setdefault(FLAGS, {}).setdefault(name, getattr(module, name))
    setattr(module, name, flag)


def _replacement(site: Site, new: nn.Module) -> Replacement:
    smooth = new if site.where == "attribute" else twin(site.operation, lambda: new)
    return Replacement(site.found.name, site.found.kind, type(smooth).__name__)

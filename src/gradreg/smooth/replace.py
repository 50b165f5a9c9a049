"""Puts smooth activations into a model, and reports what it replaced and what it left.

Every attribute gets an activation of its own, also where one module was used several times: what is later measured or
changed at one site says nothing of another. Calls in code are made smooth by hooks, see ``calls``.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from gradreg.agreement import Agreement, agreement
from gradreg.modes import evaluating
from gradreg.smooth.calls import hook, is_plain, unhook
from gradreg.smooth.survey import (
    TRANSFORMERS,
    NonSmooth,
    check_module,
    find_nonsmooth,
    function_of,
    operation_of_module,
)
from gradreg.smooth.twins import ACTIVATIONS, KERNELS, TWINS, SmoothActivation, operation_of, options_of
from gradreg.wrappers import is_exported, is_quantized

Act = str | Callable[[], nn.Module]
# Attributes that unsmoothify reads: of an activation, what it stands for; of a transformer layer, its flags before.
REPLACED, FLAGS = "_gradreg_replaced", "_gradreg_flags"
TRIED = (1.0, 2.0, 4.0, 8.0, 16.0)  # sharpness, of which a report recommends one
ENOUGH = 0.9  # of the decisions


@final
@dataclass(frozen=True)
class Replacement:
    """One exchange made by :func:`smoothify`.

    Attributes:
        name: The activation, as ``named_modules`` calls it, or the module that calls it.
        old: The class of the module that was there (``"ReLU"``), or the function (``"F.relu"``).
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
        replaced: The exchanges. Calls in code are among them where smoothify was given x.
        remaining: What it left, :func:`find_nonsmooth` of the result, of x if that was given.
    """

    replaced: tuple[Replacement, ...]
    remaining: tuple[NonSmooth, ...]
    _compare: Callable[[], dict[float, Agreement]] = field(default=dict, repr=False, compare=False)

    @cached_property
    def agreements(self) -> dict[float, Agreement]:
        """With x, how many of the model's decisions twins of several sharpnesses keep: five runs, when first asked."""
        return self._compare()

    @property
    def recommended_sharpness(self) -> float | None:
        """The smallest one that keeps 90 % of a trained network's decisions on x; None without x."""
        enough = (sharpness for sharpness, found in self.agreements.items() if found.same.value >= ENOUGH)
        return next(enough, max(self.agreements, default=None))

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}:", *(f"  {entry}" for entry in self.replaced)]
        if not self.replaced:
            lines = ["nothing to replace: its modules are smooth"]
        lines += [f"remaining {len(self.remaining)}:", *(f"  {entry}" for entry in self.remaining)]
        lines += [f"sharpness {sharpness:g}: {found}" for sharpness, found in self.agreements.items()]
        if self.agreements:
            lines.append(f"recommended for a trained network: sharpness={self.recommended_sharpness:g}")
        return "\n".join(lines)


@overload
def smoothify(
    model: nn.Module,
    act: Act = "gelu",
    sharpness: float = 1.0,
    *,
    x: Tensor | None = None,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: Literal[False] = False,
) -> nn.Module: ...
@overload
def smoothify(
    model: nn.Module,
    act: Act = "gelu",
    sharpness: float = 1.0,
    *,
    x: Tensor | None = None,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: Literal[True],
) -> tuple[nn.Module, SmoothReport]: ...
def smoothify(
    model: nn.Module,
    act: Act = "gelu",
    sharpness: float = 1.0,
    *,
    x: Tensor | None = None,
    keep: Collection[str] = (),
    inplace: bool = False,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, SmoothReport]:
    r"""Replace the non-smooth activations of a model by smooth ones.

    With ReLU the input gradient is piecewise constant, its derivative is zero almost everywhere, and a penalty on it
    hardly reaches the weights; with GELU, SiLU, softplus or Mish it does (Rodríguez Muñoz, "Adversarial robustness
    without perturbations", MIT 2024, section 4.3).

    ReLU becomes the ramp :math:`g(x) = a(bx) / b` of an activation a and a sharpness b, for GELU
    :math:`x\,\Phi(bx)`. Every other activation is a formula in ReLU, and becomes that formula in g, so that it keeps
    its bounds and its slopes:

    ==============  ========================================================================
    ReLU6           :math:`g(x) - g(x - 6)`
    Hardtanh        :math:`l + g(x - l) - g(x - h)`
    LeakyReLU       :math:`s x + (1 - s)\,g(x)`; RReLU with the mean slope
    ELU, CELU       :math:`g(x) + \alpha (e^{-g(-x) / c} - 1)`; SELU that, scaled
    Softshrink      :math:`g(x - \lambda) - g(-x - \lambda)`
    Hardsigmoid     :math:`(g(x + 3) - g(x - 3)) / 6` with a softplus, so that it stays in [0, 1]
    Hardswish       x times that; timm's HardMish likewise
    ==============  ========================================================================

    The ReLU kernel of a linear attention (``kernel_func`` in timm) becomes a softplus, because it has to stay positive.
    PReLU stays, because its slope is a parameter, and so do max pooling, thresholds and hard shrinkage: see
    :attr:`SmoothReport.remaining`. :func:`unsmoothify` undoes it.

    **Calls in code** (``F.relu``, ``torch.relu``, ``x.relu_()``, an ``nn.ReLU`` in a list) become smooth as well: all
    modules but PyTorch's own run under a ``torch.overrides.TorchFunctionMode``, which hooks enter and leave. That costs
    some microseconds at every operation of the model; with x only the modules have it that a run on x, in training or
    in evaluation mode, has seen make such a call. An in-place call still overwrites its input. Copying, pickling,
    ``torch.func``, ``torch.compile(fullgraph=True)`` and checkpointed modules work. Not reached are a function handed
    to checkpointing, code compiled by ``torch.jit``, and a forward that is called without its module
    (``model.forward_features(x)``, a trace by ``torch.fx``).

    Weights, training flags, hooks and the keys of the ``state_dict`` stay. An ``nn.ReLU(inplace=True)`` becomes an
    activation that leaves its input alone: a forward that ignores its return value needs an assignment.

    **A trained network** is another function after the exchange: fine-tune it. The sharper the twin the more it keeps
    of what it knows, and up to a sharpness of 8 the penalty lost nothing where that was measured (docs/smoothness.md):
    start at 4, or sharper, and let it fall, :func:`anneal_sharpness`. With x and ``return_report`` the report says how
    many decisions each sharpness keeps.

    **Without normalisation layers** (VGG, SqueezeNet) the small signals of fresh weights shrink from layer to layer:
    GELU halves what ReLU passes. With x a run of the model finds the standard deviation s of what each activation is
    given, and a module's sharpness is divided by s where that is below 1.

    Args:
        model: The model. Give it before ``torch.compile``, ``torch.export``, ``torch.jit.trace``, and before the
            optimiser is built.
        act: ``"gelu"`` (the exact one, with erf), ``"silu"``, ``"softplus"`` (of beta = 4·√(2/π) ≈ 3.19, whose second
            derivative at 0 is GELU's), ``"mish"``, ``"blend"`` (half SiLU, half softplus, whose mean error is 0), or a
            function without arguments that returns a new ``nn.Module``.
        sharpness: b.
        x: A few inputs, of shape ``(B, ...)``: see above.
        keep: Names of modules that stay as they are, with all that is inside of them, with ``*`` for any part. A
            pretrained Swin V2, for one, has ReLUs that act on a table of positions and not on the input:
            ``keep=["*.cpb_mlp"]`` leaves that table as it was learnt.
        inplace: Change the model and return it, instead of a copy.
        return_report: Return ``(model, report)``.

    Returns:
        The smooth model, and the :class:`SmoothReport` if it was asked for. A model that is smooth already comes back
        as it is.

    Raises:
        TypeError: If the model is not an ``nn.Module``, or is compiled, exported or quantised; or ``act`` is neither a
            name nor a function that returns an ``nn.Module``.
        ValueError: If a name is unknown or sharpness not above 0; ``act`` returns an activation that is not smooth, or
            the same module twice; or the model is itself an activation and ``inplace`` is set. The model is then as it
            was.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model, report = smoothify(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU6()), return_report=True)
        >>> print(report)
        replaced 2:
          1: ReLU -> GELU
          2: ReLU6 -> SmoothActivation
        remaining 0:
    """
    check_module(model, "smoothify")
    _check_changeable(model)
    fresh = _Factory(act, sharpness, adapts=x is not None and not _normalizes(model))
    if inplace and operation_of_module(model) in TWINS:
        raise ValueError(
            f"smoothify: {type(model).__name__} is itself an activation and cannot become another: leave inplace out."
        )
    before = copied(model, "smoothify") if x is not None and return_report else model
    target = model if inplace else copied(model, "smoothify")
    calls = None if x is None else _calls_in_all_modes(target, x)
    result, replaced, twins = _exchange(target, fresh, keep, calls)
    if x is not None and fresh.adapts:
        _keep_scale(result, twins, x)
    if not return_report:
        return result
    remaining = find_nonsmooth(result, x)
    if x is None or calls is None:
        return result, SmoothReport(tuple(replaced), remaining)
    smooth = sorted(calls - _calls_in(remaining))
    replaced += [Replacement(name, kind, fresh.kind_for(kind)) for name, kind in smooth]
    return result, SmoothReport(tuple(replaced), remaining, partial(_agreements, before, act, x, keep))


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


def _kept(model: nn.Module, keep: Collection[str]) -> tuple[set[nn.Module], set[nn.Module]]:
    """The modules that are to be kept, by their names, and all that is inside of them."""
    if isinstance(keep, str):
        raise TypeError(f"smoothify: expected keep to be a list of names, got the string {keep!r}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    outer: set[nn.Module] = set()
    for pattern in keep:
        found = {module for name, module in modules.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"smoothify: no module is called {pattern!r}; there are {[*modules][1:]}.")
        outer |= found
    return outer, {inside for module in outer for inside in module.modules()}


@final
class _Factory:
    """Makes twins from the ``act`` of :func:`smoothify`, and checks each."""

    def __init__(self, act: Act, sharpness: float, *, adapts: bool) -> None:
        if not sharpness > 0:
            raise ValueError(f"smoothify: sharpness must be above 0, got {sharpness}.")
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
        self._act, self.sharpness, self.adapts = act, float(sharpness), adapts
        self._made: list[nn.Module] = []
        self.for_calls = self._new()
        if unsmooth := [found for found in _tried(self.for_calls) if found.flat or found.kind.endswith("ELU")]:
            raise ValueError(f"smoothify: act must return a smooth activation, and returned one with {unsmooth[0]}.")
        # What has a state would have to be a part of the model.
        state = [*self.for_calls.parameters(), *self.for_calls.buffers()]
        drops = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.for_calls.modules())
        self.reaches_calls = not state and not drops

    def _new(self) -> nn.Module:
        made = self._act()
        if not isinstance(made, nn.Module):
            raise TypeError(f"smoothify: act must return an nn.Module, as nn.GELU does; it returned {made!r}.")
        if any(made is other for other in self._made):
            raise ValueError("smoothify: act must return a new module at each call, and returned the same one twice.")
        self._made.append(made)
        return made

    def twin(self, operation: str, options: dict[str, float]) -> nn.Module:
        """The twin of an operation; PyTorch's own activation where it is one."""
        act = self._new()
        if operation == "relu" and self.sharpness == 1 and not self.adapts:
            return act
        return SmoothActivation(operation, act, self.sharpness, options)

    def kind_for(self, kind: str) -> str:
        """The class of the twin of a function."""
        own = kind in ("F.relu", "torch.relu") and self.sharpness == 1
        return type(self.for_calls if own else SmoothActivation("relu", self.for_calls)).__name__


def _tried(act: nn.Module) -> tuple[NonSmooth, ...]:
    """What is not smooth in an activation."""
    by_type = find_nonsmooth(act)
    if by_type or any(tensor.is_meta for tensor in (*act.parameters(), *act.buffers())):
        return by_type
    with torch.device("cpu"):
        return find_nonsmooth(act, torch.linspace(-4, 4, 100).view(10, 10))


def _exchange(
    model: nn.Module, fresh: _Factory, keep: Collection[str], calls: set[tuple[str, str]] | None
) -> tuple[nn.Module, list[Replacement], list[nn.Module]]:
    """The model with its activations replaced, what was replaced, and the new activations."""
    outer, kept = _kept(model, keep)
    if operation_of_module(model) in TWINS and model not in kept:
        new = _successor(model, "", fresh)
        return new, [Replacement("", type(model).__name__, type(new).__name__)], [new]
    # All are made before the first is put in its place, as the user's function that makes them may raise.
    planned = list(_planned(model, fresh, kept))
    names = {module: name for name, module in model.named_modules()}
    before = {inner for module in names if REPLACED in vars(module) for inner in module.modules()}
    calling = {name for name, _ in calls or ()}
    for owner, key, _, new in planned:
        setattr(owner, key, new)
    for module, name in names.items():
        if module in outer:
            hook(module, None)
        elif module not in kept | before and is_plain(module) and not isinstance(module, torch.jit.ScriptModule):
            unhook(module)  # of an earlier exchange that kept it
            if fresh.reaches_calls and (_has_code_of_its_own(module) if calls is None else name in calling):
                hook(module, fresh.for_calls, fresh.sharpness)
    set_fast_paths(model, {owner for owner, key, _, _ in planned if key == "activation"})
    replaced = [
        Replacement(f"{names[owner]}.{key}".lstrip("."), old, type(new).__name__) for owner, key, old, new in planned
    ]
    return model, replaced, [new for _, _, _, new in planned]


def _planned(
    model: nn.Module, fresh: _Factory, kept: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Where an activation is to be put: owner, attribute, the kind of what is there, and the new one."""
    for owner in model.modules():
        if isinstance(owner, torch.jit.ScriptModule):
            continue
        for key, child in owner._modules.items():
            if child is not None and child not in kept and operation_of_module(child) in TWINS:
                yield owner, key, type(child).__name__, _successor(child, key, fresh)
        # Held by these as a function, and read by a kernel that knows no function modes.
        if isinstance(owner, TRANSFORMERS) and (operation := function_of(owner)) and owner not in kept:
            new = fresh.twin(operation, {}).train(owner.training)
            vars(new)[REPLACED] = owner.activation
            yield owner, "activation", f"F.{operation}", new


def _successor(old: nn.Module, key: str, fresh: _Factory) -> nn.Module:
    unhook(old)  # from an earlier exchange that kept it
    operation = operation_of_module(old)
    operation = "kernel" if key in KERNELS and operation == "relu" else operation
    new = fresh.twin(operation, options_of(operation, vars(old))).train(old.training)
    vars(new)[REPLACED] = old
    # The same dictionaries and not copies of them, so that the handles of the hooks still remove them.
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})
    return new


def _has_code_of_its_own(module: nn.Module) -> bool:
    """Whether a module is of a class of the user's, whose code may call what is not smooth."""
    of_torch = (getattr(type(module).forward, "__module__", None) or "").startswith("torch.nn.")
    return "forward" in vars(module) or not (of_torch or operation_of(type(module)))


def _calls_in(met: Iterable[NonSmooth]) -> set[tuple[str, str]]:
    """The calls of functions with a twin among what a run met: of which module, and of which function."""
    return {(site.name, site.kind) for site in met if site.kind.partition(".")[2] in TWINS}


def _calls_in_all_modes(model: nn.Module, x: Tensor) -> set[tuple[str, str]]:
    """Those of the modes that the model is in, and of training and evaluation mode, where it runs in them."""
    found = _calls_in(find_nonsmooth(model, x))
    for training in (True, False):
        if any(module.training != training for module in model.modules()):
            with suppress(Exception):  # BatchNorm of one value, say
                found |= _calls_in(find_nonsmooth(copy.deepcopy(model).train(training), x))
    return found


def _normalizes(model: nn.Module) -> bool:
    """Whether it has layers that do so, of any library, by their names."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any("norm" in name and "spectral" not in name and "weight" not in name for name in names)


def _keep_scale(model: nn.Module, twins: list[nn.Module], x: Tensor) -> None:
    """Sharpen the twins of a network without normalisation where what they are given is small, from first to last."""

    def adapt(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(twin, SmoothActivation)
        given = args[0] if args else kwargs["input"]
        scale = max(twin.scale, 1 / (float(given.std()) or 1.0))  # of all calls, the smallest input counts
        twin.sharpness, twin.scale = twin.sharpness * (scale / twin.scale), scale

    handles = [twin.register_forward_pre_hook(adapt, with_kwargs=True) for twin in twins]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()


def _agreements(model: nn.Module, act: Act, x: Tensor, keep: Collection[str]) -> dict[float, Agreement]:
    """How well twins of several sharpnesses agree with a model; nothing of one that has no classes."""
    with suppress(TypeError):
        return {b: agreement(model, smoothify(model, act, b, keep=keep), [x]) for b in TRIED}
    return {}


def set_fast_paths(model: nn.Module, changed: set[nn.Module]) -> None:
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

"""What smoothify leaves, refuses or only reports: what is run again, kept, held elsewhere, or of another class."""

import functools
import threading
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import checkpoint as rerun

from gradreg.smooth import find_nonsmooth, smoothify, unsmoothify

RELU = nn.ReLU()


class Layers(nn.Module):
    """Two linear layers and what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Held(Layers):
    """With a ReLU that cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.functions = [F.relu]

    def act(self, x: Tensor) -> Tensor:
        return self.functions[0](x)


# What checkpointing runs again


class Argument(Layers):
    def act(self, x: Tensor) -> Tensor:
        return checkpoint(F.relu, x, use_reentrant=False)


class OtherName(Layers):
    def act(self, x: Tensor) -> Tensor:
        def run(z: Tensor) -> Tensor:
            return F.relu(z)

        return rerun(run, x, use_reentrant=False)


class Around(Layers):
    """Checkpoints a child below a call of its own, in another method."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def act(self, x: Tensor) -> Tensor:
        return self.again(F.relu(x))

    def again(self, x: Tensor) -> Tensor:
        return rerun(self.inner, x, use_reentrant=False)


class Parent(Layers):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def act(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x))


CHECKPOINTED: dict[str, Callable[[], nn.Module]] = {
    "a function": lambda: nn.Sequential(Argument(), Layers()),
    "under another name": lambda: nn.Sequential(OtherName(), Layers()),
    "a child that cannot be read": lambda: Around(Held()),
    "a child that can be read": lambda: Around(Layers()),
    "a child of a child": lambda: Parent(Around(Held())),
    "in the midst of smooth calls": lambda: Parent(Around(Parent(nn.ReLU()))),
}


@pytest.mark.parametrize("build", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_what_is_checkpointed_is_the_same_when_it_runs_again(build: Callable[[], nn.Module]) -> None:
    smooth = smoothify(build()).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth, x)
    if not any(found.flat for found in find_nonsmooth(smooth, x)):
        assert torch.autograd.gradgradcheck(smooth, x)


def test_calls_in_a_method_that_checkpoints_are_reported() -> None:
    for kind in (Argument, OtherName):
        _, report = smoothify(nn.Sequential(kind(), nn.ReLU()), return_report=True)
        (left,) = report.remaining
        assert (left.name, left.kind) == ("0", "F.relu")
        assert "checkpointing" in left.reason


# What is kept


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a part of a model returns."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("inner", [nn.ReLU, Layers])
def test_what_is_kept_stays_as_it_is_below_a_smooth_method(inner: type[nn.Module]) -> None:
    model, x = Parent(inner()), torch.randn(50, 4)
    smooth, report = smoothify(model, keep=["inner"], return_report=True)
    assert [found.name for found in report.remaining] == ["inner"]
    assert [entry.name for entry in report.replaced] == [""]
    inputs = model.a(x)
    assert torch.equal(outputs(smooth, "inner", x), model.inner(inputs))
    assert torch.equal(smooth(x), model.b(F.gelu(model.inner(inputs))))


def test_a_model_with_kept_parts_compiles_without_a_graph_break(shipped: ModuleType) -> None:
    smooth, x = shipped.smoothify(Parent(Layers()), keep=["inner"]), torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(smooth, backend="aot_eager", fullgraph=True)(x), smooth(x))


def test_what_was_kept_can_be_replaced_later_and_all_be_undone() -> None:
    model, x = Parent(Layers()), torch.randn(5, 4)
    both = smoothify(smoothify(model, keep=["inner"]))
    assert torch.equal(both(x), smoothify(model)(x))
    assert find_nonsmooth(both) == ()
    before = unsmoothify(both)
    assert [type(module) for module in before.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(before(x), model(x))


def test_a_container_is_kept_by_the_names_of_what_is_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    with pytest.raises(ValueError, match=r"'0'; for all that is inside of it, write '0\.\*'"):
        smoothify(model, keep=["0"])


# What is reported


class Inherits(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Global(Layers):
    def act(self, x: Tensor) -> Tensor:
        return RELU(x)


class OfTheClass(Layers):
    rectify = nn.ReLU()

    def act(self, x: Tensor) -> Tensor:
        return self.rectify(x)


class Imports(Layers):
    def act(self, x: Tensor) -> Tensor:
        from torch.nn.functional import leaky_relu

        return leaky_relu(x, 0.0)


@pytest.mark.parametrize("kind", [Global, OfTheClass, Imports])
def test_activations_outside_of_the_model_become_smooth(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(5, 4)
    smooth = smoothify(model)
    assert torch.equal(smooth(x), model.b(F.gelu(model.a(x))))
    assert torch.equal(model(x), model.b(F.relu(model.a(x))))


def test_a_class_that_inherits_from_an_activation_becomes_smooth() -> None:
    smooth, x = smoothify(nn.Sequential(Inherits())), torch.randn(5, 4)
    assert torch.equal(smooth(x), F.gelu(x))


def encoder_layer(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, activation=activation, batch_first=True)


def held(value: object) -> nn.Module:
    model = Layers()
    model.held = value
    return model


REPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RNN": (lambda: nn.Sequential(nn.RNN(4, 4, nonlinearity="relu")), "tanh"),
    "RNNCell": (lambda: nn.Sequential(nn.RNNCell(4, 4, nonlinearity="relu")), "tanh"),
    "encoder, partial": (lambda: encoder_layer(functools.partial(F.leaky_relu, negative_slope=0.2)), "by hand"),
    "encoder, lambda": (lambda: encoder_layer(lambda x: F.relu(x)), "by hand"),
    "list of functions": (lambda: held([F.relu]), "does not reach"),
    "dictionary of modules": (lambda: held({"act": nn.ReLU()}), "does not reach"),
    "qat": (lambda: nn.Sequential(torch.ao.nn.intrinsic.qat.ConvReLU2d(3, 3, 1, qconfig=QCONFIG)), "before it is"),
}
QCONFIG = torch.ao.quantization.default_qat_qconfig


@pytest.mark.parametrize(("build", "fix"), REPORTED.values(), ids=REPORTED)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_what_cannot_be_replaced_is_reported(build: Callable[[], nn.Module], fix: str) -> None:
    _, report = smoothify(nn.Sequential(build(), nn.ReLU()), return_report=True)
    (left,) = report.remaining
    assert left.flat
    assert fix in left.fix


def test_a_function_compiled_by_torch_jit_is_reported() -> None:
    class Scripted(Layers):
        def act(self, x: Tensor) -> Tensor:
            return compiled(x)

    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        compiled = torch.jit.script(F.leaky_relu)
    assert [(found.kind, found.flat) for found in find_nonsmooth(Scripted())] == [("torch.jit.script", False)]


def test_a_second_name_in_a_list_still_runs_the_old_activation_and_is_reported() -> None:
    model = nn.Module()
    model.act = nn.ReLU()
    model.order = [model.act]
    assert [found.name for found in find_nonsmooth(model)] == ["act"]
    smooth, report = smoothify(model, return_report=True)
    assert isinstance(smooth.order[0], nn.ReLU)
    assert ["``order``" in found.reason for found in report.remaining] == [True]


# What is refused


@pytest.mark.parametrize("act", [nn.PReLU, nn.Softshrink, functools.partial(nn.Threshold, 0.0, 0.0)])
def test_activations_that_are_flat_are_refused(act: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="must return a smooth activation"):
        smoothify(nn.Sequential(nn.ReLU()), act)


class WithBuffer(nn.GELU):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("act", [WithBuffer, lambda: nn.Sequential(nn.GELU(), nn.Dropout())])
def test_a_functional_call_takes_no_activation_that_has_a_state(act: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="parameters, buffers or dropout"):
        smoothify(Layers(), act)
    assert isinstance(smoothify(nn.Sequential(nn.ReLU()), act)[0], WithBuffer | nn.Sequential)


def test_a_hard_tanh_without_a_limit_is_a_relu() -> None:
    smooth, x = smoothify(nn.Sequential(nn.Hardtanh(0.0, float("inf")))), torch.randn(5)
    assert torch.equal(smooth(x), F.gelu(x))


class FunctionalLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_a_parametrised_module_is_left_and_reported() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(FunctionalLinear(4, 4)), nn.ReLU())
    smooth, report = smoothify(model, return_report=True)
    assert ["parametrised" in found.reason for found in report.remaining] == [True]
    parametrize.remove_parametrizations(smooth[0], "weight")
    assert type(smooth[0]) is FunctionalLinear


def test_a_parametrisation_is_removed_before_smoothify_is_undone() -> None:
    smooth, x = smoothify(nn.Sequential(FunctionalLinear(4, 4))), torch.randn(5, 4)
    expected = smooth(x)
    parametrizations.weight_norm(smooth[0])
    with pytest.raises(ValueError, match="0 was given another class after smoothify"):
        unsmoothify(smooth)
    torch.testing.assert_close(smooth(x), expected)
    parametrize.remove_parametrizations(smooth[0], "weight")
    torch.testing.assert_close(unsmoothify(smooth)(x), smooth[0].__class__.__mro__[2].forward(smooth[0], x))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.ReLU())
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"smoothify: Sequential cannot be copied .* inplace=True"):
        smoothify(model)
    smoothify(model, inplace=True)
    with pytest.raises(RuntimeError, match=r"unsmoothify: Sequential cannot be copied .* inplace=True"):
        unsmoothify(model)


# Names and classes of the user's own


def test_a_registry_of_classes_does_not_learn_of_derived_ones() -> None:
    registry: dict[str, type] = {}

    class Registered(Layers):
        def __init_subclass__(cls, *, tag: str, **kwargs: object) -> None:
            registry[tag] = cls

    class Net(Registered, tag="net"):
        pass

    smooth, x = smoothify(Net()), torch.randn(5, 4)
    assert registry == {"net": Net}
    assert torch.equal(smooth(x), smooth.b(F.gelu(smooth.a(x))))


def test_nothing_is_changed_where_a_class_cannot_be_derived() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> type:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, namespace)

    class Net(Layers, metaclass=Final):
        pass

    model = nn.Sequential(nn.ReLU(), Net())
    with pytest.raises(TypeError, match="final"):
        smoothify(model, inplace=True)
    assert isinstance(model[0], nn.ReLU)


def test_attributes_of_the_users_own_are_not_taken_for_those_of_smoothify() -> None:
    class Mine(Layers):
        def __init__(self) -> None:
            super().__init__()
            self._replaced = self._smooth_act = False

        def derivation(self) -> str:
            return "mine"

    model = nn.Sequential(Mine(), nn.ReLU())
    back = unsmoothify(smoothify(model))
    assert [type(module) for module in back] == [Mine, nn.ReLU]
    assert smoothify(model)[0].derivation() == "mine"

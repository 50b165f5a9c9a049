"""What smoothify leaves, refuses or only reports: what is run again, kept, held elsewhere, or has a state."""

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.checkpoint import checkpoint as rerun

from gradreg.smooth import anneal_sharpness, find_nonsmooth, smoothify, unsmoothify

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
    """With a ReLU in a list."""

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
    "a child that holds a function": lambda: Around(Held()),
    "a child that calls one": lambda: Around(Layers()),
    "a child of a child": lambda: Parent(Around(Held())),
    "in the midst of smooth calls": lambda: Parent(Around(Parent(nn.ReLU()))),
}


@pytest.mark.parametrize("build", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_what_is_checkpointed_is_the_same_when_it_runs_again(build: Callable[[], nn.Module]) -> None:
    smooth = smoothify(build()).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth, x)
    if not any(found.flat for found in find_nonsmooth(smooth, x.detach())):
        assert torch.autograd.gradgradcheck(smooth, x)


@pytest.mark.parametrize("kind", [Argument, OtherName])
def test_a_function_handed_to_checkpointing_is_reported(kind: type[Layers]) -> None:
    x = torch.randn(3, 4)
    smooth, report = smoothify(nn.Sequential(kind(), nn.ReLU()), x=x, return_report=True)
    (left,) = report.remaining
    assert (left.name, left.kind, left.flat) == ("0", "F.relu", True)
    assert "checkpointing" in left.fix
    assert find_nonsmooth(smooth, x) == report.remaining


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_sequence_checkpointed_in_parts_is_smooth(use_reentrant: bool) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Layers(), nn.ReLU6())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=use_reentrant)

    smooth, x = smoothify(Parts()), torch.randn(3, 4, requires_grad=True)
    expected = smooth.layers(x)
    assert torch.equal(smooth(x), expected)
    smooth(x).square().sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.square().sum(), x)[0])


# What is kept


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a part of a model returns."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen[0]


INNER: list[Callable[[], nn.Module]] = [
    nn.ReLU, Layers, Held, lambda: Parent(Layers()), lambda: Around(Layers()), lambda: nn.Sequential(Layers()),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(Parent(nn.ReLU6()))),
]  # fmt: skip


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("with_x", [False, True])
def test_what_is_kept_stays_as_it_is_inside_of_a_smooth_model(make: Callable[[], nn.Module], with_x: bool) -> None:
    model, x = Parent(make()), torch.randn(50, 4)
    smooth, report = smoothify(model, keep=["inner"], x=x if with_x else None, return_report=True)
    assert all(found.name.startswith("inner") for found in report.remaining)
    assert not any(entry.name.startswith("inner") for entry in report.replaced)
    inputs = model.a(x)
    assert torch.equal(outputs(smooth, "inner", x), model.inner(inputs))
    assert torch.equal(smooth(x), model.b(F.gelu(model.inner(inputs))))
    kept = [(site.name, site.kind) for site in find_nonsmooth(model, x) if site.name.startswith("inner")]
    assert [(site.name, site.kind) for site in find_nonsmooth(smooth, x)] == kept


def test_a_model_with_kept_parts_compiles_without_a_graph_break(shipped: ModuleType) -> None:
    smooth, x = shipped.smoothify(nn.Sequential(Parent(Layers())), keep=["0.inner"]), torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(smooth, backend="aot_eager", fullgraph=True)(x), smooth(x))


@pytest.mark.parametrize("make", INNER)
def test_what_was_kept_can_be_replaced_later_and_all_be_undone(make: Callable[[], nn.Module]) -> None:
    model, x = Parent(make()), torch.randn(5, 4)
    both = smoothify(smoothify(model, keep=["inner"]))
    assert torch.equal(both(x), smoothify(model)(x))
    assert find_nonsmooth(both, x) == ()
    before = unsmoothify(both)
    assert [type(module) for module in before.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(before(x), model(x))


def test_a_kept_container_of_pytorch_is_smooth_after_a_second_smoothify() -> None:
    model, x = Parent(nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation=lambda x: F.relu(x))), torch.randn(5, 4)
    both = smoothify(smoothify(model, keep=["inner"]))
    torch.testing.assert_close(both(x), smoothify(model)(x))
    assert not any(found.flat for found in find_nonsmooth(both, x))


def test_a_module_of_two_names_is_kept_by_each_of_them() -> None:
    model = nn.Module()
    model.layers = nn.Sequential(nn.ReLU())
    model.again = model.layers
    for name in ("layers", "again"):
        assert isinstance(smoothify(model, keep=[name]).layers[0], nn.ReLU)


# What stands outside of the model, or is of another class


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


@pytest.mark.parametrize("kind", [Global, OfTheClass, Imports, Held])
def test_activations_outside_of_the_model_become_smooth(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(5, 4)
    smooth = smoothify(model)
    torch.testing.assert_close(smooth(x), model.b(F.gelu(model.a(x))))
    assert torch.equal(model(x), model.b(F.relu(model.a(x))))


def test_a_class_that_inherits_from_an_activation_becomes_smooth() -> None:
    smooth, x = smoothify(nn.Sequential(Inherits())), torch.randn(5, 4)
    assert torch.equal(smooth(x), F.gelu(x))


def test_a_second_name_in_a_list_becomes_smooth() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.order = [self.act]

        def forward(self, x: Tensor) -> Tensor:
            return self.order[0](x)

    smooth, x = smoothify(Listed()), torch.randn(5, 4)
    assert torch.equal(smooth(x), F.gelu(x))
    assert torch.equal(unsmoothify(smooth)(x), F.relu(x))


class FunctionalLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_parametrisations_come_and_go_before_and_after() -> None:
    model, x = nn.Sequential(parametrizations.weight_norm(FunctionalLinear(4, 4))), torch.randn(5, 4)
    plain, smooth = model(x), smoothify(model)
    expected = F.gelu(F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(smooth(x), expected)
    parametrize.remove_parametrizations(smooth[0], "weight")
    assert type(smooth[0]) is FunctionalLinear
    torch.testing.assert_close(smooth(x), expected)
    parametrizations.weight_norm(smooth[0])
    torch.testing.assert_close(smooth(x), expected)
    torch.testing.assert_close(unsmoothify(smooth)(x), plain)


def test_a_registry_of_classes_does_not_learn_of_others() -> None:
    registry: dict[str, type] = {}

    class Registered(Layers):
        def __init_subclass__(cls, *, tag: str, **kwargs: object) -> None:
            registry[tag] = cls

    class Net(Registered, tag="net"):
        pass

    smooth, x = smoothify(Net()), torch.randn(5, 4)
    assert registry == {"net": Net}
    assert torch.equal(smooth(x), smooth.b(F.gelu(smooth.a(x))))


def test_a_class_that_allows_no_derived_ones_becomes_smooth() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> type:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, namespace)

    class Net(Layers, metaclass=Final):
        pass

    model, x = Net(), torch.randn(5, 4)
    assert torch.equal(smoothify(model)(x), model.b(F.gelu(model.a(x))))


def test_attributes_of_the_users_own_are_not_taken_for_those_of_smoothify() -> None:
    class Mine(Layers):
        def __init__(self) -> None:
            super().__init__()
            self._replaced = self._smooth_act = self.scale = self.sharpness = self.operation = False

        def hook(self) -> str:
            return "mine"

    model = nn.Sequential(Mine(), nn.ReLU())
    smooth = smoothify(model)
    anneal_sharpness(smooth, lambda t: 2.0)
    assert smooth[0].sharpness is smooth[0].scale is False
    back = unsmoothify(smooth)
    assert [type(module) for module in back] == [Mine, nn.ReLU]
    assert smooth[0].hook() == back[0].hook() == "mine"


# Modes of several levels


class Fails(nn.Module):
    """Raises before its own hooks have run, or in its forward."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        F.relu(x)
        raise ValueError("raised")


class Goes(nn.Module):
    """Calls a child that raises, and then a function."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.child(x)
        except ValueError:
            return F.relu(x)
        raise AssertionError


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("keep", [[], ["child"]])
def test_a_model_that_catches_an_exception_of_its_child_stays_smooth(early: bool, keep: list[str]) -> None:
    def run() -> None:
        smooth, x = smoothify(Goes(Fails(early)), keep=keep), torch.randn(50)
        if early:

            def raises(*args: object) -> None:
                raise ValueError("raised")

            smooth.child.register_forward_pre_hook(raises, prepend=True)
        for _ in range(2):
            assert torch.equal(smooth(x), F.gelu(x))
            assert _get_current_function_mode_stack() == []

    with ThreadPoolExecutor(1) as pool:  # function modes are of one thread
        pool.submit(run).result()


def test_after_an_interrupt_the_same_model_follows_its_sharpness() -> None:
    class Interrupted(Layers):
        interrupts = True

        def act(self, x: Tensor) -> Tensor:
            if self.interrupts:
                raise KeyboardInterrupt
            return F.relu(x)

    def run() -> None:
        model, x = Interrupted(), torch.randn(5, 4)
        smooth = smoothify(model)
        with pytest.raises(KeyboardInterrupt):
            smooth(x)
        smooth.interrupts = False
        assert torch.equal(smooth(x), model.b(F.gelu(model.a(x))))
        sharpness = anneal_sharpness(smooth, lambda t: 2.0 + t)
        for t in (0, 1):
            b = sharpness(t)
            torch.testing.assert_close(smooth(x), model.b(F.gelu(b * model.a(x)) / b))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_models_made_smooth_one_after_the_other_keep_their_sharpness_inside_of_each_other() -> None:
    act, x = nn.GELU(), torch.randn(50)
    inner = smoothify(Goes(Fails(early=False)), lambda: copy.deepcopy(act), 3.0)
    outer = smoothify(nn.Sequential(inner, Goes(Fails(early=False))), sharpness=1.0)
    torch.testing.assert_close(outer(x), F.gelu(F.gelu(3 * x) / 3))
    torch.testing.assert_close(copy.deepcopy(outer)(x), outer(x))


# What is reported


def encoder_layer(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation=activation, batch_first=True)


REPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RNN": (lambda: nn.Sequential(nn.RNN(4, 4, nonlinearity="relu")), "tanh"),
    "RNNCell": (lambda: nn.Sequential(nn.RNNCell(4, 4, nonlinearity="relu")), "tanh"),
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


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    functools.partial(F.leaky_relu, negative_slope=0.2),
    lambda x: F.relu(x),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_function_in_a_layer_of_pytorch_is_met_or_smooth_below_a_module_with_code(
    activation: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(3, 5, 4)
    alone = smoothify(nn.Sequential(encoder_layer(activation), nn.ReLU()))
    assert [(found.name, found.flat) for found in find_nonsmooth(alone, x)] == [("0", True)]
    assert find_nonsmooth(smoothify(Parent(encoder_layer(activation))), x) == ()


def test_code_compiled_by_torch_jit_is_met() -> None:
    class Scripted(Layers):
        def act(self, x: Tensor) -> Tensor:
            return compiled(x)

    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        compiled = torch.jit.script(F.leaky_relu)
    (left,) = find_nonsmooth(smoothify(Scripted()), torch.randn(5, 4))
    assert (left.kind, left.flat) == ("F.leaky_relu", True)
    assert "torch.jit" in left.fix


# What is refused


class WithBuffer(nn.GELU):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))


class WithParameter(nn.GELU):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("act", [WithBuffer, WithParameter, lambda: nn.Sequential(nn.GELU(), nn.Dropout())])
def test_an_activation_with_a_state_replaces_modules_and_no_calls(act: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(Layers(), nn.ReLU()), torch.randn(5, 4)
    smooth = smoothify(model, act)
    assert isinstance(smooth[1], type(act()))
    assert torch.equal(smooth[0](x), model[0](x))
    assert [(found.name, found.kind) for found in find_nonsmooth(smooth, x)] == [("0", "F.relu")]


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.ReLU())
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"smoothify: Sequential cannot be copied .* inplace=True"):
        smoothify(model)
    smoothify(model, inplace=True)
    assert isinstance(model[0], nn.GELU)
    with pytest.raises(RuntimeError, match=r"unsmoothify: Sequential cannot be copied .* inplace=True"):
        unsmoothify(model)
    assert unsmoothify(model, inplace=True) is model
    assert isinstance(model[0], nn.ReLU)


@pytest.mark.parametrize("keep", [["nothing"], ["0.*"]])
def test_an_unknown_name_is_refused_and_leaves_the_model_as_it_was(keep: list[str]) -> None:
    model, x = nn.Sequential(nn.ReLU(), Layers()), torch.randn(5, 4)
    before = model(x)
    with pytest.raises(ValueError, match="no module is called"):
        smoothify(model, keep=keep, inplace=True)
    assert torch.equal(model(x), before)

"""smoothify and find_nonsmooth: what is replaced, by what, and that nothing else changes."""

import copy
import functools
import io
import math
import pickle
import warnings
from types import ModuleType

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.activations_me import HardSwishMe
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from gradreg.smooth import Replacement, ScaledTanh, SmoothReport, find_nonsmooth, smoothify, unsmoothify


def kinds(model: nn.Module) -> list[str]:
    return [found.kind for found in find_nonsmooth(model)]


def helper(x: Tensor) -> Tensor:
    return x.relu()


# The ways in which a forward can call a ReLU. Each class computes b(relu(a(x))).


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Functional(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class InPlaceFunctional(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        F.relu(x, inplace=True)
        return self.b(x)


class InPlaceStatement(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.relu_()
        return self.b(x)


class TorchFunction(Calls):
    def act(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class TorchInPlace(Calls):
    def act(self, x: Tensor) -> Tensor:
        return torch.relu_(x)


class Method(Calls):
    def act(self, x: Tensor) -> Tensor:
        return x.relu()


class NestedFunction(Calls):
    def forward(self, x: Tensor) -> Tensor:
        def inner(z: Tensor) -> Tensor:
            return F.relu(self.a(z))

        return self.b(inner(x))


class Lambda(Calls):
    def act(self, x: Tensor) -> Tensor:
        return (lambda z: torch.relu(z))(x)


class ModuleLevelHelper(Calls):
    def act(self, x: Tensor) -> Tensor:
        return helper(x)


class StaticHelper(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rectify(self.a(x)))

    @staticmethod
    def rectify(x: Tensor) -> Tensor:
        return F.relu(x)


class Super(Method):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class LocalImport(Calls):
    def act(self, x: Tensor) -> Tensor:
        from torch.nn.functional import relu

        return relu(x)


class FunctionAttribute(Calls):
    def __init__(self) -> None:
        super().__init__()
        self.rectify = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rectify(self.a(x)))


class Partial(FunctionAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.rectify = functools.partial(F.relu, inplace=True)


class MadeInForward(Calls):
    def act(self, x: Tensor) -> Tensor:
        return nn.ReLU()(x)


class CheckpointedMethod(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.act, self.a(x), use_reentrant=False))


CALLS = [
    Calls, Functional, InPlaceFunctional, InPlaceStatement, TorchFunction, TorchInPlace, Method, NestedFunction,
    Lambda, ModuleLevelHelper, StaticHelper, Super, LocalImport, FunctionAttribute, Partial, MadeInForward,
    CheckpointedMethod,
]  # fmt: skip


def twin(model: Calls, x: Tensor) -> Tensor:
    return model.b(F.gelu(model.a(x)))


@pytest.mark.parametrize("kind", CALLS)
def test_functional_calls_equal_the_hand_written_twin_in_value_and_gradients(kind: type[Calls]) -> None:
    model, x = kind(), torch.randn(5, 4)
    smooth, report = smoothify(model, return_report=True)
    assert report == SmoothReport((Replacement("", "F.relu", "GELU"),), ())
    assert kinds(model) == ["F.relu"]
    assert torch.equal(smooth(x), twin(model, x))
    torch.testing.assert_close(
        torch.autograd.grad(smooth(x).square().sum(), list(smooth.parameters())),
        torch.autograd.grad(twin(model, x).square().sum(), list(model.parameters())),
    )
    assert torch.equal(model(x), model.b(torch.relu(model.a(x))))
    assert list(smooth.state_dict()) == list(model.state_dict())
    assert [name for name, _ in smooth.named_modules()] == [name for name, _ in model.named_modules()]
    assert isinstance(smooth, kind)
    assert repr(smooth) == repr(model)


@pytest.mark.parametrize("kind", [Functional, InPlaceStatement, Super, Partial])
def test_a_smooth_model_can_be_pickled_and_copied(kind: type[Calls]) -> None:
    smooth, x, buffer = smoothify(kind()), torch.randn(5, 4), io.BytesIO()
    torch.save(smooth, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(smooth), pickle.loads(pickle.dumps(smooth))):
        assert torch.equal(other(x), smooth(x))
        assert find_nonsmooth(other) == ()
        with torch.no_grad():
            other.b.bias.add_(1.0)  # the copy computes with its own parameters
        assert torch.allclose(other(x), smooth(x) + 1.0)


def test_checkpointed_closures_are_left_and_named() -> None:
    class Closure(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(lambda z: F.relu(self.a(z)), x, use_reentrant=False))

    model = nn.Sequential(Closure(), nn.ReLU())
    smooth, report = smoothify(model, return_report=True)
    (left,) = report.remaining
    assert (left.name, left.kind) == ("0", "F.relu")
    assert "checkpointing" in left.reason
    assert type(smooth[0]) is Closure


def test_a_checkpointed_module_is_recomputed_smooth() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Functional()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    smooth, x = smoothify(Outer()), torch.randn(5, 4, requires_grad=True)
    (g,) = torch.autograd.grad(smooth(x).square().sum(), x)
    torch.testing.assert_close(g, torch.autograd.grad(twin(smooth.inner, x).square().sum(), x)[0])


def test_the_mode_is_popped_after_an_exception() -> None:
    class Raises(Calls):
        def forward(self, x: Tensor) -> Tensor:
            F.relu(x)
            raise KeyboardInterrupt

    smooth, x = smoothify(Raises()), torch.randn(3)
    with pytest.raises(KeyboardInterrupt):
        smooth(x)
    assert _get_current_function_mode_stack() == []
    assert torch.equal(F.relu(x), x.clamp(min=0))


def test_a_smooth_model_in_transforms() -> None:
    smooth, x = smoothify(InPlaceFunctional()), torch.randn(5, 4)
    parameters = dict(smooth.named_parameters())

    def apply(z: Tensor) -> Tensor:
        return torch.func.functional_call(smooth, parameters, (z,))

    torch.testing.assert_close(torch.func.vmap(apply)(x), twin(smooth, x))
    torch.testing.assert_close(
        torch.func.grad(lambda z: apply(z).sum())(x), torch.func.grad(lambda z: twin(smooth, z).sum())(x)
    )


class InPlaceByPosition(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        F.relu(x, True)
        return self.b(x)


class Limits(Calls):
    def act(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, -0.1, 0.2)


def test_a_smooth_model_compiles_without_a_graph_break(shipped: ModuleType) -> None:
    for kind in (Calls, InPlaceFunctional, InPlaceByPosition, InPlaceStatement, Partial, Limits):
        smooth, x = shipped.smoothify(nn.Sequential(kind(), nn.ReLU())), torch.randn(5, 4)
        torch.testing.assert_close(torch.compile(smooth, backend="aot_eager", fullgraph=True)(x), smooth(x))


@pytest.mark.parametrize("call", [F.hardsigmoid, F.hardswish, F.relu_, F.leaky_relu_, F.hardtanh_])
def test_what_torch_compile_hides_from_modes_breaks_the_graph_and_is_smooth(call: object, shipped: ModuleType) -> None:
    model, x = FunctionAttribute(), torch.randn(5, 4)
    model.rectify = call
    smooth = shipped.smoothify(model)
    assert not torch.allclose(smooth(x), model(x))
    torch.testing.assert_close(torch.compile(smooth, backend="aot_eager")(x), smooth(x))


def test_the_parameters_of_a_functional_activation_are_refused() -> None:
    class Scaled(nn.GELU):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="Scaled has parameters"):
        smoothify(Functional(), Scaled)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_that_is_not_smooth_is_refused(inplace: bool) -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) ** 2

    model = nn.Sequential(Functional(), nn.ReLU())
    for act in (Squared, nn.ELU):
        with pytest.raises(ValueError, match="must return a smooth activation, and returned one with"):
            smoothify(model, act, inplace=inplace)
    assert [type(module) for module in model] == [Functional, nn.ReLU]


FUNCTIONAL = [
    (F.relu6, F.gelu), (F.leaky_relu, F.gelu), (F.leaky_relu_, F.gelu), (F.elu, F.gelu), (F.elu_, F.gelu),
    (F.selu, F.gelu), (torch.selu, F.gelu), (F.celu, F.gelu), (torch.celu_, F.gelu), (F.rrelu, F.gelu),
    (torch.rrelu_, F.gelu), (F.hardtanh, torch.tanh), (F.hardtanh_, torch.tanh), (F.hardsigmoid, torch.sigmoid),
    (F.hardswish, F.silu), (functools.partial(F.hardtanh, min_val=0.0, max_val=4.0), ScaledTanh(0.0, 4.0)),
    (functools.partial(F.hardtanh_, max_val=1.0), torch.tanh), (Tensor.relu_, F.gelu),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), FUNCTIONAL)
def test_each_function_has_its_twin(old: object, new: object) -> None:
    model, x = FunctionAttribute(), torch.randn(50, 4)
    model.rectify = old
    smooth = smoothify(model)
    assert torch.equal(smooth(x), model.b(new(model.a(x))))


def test_in_place_calls_overwrite_their_input() -> None:
    class Returns(Calls):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x)
            return x, F.leaky_relu_(x, 0.1)

    model, x = Returns(), torch.randn(5, 4)
    first, second = smoothify(model)(x)
    assert first is second
    assert torch.equal(first, F.gelu(model.a(x)))


# Modules


MODULES = [
    (nn.ReLU(), nn.GELU), (nn.ReLU(inplace=True), nn.GELU), (nn.ReLU6(), nn.GELU), (nn.LeakyReLU(0.1), nn.GELU),
    (nn.RReLU(), nn.GELU), (nn.ELU(), nn.GELU), (nn.CELU(), nn.GELU), (nn.SELU(), nn.GELU),
    (nn.Hardtanh(), ScaledTanh), (nn.Hardtanh(0.0, 20.0), ScaledTanh),
    (nn.Hardsigmoid(), nn.Sigmoid), (nn.Hardswish(), nn.SiLU), (timm.layers.HardSigmoid(), nn.Sigmoid),
    (timm.layers.HardSwish(), nn.SiLU), (timm.layers.HardMish(), nn.Mish), (HardSwishMe(), nn.SiLU),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MODULES, ids=[str(old) for old, _ in MODULES])
def test_each_module_has_its_twin(old: nn.Module, new: type[nn.Module]) -> None:
    old.eval()
    smooth, report = smoothify(nn.Sequential(old, nn.Identity()), return_report=True)
    assert type(smooth[0]) is new
    assert not smooth[0].training
    assert smooth[1].training
    assert report == SmoothReport((Replacement("0", type(old).__name__, new.__name__),), ())
    assert kinds(nn.Sequential(old)) == [type(old).__name__]
    alone = smoothify(old)
    assert type(alone) is new
    assert not alone.training
    with pytest.raises(ValueError, match="leave inplace out"):
        smoothify(old, inplace=True)


@pytest.mark.parametrize(
    "smooth",
    [nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Mish(), nn.AvgPool2d(2), timm.layers.Swish()],
)
def test_smooth_modules_stay(smooth: nn.Module) -> None:
    assert find_nonsmooth(nn.Sequential(smooth)) == ()
    assert smoothify(nn.Sequential(smooth, nn.ReLU()))[0].__class__ is smooth.__class__


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (nn.PReLU(), "parameter"),
        (nn.Softshrink(), "no smooth twin"),
        (nn.Hardshrink(), "no smooth twin"),
        (nn.Softsign(), "second derivative jumps"),
        (nn.Threshold(1.0, 0.0), "no smooth twin"),
        (nn.MaxPool2d(2), "maximum"),
        (nn.AdaptiveMaxPool2d(1), "maximum"),
        (torch.jit.ScriptModule(), "torch.jit"),
    ],
)
def test_what_stays_is_reported(left: nn.Module, reason: str) -> None:
    smooth, report = smoothify(nn.Sequential(nn.ReLU(), left), return_report=True)
    (entry,) = report.remaining
    assert (entry.name, entry.kind) == ("1", type(smooth[1]).__name__)
    assert reason in entry.reason
    assert isinstance(smooth[1], type(left))
    assert report.remaining == find_nonsmooth(smooth)
    assert str(entry) in str(report)


def test_calls_that_stay_are_reported() -> None:
    class Model(Calls):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.round(x) + round(1.2)
            return F.relu(F.max_pool1d(x, 2).clamp(min=0))

    _, report = smoothify(Model(), return_report=True)
    assert [entry.kind for entry in report.remaining] == ["torch.clamp", "F.max_pool1d", "torch.round"]
    assert [entry.old for entry in report.replaced] == ["F.relu"]


FLAT = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.RReLU(), nn.PReLU(), nn.Threshold(0.0, 0.0), nn.Threshold(1.0, 0.0),
    nn.Hardtanh(), nn.Hardsigmoid(), nn.Softshrink(), nn.Hardshrink(), timm.layers.HardSigmoid(), Functional(),
]  # fmt: skip
CURVED = [
    nn.ELU(), nn.ELU(alpha=0.5), nn.CELU(), nn.SELU(), nn.Hardswish(), nn.Softsign(), timm.layers.HardSwish(),
    timm.layers.HardMish(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "flat"), [*((model, True) for model in FLAT), *((model, False) for model in CURVED)], ids=str
)
def test_flat_says_that_the_second_derivative_is_zero_almost_everywhere(model: nn.Module, flat: bool) -> None:
    (found,) = find_nonsmooth(model)
    assert found.flat is flat
    # By differences, since torch has no second derivative of hardsigmoid at all.
    model, x = model.double().eval(), torch.randn(50, 4, dtype=torch.float64)
    slope = torch.func.grad(lambda x: model(x).sum())
    assert torch.equal(slope(x + 1e-6), slope(x - 1e-6)) == flat


def test_what_only_selects_has_no_gradient_or_cannot_be_read_is_not_flat() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d(x.clamp(min=0).round(), 2)

    found = find_nonsmooth(Model())
    assert [(entry.kind, entry.flat) for entry in found] == [
        ("torch.clamp", False), ("F.max_pool1d", False), ("torch.round", False)
    ]  # fmt: skip
    assert not any(entry.flat for entry in find_nonsmooth(nn.Sequential(nn.MaxPool2d(2), torch.jit.ScriptModule())))


def test_a_shared_module_is_replaced_at_each_site_by_its_own_activation() -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.ReLU()
            self.first, self.layers = act, nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
            self.by_name = nn.ModuleDict({"a": act})
            self.listed = nn.ModuleList([act])
            self.again = self.layers

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.again(self.layers(self.first(x))) + self.by_name["a"](x) + self.listed[0](x))

    model = Reuses()
    smooth, report = smoothify(model, return_report=True)
    names = ["first", "layers.1", "layers.3", "by_name.a", "listed.0"]
    assert [entry.name for entry in report.replaced] == names
    assert len({smooth.get_submodule(name) for name in names}) == 5
    assert smooth.again is smooth.layers
    assert find_nonsmooth(smooth) == ()
    assert isinstance(model.first, nn.ReLU)


def test_a_subclass_with_its_own_forward_is_read_and_not_replaced() -> None:
    class Scaled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * F.relu(x)

    smooth, x = smoothify(nn.Sequential(Scaled())), torch.randn(5)
    assert torch.equal(smooth(x), 2.0 * F.gelu(x))


def test_children_that_a_forward_iterates_over_are_no_calls() -> None:
    class Iterates(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self._modules.values():
                x = layer(x)
            return x

    assert kinds(Iterates(nn.ReLU())) == ["ReLU"]
    assert kinds(torchvision.models.resnet.BasicBlock(4, 4)) == ["ReLU"]


def test_a_method_of_a_child_is_seen() -> None:
    class Encoder(Calls):
        def encode(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x))

        forward = nn.Module.forward

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder.encode(x)

    model, x = Model(), torch.randn(5, 4)
    smooth, report = smoothify(model, return_report=True)
    assert [str(entry) for entry in report.replaced] == ["encoder: F.relu -> GELU"]
    assert torch.equal(smooth(x), F.gelu(model.encoder.a(x)))


def test_training_flags_hooks_and_inplace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Hardswish()).eval())
    calls: list[str] = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    flags = {name: module.training for name, module in model.named_modules()}
    first = model[0]
    assert smoothify(model, inplace=True) is model
    assert model[0] is first
    assert {name: module.training for name, module in model.named_modules()} == flags
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    model(torch.randn(2, 4))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_replace_leaves_the_model_untouched(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.PReLU())
    before = list(model.modules())
    with pytest.raises(ValueError, match="no activation that can be replaced was found in Sequential"):
        smoothify(model, inplace=inplace)
    assert list(model.modules()) == before


def test_a_second_smoothify_says_that_nothing_is_left() -> None:
    smooth = smoothify(nn.Sequential(nn.ReLU(), Functional()))
    with pytest.raises(ValueError, match="already smooth"):
        smoothify(smooth)
    grown = smoothify(nn.Sequential(smooth, nn.ReLU()), "silu")
    assert [type(grown[0][0]), type(grown[1])] == [nn.GELU, nn.SiLU]


def test_bad_factories_are_refused_and_leave_the_model_untouched() -> None:
    model = nn.Sequential(nn.ReLU(), Functional(), nn.ReLU())
    shared, made = nn.GELU(), iter([nn.GELU(), None])
    for act, error, message in [
        ("relu", ValueError, "'gelu', 'silu', 'softplus', 'mish'"),
        (3, TypeError, "act"),
        (nn.GELU(), TypeError, "such as nn.GELU"),
        (lambda: F.gelu, TypeError, "must return an nn.Module"),
        (lambda: shared, ValueError, "the same one twice"),
        (lambda: next(made), TypeError, "it returned None"),
    ]:
        with pytest.raises(error, match=message):
            smoothify(model, act, inplace=True)
    assert [type(module) for module in model] == [nn.ReLU, Functional, nn.ReLU]


def test_models_that_cannot_be_changed_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out, and so is torch.jit
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for changed, message in [
        (torch.jit.ScriptModule(), r"the model is compiled by torch\.jit .* before torch\.jit"),
        (torch.compile(model, backend="eager"), r"the model is compiled by torch\.compile .* first, then compile it"),
        (nn.Sequential(torch.compile(model, backend="eager")), r"0 is compiled by torch\.compile"),
        (torch.export.export(model, (torch.rand(3, 2),)).module(), r"exported by torch\.export .* then export it"),
        (quantized, "0 is quantised .* in floating point, train it, then quantise it"),
    ]:
        modules = list(changed.modules())
        with pytest.raises(TypeError, match=message):
            smoothify(changed)
        assert list(changed.modules()) == modules
    for function in (smoothify, find_nonsmooth):
        with pytest.raises(TypeError):
            function(F.relu)
    traced = torch.fx.symbolic_trace(Functional())
    assert "traced" in find_nonsmooth(traced)[0].reason
    instance = Functional()
    instance.forward = lambda x: F.relu(x)
    assert "set on the instance" in find_nonsmooth(instance)[0].reason


@pytest.mark.parametrize(
    ("act", "kind"), [("gelu", nn.GELU), ("silu", nn.SiLU), ("softplus", nn.Softplus), ("mish", nn.Mish)]
)
def test_named_activations(act: str, kind: type[nn.Module]) -> None:
    assert type(smoothify(nn.Sequential(nn.ReLU()), act)[0]) is kind


def test_softplus_has_the_curvature_of_gelu_at_zero() -> None:
    for act in ("softplus", "gelu"):
        (smooth,) = smoothify(nn.Sequential(nn.ReLU()), act)
        curvature = torch.func.grad(torch.func.grad(smooth))(torch.zeros((), dtype=torch.float64))
        assert curvature.item() == pytest.approx(math.sqrt(2 / math.pi))


def test_a_model_without_values_is_smoothified_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), Functional())
    smooth = smoothify(model)
    assert [type(module).__name__ for module in smooth] == ["Linear", "GELU", "Functional"]
    assert all(parameter.is_meta for parameter in smooth.parameters())
    assert smooth.to_empty(device="cpu")(torch.rand(3, 2)).shape == (3, 3)


def test_the_kernel_of_a_linear_attention_stays_positive() -> None:
    model = timm.create_model("efficientvit_b0", num_classes=10)
    smooth, report = smoothify(model, return_report=True)
    kernels = {entry.new for entry in report.replaced if entry.name.endswith("kernel_func")}
    assert kernels == {"Softplus"}
    assert {entry.new for entry in report.replaced if not entry.name.endswith("kernel_func")} == {"SiLU"}
    assert smooth(torch.rand(2, 3, 64, 64)).isfinite().all()


# What is kept, and what is undone


def test_what_is_to_be_kept_is_kept() -> None:
    model = nn.ModuleDict({"table": nn.Sequential(nn.ReLU(), Functional()), "body": nn.Sequential(nn.ReLU())})
    for keep, replaced in [
        ([], ["table.0", "body.0", "table.1"]),
        (["table.0"], ["body.0", "table.1"]),
        (["table.*"], ["body.0"]),
        (("*.1", "body*"), ["table.0"]),
    ]:
        smooth, report = smoothify(model, keep=keep, return_report=True)
        assert [entry.name for entry in report.replaced] == replaced
        kept = {"table.0", "body.0", "table.1"} - set(replaced)
        assert {entry.name for entry in report.remaining} == kept
        assert find_nonsmooth(smooth) == report.remaining
    with pytest.raises(
        ValueError, match=r"nothing that could be replaced is called 'tables\.\*'; there are \['table\.0'"
    ):
        smoothify(model, keep=["tables.*"])
    with pytest.raises(ValueError, match="no activation that can be replaced"):
        smoothify(model, keep=["*"])


def test_keep_is_no_string(unchecked: None) -> None:
    with pytest.raises(TypeError, match="a list of names, got the string 'table'"):
        smoothify(nn.Sequential(nn.ReLU()), keep="table")


def test_a_swin_v2_can_keep_the_table_of_its_positions() -> None:
    model = timm.create_model("swinv2_tiny_window16_256", img_size=64, num_classes=10)
    before, x = copy.deepcopy(model.state_dict()), torch.rand(1, 3, 64, 64)
    assert not any(found.kind == "ReLU" for found in find_nonsmooth(model, x))  # none that x reaches
    with pytest.raises(ValueError, match="no activation"):
        smoothify(model, keep=["*.cpb_mlp.*"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CALLS)
def test_functional_calls_are_as_before(kind: type[Calls]) -> None:
    model, x = kind(), torch.randn(5, 4)
    smooth = smoothify(model)
    with torch.no_grad():
        smooth.b.bias.add_(1.0)
    before = unsmoothify(smooth)
    assert type(before) is kind
    assert vars(before).keys() == vars(model).keys()
    torch.testing.assert_close(before(x), model(x) + 1.0)  # with the weights that the smooth model has now
    assert type(smooth) is not kind
    assert find_nonsmooth(before) == find_nonsmooth(model)


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_are_as_before(inplace: bool) -> None:
    act = nn.LeakyReLU(0.3)
    inner = nn.Sequential(nn.Hardtanh(0.0, 2.0), nn.Linear(4, 4), act, Functional(), nn.Hardswish())
    model = nn.Sequential(act, inner, nn.Linear(3, 4), nn.GELU()).eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    expected = copy.deepcopy(model)
    del inner
    smooth = smoothify(model, inplace=inplace)
    before = unsmoothify(smooth, inplace=inplace)
    assert (before is smooth) == inplace
    assert repr(before) == repr(expected)
    assert before[0] is before[1][2]  # shared again
    assert [module.training for module in before.modules()] == flags
    assert before[1][0].max_val == 2.0


def test_undo_survives_a_pickle_and_keeps_later_flags() -> None:
    smooth = pickle.loads(pickle.dumps(smoothify(nn.Sequential(nn.ReLU(), Functional()).eval()))).train()
    before = unsmoothify(smooth)
    assert [type(module) for module in before] == [nn.ReLU, Functional]
    assert before[0].training


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("activation", [F.relu, nn.ReLU()])
def test_the_fast_path_of_a_transformer_layer_is_as_before(act: str, activation: object) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 8)
    before = unsmoothify(smoothify(model, act))
    for new, old in zip(before.modules(), model.modules(), strict=True):
        assert vars(new).keys() == vars(old).keys()
    assert before.use_nested_tensor == model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in before.layers] == [1, 1]
    assert torch.equal(before(x), model(x))


def test_an_activation_alone_is_as_before() -> None:
    alone = smoothify(nn.ReLU())
    assert type(unsmoothify(alone)) is nn.ReLU
    with pytest.raises(ValueError, match="leave inplace out"):
        unsmoothify(alone, inplace=True)


def test_nothing_to_undo_is_an_error(unchecked: None) -> None:
    with pytest.raises(ValueError, match="nothing that smoothify put there was found in Sequential"):
        unsmoothify(nn.Sequential(nn.GELU()))
    with pytest.raises(TypeError, match="expected the model to be an nn"):
        unsmoothify(F.gelu)


# Transformer layers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("act", ["gelu", "silu", functools.partial(nn.GELU, approximate="tanh")])
@pytest.mark.parametrize("activation", [F.relu, nn.ReLU()])
def test_the_fast_path_of_a_transformer_layer_computes_the_same(act: object, activation: object) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [4], [2]])
    smooth, report = smoothify(model, act, return_report=True)
    assert [entry.name for entry in report.replaced] == ["layers.0.activation", "layers.1.activation"]
    assert report.remaining == ()
    assert list(smooth.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        fast, fast_padded = smooth(x), smooth(x, src_key_padding_mask=padded)
    torch.testing.assert_close(fast, smooth(x), atol=1e-6, rtol=1e-5)
    slow_padded = smooth(x, src_key_padding_mask=padded)
    torch.testing.assert_close(fast_padded[~padded], slow_padded[~padded], atol=1e-6, rtol=1e-5)
    assert (model(x) - fast).abs().max() > 1e-4


def test_a_transformer_decoder_layer() -> None:
    smooth = smoothify(nn.TransformerDecoderLayer(8, 2, 16))
    assert isinstance(smooth.activation, nn.GELU)
    assert find_nonsmooth(smooth) == ()


# Whole models


def swap_by_hand(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.GELU())
        swap_by_hand(child)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnets_equal_their_hand_written_twin(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    smooth, report = smoothify(model, return_report=True)
    by_hand = copy.deepcopy(model)
    swap_by_hand(by_hand)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(smooth(x), by_hand(x))
    assert {type(entry) for entry in report.replaced} == {Replacement}
    assert {(entry.old, entry.new) for entry in report.replaced} == {("ReLU", "GELU")}
    assert [entry.kind for entry in report.remaining] == ["MaxPool2d"]
    assert [(key, value.shape) for key, value in smooth.state_dict().items()] == [
        (key, value.shape) for key, value in model.state_dict().items()
    ]


def test_densenet_calls_relu_in_its_forward() -> None:
    model = torchvision.models.densenet121(weights=None, num_classes=10).eval()
    smooth, report = smoothify(model, return_report=True)
    by_hand = copy.deepcopy(model)
    swap_by_hand(by_hand)
    x = torch.rand(1, 3, 32, 32)
    features = F.gelu(by_hand.features(x))
    assert torch.equal(smooth(x), by_hand.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1)))
    assert str(report.replaced[-1]) == "(model): F.relu -> GELU"
    assert [entry.kind for entry in report.remaining] == ["MaxPool2d"]


def test_timm_resnet_equals_one_built_with_gelu() -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    built = timm.create_model("resnet18", num_classes=10, act_layer="gelu").eval()
    built.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(smoothify(model)(x), built(x))


def test_timm_mobilenet_keeps_the_scale_of_its_features() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    smooth, report = smoothify(model, return_report=True)
    exchanges = {(entry.old, entry.new) for entry in report.replaced}
    assert exchanges == {("ReLU", "GELU"), ("Hardswish", "SiLU"), ("Hardsigmoid", "Sigmoid")}
    assert report.remaining == ()
    x = torch.rand(8, 3, 64, 64)
    ratio = smooth.forward_features(x).std() / model.forward_features(x).std()
    assert 1 / 3 < ratio < 3


# What it is for


def largest_step_of_the_slope(model: nn.Module, points: int) -> float:
    """The largest change, from point to point of a line, of the derivative of the output along the line."""
    start, direction = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(-2, 2, points, dtype=torch.float64, requires_grad=True)
    x = start + t[:, None, None, None] * direction
    (slope,) = torch.autograd.grad(model(x).sum(), t)
    return slope.diff().abs().max().item()


def small_net() -> nn.Module:
    convolutions = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3), nn.Hardswish(), nn.Flatten())
    dense = nn.Sequential(nn.Linear(96, 3), nn.ELU(alpha=0.5), nn.Linear(3, 4), Functional())
    return nn.Sequential(convolutions, dense).double()


@pytest.mark.parametrize("act", ["gelu", "silu", "softplus", "mish"])
def test_the_slope_along_a_line_has_no_jump(act: str) -> None:
    model = small_net()
    smooth = smoothify(model, act)
    assert largest_step_of_the_slope(model, 8001) > 0.5 * largest_step_of_the_slope(model, 2001)
    assert largest_step_of_the_slope(smooth, 8001) < 0.3 * largest_step_of_the_slope(smooth, 2001)


def test_the_penalty_reaches_the_parameters_that_relu_hides() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()

    def bias_gradient(model: nn.Module) -> Tensor:
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(g.square().sum(), model[0].bias, materialize_grads=True)
        return result

    assert torch.equal(bias_gradient(model), torch.zeros(8, dtype=torch.float64))
    assert (bias_gradient(smoothify(model)).abs() > 1e-6).all()


def test_gradgradcheck_of_a_functional_model() -> None:
    smooth, x = smoothify(InPlaceStatement().double()), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth, x)
    assert torch.autograd.gradgradcheck(smooth, x)

"""find_nonsmooth: what it lists by the types of modules, and what a run on x meets; contracts and closed forms."""

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from gradreg.smooth import NonSmooth, find_nonsmooth


class Apply(nn.Module):
    """A function as a module, held where no type shows it."""

    def __init__(self, function: Callable[..., Any], *inner: nn.Module) -> None:
        super().__init__()
        self.held = SimpleNamespace(function=function)
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Any:
        return self.held.function(x, *self.inner)


def found_in(model: nn.Module, x: Tensor | None = None) -> list[tuple[str, str, bool]]:
    return [(found.name, found.kind, found.flat) for found in find_nonsmooth(model, x)]


def kinds(model: nn.Module, x: Tensor | None = None) -> list[str]:
    return [found.kind for found in find_nonsmooth(model, x)]


# By types


FLAT = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.RReLU(), nn.PReLU(), nn.Threshold(0.0, 0.0), nn.Threshold(1.0, 0.0),
    nn.Hardtanh(), nn.Hardsigmoid(), nn.Softshrink(), nn.Hardshrink(), timm.layers.HardSigmoid(),
]  # fmt: skip
CURVED = [
    nn.ELU(), nn.ELU(alpha=0.5), nn.CELU(), nn.SELU(), nn.Hardswish(), nn.Softsign(), timm.layers.HardSwish(),
    timm.layers.HardMish(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "flat"), [*((model, True) for model in FLAT), *((model, False) for model in CURVED)], ids=str
)
def test_flat_says_that_the_second_derivative_is_zero_almost_everywhere(model: nn.Module, flat: bool) -> None:
    (by_type,) = find_nonsmooth(model)
    assert (by_type.flat, by_type.calls, by_type.share) == (flat, None, None)
    for run in find_nonsmooth(model.eval(), torch.randn(8, 6)):
        assert (run.name, run.kind, run.flat) == ("", by_type.kind, flat)
    # By differences, since torch has no second derivative of hardsigmoid at all.
    model, x = model.double().eval(), torch.randn(50, 4, dtype=torch.float64)
    slope = torch.func.grad(lambda x: model(x).sum())
    assert torch.equal(slope(x + 1e-6), slope(x - 1e-6)) == flat


POOLS = [
    nn.MaxPool1d(2), nn.MaxPool2d(2), nn.MaxPool3d(2), nn.AdaptiveMaxPool1d(1), nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool3d(1), nn.FractionalMaxPool2d(2, output_size=2), nn.FractionalMaxPool3d(2, output_size=2),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_max_pooling_is_listed_and_not_flat(pool: nn.Module) -> None:
    kind = type(pool).__name__
    assert found_in(nn.Sequential(pool)) == [("0", kind, False)]
    shape = (2, 4, 4, 4, 4)[: 2 + int(kind[-2])]
    (found,) = find_nonsmooth(nn.Sequential(pool), torch.randn(shape))
    assert (found.name, found.kind, found.flat, found.calls, found.share) == ("0", kind, False, 1, None)


SMOOTH = [
    nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Mish(), nn.AvgPool1d(2), nn.LogSigmoid(),
    nn.Tanhshrink(), nn.Softmax(1), nn.GLU(1), nn.LayerNorm(6), nn.Identity(), timm.layers.Swish(),
]  # fmt: skip


@pytest.mark.parametrize("smooth", SMOOTH, ids=str)
def test_smooth_modules_are_not_listed(smooth: nn.Module) -> None:
    assert find_nonsmooth(nn.Sequential(smooth)) == find_nonsmooth(smooth, torch.randn(8, 6)) == ()


def test_types_are_listed_in_the_order_of_the_modules_and_runs_in_that_of_the_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.never = nn.ReLU(), nn.Softsign(), nn.Hardtanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(x))

    assert found_in(Backwards()) == [
        ("first", "ReLU", True),
        ("second", "Softsign", False),
        ("never", "Hardtanh", True),
    ]
    assert found_in(Backwards(), torch.randn(8, 6)) == [("second", "Softsign", False), ("first", "ReLU", True)]


def test_a_class_with_a_forward_of_its_own_is_not_judged_by_its_type() -> None:
    class Smooth(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x)

    class Inherits(nn.LeakyReLU):
        pass

    instance = nn.ReLU()
    instance.forward = lambda x: F.leaky_relu(x)
    x = torch.randn(8, 6)
    assert find_nonsmooth(Smooth()) == find_nonsmooth(Smooth(), x) == ()
    assert found_in(Inherits()) == found_in(Inherits(), x) == [("", "Inherits", True)]
    assert (find_nonsmooth(instance), found_in(instance, x)) == ((), [("", "F.leaky_relu", True)])


def test_types_show_no_calls() -> None:
    assert find_nonsmooth(Apply(F.relu)) == ()
    assert find_nonsmooth(torchvision.models.googlenet(weights=None, init_weights=False).inception3a.branch1) == ()


def encoder_layer(activation: Callable[[Tensor], Tensor] | str) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, 0.0, activation=activation)


RECURRENT_AND_TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, bool]]]] = {
    "RNN": (lambda: nn.RNN(6, 6, nonlinearity="relu"), [("", "RNN", True)]),
    "RNNCell": (lambda: nn.RNNCell(6, 6, nonlinearity="relu"), [("", "RNNCell", True)]),
    "RNN, tanh": (lambda: nn.RNN(6, 6), []),
    "GRU": (lambda: nn.GRU(6, 6), []),
    "encoder": (lambda: encoder_layer("relu"), [("", "F.relu", True)]),
    "encoder, module": (lambda: encoder_layer(nn.ReLU()), [("activation", "ReLU", True)]),
    "encoder, GELU": (lambda: encoder_layer("gelu"), []),
    "encoder, another": (lambda: encoder_layer(F.elu), [("", "F.elu", False)]),
}


@pytest.mark.parametrize("name", RECURRENT_AND_TRANSFORMERS)
def test_what_recurrent_and_transformer_layers_hold_is_listed(name: str) -> None:
    make, expected = RECURRENT_AND_TRANSFORMERS[name]
    assert found_in(make()) == expected
    assert found_in(make(), torch.randn(4, 6)) == expected


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_layers_prepared_for_quantisation_are_listed() -> None:
    layer = torch.ao.nn.intrinsic.qat.ConvReLU2d(3, 3, 1, qconfig=torch.ao.quantization.default_qat_qconfig)
    assert found_in(nn.Sequential(layer)) == [("0", "ConvReLU2d", True)]


# A run on x


def masked_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


def held_relu_in_place(x: Tensor) -> Tensor:
    z = x * 2
    z.relu_()
    return z


def branching(x: Tensor) -> Tensor:
    return x.sin() if x.norm() > 1.57 else x.cos()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    scripted = torch.jit.script(masked_in_place)
    scripted_relu = torch.jit.script(F.leaky_relu)

# What a function of numbers of shape (4, 6) is found to be, and whether it is flat.
HIDDEN: dict[str, tuple[Callable[[Tensor], Any], list[tuple[str, bool]]]] = {
    "a list and a dictionary": (lambda x: {0: [F.relu, F.tanh]}[0][0](x), [("F.relu", True)]),
    "held": (F.relu, [("F.relu", True)]), "celu": (F.celu, [("F.celu", False)]), "elu": (F.elu, [("F.elu", False)]),
    "relu6": (F.relu6, [("F.hardtanh", True)]), "hardsigmoid": (F.hardsigmoid, [("F.hardsigmoid", True)]),
    "hardswish": (F.hardswish, [("F.hardswish", False)]), "softshrink": (F.softshrink, [("F.softshrink", True)]),
    "rrelu": (lambda x: F.rrelu(x, training=True), [("F.rrelu", True)]),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.1])), [("F.prelu", True)]),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.0), [("F.threshold", True)]),
    "vmap": (torch.vmap(abs), [("torch.abs", False)]), "operator": (lambda x: x * abs(x), [("torch.abs", False)]),
    "named": (lambda x: getattr(F, "re" + "lu")(x), [("F.relu", True)]),
    "in place": (held_relu_in_place, [("F.relu", True)]), "module": (lambda x: nn.ReLU6()(x), [("F.hardtanh", True)]),
    "a part": (lambda x: x.clone()[:, 2:].clamp_(-1, 1), [("torch.clamp", False)]),
    "remainder": (lambda x: x % 1, [("torch.remainder", False)]),
    "floor": (lambda x: x.floor() + x.ceil(), [("torch.floor", False), ("torch.ceil", False)]),
    "floor division": (lambda x: x // 1, [("torch.floor_divide", False)]),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), [("torch.gt", False)]),
    "assignment to a mask": (masked_in_place, [("torch.lt", False)]),
    "scripted": (lambda x: scripted(x), [("torch.lt", False)]),
    "scripted activation": (lambda x: scripted_relu(x), [("F.leaky_relu", True)]),
    "a mask as numbers": (lambda x: x * (x >= 0).to(x), [("torch.ge", False)]),
    "a branch": (branching, [("torch.gt", False)]),
    "masked": (lambda x: x.masked_fill(torch.ones(4, 6).triu(1) > 0, -math.inf).amax(1), [("torch.amax", False)]),
    "maximum": (lambda x: torch.maximum(x, x.flip(1)), [("torch.maximum", False)]),
    "max": (lambda x: x.max(1).values, [("torch.max", False)]), "max of all": (torch.max, [("torch.max", False)]),
    "sort": (lambda x: x.sort(1).values, [("torch.sort", False)]),
    "sorted by an index": (lambda x: x.gather(1, x.argsort(1)), [("torch.sort", False)]),
    "topk": (lambda x: torch.zeros_like(x).scatter(1, x.topk(2).indices, 1.0), [("torch.topk", False)]),
    "argmax": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), [("torch.argmax", False)]),
    "pooling": (lambda x: F.max_pool2d(x[None], 2), [("F.max_pool2d", False)]),
    "round": (lambda x: x + (x.round() - x).detach(), [("torch.round", False)]),
    "selection by a mask": (lambda x: x[x > 0].sum(), [("torch.gt", False)]),
    "an inner gradient": (lambda x: torch.func.grad(lambda z: F.relu(z).sum())(x) * x, [("F.relu", True)]),
    "mixed precision": (torch.autocast("cpu", torch.bfloat16)(lambda x: abs(x @ x.T)), [("torch.abs", False)]),
    "two": (lambda x: abs(x).relu(), [("torch.abs", False), ("F.relu", True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_a_run_meets_what_no_type_shows(name: str) -> None:
    function, expected = HIDDEN[name]
    model = nn.Sequential(nn.Identity(), Apply(function))
    x = torch.randn(4, 6)
    assert not find_nonsmooth(model)
    assert found_in(model, x) == [("1", kind, flat) for kind, flat in expected]
    assert all(found.calls >= 1 for found in find_nonsmooth(model, x))


# Of inputs of shape (8, 6).
NONE_FOUND: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.GELU()),
    "activations": lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Mish(), nn.GroupNorm(2, 6), nn.Softplus()),
    "attention": lambda: Apply(lambda x, layer: layer(*[x] * 3)[0], nn.MultiheadAttention(6, 2)),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, activation="gelu"),
    "recurrence": lambda: Apply(lambda x, layer: layer(x)[0], nn.GRU(6, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.LayerNorm(6)),
    "dropout by hand": lambda: Apply(lambda x: x * (torch.rand_like(x) < 0.5)),
    "a causal mask": lambda: Apply(lambda x: (x @ x.T).masked_fill(torch.ones(8, 8).triu(1) > 0, -math.inf).softmax(1)),
    "in place": lambda: Apply(lambda x: x.clone().sigmoid_().add_(x).mul_(2)),
    "formulas": lambda: Apply(lambda x: (x.exp().log1p().sqrt() / (x.square() + 1)).pow(2.5) * x.norm(dim=1)[:, None]),
    "a mask of its own": lambda: Apply(lambda x: x[torch.arange(8) < 3].where(torch.eye(3, 6) > 0, 0)),
    "what x does not reach": lambda: Apply(lambda x: x + torch.linspace(-1, 1, 6).to(x).abs().relu()),
    "parameters": lambda: Apply(lambda x, layer: x * layer.weight.abs().relu().clamp(0, 1), nn.Linear(6, 1)),
    "what no gradient reaches": lambda: Apply(lambda x: x * x.detach().abs().mean()),
    "a table of positions": lambda: Apply(lambda x, table: x + table(torch.ones(8, 6)), two_layers()),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NONE_FOUND)
def test_a_run_lists_nothing_where_nothing_that_x_reaches_breaks(name: str, train: bool) -> None:
    assert find_nonsmooth(NONE_FOUND[name]().train(train), torch.randn(8, 6)) == ()


class Branches(nn.Module):
    """Has more than its input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 100:
            return F.hardtanh(x)
        return torch.round(x) / x.norm(dim=1, keepdim=True).clip(min=1e-6)


def test_of_several_branches_the_one_that_x_takes_is_met_and_a_guard_that_changes_nothing_has_no_share() -> None:
    assert kinds(Branches()) == ["ReLU"]
    guard, rounding = sorted(find_nonsmooth(Branches(), torch.randn(8, 6)), key=lambda found: found.kind)
    assert (guard.kind, guard.share, rounding.kind, rounding.share) == ("torch.clamp", 0.0, "torch.round", 1.0)
    assert "0%" in str(guard)
    assert kinds(Branches(), torch.randn(200, 6)) == ["F.hardtanh"]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20), st.floats(-1, 1, width=32))
def test_the_share_is_the_part_of_the_numbers_that_were_changed(values: list[float], limit: float) -> None:
    x = torch.tensor(values)
    for function, changed in [
        (lambda x: x.clamp(min=limit), x < limit),
        (lambda x: x.clone().clamp_(max=limit), x > limit),
        (torch.relu, x < 0),
        (abs, x < 0),
        (F.hardtanh, x.abs() > 1),
    ]:
        (found,) = find_nonsmooth(Apply(function), x[:, None])
        assert found.share == pytest.approx(changed.double().mean().item())
        assert found.calls == 1


def test_calls_are_counted_and_the_share_is_their_mean() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return abs(self.act(x) + self.act(x + 10) + self.act(x + 10)) + abs(x)

    x = torch.tensor([[-1.0], [1.0]])
    relu, absolute = find_nonsmooth(Repeats(), x)
    assert (relu.name, relu.kind, relu.calls, relu.share) == ("act", "ReLU", 3, pytest.approx(0.5 / 3))
    assert (absolute.name, absolute.kind, absolute.calls, absolute.share) == ("", "torch.abs", 2, pytest.approx(0.25))
    assert "3 calls" in str(relu)


def test_a_comparison_has_no_share() -> None:
    (found,) = find_nonsmooth(Apply(lambda x: x * (x > 1e9)), torch.randn(8, 6))
    assert (found.kind, found.share, found.calls) == ("torch.gt", None, 1)


def two_layers(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace))


class Mirrored(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, once: bool = False) -> Tensor:
        return abs(self.layer(x)) if once else (self(x, True) + self(x.flip(-1), True)) / 2


class Forgiving(nn.Module):
    """Catches what a layer raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(5, 5), nn.Softsign()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.layer(x)
        except RuntimeError:
            return self.act(x).relu()


# With what is found in it, of inputs of shape (4, 6).
NAMES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, bool]]]] = {
    "itself": (nn.ReLU, [("", "ReLU", True)]),
    "drawn anew": (nn.RReLU, [("", "RReLU", True)]),
    "used twice": (lambda: nn.Sequential(*[nn.Linear(6, 6), nn.ReLU()] * 2), [("1", "ReLU", True)]),
    "in place": (lambda: two_layers(inplace=True), [("1", "ReLU", True)]),
    "bfloat16": (lambda: two_layers().bfloat16(), [("1", "ReLU", True)]),
    "inside": (lambda: Apply(lambda x, inner: inner(x), Apply(abs)), [("inner.0", "torch.abs", False)]),
    "calls itself": (Mirrored, [("", "torch.abs", False)]),
    "catches": (Forgiving, [("act", "Softsign", False), ("", "F.relu", True)]),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_bears_the_name_of_the_innermost_module_that_runs_it(name: str, train: bool) -> None:
    make, expected = NAMES[name]
    model = make().train(train)
    x = torch.randn(4, 6, dtype=next(model.parameters(), torch.ones(1)).dtype)
    assert found_in(model, x) == expected
    inside = [(f"1.{key}".rstrip("."), kind, flat) for key, kind, flat in expected]
    assert found_in(nn.Sequential(nn.Identity(), model), x) == inside


def test_a_scripted_module_is_listed_and_what_it_runs_as_well() -> None:
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        model = nn.Sequential(nn.Identity(), torch.jit.script(nn.ReLU()))
    (by_type,) = find_nonsmooth(model)
    assert (by_type.name, by_type.flat) == ("1", False)
    assert "torch.jit" in by_type.fix
    (run,) = find_nonsmooth(model, torch.randn(8, 6))
    assert run.flat


def test_what_is_found_is_shown_with_name_kind_and_reason() -> None:
    (found,) = find_nonsmooth(nn.ReLU(), torch.tensor([[-1.0, 1.0, 2.0, 3.0]]))
    assert isinstance(found, NonSmooth)
    assert str(found).startswith("(model): ReLU: ")
    assert found.reason in str(found)
    assert "1 call" in str(found)
    assert "25%" in str(found)


# What a run leaves as it was


class Counts(nn.Module):
    """Writes to a buffer, and to an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.last = x
        return x


def delicate() -> tuple[nn.Module, Tensor]:
    """Whatever a forward pass could change: statistics, vectors of spectral_norm, draws, modes, gradients, hooks."""
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    model = nn.Sequential(
        spectral, nn.BatchNorm1d(6), nn.Dropout(0.5), nn.RReLU(), nn.LayerNorm(6), Apply(abs), Counts()
    )
    model[3].eval()
    model[4].register_forward_hook(lambda *_: None)
    model(torch.randn(8, 6)).sum().backward()
    return model, torch.randn(8, 6, requires_grad=True)


def state_of(model: nn.Module, x: Tensor) -> list[Any]:
    held = [x, *model.parameters(), *model.buffers()]
    grads = [tensor.grad is None or tensor.grad.tolist() for tensor in held]
    values = [(tensor.tolist(), tensor.requires_grad, tensor._version) for tensor in held]
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [grads, values, modules, torch.get_rng_state().tolist(), torch.is_grad_enabled(), model[6].last]


def test_a_second_call_finds_the_same_and_the_model_x_and_the_random_numbers_stay_as_they_were() -> None:
    model, x = delicate()
    before, found = state_of(model, x), find_nonsmooth(model, x)
    assert [site.kind for site in found] == ["RReLU", "torch.abs"]
    assert find_nonsmooth(model, x.detach().clone()) == found
    with torch.no_grad():
        assert find_nonsmooth(model, x) == found
    after = state_of(model, x)
    assert after[-1] is before[-1]
    assert after[:-1] == before[:-1]


def test_after_an_error_of_the_model_everything_is_as_it_was() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 3)
    random_numbers, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_nonsmooth(model, x)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model[0].num_batches_tracked == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("function", [lambda x: x.mul_(2).relu_(), lambda x: x.relu_(), lambda x: x[:, :3].fill_(0)])
def test_a_model_may_write_to_its_input(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 6)
    before = x.clone()
    find_nonsmooth(Apply(function), x)
    assert torch.equal(x, before)


def test_a_model_may_use_random_numbers_of_another_library() -> None:
    state = random.getstate()
    try:
        random.seed(0)
        assert kinds(Apply(lambda x: x.relu() if random.random() < 2 else x), torch.randn(8, 6)) == ["F.relu"]
    finally:
        random.setstate(state)


# Where the model stands


def test_a_model_that_is_to_be_compiled_is_not_compiled_for_this() -> None:
    backend = CompileCounter()
    assert found_in(torch.compile(two_layers(), backend=backend), torch.randn(4, 6)) == [("_orig_mod.1", "ReLU", True)]
    assert backend.frame_count == 0


def test_data_parallel_is_looked_through_wherever_it_is(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x, model = torch.randn(4, 6), DistributedDataParallel(two_layers())
        assert found_in(model) == found_in(model, x) == [("module.1", "ReLU", True)]
        assert found_in(nn.Sequential(nn.Identity(), model), x) == [("1.module.1", "ReLU", True)]
        assert found_in(torch.compile(model), x) == [("_orig_mod.module.1", "ReLU", True)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode_finds_the_same(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), Apply(F.celu), Apply(abs)).to(dtype)
    x = torch.randn(8, 6, dtype=dtype)
    expected = find_nonsmooth(model, x)
    with torch.inference_mode():
        assert find_nonsmooth(model, x) == expected
        assert find_nonsmooth(model, torch.ones_like(x).mul_(x)) == expected


def test_the_draws_of_a_run_are_those_of_the_next_forward_pass() -> None:
    """So that the modes and the numbers are those that a training step would meet."""
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Dropout(0.5), Apply(lambda x: seen.append(x.detach().clone()) or x))
    x = torch.ones(8, 6)
    find_nonsmooth(model, x)
    model(x)
    assert torch.equal(*seen)


def test_lists_of_sites_of_a_network_of_torchvision() -> None:
    model, x = torchvision.models.googlenet(weights=None, init_weights=False).eval(), torch.rand(1, 3, 64, 64)
    found = find_nonsmooth(model, x)
    assert {site.kind for site in found} == {"F.relu", "MaxPool2d"}
    assert {site.kind for site in find_nonsmooth(model)} == {"MaxPool2d"}


# What is refused

FSDPModule = type("FSDPModule", (nn.Linear,), {})  # what fully_shard makes of a layer bears this name


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (torch.relu, torch.randn(2, 3), TypeError, r"expected the model to be an nn\.Module"),
        (nn.ReLU(), [[1.0]], TypeError, "x is a list, not a tensor"),
        (nn.ReLU(), torch.ones(2, 3, dtype=torch.int64), TypeError, r"torch\.int64"),
        (nn.ReLU(), torch.ones(0, 3), ValueError, r"x has shape \(0, 3\)"),
        (nn.ReLU(), torch.tensor([[math.inf, math.nan]]), ValueError, "2 values that are NaN or infinite"),
        (nn.ReLU(), torch.ones(2, 3, device="meta"), ValueError, "meta device"),
        (nn.BatchNorm1d(3, affine=False, device="meta"), torch.ones(2, 3), ValueError, "meta device"),
        (nn.Sequential(FSDPModule(3, 3)), torch.ones(2, 3), ValueError, "call it before fully_shard"),
        (nn.Linear(4, 4), torch.ones(2, 3), RuntimeError, "shapes cannot be multiplied"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_run_is_refused_with_a_reason(model: Any, x: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        find_nonsmooth(model, x)


@pytest.mark.usefixtures("unchecked")
def test_by_types_a_model_needs_no_values() -> None:
    assert kinds(nn.Sequential(nn.Linear(2, 2, device="meta"), nn.ReLU())) == ["ReLU"]
    assert kinds(nn.Sequential(FSDPModule(3, 3), nn.ReLU())) == ["ReLU"]
    with pytest.raises(TypeError, match="expected the model"):
        find_nonsmooth(torch.relu)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    class Uncopied(nn.ReLU):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise ValueError("no copies")

    with pytest.raises(RuntimeError, match=r"cannot be copied .*no copies.* Leave x out"):
        find_nonsmooth(Uncopied(), torch.randn(8, 6))
    assert kinds(Uncopied()) == ["Uncopied"]


def test_the_error_of_a_model_that_does_not_run_is_its_own_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        find_nonsmooth(nn.Linear(4, 4), torch.ones(2, 3))
    assert raised.value.__context__ is None

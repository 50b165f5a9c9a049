"""find_break and find_nonsmooth(model, x): closed forms, what is found in models written by hand, and contracts.

``find_break`` is given curves whose breaks are known. Every operation that ``probe`` takes for smooth is tried by it,
since no model tries them. ``find_nonsmooth`` is then given models with known kinks, most of which no code shows.
"""

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gradreg.smooth import find_nonsmooth
from gradreg.smooth.breaks import Break, find_break
from gradreg.smooth.probe import SMOOTH

FLOAT64 = torch.float64
Curve = Callable[[float], Tensor]
aten = torch.ops.aten

# Functions of the distance from the break, with the order of what breaks at 0.
BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "step": (lambda t: torch.heaviside(t, torch.zeros_like(t)), 0), "sign": (torch.sign, 0),
    "fraction": (lambda t: torch.where(t < 0, t, t - 1), 0), "abs": (torch.abs, 1), "relu": (torch.relu, 1),
    "leaky_relu": (lambda t: F.leaky_relu(t, 0.3), 1), "elu": (lambda t: F.elu(t, 0.5), 1), "celu": (F.celu, 2),
    "t*|t|": (lambda t: t * t.abs(), 2), "relu^2": (lambda t: t.relu() ** 2, 2),
}  # fmt: skip
SMOOTH_CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"t^{power}": lambda t, power=power: (t - 0.3) ** power for power in range(8)},
    **{f"sin({frequency}t)": lambda t, f=frequency: (f * t).sin() for frequency in (1, 10, 40, 100, 200)},
    **{f"exp({rate}t)": lambda t, rate=rate: (rate * t).exp() for rate in (-20, -1, 1, 20)},
    **{f"sigmoid({beta}t)": lambda t, b=beta: (b * (t - 0.4)).sigmoid() for beta in (1, 30, 300, 3000)},
    **{f"softplus({beta}t)": lambda t, b=beta: F.softplus(t - 0.4, b, math.inf) for beta in (1, 30, 300, 3000)},
    "gelu": lambda t: F.gelu(20 * (t - 0.4)), "sqrt": lambda t: ((t - 0.4) ** 2 + 1e-2).sqrt(),
    "a bell": lambda t: 1 / (1 + (30 * (t - 0.4)) ** 2),
}  # fmt: skip
# Also on points that are tried.
places = st.floats(0.04, 0.96) | st.sampled_from([3 / 32, 1 / 4, 31 / 64, 1 / 2, 29 / 32])


def curve_of(function: Callable[[Tensor], Tensor], *breaks: float, dtype: torch.dtype = FLOAT64) -> Curve:
    """A function of the distances from these places, one element each."""
    return lambda t: function(t - torch.tensor(breaks or [0.0], dtype=dtype))


def order_and_share(found: Break | None) -> tuple[int, float] | None:
    return found and (found.order, found.share)


@pytest.mark.parametrize("name", BROKEN)
@given(place=places)
def test_a_break_is_found_with_its_order_wherever_it_lies(name: str, place: float) -> None:
    function, order = BROKEN[name]
    assert order_and_share(find_break(curve_of(function, place))) == (order, 1.0)


@pytest.mark.parametrize("name", SMOOTH_CURVES)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_a_smooth_curve_has_no_break_however_fast_it_changes(name: str, dtype: torch.dtype) -> None:
    assert find_break(curve_of(SMOOTH_CURVES[name], dtype=dtype)) is None


@given(places, st.floats(1e-6, 1e6), st.floats(-1, 1), st.floats(0, 6), st.sampled_from([*BROKEN]))
def test_a_break_stays_under_scaling_shifting_and_the_addition_of_a_smooth_function(
    place: float, scale: float, shift: float, phase: float, name: str
) -> None:
    function, order = BROKEN[name]
    curve, expected = curve_of(function, place), (order, 1.0)
    assert order_and_share(find_break(lambda t: scale * curve(t))) == expected
    assert order_and_share(find_break(lambda t: curve(t) + shift)) == expected
    assert order_and_share(find_break(lambda t: curve(t) + math.sin(t + phase))) == expected
    assert order_and_share(find_break(lambda t: -curve(1 - t))) == expected


@given(broken=st.lists(places, min_size=1, max_size=9), smooth=st.integers(0, 9), name=st.sampled_from([*BROKEN]))
def test_the_share_is_the_part_of_the_elements_that_break(broken: list[float], smooth: int, name: str) -> None:
    function, order = BROKEN[name]
    curve, rest = curve_of(function, *broken), curve_of(torch.sin, *torch.rand(smooth).tolist())
    found = find_break((lambda t: torch.cat([rest(t), curve(t)])) if smooth else curve)
    assert order_and_share(found) == (order, pytest.approx(len(broken) / (len(broken) + smooth)))


@given(first=places, second=places)
def test_the_lowest_order_of_several_counts(first: float, second: float) -> None:
    curves = [curve_of(BROKEN[name][0], first, second) for name in ("step", "abs", "t*|t|")]
    for lowest in (0, 1, 2):
        found = find_break(lambda t, lowest=lowest: torch.cat([curve(t) for curve in reversed(curves[lowest:])]))
        assert order_and_share(found) == (lowest, 1.0)


@pytest.mark.parametrize(("bent", "linear"), [(0, True), (1, True), (4, False), (8, False)])
def test_a_curve_is_linear_if_nearly_all_its_elements_are_straight_but_for_kinks(bent: int, linear: bool) -> None:
    kinks = torch.linspace(0.1, 0.9, 8, dtype=FLOAT64)
    powers = torch.tensor([2.0] * bent + [1.0] * (8 - bent), dtype=FLOAT64)
    assert find_break(lambda t: (t - kinks).abs() + t**powers) == Break(1, 1.0, linear)


@pytest.mark.parametrize("name", ["step", "fraction", "abs", "relu", "elu", "t*|t|", "relu^2"])
@given(place=places)
def test_single_precision_tells_values_and_slopes_but_no_curvatures(name: str, place: float) -> None:
    function, order = BROKEN[name]
    found = find_break(curve_of(function, place, dtype=torch.float32))
    assert (order_and_share(found) == (order, 1.0)) if order < 2 else (found is None)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, -3e30, 1e-300])
def test_elements_that_are_constant_infinite_or_nan_all_along_are_no_break(value: float) -> None:
    for expected in (False, True):
        assert find_break(lambda t: torch.tensor([value, t, t**2], dtype=FLOAT64), expected=expected) is None
        found = find_break(lambda t: torch.tensor([value, t, value, abs(t - 0.3)], dtype=FLOAT64), expected=expected)
        assert order_and_share(found) == (1, 0.25)


def test_what_is_expected_to_break_is_believed_from_afar_and_what_does_not_look_broken_is_not() -> None:
    steep = curve_of(lambda t: F.softplus(t, 1000.0, math.inf), 0.4)
    assert find_break(steep) is None
    assert order_and_share(find_break(steep, expected=True)) == (1, 1.0)
    for name in ("t^3", "sin(10t)", "exp(1t)", "softplus(1t)"):
        assert find_break(curve_of(SMOOTH_CURVES[name]), expected=True) is None


def test_a_kink_that_is_no_larger_than_the_splice_of_two_formulas_is_none() -> None:
    for size, found in ((1e-8, None), (1e-4, Break(1, 1.0, linear=False))):
        assert find_break(curve_of(lambda t, size=size: t + t**2 + size * t.abs(), 0.3)) == found


def test_a_break_is_found_beside_what_looks_more_broken_from_afar() -> None:
    steep, small = curve_of(lambda t: (3000 * t).sigmoid(), 0.4), curve_of(torch.sign, 0.7)
    assert order_and_share(find_break(lambda t: torch.cat([steep(t), 0.1 * small(t)]))) == (0, 1.0)


def image(x: Tensor) -> Tensor:
    return x.reshape(1, 2, 4, 8)


# A small call of each with a tensor of shape (8, 8), which changes in every argument that may change.
CALLS: dict[str, Callable[[Tensor], Any]] = {
    **{name: getattr(torch, name) for name in ("neg", "exp", "sin", "cos", "erf", "tanh", "sigmoid")},
    "add": lambda x: x + x[0], "sub": lambda x: x - x[0], "mul": lambda x: x * x[0], "silu": F.silu, "mish": F.mish,
    "sum": lambda x: x.sum(1), "mean": lambda x: x.mean(1), "cumsum": lambda x: x.cumsum(1),
    "_softmax": lambda x: x.softmax(1), "convolution": lambda x: F.conv2d(image(x), x.reshape(4, 2, 4, 2), x[0, :4]),
    "gelu": lambda x: torch.stack([F.gelu(x), F.gelu(x, approximate="tanh")]),
    "softplus": lambda x: torch.stack([F.softplus(x), F.softplus(x, beta=10.0)]),
    "mm": lambda x: x @ x.T, "addmm": lambda x: F.linear(x, x, x[0]), "_unsafe_view": lambda x: x.reshape(2, 4, 8) @ x,
    "bmm": lambda x: x.reshape(2, 4, 8) @ x.reshape(2, 8, 4), "avg_pool2d": lambda x: F.avg_pool2d(image(x), 2),
    "baddbmm": lambda x: torch.baddbmm(x.reshape(2, 4, 8)[..., :4], x.reshape(2, 4, 8), x.reshape(2, 8, 4)),
    "_adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(image(x), 3),
    "upsample_bilinear2d": lambda x: F.interpolate(image(x), scale_factor=2, mode="bilinear"),
    "upsample_nearest2d": lambda x: F.interpolate(image(x), scale_factor=2),
    "upsample_bicubic2d": lambda x: F.interpolate(image(x), scale_factor=2, mode="bicubic"),
    "native_layer_norm": lambda x: F.layer_norm(x, (8,), x[0], x[1]),
    "native_group_norm": lambda x: F.group_norm(image(x), 2, x[0, :2], x[1, :2]),
    "native_batch_norm": lambda x: F.batch_norm(x, None, None, x[0], x[1], training=True),
    "_native_batch_norm_legit": lambda x: aten._native_batch_norm_legit.no_stats(x, x[0], x[1], True, 0, 1)[0],
    "_scaled_dot_product_flash_attention_for_cpu":
        lambda x: F.scaled_dot_product_attention(*x.reshape(2, 1, 4, 8).expand(3, 2, 1, 4, 8)),
    "native_dropout": lambda x: torch.manual_seed(1) and torch.native_dropout(x, 0.5, True)[0],
    # These copy and shift.
    "_to_copy": lambda x: x.to(torch.float32), "copy": lambda x: torch.zeros_like(x).copy_(x), "clone": torch.clone,
    "detach": torch.detach, "cat": lambda x: torch.cat([x, x[:1]]), "stack": lambda x: torch.stack([x, x]),
    "roll": lambda x: x.roll(1, 1), "flip": lambda x: x.flip(1), "repeat": lambda x: x.repeat(2, 1),
    "constant_pad_nd": lambda x: F.pad(x, (1, 1)), "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 4, 4), 2),
    "reflection_pad2d": lambda x: F.pad(image(x), (1, 1, 1, 1), mode="reflect"),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    # These only allocate.
    "empty_like": lambda x: torch.empty_like(x).fill_(1), "new_empty": lambda x: x.new_empty(8).fill_(1),
    "empty_strided": lambda x: torch.empty_strided((8,), (1,), dtype=x.dtype).fill_(1),
    "new_empty_strided": lambda x: x.new_empty_strided((8,), (1,)).fill_(1),
    "new_zeros": lambda x: x.new_zeros(8), "new_ones": lambda x: x.new_ones(8),
    "zeros_like": torch.zeros_like, "ones_like": torch.ones_like,
}  # fmt: skip


class Names(TorchDispatchMode):
    """The names of the operations below autograd, without the underscore of those in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.removeprefix("aten::").removesuffix("_"))
        return func(*args, **(kwargs or {}))


def test_each_operation_that_is_taken_for_smooth_is_tried_here() -> None:
    assert CALLS.keys() == SMOOTH


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_that_is_taken_for_smooth_is_smooth(name: str) -> None:
    for scale in (1.0, 10.0):
        start, end = scale * torch.randn(2, 8, 8, dtype=FLOAT64)
        with Names() as names:
            CALLS[name](start.clone().requires_grad_())
        assert name in names.seen
        assert find_break(lambda t, start=start, end=end: CALLS[name](start + t * (end - start)).flatten()) is None


class Apply(nn.Module):
    """A function as a module, held where its code cannot be read."""

    def __init__(self, function: Callable[..., Any], *inner: nn.Module) -> None:
        super().__init__()
        self.held = SimpleNamespace(function=function)
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Any:
        return self.held.function(x, *self.inner)


def found_in(model: nn.Module, x: Tensor) -> list[tuple[str, str, bool]]:
    return [(found.name, found.kind, found.flat) for found in find_nonsmooth(model, x)]


def masked_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    scripted = torch.jit.script(masked_in_place)

# What the function is found to be, by its operation below autograd and whether it is flat.
HIDDEN: dict[str, tuple[Callable[[Tensor], Any], list[tuple[str, bool]]]] = {
    "a list and a dictionary": (lambda x: {0: [F.relu, F.tanh]}[0][0](x), [("relu", True)]),
    "held": (F.relu, [("relu", True)]), "celu": (F.celu, [("celu", False)]), "vmap": (torch.vmap(abs), [("abs", True)]),
    "named": (lambda x: getattr(F, "re" + "lu")(x), [("relu", True)]),
    "in place": (lambda x: x.clone().relu_(), [("relu", True)]),
    "a part": (lambda x: x.clone()[:, 2:].clamp_(-1, 1), [("clamp", True)]),
    "x * |x|": (lambda x: {"x": [x * abs(x)]}, [("abs", True)]), "remainder": (lambda x: x % 1, [("remainder", False)]),
    "a Huber loss": (lambda x: F.huber_loss(x, torch.ones_like(x), reduction="none"), [("huber_loss", False)]),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), [("where", True)]),
    "where, curved": (lambda x: torch.where(x > 0, x.exp(), 1 + x), [("where", False)]),
    "assignment to a mask": (masked_in_place, [("index_put", True)]),
    "scripted": (lambda x: scripted(x), [("index_put", True)]),
    "a mask as numbers": (lambda x: x * (x > 0).to(x), [("_to_copy", False)]),
    "a mask that fills zeros": (lambda x: torch.zeros_like(x).masked_fill_(x > 0, 1.0), [("masked_fill", False)]),
    "a step, then a kink": (lambda x: torch.where(x > 0, x + 1, x) + torch.where(x > 0, x, 0), [("where", False)]),
    "masked": (lambda x: x[:, :4].masked_fill(torch.ones(4, 4).triu(1) > 0, -math.inf).amax(1), [("amax", False)]),
    "maximum": (lambda x: torch.maximum(x, x.flip(1)), [("maximum", True)]),
    "max": (lambda x: x.max(1).values, [("max", False)]), "sort": (lambda x: x.sort(1).values, [("sort", False)]),
    "sorted by an index": (lambda x: x.gather(1, x.argsort(1)), [("sort", False), ("gather", False)]),
    "topk": (lambda x: torch.zeros_like(x).scatter(1, x.topk(2).indices, 1.0), [("topk", False), ("scatter", False)]),
    "pooling": (lambda x: F.max_pool1d(x, 2), [("max_pool2d_with_indices", False)]),
    "round": (lambda x: x + (x.round() - x).detach(), [("round", False)]),
    "selection by a mask": (lambda x: x[x > 0].sum(), [("index", False)]),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_code_does_not_show_is_found_by_what_it_does(name: str) -> None:
    function, operations = HIDDEN[name]
    model = nn.Sequential(nn.Identity(), Apply(function))
    x = torch.randn(4, 6)
    assert not find_nonsmooth(model)
    assert found_in(model, x) == [("1", f"aten.{operation}", flat) for operation, flat in operations]
    assert all(0 < found.share <= 1 for found in find_nonsmooth(model, x))


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
    "a comparison that x does not change": lambda: Apply(lambda x: x * 2 if x.sum() < 1e9 else x.abs()),
    "what x does not reach": lambda: Apply(lambda x: x + torch.linspace(-1, 1, 6).to(x).abs().relu()),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NONE_FOUND)
def test_nothing_is_found_where_nothing_that_x_reaches_breaks(name: str, train: bool) -> None:
    assert find_nonsmooth(NONE_FOUND[name]().train(train), torch.randn(8, 6)) == ()


class Code(nn.Module):
    """Its code names more than its input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 100:
            return F.hardtanh(x)
        return torch.round(x) / x.norm(dim=1, keepdim=True).clip(min=1e-6)


def test_of_what_the_code_names_what_x_reaches_is_left_and_a_guard_that_is_not_met_has_no_share() -> None:
    assert {found.kind for found in find_nonsmooth(Code())} == {"ReLU", "F.hardtanh", "torch.round", "torch.clip"}
    guard, rounding = sorted(find_nonsmooth(Code(), torch.randn(8, 6)), key=lambda found: found.kind)
    assert (guard.kind, guard.share, rounding.kind) == ("torch.clip", 0.0, "torch.round")
    assert rounding.share > 0.5
    assert "(met in 0.0% of its outputs)" in str(guard)


def test_another_way_through_the_code_for_a_neighbour_is_a_branch() -> None:
    x, apart = torch.randn(8, 6), Apply(lambda z: z.exp() if torch.equal(z, x.to(z)) else z.sin().cos())
    model = nn.Sequential(nn.Identity(), apart, nn.Tanh())
    (found,) = find_nonsmooth(model, x)
    assert (found.name, found.kind, found.flat, found.share) == ("1", "branch", False, 1.0)
    assert "other operations" in found.reason


def two_layers(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace))


# With what is found in it, of inputs of shape (4, 6).
MODULES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, bool]]]] = {
    "itself": (nn.ReLU, [("", "ReLU", True)]), "drawn anew": (nn.RReLU, [("", "RReLU", True)]),
    "shared": (lambda: nn.Sequential(*[nn.Linear(6, 6), nn.ReLU()] * 2), [("1", "ReLU", True), ("3", "ReLU", True)]),
    "in place": (lambda: two_layers(inplace=True), [("1", "ReLU", True)]),
    "bfloat16": (lambda: two_layers().bfloat16(), [("1", "ReLU", True)]),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.5), [("activation", "F.relu", True)]),
    "inside": (lambda: Apply(lambda x, inner: inner(x), Apply(abs)), [("inner.0", "aten.abs", True)]),
    "single precision": (lambda: Apply(lambda x: abs(x @ torch.eye(6))), [("", "aten.abs", True)]),
    "mixed": (lambda: Apply(torch.autocast("cpu", torch.bfloat16)(lambda x: abs(x @ x.T))), [("", "aten.abs", True)]),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_what_is_found_bears_the_name_of_the_module_that_runs_it(name: str, train: bool) -> None:
    make, expected = MODULES[name]
    model = make().train(train)
    x = torch.randn(4, 6, dtype=next(model.parameters(), torch.ones(1)).dtype)
    assert found_in(model, x) == expected
    inside = [(f"1.{key}".rstrip("."), kind, flat) for key, kind, flat in expected]
    assert found_in(nn.Sequential(nn.Identity(), model), x) == inside


def test_a_model_that_is_to_be_compiled_is_not_compiled_for_this() -> None:
    backend = CompileCounter()
    assert found_in(torch.compile(two_layers(), backend=backend), torch.randn(4, 6)) == [("_orig_mod.1", "ReLU", True)]
    assert backend.frame_count == 0


def test_data_parallel_is_looked_through(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(two_layers())
        assert found_in(model, torch.randn(4, 6)) == [("module.1", "ReLU", True)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(100, 100), (300, 200)], ids=["every output", "a part of the outputs"])
def test_the_share_of_an_absolute_value_is_the_chance_that_noise_turns_the_sign(shape: tuple[int, int]) -> None:
    """The correlation of x and x + noise is sqrt(1/2), so that their signs differ with probability 1/4."""
    (found,) = find_nonsmooth(Apply(abs), torch.randn(shape))
    assert found.share == pytest.approx(0.25, abs=0.02)


GATES = abs, lambda x: x * (x > 0), lambda x: abs(x) + abs(x - 1)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ReLU(True), nn.PReLU(), nn.Softsign(), *map(Apply, GATES)], ids=str)
def test_the_share_is_the_part_of_the_outputs_whose_input_changes_its_sign(layer: nn.Module) -> None:
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    (found,) = find_nonsmooth(nn.Sequential(nn.Linear(6, 50), layer), torch.randn(20, 6))
    _, _, far, near, *_ = seen
    assert found.share == (far.sign() != near.sign()).double().mean().item()


@given(exponent=st.integers(-20, 20))
def test_the_scale_of_x_changes_nothing_where_the_model_has_no_scale(exponent: int) -> None:
    x = torch.linspace(-1, 2, 24).sin().view(4, 6)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.MaxPool1d(3), Apply(abs))
    assert find_nonsmooth(model, x) == find_nonsmooth(model, 2.0**exponent * x) != ()


def delicate() -> tuple[nn.Module, Tensor]:
    """Whatever a forward pass could change: statistics, vectors of spectral_norm, draws, modes, gradients, hooks."""
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    model = nn.Sequential(spectral, nn.BatchNorm1d(6), nn.Dropout(0.5), nn.RReLU(), nn.LayerNorm(6), Apply(abs))
    model[3].eval()
    model[4].register_forward_hook(lambda *_: None)
    model(torch.randn(8, 6)).sum().backward()
    return model, torch.randn(8, 6, requires_grad=True)


def state_of(model: nn.Module, x: Tensor) -> list[Any]:
    held = [x, *model.parameters(), *model.buffers()]
    grads = [tensor.grad is None or tensor.grad.tolist() for tensor in held]
    values = [(tensor.tolist(), tensor.requires_grad, tensor._version) for tensor in held]
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [grads, values, modules, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_a_second_call_finds_the_same_and_the_model_x_and_the_random_numbers_stay_as_they_were() -> None:
    model, x = delicate()
    before, found = state_of(model, x), find_nonsmooth(model, x)
    assert [site.kind for site in found] == ["RReLU", "aten.abs"]
    assert find_nonsmooth(model, x.detach().clone()) == found
    with torch.no_grad():
        assert find_nonsmooth(model, x) == found
    assert state_of(model, x) == before


FSDPModule = type("FSDPModule", (nn.Linear,), {})  # what fully_shard makes of a layer bears this name


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (torch.relu, torch.randn(2, 3), TypeError, r"expected the model to be an nn\.Module, got builtin"),
        (nn.ReLU(), [[1.0]], TypeError, "x is a list, not a tensor"),
        (nn.ReLU(), torch.ones(2, 3, dtype=torch.int64), TypeError, r"torch\.int64; a gradient needs real numbers"),
        (nn.ReLU(), torch.ones(0, 3), ValueError, r"x has shape \(0, 3\); expected a batch"),
        (nn.ReLU(), torch.tensor([[math.inf, math.nan]]), ValueError, "2 values that are NaN or infinite"),
        (nn.ReLU(), torch.ones(2, 3, device="meta"), ValueError, "on the meta device there are no values"),
        (nn.BatchNorm1d(3, affine=False, device="meta"), torch.ones(2, 3), ValueError, "Give the model and x values"),
        (nn.Sequential(FSDPModule(3, 3)), torch.ones(2, 3), ValueError, "call it before fully_shard"),
        (nn.Linear(4, 4), torch.ones(2, 3), RuntimeError, "shapes cannot be multiplied"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_tried_is_refused_with_a_reason(model: Any, x: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        find_nonsmooth(model, x)


def test_a_constant_batch_is_given_noise_of_standard_deviation_1() -> None:
    (found,) = find_nonsmooth(Apply(lambda x: (x - 7.5).relu()), torch.full((50, 50), 7.0))
    assert found.share == pytest.approx(0.3085, abs=0.03)  # of a normal variable, the part above 0.5


# What chooses, casts, branches, draws or has a precision of its own.


def is_near(x: Tensor) -> Callable[[Tensor], bool]:
    """Tells the batch from its neighbour."""
    return lambda z: torch.allclose(z, x.to(z))


def sines(x: Tensor, count: int) -> Tensor:
    return x if count == 0 else sines(x.sin(), count - 1)


STEP, KINK, CURVATURE, UNSURE = "its value jumps", "its derivative jumps", "its second", "its value or derivative jumps"
# With the operation that is found, whether it is flat, and how its reason begins.
CHOICES: dict[str, tuple[Callable[[Tensor], Tensor], str, bool, str]] = {
    "8 bits": (lambda x: (x.sigmoid() * 255).to(torch.uint8).to(x) / 255 + x, "_to_copy", False, STEP),
    "an integer": (lambda x: x.int() + x, "add", False, STEP),
    "copied into integers": (lambda x: torch.zeros_like(x, dtype=torch.int32).copy_(x) + x, "add", False, STEP),
    "a ReLU": (lambda x: x * (x > 0), "mul", True, KINK),
    "a ReLU by another number's mask": (lambda x: x * (x.exp() > 1), "mul", True, KINK),
    "a ReLU by a mask of a copy": (lambda x: x.clone().masked_fill_(x.clone() < 0, 0), "masked_fill", True, KINK),
    "a row's mask": (lambda x: x * (x.sum(1, keepdim=True) > 0), "mul", False, STEP),
    "an ELU": (lambda x: torch.where(x > 0, x, x.exp() - 1), "where", False, CURVATURE),
    "a choice inside": (
        lambda x: torch.where(x > 1, x**2, torch.where(x > 0, x, x.exp() - 1)), "where", False, KINK
    ),
    "a step": (lambda x: torch.where(x > 0, x.exp(), x), "where", False, STEP),
    "made long before": (lambda x: torch.where(x > 0, x, sines(x, 12)), "where", False, UNSURE),
    "changed in place": (lambda x: torch.where(x > 0, x, x.exp().sub_(1)), "where", False, UNSURE),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_tried_where_it_changes_with_the_numbers_of_that_place(name: str) -> None:
    function, operation, flat, reason = CHOICES[name]
    (found,) = find_nonsmooth(Apply(function), torch.randn(8, 6))
    assert (found.kind, found.flat) == (f"aten.{operation}", flat)
    assert found.reason.startswith(reason)


def test_a_choice_between_numbers_that_agree_where_it_changes_is_smooth() -> None:
    assert find_nonsmooth(Apply(lambda x: torch.where(x > 20, x, x.exp().log1p())), 20 * torch.randn(8, 6)) == ()


def test_a_mask_that_fills_zeros_is_met_where_it_changes() -> None:
    function = HIDDEN["a mask that fills zeros"][0]
    (found,) = find_nonsmooth(Apply(function), torch.randn(200, 100))
    assert found.share == pytest.approx(0.25, abs=0.02)


OTHER_RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a buffer": F.logsigmoid, "eigenvectors": lambda x: torch.linalg.eigvalsh(x.T @ x),
    "singular vectors": torch.linalg.svdvals,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_RESULTS)
def test_a_result_that_nothing_takes_does_not_count(name: str) -> None:
    assert find_nonsmooth(Apply(OTHER_RESULTS[name]), torch.randn(8, 6)) == ()


class Mixed(nn.Module):
    """A layer in bfloat16 inside of a model in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(6, 50).bfloat16(), nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inside(x.bfloat16())).float())


def only_single(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return abs(x)


class Phase(nn.Module):
    """Complex parameters, and a buffer whose imaginary part counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6, dtype=torch.complex64))
        self.register_buffer("phase", torch.full((6,), 1j))

    def forward(self, x: Tensor) -> Tensor:
        return abs(((x.to(self.weight.dtype) @ self.weight) * self.phase).imag)


PRECISIONS = {"mixed": (Mixed, "F.relu"), "single": (lambda: Apply(only_single), "aten.abs"),
              "complex": (Phase, "aten.abs")}  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_model_with_a_precision_of_its_own_is_tried_in_that(name: str) -> None:
    make, kind = PRECISIONS[name]
    (found,) = find_nonsmooth(make(), torch.randn(100, 6))
    assert (found.kind, found.flat) == (kind, True)
    assert found.share == pytest.approx(0.25, abs=0.1)


def test_a_model_in_single_precision_is_tried_in_double_precision() -> None:
    seen: list[torch.dtype] = []

    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend((x.dtype, self.weight.dtype))
            return super().forward(x).relu()

    find_nonsmooth(Seen(6, 6), torch.randn(8, 6))
    assert seen[:2] == [torch.float32] * 2  # what the code keeps outside of the model, it keeps as in a run of its own
    assert set(seen[2:]) == {FLOAT64}


def test_the_error_of_a_model_that_does_not_run_is_its_own_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        find_nonsmooth(nn.Linear(4, 4), torch.ones(2, 3))
    assert raised.value.__context__ is None


def test_what_the_code_keeps_outside_of_the_model_is_no_branch_and_has_the_type_of_a_run_of_its_own() -> None:
    kept: dict[int, Tensor] = {}

    def positions(x: Tensor) -> Tensor:
        if len(x) not in kept:
            kept[len(x)] = torch.linspace(0, 1, len(x)).exp().to(x)[:, None]
        return abs(x + kept[len(x)])

    model, x = Apply(positions), torch.randn(8, 6)
    first = find_nonsmooth(model, x)
    assert [found.kind for found in first] == ["aten.abs"]
    assert find_nonsmooth(model, x) == first
    assert kept[8].dtype == torch.float32


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
@pytest.mark.usefixtures("unchecked")  # the checks draw too
def test_the_draws_of_other_generators_are_the_same_in_both_runs_and_go_on_as_if_not_drawn(draw: Any) -> None:
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        expected = [draw() for _ in range(8)]
        random.seed(0)
        np.random.seed(0)
        path = Apply(lambda x: sum(x.sin() if draw() < 0.5 else abs(x) for _ in range(8)))
        assert found_in(path, torch.randn(8, 6)) == [("", "aten.abs", True)]
        assert [draw() for _ in range(8)] == expected
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Fork(nn.Module):
    """Calls one layer or the other, then both a layer and a function that its code names."""

    def __init__(self, first: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.first = first
        self.a, self.b, self.c = nn.ReLU(), nn.Hardtanh(), nn.Softsign()

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.c((self.a(x) if self.first(x) else self.b(x.neg())) - 0.1))


def test_after_a_branch_the_modules_of_both_ways_are_tried_and_no_site_is_lost() -> None:
    x = torch.randn(8, 6)
    found = {found.name + found.kind: found.share for found in find_nonsmooth(Fork(is_near(x)), x)}
    assert found.keys() == {"aReLU", "bHardtanh", "cSoftsign", "F.elu", "branch"}
    assert [found["aReLU"], found["bHardtanh"], found["branch"]] == [None, None, 1.0]
    assert found["F.elu"] is None
    assert found["cSoftsign"] > 0


def test_a_branch_costs_the_rest_of_its_own_module_alone() -> None:
    x = torch.randn(8, 6)
    is_first = is_near(x)

    def longer(z: Tensor) -> Tensor:
        return abs(z.sin()) if is_first(z) else abs(z).sin().cos()

    model = nn.Sequential(Apply(longer), nn.Linear(6, 6), nn.ReLU(), Apply(lambda z: z[z > 0].relu()))
    shares = {(found.name, found.kind): found.share for found in find_nonsmooth(model, x)}
    assert shares.keys() == {("0", "branch"), ("2", "ReLU"), ("3", "aten.index"), ("3", "branch")}
    assert 0 < shares["2", "ReLU"] < 1


def test_operations_that_only_the_neighbour_runs_at_the_end_are_a_branch() -> None:
    x = torch.randn(8, 6)
    is_first = is_near(x)
    (found,) = find_nonsmooth(Apply(lambda z: z.sin() if is_first(z) else z.sin().cos()), x)
    assert found.kind == "branch"


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
            return x.relu() + self.act(x)


def test_a_model_may_call_itself_and_catch_exceptions() -> None:
    x = torch.randn(8, 6)
    assert found_in(Mirrored(), x) == [("", "aten.abs", True)]
    assert found_in(Forgiving(), x) == [("act", "Softsign", False), ("", "F.relu", True)]


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.round(x) - x).detach()


PASSED_BY: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "by hand": (lambda: Apply(lambda x: x + (x.round() - x).detach()), True), "in the code": (StraightThrough, True),
    "a function of its own": (lambda: Apply(Rounded.apply), True), "none": (lambda: Apply(torch.round), False),
    "in place": (lambda: Apply(lambda x: x.clone()[:, 1:].round_().sin()), False),
    "one of two": (lambda: Apply(lambda x: x.round() + (x.round() - x).detach()), False),
    "of integers": (lambda: Apply(lambda x: x + x.int().to(x)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED_BY)
def test_a_step_that_no_gradient_passes_through_may_stay(name: str) -> None:
    make, passed_by = PASSED_BY[name]
    (found,) = find_nonsmooth(make(), torch.randn(8, 6))
    assert found.share > 0
    assert ("no gradient passes through it" in found.reason) is ("may stay" in found.fix) is passed_by


def test_data_parallel_is_looked_through_wherever_it_is(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x, model = torch.randn(4, 6), DistributedDataParallel(two_layers())
        assert found_in(nn.Sequential(nn.Identity(), model), x) == [("1.module.1", "ReLU", True)]
        assert found_in(torch.compile(model), x) == [("_orig_mod.module.1", "ReLU", True)]
    finally:
        dist.destroy_process_group()


# What was once wrong


@pytest.mark.parametrize("operation", [F.relu, F.leaky_relu], ids=["relu", "leaky_relu"])
def test_an_activation_held_out_of_sight_is_flat_however_many_numbers_it_is_given(
    operation: Callable[..., Tensor],
) -> None:
    (found,) = find_nonsmooth(Apply(operation), torch.randn(64, 100))
    assert found.flat


@pytest.mark.parametrize("place", [0.02, 0.05, 0.95, 0.98])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_kink_near_an_end_is_one_of_the_slope(place: float, sign: int) -> None:
    found = find_break(lambda t: (sign * torch.tensor([t - place], dtype=torch.float64)).relu(), expected=True)
    assert order_and_share(found) == (1, 1.0)


@pytest.mark.parametrize(("rate", "place"), [(2.367504358291626, 0.15011322498), (4.534109115600586, 0.34721827507)])
def test_rounding_is_no_kink(rate: float, place: float) -> None:
    assert find_break(lambda t: torch.tensor([rate * (t - place)], dtype=torch.float64).tanh()) is None


def test_a_selection_of_nothing_has_no_kink() -> None:
    assert find_nonsmooth(Apply(lambda x: x[x > 1e9].sum()), torch.randn(8, 6)) == ()


def test_softsign_is_smooth_but_for_its_curvature() -> None:
    (found,) = find_nonsmooth(nn.Softsign(), torch.randn(64, 6))
    assert not found.flat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode_finds_the_same(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Apply(F.celu), StraightThrough()).to(dtype)
    x = torch.randn(8, 6, dtype=dtype)
    expected = find_nonsmooth(model, x)
    with torch.inference_mode():
        assert find_nonsmooth(model, x) == expected
        assert find_nonsmooth(model, torch.ones_like(x).mul_(x)) == expected


def test_a_model_that_writes_to_its_input_leaves_x_alone() -> None:
    x = torch.randn(8, 6)
    before = x.clone()
    find_nonsmooth(Apply(lambda x: x.mul_(2).relu_()), x)
    assert torch.equal(x, before)


def test_a_scripted_module_stays_in_the_list() -> None:
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        model = nn.Sequential(nn.Identity(), torch.jit.script(nn.ReLU()))
    found = find_nonsmooth(model, torch.randn(8, 6))
    assert [(site.name, site.kind) for site in found] == [("1", "RecursiveScriptModule"), ("", "aten.relu")]


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = Apply(F.relu)
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        model.function = torch.jit.script(F.relu)
    with pytest.raises(RuntimeError, match=r"cannot be copied .* Leave x out"):
        find_nonsmooth(model, torch.randn(8, 6))

"""Second derivatives that are written out: equal to PyTorch's own for every layer, option, type and wrapper."""

import gc
import itertools
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gradreg import (
    L2,
    DoubleBackward,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PenalizedModel,
    Term,
    predicted_class,
    smoothify,
    with_normalization,
)
from gradreg.second_derivatives import SecondDerivatives, calls

from cases import MODELS, make_batch, make_model, parameters_of, per_sample_cross_entropy, relative_error

Layer = Callable[..., Tensor]


@pytest.fixture(scope="module", autouse=True)
def however_small() -> Iterator[None]:
    """Replace the calls of this file's small layers, which are not worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_LEAST_ELEMENTS", 0)
        patch.setattr(calls, "_LEAST_PRODUCTS", 0)
        patch.setattr(calls, "_convolution_pays", lambda *_: True)
        yield


CONVOLUTION_PAYS = calls._convolution_pays
TERMS = {
    "loss": Term(GradNormPenalty(Linf(0.1)), 1.2),
    "logit": Term(GradNormPenalty(L2(0.4), of=predicted_class()), 0.5),
}


def _objective(*, fused: bool) -> PenalizedLoss:
    return PenalizedLoss(per_sample_cross_entropy, TERMS, loss_weight=0.8, differentiation=DoubleBackward(fused=fused))


def _gradients(model: nn.Module, x: Tensor, y: Tensor, *, fused: bool) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    _objective(fused=fused)(model, x, y).total.backward()
    return [parameter.grad.clone() for parameter in parameters_of(model)]


def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found, expected = (_gradients(model, x, y, fused=fused) for fused in (True, False))
    assert [a.dtype for a in found] == [b.dtype for b in expected]
    return relative_error(found, expected)


def _node_names(tensor: Tensor) -> list[str]:
    """The names of all nodes behind a tensor."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [used for used, _ in node.next_functions]
    return [node.name() for node in seen]


def _is_ours(tensor: Tensor) -> bool:
    return any(name in ("AffineBackward", "ActivatedBackward", "LayerNormBackward") for name in _node_names(tensor))


def _replaced(layer: Layer, *inputs: Tensor) -> Tensor:
    """A call under the mode, far from the leaf."""
    with SecondDerivatives(torch.zeros((), requires_grad=True)):
        return layer(*inputs)


def _derivatives(layer: Layer, inputs: list[Tensor], order: int) -> list[Tensor]:
    """Gradients of the sum of squared gradients of ... of a random projection of the output."""
    generator = torch.Generator().manual_seed(0)
    value = layer(*inputs)
    value = (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() + (value**2).sum()
    for _ in range(order - 1):
        gradients = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        value = sum(((gradient + 0.3) ** 2).sum() for gradient in gradients)
    return list(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))


def _check(layer: Layer, *inputs: Tensor, reference: Layer | None = None) -> None:
    """First, second and third derivatives are those of a reference, by default PyTorch's own."""
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    assert _is_ours(_replaced(layer, *inputs))
    assert torch.equal(_replaced(layer, *inputs), layer(*inputs))
    for order in (1, 2, 3):
        found = _derivatives(lambda *given: _replaced(layer, *given), list(inputs), order)
        expected = _derivatives(layer if reference is None else reference, list(inputs), order)
        scale = max(1.0, *(tensor.abs().max().item() for tensor in expected))
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11 * scale), order


def _check_numerically(layer: Layer, *inputs: Tensor) -> None:
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(lambda *given: _replaced(layer, *given), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: _replaced(layer, *given), inputs)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Every layer


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Layer, list[Tensor]]:
    """A convolution of some geometry that has an output, and its inputs."""
    pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(1, 2))
    padding = draw(st.one_of(pairs(0, 2), st.integers(0, 2), st.just("valid")))
    groups, channels, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [low + draw(st.integers(0, 4)) for low in least]
    x = _normal(draw(st.integers(1, 2)), channels * groups, *size)
    inputs = [x, _normal(outputs * groups, channels, *kernel, seed=1)]
    if draw(st.booleans()):
        inputs.append(_normal(outputs * groups, seed=2))

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)

    return layer, inputs


@given(case=convolutions())
@settings(max_examples=150, deadline=None)
def test_convolutions_of_every_geometry(case: tuple[Layer, list[Tensor]]) -> None:
    layer, inputs = case
    _check(layer, *inputs)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), ((2, 3), (0, 2))])
def test_convolutions_by_finite_differences(stride: int | tuple[int, int], padding: int | tuple[int, int]) -> None:
    layer: Layer = lambda *given: F.conv2d(*given, stride=stride, padding=padding)  # noqa: E731
    _check_numerically(layer, _normal(2, 2, 5, 6), _normal(3, 2, 3, 2, seed=1), _normal(3, seed=2))


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [2, 3, (2, 4)])
def test_stems_of_every_geometry(kernel: int, stride: int | tuple[int, int], padding: int) -> None:
    """Whose input gradient is taken by phases; some of these kernels leave out pixels at the lower or right edge."""
    for rows, columns in ((7, 8), (8, 9), (9, 7)):
        x, weight = (
            _normal(2, 3, rows, columns).requires_grad_(),
            _normal(2, 3, kernel, kernel, seed=1).requires_grad_(),
        )
        layer: Layer = lambda *given: F.conv2d(*given, stride=stride, padding=padding)  # noqa: E731
        found = _derivatives(lambda *given, layer=layer: _replaced(layer, *given), [x, weight], 2)
        for a, b in zip(found, _derivatives(layer, [x, weight], 2), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


def test_a_geometry_in_numbers_of_numpy() -> None:
    layer: Layer = lambda *given: F.conv2d(*given, stride=np.int64(2), padding=np.int64(1))  # noqa: E731
    _check(layer, _normal(2, 2, 5, 6), _normal(3, 2, 3, 2, seed=1))


ACTIVATIONS: dict[str, Layer] = {
    "gelu": F.gelu,
    "gelu, named": lambda x: F.gelu(input=x, approximate="none"),
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "module": nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    _check(ACTIVATIONS[name], torch.linspace(-12, 12, 301, dtype=torch.float64))
    _check_numerically(ACTIVATIONS[name], _normal(3, 4))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activations_are_finite_however_large_the_input(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-6e4, -300.0, -20.0, 0.0, 20.0, 300.0, 6e4], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(_replaced(ACTIVATIONS[name], x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature.dtype == dtype
    assert torch.equal(curvature[[0, 1, 5, 6]], torch.zeros(4, dtype=dtype))
    assert curvature[3] > 0


@pytest.mark.parametrize("given", ["x", "x w", "x w b"])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_layer_norm(given: str, shape: tuple[int, ...]) -> None:
    inputs = [_normal(2, 4, 3, 5), *[_normal(*shape, seed=seed) for seed in range(given.count(" "))]]
    """PyTorch's own third derivative is wrong: it takes mean and standard deviation for constants."""
    layer: Layer = lambda x, *affine: F.layer_norm(x + 2, shape, *affine, eps=1e-3)  # noqa: E731
    dimensions = tuple(range(-len(shape), 0))

    def written_out(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        centred = x + 2 - (x + 2).mean(dimensions, keepdim=True)
        normal = centred / (centred.square().mean(dimensions, keepdim=True) + 1e-3).sqrt()
        return (normal if weight is None else normal * weight) + (0 if bias is None else bias)

    _check(layer, *inputs, reference=written_out)
    _check_numerically(layer, *(tensor[:1] if tensor.ndim == 4 else tensor for tensor in inputs))


@pytest.mark.parametrize("given", ["x", "x w", "x w b"])
@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
def test_batch_norm_in_evaluation_mode(given: str, size: tuple[int, ...]) -> None:
    inputs = [_normal(4, 3, *size), *[_normal(3, seed=seed) for seed in range(given.count(" "))]]
    mean, variance = _normal(3, seed=7), _normal(3, seed=8).square()
    layer: Layer = lambda x, *affine: F.batch_norm(x, mean, variance, *affine, eps=1e-3)  # noqa: E731
    _check(layer, *inputs)
    _check_numerically(layer, *inputs)


@pytest.mark.parametrize("given", ["x w", "x w b"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_linear_layers_after_the_input(given: str, leading: tuple[int, ...]) -> None:
    """Of x and w, which alone may be behind it, so that the mode takes it for a first layer."""
    inputs = [_normal(*leading, 5).requires_grad_(), *[_normal(3, *[5] * (2 - n), seed=n) for n in (1, 2)]]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs[: 1 + given.count(" ")]]

    def replaced(x: Tensor, *affine: Tensor) -> Tensor:
        with SecondDerivatives(x):
            return F.linear(x.clone(), *affine)

    assert _is_ours(replaced(*inputs))
    for order in (1, 2, 3):
        assert relative_error(_derivatives(replaced, inputs, order), _derivatives(F.linear, inputs, order)) < 1e-12


# Whole objectives


def _networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    return {
        "convnet": (
            lambda: nn.Sequential(
                *(nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)),
                *(nn.SiLU(), nn.Flatten(), nn.Linear(8 * 49, 20), nn.GELU(approximate="tanh"), nn.Linear(20, 10)),
            ),
            (4, 1, 28, 28),
        ),
        "resnet": (lambda: smoothify(torchvision.models.resnet18(num_classes=10), act="gelu").eval(), (2, 3, 32, 32)),
        "swin": (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224",
                img_size=56,
                embed_dim=24,
                depths=(2, 2),
                num_heads=(2, 4),
                num_classes=9,
            ),
            (2, 3, 56, 56),
        ),
        "convnext": (lambda: timm.create_model("convnext_atto", num_classes=10), (2, 3, 64, 64)),
    }


@pytest.mark.parametrize("name", ["convnet", "resnet", "swin", "convnext"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_gradient_of_a_network_is_that_of_plain_pytorch(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, shape = _networks()[name]
    torch.manual_seed(0)
    model, x, y = make().to(dtype), torch.rand(shape, dtype=dtype), torch.randint(9, shape[:1])
    assert _is_ours(_objective(fused=True)(model, x, y).total)
    assert _error(model, x, y) < tolerance


@pytest.mark.filterwarnings("ignore::gradreg.GradregWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_a_small_model_is_that_of_plain_pytorch(name: str) -> None:
    assert _error(make_model(name), *make_batch()) < 1e-12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2), nn.BatchNorm2d(6).eval(), nn.GELU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(24, 4)).double().to(memory_format=layout)
    x, y = make_batch()
    assert _error(model, x.contiguous(memory_format=torch.channels_last), y) < 1e-12


@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["2.weight"], ["0.bias", "2.bias", "4.weight"]])
def test_frozen_parameters(frozen: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Conv2d(6, 4, 2), nn.SiLU(), nn.Conv2d(4, 4, 3))
    model = nn.Sequential(*model, nn.Flatten()).double()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert _error(model, *make_batch()) < 1e-12
    assert all(model.get_parameter(name).grad is None for name in frozen)


class TiedKernels(nn.Module):
    """A convolution that uses the kernel of another one, and one whose kernel depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.stem.weight * F.silu(x.mean()) + x[0, :, :3, :3]
        z = F.gelu(self.stem(x)) + F.gelu(F.conv2d(x, self.stem.weight.flip(0), padding=1))
        return self.head(F.conv2d(z, kernel, padding=1).mean((2, 3)))


def test_kernels_that_are_shared_or_depend_on_the_input() -> None:
    torch.manual_seed(0)
    assert _error(TiedKernels().double(), *make_batch()) < 1e-12


class LearnedImage(nn.Module):
    """A stem that sees the input with something learned, or something learned alone."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.rand(1, 2, 6, 6))
        self.stem, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 4)
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        learned = 2 * self.image
        z = self.stem(learned) * F.silu(x[:, :1, 1:5, 1:5]) if self.alone else self.stem(x + learned)
        return self.head(F.gelu(z).flatten(1))


@pytest.mark.parametrize("alone", [False, True])
def test_parameters_before_the_first_layer(alone: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = LearnedImage(alone=alone).double(), make_batch()
    assert _error(model, x, y) < 1e-12
    assert model.image.grad.abs().max() > 0


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrised_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Conv2d(2, 6, 3)), nn.GELU(), nn.Flatten(), wrap(nn.Linear(96, 4))).double()
    assert _error(model, *make_batch()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("everywhere", [False, True])
def test_autocast_computes_in_the_same_types(dtype: torch.dtype, everywhere: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6).eval(), nn.GELU(), nn.Conv2d(6, 6, 1), nn.SiLU(), nn.Flatten()),
        *(nn.LayerNorm(96), nn.Linear(96, 4)),
    )
    x, y = make_batch(dtype=torch.float32)
    exact = _gradients(model, x, y, fused=False)
    outputs: dict[bool, list[torch.dtype]] = {True: [], False: []}
    errors: dict[bool, float] = {}
    for fused in (True, False):
        hooks = [layer.register_forward_hook(lambda _, __, z, f=fused: outputs[f].append(z.dtype)) for layer in model]
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            total = _objective(fused=fused)(model, x, y).total
            if everywhere:
                total.backward()
        if not everywhere:
            total.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        errors[fused] = relative_error([parameter.grad for parameter in model.parameters()], exact)
        for hook in hooks:
            hook.remove()
    assert outputs[True] == outputs[False]
    assert dtype in outputs[True]
    assert errors[True] < 1.5 * errors[False] < 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
def test_models_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 4)).to(dtype)
    assert _error(model, *make_batch(dtype=dtype)) < tolerance


# What is not computed, and what stays untouched


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool, bool]]]:
    """Which gradients of convolutions are computed, in order."""
    from gradreg.second_derivatives.affine import Convolution

    masks: list[tuple[bool, bool, bool]] = []
    computed = Convolution.gradients

    def spying(self: Convolution, go: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> object:
        masks.append(mask)
        return computed(self, go, x, weight, mask)

    monkeypatch.setattr(Convolution, "gradients", spying)
    return masks


TO_X, TO_W, TO_W_AND_B, ALL = (True, False, False), (False, True, False), (False, True, True), (True, True, True)


@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_is_computed_that_is_not_needed(prepared: bool, convolved: list[tuple[bool, bool, bool]]) -> None:
    model = make_model("shared")
    if prepared:
        model = with_normalization(model, (0.5, 0.4), (0.2, 0.3)).double()
    objective = PenalizedLoss(per_sample_cross_entropy, {"loss": TERMS["loss"]})
    x, y = make_batch()
    out = objective(model, x, y)
    assert convolved == [TO_X] * 3
    convolved.clear()
    out.total.backward(retain_graph=True)
    assert convolved == [TO_W] * 3 + [ALL] * 2 + [TO_W_AND_B]  # not the input gradient of the first layer
    convolved.clear()
    out.total.backward()
    assert convolved == [TO_W] * 3 + [ALL] * 2 + [TO_W_AND_B]


def test_gradients_asked_for_by_name(convolved: list[tuple[bool, bool, bool]]) -> None:
    model, (x, y) = make_model("shared"), make_batch()
    named = dict(model.named_parameters())
    expected = dict(zip(named, _gradients(model, x, y, fused=False), strict=True))
    for names in (*itertools.combinations(named, 2), *[(name,) for name in named]):
        total = _objective(fused=True)(model, x, y).total
        found = torch.autograd.grad(total, [named[name] for name in names])
        assert relative_error(list(found), [expected[name] for name in names]) < 1e-12
    model.zero_grad()
    convolved.clear()
    _objective(fused=True)(model, x, y).total.backward(inputs=[named["head.weight"]])
    assert not any(mask[0] and mask[1] for mask in convolved)
    assert torch.allclose(named["head.weight"].grad, expected["head.weight"], rtol=1e-12)


class OwnGradient(nn.Module):
    """A model that looks at an input gradient in its forward pass, as an energy model does."""

    def __init__(self, *, create_graph: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2)
        self.head = nn.Linear(16 + 72, 4)
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(self.stem(x))
        (slope,) = torch.autograd.grad(z.sum(), x, create_graph=self.create_graph, retain_graph=True)
        return self.head(torch.cat([z.flatten(1), slope.flatten(1)], 1))


@pytest.mark.parametrize("create_graph", [True, False])
def test_models_that_take_an_input_gradient_themselves(create_graph: bool) -> None:
    torch.manual_seed(0)
    assert _error(OwnGradient(create_graph=create_graph).double(), *make_batch()) < 1e-12


def test_the_input_is_left_alone_and_nothing_outlives_the_step() -> None:
    model, (x, y) = make_model("shared"), make_batch()
    x.requires_grad_()
    inside: list[weakref.ref[Tensor]] = []
    for module in model.children():
        module.register_forward_hook(lambda _, __, z: inside.append(weakref.ref(z)))
    gc.collect()
    gc.disable()  # what is freed is to be freed without it
    try:
        out = _objective(fused=True)(model, x, y)
        out.total.backward()
        assert x.grad is None
        assert torch.overrides._get_current_function_mode_stack() == []
        inside += [weakref.ref(out.total), weakref.ref(out.logits)]
        del out
        assert [tensor() for tensor in inside] == [None] * len(inside)
    finally:
        gc.enable()


def test_the_mode_is_left_when_the_model_raises() -> None:
    def model(x: Tensor) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        _objective(fused=True)(model, *make_batch())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_two_backward_passes_and_another_loss_on_the_logits() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    found = []
    for fused in (True, False):
        model.zero_grad()
        out = _objective(fused=fused)(model, x, y)
        out.total.backward(retain_graph=True)
        (out.logits.square().sum() + out.penalties["loss"].sum()).backward(retain_graph=True)
        out.total.backward(create_graph=False)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert relative_error(*found) < 1e-12


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_total_can_be_differentiated_again() -> None:
    model, (x, y) = make_model("shared"), make_batch()
    found = []
    for fused in (True, False):
        total = _objective(fused=fused)(model, x, y).total
        gradients = torch.autograd.grad(total, parameters_of(model), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters_of(model)))
        model.zero_grad()
        _objective(fused=fused)(model, x, y).total.backward(create_graph=True)
        found[-1] += tuple(parameter.grad.detach().clone() for parameter in model.parameters())
        model.zero_grad()
    assert relative_error(list(found[0]), list(found[1])) < 1e-11


def test_a_statistic_that_changes_before_the_backward_pass_is_noticed() -> None:
    model, (x, y) = make_model("batch_norm_eval"), make_batch()
    total = _objective(fused=True)(model, x, y).total
    model[1].running_var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# Who looks at gradients before the first layer


class Normalize(nn.Module):
    """Two operations, whose tensors can be had: the first one's on the way through, all of them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.through: Callable[[Tensor], Tensor] = lambda centred: centred
        self.kept: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        centred = self.through(x - 0.4)
        z = centred / 0.3
        if self.kept is not None:
            self.kept.update(input=x, centred=centred, normalised=z)
        return z


class Noticed(torch.autograd.Function):
    """The identity, which appends the gradients that pass it to a list."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(gradient)
        return gradient, None


FIRST: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(2, 6, 3),
    "stem": lambda: nn.Conv2d(2, 6, 4, stride=2, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(2).eval(),
    "linear": lambda: nn.Linear(6, 5),
    "frozen": lambda: nn.Conv2d(2, 6, 1).requires_grad_(False),
}


def _behind_a_normalisation(first: str) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(Normalize(), FIRST[first](), nn.Flatten(), nn.GELU(), nn.LazyLinear(4)).double()
    model(make_batch()[0])  # for LazyLinear
    return model


# Sets hooks on a model that append gradients to a list. It goes on after the forward pass, and after the backward pass.
Look = Callable[[nn.Sequential, list[Tensor]], Iterator[None]]


def _in_the_forward_pass(set_hook: Callable[[Tensor, list[Tensor]], object]) -> Look:
    """A hook on a tensor that is gone when the forward pass is over."""

    def look(model: nn.Sequential, seen: list[Tensor]) -> Iterator[None]:
        def through(centred: Tensor) -> Tensor:
            if centred.requires_grad:
                set_hook(centred, seen)
            return centred

        model[0].through = through
        yield

    return look


def _after_the_forward_pass(set_hook: Callable[[Tensor, list[Tensor]], object], name: str) -> Look:
    """A hook on a tensor that is kept."""

    def look(model: nn.Sequential, seen: list[Tensor]) -> Iterator[None]:
        model[0].kept = {}
        yield
        set_hook(model[0].kept[name], seen)
        yield

    return look


def _on_a_module(register: Callable[[nn.Sequential, list[Tensor]], object]) -> Look:
    def look(model: nn.Sequential, seen: list[Tensor]) -> Iterator[None]:
        register(model, seen)
        yield

    return look


def _retained(model: nn.Sequential, seen: list[Tensor], *, afterwards: bool = False) -> Iterator[None]:
    model[0].kept = {}
    if not afterwards:
        model[0].register_forward_hook(lambda _, __, z: z.retain_grad())
    yield
    if afterwards:
        model[0].kept["centred"].retain_grad()
    yield
    seen.append(model[0].kept["centred" if afterwards else "normalised"].grad)


def _through_a_function(model: nn.Sequential, seen: list[Tensor]) -> Iterator[None]:
    model[0].through = lambda centred: Noticed.apply(centred, seen)
    yield


def _doubled(gradient: Tensor, seen: list[Tensor]) -> Tensor:
    seen.append(gradient)
    return 2 * gradient


def _append_all(seen: list[Tensor], *gradients: Sequence[Tensor | None] | None) -> None:
    seen.extend(gradient for some in gradients for gradient in some or () if gradient is not None)


def _hook(tensor: Tensor, seen: list[Tensor]) -> object:
    return tensor.register_hook(seen.append)


def _hook_on_node(tensor: Tensor, seen: list[Tensor]) -> object:
    return tensor.grad_fn.register_hook(lambda inputs, outputs: _append_all(seen, inputs, outputs))


def _prehook_on_node(tensor: Tensor, seen: list[Tensor]) -> object:
    return tensor.grad_fn.register_prehook(lambda outputs: _append_all(seen, outputs))


def _full_hook(module: nn.Module, seen: list[Tensor]) -> object:
    return module.register_full_backward_hook(lambda _, inputs, outputs: _append_all(seen, inputs, outputs))


LOOKS: dict[str, Look] = {
    "a hook in the model": _in_the_forward_pass(_hook),
    "a hook that changes the gradient": _in_the_forward_pass(
        lambda z, seen: z.register_hook(partial(_doubled, seen=seen))
    ),
    "a hook on several tensors": _in_the_forward_pass(
        lambda z, seen: register_multi_grad_hook([z, 2 * z], lambda gradients: _append_all(seen, gradients))
    ),
    "a hook on a node": _in_the_forward_pass(_hook_on_node),
    "a hook before a node": _in_the_forward_pass(_prehook_on_node),
    "a hook in a forward hook": _on_a_module(
        lambda model, seen: model[0].register_forward_hook(lambda _, __, z: _hook(z, seen) and None)
    ),
    "a hook in a forward pre-hook": _on_a_module(
        lambda model, seen: model.register_forward_pre_hook(lambda _, inputs: _hook(inputs[0], seen) and None)
    ),
    "a hook on the first layer's output": _on_a_module(
        lambda model, seen: model[1].register_forward_hook(lambda _, __, z: _hook(z, seen) and None)
    ),
    "a full backward hook on the first layer": _on_a_module(lambda model, seen: _full_hook(model[1], seen)),
    "a full backward hook on the model": _on_a_module(_full_hook),
    "retain_grad": _retained,
    "retain_grad afterwards": partial(_retained, afterwards=True),
    "a function of the user's": _through_a_function,
    **{
        f"a hook on the {name}, afterwards": _after_the_forward_pass(_hook, name)
        for name in ("input", "centred", "normalised")
    },
    "a hook on a node, afterwards": _after_the_forward_pass(_hook_on_node, "input"),
    "a hook before a node, afterwards": _after_the_forward_pass(_prehook_on_node, "normalised"),
}


def _looked_at(look: Look, first: str, objective: PenalizedLoss) -> tuple[list[Tensor], bool]:
    """What was seen, after the parameters' gradients; and whether layers were exchanged."""
    model, seen = _behind_a_normalisation(first), list[Tensor]()
    steps = look(model, seen)
    next(steps)
    torch.manual_seed(3)
    total = objective(model, *make_batch()).total
    next(steps, None)
    total.backward()
    next(steps, None)
    assert seen
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [gradient.detach() for gradient in (*gradients, *seen)], _is_ours(total)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("look", LOOKS)
def test_gradients_before_the_first_layer_are_seen_as_without_the_exchange(look: str, first: str) -> None:
    found, exchanged = _looked_at(LOOKS[look], first, _objective(fused=True))
    expected, _ = _looked_at(LOOKS[look], first, _objective(fused=False))
    assert exchanged
    assert len(found) == len(expected)
    assert all(relative_error([a], [b]) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("first", ["convolution", "stem", "batch norm"])
def test_hooks_on_the_node_of_a_first_layer(first: str) -> None:
    """Which is another one than PyTorch's, with as many inputs."""

    def look(model: nn.Sequential, seen: list[Tensor]) -> Iterator[None]:
        model[1].register_forward_hook(lambda _, __, z: _hook_on_node(z, seen) and None)
        yield

    found, expected = (_looked_at(look, first, _objective(fused=fused))[0] for fused in (True, False))
    assert len(found) == len(expected)
    assert all(relative_error([a], [b]) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("join", [lambda x: torch.cat([x, x]), lambda x: torch.cat(tensors=(x, x))])
def test_an_input_that_is_passed_in_a_list_or_by_name(join: Callable[[Tensor], Tensor]) -> None:
    leaf, seen = _leaf(), list[Tensor | None]()
    x = leaf.clone()
    with SecondDerivatives(leaf):
        value = F.conv2d(join(x), torch.ones(2, 2, 1, 1).double().requires_grad_())
    x.register_hook(seen.append)
    value.sum().backward()
    assert torch.equal(seen[0], torch.full_like(x, 4.0))


def test_no_hook_keeps_the_graph_alive() -> None:
    model = nn.Sequential(Normalize(), FIRST["frozen"](), nn.GELU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    inside: list[weakref.ref[Tensor]] = []

    def hook(_: nn.Module, __: object, z: Tensor) -> None:
        z.register_hook(lambda _: None)
        z.grad_fn.register_hook(lambda *_: None)
        inside.append(weakref.ref(z))

    for module in model:
        module.register_forward_hook(hook)
    gc.collect()
    gc.disable()
    try:
        _objective(fused=True)(model.double(), *make_batch()).total.backward()
        assert [tensor() for tensor in inside] == [None] * len(model)
    finally:
        gc.enable()


@pytest.mark.parametrize("look", ["a hook in the model", "a hook on a node", "a function of the user's"])
def test_gradients_before_a_stem_are_seen_with_finite_differences(look: str) -> None:
    objective = PenalizedLoss(per_sample_cross_entropy, TERMS, differentiation=FiniteDifference(threat=Linf(0.1)))
    found, _ = _looked_at(LOOKS[look], "stem", objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_may_replace", lambda: False)
        expected, exchanged = _looked_at(LOOKS[look], "stem", objective)
    assert not exchanged
    assert len(found) == len(expected)
    assert all(relative_error([a], [b]) < 1e-9 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch", [2, 64])
def test_a_hook_is_called_with_a_gradient_however_large_the_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_LEAST_PRODUCTS", 2**22)
    monkeypatch.setattr(calls, "_convolution_pays", CONVOLUTION_PAYS)
    model = nn.Sequential(Normalize(), nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 14 * 14, 4)).double()
    seen: list[Tensor | None] = []
    model[0].register_forward_hook(lambda _, __, z: z.register_hook(seen.append) and None)
    x, y = torch.rand(batch, 3, 16, 16, dtype=torch.float64), torch.randint(4, (batch,))
    for fused in (True, False):
        total = _objective(fused=fused)(model, x, y).total
        assert _is_ours(total) == (fused and batch == 64)
        total.backward()
    assert len(seen) == 6  # two scores' inner passes, the outer one
    assert relative_error(seen[:3], seen[3:]) < 1e-12


ELSEWHERE: dict[str, Callable[[nn.Sequential], object]] = {
    "on a parameter": lambda model: model[1].weight.register_hook(lambda _: None),
    "in a later layer": lambda model: model[3].register_forward_hook(
        lambda _, __, z: z.register_hook(lambda _: None) and None
    ),
    "retained by a later layer": lambda model: model[1].register_forward_hook(lambda _, __, z: z.retain_grad()),
    "of a later layer": lambda model: model[3].register_full_backward_hook(lambda *_: None),
    "that keeps activations": lambda model: model[0].register_forward_hook(lambda _, __, z: setattr(model, "kept", z)),
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_hooks_elsewhere_cost_nothing(elsewhere: str, convolved: list[tuple[bool, bool, bool]]) -> None:
    model = _behind_a_normalisation("convolution")
    ELSEWHERE[elsewhere](model)
    total = _objective(fused=True)(model, *make_batch()).total
    convolved.clear()
    for _ in range(2):  # what has been asked of the graph leaves no trace in it
        total.backward(retain_graph=True)
        assert convolved == [TO_W, TO_W, TO_W_AND_B]
        convolved.clear()


def test_frozen_layers_before_the_first_trained_one_cost_nothing(convolved: list[tuple[bool, bool, bool]]) -> None:
    model = nn.Sequential(Normalize(), FIRST["frozen"](), nn.GELU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    total = _objective(fused=True)(model.double(), *make_batch()).total
    convolved.clear()
    total.backward()
    assert convolved == [TO_W, TO_W, TO_W_AND_B]


def test_a_hook_costs_one_input_gradient(convolved: list[tuple[bool, bool, bool]]) -> None:
    model = _behind_a_normalisation("convolution")
    model[0].register_forward_hook(lambda _, __, z: z.register_hook(lambda _: None) and None)
    total = _objective(fused=True)(model, *make_batch()).total
    convolved.clear()
    total.backward()
    assert convolved == [TO_W, TO_W, ALL]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_gradients_that_are_seen_can_be_differentiated_again() -> None:
    found = []
    for fused in (True, False):
        model, seen = _behind_a_normalisation("convolution"), list[Tensor]()
        model[0].register_forward_hook(lambda _, __, z, seen=seen: z.register_hook(seen.append) and None)
        _objective(fused=fused)(model, *make_batch()).total.backward(create_graph=True)
        found.append(list(torch.autograd.grad(seen[-1].square().sum(), parameters_of(model), allow_unused=True)))
        model.zero_grad()
    assert relative_error(*([g for g in some if g is not None] for some in found)) < 1e-11


# What is left to PyTorch


class Weighted(Tensor):
    """A tensor that is more than a tensor."""


def _leaf() -> Tensor:
    return torch.rand(2, 2, 4, 4, dtype=torch.float64).requires_grad_()


def _subclassed(x: Tensor) -> Tensor:
    return F.conv2d(x, torch.ones(2, 2, 1, 1, dtype=torch.float64).as_subclass(Weighted)).as_subclass(Tensor)


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: F.silu(x + 1, inplace=True),
    "padding=same": lambda x: F.conv2d(x, torch.ones(2, 2, 2, 2).double(), padding="same"),
    "no batch": lambda x: F.conv2d(x[0], torch.ones(2, 2, 2, 2).double()),
    "a constant": lambda x: F.gelu(x.detach()) + x,
    "no grad": lambda x: torch.no_grad()(F.gelu)(x) + x,
    "a subclass": _subclassed,
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "a linear layer in the midst": lambda x: F.linear(
        x * torch.ones(4).double().requires_grad_(), torch.ones(3, 4).double()
    ),
    "vmap": lambda x: torch.vmap(F.gelu)(x),
    "vjp": lambda x: torch.func.vjp(F.gelu, x)[0],
    "checkpointing": lambda x: checkpoint(F.gelu, x, use_reentrant=False),
    "hooks on saved tensors": lambda x: _hooked(x),
    "an empty batch": lambda x: F.gelu(x[:0]),
}


def _hooked(x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda z: z, lambda z: z):
        return F.gelu(x)


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_is_left_to_pytorch(name: str) -> None:
    x = _leaf()
    with SecondDerivatives(x):
        value = LEFT[name](x.clone())
    assert not _is_ours(value)
    assert torch.equal(value, LEFT[name](x.clone()))


class TestWhatPays:
    """With the thresholds in force."""

    @pytest.fixture(autouse=True)
    def thresholds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls, "_LEAST_ELEMENTS", 2**16)
        monkeypatch.setattr(calls, "_LEAST_PRODUCTS", 2**22)
        monkeypatch.setattr(calls, "_convolution_pays", CONVOLUTION_PAYS)

    @pytest.mark.parametrize("name", ["gelu", "silu", "layer norm", "batch norm"])
    def test_layers_of_65536_elements(self, name: str) -> None:
        channels = torch.ones(4)
        layer: Layer = {
            "gelu": F.gelu,
            "silu": F.silu,
            "layer norm": lambda x: F.layer_norm(x, (16,)),
            "batch norm": lambda x: F.batch_norm(x, channels, channels),
        }[name]
        assert _is_ours(_replaced(layer, torch.rand(1024, 4, 16).requires_grad_()))
        assert not _is_ours(_replaced(layer, torch.rand(1023, 4, 16).requires_grad_()))

    @pytest.mark.parametrize(
        ("batch", "kernel", "stride", "groups", "ours"),
        [
            (32, 3, 1, 1, True),  # 32 · 8 · 8 · 16 · 16 · 9 = 4.7 million products
            (28, 3, 1, 1, False),
            (112, 3, 2, 1, False),
            (128, 3, 2, 1, True),
            (1024, 1, 1, 1, False),
            (1024, 1, 2, 1, True),
            (64, 3, 1, 2, True),
            (56, 3, 1, 2, False),
            (1024, 5, 1, 2, False),
        ],
    )
    def test_convolutions(self, batch: int, kernel: int, stride: int, groups: int, ours: bool) -> None:
        weight = torch.rand(16, 16 // groups, kernel, kernel)
        layer: Layer = lambda x: F.conv2d(x, weight, stride=stride, groups=groups)  # noqa: E731
        assert _is_ours(_replaced(layer, torch.rand(batch, 16, 8, 8).requires_grad_())) == ours

    @pytest.mark.parametrize(("batch", "ours"), [(128, True), (127, False)])
    def test_first_linear_layers(self, batch: int, ours: bool) -> None:
        x, weight = torch.rand(batch, 256).requires_grad_(), torch.rand(128, 256)
        with SecondDerivatives(x):
            assert _is_ours(F.linear(x.clone(), weight)) == ours


def test_forward_mode_is_left_to_pytorch() -> None:
    x, tangent = _leaf(), _leaf().detach()
    with torch.autograd.forward_ad.dual_level(), SecondDerivatives(x):
        dual = F.gelu(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None


def test_checkpointed_blocks_between_others() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(96, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = checkpoint(lambda z: F.gelu(self.block(z)), F.gelu(self.stem(x)), use_reentrant=False)
            return self.head(F.silu(z).flatten(1))

    torch.manual_seed(0)
    assert _error(Checkpointed().double(), *make_batch()) < 1e-12


def test_finite_differences_and_natural_steps_are_left_to_pytorch() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    for objective in (
        PenalizedLoss(per_sample_cross_entropy, TERMS, differentiation=FiniteDifference(threat=Linf(0.1))),
        PenalizedLoss(per_sample_cross_entropy, {"p": Term(GradNormPenalty(L2(0.1)), weight=0.0)}),
        _objective(fused=False),
    ):
        assert not _is_ours(objective(model, x, y).total)
    assert _is_ours(PenalizedModel(model, _objective(fused=True))(x, y).total)


COMPILED = """
import torch
import torch.nn.functional as F
from gradreg.second_derivatives import SecondDerivatives

def function(x):
    z = x - 0.4
    z.register_hook(lambda gradient: 2 * gradient)
    return F.silu(z)

compiled = torch.compile(function, backend="eager", fullgraph=True)
torch._dynamo.config.error_on_recompile = True
x = torch.rand(2**17, requires_grad=True)
for _ in range(3):
    with SecondDerivatives(x):
        value = compiled(x)
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (value, function(x))))
"""


def test_a_compiler_follows_the_mode() -> None:
    """In a process of its own, without the checks of annotations, which it could not follow."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _gradients(make_model("conv"), *make_batch(), fused=True)

"""preflight: its verdict is what the step then does, its fix makes it pass, and it changes nothing."""

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gradreg import GradregWarning
from gradreg.attacks import NFGSM, Noise, PGDAttack
from gradreg.criteria import cross_entropy
from gradreg.differentiation import DoubleBackward, FiniteDifference
from gradreg.normalization import with_normalization
from gradreg.objective import PenalizedLoss, PenalizedModel, Term
from gradreg.penalties import GradientPenalty, GradNormPenalty
from gradreg.point import Point
from gradreg.preflight import Finding, PreflightReport, preflight
from gradreg.schedules import linear_ramp
from gradreg.smooth import smoothify
from gradreg.threat_models import Linf
from gradreg.wrappers import is_quantized

CLASSES = 3
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOWEST_TORCH = torch.__version__.startswith("2.6.")


def thesis(criterion: Callable[..., Tensor] = cross_entropy, **options: object) -> PenalizedLoss:
    """The thesis's penalty on a loss."""
    return PenalizedLoss(criterion, {"grad_norm": Term(GradNormPenalty(Linf(0.1)))}, **options)


RECOMMENDED = PenalizedLoss(at=NFGSM(Linf(8 / 255), share=0.5))


def checked(model: nn.Module, x: object, y: object = None) -> PreflightReport:
    return preflight(thesis(), model, x, y)


def works(model: nn.Module, x: object, y: object = None, objective: PenalizedLoss | None = None) -> bool:
    """A step taken: does it run, and are its gradients finite and not all zero?"""

    def step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradregWarning)
            (objective or thesis())(model, x, y, 0).total.backward()

    return _trains(model, step)


def penalty_trains(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """By hand: the gradient of the L1 norm of the input gradient alone, by double backward."""

    def step() -> None:
        leaf = x.detach().requires_grad_()
        losses = F.cross_entropy(model(leaf.clone()), y, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        grad.abs().sum().backward()

    return _trains(model, step)


def _trains(model: nn.Module, step: Callable[[], None]) -> bool:
    try:
        step()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the gradients stay with the unsharded parameters
    except Exception:  # whatever it raises, the step did not work
        return False
    finally:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for parameter in model.parameters():
            parameter.grad = None
    return all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in grads)


def features(*layers: nn.Module) -> nn.Sequential:
    """A classifier of 8 features with the layers in its middle."""
    return nn.Sequential(nn.Linear(8, 8), *layers, nn.Linear(8, CLASSES))


def convnet(norm: nn.Module, *, train: bool = True) -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), norm, nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(CLASSES))
    net = nn.Sequential(*layers)
    net(torch.zeros(2, 3, 8, 8))
    return net.train(train)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.inner)


class Attention(nn.Module):
    """Self-attention over two tokens of four features."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (2, 4))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=self.need_weights)[0].flatten(1))


def encoder(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, CLASSES))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES)


def swin() -> nn.Module:
    sizes = {"img_size": 64, "window_size": 2, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **sizes)


def compiled_in_place(inputs: int = 8) -> nn.Module:
    model = Apply(
        lambda x, net: net(x), nn.Sequential(nn.Linear(inputs, 8), features(nn.GELU()))
    )  # not every torch compiles an nn.Sequential itself
    model.compile(backend="aot_eager")
    return model


def scripted(*layers: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(features(nn.GELU(), *layers))


class Square(torch.autograd.Function):
    """A function whose gradient has no gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Detached(torch.autograd.Function):
    """A function whose gradient loses its gradient without an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class Rounding(torch.autograd.Function):
    """The straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class SiluForTanh(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (F.silu if func is torch.tanh else func)(*args, **(kwargs or {}))


class Rechecked(nn.Module):
    """Checkpoints a function that a mode changes; if the mode is not inside, only in the forward pass."""

    def __init__(self, *, mode_inside: bool) -> None:
        super().__init__()
        self.layer, self.mode_inside = nn.Linear(8, 8), mode_inside

    def inside(self, x: Tensor) -> Tensor:
        with SiluForTanh() if self.mode_inside else nullcontext():
            return torch.tanh(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        with SiluForTanh():
            return checkpoint(self.inside, x, use_reentrant=False)


def dropped(x: Tensor, *, preserve: bool) -> Tensor:
    return checkpoint(lambda x: F.dropout(x).sin(), x, use_reentrant=False, preserve_rng_state=preserve)


def with_hook(x: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with a hook on its gradient."""
    x.register_hook(hook)
    return x


def no_grad_body(x: Tensor, body: nn.Module, head: nn.Module) -> Tensor:
    with torch.no_grad():
        hidden = body(x)
    return head(hidden)


def through_checkpoint(*, reentrant: bool) -> nn.Module:
    return features(Apply(lambda x, body: checkpoint(body, x, use_reentrant=reentrant), nn.Linear(8, 8)), nn.GELU())


def frozen(model: nn.Module, count: int | None = None) -> nn.Module:
    for parameter in list(model.parameters())[:count]:
        parameter.requires_grad_(False)
    return model


def inside_math(model: nn.Module) -> nn.Module:
    """The fix for fused attention: the forward pass with the backend that has second derivatives."""

    def forward(x: Tensor, inner: nn.Module) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return inner(x)

    return Apply(forward, model)


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


class Caches(nn.Module):
    """Keeps what it makes of its weight, in evaluation mode, as timm's attention biases are kept."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(size))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias.square()
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.square()
        return x * self.kept["bias"]


class Remembers(Caches):
    """Keeps a tensor with a graph and makes it anew each time, as the old weight_norm does."""

    def forward(self, x: Tensor) -> Tensor:
        self.squared = self.bias.square()
        return x * self.squared


def exported(*layers: nn.Module) -> nn.Module:
    return torch.export.export(features(*layers), (batch(0)[0],)).module()


def blank(model: nn.Sequential) -> nn.Module:
    """A model with the weights of a fresh classifier."""
    nn.init.zeros_(model[-1].weight)
    return model


def stochastic_depth() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=CLASSES, drop_path_rate=0.5)


def timm_checkpointed() -> nn.Module:
    model = timm.create_model("resnet18", num_classes=CLASSES)
    model.set_grad_checkpointing()
    return model


def replaced(index: int, module: nn.Module) -> Callable[[nn.Module], nn.Module]:
    def fix(model: nn.Module) -> nn.Module:
        model[index] = module
        return model

    return fix


@dataclass(frozen=True)
class Works:
    build: Callable[[], nn.Module]
    image: int = 0


@dataclass(frozen=True)
class Fails:
    build: Callable[[], nn.Module]
    where: str
    problem: str
    fix: Callable[[nn.Module], nn.Module]
    image: int = 0


WORKING = {
    "swin_tiny": Works(swin, 64),
    "resnet18": Works(lambda: torchvision.models.resnet18(num_classes=CLASSES), 32),
    "attention with weights": Works(lambda: Attention(need_weights=True)),
    "encoder with dropout": Works(lambda: encoder(0.1)),
    "BatchNorm, train": Works(lambda: convnet(nn.BatchNorm2d(4)), 8),
    "BatchNorm, eval": Works(lambda: convnet(nn.BatchNorm2d(4), train=False), 8),
    "GroupNorm, dropout": Works(lambda: convnet(nn.GroupNorm(2, 4)), 8),
    "SyncBatchNorm alone": Works(lambda: features(nn.SyncBatchNorm(8), nn.GELU())),
    "ReLU": Works(lambda: features(nn.ReLU())),
    "compiled, eager": Works(lambda: torch.compile(features(nn.GELU()), backend="eager")),
    "checkpoint": Works(lambda: through_checkpoint(reentrant=False)),
    "script": Works(scripted),
    "stochastic depth": Works(stochastic_depth, 32),
    "timm's checkpointing": Works(timm_checkpointed, 32),
    "exported": Works(lambda: exported(nn.ReLU())),
    "makes anew": Works(lambda: features(Remembers(), nn.GELU())),
    "caches, train": Works(lambda: features(Caches(), nn.GELU())),
    "in-place on x": Works(lambda: nn.Sequential(nn.ReLU(inplace=True), features(nn.GELU()))),
    "some frozen": Works(lambda: frozen(features(nn.GELU()), 2)),
    "LSTM": Works(lambda: features(Apply(lambda x, lstm: lstm(x[:, None])[0][:, 0], nn.LSTM(8, 8)))),
}

FAILING = {
    "vit_tiny": Fails(vit, "blocks.0.attn, blocks.1.attn", "fused attention", unfused, 32),
    "vit_tiny, math": Fails(vit, "blocks.0.attn, blocks.1.attn", "fused attention", inside_math, 32),
    "attention": Fails(lambda: Attention(need_weights=False), "attention", "fused attention", inside_math),
    "encoder, train": Fails(encoder, "1.self_attn", "fused attention", inside_math),
    "encoder, eval": Fails(lambda: encoder(0.1).eval(), "1.self_attn", "fused attention", inside_math),
    "compiled": Fails(
        lambda: torch.compile(features(nn.GELU()), backend="aot_eager"),
        "",
        "torch.compile",
        lambda model: model._orig_mod,
    ),
    "compiled in place": Fails(
        lambda: nn.Sequential(compiled_in_place()),
        "0",
        "torch.compile",
        lambda model: nn.Sequential(features(nn.GELU())),
    ),
    "compiled function": Fails(
        lambda: features(Apply(torch.compile(F.gelu, backend="aot_eager"))),
        "1",
        "torch.compile",
        replaced(1, nn.GELU()),
    ),
    "compiled in front": Fails(
        lambda: nn.Sequential(Apply(torch.compile(torch.square, backend="aot_eager")), features(nn.GELU())),
        "0",
        "torch.compile",
        replaced(0, Apply(torch.square)),
    ),
    "reentrant checkpoint": Fails(
        lambda: through_checkpoint(reentrant=True),
        "1",
        "reentrant",
        lambda model: through_checkpoint(reentrant=False),
    ),
    "mobilenetv3": Fails(
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES),
        ", ".join(f"blocks.{name}.se.gate" for name in ("0.0", "2.0", "2.1", "2.2", "3.0", "3.1", "4.0", "4.1", "4.2")),
        "HardsigmoidBackward0",
        smoothify,
        32,
    ),
    "exported, hard gate": Fails(
        lambda: exported(nn.Hardsigmoid()), "", "Hardsigmoid", lambda model: smoothify(features(nn.Hardsigmoid()))
    ),
    "two operations": Fails(
        lambda: features(nn.Hardsigmoid(), Apply(Square.apply)),
        "1",
        "Hardsigmoid",
        lambda model: features(nn.Sigmoid()),
    ),
    "before any parameter": Fails(
        lambda: nn.Sequential(nn.Hardsigmoid(), features(nn.GELU())), "0", "Hardsigmoid", smoothify
    ),
    "no first derivative": Fails(
        lambda: features(Apply(lambda x: torch.igamma(x.square() + 1, x.square() + 1))),
        "1",
        "Igamma",
        replaced(1, nn.GELU()),
    ),
    "compiled, operation": Fails(
        lambda: torch.compile(features(nn.Hardsigmoid()), backend="eager"),
        "",
        "Hardsigmoid",
        lambda model: smoothify(model._orig_mod),
    ),
    "once_differentiable": Fails(
        lambda: features(Apply(Square.apply)), "1", "once_differentiable", replaced(1, Apply(torch.square))
    ),
    "all frozen": Fails(lambda: frozen(features(nn.GELU())), "", "frozen", lambda model: model.requires_grad_()),
    "penalty moves nothing": Fails(
        lambda: Apply(lambda x, net, spare: net(x), frozen(features(nn.GELU())), nn.Linear(1, 1)),
        "the penalty 'grad_norm'",
        "0 for every trainable parameter",
        lambda model: model.inner[0].requires_grad_(),
    ),
    "round": Fails(
        lambda: nn.Sequential(nn.Identity(), Apply(lambda x: (x * 255).round() / 255), features(nn.GELU())),
        "1",
        "step function",
        replaced(1, nn.Identity()),
    ),
    "no_grad": Fails(
        lambda: Apply(no_grad_body, nn.Linear(8, 8), nn.Linear(8, CLASSES)),
        "inner.0",
        "do not depend on x",
        lambda model: nn.Sequential(*model.inner),
    ),
    "detach": Fails(lambda: features(Apply(Tensor.detach)), "1", "do not depend on x", replaced(1, nn.GELU())),
    "tuple": Fails(
        lambda: Apply(lambda x, net: (net(x), x), features(nn.GELU())), "", "tuple", lambda model: model.inner[0]
    ),
    "dict": Fails(
        lambda: Apply(lambda x, net: {"scores": net(x)}, features(nn.GELU())), "", "dict", lambda model: model.inner[0]
    ),
    "wrong size": Fails(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(7, CLASSES)), "1", "forward pass", replaced(1, nn.Linear(8, 3))
    ),
    "square root at 0": Fails(
        lambda: features(Apply(lambda x: (x * 0).sqrt() + x)), "1", "NaN", replaced(1, nn.GELU())
    ),
    "logarithm of 0": Fails(lambda: features(Apply(lambda x: (x * 0).log())), "1", "NaN", replaced(1, nn.GELU())),
    "third root at 0": Fails(
        lambda: features(Apply(lambda x: (x.abs() * 0).pow(1.5) + x * x)), "0", "NaN", replaced(1, nn.GELU())
    ),
}


def batch(image: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    shape = (4, 3, image, image) if image else (4, 8)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator).to(device), torch.tensor([0, 1, 2, 0], device=device)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("case", WORKING.values(), ids=WORKING)
def test_finds_no_error_where_penalty_trains(case: Works, device: str) -> None:
    model = case.build().to(device)
    x, y = batch(case.image, device)
    report = checked(model, x, y)
    assert report.ok, str(report)
    assert report.differentiation() == DoubleBackward()
    assert penalty_trains(model, x, y)


# torch.compile looks at the .grad of a function's inputs, which warns for inputs that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("case", FAILING.values(), ids=FAILING)
def test_names_what_fails_and_a_fix_that_works(case: Fails, device: str) -> None:
    model = case.build().to(device)
    x, y = batch(case.image, device)
    report = checked(model, x, y)
    assert not report.ok
    assert not penalty_trains(model, x, y)
    assert any(case.where == error.where and case.problem in error.problem for error in report.errors), str(report)
    fixed = case.fix(model).to(device)
    assert checked(fixed, x, y).ok
    assert penalty_trains(fixed, x, y)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::gradreg.GradregWarning")
@pytest.mark.parametrize("case", FAILING.values(), ids=FAILING)
def test_offers_finite_differences_where_they_work(case: Fails, unchecked: None) -> None:
    model, (x, y) = case.build(), batch(case.image, "cpu")
    report = checked(model, x, y)
    trains = works(model, x, y, thesis(differentiation=FiniteDifference()))
    assert all(("FiniteDifference" in error.fix) == (report.works is not None) for error in report.errors)
    if report.works is None:
        assert not (trains and penalty_moves(model, x, y))
        with pytest.raises(RuntimeError, match="not work"):
            report.differentiation()
    else:
        assert report.differentiation() == FiniteDifference()
        assert trains


def penalty_moves(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether finite differences of the penalty alone move a parameter."""
    return works(model, x, y, thesis(differentiation=FiniteDifference(), loss_weight=0.0))


def test_offers_nothing_where_the_first_derivative_is_broken_behind_the_first_error() -> None:
    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x - x.detach()).sqrt()  # whose slope is infinite

    report = checked(nn.Sequential(Attention(need_weights=False), Steep()), *batch(0, "cpu"))
    assert not report.ok
    with pytest.raises(RuntimeError, match="not work"):
        report.differentiation()


@dataclass(frozen=True)
class Silent:
    """A model with a double backward that runs and is wrong, and what to build instead."""

    build: Callable[[], nn.Module]
    where: str
    problem: str
    fixed: Callable[[], nn.Module]


SILENT = {
    "detached": Silent(
        lambda: features(nn.Tanh(), Apply(Detached.apply)),
        "2",
        "along a random direction",
        lambda: features(nn.Tanh(), Apply(torch.square)),
    ),
    "detached, by a hook": Silent(
        lambda: features(Apply(lambda x: with_hook(x.sin(), Tensor.detach))),
        "",
        "along a random direction",
        lambda: features(Apply(lambda x: with_hook(x.sin(), Tensor.clone))),
    ),
    "other function": Silent(
        lambda: features(Rechecked(mode_inside=False)),
        "",
        "is not what the forward pass computed",
        lambda: features(Rechecked(mode_inside=True)),
    ),
    "other random numbers": Silent(
        lambda: features(nn.GELU(), Apply(partial(dropped, preserve=False))),
        "",
        "is not what the forward pass computed",
        lambda: features(nn.GELU(), Apply(partial(dropped, preserve=True))),
    ),
}
SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through": lambda x: x + (x.round() - x).detach(),
    "straight-through function": lambda x: Rounding.apply(x),
    "straight-through, checkpointed": lambda x: checkpoint(
        lambda x: (x + (x.round() - x).detach()).sin(), x, use_reentrant=False
    ),
    "stop-gradient": lambda x: x * x.sigmoid().detach(),
    "scaled by a hook": lambda x: with_hook(x.sin(), lambda grad: 0.1 * grad),
    "kinks": lambda x: F.max_pool1d(x.relu(), 2).repeat(1, 2),
    "a tie at a kink of the slope": lambda x: x + F.elu(x.detach() * 0 + (x - x.detach())),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (4, 2))) ** 2).flatten(1),
    "float32 inside": lambda x: F.linear(x, torch.eye(8)),
}


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-2.1, 2.6)])
def test_a_model_that_normalises_takes_pixels(low: float, high: float) -> None:
    x = torch.linspace(low, high, 256).view(4, 1, 8, 8)
    model = with_normalization(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), features(nn.GELU())), [0.5], [0.25])
    y = torch.arange(4) % CLASSES
    (error,) = checked(model, x, y).errors
    assert "Pass pixels in [0, 1]" in error.problem
    assert checked(model, x.sigmoid(), y).ok


@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_finds_a_double_backward_that_is_wrong_without_an_error(case: Silent) -> None:
    model, (x, y) = case.build(), batch(0)
    assert penalty_trains(model, x, y)  # so it seems
    if LOWEST_TORCH and "not what the forward pass computed" in case.problem:
        pytest.skip("torch 2.6 has no forward mode through checkpoints (no jvp), by which preflight compares here")
    (error,) = checked(model, x, y).errors
    assert error.where == case.where
    assert case.problem in error.problem
    assert checked(case.fixed(), x, y).ok


@pytest.mark.parametrize("function", SURROGATES.values(), ids=SURROGATES)
def test_takes_no_surrogate_and_no_kink_for_a_wrong_double_backward(function: Callable[[Tensor], Tensor]) -> None:
    for layers in ([], [nn.Linear(8, 8), nn.ReLU()]):
        assert checked(features(*layers, Apply(function), nn.Linear(8, 8), nn.GELU()), *batch(0)).ok


def test_takes_no_kink_at_zero_for_a_wrong_double_backward() -> None:
    x, y = batch(0)
    model = features(Apply(lambda x: x + 5 * x.relu() ** 2), nn.Linear(8, 8), nn.GELU())
    nn.init.zeros_(model[0].bias)  # so that black images are at the kink of the slope
    assert checked(model, torch.zeros_like(x), y).ok


def with_idle_scale(model: nn.Module) -> nn.Module:
    """A model with a parameter that has no dimension and no use."""
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    return model


def with_old_weight_norm(*layers: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return features(nn.utils.weight_norm(nn.Linear(8, 8)), *layers)


@pytest.mark.parametrize(
    "build",
    [
        lambda *layers: torch.compile(features(*layers), backend="eager"),
        lambda *layers: nn.Sequential(torch.compile(features(*layers), backend="eager")),
        lambda *layers: frozen(features(*layers), 1),
        lambda *layers: with_idle_scale(features(*layers)),
        lambda *layers: nn.Sequential(features(nn.Dropout(), nn.BatchNorm1d(8), *layers), Remembers(CLASSES)),
        lambda *layers: blank(features(*layers)),
        with_old_weight_norm,
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_a_wrong_double_backward_is_found_in_any_wrapping(
    build: Callable[..., nn.Module], soft: bool, request: pytest.FixtureRequest
) -> None:
    if LOWEST_TORCH:  # it compiles hooks along with a model, and cannot compile the type checker around ours
        request.getfixturevalue("unchecked")
    x, y = batch(0)
    y = F.one_hot(y, CLASSES).float() if soft else y
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none")
    report = preflight(thesis(criterion), build(nn.Tanh(), Apply(Detached.apply)), x, y)
    assert ["along a random direction" in error.problem for error in report.errors] == [True]
    assert preflight(thesis(criterion), build(nn.Tanh(), Apply(torch.square)), x, y).ok


def test_a_weight_of_zeros_is_no_step_function() -> None:
    x, y = batch(0)
    model = blank(features(nn.GELU()))
    assert not penalty_trains(model, x, y)  # before the optimiser's first step
    place = model[-1].weight.data_ptr()
    report = checked(model, x, y)
    assert model[-1].weight.data_ptr() == place  # others may hold a view of it
    assert report.ok
    assert warnings_about(report, "its weight is 0") == ["2"]
    assert not model[-1].weight.any()
    F.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert checked(model, x, y).findings == ()
    assert penalty_trains(model, x, y)


def test_several_weights_of_zeros_and_a_step_function() -> None:
    x, y = batch(0)
    model = nn.Sequential(features(Apply(torch.round)), nn.Linear(CLASSES, 4), nn.Linear(4, CLASSES))
    for layer in (model[1], model[2]):
        nn.init.zeros_(layer.weight)
    report = checked(model, x, y)
    assert [error.where for error in report.errors] == ["0.1"]
    assert "step function" in report.errors[0].problem
    assert warnings_about(report, "its weight is 0") == ["2", "1"]


def test_a_bias_of_zeros_says_nothing_of_a_step_function() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round())

    model, (x, y) = features(Rounded(8, 8)), batch(0)
    nn.init.zeros_(model[1].bias)
    report = checked(model, x, y)
    assert [error.where for error in report.errors] == ["1"]
    assert "step function" in report.errors[0].problem
    assert warnings_about(report, "its weight is 0") == []


def test_tensors_kept_from_step_to_step() -> None:
    x, y = batch(0)
    model = nn.Sequential(features(Caches(), nn.GELU()), nn.Identity()).eval()
    for _ in range(2):  # the first call leaves nothing for the second to find
        (error,) = checked(model, x, y).errors
        assert (error.where, model[0][1].kept) == ("0.1", {})
        assert "model.train()" in error.fix
    works = [penalty_trains(model, x, y) for _ in range(2)]
    assert works == [True, False]
    (error,) = checked(model, x, y).errors  # with what the steps have left there
    assert error.where == "0.1"
    assert set(model[0][1].kept) == {"bias"}
    model.train()  # the fix
    assert checked(model, x, y).ok
    assert all(penalty_trains(model, x, y) for _ in range(2))


@pytest.mark.parametrize("where", ["model", "x"])
def test_the_meta_device(where: str) -> None:
    model, (x, y) = features(nn.GELU()), batch(0)
    args = {"model": model, "x": x} | {where: {"model": model, "x": x}[where].to("meta")}
    (error,) = checked(**args, y=y).errors
    assert "no values" in error.problem
    assert "to_empty" in error.fix


def test_quantised_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        model = torch.ao.quantization.quantize_dynamic(features(nn.GELU()), {nn.Linear})
    (error,) = checked(model, *batch(0)).errors
    assert error.where == "0, 2"
    assert "quantised" in error.problem


def test_only_torchs_own_quantisation_is_quantised() -> None:
    class Mine(nn.Linear):
        __module__ = "mycompany.quantized.nets"

    model = features(nn.GELU(), Mine(8, 8), torch.ao.nn.quantized.FloatFunctional())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        trained = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)).train()
        trained.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        torch.ao.quantization.fuse_modules_qat(trained, ["1", "2"], inplace=True)
        torch.ao.quantization.prepare_qat(trained, inplace=True)
    modules = [*model.modules(), *trained.modules()]
    assert {"Linear", "LinearReLU"} <= {type(m).__name__ for m in modules if ".qat." in type(m).__module__}
    assert not any(map(is_quantized, modules))


def test_attributes_functional_operations_to_the_module_that_runs_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.hardsigmoid(self.first(x)))

    x, y = batch(0)
    (error,) = checked(nn.Sequential(nn.Identity(), Block()), x, y).errors
    assert error.where == "1"


def test_names_every_operation_at_once() -> None:
    x, y = batch(0)
    errors = checked(features(nn.Hardsigmoid(), nn.GELU(), Apply(Square.apply)), x, y).errors
    assert {error.where for error in errors} == {"1", "3"}
    assert not any("aten" in error.problem for error in errors)  # the exception was of one of them alone


def test_training_compiles_nothing_after_preflight() -> None:
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(None)
        return graph.forward

    model, (x, y) = torch.compile(features(nn.Hardsigmoid()), backend=backend), batch(0)
    (error,) = checked(model, x, y).errors
    assert error.where == ""
    count = len(graphs)
    assert works(model, x, y, thesis(differentiation=FiniteDifference()))
    assert len(graphs) == count


def test_a_scripted_model_is_one_piece() -> None:
    (error,) = checked(nn.Sequential(scripted(nn.Hardsigmoid())), *batch(0)).errors
    assert error.where == ""


def test_names_the_criterion() -> None:
    x, y = batch(0)
    report = preflight(thesis(lambda logits, y: F.hardsigmoid(logits).sum(1)), features(), x, y)
    assert [error.where for error in report.errors] == ["the criterion"]


# ---------------------------------------------------------------------------------------------- the batch


def one_label_changed(value: int) -> Tensor:
    y = batch(0)[1]
    y[0] = value
    return y


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (batch(0)[0].mul(255).byte(), batch(0)[1], "uint8"),
        (batch(0)[0].log() * 0 + torch.nan, batch(0)[1], "NaN"),
        (batch(0)[0][0], batch(0)[1], "expected a batch"),
        (batch(0)[0], one_label_changed(-100), "-100"),
        (batch(0)[0], one_label_changed(CLASSES), "has 3 classes"),
        (batch(0)[0], batch(0)[1].float(), "int64"),
        (batch(0)[0], batch(0)[1].int(), "int64"),
        (batch(0)[0], batch(0)[1][:, None], "squeeze"),
        (batch(0)[0], F.one_hot(batch(0)[1]), "probabilities"),
        (batch(0)[0], batch(0)[1][:2], "Expected classes of shape"),
    ],
)
def test_names_what_is_wrong_with_the_batch(x: Tensor, y: Tensor, message: str) -> None:
    (error,) = checked(features(nn.GELU()), x, y).errors
    assert message in error.problem


def test_token_ids_are_sent_to_their_vectors() -> None:
    embedding, model, y = nn.Embedding(10, 8), features(nn.GELU()), batch(0)[1]
    ids = torch.tensor([1, 5, 9, 0])
    (error,) = checked(nn.Sequential(embedding, model), ids[:, None], y).errors
    assert "embedding(ids)" in error.fix
    assert checked(model, embedding(ids).detach(), y).ok


def test_takes_class_probabilities() -> None:
    x, y = batch(0)
    assert checked(features(nn.GELU()), x, F.one_hot(y, CLASSES).float()).ok


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (F.cross_entropy, "reduction"),
        (lambda logits, y: logits, "Expected one loss per sample"),
        (lambda logits, y: logits[:, y + 10].sum(1), "IndexError"),
        (lambda logits, y: logits.sum(1) * torch.inf, "NaN or infinity"),
        (lambda logits, y: (logits.argmax(1) == y).float(), "no graph"),
    ],
)
def test_names_what_is_wrong_with_the_criterion(criterion: Callable[..., Tensor], message: str) -> None:
    x, y = batch(0)
    (error,) = preflight(thesis(criterion), features(nn.GELU()), x, y).errors
    assert error.where == "the criterion"
    assert message in error.problem


def test_inference_mode() -> None:
    model, (x, y) = features(nn.GELU()), batch(0)
    with torch.inference_mode():
        other, batch_of_inference = features(nn.GELU()), (x.clone(), y.clone())
    assert "inference_mode" in checked(other, x, y).errors[0].problem
    assert not works(other, x, y)
    assert checked(model, *batch_of_inference).ok == works(model, *batch_of_inference)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_enables_gradients_by_itself(mode: type[torch.no_grad]) -> None:
    model, (x, y) = features(nn.GELU()), batch(0)
    with mode():
        assert checked(model, x, y).ok


def test_a_lazy_module_is_left_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(CLASSES))
    (error,) = checked(model, *batch(0)).errors
    assert error.where == "0"
    assert isinstance(model[0], nn.LazyLinear)
    model(batch(0)[0])
    assert checked(model, *batch(0)).ok


# --------------------------------------------------------------------------------------------- warnings


def warnings_about(report: PreflightReport, part: str) -> list[str]:
    return [finding.where for finding in report.findings if part in finding.problem and finding.severity == "warning"]


def test_warns_of_activations_that_smoothify_replaces() -> None:
    model, (x, y) = features(nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), batch(0)
    assert warnings_about(checked(model, x, y), "not smooth") == ["1, 3"]
    assert checked(smoothify(model), x, y).findings == ()


def hidden_abs(x: Tensor) -> Tensor:
    function = getattr(torch, "a" + "bs")
    return function(x - 0.5)


def hidden_relu(x: Tensor) -> Tensor:
    function = getattr(torch, "re" + "lu")
    return function(x)


def test_warns_of_what_the_batch_meets() -> None:
    x, y = batch(0)
    guarded = Apply(lambda x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-6))
    assert checked(features(guarded, nn.GELU()), x, y).findings == ()  # the guard is not met
    met = checked(nn.Sequential(Apply(hidden_abs), features(nn.GELU())), x, y)
    assert [(warning.where, warning.problem) for warning in met.findings] == [
        ("0", "torch.abs is not smooth: its derivative jumps at 0: a ReLU in disguise if it is an activation, harmless "
              "as part of a norm.")
    ]  # fmt: skip
    table = Apply(lambda x, table: x * table[0].weight.relu(), nn.Sequential(nn.Linear(8, 1)))
    assert checked(features(table, nn.GELU()), x, y).findings == ()  # not a function of x


class Uncopied(nn.ReLU):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise RuntimeError("no copies")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.norm() > 1.57 else x.cos()


@pytest.mark.parametrize(
    ("layers", "fixes"),
    [
        ([nn.ReLU(), nn.Linear(8, 8), nn.ReLU6()], ["Train smoothify(model)."]),
        ([nn.PReLU()], ["Put a smooth activation in its place by hand."]),
        ([Apply(lambda x: F.max_pool1d(x, 2).repeat(1, 2))], ["It may stay: max pooling cost a smooth network no"]),
        ([Apply(lambda x: x + (x.round() - x).detach())], ["Take it off the way from x"]),
        ([Apply(lambda x: x.clamp(0.0))], ["As a guard it may stay; as an activation, write it as F.relu"]),
        ([Apply(lambda x: hidden_abs(x + 0.5).relu_())], ["As part of a norm it may stay", "Train smoothify(model)."]),
        ([Apply(hidden_relu)], ["Train smoothify(model)."]),
        ([Branches()], ["It may stay if both sides agree"]),
        ([scripted(nn.ReLU())], ["Smoothify the model before torch.jit"]),
    ],
)
def test_says_what_to_do_about_what_is_not_smooth(layers: list[nn.Module], fixes: list[str]) -> None:
    found = [f for f in checked(features(*layers), *batch(0)).findings if "not smooth" in f.problem]
    assert len(found) == len(fixes)
    for fix in fixes:
        assert any(finding.fix.startswith(fix) for finding in found), found


def test_looks_at_the_types_of_the_modules_of_a_model_that_cannot_be_copied() -> None:
    report = checked(features(Uncopied()), *batch(0))
    assert report.ok
    assert warnings_about(report, "not smooth") == ["1"]
    (warning,) = (warning for warning in report.findings if "types of modules alone" in warning.problem)
    assert "no copies" in warning.problem
    assert warnings_about(report, "tried on the model itself") == [""]


def test_fresh_statistics_are_not_to_be_frozen() -> None:
    model, (x, y) = features(nn.BatchNorm1d(8), nn.GELU()), batch(0)

    def said() -> list[str]:
        (finding,) = checked(model, x, y).findings
        with pytest.warns(GradregWarning, match="statistics") as caught:
            thesis()(model, x, y)
        return [finding.fix, str(caught[0].message)]

    assert not any("eval" in text for text in said())
    model(x)
    assert all("evaluation mode" in text for text in said())


@pytest.mark.parametrize("kwargs", [{}, {"track_running_stats": False}])
def test_warns_of_batch_statistics(kwargs: dict[str, bool]) -> None:
    model, (x, y) = features(nn.BatchNorm1d(8, **kwargs), nn.GELU()), batch(0)
    assert warnings_about(checked(model, x, y), "BatchNorm") == ["1"]
    model.eval()
    # Without running statistics the batch's own are used in either mode: the gradients really mix.
    assert bool(warnings_about(checked(model, x, y), "BatchNorm")) == samples_mix(model, x, y)


def samples_mix(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="none")[0], x)
    return bool(grad[1:].any())


def test_a_saturated_loss_is_a_warning() -> None:
    model, (x, y) = features(nn.GELU()), batch(0)
    model[-1].bias.data[0] = 1000.0
    report = checked(model, x, torch.zeros_like(y))
    assert report.ok
    assert warnings_about(report, "saturated") == [""]
    assert checked(model, x, torch.ones_like(y)).findings == ()


# ----------------------------------------------------------------------------------------- any objective


def selective(policy: CheckpointPolicy) -> nn.Module:
    contexts = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: policy)
    return features(
        Apply(lambda x, net: checkpoint(net, x, use_reentrant=False, context_fn=contexts), nn.Linear(8, 8)), nn.GELU()
    )


def test_recommends_nothing_that_fails_too_under_selective_checkpointing() -> None:
    model, (x, y) = selective(CheckpointPolicy.MUST_SAVE), batch(0)
    report = checked(model, x, y)
    assert "selective" in report.errors[0].problem
    for differentiation in (DoubleBackward(), FiniteDifference()):
        assert not works(model, x, y, thesis(differentiation=differentiation))
    assert "FiniteDifference" not in str(report)
    with pytest.raises(RuntimeError, match="selective"):
        report.differentiation()
    assert preflight(RECOMMENDED, model, x, y).ok
    assert works(model, x, y, RECOMMENDED)


def raises(*args: object) -> Tensor:
    raise LookupError("no {such} thing")


class Raises(nn.Module):
    def forward(self, *args: object) -> Tensor:
        return raises(*args)


@pytest.mark.parametrize(
    ("objective", "where"),
    [
        (PenalizedLoss(raises), "the criterion"),
        (PenalizedLoss(Raises()), "the criterion"),
        (PenalizedLoss(partial(raises, 1)), "the criterion"),
        (PenalizedLoss(terms={"mine": Term(raises)}), "the penalty 'mine'"),
        (PenalizedLoss(terms={"mine": Term(Raises())}), "the penalty 'mine'"),
        (PenalizedLoss(terms={"mine": Term(GradientPenalty(raises))}), "the penalty 'mine'"),
        (PenalizedLoss(terms={"norm": Term(GradNormPenalty(Linf(0.1))), "mine": Term(raises)}), "the penalty 'mine'"),
        (PenalizedLoss(output=raises), ""),
        (PenalizedLoss(loss_weight=raises), ""),
        (PenalizedLoss(terms={"mine": Term(GradNormPenalty(Linf(0.1)), raises)}), ""),
    ],
)
def test_what_an_objective_raises_is_a_finding(objective: PenalizedLoss, where: str) -> None:
    report = preflight(objective, features(nn.GELU()), *batch(0), t=5)
    (error,) = report.errors
    assert error.where == where
    assert "no {such} thing" in error.problem
    assert report.works is None


def test_a_pass_that_a_penalty_asks_for_in_vain_is_said_to_be_its_own() -> None:
    def penalty(point: Point) -> Tensor:
        return point.batch.model(point.x[:, :3]).sum(1)

    (error,) = preflight(PenalizedLoss(terms={"mine": Term(penalty)}), features(), *batch(0)).errors
    assert error.where == "0"
    assert "'mine'" in error.problem


def test_the_wrong_arguments_are_a_finding(unchecked: None) -> None:
    model, (x, y) = features(), batch(0)
    for arguments in [(model, thesis(), x, y), (model, x, y), (thesis(), model.forward, x, y), (thesis(), model, y, x)]:
        assert not preflight(*arguments).ok


@pytest.mark.parametrize("at", [NFGSM(Linf(8 / 255), share=0.5), PGDAttack(Linf(0.1), steps=2), Noise(Linf(0.1)), None])
def test_without_penalties_batch_norm_and_relu_are_fine(at: NFGSM | None) -> None:
    model, (x, y) = features(nn.BatchNorm1d(8), nn.ReLU()), batch(0)
    report = preflight(PenalizedLoss(at=at), model, x, y)
    assert report.findings == ()
    assert report.ok == works(model, x, y, PenalizedLoss(at=at))


@pytest.mark.parametrize("at", [PGDAttack(Linf(0.1), steps=2), Noise(Linf(0.1))])
def test_an_attack_needs_a_first_derivative_and_noise_needs_none(at: PGDAttack | Noise) -> None:
    model, (x, y) = through_checkpoint(reentrant=True), batch(0)
    report = preflight(PenalizedLoss(at=at), model, x, y)
    assert report.ok == works(model, x, y, PenalizedLoss(at=at)) == isinstance(at, Noise)
    assert ["reentrant" in error.problem for error in report.errors] == ([] if report.ok else [True])
    assert "FiniteDifference" not in str(report)


def test_fused_attention_is_fine_where_nothing_is_differentiated_twice() -> None:
    model, (x, y) = Attention(need_weights=False), batch(0)
    for objective in (RECOMMENDED, thesis(differentiation=FiniteDifference(0.5))):
        report = preflight(objective, model, x, y)
        assert report.findings == ()
        assert report.differentiation() is objective.differentiation


def test_a_recommended_difference_has_a_unit() -> None:
    model, (x, y) = features(nn.Hardsigmoid()), batch(0)
    terms = {"mine": Term(GradientPenalty(lambda grad, x: grad.square().flatten(1).sum(1)))}
    report = preflight(PenalizedLoss(terms=terms), model, 100 * x, y)
    chosen = report.differentiation()
    assert isinstance(chosen, FiniteDifference)
    assert 0.5 < chosen.threat.eps <= 1.0
    assert str(chosen.threat) in report.errors[0].fix
    assert works(model, 100 * x, y, PenalizedLoss(terms=terms, differentiation=chosen))


@pytest.mark.parametrize("weight", [linear_ramp(1.0, duration=10), lambda t: float(t > 5_000), lambda t: 0.0])
@pytest.mark.parametrize("t", [None, 0, 3, 20_000])
def test_tries_terms_whose_weight_is_0_at_this_step(weight: Callable[[float], float], t: float | None) -> None:
    model, (x, y) = features(nn.Hardsigmoid()), batch(0)
    objective = PenalizedLoss(terms={"norm": Term(GradNormPenalty(Linf(0.1)), weight)}, loss_weight=weight)
    report = preflight(objective, model, x, y, t=t)
    assert [error.where for error in report.errors] == ["1"]
    assert report.differentiation() == FiniteDifference()
    assert objective.terms["norm"].weight is weight
    loss_only = PenalizedLoss(terms={"norm": Term(raises, 0.0)})  # which no schedule will ever turn on
    assert preflight(loss_only, model, x, y, t=t).ok


@pytest.mark.parametrize("kind", [dict, tuple])
def test_inputs_of_any_structure(kind: type) -> None:
    class Two(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.embedding, self.net = nn.Embedding(3, 8), features(*layers)

        def forward(self, ids: Tensor, image: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(image + self.embedding(ids))}

    image, y = batch(0)
    x = (y, image) if kind is tuple else {"image": image, "ids": y}
    assert checked(Two(nn.GELU()), x, (y,)).ok is False  # cross-entropy takes no tuple
    objective = PenalizedLoss(lambda logits, y: cross_entropy(logits, y[0]), thesis().terms)
    assert preflight(objective, Two(nn.GELU()), x, (y,)).findings == ()
    report = preflight(objective, Two(nn.Hardsigmoid(), nn.ReLU()), x, (y,))
    assert [error.where for error in report.errors] == ["net.1"]
    assert "net.1, net.2" in [finding.where for finding in report.findings if "not smooth" in finding.problem]
    assert preflight(PenalizedLoss(lambda logits, y: logits.square().sum(1), thesis().terms), Two(nn.GELU()), x).ok


def test_a_penalty_that_is_0_is_a_warning() -> None:
    hinge = Term(GradientPenalty(lambda grad, x: (grad.abs().sum(1) - 100).relu()))
    report = preflight(PenalizedLoss(terms={"hinge": hinge}), features(nn.GELU()), *batch(0))
    assert report.ok
    assert warnings_about(report, "0 on this batch") == ["the penalty 'hinge'"]


def test_warnings_of_the_objective_are_findings() -> None:
    x, y = batch(0)
    report = preflight(PenalizedLoss(at=Noise(Linf(0.1), bounds=None)), features(nn.GELU()), 200 * x, y)
    assert warnings_about(report, "bytes") == [""]


def test_a_trainable_criterion_is_part_of_the_step() -> None:
    class Proxies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proxies, self.seen = nn.Parameter(torch.randn(CLASSES, CLASSES)), 0

        def forward(self, embeddings: Tensor, y: Tensor) -> Tensor:
            self.seen += 1
            return F.cross_entropy(embeddings @ self.proxies, y, reduction="none")

    objective, (x, y) = thesis(Proxies()), batch(0)
    assert preflight(objective, frozen(features(nn.GELU())), x, y).ok  # the input gradient moves the proxies
    assert objective.criterion.seen == 0
    assert objective.criterion.proxies.grad is None


class Shy(nn.Module):
    """Raises where it is watched."""

    def forward(self, x: Tensor) -> Tensor:
        if self._forward_hooks:
            raise LookupError("watched")
        return x


def test_a_diagnosis_that_fails_leaves_the_error_itself() -> None:
    x, y = batch(0)
    (error,) = checked(features(nn.Hardsigmoid(), Shy()), x, y).errors
    assert "hardsigmoid" in error.problem
    broken = checked(features(Apply(lambda x: (x.abs() * 0).pow(1.5) + x * x), Shy()), x, y)
    assert any("NaN" in error.problem for error in broken.errors)
    report = checked(features(nn.GELU(), Shy()), x, y)
    assert report.ok
    assert warnings_about(report, "could not look further: LookupError: watched") == [""]


# ------------------------------------------------------------------------------------ distributed training


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def objective() -> PenalizedLoss:
    return PenalizedLoss(nn.CrossEntropyLoss(reduction="none"), {"norm": Term(GradNormPenalty(Linf(0.1)), weight=1.0)})


def explicit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The total of the same objective, with the input gradient taken outside of the model's forward pass."""
    x = x.clone().requires_grad_()
    losses = F.cross_entropy(model(x), y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses.mean() + 0.1 * grad.abs().flatten(1).sum(1).mean()


def is_synchronized_like(
    ddp: DistributedDataParallel, reference: nn.Module, total: Callable[[nn.Module], Tensor]
) -> bool:
    """Whether DDP's communication hook, which here doubles the gradients that it sees, sees those of two steps."""

    def double(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    ddp.register_comm_hook(None, double)
    for _ in range(2):
        for module in (ddp, reference):
            module.zero_grad()
            total(module).backward()
        pairs = zip(ddp.parameters(), reference.parameters(), strict=True)
        if not all(torch.allclose(seen.grad, 2 * own.grad) for seen, own in pairs):
            return False
    return True


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
@pytest.mark.parametrize("inside", [False, True])
def test_ddp(options: dict[str, bool], inside: bool) -> None:
    x, y = batch(0)
    model = features(nn.GELU())
    if inside:  # the fix: one forward pass with the penalty in it
        assert checked(model, x, y).ok
        ddp = DistributedDataParallel(PenalizedModel(model, objective()), **options)
        reference = copy.deepcopy(ddp.module)
        assert is_synchronized_like(ddp, reference, lambda module: module(x, y).total)
        return
    ddp = DistributedDataParallel(model, **options)
    reference = copy.deepcopy(model)
    report = checked(ddp, x, y)
    assert [error.where for error in report.errors] == ([""] if options.get("static_graph") else [])
    assert report.ok == is_synchronized_like(ddp, reference, lambda module: explicit(module, x, y))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("at", [NFGSM(Linf(8 / 255), share=0.5), Noise(Linf(0.1))])
def test_ddp_of_a_static_graph_and_an_attack(at: NFGSM | Noise) -> None:
    x, y = batch(0)
    model = features(nn.GELU())
    ddp, objective = DistributedDataParallel(model, static_graph=True), PenalizedLoss(at=at)
    report = preflight(objective, ddp, x, y)
    assert report.ok == isinstance(at, Noise)
    if report.ok:
        torch.manual_seed(0)
        objective(ddp, x, y).total.backward()
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match="static_graph"):
            objective(ddp, x, y)


@pytest.mark.usefixtures("_process_group")
def test_ddp_inside_of_what_cannot_be_copied_communicates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(0)
    ddp = DistributedDataParallel(features(nn.BatchNorm1d(8), nn.GELU(), Uncopied()))
    F.cross_entropy(ddp(x), y).backward()
    reducer, grad = ddp.reducer, next(ddp.parameters()).grad
    with monkeypatch.context() as patch:
        patch.setattr(ddp, "_sync_buffers", lambda: pytest.fail("preflight broadcasts buffers"))
        assert checked(nn.Sequential(ddp), x, y).ok
    assert ddp.reducer is reducer
    assert next(ddp.parameters()).grad is grad
    assert reducer._rebuild_buckets()


@pytest.mark.usefixtures("_process_group")
def test_ddp_around_batch_norm_is_warned_of_per_rank() -> None:
    report = checked(DistributedDataParallel(features(nn.BatchNorm1d(8), nn.GELU())), *batch(0))
    assert report.ok
    assert warnings_about(report, "on its rank") == ["module.1"]


@pytest.mark.usefixtures("_process_group")
def test_preflight_leaves_ddp_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(0)
    unused = Apply(lambda x, net, spare: net(x), features(nn.BatchNorm1d(8), nn.GELU()), nn.Linear(1, 1))
    ddp = DistributedDataParallel(unused, find_unused_parameters=True)
    before = {name: value for name, value in vars(ddp).items() if name.startswith("require_")}
    with monkeypatch.context() as patch:
        patch.setattr(ddp, "_sync_buffers", lambda: pytest.fail("preflight broadcasts buffers"))
        ddp.register_forward_pre_hook(lambda module, args: setattr(module, "training", False))
        assert checked(ddp, x, y).ok
    assert ddp.training
    assert {name: value for name, value in vars(ddp).items() if name.startswith("require_")} == before
    explicit(ddp, x, y).backward()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrap", [nn.Sequential, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}])
def test_preflight_after_a_step_leaves_the_layout_of_ddps_buckets_to_all_ranks(
    wrap: Callable[[nn.Module], nn.Module], options: dict[str, bool]
) -> None:
    x, y = batch(0)
    unused = Apply(lambda x, net, spare: net(x), features(nn.BatchNorm1d(8), nn.GELU()), nn.Linear(1, 1))
    ddp = DistributedDataParallel(unused if options else unused.inner[0], **options)
    model = wrap(ddp)
    F.cross_entropy(model(x), y).backward()
    reducer = ddp.reducer
    assert checked(model, x, y).ok
    assert ddp.reducer is reducer
    assert reducer._rebuild_buckets() == (not options)  # what a forward pass does first, in all ranks together


@pytest.mark.usefixtures("_process_group")
def test_a_wrong_double_backward_is_found_inside_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    build = partial(DistributedDataParallel, features(nn.Tanh(), Apply(Detached.apply)))
    model, (x, y) = nn.Sequential(build()), batch(0)
    monkeypatch.setattr(DistributedDataParallel, "__setstate__", lambda *_: pytest.fail("preflight copies DDP"))
    assert [error.where for error in checked(model, x, y).errors] == ["0.module.2"]


@pytest.mark.usefixtures("_process_group")
def test_synchronized_batch_norm() -> None:
    model, (x, y) = features(nn.SyncBatchNorm(8), nn.GELU()), batch(0)
    report = checked(model, x, y)
    assert [error.where for error in report.errors] == ["1"]
    assert not penalty_trains(model, x, y)
    model.eval()  # the fix
    assert checked(model, x, y).findings == ()
    assert penalty_trains(model, x, y)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs a GPU in this version of torch"
)
@pytest.mark.usefixtures("_process_group")
def test_fsdp() -> None:
    x, y = batch(0)
    model = nn.Sequential(features(nn.GELU()), nn.Linear(CLASSES, CLASSES))
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    report = checked(model, x, y)
    assert [error.where for error in report.errors] == ["0"]
    assert "reshard" in report.errors[0].fix
    with pytest.raises(RuntimeError, match="nothing was tried"):
        report.differentiation()
    model.set_reshard_after_backward(False, recurse=True)
    runs: list[None] = []
    handle = model.register_forward_hook(lambda *_: runs.append(None))
    report = checked(model, x, y)
    handle.remove()
    assert report.ok
    assert not runs
    assert warnings_about(report, "nothing was tried")
    with pytest.raises(RuntimeError, match="nothing was tried"):
        report.differentiation()
    assert penalty_trains(model, x, y)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs a GPU in this version of torch"
)
@pytest.mark.usefixtures("_process_group")
def test_fsdp_without_the_recipe_fails() -> None:
    model = features(nn.GELU())
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert not penalty_trains(model, *batch(0))


# ------------------------------------------------------------------------------------- nothing is changed


class Restless(nn.Module):
    """Its forward pass changes what a forward pass can change: flags, numbers, containers, tensors in any place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("bound", torch.zeros(2))
        self.register_buffer("nothing", None)
        self.scale = nn.Parameter(torch.full((2,), 5.0))
        self.ema, self.last = torch.ones(2), torch.zeros(1)
        self.count, self.name, self.flag, self.pair = 0, "none", None, (1, torch.ones(1))
        self.seen, self.named, self.met = [], {"first": 1}, {0}
        self.nested = {"k": [1, {"deep": [torch.ones(1)]}], "q": deque([1, 2], maxlen=2)}
        self.nested["itself"] = self.nested
        self.hidden = [nn.BatchNorm1d(8)]  # no submodule

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.bound = self.bound + torch.nan
        self.nothing = torch.ones(2)
        self.training = not self.training
        self.scale.data.clamp_(max=4.0)
        self.ema.mul_(0.9)
        self.count, self.name, self.flag = self.count + 1, "some", True
        self.pair[1].mul_(2)
        self.pair = (2, x)
        self.seen.append(x)
        self.named |= {"first": x, "second": x}
        self.met.add(self.count)
        self.nested["k"].append(3)
        self.nested["k"][1]["deep"][0] += 1
        self.nested["q"].append(self.count)
        self.hidden[0](x)
        self.last, self.new = x, {"x": x}
        return x + torch.rand_like(x) * random.random() * np.random.rand()

    def state(self) -> dict[str, object]:
        """All of it, in a form that can be compared."""
        deep = self.nested["k"][1]["deep"]
        return {
            "attributes": sorted(vars(self)),
            "tensors": [tensor.clone() for tensor in (self.scale, self.ema, self.last, self.pair[1], *deep)],
            "values": [self.count, self.name, self.flag, self.pair[0], self.seen[:], {**self.named}, sorted(self.met)],
            "nested": [len(self.nested["k"]), list(self.nested["q"])],
            "hidden": [buffer.clone() for buffer in self.hidden[0].buffers()],
            "identities": [id(value) for value in (self.scale, self.ema, self.last, self.pair, self.seen, *deep)],
        }


def failing_forward(x: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        x = module(x)
    raise KeyError("no such thing")


def write_to_x(x: Tensor) -> Tensor:
    x.data.mul_(2)
    return x * 1


UNCHANGED: dict[str, Callable[[], nn.Module]] = {
    "passes": lambda: features(nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(), Restless()),
    "spectral norm": lambda: features(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.GELU()),
    "fails twice": lambda: features(nn.BatchNorm1d(8), nn.Dropout(), nn.Hardsigmoid(), Restless()),
    "forward raises": lambda: Apply(failing_forward, nn.BatchNorm1d(8), nn.Dropout(), Restless()),
    "cut": lambda: features(nn.BatchNorm1d(8), nn.Dropout(), Restless(), Apply(Tensor.detach)),
    "step": lambda: features(nn.BatchNorm1d(8), nn.Dropout(), Restless(), Apply(torch.round)),
    "writes to x": lambda: nn.Sequential(Apply(write_to_x), features(nn.GELU())),
    "no gradient": lambda: frozen(features(nn.BatchNorm1d(8), Restless())),
    "no copy": lambda: features(nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(), Uncopied(), Restless()),
    "no copy, fails": lambda: features(nn.BatchNorm1d(8), nn.Dropout(), Uncopied(), nn.Hardsigmoid(), Restless()),
    "no copy, forward raises": lambda: Apply(failing_forward, nn.BatchNorm1d(8), nn.Dropout(), Uncopied(), Restless()),
    "script": lambda: nn.Sequential(scripted(nn.BatchNorm1d(8), nn.Dropout())),
    "compiled in place": lambda: nn.Sequential(features(nn.BatchNorm1d(8), Restless()), compiled_in_place(CLASSES)),
}


@pytest.mark.parametrize("build", UNCHANGED.values(), ids=UNCHANGED)
@pytest.mark.parametrize("interrupted", [False, True])
def test_changes_nothing(build: Callable[[], nn.Module], interrupted: bool, device: str, unchecked: None) -> None:
    def interrupt(logits: Tensor, y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = build().to(device)
    x, y = batch(0, device)
    for index, parameter in enumerate(model.parameters()):
        if index % 2 and parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model[0].eval() if isinstance(model, nn.Sequential) else None
    before, x_before = state_of(model, x), x.clone()
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    with suppress(KeyboardInterrupt):
        preflight(thesis(interrupt) if interrupted else thesis(), model, x, y)
    assert_same(state_of(model, x), before)
    assert identities == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert torch.equal(x, x_before)


def state_of(model: nn.Module, x: Tensor) -> dict[str, object]:
    parameters = dict(model.named_parameters())
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()}
        | {"x": x.requires_grad},
        "training": {name: module.training for name, module in model.named_modules()},
        "restless": [module.state() for module in model.modules() if isinstance(module, Restless)],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": {"python": random.getstate(), "numpy": np.random.get_state()[1:3], "cpu": torch.get_rng_state()}
        | {"cuda": torch.cuda.get_rng_state() if x.is_cuda else None},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same(after: dict[str, object], before: dict[str, object]) -> None:
    for key, value in before.items():
        torch.testing.assert_close(flat(after[key]), flat(value), rtol=0, atol=0, msg=key)


def flat(state: object) -> list[Tensor]:
    """The tensors of a state; what is no tensor is equal if it reads the same."""
    leaves, spec = tree_flatten(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = repr((spec, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]))
    return [*tensors, torch.tensor(list(others.encode()))]


def test_leaves_a_graph_that_is_still_alive_usable() -> None:
    model, (x, y) = features(nn.BatchNorm1d(8), nn.GELU()).eval(), batch(0)
    loss = F.cross_entropy(model(x), y)
    checked(model, x, y)
    loss.backward()


# --------------------------------------------------------------------------------------------- the report


def test_report_reads_errors_first() -> None:
    model, (x, y) = features(nn.ReLU(), nn.Hardsigmoid()), batch(0)
    report = checked(model, x, y)
    assert [finding.severity for finding in report.findings] == ["error", *["warning"] * (len(report.findings) - 1)]
    assert str(report).startswith("preflight: the objective works with finite differences only\nerror: 2: Hardsigmoid")
    with pytest.raises(RuntimeError, match="Hardsigmoid"):
        report.raise_for_errors()


def test_report_without_findings() -> None:
    report = checked(features(nn.GELU()), *batch(0))
    assert (report.ok, report.findings, str(report)) == (True, (), "preflight: the objective works")
    report.raise_for_errors()


def test_finding_shortens_long_lists_of_modules() -> None:
    finding = Finding("warning", "a, b, c, d, e", "something", "a fix")
    assert str(finding) == "warning: a, b, c, d, ... (5 modules): something\n  fix: a fix"

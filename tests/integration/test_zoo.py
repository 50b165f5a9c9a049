"""smoothify, find_nonsmooth and preflight on models of torchvision and timm: a sample, or all with ``--zoo``."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradreg import (
    Finding,
    FiniteDifference,
    PenalizedLoss,
    find_nonsmooth,
    preflight,
    smoothify,
    unsmoothify,
)

from zoo import LIBRARIES, PAGE, THESIS, ZOO, Member, logits_of, row, smoothified

# For CI, with something of every kind: functional ReLUs, auxiliary logits, hard gates, fused attention in two forms,
# Hardswish and a cache of position biases, a linear attention, a selection by amax, a fresh classifier of zeros.
SAMPLE = [
    "torchvision-densenet121", "torchvision-googlenet", "torchvision-mobilenet_v3_small", "torchvision-vit_b_32",
    "timm-convnext_atto", "timm-efficientvit_b0", "timm-hiera_tiny_224", "timm-levit_128s",
    "timm-gmlp_ti16_224", "timm-resnet18", "timm-vit_tiny_patch16_224",
]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        names = list(ZOO) if metafunc.config.getoption("zoo") else SAMPLE
        metafunc.parametrize("member", [ZOO[name] for name in names], ids=names)


pytestmark = pytest.mark.usefixtures("unchecked")  # checking annotations would double the time


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """The libraries' own warnings are not looked at."""


# smoothify


def tensors(output: object) -> list[Tensor | None]:
    return [output] if isinstance(output, Tensor) else list(output)


def scale(model: nn.Module, x: Tensor) -> float:
    """The standard deviation of what the last layer with weights is given: the features."""
    inputs: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0])) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return inputs[-1].std().item()


def test_smoothify_changes_the_activations_and_nothing_else(member: Member) -> None:
    model, (x, _) = member.build(), member.batch()
    smooth, _ = smoothified(model, x)
    assert list(smooth.state_dict()) == list(model.state_dict())
    flags = {name: module.training for name, module in smooth.named_modules()}
    assert all(flags[name] == module.training for name, module in model.named_modules())
    for train in (True, False):
        before, after = model.train(train)(x), smooth.train(train)(x)
        assert type(after) is type(before)
        for old, new in zip(tensors(before), tensors(after), strict=True):
            assert (new is None) == (old is None)
            assert new is None or new.shape == old.shape
            assert new is None or new.isfinite().all()
    # In training mode, where normalisation layers normalise; a fresh model in evaluation mode has no scale to keep.
    # Without such layers small signals would shrink, and x keeps them.
    assert 1 / 4 < scale(smooth.train(), x) / scale(model.train(), x) < 4


def test_unsmoothify_gives_the_model_back(member: Member) -> None:
    model, (x, _) = member.build().eval(), member.batch()
    smooth, _ = smoothified(model, x)
    before = unsmoothify(smooth)
    assert repr(before) == repr(model)
    assert [type(module) for module in before.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(logits_of(before(x)), logits_of(model(x)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_run_of_a_smooth_model_meets_an_activation_that_is_not(member: Member, train: bool) -> None:
    model, (x, _) = member.build().train(train), member.batch()
    smooth, _ = smoothified(model, x)
    before, after = find_nonsmooth(model, x), find_nonsmooth(smooth, x)
    assert not any(found.flat for found in after)
    places = {(found.name, found.kind) for found in before}
    assert {(found.name, found.kind) for found in after} <= places  # a smooth twin brings no kink of its own


# preflight


def penalty_works(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Two training steps with the exact penalty, by hand: do they run, with gradients that are finite and not all 0?

    The first step is without the penalty, so that a classifier whose weights start at 0 has some. It is a short one:
    in evaluation mode a fresh model may have losses of millions.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        F.cross_entropy(logits_of(model(x)), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        for _ in range(2):
            optimizer.zero_grad()
            leaf = x.clone().requires_grad_()
            losses = F.cross_entropy(logits_of(model(leaf)), y, reduction="none")
            (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
            grad.abs().sum().backward()
    except (RuntimeError, TypeError):
        return False
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return all(bool(grad.isfinite().all()) for grad in grads) and any(bool(grad.any()) for grad in grads)


class MathAttention(nn.Module):
    """The fix for fused attention that preflight names first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(x)


def unfused(model: nn.Module, finding: Finding) -> nn.Module:
    """The fix for fused attention in timm, on the modules that the finding names."""
    for name in finding.where.split(", "):
        assert model.get_submodule(name).fused_attn is True
        model.get_submodule(name).fused_attn = False
    return model


def in_train_mode(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def fixes(model: nn.Module, finding: Finding) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """What the finding says to do."""
    if "fused attention" in finding.problem:
        yield MathAttention
        if all(hasattr(model.get_submodule(name), "fused_attn") for name in finding.where.split(", ")):
            yield lambda model: unfused(model, finding)
    elif "Hardsigmoid" in finding.problem:
        assert "smoothify" in finding.fix
        yield smoothify
    else:
        assert "model.train()" in finding.fix
        yield in_train_mode


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_verdict_of_preflight_is_what_happens_and_its_fixes_work(member: Member, train: bool) -> None:
    x, y = member.batch()
    for choice in (0, -1):  # where there are two fixes, each of them
        model = member.build().train(train)
        for _ in range(4):
            report = preflight(THESIS, model, x, y)
            assert report.ok == penalty_works(model, x, y), str(report)
            if report.ok:
                break
            for error in report.errors:
                model = list(fixes(model, error))[choice](model)
        assert report.ok
        if not any(hasattr(module, "fused_attn") for module in model.modules()):
            break


def test_the_padding_of_torchvisions_swin_v2_breaks_the_penalty() -> None:
    """It divides by the norm of the keys, which are 0 where an image was padded up to a whole window."""
    member = ZOO["torchvision-swin_v2_t"]  # which has images that need no padding
    model, (x, y) = member.build(), member.batch()
    (error,) = preflight(THESIS, model, x[..., :64, :64], y).errors
    padded = [f"features.5.{block}.attn.qkv" for block in range(6)] + [
        f"features.7.{block}.attn.qkv" for block in (0, 1)
    ]
    assert error.where.split(", ") == padded
    assert "NaN" in error.problem
    assert not penalty_works(model, x[..., :64, :64], y)


def test_recommended_finite_differences_train(member: Member) -> None:
    model, (x, y) = member.build(), member.batch()
    report = preflight(THESIS, model, x, y)
    assert report.works is not None
    if report.ok:
        return
    assert report.differentiation() == FiniteDifference()
    PenalizedLoss(terms=THESIS.terms, differentiation=report.works)(model, x, y).total.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)


# The page


def test_the_page_holds_what_the_script_writes(member: Member) -> None:
    text = PAGE.read_text()
    if LIBRARIES in text:  # other versions have other models
        assert row(member) in text

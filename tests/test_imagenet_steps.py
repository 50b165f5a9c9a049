"""One optimiser step of the recipes of the released code against the published formulas, written out in plain PyTorch.

The formulas are those of the text and of what was found of its code; nothing of them is taken from the library, and
nothing of the library from them. Both sides are given the same images, soft labels, noise and classes, in float64.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import Linf
from gradreg.checks import GradregWarning
from gradreg.selectors import ClassSelector

from imagenet import building, training
from imagenet.building import set_mode
from imagenet.recipe import Recipe, load
from imagenet.training import Options, Training, World

CLASSES, PIXELS = 5, 16
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
STEPS_PER_EPOCH = 5

Part = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(gain: float = 1.0, batch_norm: bool = True) -> nn.Module:
    """A stand-in for a Swin, or for a ResNet, where it has what evaluation mode is there for."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6) if batch_norm else nn.GroupNorm(2, 6), nn.GELU(),
        nn.Conv2d(6, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(200, CLASSES),
    )  # fmt: skip
    if batch_norm:
        net[1].running_mean.uniform_(-0.5, 0.5)
        net[1].running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        net[-1].weight *= gain
    return net


def parts_of(recipe: Recipe) -> list[Part]:
    """Normalised images, some of them erased and so out of the range of pixels, and soft labels."""
    size = recipe.batch.of_a_part(1)
    found = []
    for _ in range(recipe.batch.accumulation):
        x = (torch.rand(size, 3, PIXELS, PIXELS) - MEAN) / STD
        x[0, :, 2:6, 3:9] = torch.randn(3, 4, 6)
        y = 0.9 * torch.softmax(4 * torch.randn(size, CLASSES), 1) + 0.1 / CLASSES
        found.append((x, y))
    return found


class FakeImages:
    classes = CLASSES

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class Taken:
    """A step of the engine: what was minimised, and the gradients that reached the optimiser."""

    def __init__(self, recipe: Recipe, net: nn.Module, parts: list[Part], step: int, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(training, "build_model", lambda recipe, classes: set_mode(net, recipe))
        patch.setattr(training, "mixed", lambda x, labels, recipe, classes, place: parts[place.part])
        world = World(rank=0, processes=1, device=torch.device("cpu"))
        engine = Training(recipe, FakeImages(STEPS_PER_EPOCH * recipe.batch.total), world, Options(Path("unused")))
        self.totals: list[Tensor] = []
        self.grads: list[Tensor] = []

        def scale(total: Tensor) -> Tensor:
            self.totals.append(total.detach())
            return total

        patch.setattr(engine.scaler, "scale", scale)
        engine.optimizer.register_step_pre_hook(
            lambda *_: self.grads.extend(parameter.grad.clone() for parameter in net.parameters())
        )
        engine.step = step
        self.told = engine.take_step(iter([(x, torch.zeros(len(x))) for x, _ in parts]))

    def equals(self, expected: "Published") -> None:
        torch.testing.assert_close(torch.stack(self.totals), torch.stack(expected.losses), rtol=1e-10, atol=0)
        torch.testing.assert_close(self.told["grad_norm_of_weights"], expected.norm, rtol=1e-10, atol=0)
        for found, grad in zip(self.grads, expected.grads, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-10 * expected.largest)


class Published:
    """Losses of the parts, added up; the gradient of the sum, clipped to a norm of 1 where the sources clip."""

    def __init__(self, net: nn.Module, losses: list[Tensor], clip: float | None) -> None:
        grads = torch.autograd.grad(sum(losses), list(net.parameters()))
        self.losses = [loss.detach() for loss in losses]
        self.norm = math.sqrt(sum((grad**2).sum().item() for grad in grads))
        factor = 1.0 if clip is None else min(1.0, clip / (self.norm + 1e-6))
        self.grads = [factor * grad for grad in grads]
        self.largest = max(grad.abs().max().item() for grad in self.grads)


def mean_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return (-y * F.log_softmax(logits, 1)).sum(1).mean()


# The gradient norm


def gradnorm_losses(net: nn.Module, parts: list[Part], epochs: float, start: float = 0.0) -> list[Tensor]:
    """Of parts of B images: R = (eps / s) B mean_i |d CE / d x_i|_1, at 0.8 CE + 1.2 alpha R, in evaluation mode."""
    net.eval()
    alpha = min(max(start + 0.2 * epochs, 0.0), 1.0)
    losses = []
    for x, y in parts:
        x = x.clone().requires_grad_()
        loss = mean_cross_entropy(net(x), y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        lengths = torch.stack([image.abs().sum() for image in grad])
        penalty = (4 / 255) / 0.225 * len(x) * lengths.mean()
        losses.append(0.8 * loss + 1.2 * alpha * penalty)
    return losses


@pytest.mark.parametrize(("step", "epochs"), [(0, 0.0), (13, 2 + 3 / 5), (24, 4 + 4 / 5), (25, 5.0), (400, 80.0)])
def test_gradnorm(step: int, epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("swin_b_gradnorm", "author_code", ["batch.total=8", "ema=null"])
    net, parts = network(gain=2.0), parts_of(recipe)
    assert len(parts) == 2
    reference = copy.deepcopy(net)
    expected = Published(reference, gradnorm_losses(reference, parts, epochs), clip=1.0)
    assert 1 < expected.norm < 2  # so that clipping the mean of the parts would do nothing
    taken = Taken(recipe, net, parts, step, monkeypatch)
    taken.equals(expected)
    assert net[1].running_mean.equal(reference[1].running_mean)


# Edges


def _blurred(maps: Tensor) -> Tensor:
    """By h[n] ~ exp(-t) I_n(t) at t = 1, of seven taps; the Bessel functions are summed as series."""
    bessel = [
        sum(0.5 ** (2 * k + n) / (math.factorial(k) * math.factorial(k + n)) for k in range(20)) for n in range(4)
    ]
    taps = torch.tensor([math.exp(-1) * bessel[abs(n)] for n in range(-3, 4)])
    taps = taps / taps.sum()
    torch.testing.assert_close(taps[:4], torch.tensor([0.008174, 0.05005, 0.208375, 0.466801]), rtol=0, atol=1e-6)
    padded = F.pad(maps, (3, 3, 3, 3), mode="reflect")
    height, width = maps.shape[2:]
    rows = sum(taps[i] * padded[:, :, i : i + height] for i in range(7))
    return sum(taps[i] * rows[:, :, :, i : i + width] for i in range(7))


def contours(x: Tensor) -> Tensor:
    kernel = torch.tensor([[-0.5, 0.0, 0.5], [-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]])
    padded = F.pad(_blurred(x), (1, 1, 1, 1), mode="reflect")
    height, width = x.shape[2:]
    squares = torch.zeros_like(x[:, :1])
    for weights in (kernel, kernel.T):
        slope = sum(weights[i, j] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
        squares = squares + (slope**2).sum(1, keepdim=True)
    return _blurred(squares.sqrt()).expand_as(x)


def edge_losses(net: nn.Module, parts: list[Part], classes: list[Tensor], epochs: float) -> list[Tensor]:
    """CE + alpha MSE(g / RMS, E / RMS), both divided by their root mean square over all of a part, in training mode."""
    net.train()
    alpha = min(1 + 0.09 * epochs, 19.0)
    losses = []
    for (x, y), chosen in zip(parts, classes, strict=True):
        x = x.clone().requires_grad_()
        logits = net(x)
        value = sum(logits[i, k] for i, k in enumerate(chosen.tolist()))
        (student,) = torch.autograd.grad(value, x, create_graph=True)
        teacher = contours(x.detach())
        student, teacher = (maps / (maps**2).mean().sqrt() for maps in (student, teacher))
        losses.append(mean_cross_entropy(logits, y) + alpha * ((student - teacher) ** 2).mean())
    return losses


class Given(ClassSelector):
    """Classes that were drawn beforehand, part by part."""

    def __init__(self, classes: list[Tensor]) -> None:
        object.__setattr__(self, "left", iter(classes))

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return next(self.left)


@pytest.mark.parametrize(("step", "epochs"), [(0, 0.0), (13, 2 + 3 / 5), (499, 99 + 4 / 5), (1100, 220.0)])
@pytest.mark.parametrize("name", ["swin_b_edges", "resnet50_gelu_edges"])
def test_edges(name: str, step: int, epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    without = ["model.starts_from=null", "ema=null", "schedule.epochs=300", "data.mixup=0", "data.cutmix=0"]
    recipe = load(name, "author_code", ["batch.total=6", *without])
    of_a_resnet = "resnet" in name
    net, parts = network(gain=2.0, batch_norm=of_a_resnet), parts_of(recipe)
    assert len(parts) == (1 if of_a_resnet else 2)
    classes = [torch.randint(CLASSES, (len(x),)) for x, _ in parts]
    asked: list[float] = []

    def given(temperature: float) -> ClassSelector:
        asked.append(temperature)
        return Given(classes)

    monkeypatch.setattr(building, "sampled_class", given)
    reference = copy.deepcopy(net)
    expected = Published(reference, edge_losses(reference, parts, classes, epochs), clip=1.0)
    assert expected.norm > 1
    warned = pytest.warns(GradregWarning, match="use the statistics of the batch") if of_a_resnet else nullcontext()
    with warned:
        Taken(recipe, net, parts, step, monkeypatch).equals(expected)
    assert asked == [0.5]
    if of_a_resnet:  # as in the released code, whose ResNet learns with live statistics here
        torch.testing.assert_close(net[1].running_mean, reference[1].running_mean)


# Adversarial training


def attacked(
    net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, step: float, slip: bool
) -> tuple[Tensor, list[float]]:
    """PGD-3 on pixels: of three iterates and the last point, the one where the loss of the batch is largest.

    The slip is that the last point is scored on pixels, without normalisation.
    """
    net.eval()
    eps = 4 / 255
    pixels = x * STD + MEAN
    point = (pixels + noise).clamp(0, 1)
    seen, scores = [], []
    for _ in range(3):
        point = point.detach().requires_grad_()
        loss = mean_cross_entropy(net((point - MEAN) / STD), y)
        (grad,) = torch.autograd.grad(loss, point)
        seen.append(point.detach())
        scores.append(loss.item())
        moved = point.detach() + step * grad.sign()
        point = torch.minimum(torch.maximum(moved, pixels - eps), pixels + eps).clamp(0, 1)
    seen.append(point)
    scores.append(mean_cross_entropy(net(point if slip else (point - MEAN) / STD), y).item())
    best = scores.index(max(scores))
    return (seen[best] - MEAN) / STD, scores


@pytest.mark.parametrize(("step", "warmth"), [(3, 0.0), (13, 2 / 5), (24, 4 / 5), (25, 1.0), (400, 1.0)])
@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("final_check", ["raw", "normalized"])
def test_adversarial_training(
    step: int, warmth: float, gain: float, final_check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["batch.total=6", "ema=null", f"objective.attack.final_check={final_check}"]
    recipe = load("swin_b_adversarial", "author_code", changes)
    net, parts = network(gain), parts_of(recipe)
    ((x, y),) = parts
    noise = (2 * torch.rand_like(x) - 1) * 4 / 255
    monkeypatch.setattr(Linf, "sample_like", lambda threat, like: noise / STD)
    reference = copy.deepcopy(net)
    x_adv, _ = attacked(reference, x, y, noise, warmth * 8 / 255 / 3, slip=final_check == "raw")
    reference.train()
    expected = Published(reference, [mean_cross_entropy(reference(x_adv), y)], clip=None)
    Taken(recipe, net, parts, step, monkeypatch).equals(expected)


def test_the_slip_decides_what_is_trained_on() -> None:
    """Otherwise the tests above could not tell it from the correct check: here the last point is always the best."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    recipe = load("swin_b_adversarial", "author_code", ["batch.total=6"])
    for gain in (1.0, 3.0):
        net, ((x, y),) = network(gain), parts_of(recipe)
        noise = (2 * torch.rand_like(x) - 1) * 4 / 255
        for slip, found in chosen.items():
            _, scores = attacked(net, x, y, noise, 8 / 255 / 3, slip)
            found.append(scores.index(max(scores)))
    assert chosen[False] == [3, 3]
    assert chosen[True] == [2, 2]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_parts_are_averaged_elsewhere(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With reduction mean, two parts are one batch of both: for the loss, the penalty and the clipping."""
    changes = ["batch.total=8", "ema=null", "batch.reduction=mean", f"optimizer.clip_grad={clip or 'null'}"]
    found = []
    for accumulation in (1, 2):
        recipe = load("swin_b_gradnorm", "author_code", [*changes, f"batch.accumulation={accumulation}"])
        torch.manual_seed(1)
        net, parts = network(), parts_of(load("swin_b_gradnorm", "author_code", changes))
        if accumulation == 1:
            parts = [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))]
        found.append(Taken(recipe, net, parts, 13, monkeypatch))
    one, two = found
    for a, b in zip(one.grads, two.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert one.told == pytest.approx(two.told, rel=1e-10)

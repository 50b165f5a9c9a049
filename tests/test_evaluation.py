"""Evaluation: verdicts known in closed form, counts and costs, what it leaves as it was, and how it goes on."""

import copy
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from gradreg import (
    FGSM,
    L1,
    L2,
    NFGSM,
    APGDAttack,
    Attack,
    AutoAttack,
    Flag,
    GradregWarning,
    Linf,
    PGDAttack,
    Point,
    Proportion,
    RandomSearch,
    RobustnessReport,
    StateError,
    TargetedAPGDAttack,
    ThreatModel,
    TransferAttack,
    evaluate,
    margin,
)
from gradreg.streaming.identity import describe, describe_model

from cases import CLASSES, make_batch, make_model, soft_labels

Loader = list[tuple[Tensor, Tensor]]
QUIET: dict[str, Any] = {"masking": 0, "progress": False}
MIXED = {
    "pgd": PGDAttack(Linf(0.02), steps=4),
    "apgd": APGDAttack(Linf(0.03), steps=6),
    "search": RandomSearch(Linf(0.08), queries=12),
}


def batches(x: Tensor, y: Tensor, size: int) -> Loader:
    """A loader, whose last batch may be smaller."""
    return list(zip(x.split(size), y.split(size), strict=True))


def labelled(size: int = 23, name: str = "conv") -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and samples of which every fifth is misclassified."""
    model, (x, _) = make_model(name).eval(), make_batch(size)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % CLASSES
    return model, x, y


def by_sample(report: RobustnessReport) -> dict[str, dict[str, str]]:
    """The verdicts of every sample under every attack."""
    rows = zip(*report.verdicts.values(), strict=True)
    return {
        sample: dict(zip(report.verdicts, row, strict=True)) for sample, row in zip(report.samples, rows, strict=True)
    }


class Linear(nn.Module):
    """Two classes told apart by the sign of the score w (x - 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def score(self, x: Tensor) -> Tensor:
        return (x - 0.5) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        return torch.stack([-score, score], 1)


class _CountBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.counts = counts
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.counts["backward"] += len(grad)
        return grad, None


class Spy(nn.Module):
    """A model that counts its own passes, sample by sample."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.counts = {"forward": 0, "backward": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["forward"] += len(x)
        return _CountBackward.apply(self.model(x), self.counts)


@dataclass(frozen=True, eq=False)
class Shift(Attack):
    """Moves every pixel by some multiples of eps."""

    by: float = 1.0

    @property
    def name(self) -> str:
        return f"shift by {self.by}"

    def _perturb(self, point: Point, index: Tensor | None) -> Tensor:
        return point.x + self.by * self.threat.eps


@dataclass(frozen=True, eq=False)
class Nothing(Shift):
    """A gradient attack that finds nothing."""

    by: float = 0.0


def stay(model: object, x: Tensor, y: Tensor) -> Tensor:
    """An attack of another library that does nothing."""
    return x.clone()


class TestKnownRobustness:
    """A sample of a linear classifier is robust if and only if its score exceeds the dual norm of the weights."""

    @pytest.mark.parametrize("name", ["PGD", "APGD"])
    @pytest.mark.parametrize("threat", [Linf(0.05), L2(0.2), L1(0.4)])
    def test_every_verdict_is_the_one_in_closed_form(self, threat: ThreatModel, name: str) -> None:
        model, generator = Linear(), torch.Generator().manual_seed(0)
        x = torch.rand(150, 8, generator=generator, dtype=torch.float64)
        score = model.score(x).detach()
        right = torch.arange(150) % 7 > 0
        y = torch.where(right, score > 0, score <= 0).long()
        robust = right & (score.abs() > threat.dual_norm(model.weight.detach().expand(150, 8)))
        attack = {
            "PGD": PGDAttack(threat, steps=60, step_size=threat.eps / 10, bounds=None),
            "APGD": APGDAttack(threat, steps=60, bounds=None),
        }[name]

        report = evaluate(model, batches(x, y, 32), attack, **QUIET)
        assert report.n == 150
        assert report.verdicts["clean"] == "".join("1" if ok else "0" for ok in right.tolist())
        assert report.robust == robust.tolist()
        assert report.clean_accuracy == Proportion(int(right.sum()), 150)
        assert report.robust_accuracy == Proportion(int(robust.sum()), 150)
        assert 20 < report.robust_accuracy.count < report.clean_accuracy.count - 20


@st.composite
def verdicts_of_attacks(draw: st.DrawFn) -> dict[str, str]:
    """As an evaluation gives them, with and without early exit."""
    early_exit, n = draw(st.booleans()), draw(st.integers(1, 12))
    attacks = ["a", "b", "c"][: draw(st.integers(0, 3))]
    rows = []
    for _ in range(n):
        row = [draw(st.sampled_from("01"))]
        for _ in attacks:
            spared = row[0] == "0" or (early_exit and "0" in row)
            row.append("-" if spared else draw(st.sampled_from("01")))
        rows.append(row)
    return {name: "".join(row[i] for row in rows) for i, name in enumerate(["clean", *attacks])}


class TestArithmetic:
    @given(verdicts_of_attacks())
    def test_counts_are_those_of_the_verdicts(self, verdicts: dict[str, str]) -> None:
        n = len(verdicts["clean"])
        costs = {name: {"seconds": 0.5, "forward": 3 * n, "backward": 2 * n} for name in verdicts}
        report = RobustnessReport([f"{i:016x}" for i in range(n)], verdicts, costs)
        right = [verdict == "1" for verdict in verdicts["clean"]]
        assert report.n == n
        assert report.clean_accuracy == Proportion(sum(right), n)
        assert list(report.attacks) == [name for name in verdicts if name != "clean"]
        alive = right
        for name, found in report.attacks.items():
            attacked = [verdict != "-" for verdict in verdicts[name]]
            alive = [ok and verdict != "0" for ok, verdict in zip(alive, verdicts[name], strict=True)]
            assert found.attacked == sum(attacked)
            assert found.broken == sum(verdict == "0" for verdict in verdicts[name])
            assert found.after == Proportion(sum(alive), n)
            assert found.alone == (Proportion(verdicts[name].count("1"), n) if attacked == right else None)
            assert (found.seconds, found.forward, found.backward) == (0.5, 3 * n, 2 * n)
        assert report.robust == alive
        assert report.robust_accuracy == Proportion(sum(alive), n)
        assert report.seconds == 0.5 * len(verdicts)

    def test_robust_accuracy_is_not_that_of_the_worst_attack(self) -> None:
        costs = {name: {"seconds": 0.0, "forward": 0, "backward": 0} for name in ("clean", "a", "b")}
        report = RobustnessReport(["p", "q", "r"], {"clean": "111", "a": "011", "b": "101"}, costs)
        assert [report.attacks[name].alone for name in "ab"] == [Proportion(2, 3)] * 2
        assert report.robust_accuracy == Proportion(1, 3)


@pytest.fixture(scope="module")
def whole() -> RobustnessReport:
    """All samples in one batch, and all attacks on all of them."""
    model, x, y = labelled()
    return evaluate(model, [(x, y)], MIXED, early_exit=False, **QUIET)


class TestIndependence:
    """A verdict is a matter of model, attack, seed and sample alone."""

    def test_every_attack_has_something_to_say(self, whole: RobustnessReport) -> None:
        assert whole.clean_accuracy == Proportion(18, 23)
        for result in whole.attacks.values():
            assert result.alone is not None
            assert whole.robust_accuracy.count <= result.alone.count < 18
        assert whole.robust_accuracy.count > 0

    @pytest.mark.parametrize("size", [1, 7])
    def test_of_the_batch_size(self, whole: RobustnessReport, size: int) -> None:
        model, x, y = labelled()
        report = evaluate(model, batches(x, y, size), MIXED, early_exit=False, **QUIET)
        assert report.samples == whole.samples
        assert report.verdicts == whole.verdicts

    def test_of_the_order(self, whole: RobustnessReport) -> None:
        model, x, y = labelled()
        order = torch.randperm(23)
        report = evaluate(model, batches(x[order], y[order], 7), MIXED, early_exit=False, **QUIET)
        assert report.samples == [whole.samples[row] for row in order.tolist()]
        assert by_sample(report) == by_sample(whole)

    def test_of_early_exit(self, whole: RobustnessReport) -> None:
        model, x, y = labelled()
        report = evaluate(model, batches(x, y, 7), MIXED, **QUIET)
        assert report.robust_accuracy == whole.robust_accuracy
        assert report.robust == whole.robust
        spared = 0
        for name, verdicts in report.verdicts.items():
            for mine, others in zip(verdicts, whole.verdicts[name], strict=True):
                assert mine in ("-", others)
                spared += mine == "-" != others
        assert spared > 0
        assert report.attacks["apgd"].attacked == report.attacks["pgd"].after.count
        assert report.attacks["search"].alone is None

    def test_but_not_of_the_seed(self) -> None:
        model, x, y = labelled()
        start = PGDAttack(Linf(0.05), steps=1, step_size=0.0)  # its random start alone decides
        first, again, other = (
            evaluate(model, [(x, y)], start, seed=seed, **QUIET).verdicts[start.name] for seed in (0, 0, 1)
        )
        own = evaluate(model, [(x, y)], PGDAttack(Linf(0.05), steps=1, step_size=0.0, seed=1), **QUIET)
        assert first == again != other
        assert own.verdicts[start.name] == other

    def test_equal_images_with_other_labels_are_other_samples(self) -> None:
        model, x, _ = labelled(6)
        report = evaluate(model, [(x[[0, 0, 1]], torch.tensor([0, 1, 0]))], stay, **QUIET)
        assert len(set(report.samples)) == 3


class TestCost:
    @pytest.mark.parametrize("early_exit", [True, False])
    def test_passes_are_those_that_the_model_counts(self, early_exit: bool) -> None:
        model, x, y = labelled()
        spy = Spy(model)
        attacks = {**MIXED, "fgsm": FGSM(Linf(0.01)), "foreign": lambda model, x, y: x + 0 * model(x).sum().detach()}
        report = evaluate(spy, batches(x, y, 7), attacks, early_exit=early_exit, masking=5, progress=False)
        for key, count in spy.counts.items():
            assert sum(cost[key] for cost in report.costs.values()) == count
        assert report.costs["clean"]["forward"] == 23
        assert report.costs["clean"]["backward"] == 0
        assert report.attacks["fgsm"].backward == report.attacks["fgsm"].attacked
        assert report.attacks["search"].backward == 0
        assert report.attacks["foreign"].forward == 2 * report.attacks["foreign"].attacked
        assert report.costs["masking checks"]["backward"] > 100
        assert all(cost["seconds"] > 0 for cost in report.costs.values())

    def test_ten_steps_cost_ten_gradients_and_one_pass_to_score(self) -> None:
        model, x, y = labelled(15)
        report = evaluate(model, batches(x, y, 4), PGDAttack(Linf(1e-6), steps=10), **QUIET)
        assert report.robust_accuracy == report.clean_accuracy == Proportion(12, 15)
        assert report.costs["clean"] | {"seconds": 0} == {"seconds": 0, "forward": 15, "backward": 0}
        assert report.costs["PGD-10"] | {"seconds": 0} == {"seconds": 0, "forward": 11 * 12, "backward": 10 * 12}

    def test_fooled_samples_leave_at_once(self) -> None:
        model, x, y = labelled(15)
        always = PGDAttack(Linf(1.0), steps=10, random_start=False)
        report = evaluate(model, [(x, y)], {"first": always, "second": always}, **QUIET)
        assert report.robust_accuracy.count == 0
        assert report.attacks["first"].backward < 5 * 12
        assert report.costs["second"] | {"seconds": 0} == {"seconds": 0, "forward": 0, "backward": 0}
        assert report.verdicts["second"] == "-" * 15


def _flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _draws(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + 0 * torch.rand(1)


def _interrupted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.rand(3)
    model(x)
    raise KeyboardInterrupt


class TestNothingIsChanged:
    @pytest.mark.parametrize("name", ["batch_norm_train", "dropout_eval"])
    @pytest.mark.parametrize("attack", [MIXED["pgd"], _draws, _interrupted], ids=["pgd", "draws", "interrupted"])
    def test_of_the_model_and_the_random_numbers(self, name: str, attack: Any) -> None:
        model, x, y = labelled(name=name)
        model.train()
        model[0].eval()  # a mixture of modes, each of which must come back
        flags, state = _flags(model), copy.deepcopy(model.state_dict())
        random, before = torch.get_rng_state(), x.clone()
        try:
            evaluate(model, batches(x, y, 7), attack, masking=8, progress=False)
        except KeyboardInterrupt:
            assert attack is _interrupted
        assert _flags(model) == flags
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(x, before)

    @pytest.mark.parametrize("name", ["batch_norm_train", "dropout_eval"])
    def test_the_model_is_evaluated_in_evaluation_mode(self, name: str) -> None:
        model, x, y = labelled(name=name)
        expected = evaluate(copy.deepcopy(model).eval(), batches(x, y, 7), MIXED, **QUIET)
        assert evaluate(model.train(), batches(x, y, 7), MIXED, **QUIET).verdicts == expected.verdicts

    def test_an_attack_that_gives_back_the_mode_it_found_leaves_evaluation_mode(self) -> None:
        """As attacks of other libraries do: model.eval(), ..., model.train(what it was)."""
        model, x, y = labelled(name="batch_norm_train")
        seen: list[bool] = []
        model[1].register_forward_hook(lambda module, args, output: seen.append(module.training))

        def polite(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            training = model.training
            model.eval()
            x_adv = x + 0 * model(x).sum().detach()
            model.train(training)
            return x_adv

        evaluate(model.train(), batches(x, y, 7), polite, **QUIET)
        assert len(seen) == 3 * 4
        assert not any(seen)

    def test_grad_mode(self) -> None:
        model, x, y = labelled()
        expected = evaluate(model, batches(x, y, 7), MIXED, **QUIET)
        with torch.no_grad():
            assert evaluate(model, batches(x, y, 7), MIXED, **QUIET).verdicts == expected.verdicts
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            loader = [(x.clone(), y.clone()) for x, y in batches(x, y, 7)]
            assert evaluate(model, loader, MIXED, **QUIET).verdicts == expected.verdicts


class TestAttacks:
    def test_of_another_library(self) -> None:
        model, x, y = labelled()

        def sign(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
            leaf = x.clone().requires_grad_()
            F.cross_entropy(model(leaf), y).backward()
            return (x + 0.02 * leaf.grad.sign()).clamp(0, 1)

        report = evaluate(model, batches(x, y, 7), sign, **QUIET)
        ours = evaluate(model, batches(x, y, 7), FGSM(Linf(0.02)), **QUIET)
        assert report.verdicts["sign"] == ours.verdicts["FGSM"]
        assert 0 < report.robust_accuracy.count < report.clean_accuracy.count

    @pytest.mark.parametrize(
        "wrong", [lambda x: x[:-1], lambda x: x * float("nan"), lambda x: None, lambda x: x.flatten(1)]
    )
    def test_of_another_library_that_returns_no_images(self, wrong: Callable[[Tensor], Any]) -> None:
        model, x, y = labelled(7)
        with pytest.raises(RuntimeError, match=r"returned no finite tensor of the shape \(5, 2, 6, 6\)"):
            evaluate(model, [(x, y)], {"wrong": lambda model, x, y: wrong(x)}, **QUIET)

    @pytest.mark.parametrize("attack", [NFGSM(Linf(0.05)), Shift(Linf(0.05), 1.1, bounds=None)])
    def test_that_leave_their_ball_are_refused(self, attack: Attack) -> None:
        model, x, y = labelled()
        with pytest.raises(RuntimeError, match=r"left its threat model: it moved a sample \S+ times as far"):
            evaluate(model, [(x, y)], attack, **QUIET)

    def test_that_leave_the_pixel_range_are_refused(self) -> None:
        model, x, y = labelled()
        with pytest.raises(RuntimeError, match="left its"):
            evaluate(model, [(x, y)], Shift(Linf(0.2)), **QUIET)

    def test_that_return_no_number_are_refused(self) -> None:
        model, x, y = labelled()
        with pytest.raises(RuntimeError, match="left its threat model"):
            evaluate(model, [(x, y)], Shift(Linf(0.05), float("nan"), bounds=None), **QUIET)

    def test_on_the_edge_of_their_ball_are_not(self) -> None:
        model, x, y = labelled()
        report = evaluate(model.float(), [(x.float(), y)], Shift(Linf(0.05), bounds=None), **QUIET)
        assert report.attacks["shift by 1.0"].attacked == report.clean_accuracy.count

    def test_on_the_edge_of_the_pixel_range_are_not(self) -> None:
        """Where the rounding of a resized image lies, which is accepted as an input, too."""
        model, x, y = labelled()
        report = evaluate(model, [(_with(x, 1, 1 + 5e-7), y)], Nothing(Linf(0.05)), **QUIET)
        assert report.attacks["shift by 0.0"].attacked == report.clean_accuracy.count

    def test_bounds_of_every_channel_on_normalised_images(self) -> None:
        model, x, y = labelled()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in ([0.3, 0.6], [0.2, 0.4]))
        on_pixels = PGDAttack(Linf(0.05), steps=4, random_start=False)
        normalised = PGDAttack(Linf(0.05 / std), steps=4, random_start=False, bounds=(-mean / std, (1 - mean) / std))

        class Normalised(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                return model((z - mean) / std)

        expected = evaluate(Normalised(), batches(x, y, 7), on_pixels, **QUIET)
        found = evaluate(model, batches((x - mean) / std, y, 7), normalised, **QUIET)
        assert found.verdicts == expected.verdicts
        assert 0 < found.robust_accuracy.count < found.clean_accuracy.count

    def test_transferred(self) -> None:
        model, x, y = labelled()
        surrogate = make_model("mlp", seed=3).eval()
        attack = PGDAttack(Linf(0.2), steps=5, seed=0)
        report = evaluate(model, batches(x, y, 7), TransferAttack(attack, surrogate), **QUIET)
        twin = evaluate(surrogate, batches(x, y, 7), {"stay": stay}, **QUIET)
        assert report.samples == twin.samples
        name = "PGD-5, transferred"
        assert report.attacks[name].backward == 0  # of the model; the surrogate's are not counted
        assert report.attacks[name].forward == report.attacks[name].attacked
        assert report.attacks[name].broken > 0

    def test_targeted_apgd_chooses_its_targets(self) -> None:
        model, x, y = labelled()
        report = evaluate(model, batches(x, y, 7), TargetedAPGDAttack(Linf(0.03), targets=3, steps=5), **QUIET)
        assert 0 < report.robust_accuracy.count < report.clean_accuracy.count

    def test_autoattack_is_labelled_with_its_package_and_version(self) -> None:
        model, x, y = labelled(6)
        attack = AutoAttack(Linf(0.05), attacks=("apgd-ce",))
        random = torch.get_rng_state()
        report = evaluate(model.float(), [(x.float(), y)], attack, **QUIET)
        (name,) = report.attacks
        assert name == f"AutoAttack custom (apgd-ce) (pyautoattack {importlib.metadata.version('pyautoattack')})"
        assert name in str(report)
        assert name in report.about[f"attack {name!r}"]
        assert report.attacks[name].attacked == report.clean_accuracy.count == 4
        assert report.attacks[name].backward >= 100
        assert torch.equal(torch.get_rng_state(), random)
        renamed = evaluate(model, [(x.float(), y)], {"AA": attack}, **QUIET)
        assert "pyautoattack" in renamed.about["attack 'AA'"]
        assert renamed.verdicts["AA"] == report.verdicts[name]


class TestNames:
    def test_are_those_of_the_attacks(self) -> None:
        model, x, y = labelled(4)
        attacks = [PGDAttack(Linf(0.01), steps=2), PGDAttack(Linf(0.01), steps=2, criterion=margin), FGSM(Linf(0.01))]
        assert list(evaluate(model, [(x, y)], attacks, **QUIET).attacks) == ["PGD-2", "PGD-2 margin", "FGSM"]
        assert list(evaluate(model, [(x, y)], stay, **QUIET).attacks) == ["stay"]
        assert list(evaluate(model, [(x, y)], {"b": stay, "a": stay}, **QUIET).attacks) == ["b", "a"]

    def test_without_an_attack_the_accuracy_is_the_clean_one(self) -> None:
        model, x, y = labelled(10)
        report = evaluate(model, [(x, y)], [], **QUIET)
        assert report.robust_accuracy == report.clean_accuracy == Proportion(8, 10)

    @pytest.mark.parametrize(
        ("attacks", "error", "match"),
        [
            ([PGDAttack(Linf(0.1)), PGDAttack(Linf(0.2))], ValueError, "Two attacks are called 'PGD-10'"),
            ({"clean": PGDAttack(Linf(0.1))}, ValueError, "'clean' is a name of the report's own"),
            (PGDAttack(Linf(0.1), targeted=True), ValueError, "Use TargetedAPGDAttack"),
            ({"pgd": "PGD"}, TypeError, "cannot be called"),
            ([Linf(0.1)], TypeError, r"APGDAttack\(Linf\(eps=0.1\)\)"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_that_mislead(self, attacks: Any, error: type[Exception], match: str) -> None:
        model, x, y = labelled(4)
        with pytest.raises(error, match=match):
            evaluate(model, [(x, y)], attacks, **QUIET)


class TestLoaders:
    def test_soft_labels_count_by_their_largest_entry(self) -> None:
        model, x, y = labelled()
        soft = soft_labels(y)
        assert torch.equal(soft.argmax(1), y)
        report = evaluate(model, batches(x, soft, 7), MIXED["pgd"], **QUIET)
        hard = evaluate(model, batches(x, y, 7), stay, **QUIET)
        assert report.verdicts["clean"] == hard.verdicts["clean"]
        assert 0 < report.robust_accuracy.count < report.clean_accuracy.count

    def test_of_every_kind(self) -> None:
        model, x, y = labelled()
        expected = evaluate(model, batches(x, y, 7), MIXED["pgd"], **QUIET)
        loaders = {
            "generator": (batch for batch in batches(x, y, 7)),
            "lists": [[x, y] for x, y in batches(x, y, 7)],
            "more than a pair": [(x, y, torch.arange(len(x))) for x, y in batches(x, y, 7)],
            "DataLoader": DataLoader(TensorDataset(x, y), batch_size=7),
        }
        for loader in loaders.values():
            report = evaluate(model, loader, MIXED["pgd"], **QUIET)
            assert (report.samples, report.verdicts) == (expected.samples, expected.verdicts)

    def test_a_ragged_last_batch_counts_samples_and_not_batches(self) -> None:
        model, x, y = labelled(21)
        report = evaluate(model, batches(x, y, 20), stay, **QUIET)
        assert report.clean_accuracy == Proportion(16, 21)  # the mean of the batches' accuracies would be 0.4

    def test_no_more_than_three_batches_are_held_at_a_time(self) -> None:
        model, x, y = labelled()
        images: list[weakref.ref[Tensor]] = []
        alive: list[int] = []

        def streaming() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(12):
                batch = x.clone()
                images.append(weakref.ref(batch))
                yield batch, y
                del batch
                alive.append(sum(image() is not None for image in images))

        evaluate(model, streaming(), FGSM(Linf(0.01)), masking=4, progress=False)
        assert len(alive) == 12
        assert max(alive) <= 3  # the first one, the last one and the next one


@pytest.fixture(scope="module")
def report() -> RobustnessReport:
    model, x, y = labelled()
    return evaluate(model, batches(x, y, 7), MIXED, masking=8, progress=False)


class TestReport:
    def test_is_read_as_it_was_saved(self, report: RobustnessReport, tmp_path: Path) -> None:
        report.save(tmp_path / "report.json")
        assert RobustnessReport.load(tmp_path / "report.json") == report
        assert report.flags
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["n"] == 23
        assert content["robust_accuracy"]["correct"] == report.robust_accuracy.count
        assert content["robust_accuracy"]["interval"] == list(report.robust_accuracy.interval)
        assert content["clean_accuracy"]["accuracy"] == 18 / 23
        for name, result in report.attacks.items():
            assert content["attacks"][name]["attacked"] == result.attacked
            assert content["attacks"][name]["broken"] == result.broken
            assert content["attacks"][name]["after"]["correct"] == result.after.count
        assert content["attacks"]["pgd"]["alone"]["correct"] == report.attacks["pgd"].after.count
        assert content["attacks"]["search"]["alone"] is None

    def test_a_report_cut_in_half_is_refused(self, report: RobustnessReport, tmp_path: Path) -> None:
        report.save(tmp_path / "report.json")
        half = (tmp_path / "report.json").read_bytes()[: len(str(report))]
        (tmp_path / "report.json").write_bytes(half)
        with pytest.raises(StateError, match="damaged"):
            RobustnessReport.load(tmp_path / "report.json")
        assert (tmp_path / "report.json").read_bytes() == half

    def test_table_holds_the_numbers(self, report: RobustnessReport) -> None:
        head, _, *rows = str(report).splitlines()[:8]
        assert "n = 23" in head
        cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
        assert list(cells) == ["clean", *MIXED, "masking checks", "**worst case**"]
        assert cells["clean"][:6] == ["78.3", "58.1-90.3", "", "23", "5", "1.0 + 0.0"]
        for name, result in report.attacks.items():
            accuracy, interval, alone, attacked, broken, passes, _ = cells[name]
            low, high = result.after.interval
            assert alone == ("" if result.alone is None else accuracy)
            assert accuracy == f"{100 * result.after.count / 23:.1f}"
            assert interval == f"{100 * low:.1f}-{100 * high:.1f}"
            assert (attacked, broken) == (str(result.attacked), str(result.broken))
            assert passes == f"{result.forward / 23:.1f} + {result.backward / 23:.1f}"
        assert cells["**worst case**"][0] == cells["search"][0]
        assert cells["masking checks"][:5] == [""] * 5
        forward = sum(cost["forward"] for cost in report.costs.values())
        assert cells["**worst case**"][5].startswith(f"{forward / 23:.1f} + ")

    def test_table_names_the_flags_that_were_raised_alone(self) -> None:
        costs = {"clean": {"seconds": 0.0, "forward": 1, "backward": 0}}
        flags = [Flag("masked", True, "7 of 9"), Flag("random outputs", False, "0 of 9")]
        report = RobustnessReport(["a"], {"clean": "1"}, costs, flags)
        assert report.raised == flags[:1]
        assert "RAISED: masked: 7 of 9" in str(report)
        assert "random outputs" not in str(report)


class TestCompare:
    def test_pairs_by_sample_whatever_the_order(self) -> None:
        x, y = make_batch(40)
        models = [make_model("conv", seed=seed) for seed in (0, 1)]
        order = torch.randperm(40)
        first = evaluate(models[0], batches(x, y, 7), MIXED["pgd"], **QUIET)
        second = evaluate(models[1], batches(x[order], y[order], 9), MIXED["pgd"], **QUIET)
        same_order = evaluate(models[1], batches(x, y, 7), MIXED["pgd"], **QUIET)

        comparison = first.compare(second)
        pairs = list(zip(first.robust, same_order.robust, strict=True))
        cells = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        assert [comparison.both, comparison.first, comparison.second, comparison.neither] == cells
        assert comparison.first > 0
        assert comparison.second > 0
        assert comparison.difference == pytest.approx(first.robust_accuracy.value - second.robust_accuracy.value)
        assert second.compare(first).first == comparison.second

    def test_of_verdicts_in_another_order(self) -> None:
        costs = {"clean": {"seconds": 0.0, "forward": 1, "backward": 0}}
        first = RobustnessReport(list("abcdef"), {"clean": "111000"}, costs)
        second = RobustnessReport(list("fedcba"), {"clean": "000011"}, costs)  # a and b
        comparison = first.compare(second)
        assert (comparison.both, comparison.first, comparison.second, comparison.neither) == (2, 1, 0, 3)

    def test_samples_that_stand_twice_count_twice(self) -> None:
        model, x, y = labelled(5)
        report = evaluate(model, [(x[[0, 1, 1]], y[[0, 1, 1]])], stay, **QUIET)
        comparison = report.compare(report)
        assert (comparison.both, comparison.neither) == (2, 1)

    def test_other_data_are_refused(self) -> None:
        model, x, y = labelled(8)
        report = evaluate(model, [(x, y)], stay, **QUIET)
        for rows, common in ((slice(0, 6), 6), (slice(2, 8), 6)):
            other = evaluate(model, [(x[rows], y[rows])], stay, **QUIET)
            with pytest.raises(ValueError, match=f"different samples: 8 and 6, of which {common} are common"):
                report.compare(other)
        other = evaluate(model, [(x, (y + 1) % CLASSES)], stay, **QUIET)
        with pytest.raises(ValueError, match="8 and 8, of which 0 are common"):
            report.compare(other)


class TestProgress:
    def test_bar_shows_the_batches_and_the_accuracy_so_far(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, x, y = labelled()
        report = evaluate(model, batches(x, y, 7), MIXED["pgd"], masking=0, progress=True)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "robust accuracy" in shown.err
        assert "4/4" in shown.err
        assert f"{100 * report.robust_accuracy.value:.1f} % of 23" in shown.err

    def test_bar_counts_the_batches_of_an_earlier_session_once(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        model, x, y = labelled()
        for number in (2, 4):
            loader = batches(x, y, 7)[:number]
            evaluate(model, loader, MIXED["pgd"], masking=0, progress=True, state=tmp_path / "state.json")
            shown = capsys.readouterr().err
            assert f"{number}/{number}" in shown
            assert f"{number + 1}/{number}" not in shown

    def test_a_loader_without_a_length(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, x, y = labelled()
        evaluate(model, iter(batches(x, y, 7)), MIXED["pgd"], masking=0, progress=True)
        assert "4batch" in capsys.readouterr().err

    def test_silence(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, x, y = labelled()
        evaluate(model, batches(x, y, 7), MIXED["pgd"], masking=8, progress=False)
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", "")


def _flag(report: RobustnessReport, name: str) -> list[Flag]:
    return [flag for flag in report.flags if flag.name == name]


class TestFlags:
    """Signs of masking in the verdicts themselves, and what attacks warn of."""

    BLACK_BOX = "black box beats white box"

    @pytest.mark.parametrize("early_exit", [True, False])
    def test_a_search_without_gradients_that_fools_what_gradients_did_not(self, early_exit: bool) -> None:
        model, x, y = labelled()
        attacks = {"useless": Nothing(Linf(0.2)), "search": RandomSearch(Linf(0.2), queries=12)}
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=early_exit, **QUIET)
        (flag,) = _flag(report, self.BLACK_BOX)
        broken = report.attacks["search"].broken
        assert flag.raised
        assert broken > 0
        assert f"search, which uses no gradients, fooled {broken} of 23 samples" in flag.evidence
        assert str(flag) in str(report)

    @pytest.mark.parametrize("early_exit", [True, False])
    def test_two_searches_do_not_hide_each_other(self, early_exit: bool) -> None:
        model, x, y = labelled()
        searches = {f"search {seed}": RandomSearch(Linf(0.2), queries=12, seed=seed) for seed in (0, 1)}
        attacks = {"useless": Nothing(Linf(0.2)), **searches}
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=early_exit, **QUIET)
        first, second = _flag(report, self.BLACK_BOX)
        assert first.raised
        assert f"fooled {report.attacks['search 0'].broken} of 23" in first.evidence
        assert second.raised or early_exit

    @pytest.mark.parametrize("early_exit", [True, False])
    def test_a_search_that_adds_nothing_raises_none(self, early_exit: bool) -> None:
        model, x, y = labelled()
        attacks = {"pgd": PGDAttack(Linf(0.2)), "search": RandomSearch(Linf(0.2), queries=3)}
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=early_exit, **QUIET)
        (flag,) = _flag(report, self.BLACK_BOX)
        assert not flag.raised
        assert not report.raised

    def test_a_search_alone_beats_nobody(self) -> None:
        model, x, y = labelled()
        assert not evaluate(model, batches(x, y, 7), RandomSearch(Linf(0.2), queries=3), **QUIET).flags

    @pytest.mark.parametrize("early_exit", [True, False])
    def test_a_search_that_comes_first_beats_nobody(self, early_exit: bool) -> None:
        """Whom it fools, the attack after it may be spared, and had no chance."""
        model, x, y = labelled()
        attacks = {"search": RandomSearch(Linf(0.2), queries=12), "pgd": PGDAttack(Linf(0.2))}
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=early_exit, **QUIET)
        assert report.attacks["search"].broken > 5
        assert not report.raised

    @pytest.mark.parametrize("steps", [1, 20])
    def test_one_step_that_fools_more_than_many(self, steps: int) -> None:
        """Of steps of which one is too short to arrive, and twenty are not."""
        model, x, y = labelled()
        attacks = [FGSM(Linf(0.03)), PGDAttack(Linf(0.03), steps=steps, step_size=0.003, random_start=False)]
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=False, **QUIET)
        (flag,) = _flag(report, "one step beats iterative")
        assert flag.raised == (steps == 1)
        for result in report.attacks.values():
            assert str(result.alone) in flag.evidence
        assert not _flag(evaluate(model, batches(x, y, 7), attacks, **QUIET), flag.name)  # nothing to compare

    def test_warnings_of_an_attack_are_flags_and_still_warnings(self) -> None:
        model, x, y = labelled()

        class Rounding(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                return model((z * 255).round() / 255)

        with pytest.warns(GradregWarning, match="straight-through") as caught:
            report = evaluate(Rounding(), batches(x, y, 7), MIXED["pgd"], **QUIET)
        assert {warning.filename for warning in caught} == {__file__}
        (flag,) = _flag(report, "warning of PGD-4")
        assert flag.raised
        assert "straight-through" in flag.evidence

    def test_other_warnings_pass_and_are_no_flags(self) -> None:
        model, x, y = labelled(7)

        def warns(model: object, x: Tensor, y: Tensor) -> Tensor:
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            return x

        with pytest.warns(DeprecationWarning, match="old"):
            report = evaluate(model, [(x, y)], warns, **QUIET)
        assert not report.flags


CONFIGURATIONS = '''
"""Configurations that differ from each other in one thing each."""

import functools

import numpy
import torch
from torch import nn

from gradreg import APGDAttack, L2, Linf, PGDAttack, RandomSearch, TransferAttack, cross_entropy, margin
from gradreg.streaming.identity import describe, describe_model


def bound(scale):
    return lambda logits, y: scale * margin(logits, y)


def with_default(logits, y, scale=1):
    return scale * margin(logits, y)


def with_other_default(logits, y, scale=2):
    return scale * margin(logits, y)


with_other_default.__qualname__ = "with_default"


def with_keyword(scale):
    def criterion(logits, y, *, scale=scale):
        return scale * margin(logits, y)

    return criterion


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, logits, y):
        return self.scale * margin(logits, y)

    def loss(self, logits, y):
        return self.scale * margin(logits, y)


class Functional(nn.Module):
    """Of the same weights, and the same modules, whatever it computes of them."""

    def __init__(self, act):
        super().__init__()
        self.layer, self.act = nn.Linear(3, 3), act

    def forward(self, x):
        return self.act(self.layer(x))


def seeded(make):
    torch.manual_seed(0)
    return make()


def net(act):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 3), act))


a, b = (lambda logits, y: margin(logits, y)), (lambda logits, y: -margin(logits, y))
eps = torch.tensor([0.1, 0.2]).view(2, 1, 1)
criteria = [
    cross_entropy, margin, a, b, bound(1), bound(2), with_default, with_other_default, with_keyword(1), with_keyword(2),
    (lambda logits, y: (lambda z: 2 * z)(margin(logits, y))), (lambda logits, y: (lambda z: 3 * z)(margin(logits, y))),
    (lambda logits, y: 2 * margin(logits, y)), (lambda logits, y: 3 * margin(logits, y)),
    (lambda logits, y: margin(logits, y).abs()), (lambda logits, y: margin(logits, y).exp()),
    (lambda logits, y: margin(logits, y) if y.device.type in {"cpu", "cuda", "mps", "xla"} else y),
    functools.partial(with_default, scale=3), functools.partial(with_default, scale=4),
    Scaled(1), Scaled(2), Scaled(1).loss, Scaled(2).loss,
    {"a": 1}, {"a": 2}, numpy.zeros(5000), numpy.eye(1, 5000, 2500)[0],
    {"left", "right", "up", "down"}, frozenset({"left", "right", "up"}),
]
attacks = [PGDAttack(Linf(0.1), criterion=criterion) for criterion in criteria] + [
    PGDAttack(Linf(0.2)), PGDAttack(L2(0.1)), PGDAttack(Linf(0.1), steps=5), PGDAttack(Linf(0.1), seed=0),
    PGDAttack(Linf(0.1), step_size=0.01), PGDAttack(Linf(0.1), bounds=None), PGDAttack(Linf(0.1), bounds=(-1.0, 1.0)),
    PGDAttack(Linf(eps)), PGDAttack(Linf(2 * eps)), PGDAttack(Linf(eps.double())), PGDAttack(Linf(eps.view(2, 1))),
    APGDAttack(Linf(0.1), steps=10), RandomSearch(Linf(0.1)),
    TransferAttack(PGDAttack(Linf(0.1)), net(nn.GELU())), TransferAttack(PGDAttack(Linf(0.1)), net(nn.ReLU())),
]
models = [
    net(nn.Tanh()), net(nn.Sigmoid()), net(nn.Conv1d(3, 3, 1)), net(nn.Conv1d(3, 3, 1, padding=1)),
    net(nn.GELU()), net(nn.ReLU()), net(nn.ReLU()).double(), net(nn.Sequential(nn.ReLU())), net(nn.LeakyReLU(0.1)),
    net(nn.LeakyReLU(0.2)), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), net(nn.BatchNorm1d(3)),
    seeded(lambda: Functional(nn.functional.gelu)), seeded(lambda: Functional(nn.functional.relu)),
    seeded(lambda: Functional(2)), seeded(lambda: Functional(3)),
]
texts = [describe(attack) for attack in attacks] + [str(describe_model(model)) for model in models]
'''


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What two processes, whose hashes of texts differ, call the configurations."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "configurations.py").write_text(CONFIGURATIONS)
    program = "import json, configurations; print(json.dumps(configurations.texts))"
    environment = os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    found = []
    for hashes in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | {"PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    return found


class TestIdentity:
    def test_equal_configurations_have_one_text_in_every_process(self, texts: list[list[str]]) -> None:
        different = [(a, b) for a, b in zip(*texts, strict=True) if a != b]
        assert not different

    def test_configurations_that_differ_have_different_texts(self, texts: list[list[str]]) -> None:
        assert len(texts[0]) > 50
        same = [text for text in texts[0] if texts[0].count(text) > 1]
        assert not same

    def test_texts_hold_no_address(self, texts: list[list[str]]) -> None:
        assert not [text for text in texts[0] if "0x" in text]

    def test_weights_and_structure_are_told_apart(self) -> None:
        model, same, trained, swapped = (make_model("conv") for _ in range(4))
        with torch.no_grad():
            trained[-1].bias[0] += 1e-12
        swapped[1] = nn.ReLU()
        found, again, other_weights, other_structure = (
            describe_model(net) for net in (model, same.train(), trained, swapped)
        )
        structure, weights = "the model's structure", "the model's weights"
        assert found == again
        assert (found[structure], found[weights]) != (other_weights[structure], other_weights[weights])
        assert found[structure] == other_weights[structure]
        assert found[weights] == other_structure[weights]
        assert found[structure] != other_structure[structure]

    def test_a_compiled_model_is_the_same_before_and_after_it_was_compiled(self) -> None:
        model, x, _ = labelled(3)
        compiled = torch.compile(model, backend="eager")
        before = describe_model(compiled)
        compiled(x)
        assert describe_model(compiled) == before == describe_model(torch.compile(model, backend="eager"))
        with torch.no_grad():
            model[0].bias[0] += 1e-9
        assert describe_model(compiled) != before

    def test_an_object_that_refers_to_itself(self) -> None:
        class Cyclic:
            def __init__(self, seed: int) -> None:
                self.me, self.seed = self, seed

            def __call__(self, model: object, x: Tensor, y: Tensor) -> Tensor:
                return x

        assert describe(Cyclic(0)) == describe(Cyclic(0)) != describe(Cyclic(1))

    def test_a_function_that_calls_itself(self) -> None:
        def attack(model: object, x: Tensor, y: Tensor, left: int = 2) -> Tensor:
            return attack(model, x, y, left - 1) if left else x

        model, x, y = labelled(7)
        assert evaluate(model, [(x, y)], attack, **QUIET).robust_accuracy.count == 5


class Interruption:
    """Counts the batches that PGD is run on, and interrupts it at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        self.at = -1
        run = PGDAttack.__call__

        def watched(attack: PGDAttack, *args: Any, **options: Any) -> Tensor:
            self.batches += 1
            if self.batches == self.at:
                raise KeyboardInterrupt
            return run(attack, *args, **options)

        monkeypatch.setattr(PGDAttack, "__call__", watched)


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    return Interruption(monkeypatch)


class TestResume:
    ATTACK = MIXED["pgd"]

    def _interrupted(self, interruption: Interruption, state: Path, at: int = 3) -> bytes:
        """The state after an evaluation that was interrupted in one of its four batches."""
        model, x, y = labelled()
        interruption.at, interruption.batches = at, 0
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, batches(x, y, 7), self.ATTACK, state=state, **QUIET)
        interruption.at, interruption.batches = -1, 0
        return state.read_bytes()

    @pytest.mark.parametrize("at", [2, 3, 4])
    def test_ends_as_if_it_had_not_been_interrupted(self, interruption: Interruption, tmp_path: Path, at: int) -> None:
        model, x, y = labelled()
        expected = evaluate(model, batches(x, y, 7), self.ATTACK, **QUIET)
        state = tmp_path / "new" / "state.json"
        self._interrupted(interruption, state, at)
        resumed = evaluate(model, batches(x, y, 7), self.ATTACK, state=state, **QUIET)
        assert interruption.batches == 4 - (at - 1)
        assert (resumed.samples, resumed.verdicts) == (expected.samples, expected.verdicts)
        for name, cost in resumed.costs.items():
            assert cost | {"seconds": 0} == expected.costs[name] | {"seconds": 0}
        again = evaluate(model.train(), iter(batches(x, y, 7)), self.ATTACK, state=state, **QUIET)
        assert interruption.batches == 4 - (at - 1)
        assert again == resumed

    def test_flags_of_the_first_session_are_kept(self, interruption: Interruption, tmp_path: Path) -> None:
        model, x, y = labelled()
        state = tmp_path / "state.json"
        interruption.at = 5  # in the third batch: the checks attack the first one twice
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, batches(x, y, 7), self.ATTACK, masking=5, state=state, progress=False)
        interruption.at = -1
        resumed = evaluate(model, batches(x, y, 7), self.ATTACK, masking=5, state=state, progress=False)
        assert resumed.flags == evaluate(model, batches(x, y, 7), self.ATTACK, masking=5, progress=False).flags
        assert len(resumed.flags) == 7

    def test_a_full_disk_loses_one_batch(
        self, interruption: Interruption, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x, y = labelled()
        replace, writes = os.replace, []

        def full(*paths: Any) -> None:
            writes.append(paths)
            if len(writes) == 3:
                raise OSError("No space left on device")
            replace(*paths)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            evaluate(model, batches(x, y, 7), self.ATTACK, state=tmp_path / "state.json", **QUIET)
        interruption.batches = 0
        resumed = evaluate(model, batches(x, y, 7), self.ATTACK, state=tmp_path / "state.json", **QUIET)
        assert interruption.batches == 2
        assert resumed.verdicts == evaluate(model, batches(x, y, 7), self.ATTACK, **QUIET).verdicts

    def test_a_bad_batch_loses_nothing_before_it(self, interruption: Interruption, tmp_path: Path) -> None:
        model, x, y = labelled()
        bad = y.clone()
        bad[16] = CLASSES
        with pytest.raises(ValueError, match="Labels run from 0 to 4"):
            evaluate(model, batches(x, bad, 7), self.ATTACK, state=tmp_path / "state.json", **QUIET)
        interruption.batches = 0
        evaluate(model, batches(x, y, 7), self.ATTACK, state=tmp_path / "state.json", **QUIET)
        assert interruption.batches == 2

    def test_reads_what_several_processes_wrote(self, interruption: Interruption, tmp_path: Path) -> None:
        """Whatever characters their file's name holds."""
        model, x, y = labelled()
        state = tmp_path / "run[1] *.json"
        self._interrupted(interruption, state)
        content = json.loads(state.read_text())
        state.unlink()
        for rank, number in enumerate(content["batches"]):
            part = content | {"batches": {number: content["batches"][number]}}
            (tmp_path / f"run[1] *.rank{rank}.json").write_text(json.dumps(part))
        evaluate(model, batches(x, y, 7), self.ATTACK, state=state, **QUIET)
        assert interruption.batches == 2

    def _refused(self, interruption: Interruption, state: Path, match: str, call: Callable[[], Any]) -> str:
        before = self._interrupted(interruption, state)
        with pytest.raises(StateError, match=match) as caught:
            call()
        assert state.read_bytes() == before
        assert os.listdir(state.parent) == [state.name]
        assert interruption.batches == 0
        return str(caught.value)

    @pytest.mark.parametrize(
        ("name", "differs", "same"),
        [
            ("weights", "the model's weights", "the model's structure"),
            ("structure", "the model's structure", "the model's weights"),
            ("attack", "attack 'PGD-4'", "the model"),
            ("more attacks", "attack 'FGSM': recorded None", "attack 'PGD-4'"),
            ("seed", "seed=0.* now .*seed=1", "the model"),
            ("early exit", "early_exit=True.* now .*early_exit=False", "the model"),
            ("masking", "masking=0.* now .*masking=3", "the model"),
        ],
    )
    def test_another_model_or_attack_is_refused_by_name(
        self, interruption: Interruption, tmp_path: Path, name: str, differs: str, same: str
    ) -> None:
        model, x, y = labelled()
        attack: Any = self.ATTACK
        options = dict(QUIET)
        if name == "weights":
            with torch.no_grad():
                model[0].bias[0] += 1e-9
        elif name == "structure":
            model[1] = nn.ReLU()
        elif name == "attack":
            attack = PGDAttack(Linf(0.02), steps=4, step_size=0.01)
        elif name == "more attacks":
            attack = [self.ATTACK, FGSM(Linf(0.01))]
        else:
            options |= {"seed": {"seed": 1}, "early exit": {"early_exit": False}, "masking": {"masking": 3}}[name]
        state = tmp_path / "state.json"
        message = self._refused(
            interruption, state, differs, lambda: evaluate(model, batches(x, y, 7), attack, state=state, **options)
        )
        assert same not in message
        assert "Name another file" in message

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("batch size", "from another order or batch size: batch 0 is not the one recorded"),
            ("order", "from another order or batch size: batch 0 is not the one recorded"),
            ("later order", "batch 1 is not the one recorded"),
            ("labels", "batch 1 is not the one recorded"),
            ("type", "batch 0 is not the one recorded"),
            ("shorter", "it holds batch 1, and the loader ends after 1"),
        ],
    )
    def test_other_data_are_refused(self, interruption: Interruption, tmp_path: Path, name: str, match: str) -> None:
        model, x, y = labelled()
        order = torch.arange(23)
        if name == "order":
            order = order.flip(0)
        elif name == "later order":
            order[[8, 9]] = order[[9, 8]]
        elif name == "labels":
            y[10] = (y[10] + 1) % CLASSES
        loader = batches(x[order], y[order], 6 if name == "batch size" else 7)
        if name == "type":
            loader = [(x.float(), y) for x, y in loader]
        elif name == "shorter":
            loader = loader[:1]
        state = tmp_path / "state.json"
        self._refused(interruption, state, match, lambda: evaluate(model, loader, self.ATTACK, state=state, **QUIET))

    def test_a_file_cut_in_half_is_refused(self, interruption: Interruption, tmp_path: Path) -> None:
        model, x, y = labelled()
        state = tmp_path / "state.json"
        half = self._interrupted(interruption, state)[:500]
        state.write_bytes(half)
        with pytest.raises(StateError, match=r"state\.json is damaged"):
            evaluate(model, batches(x, y, 7), self.ATTACK, state=state, **QUIET)
        assert state.read_bytes() == half
        assert interruption.batches == 0

    def test_another_file_is_not_written_over(self, tmp_path: Path) -> None:
        model, x, y = labelled(7)
        (tmp_path / "report.json").write_text('{"kind": "mine"}')
        with pytest.raises(StateError, match=r"report\.json is no file of gradreg evaluation"):
            evaluate(model, [(x, y)], stay, state=tmp_path / "report.json", **QUIET)
        assert (tmp_path / "report.json").read_text() == '{"kind": "mine"}'

    def test_a_function_has_no_weights_to_be_told_by(self, tmp_path: Path) -> None:
        model, x, y = labelled(7)
        with pytest.raises(TypeError, match="tells models apart by their weights, and function shows none"):
            evaluate(lambda z: model(z), [(x, y)], stay, state=tmp_path / "state.json", **QUIET)
        assert not list(tmp_path.iterdir())
        assert evaluate(lambda z: model(z), [(x, y)], stay, **QUIET).clean_accuracy == Proportion(5, 7)


def _with(x: Tensor, row: int, value: float) -> Tensor:
    x = x.clone()
    x[row, 0, 0, 0] = value
    return x


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def _fails(
        self, error: type[Exception], match: str, loader: Any, model: Any = None, attack: Any = MIXED["pgd"]
    ) -> None:
        with pytest.raises(error, match=match):
            evaluate(labelled()[0] if model is None else model, loader, attack, **QUIET)

    @pytest.mark.parametrize("loader", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 2)))])
    def test_a_loader_without_a_batch(self, loader: Any) -> None:
        self._fails(ValueError, "The loader has no batch: there is nothing to evaluate", loader)

    def test_a_batch_without_a_sample(self) -> None:
        _, x, y = labelled()
        self._fails(ValueError, "expected a batch of at least one sample", [(x, y), (x[:0], y[:0])])

    def test_tensors_in_the_place_of_a_loader(self) -> None:
        _, x, y = labelled()
        for loader in (x, (x, y)):
            self._fails(TypeError, r"give a list of it, \[\(x, y\)\]", loader)

    def test_batches_that_are_no_pairs(self) -> None:
        _, x, y = labelled()
        for batch in ({"image": x, "label": y}, (x,), x, (x, y.tolist())):
            self._fails(ValueError, r"expected batches \(x, y\) of two tensors", [batch])

    def test_a_data_set_in_the_place_of_a_loader(self) -> None:
        _, x, y = labelled()
        self._fails(ValueError, r"single samples.*DataLoader\(dataset", TensorDataset(x, y))

    def test_images_and_labels_of_different_number(self) -> None:
        _, x, y = labelled()
        self._fails(ValueError, "Batch 1 has 23 inputs and 22 labels", [(x, y), (x, y[1:])])

    @pytest.mark.parametrize("row", [0, 1], ids=["misclassified", "right"])
    @pytest.mark.parametrize("label", [-1, -100, CLASSES])
    def test_labels_out_of_range(self, row: int, label: int) -> None:
        _, x, y = labelled()
        y[row] = label
        self._fails(ValueError, f"Labels run from .*{label}.*the model has 4 classes", [(x, y)])

    def test_labels_of_another_form(self) -> None:
        _, x, y = labelled()
        self._fails(ValueError, r"use y.squeeze\(1\)", [(x, y[:, None])])
        self._fails(TypeError, r"use y.long\(\)", [(x, y.int())])

    @pytest.mark.parametrize("attack", [MIXED["pgd"], MIXED["apgd"], MIXED["search"], FGSM(Linf(0.1))])
    @pytest.mark.parametrize("row", [0, 1], ids=["misclassified", "right"])
    def test_pixels_out_of_bounds(self, row: int, attack: Attack) -> None:
        """Also of samples that nobody attacks: another unit of the data makes most of them misclassified."""
        _, x, y = labelled()
        self._fails(ValueError, "outside the bounds", [(_with(x, row, 1.5), y)], attack=attack)

    @pytest.mark.parametrize("attack", [MIXED["pgd"], MIXED["apgd"], MIXED["search"], FGSM(Linf(0.1)), stay])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("row", [0, 1], ids=["misclassified", "right"])
    def test_inputs_that_are_not_finite(self, row: int, value: float, attack: Any) -> None:
        _, x, y = labelled()
        self._fails(ValueError, "values that are NaN or infinite", [(_with(x, row, value), y)], attack=attack)

    def test_images_of_bytes(self) -> None:
        _, x, y = labelled()
        self._fails(TypeError, r"x.float\(\) / 255", [((255 * x).byte(), y)])

    def test_clamping_accepts_what_augmentation_makes(self) -> None:
        model, x, y = labelled()
        attack = PGDAttack(Linf(0.02), steps=4, out_of_bounds="clamp")
        report = evaluate(model, [(_with(x, 1, 1.5), y)], attack, **QUIET)
        assert report.attacks["PGD-4"].attacked == report.clean_accuracy.count

    def test_a_model_that_returns_no_tensor(self) -> None:
        model, x, y = labelled()
        self._fails(TypeError, "The model returned tuple; expected one tensor", [(x, y)], lambda z: (model(z), z))
        self._fails(TypeError, "The model returned dict; expected one tensor", [(x, y)], lambda z: {"out": model(z)})

    @pytest.mark.parametrize(
        ("logits", "shape"), [(lambda z: z[:, 0], "23, 6, 6"), (lambda z: z.flatten(1).sum(1), "23,")]
    )
    def test_a_model_that_returns_no_logits(self, logits: Callable[[Tensor], Tensor], shape: str) -> None:
        _, x, y = labelled()
        self._fails(ValueError, rf"returned shape \({shape}\) for 23 inputs; .* shape \(B, K\)", [(x, y)], logits)

    @pytest.mark.parametrize("row", [0, 1], ids=["misclassified", "right"])
    def test_a_model_that_returns_nan(self, row: int) -> None:
        model, x, y = labelled()

        def broken(z: Tensor) -> Tensor:
            return torch.where(torch.arange(len(z))[:, None] == row, torch.nan, model(z))

        self._fails(RuntimeError, "logits of 1 of 23 .* NaN", [(x, y)], broken)

    def test_a_sample_whose_logits_an_attack_made_nan_is_not_robust(self) -> None:
        """The largest of NaNs is, to argmax, the first one: class 0."""
        _, x, _ = labelled()

        def overflows(z: Tensor) -> Tensor:
            logits = F.one_hot(torch.zeros(len(z), dtype=torch.long), CLASSES).double()
            return torch.where(z[:, :1, 0, 0] > 1.0, torch.nan, logits)

        shift = {"shift": lambda model, x, y: x + 1.0}
        report = evaluate(overflows, [(x, torch.zeros(23, dtype=torch.long))], shift, **QUIET)
        assert (report.clean_accuracy.count, report.robust_accuracy.count) == (23, 0)

    def test_a_sampler_that_repeats_samples(self) -> None:
        _, x, y = labelled()
        data = TensorDataset(x, y)
        sampler = DistributedSampler(data, num_replicas=2, rank=0)
        self._fails(ValueError, "DistributedSampler, which repeats samples", DataLoader(data, sampler=sampler))

    def test_several_processes_that_know_nothing_of_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, x, y = labelled()
        monkeypatch.setenv("WORLD_SIZE", "2")
        self._fails(RuntimeError, r"WORLD_SIZE is 2, but .*init_process_group\(\)", [(x, y)])
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert evaluate(labelled()[0], [(x, y)], stay, **QUIET).n == 23


class TestWhatMayBeCompared:
    """An attack is held against another only where both may do the same, and only on samples that both were run on."""

    def test_a_search_before_the_attack_with_gradients(self) -> None:
        model, x, y = labelled()
        attacks = {"search": RandomSearch(Linf(0.2), queries=12), "apgd": APGDAttack(Linf(0.2), steps=20)}
        report = evaluate(model, batches(x, y, 7), attacks, **QUIET)
        assert report.attacks["search"].broken > 0
        assert not report.raised

    def test_other_radii(self) -> None:
        model, x, y = labelled()
        attacks = {"small": PGDAttack(Linf(0.01)), "one step": FGSM(Linf(0.2)), "search": RandomSearch(Linf(0.2))}
        report = evaluate(model, batches(x, y, 7), attacks, early_exit=False, **QUIET)
        assert report.attacks["one step"].broken > report.attacks["small"].broken
        assert [flag.name for flag in report.flags] == [TestFlags.BLACK_BOX]  # the search and the step of one radius
        assert not report.raised

    def test_a_search_in_a_larger_ball(self) -> None:
        model, x, y = labelled()
        attacks = {"small": PGDAttack(Linf(0.01)), "search": RandomSearch(Linf(0.2), queries=12)}
        report = evaluate(model, batches(x, y, 7), attacks, **QUIET)
        assert report.attacks["search"].broken > 0
        assert not report.flags


class TestOfBatches:
    def test_attacks_of_others_draw_the_same_numbers_after_an_interruption(self, tmp_path: Path) -> None:
        model, x, y = labelled()

        def noisy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
            return (x + 0.3 * torch.rand_like(x)).clamp(0, 1)

        def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
            yield from list(batches(x, y, 7))[:2]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, interrupted(), noisy, state=tmp_path / "state.json", **QUIET)
        torch.manual_seed(5)
        resumed = evaluate(model, batches(x, y, 7), noisy, state=tmp_path / "state.json", **QUIET)
        assert resumed.verdicts == evaluate(model, batches(x, y, 7), noisy, **QUIET).verdicts
        assert 0 < resumed.robust_accuracy.count < resumed.clean_accuracy.count

    def test_the_order_of_attacks_is_a_part_of_the_state(self, tmp_path: Path) -> None:
        model, x, y = labelled()
        attacks = {"fgsm": FGSM(Linf(0.1)), "pgd": PGDAttack(Linf(0.1), steps=2)}
        evaluate(model, batches(x, y, 7), attacks, state=tmp_path / "state.json", **QUIET)
        reverse = dict(reversed(attacks.items()))
        with pytest.raises(StateError, match="attacks="):
            evaluate(model, batches(x, y, 7), reverse, state=tmp_path / "state.json", **QUIET)

    def test_a_gap_before_other_data_is_not_filled_with_them(self, tmp_path: Path) -> None:
        model, x, y = labelled()
        state = tmp_path / "state.json"
        evaluate(model, batches(x, y, 7), FGSM(Linf(0.1)), state=state, **QUIET)
        content = json.loads(state.read_text())
        del content["batches"]["0"]
        state.write_text(json.dumps(content))
        with pytest.raises(StateError, match="other data"):
            evaluate(model, batches(x.flip(0), y.flip(0), 7), FGSM(Linf(0.1)), state=state, **QUIET)
        assert json.loads(state.read_text()) == content

    @pytest.mark.usefixtures("unchecked")
    def test_one_radius_for_each_sample_is_refused(self) -> None:
        model, x, y = labelled()
        attack = FGSM(Linf(torch.full((23, 1, 1, 1), 0.1, dtype=torch.float64)))
        with pytest.raises(ValueError, match="belongs to one batch"):
            evaluate(model, [(x, y)], attack, **QUIET)

    def test_a_warning_is_said_once(self) -> None:
        model, x, y = labelled()

        def warning(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
            warnings.warn("once is enough", GradregWarning, stacklevel=1)
            return x

        with pytest.warns(GradregWarning) as caught:
            report = evaluate(model, batches(x, y, 7), warning, **QUIET)
        assert len(caught) == len(report.raised) == 1

    def test_functions_get_autograd_where_it_is_off(self) -> None:
        model, x, y = labelled()

        def sign(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
            return (x + 0.02 * grad.sign()).clamp(0, 1)

        expected = evaluate(model, [(x, y)], sign, **QUIET)
        with torch.no_grad():
            assert evaluate(model, [(x, y)], sign, **QUIET).verdicts == expected.verdicts

"""Attacks without gradients of the model they fool, and AutoAttack: inside their sets, reproducible, and in order."""

import importlib
import importlib.metadata
import logging
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    APGDAttack,
    Attack,
    AutoAttack,
    GradregWarning,
    Linf,
    PGDAttack,
    RandomSearch,
    ThreatModel,
    TransferAttack,
    margin,
)

from cases import make_batch, make_model, soft_labels

THREATS = {"Linf": Linf(0.1), "L2": L2(0.5), "L1": L1(2.0)}


def two_classes(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier of images of shape (1, 6, 6), and samples that it classifies right."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    x = torch.rand(60, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


class TestRandomSearch:
    @given(
        name=st.sampled_from(sorted(THREATS)),
        seed=st.integers(0, 2**31),
        queries=st.integers(1, 20),
        window=st.floats(0.01, 1.0),
        shape=st.sampled_from([(3, 2, 4, 4), (3, 1, 1, 7), (3, 7), (3, 1), (3, 2, 3)]),
    )
    def test_is_inside_ball_and_bounds_and_never_worse_than_x(
        self, name: str, seed: int, queries: int, window: float, shape: tuple[int, ...]
    ) -> None:
        threat, generator = THREATS[name], torch.Generator().manual_seed(seed)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        weight = torch.randn(x[0].numel(), 4, generator=generator, dtype=torch.float64)

        def model(z: Tensor) -> Tensor:
            return (z.flatten(1) @ weight).sin()

        y = model(x).argmax(1)
        x_adv = RandomSearch(threat, queries=queries, window=window, seed=seed)(model, x, y)
        assert x_adv.shape == x.shape
        assert bool((threat.norm(x_adv - x) <= 1 + 1e-6).all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        assert bool((margin(model(x_adv), y) >= margin(model(x), y)).all())

    @pytest.mark.parametrize("threat", list(THREATS.values()), ids=list(THREATS))
    @pytest.mark.parametrize("shape", [(12, 2, 6, 6), (12, 72)])
    def test_depends_on_seed_and_sample_alone(self, threat: ThreatModel, shape: tuple[int, ...]) -> None:
        model, (x, y) = make_model("mlp"), make_batch(12)
        x = x.reshape(shape)
        attack = RandomSearch(threat, queries=15, seed=3)
        whole = attack(model, x, y)
        order = torch.tensor([7, 0, 4])
        assert torch.allclose(attack(model, x[order], y[order], index=order), whole[order], atol=1e-12)
        assert torch.equal(attack(model, x, y), whole)
        assert not torch.allclose(RandomSearch(threat, queries=15, seed=4)(model, x, y), whole)
        assert not torch.allclose(whole, x)

    def test_equal_images_are_searched_differently(self) -> None:
        model, x, y = two_classes()
        x_adv = RandomSearch(Linf(0.02), queries=15, seed=3)(model, x[:1].expand(4, -1, -1, -1), y[:1].expand(4))
        assert len({tuple(image.flatten().tolist()) for image in x_adv}) == 4

    def test_without_a_seed_the_default_generator_decides(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(RandomSearch(Linf(0.1), queries=10)(model, x, y))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        state = torch.get_rng_state()
        RandomSearch(Linf(0.1), queries=10, seed=0)(model, x, y)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("threat", [Linf(0.15), L2(0.8), L1(4.0)])
    def test_fools_most_of_what_can_be_fooled(self, threat: ThreatModel) -> None:
        """A linear model without bounds: exactly those whose margin the dual norm exceeds."""
        model, x, y = two_classes()
        weight = (model[1].weight[0] - model[1].weight[1]).detach()
        can_be = -margin(model(x), y) < threat.dual_norm(weight.view(1, 1, 6, 6).expand_as(x))
        x_adv = RandomSearch(threat, queries=300, bounds=None, seed=0)(model, x, y)
        fooled = model(x_adv).argmax(1) != y
        assert not bool((fooled & ~can_be).any())
        assert int(can_be.sum()) > 15
        share = {Linf: 0.6, L2: 0.5, L1: 0.4}[type(threat)]
        assert int(fooled.sum()) >= share * int(can_be.sum())

    def test_more_queries_come_further(self) -> None:
        """The windows of a search shrink as it goes; with as many queries in the same windows it only gains."""
        model, x, y = two_classes()
        margins = []
        for queries in (1, 10, 100):
            x_adv = RandomSearch(Linf(0.02), queries=queries, seed=0)(model, x, y)
            margins.append(margin(model(x_adv), y).mean().item())
        assert margins == sorted(margins)
        assert margins[2] > margins[1] > margins[0] > margin(model(x), y).mean().item()

    def test_fooled_samples_leave(self) -> None:
        model, x, y = two_classes()
        y[:10] = 1 - y[:10]
        sizes: list[int] = []

        def spying(z: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            sizes.append(len(z))
            return model(z)

        x_adv = RandomSearch(Linf(0.1), queries=50, seed=0)(spying, x, y)
        assert sizes[:2] == [60, 50]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 51
        assert sizes[-1] < 40
        assert torch.equal(x_adv[:10], x[:10])
        assert int((model(x_adv).argmax(1) == y).sum()) <= sizes[-1]

    def test_no_query_is_made_for_nobody(self) -> None:
        model, x, y = two_classes()
        sizes: list[int] = []
        RandomSearch(Linf(0.1), queries=50)(lambda z: (sizes.append(len(z)), model(z))[1], x, 1 - y)
        assert sizes == [60]

    def test_windows_shrink_and_have_one_sign_per_channel(self) -> None:
        points: list[Tensor] = []

        def constant(z: Tensor) -> Tensor:
            points.append(z.clone())
            return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

        x = torch.full((1, 3, 8, 8), 0.5)
        RandomSearch(Linf(0.1), queries=8, window=0.5, seed=0)(constant, x, torch.tensor([0]))
        areas = []
        for point in points[1:]:
            moved = point - x
            inside = moved != 0
            assert torch.allclose(moved[inside].abs(), torch.tensor(0.1))
            areas.append(inside[0, 0].sum().item())
            for channel in moved[0]:
                rows, columns = (channel != 0).any(1), (channel != 0).any(0)
                assert int((channel != 0).sum()) == int(rows.sum()) * int(columns.sum())  # a rectangle
                assert len(channel[channel != 0].sign().unique()) == 1
        assert areas == [36, 36, 16, 16, 9, 9, 4, 4]

    def test_reads_no_gradient(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        rounding = RandomSearch(Linf(0.1), queries=20, seed=0)(lambda z: model((z * 255).round() / 255).detach(), x, y)
        assert not torch.equal(rounding, x)
        assert not RandomSearch(Linf(0.1)).uses_gradients
        assert RandomSearch(Linf(0.1), queries=7).name == "random search (7)"

    @pytest.mark.parametrize("options", [{"queries": 0}, {"window": 0.0}, {"window": 1.5}, {"window": float("nan")}])
    @pytest.mark.usefixtures("unchecked")
    def test_bad_settings(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="queries"):
            RandomSearch(Linf(0.1), **options)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(ValueError, match="bounds"):
            RandomSearch(Linf(0.1))(model, x * 2, y)
        with pytest.raises(ValueError, match="argmax"):
            RandomSearch(Linf(0.1))(model, x, soft_labels(y))


class TestTransfer:
    def test_is_the_attack_on_the_surrogate(self) -> None:
        model, surrogate, (x, y) = make_model("conv"), make_model("mlp"), make_batch(8)
        seen: list[Tensor] = []
        for attack in (PGDAttack(Linf(0.1), steps=3, seed=0), APGDAttack(L2(0.4), steps=3, seed=0)):
            x_adv = TransferAttack(attack, surrogate)(lambda z: (seen.append(z), model(z))[1], x, y)
            assert torch.equal(x_adv, attack(surrogate, x, y))
        assert not seen

    def test_index_is_passed_on_to_what_has_a_seed(self) -> None:
        model, surrogate, (x, y) = make_model("conv"), make_model("mlp"), make_batch(8)
        order = torch.tensor([5, 2, 7])
        attack = PGDAttack(Linf(0.1), steps=3, seed=0)
        whole = attack(surrogate, x, y)
        found = TransferAttack(attack, surrogate)(model, x[order], y[order], index=order)
        assert torch.allclose(found, whole[order], atol=1e-12)
        without = TransferAttack(PGDAttack(Linf(0.1), steps=3), surrogate)
        assert without(model, x[order], y[order], index=order).shape == x[order].shape

    def test_threat_and_bounds_are_those_of_the_attack(self) -> None:
        attack = PGDAttack(L2(0.4), bounds=(-1.0, 2.0), out_of_bounds="clamp")
        transfer = TransferAttack(attack, make_model("mlp"))
        assert (transfer.threat, transfer.bounds, transfer.out_of_bounds) == (attack.threat, (-1.0, 2.0), "clamp")
        assert transfer.name == "PGD-10, transferred"
        assert not transfer.uses_gradients
        larger = transfer.scaled(2.0)
        assert larger.threat.eps == 0.8
        assert larger.attack.threat.eps == 0.8

    def test_an_evaluation_seeds_it_and_lets_nobody_leave(self) -> None:
        """A sample that fools the surrogate early may fool the model later."""
        transfer = TransferAttack(PGDAttack(Linf(0.1)), make_model("mlp"))
        found = transfer.for_evaluation(5)
        assert isinstance(found, TransferAttack)
        assert found.attack.seed == 5
        assert not found.attack.early_stop
        assert TransferAttack(PGDAttack(Linf(0.1), seed=1), make_model("mlp")).for_evaluation(5).attack.seed == 1

    def test_the_surrogate_is_left_as_it_was(self) -> None:
        model, surrogate, (x, y) = make_model("conv"), make_model("batch_norm_train"), make_batch(8)
        statistics = surrogate[1].running_mean.clone()
        TransferAttack(PGDAttack(Linf(0.1), mode="eval"), surrogate)(model, x, y)
        assert all(module.training for module in surrogate.modules())
        assert torch.equal(surrogate[1].running_mean, statistics)
        assert all(parameter.grad is None for parameter in surrogate.parameters())

    @pytest.mark.usefixtures("unchecked")
    def test_the_wrong_way_round(self) -> None:
        with pytest.raises(TypeError, match="Sequential"):
            TransferAttack(make_model("mlp"), PGDAttack(Linf(0.1)))


FAST = AutoAttack(Linf(0.05), attacks=("apgd-ce",), seed=0)


class TestAutoAttack:
    def test_fools_and_stays_in_its_ball(self) -> None:
        model, (x, _) = make_model("conv", torch.float32), make_batch(8, torch.float32)
        y = model(x).argmax(1)
        x_adv = FAST(model, x, y)
        assert bool(((x_adv - x).abs() <= 0.05 + 1e-6).all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        assert not x_adv.requires_grad
        broken = model(x_adv).argmax(1) != y
        assert int(broken.sum()) > 0
        assert torch.equal(x_adv[~broken], x[~broken])  # what held comes back as it was

    @pytest.mark.parametrize("seed", [0, None])
    def test_random_numbers_go_on_as_if_it_had_not_been_there(self, seed: int | None) -> None:
        model, (x, _) = make_model("conv", torch.float32), make_batch(3, torch.float32)
        y = model(x).argmax(1)
        state = torch.get_rng_state()
        found = [AutoAttack(Linf(0.02), attacks=("apgd-ce",), seed=seed)(model, x, y) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
        if seed is not None:
            assert torch.equal(*found)

    def test_random_numbers_come_back_after_an_exception(self) -> None:
        model, (x, _) = make_model("conv", torch.float32), make_batch(3, torch.float32)
        state = torch.get_rng_state()

        def fails(z: Tensor) -> Tensor:
            torch.rand(5)
            if torch.is_grad_enabled():
                raise KeyboardInterrupt
            return model(z)

        with pytest.raises(KeyboardInterrupt):
            FAST(fails, x, model(x).argmax(1))
        assert torch.equal(torch.get_rng_state(), state)
        assert not logging.getLogger("auto-attack").handlers
        assert logging.getLogger("auto-attack").propagate

    def test_what_it_logs_is_a_warning_once(self, caplog: pytest.LogCaptureFixture) -> None:
        model, (x, _) = make_model("conv", torch.float32), make_batch(3, torch.float32)
        y = model(x).argmax(1)
        with pytest.warns(GradregWarning, match="prob") as caught:
            FAST(lambda z: model(z).softmax(1), x, y)
        assert len([w for w in caught if "probability" in str(w.message)]) == 1
        assert [warning.filename for warning in caught] == [__file__] * len(caught)
        assert not caplog.records

    @pytest.mark.parametrize(("attack", "needed"), [("apgd-t", 4), ("apgd-dlr", 3)])
    def test_as_many_targets_as_there_are_classes(self, attack: str, needed: int) -> None:
        """And no more: the package would ask for the tenth of four."""
        _, x, _ = two_classes()
        x = x.float()[:3]
        wide, narrow = (nn.Sequential(nn.Flatten(), nn.Linear(36, classes)) for classes in (4, needed - 1))
        x_adv = AutoAttack(Linf(0.05), attacks=(attack,), seed=0)(wide, x, wide(x).argmax(1))
        assert (x_adv - x).abs().max() <= 0.05 + 1e-6
        with pytest.raises(ValueError, match=f"{needed} classes"):
            AutoAttack(Linf(0.05), attacks=(attack,), seed=0)(narrow, x, narrow(x).argmax(1))

    def test_a_debugger_goes_on_tracing(self) -> None:
        """The package traces one pass of the model itself, and then nothing any more."""
        model, (x, _) = make_model("conv", torch.float32), make_batch(2, torch.float32)

        def trace(frame: object, event: str, argument: object) -> None:
            return None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            FAST(model, x, model(x).argmax(1))
            after = sys.gettrace()
        finally:
            sys.settrace(before)
        assert after is trace

    def test_the_standard_version_says_which_of_its_attacks_needs_more_classes(self) -> None:
        model, x, y = two_classes()
        with pytest.raises(ValueError, match="apgd-t"):
            AutoAttack(Linf(0.05))(model.float(), x.float(), y)

    def test_names(self) -> None:
        version = importlib.metadata.version("pyautoattack")
        assert AutoAttack(Linf(0.1)).name == f"AutoAttack standard (pyautoattack {version})"
        assert AutoAttack(Linf(0.1), version="plus").name == f"AutoAttack plus (pyautoattack {version})"
        custom = AutoAttack(L2(0.1), attacks=("square", "fab"))
        assert custom.name == f"AutoAttack custom (square, fab) (pyautoattack {version})"
        assert custom.version == "custom"
        assert custom.uses_gradients
        assert not AutoAttack(L2(0.1), attacks=("square",)).uses_gradients

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, (x, y) = make_model("conv", torch.float32), make_batch(3, torch.float32)
        imported = importlib.import_module

        def missing(name: str, package: str | None = None) -> Any:
            if name == "pyautoattack":
                raise ImportError(name)
            return imported(name, package)

        def unknown(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib, "import_module", missing)
        monkeypatch.setattr(importlib.metadata, "version", unknown)
        assert FAST.name == "AutoAttack custom (apgd-ce) (pyautoattack not installed)"
        with pytest.raises(ImportError, match="pip"):
            FAST(model, x, y)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"attacks": ("apgd-ce", "pgd")}, "pgd"),
            ({"attacks": ("apgd-ce",), "version": "plus"}, "custom"),
            ({"version": "custom"}, "custom"),
            ({"version": "strong"}, "standard"),
            ({"threat": Linf(torch.full((2, 1, 1), 0.1))}, "eps"),
            ({"bounds": (-1.0, 1.0)}, "bounds"),
            ({"bounds": None}, "bounds"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_bad_settings(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            AutoAttack(**({"threat": Linf(0.1)} | options))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model, (x, y) = make_model("conv", torch.float32), make_batch(3, torch.float32)
        with pytest.raises(ValueError, match="argmax"):
            FAST(model, x, soft_labels(y, torch.float32))
        with pytest.raises(ValueError, match="bounds"):
            FAST(model, 2 * x, y)
        with pytest.raises(ValueError, match="Labels"):
            FAST(model, x, y + 4)
        with pytest.raises(TypeError, match="tuple"):
            FAST(lambda z: (model(z),), x, y)


@pytest.mark.parametrize("attack", [RandomSearch(Linf(0.1)), FAST, TransferAttack(PGDAttack(Linf(0.1)), nn.Identity())])
def test_configurations_are_frozen_and_say_what_they_are(attack: Attack) -> None:
    assert "eps=" in repr(attack)
    with pytest.raises(AttributeError):
        attack.threat = Linf(1.0)
    assert attack.seeded(7).threat is attack.threat


def test_a_list_of_attacks_is_as_good_as_a_tuple() -> None:
    square, both = (AutoAttack(Linf(0.1), attacks=attacks) for attacks in (["square"], ["square", "apgd-ce"]))
    assert not square.uses_gradients
    assert both.uses_gradients
    assert AutoAttack(Linf(0.1)).uses_gradients


@pytest.mark.usefixtures("unchecked")
def test_random_search_looks_at_what_it_is_given() -> None:
    x, y = torch.rand(3, 2, 6, 6), torch.tensor([0, 1, 9])
    with pytest.raises(ValueError, match="classes"):
        RandomSearch(Linf(0.1))(lambda z: z.flatten(1)[:, :4], x, y)
    with pytest.raises(TypeError, match="tensor"):
        RandomSearch(Linf(0.1))(lambda z: (z, z), x, y)
    with pytest.raises(ValueError, match="position"):
        RandomSearch(Linf(0.1), seed=0)(lambda z: z.flatten(1)[:, :4], x, y, index=torch.arange(2))

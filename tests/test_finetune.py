"""The fine-tuning example: from a folder of images to weights that timm loads, also when it is killed on the way."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from gradreg import Linf

import finetune
from finetuning import data, report, weights

# A network of a few steps may well be constant on random images; where that is the point, a test says so.
pytestmark = pytest.mark.filterwarnings("ignore:The model predicts one class")
CLASSES, SIZE, STEPS = 4, 32, 7
TINY = ["--weights", "none", "--size", str(SIZE), "--batch-size", "4", "--natural", "3", "--save-every", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images of four classes, as ImageFolder reads them."""
    generator = torch.Generator().manual_seed(0)
    place = tmp_path_factory.mktemp("images")
    for part, count in (("train", 5), ("val", 3)):
        for label in range(CLASSES):
            (place / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(place / part / f"class{label}" / f"{number}.png")
    return place


def run(folder: Path, output: Path, *more: str, method: str = "noisy", model: str = "test_efficientnet") -> Path:
    """A run of a few steps."""
    budget = {"noisy": 3 + 4 * 4 / 3, "pgd3": 3 + 4 * 3, "penalty": 3 + 4 * 2, "natural": STEPS}[method]
    tiny = [*TINY, "--method", method, "--budget", str(math.ceil(budget))]
    finetune.main([model, str(folder), *tiny, "--output", str(output), *more])
    return output


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("noisy", ()),
        ("noisy", ("--act", "gelu", "--amp", "--autoattack-images", "4", "--pt2")),
        ("pgd3", ("--optimizer", "sgd", "--adapt-batch-norm")),
        ("penalty", ("--act", "blend", "--sharpness-start", "8", "--sharpness", "2")),
        ("natural", ()),
    ],
)
def test_runs_to_an_export_with_the_same_logits(
    method: str, more: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    output = run(folder, tmp_path, *more, method=method)

    state = torch.load(output / "last.pt", weights_only=True)
    assert state["step"] == STEPS
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS
    assert (output / "report-val.md").read_text().count("| after |") == 1
    assert (output / "before-val.json").exists()
    assert (output / "after-val.json").exists()
    saved = torch.load(output / "finetuned.pt", weights_only=True)
    averaged = {name.removeprefix("module.model."): value for name, value in state["ema"].items()}
    assert all(torch.equal(value, averaged[name]) for name, value in saved["state_dict"].items())
    plain = timm.create_model("test_efficientnet", num_classes=CLASSES, checkpoint_path=str(output / "finetuned.pt"))
    x = torch.rand(2, 3, SIZE, SIZE)
    loaded = weights.load(output / "finetuned.pt")
    if "--act" not in more:
        mean, std = (torch.tensor(saved[name]).view(3, 1, 1) for name in ("mean", "std"))
        torch.testing.assert_close(loaded(x), plain.eval()((x - mean) / std))
    if "--pt2" in more:
        program = torch.export.load(output / "finetuned.pt2").module()
        torch.testing.assert_close(program(x), loaded(x))


def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--act", "gelu")
    whole = torch.load(run(folder, tmp_path / "whole", *more) / "last.pt", weights_only=True)
    step = finetune.Training.take_step

    def killed(training: finetune.Training, x: torch.Tensor, y: torch.Tensor) -> float:
        if training.step == 5:
            raise KeyboardInterrupt
        return step(training, x, y)

    monkeypatch.setattr(finetune.Training, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "killed", *more)
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 4
    monkeypatch.undo()
    again = torch.load(run(folder, tmp_path / "killed", *more) / "last.pt", weights_only=True)

    assert again["step"] == whole["step"] == STEPS
    for part in ("model", "ema"):
        assert all(torch.equal(value, again[part][name]) for name, value in whole[part].items())
    for number, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, again["optimizer"]["state"][number][name]) for name, value in moments.items())


def test_another_run_s_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    with pytest.raises(SystemExit, match="another lr"):
        run(folder, tmp_path, "--lr", "0.1")


def test_crops_and_order_depend_on_the_step_alone() -> None:
    whole = list(data.numbers_of_batches(20, 4, range(12), seed=3))
    assert list(data.numbers_of_batches(20, 4, range(7, 12), seed=3)) == whole[7:]
    first = {index for batch in whole[:5] for index, _ in batch}
    assert first == set(range(20))


def test_a_constant_classifier_is_noticed(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one class for 100% of the images"):
        report.warn_if_constant(1.0, 0.25)
    report.warn_if_constant(0.6, 0.25)
    report.warn_if_constant(0.9, 0.85)  # the data are as uneven as the predictions

    guess = weights.load(run(folder, tmp_path) / "finetuned.pt")
    with torch.no_grad():
        guess[-1].get_classifier().bias.add_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    rows = {"all": data.loader_of(data.Images(folder / "val", SIZE, train=False), None, 4, 0)}
    with pytest.warns(UserWarning, match="all but constant"):
        report.robustness(guess, Linf(2 / 255), tmp_path / "guess.json", rows, torch.device("cpu"))


@pytest.mark.parametrize("prefix", ["", "other."])
def test_weights_are_read_by_name_or_by_order(prefix: str, tmp_path: Path) -> None:
    source = timm.create_model("test_efficientnet", num_classes=9)
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "weights.pth")
    network = timm.create_model("test_efficientnet", num_classes=CLASSES)
    weights.load_weights(network, str(tmp_path / "weights.pth"))
    different = {
        name
        for name, value in network.state_dict().items()
        if value.shape != source.state_dict()[name].shape or not torch.equal(value, source.state_dict()[name])
    }
    assert different == {"classifier.weight", "classifier.bias"}

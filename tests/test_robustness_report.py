"""The robustness report: one command to a page that stands alone, in JSON and as a picture of a real browser."""

import html.parser
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gradreg import smoothify
from gradreg.statistics import Measurements

import quickstart
import robustness_report
from robustness import claims, findings, subjects
from robustness.claims import FAILS, HOLDS, OPEN, _verdict
from robustness.subjects import load_images, load_model
from study.models import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """What is on a page: its tags, its headings, its tables' rows, and whether every tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_module() -> nn.Module:
    """A model of one's own, as --model takes it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two models of the quickstart, trained for a few steps; short attacks."""
    monkeypatch.setattr(subjects, "TRAINED", ("natural", "PGD-3"))
    train = quickstart.train
    monkeypatch.setattr(quickstart, "train", lambda name, x, y, steps, seed: train(name, x, y, 5, seed))
    monkeypatch.setattr(findings, "SCALES", [0.0, 1.0])
    monkeypatch.setattr(findings, "RADII", (1.0,))
    monkeypatch.setattr(findings, "APGDAttack", lambda threat, seed: quickstart.PGDAttack(threat, steps=2, seed=seed))
    monkeypatch.setattr(
        findings, "TargetedAPGDAttack", lambda threat, halving, seed: quickstart.PGDAttack(threat, steps=3, seed=seed)
    )
    return tmp_path


def run(folder: Path, *more: str) -> None:
    robustness_report.main(["--images", "9", "--iterations", "2", "--batch-size", "4", "--output", str(folder), *more])


def test_page_and_numbers_and_a_second_run_that_does_nothing_again(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small)
    text = (small / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 10
    assert all(str(source).startswith("data:image/png;base64,") for source in pictures)
    assert "http" not in text
    numbers = json.loads((small / "report.json").read_text())
    assert list(numbers["models"]) == ["natural", "PGD-3"]
    for label, of_model in numbers["models"].items():
        assert label in page.text
        assert of_model["accuracy"]["n"] == of_model["curve"]["n"] == of_model["statistics"]["n"] == 9
        assert set(of_model["along_attack"]) == {"0.0", "1.0"}
        assert of_model["gradient_histograms"]["all"]["counts"]
        clean = of_model["accuracy"]["clean_accuracy"]["accuracy"]
        assert f"{100 * clean:.1f} %" in page.text
    for claim in numbers["claims"]:
        assert claim["claim"] in page.text
        assert all(answer["verdict"] in (HOLDS, FAILS, OPEN) for answer in claim["models"].values())
    assert numbers["about"]["command"].startswith("python examples/robustness_report.py --images 9")
    for name, definition in numbers["definitions"].items():
        assert name in page.text
        assert definition in page.text
        assert " at 0x" not in definition  # another one in every process

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(quickstart, "train", never)
    monkeypatch.setattr("gradreg.statistics.measurements._measured", never)
    monkeypatch.setattr("gradreg.evaluation.verdicts._verdicts", never)
    run(small)
    assert json.loads((small / "report.json").read_text()) == numbers
    capsys.readouterr()


def test_models_by_name(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = ModuleType("own_models")
    own.make = make_module
    monkeypatch.setitem(__import__("sys").modules, "own_models", own)
    run(small, "--model", "mine=own_models:make", "--model", "smooth & mine=own_models:make+gelu", "--eps", "8/255")
    page = Page((small / "report.html").read_text())
    assert "smooth & mine" in page.text
    assert "eps = 0.03137" in page.text
    assert "reaches" not in page.text
    with pytest.raises(SystemExit):
        run(small, "--model", "mine=own_models:make", "--adversarial", "PGD-3")
    with pytest.raises(SystemExit):
        run(small, "--model", "mine")
    with pytest.raises(SystemExit):
        run(small, "--data", "fashion-mnist")


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = build("vit", "gelu", seed=3)
    torch.save(trained.state_dict(), tmp_path / "vit_0.1_500_natural_0_test.pt")
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(load_model(f"study:{tmp_path}/vit_0.1_500_natural_0_test.pt")(x), trained.eval()(x))
    (tmp_path / "mine.py").write_text("import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.ReLU())\n")
    assert [type(module).__name__ for module in load_model("mine:net+silu").modules()][-1] == "SiLU"
    with pytest.raises(SystemExit, match="expected timm:NAME"):
        load_model("resnet50")
    images = load_images("digits", 7, {})
    assert len(images.data) == 7
    x, y = images.examples(3)
    assert x.shape == (3, 1, 28, 28)
    assert y.tolist() == sorted(set(y.tolist()))
    with pytest.raises(SystemExit, match="needs a timm model"):
        load_images(str(tmp_path), None, {"mine": "mine:net"})


def test_verdicts_are_those_of_the_interval() -> None:
    assert (_verdict(0.1, 0.2), _verdict(-0.2, -0.1), _verdict(-0.1, 0.1)) == (HOLDS, FAILS, OPEN)
    assert _verdict(float("nan"), float("nan")) == OPEN


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.02, 0.05, HOLDS), (0.05, 0.09, OPEN), (0.07, 0.12, FAILS)])
def test_a_share_of_robustness_is_held_against_its_interval(low: float, high: float, verdict: str) -> None:
    top = SimpleNamespace(value=0.6, count=60)  # of which 90 % are 6 points less
    compared = SimpleNamespace(interval=(low, high))
    theirs = SimpleNamespace(report=SimpleNamespace(robust_accuracy=top, compare=lambda other: compared))
    mine = SimpleNamespace(report=SimpleNamespace(robust_accuracy=SimpleNamespace(value=0.6 - (low + high) / 2)))
    assert claims.SHARE.ask(mine, theirs).verdict == verdict


def test_claims_hold_what_was_measured(small: Path) -> None:
    """By hand: the mean log10 of the ratio of gradient norms, and the share of robust accuracies."""
    run(small)
    numbers = json.loads((small / "report.json").read_text())
    name = "gradient, L1 norm"
    natural, robust = (
        np.array(Measurements.load(small / f"{label}.statistics.json").values[name]) for label in ("natural", "PGD-3")
    )
    logs = np.log10(natural) - np.log10(robust)
    (claim,) = (claim for claim in numbers["claims"] if claim["claim"] == "The loss's gradient is smaller")
    assert claim["models"]["PGD-3"]["here"].startswith(f"{10 ** logs.mean():.2g} times")
    assert "natural" not in claim["models"]
    table = (small / "claims.md").read_text().splitlines()
    assert len(table) == 2 + len(numbers["claims"])
    assert table[2].endswith(f"| {claim['models']['PGD-3']['verdict']}: {claim['models']['PGD-3']['here']} |")


def test_networks_of_the_digits_are_those_of_the_quickstart() -> None:
    assert set(subjects.TRAINED) <= set(quickstart.METHODS)


def test_every_statistic_that_a_claim_names_is_measured() -> None:
    settings = findings.Settings(0.1)
    named = {claim.ask.__closure__[0].cell_contents for claim in claims.CLAIMS if claim.ask.__closure__}
    assert named <= set(settings.statistics)
    assert len({claim.statement for claim in claims.CLAIMS}) == len(claims.CLAIMS)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to look at the page with")
@pytest.mark.parametrize("width", [1200, 420])
def test_looks_like_a_page_in_a_browser(small: Path, width: int) -> None:
    """Neither empty nor cut off: ink in every part of the page, and none beyond its right side."""
    run(small)
    shot = small / "page.png"
    subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}",
         f"--window-size={width},4000", f"file://{small / 'report.html'}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (4000, width, 3)
    inked = (pixels.sum(2) < 720).reshape(20, 200, width).any(1)
    assert inked.any(1).all()
    assert not inked[:, -4:].any()
    colours = {tuple(colour) for colour in pixels[::7, ::7].reshape(-1, 3)}
    assert len(colours) > 200  # the pictures are there


def test_smooth_models_of_timm(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    tiny = timm.create_model("test_resnet", num_classes=10)
    weights = tmp_path / "weights.pth"
    torch.save(tiny.state_dict(), weights)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, num_classes=10, **options))
    x = torch.rand(2, 3, 96, 96)
    found = load_model(f"timm:test_resnet:{weights}+gelu")
    expected = smoothify(tiny, act="gelu").eval()
    mean, std = (torch.tensor(tiny.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(found(x), expected((x - mean) / std), rtol=1e-4, atol=1e-5)

"""The study of the menu at a tiny size: every entry trains, runs resume, weights are chosen on validation images."""

import json
from pathlib import Path

import pytest
import torch

from gradreg import FGSM, Linf, PGDAttack

import collapse
import menu
import study.menu
from study import menu_report, points
from study.data import Data
from study.menu import BUDGET, MENU, Training, steps_of
from study.models import NETS, build
from study.runs import pack


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", MENU)
def test_every_entry_trains(net: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.menu, "TRAINED", 8)
    model, entry = build(net, "gelu", seed=0), MENU[name]
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8) % 10
    training = Training(entry, entry.weights[-1], Linf(0.1), warm_up=2)
    for t in range(4):
        model.zero_grad()
        total = training(model, x, y, t, torch.arange(8))
        total.backward()
        assert total.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_equal_compute_is_that_of_500_steps_of_pgd_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.menu, "TRAINED", 8)
    steps = {name: steps_of(name, Linf(0.1)) for name in MENU}
    assert steps["PGD-3"] == 500
    assert steps["natural"] == 1500
    assert steps["N-FGSM, half"] == 1125
    assert steps["TRADES, 3 steps"] == 375
    for name, count in steps.items():
        cost = Training(MENU[name], MENU[name].weights[0], Linf(0.1), 1).cost
        assert count * cost == pytest.approx(BUDGET, rel=2e-3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Bright and dark images of two classes, three entries, one setting."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(512) % 2
    x = (0.4 * torch.rand(512, 1, 28, 28, generator=generator) + 0.4 * y.view(-1, 1, 1, 1)).clamp(0, 1)
    few = {name: MENU[name] for name in ("natural", "N-FGSM, half", "GradNorm")}
    monkeypatch.setattr(menu, "load", lambda split: Data(x, y, x[:40], y[:40]))
    monkeypatch.setattr(menu, "MENU", few)
    monkeypatch.setattr(menu, "SETTINGS", [("convnet", "0.1")])
    monkeypatch.setattr(menu, "steps_of", lambda name, threat: 4)
    monkeypatch.setattr(menu, "EQUAL_STEPS", 3)
    monkeypatch.setattr(menu, "attacks_on", lambda run: ([PGDAttack(run.threat, steps=2)], 20))
    monkeypatch.setattr(menu, "EASY", {"FGSM": FGSM, "PGD-20": FGSM})
    monkeypatch.setattr(menu_report, "RECORD", tmp_path / "record")
    monkeypatch.setattr(menu_report, "EQUAL_STEPS", 3)
    monkeypatch.setattr(menu_report, "steps_for_budget", lambda result: 4)
    monkeypatch.setattr(points, "DRAWS", 20)
    return tmp_path / "output"


def test_runs_resume_and_the_report_tabulates_them(small: Path) -> None:
    options = ["--seeds", "0", "1", "--output", str(small)]
    menu.main([*options, "--shard", "0/2"])
    menu.main([*options, "--shard", "1/2"])
    written = {path.name: path.stat().st_mtime_ns for path in (small / "runs").iterdir()}
    menu.main(options)
    assert {path.name: path.stat().st_mtime_ns for path in (small / "runs").iterdir()} == written
    found = [json.loads(path.read_text()) for path in (small / "runs").iterdir()]
    assert sum(run["split"] == "test" for run in found) == 3 * 2 + 3 * 2
    for entry in ("N-FGSM, half", "GradNorm"):
        tried = [run for run in found if run["entry"] == entry and run["split"] == "validation"]
        best = max(run["robust"] for run in tried)
        weights = sorted(run["weight"] for run in tried)
        taken = min(run["weight"] for run in tried if run["robust"] == best)
        assert len(weights) == (4 if taken in (weights[0], weights[-1]) else len(weights)) <= 4
        (weight,) = {run["weight"] for run in found if run["entry"] == entry and run["split"] == "test"}
        assert weight == taken
    menu.main(["--output", str(small), "--report"])
    page = (menu_report.RECORD / "tables.md").read_text()
    assert "| N-FGSM, half |" in page
    assert (menu_report.RECORD / "clean_and_robust.png").stat().st_size > 10_000
    menu.main(["--output", str(small.parent / "elsewhere"), *options[:3]])  # what is on record counts as done
    assert not (small.parent / "elsewhere").exists()


def run_of(entry: str, seed: int, verdicts: list[bool], **more: object) -> dict[str, object]:
    defaults = {
        "net": "convnet", "eps": "0.1", "steps": 500, "method": entry, "seed": seed, "split": "test",
        "data": "fashion-mnist", "entry": entry, "weight": 1.0, "cost": 3.0, "clean": 90, "clean_of": 100,
        "robust": sum(verdicts), "robust_of": len(verdicts), "verdicts": pack(verdicts), "FGSM": 15, "PGD-20": 14,
    }  # fmt: skip
    return {**defaults, **more}


def test_differences_are_paired_and_flags_are_set() -> None:
    first, second = [True] * 12 + [False] * 8, [True] * 8 + [False] * 12
    ours = [run_of("PGD-3", seed, first, **{"PGD-20": 18, "FGSM": 19}) for seed in range(3)]
    anchor = [run_of(menu_report.ANCHOR, seed, second, cost=1.33, steps=1128) for seed in range(2)]
    collapsed = [run_of("FGSM", 0, second, cost=1.667, steps=900, **{"PGD-20": 4, "FGSM": 16})]
    groups = menu_report.in_settings([*ours, *anchor, *collapsed])["convnet", "0.1"]
    page = menu_report.table("convnet", "0.1", groups)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = {name: cells for name, *cells in lines[1:]}
    assert next(iter(rows)) == "PGD-3"
    assert rows["PGD-3"][6].startswith("+20.0 (+")
    assert rows["PGD-3"][7] == "**30.0**"
    assert rows["PGD-3"][9:] == ["90.0", "60.0"]  # its equal compute is equal steps
    assert rows[menu_report.ANCHOR][6] == ""
    assert rows["FGSM"][8] == "1"


def test_the_picture_of_a_collapse_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(512, 1, 28, 28, generator=generator), torch.arange(512) % 10
    monkeypatch.setattr(collapse, "load", lambda split, folder: Data(x, y, x[:20], y[:20]))
    collapse.main(["--steps", "5", "--every", "2", "--output", str(tmp_path)])
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert list(runs) == list(collapse.ATTACKS)
    assert all(run["step"] == [2, 4] for run in runs.values())
    assert (tmp_path / "collapse.png").stat().st_size > 10_000

"""The ImageNet example from end to end on a few photographs: trained, killed, resumed, exported; what it refuses."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from gradreg import smoothify

import photographs as example
from imagenet import checkpoints
from imagenet.building import build_model, timm_model
from imagenet.checkpoints import CheckpointError
from imagenet.command import main
from imagenet.data import Images, validation_loader
from imagenet.recipe import load

CLASSES = 6
PAIRS = ("swin", "resnet", "mixed")  # runs that were also killed and started again
OPTIONS = {"img_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}  # of tiny_swin_gradnorm


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    example.main([str(folder), "--split", "--crops", "6"])
    return folder


@pytest.fixture(scope="module")
def results(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every run of the worker left, all started once."""
    output = tmp_path_factory.mktemp("imagenet")
    worker = Path(__file__).with_name("imagenet_worker.py")
    command = [sys.executable, str(worker), str(photographs), str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    for name, told in json.loads((output / "told.json").read_text()).items():
        assert set(told["ends"]) == {0}, (name, run.stderr[-4000:])
    return output


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log, without times."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """All that nested mappings and lists hold."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: inner for part, one in pairs for key, inner in flat(one, f"{name}.{part}").items()}
    return {name: value}


def run(photographs: Path, output: Path, *more: str, **keys: object) -> None:
    """Six steps of the small Swin, in this process; keys have __ for a dot."""
    small = {"batch__total": 12, "schedule__epochs": 2, "validation__images": 6, "validation__steps": 1} | keys
    changes = [part for key, value in small.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    options = ["--workers", "0", "--recipe", "tiny_swin_gradnorm", "--output", str(output)]
    main("none", "", [str(photographs), *options, *changes, *more])


def refused(photographs: Path, output: Path, *more: str, **keys: object) -> str:
    """What a run says where it ends at once."""
    with pytest.raises(SystemExit) as raised:
        run(photographs, output, *more, **keys)
    assert isinstance(raised.value.code, str)
    assert raised.value.code.startswith("error: ")
    return raised.value.code


# Trained, killed, resumed


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_loss_and_penalty_fall(results: Path, name: str) -> None:
    steps = [entry for entry in log_of(results / name) if "loss" in entry]
    for key in ("loss", "grad_norm"):
        values = [entry[key] for entry in steps if key in entry]
        first, last = sum(values[:4]) / 4, sum(values[-4:]) / 4
        assert last < 0.85 * first, (key, first, last)


def test_the_log_has_every_step_and_validation(results: Path) -> None:
    log = log_of(results / "swin")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 25))
    assert "grad_norm" not in log[0]  # its weight is 0 at first
    for name in ("raw", "ema"):
        validated = [entry for entry in log if f"{name} clean" in entry]
        assert [entry["step"] for entry in validated] == [6, 12, 18, 24]
        assert all(entry[f"{name} PGD"] <= entry[f"{name} clean"] for entry in validated)
    assert validated[-1]["ema clean"] > 1 / CLASSES


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_all_processes_validate_one_model(results: Path, name: str) -> None:
    """Those of BatchNorm, too, whose statistics are of other images in each process, and averaged there."""
    first, second = ((results / name / f"{rank}.validated.txt").read_text().split() for rank in (0, 1))
    assert len(first) == 2 * len([entry for entry in log_of(results / name) if "raw clean" in entry])
    assert first == second


@pytest.mark.parametrize("name", PAIRS)
def test_killed_and_resumed_is_undisturbed(results: Path, name: str) -> None:
    """Parameters, averages, optimiser and log, to the bit. SIGKILL cannot be caught: nothing is done on the way out."""
    told = json.loads((results / "told.json").read_text())
    killed = told[f"{name}, killed"]
    assert all(0 < step < killed["steps"] for step in killed["killed"])
    assert len(killed["killed"]) >= 1
    assert (killed["outlived by none of"] > 0) == (name == "mixed")  # which has processes that read images
    undisturbed, resumed = (flat(checkpoints.load(results / run / "last.pt")) for run in (name, f"{name}, killed"))
    assert undisturbed.keys() == resumed.keys()
    assert undisturbed[".step"] == killed["steps"]
    assert sum(key.startswith((".model", ".ema", ".optimizer.state")) for key in undisturbed) > 50
    for key, value in undisturbed.items():
        assert value.equal(resumed[key]) if isinstance(value, Tensor) else value == resumed[key], key
    assert log_of(results / name) == log_of(results / f"{name}, killed")
    for file in ("raw.safetensors", "ema.safetensors", "recipe.yaml"):
        assert (results / name / file).read_bytes() == (results / f"{name}, killed" / file).read_bytes()


def test_no_temporary_file_is_left(results: Path) -> None:
    expected = {"last.pt", "log.jsonl", "raw.safetensors", "ema.safetensors", "recipe.yaml"}
    for run in ("swin", "swin, killed"):
        assert {path.name for path in (results / run).iterdir() if path.suffix != ".txt"} == expected


def test_what_a_kill_left_half_written_goes_with_the_next_save(tmp_path: Path) -> None:
    half = tmp_path / ".last.pt.abcdefgh.pt"
    half.write_bytes(b"half")
    checkpoints.save(tmp_path / "last.pt", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_the_recipe_is_kept_with_the_run(results: Path) -> None:
    kept = (results / "swin" / "recipe.yaml").read_text()
    recipe = load("tiny_swin_gradnorm", "pixel", ["batch.total=12", "schedule.epochs=8"])
    assert str(recipe).split("validation:")[0] == kept.split("validation:")[0]
    assert kept in (results / "swin" / "0.txt").read_text()


def furthest(a: Path, b: Path) -> float:
    first, second = (load_file(path / "raw.safetensors") for path in (a, b))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(("name", "bound"), [("five, two processes", 1e-5), ("five, two parts", 1e-6)])
def test_five_steps_are_those_of_one_process_and_one_part(results: Path, name: str, bound: float) -> None:
    torch.manual_seed(0)
    start = timm_model(build_model(load("tiny_swin_gradnorm", "pixel"), CLASSES)).state_dict()
    weights = load_file(results / "five, one process" / "raw.safetensors")
    moved = [(weights[key] - start[key]).abs().max().item() for key in weights if key.endswith("weight")]
    assert min(moved) > 1e-3
    assert furthest(results / "five, one process", results / name) < bound


def test_edges_alone_train_without_the_loss(results: Path) -> None:
    """No input gradient of a logit hangs on the biases of the last layers, and two processes do not wait for theirs."""
    log = [entry for entry in log_of(results / "edges alone") if "edges" in entry]
    assert len(log) == 6
    assert log[-1]["edges"] < 0.95 * log[0]["edges"]
    assert "Warning" not in (results / "edges alone" / "0.txt").read_text()
    torch.manual_seed(0)
    start = timm_model(build_model(load("tiny_swin_gradnorm", "pixel"), CLASSES)).state_dict()
    weights = load_file(results / "edges alone" / "raw.safetensors")
    still = {name for name in weights if weights[name].equal(start[name])}
    assert still == {"head.fc.bias", "norm.bias"}


# Exported


@pytest.fixture(scope="module")
def batch(photographs: Path) -> Tensor:
    loader = validation_loader(Images(photographs, "val", load("tiny_swin_gradnorm", "pixel")), 6, 6, workers=0)
    return next(iter(loader))[0]


def in_plain_timm(name: str, weights: Path) -> torch.nn.Module:
    options = OPTIONS if "swin" in name else {}
    net = timm.create_model(name, num_classes=CLASSES, checkpoint_path=str(weights), **options)
    return net.eval()


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize(("run", "name"), [("swin", "swin_tiny_patch4_window7_224"), ("resnet", "resnet10t")])
def test_plain_timm_reads_what_was_exported(results: Path, batch: Tensor, run: str, name: str, which: str) -> None:
    content = checkpoints.load(results / run / "last.pt")
    trained = build_model(load(f"tiny_{run}_gradnorm", "pixel"), CLASSES)
    trained.load_state_dict(content["model" if which == "raw" else "ema"])
    trained.eval()
    net = in_plain_timm(name, results / run / f"{which}.safetensors")
    if run == "resnet":
        net = smoothify(net, "gelu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = trained(batch)
        torch.testing.assert_close(net((batch - mean) / std), expected, rtol=1e-4, atol=1e-5)
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # as it was trained: the kernels round differently
        assert net(trained.normalize(batch)).equal(expected)
    assert expected.std(0).min() > 1e-3


@pytest.mark.parametrize("file", ["raw.safetensors", "last.pt"])
def test_a_run_starts_from_the_weights_of_another(results: Path, file: str) -> None:
    weights = load_file(results / "swin" / "raw.safetensors")
    recipe = load("tiny_swin_gradnorm", "pixel", [f"model.weights={results / 'swin' / file}"])
    found = timm_model(build_model(recipe, CLASSES)).state_dict()
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)


# Said beforehand


def test_a_dry_run_says_what_there_is_to_know(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(photographs, tmp_path / "never", "--dry-run")
    printed = capsys.readouterr().out
    recipe = load("tiny_swin_gradnorm", "pixel", ["batch.total=12", "schedule.epochs=2"])
    assert str(recipe).split("validation:")[0] in printed
    assert "model: swin_tiny_patch4_window7_224, 6 classes, 0.04 million parameters" in printed
    assert "0.00 GiB for weights, averages and AdamW" in printed
    assert "data: 36 images; 3 steps of 12 images in an epoch" in printed
    assert "batch: 1 processes x 1 parts x 12 images" in printed
    assert "s a step (median of 3), 0.0 hours for 6 steps" in printed
    assert "preflight" in printed.lower()
    assert not (tmp_path / "never").exists()


def test_a_dry_run_of_one_step(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(photographs, tmp_path, "--dry-run", batch__total=36, schedule__epochs=1, batch__accumulation=2)
    assert "s a step (median of 1), 0.0 hours for 1 steps" in capsys.readouterr().out


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main("none", "", ["--list"])
    listed = capsys.readouterr().out.split()
    assert {"swin_b_gradnorm", "resnet50_gelu_finetune", "tiny_swin_gradnorm"} <= set(listed)
    assert not {"common", "differences"} & set(listed)


# Refused


def test_data_that_is_not_given_is_asked_for() -> None:
    with pytest.raises(SystemExit, match="error: Give the folder of the data, with train and val in it"):
        main("tiny_swin_gradnorm", "", [])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    said = refused(tmp_path / "nowhere", tmp_path / "output")
    assert f"{tmp_path}/nowhere has no folder 'train'" in said
    assert "examples/photographs.py FOLDER --split" in said


def test_a_folder_without_val(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs / "train", tmp_path / "train")
    assert f"{tmp_path} has no folder 'val'" in refused(tmp_path, tmp_path / "output")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert f"data: no images were found in {tmp_path / 'train'}" in refused(tmp_path, tmp_path / "output")


@pytest.mark.parametrize(
    ("split", "lost", "match"),
    [
        ("val", "n03773504", "6 classes in train, 5 in val; 'n03773504' is only in train"),
        ("train", "n03773504", "5 classes in train, 6 in val; 'n03773504' is only in val"),
    ],
)
def test_classes_that_differ(photographs: Path, tmp_path: Path, split: str, lost: str, match: str) -> None:
    shutil.copytree(photographs, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / split / lost)
    assert match in refused(tmp_path / "data", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_as_many_classes_of_other_names(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "data")
    (tmp_path / "data" / "val" / "n03773504").rename(tmp_path / "data" / "val" / "n99999999")
    match = "6 classes in train, 6 in val; 'n03773504' is only in train"
    assert match in refused(tmp_path / "data", tmp_path / "output")


def test_weights_that_are_not_there(photographs: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    assert f"{missing} does not exist" in refused(photographs, tmp_path / "output", model__weights=missing)


def test_weights_of_another_model(photographs: Path, results: Path, tmp_path: Path) -> None:
    other = results / "resnet" / "raw.safetensors"
    said = refused(photographs, tmp_path / "output", model__weights=other)
    assert f"model.weights: {other} holds another model. Missing: " in said
    assert "unknown: bn1.bias" in said


def test_weights_of_another_shape(photographs: Path, results: Path, tmp_path: Path) -> None:
    options = "{img_size: 56, embed_dim: 48, depths: [1, 1], num_heads: [2, 4]}"
    weights = results / "swin" / "raw.safetensors"
    said = refused(photographs, tmp_path / "output", model__weights=weights, model__options=options)
    assert "holds another model. Missing: none; unknown: none; of another shape: head.fc.weight" in said


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read(photographs: Path, tmp_path: Path, split: str, damage: str) -> None:
    shutil.copytree(photographs, tmp_path / "data")
    image = tmp_path / "data" / split / "n02123159" / "chelsea_0.png"
    whole = image.read_bytes()
    image.write_bytes({"text": b"no image", "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    said = refused(tmp_path / "data", tmp_path / "output", batch__total=36, schedule__epochs=1)
    assert "chelsea_0.png cannot be read as an image: " in said


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"batch__total": 18}, "batch.total was 12 and is 18; "),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"objective__grad_norm__weight": 0.6}, "objective.grad_norm.weight was 0.5 and is 0.6; "),
        ({"objective__grad_norm": "null"}, "objective.grad_norm was None and is "),
        ({}, "processes was 2 and is 1"),
    ],
)
def test_a_checkpoint_of_another_run(
    photographs: Path, results: Path, tmp_path: Path, keys: dict[str, object], match: str
) -> None:
    shutil.copytree(results / "swin", tmp_path / "output")
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}
    said = refused(photographs, tmp_path / "output", **{"schedule__epochs": 8} | keys)
    assert f"{tmp_path / 'output' / 'last.pt'} was made by another run: " in said
    assert match.split(" was ")[0] in said
    if "None" not in match:
        assert match in said
    assert "Give another --output" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_what_is_no_checkpoint(photographs: Path, tmp_path: Path, content: bytes | None) -> None:
    last = tmp_path / "last.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, last)
    else:
        last.write_bytes(content)
    said = refused(photographs, tmp_path)
    assert str(last) in said
    assert "cannot be read as a checkpoint" in said or "is no checkpoint of this script" in said


class Code:
    """What only code can bring back."""


def test_a_checkpoint_is_never_run_as_code(tmp_path: Path) -> None:
    torch.save({"settings": {}, "model": Code()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoints.load(tmp_path / "last.pt")


def test_a_full_disk_leaves_the_last_checkpoint(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def until_full(content: dict[str, Any], file: str) -> None:
        saved.append(content["step"])
        if len(saved) == 3:
            Path(file).write_bytes(b"half of a checkpo")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", until_full)
        said = refused(photographs, output, "--save-every", "2")
    assert saved == [2, 3, 4]
    assert f"{output / 'last.pt'} could not be written: [Errno 28] No space left on device" in said
    assert f"{output / 'last.pt'} of before is intact" in said
    assert {path.name for path in output.iterdir()} == {"last.pt", "log.jsonl", "recipe.yaml"}
    assert checkpoints.load(output / "last.pt")["step"] == 3

    run(photographs, output, "--save-every", "2")
    run(photographs, tmp_path / "undisturbed", "--save-every", "2")
    for name in ("raw.safetensors", "ema.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert log_of(output) == log_of(tmp_path / "undisturbed")


def test_a_full_disk_leaves_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw.safetensors"
    checkpoints.export(path, {"weight": torch.ones(3)})

    def full(weights: dict[str, Tensor], file: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; .*raw\.safetensors of before is intact"):
        checkpoints.export(path, {"weight": torch.zeros(3)})
    with pytest.raises(
        CheckpointError, match=r"new.safetensors could not be written: \[Errno 28\] No space.*device\.$"
    ):
        checkpoints.export(tmp_path / "new.safetensors", {"weight": torch.zeros(3)})
    assert load_file(path)["weight"].equal(torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw.safetensors"]


@pytest.mark.parametrize("log_every", ["1", "50"])
def test_a_loss_that_is_not_finite_stops_the_run(photographs: Path, tmp_path: Path, log_every: str) -> None:
    """At the step, or before anything is saved."""
    run(photographs, tmp_path, schedule__epochs=1, optimizer__lr=1e30, schedule__warmup_lr=0, schedule__warmup_epochs=1)
    lines = (tmp_path / "log.jsonl").read_text()
    shutil.rmtree(tmp_path)
    assert "NaN" not in lines
    keys: dict[str, object] = {"optimizer__lr": 1e30, "schedule__warmup_lr": 0, "schedule__warmup_epochs": 1}
    more = ["--log-every", log_every, "--save-every", "1"]
    with pytest.raises(RuntimeError, match=r"^Step 5: grad_norm.*loss is not finite. The last checkpoint is intact"):
        run(photographs, tmp_path, *more, **keys)
    content = checkpoints.load(tmp_path / "last.pt")
    assert content["step"] == 4
    assert not (tmp_path / "raw.safetensors").exists()

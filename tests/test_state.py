"""Files are written whole or not at all, and a damaged one is refused with a sentence and left as it is."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from gradreg import RobustnessCurve, RobustnessReport, StateError
from gradreg.state import read_state, write_atomically

CONTENT = {"kind": "a test", "version": 3, "values": [1.5, None, "ε"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    write_atomically(path, json.dumps(CONTENT))
    return path


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestWriting:
    def test_what_is_written_is_read(self, file: Path) -> None:
        assert read_state(file, "a test", 3) == CONTENT
        write_atomically(file, json.dumps({**CONTENT, "values": []}))
        assert read_state(file, "a test", 3)["values"] == []
        assert os.listdir(file.parent) == ["state.json"]

    def test_makes_the_folder(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a" / "b" / "state", "ε")
        assert (tmp_path / "a" / "b" / "state").read_text(encoding="utf-8") == "ε"

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file_and_nothing_else(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        before = file.read_bytes()
        monkeypatch.setattr(os, step, _no_space)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(file, "new")
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == ["state.json"]

    def test_text_that_cannot_be_encoded_leaves_the_old_file(self, file: Path) -> None:
        before = file.read_bytes()
        with pytest.raises(UnicodeEncodeError):
            write_atomically(file, "a" * 100_000 + "\ud800")
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == ["state.json"]

    def test_an_interrupt_leaves_the_old_file(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(descriptor: int) -> None:
            raise KeyboardInterrupt

        before = file.read_bytes()
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, "new")
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == ["state.json"]

    def test_the_bytes_are_on_the_disk_before_the_name_is(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The order without which a power cut may leave an empty file in the place of the old one."""
        steps: list[str] = []
        replace, fsync = os.replace, os.fsync
        monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
        monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle)))
        write_atomically(file, "new")
        assert steps == ["fsync", "replace", "fsync"]

    def test_others_may_read_it_as_they_may_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("")
        write_atomically(tmp_path / "state", "")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "state")]
        assert modes[0] == modes[1]


class TestReading:
    def test_a_file_cut_at_any_length(self, file: Path) -> None:
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            with pytest.raises(StateError, match=r"state\.json is damaged: .*It was not changed"):
                read_state(file, "a test", 3)
            assert file.read_bytes() == whole[:size]

    def test_bytes_that_are_no_text(self, file: Path) -> None:
        file.write_bytes(b"\x80\xff" * 10)
        with pytest.raises(StateError, match="is damaged"):
            read_state(file, "a test", 3)
        assert file.read_bytes() == b"\x80\xff" * 10

    @pytest.mark.parametrize("content", [{**CONTENT, "kind": "another"}, {"version": 3}, [CONTENT], 3, None])
    def test_another_kind(self, file: Path, content: object) -> None:
        file.write_text(json.dumps(content))
        with pytest.raises(StateError, match=r"state\.json is no file of a test"):
            read_state(file, "a test", 3)

    def test_another_version(self, file: Path) -> None:
        with pytest.raises(StateError, match="written in version 3 of its format, and this is version 4"):
            read_state(file, "a test", 4)

    def test_no_file_is_not_a_damaged_one(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_state(tmp_path / "none", "a test", 3)

    def test_reports_and_curves_are_not_taken_for_each_other(self, tmp_path: Path) -> None:
        report = RobustnessReport(["a"], {"clean": "1"}, {"clean": {"seconds": 0.0, "forward": 1, "backward": 0}})
        report.save(tmp_path / "report.json")
        RobustnessCurve(["a"], [0.5], [0.5]).save(tmp_path / "curve.json")
        with pytest.raises(StateError, match=r"report\.json is no file of gradreg robustness curve"):
            RobustnessCurve.load(tmp_path / "report.json")
        with pytest.raises(StateError, match=r"curve\.json is no file of gradreg robustness report"):
            RobustnessReport.load(tmp_path / "curve.json")


def test_a_file_without_its_fields_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"kind": "things", "version": 1, "one": 1}')
    assert read_state(tmp_path / "state.json", "things", 1, ("one",))["one"] == 1
    with pytest.raises(StateError, match="holds no two"):
        read_state(tmp_path / "state.json", "things", 1, ("one", "two"))


def test_others_may_read_it_as_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    write_atomically(tmp_path / "state.json", "{}")
    assert (tmp_path / "state.json").stat().st_mode == (tmp_path / "any").stat().st_mode

"""An evaluation that is killed, or shared by two processes, ends with what one process finds undisturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation_worker import BATCH, CASES, SAMPLES

WORKER = Path(__file__).with_name("evaluation_worker.py")
TOTAL = -(-SAMPLES // BATCH)


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]


def finished_batches(state: Path) -> int:
    return len(json.loads(state.read_text())["batches"]) if state.exists() else 0


class TestKilled:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "log").touch()
        return tmp_path

    def test_at_random_moments_again_and_again(self, folder: Path) -> None:
        """SIGKILL cannot be caught: nothing is done on the way out. The state is whole at every moment."""
        moments = random.Random(0)
        state, log = folder / "state.json", folder / "log"
        done = 0
        for wanted in (2, 5, 8):
            process = start("alone", state, log, folder / "never.json")
            while finished_batches(state) < wanted:
                assert process.poll() is None, process.stderr.read()[-4000:]
                time.sleep(0.002)
            time.sleep(0.05 * moments.random())
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert wanted <= finished_batches(state) < TOTAL
            # What this session attacked was not finished before: all that it finished, and what it was killed in.
            attacked = len(log.read_text().splitlines())
            assert finished_batches(state) - done <= attacked <= finished_batches(state) - done + 1
            done = finished_batches(state)
            log.write_text("")
        finish(start("alone", state, log, folder / "resumed.json"))
        assert len(log.read_text().splitlines()) == TOTAL - done
        assert not (folder / "never.json").exists()

        finish(start("alone", folder / "other.json", log, folder / "undisturbed.json"))
        resumed, undisturbed = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("resumed", "undisturbed")
        )
        assert resumed == undisturbed
        assert len(resumed["samples"]) == SAMPLES
        assert set(resumed["verdicts"]["pgd"]) == set("01-")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank found, for every case, and one process alone; all are started once."""
    output = tmp_path_factory.mktemp("evaluation") / "results.json"
    finish(start("ranks", output))
    return json.loads(output.read_text())


def of_ranks(results: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """What the ranks found; they must have found something."""
    found = [rank[case] for rank in results["ranks"]]
    assert all(isinstance(one, dict) for one in found), found
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("samples", "verdicts", "passes", "flags"):
        assert found[name] == expected[name], name


class TestTwoRanks:
    @pytest.mark.parametrize("case", ["plain", "masking", "generator", "ddp", "one batch"])
    def test_find_what_one_process_finds(self, results: dict[str, Any], case: str) -> None:
        expected = results["alone"][case if case in results["alone"] else "plain"]
        for found in of_ranks(results, case):
            assert_same(found, expected)
        assert len(expected["samples"]) == (BATCH if case == "one batch" else SAMPLES)
        assert len(expected["flags"]) == (8 if case == "masking" else 1)

    def test_share_the_work(self, results: dict[str, Any]) -> None:
        first, second = (found["attacked"] for found in of_ranks(results, "plain"))
        assert len(first) == len(second) == TOTAL / 2
        together = [size for pair in zip(first, second, strict=True) for size in pair]
        assert together == results["alone"]["plain"]["attacked"]
        assert [len(found["attacked"]) for found in of_ranks(results, "one batch")] == [1, 0]

    def test_share_a_curve(self, results: dict[str, Any]) -> None:
        expected = results["alone"]["curve"]
        assert of_ranks(results, "curve") == [expected, expected]
        assert len(set(expected["distances"])) == 5

    def test_share_statistics(self, results: dict[str, Any]) -> None:
        expected = results["alone"]["statistics"]
        assert of_ranks(results, "statistics") == [expected, expected]
        assert len(expected["attacked"]) == len(expected["values"]["Hessian norm"]) == SAMPLES

    def test_show_one_bar(self, results: dict[str, Any]) -> None:
        first, second = (found["shown"] for found in of_ranks(results, "bar"))
        assert f"{TOTAL}/{TOTAL}" in first
        assert second == ""

    def test_go_on_with_what_one_process_began(self, results: dict[str, Any]) -> None:
        found = of_ranks(results, "from one to two")
        for one in found:
            assert_same(one, results["alone"]["plain"])
        assert [len(one["attacked"]) for one in found] == [3, 3]

    def test_go_on_with_what_two_began(self, results: dict[str, Any]) -> None:
        """Rank 1 broke at batch 6, after it had done 1, 3 and 5; rank 0 had done its five."""
        found = of_ranks(results, "from two to two")
        for one in found:
            assert_same(one, results["alone"]["plain"])
        assert [len(one["attacked"]) for one in found] == [0, 2]

    def test_one_process_goes_on_with_what_two_began(self, results: dict[str, Any]) -> None:
        found = results["alone"]["from two to one"]
        assert_same(found, results["alone"]["plain"])
        assert len(found["attacked"]) == 2

    def test_a_rank_that_fails_stops_both(self, results: dict[str, Any]) -> None:
        for case in ("from two to two", "from two to one"):
            first, second = (found["raised"] for found in of_ranks(results, case))
            assert second == "OSError: a damaged file"
            assert first == "RuntimeError: Rank 1 failed, so that this rank stops too: OSError: a damaged file"

    def test_write_a_file_each(self, results: dict[str, Any]) -> None:
        of_each = [f"{name}.rank{rank}.json" for name in ("one", "three", "two") for rank in (0, 1)]
        assert results["alone"]["files"] == sorted(["one.json", "three.json", *of_each])

    @pytest.mark.parametrize(
        ("case", "match"),
        [
            ("other seed", "belongs to another evaluation; these differ:\n  evaluation: recorded"),
            ("different order", "The processes read different data"),
            ("different end", "The processes read different data"),
            ("different label", "The processes read different data"),
            ("sampler", "DistributedSampler, which repeats samples"),
            ("sharded", "Load the full weights into an ordinary model on every rank"),
        ],
    )
    def test_are_refused(self, results: dict[str, Any], case: str, match: str) -> None:
        for rank in results["ranks"]:
            if case == "sharded" and "'Stream' object has no attribute 'record_event'" in str(rank[case]):
                pytest.skip("fully_shard of this torch does not run on a CPU")
            assert isinstance(rank[case], str), rank[case]
            assert match in rank[case]

    def test_every_case_was_looked_at(self, results: dict[str, Any]) -> None:
        assert [list(rank) for rank in results["ranks"]] == [list(CASES)] * 2

"""A disk that refuses a checkpoint: the training goes on without it, and ends where that would be no use."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpt.reporting.summary import summarise
from mpt.running import checkpoints
from mpt.running.run_directory import RunDirectory
from tests.training.tiny_runs import Run, tiny_recipe

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]

MIB = 2**20
# A checkpoint of the tiny run takes 1.9 MiB.
ROOM_FOR_ONE = 3 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint, and a file `filler` that takes the rest of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this environment may not mount: {done.stderr.strip()}")
    folder.joinpath("filler").write_bytes(bytes(32 * MIB - ROOM_FOR_ONE))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def run_on(disk: Path, save_steps: int, fault: dict[str, Any] | None = None) -> Run:
    return Run(RunDirectory(disk / "run"), tiny_recipe(training={"save_steps": save_steps}), fault)


def failures(run: Run) -> list[tuple[int, int]]:
    """Which steps could not be saved, each with the failures in a row."""
    return [(event["step"], event["in_a_row"]) for event in run.events if event["kind"] == "save_failed"]


def saved(run: Run) -> list[int]:
    """Which checkpoints are there; each is whole, and nothing half-written is."""
    listed = checkpoints.list_checkpoints(run.directory)
    assert [checkpoints.verify(path) for _, path in listed] == [None] * len(listed)
    assert sorted(run.directory.checkpoints.iterdir()) == sorted(path for _, path in listed)
    return [step for step, _ in listed]


def two_ranks(strategy: str, fault: dict[str, Any], new_run: MakeRun) -> Run:
    run = new_run(
        distributed={"strategy": strategy, "processes_per_node": 2}, micro_batch_size=4, training={"save_steps": 2}
    )
    run.fault = {"on_rank": 1} | fault
    return run


@pytest.mark.fault(15)
def test_the_training_goes_on_while_a_disk_is_full_and_saves_again_when_it_is_not(
    small_disk: Path, fp32_run: Run
) -> None:
    filler = small_disk / "filler"
    run = run_on(small_disk, 2, {"waits_at": 5, "for": str(filler)})
    run.prepare()
    process = run.start()
    while not failures(run):
        assert process.poll() is None, run.log()
        time.sleep(0.02)
    assert saved(run) == [2]
    filler.unlink()
    assert process.wait(timeout=200) == 0, run.log()
    assert failures(run) == [(4, 1)]
    assert f"{run.directory.checkpoints} can't be written" in run.texts("save_failed", "problem")[0]
    assert saved(run) == run.texts("checkpoint_saved", "step") == [2, 6, 8]
    assert summarise(run.directory)["incidents"] == 1
    assert run.trajectory == fp32_run.trajectory


@pytest.mark.fault(15)
def test_the_third_failed_save_in_a_row_ends_the_run_and_the_older_checkpoint_is_whole(small_disk: Path) -> None:
    run = run_on(small_disk, 1)
    assert run.train() == 83, run.log()
    assert failures(run) == [(2, 1), (3, 2), (4, 3)]
    word = run.last_word()
    assert (word["kind"], word["exit_code"]) == ("failed", 83)
    assert "3 saves in a row have failed" in word["problem"]
    assert saved(run) == [1]
    assert max(run.steps) == 4


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("strategy", "limit"),
    [
        ("ddp", 8192),  # less than a rank's random state
        ("zero3", 131072),  # less than its share of the optimizer's, and more than what the worker has logged
    ],
)
def test_no_rank_waits_for_one_that_can_not_write(strategy: str, limit: int, new_run: MakeRun) -> None:
    run = two_ranks(strategy, {"file_limit": limit, "at": {"2": 2, "4": 1}}, new_run)
    assert run.train(processes=2) == 0, run.log()
    assert failures(run) == [(2, 1)]
    assert saved(run) == [4, 6, 8]  # the second try for step 4 had room


def test_a_stop_that_can_not_be_saved_is_no_stop(new_run: MakeRun) -> None:
    run = new_run()
    run.fault = {"file_limit": 600 * 1024, "at": {"1": 2}, "on_rank": 0}  # optimizer.pt takes twice that
    run.prepare()
    run.directory.attempt(1).stop.touch()
    assert run.start().wait(timeout=200) == 83, run.log()
    assert run.last_word()["kind"] == "failed"
    assert saved(run) == []

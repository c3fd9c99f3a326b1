"""How long the supervisor waits for a worker; what it makes of several last words, unwritable places and lost files."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mpt.reporting.live import live_view
from mpt.reporting.summary import summarise
from mpt.running import attempt
from mpt.running.journal import read_events
from mpt.running.launcher import build_command
from mpt.running.opening import opened
from mpt.running.recovery import Outcome, Stop
from mpt.running.run_directory import RunDirectory
from mpt.running.signals import StopWish
from mpt.running.supervisor import supervise
from tests.running.small_runs import small_plan
from tests.running.small_train import WORKER


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "small")


def carry_out(run: RunDirectory, worker: tuple[str, ...] = WORKER, wish: StopWish | None = None, **wishes: Any) -> Stop:
    """Supervise a small worker in this process."""
    plan = small_plan(max_restarts=0)
    environment = {**os.environ, "SMALL_WORKER": json.dumps(wishes), "PYTHONPATH": str(Path(__file__).parents[2])}
    build = partial(build_command, worker=worker)
    with (
        opened(plan, run, resume="auto", accept_changes=False) as found,
        live_view(io.StringIO()) as view,
        ended_at_last(run),
    ):
        return supervise(plan, run, view, wish or StopWish(), environment, start_from=found.start_from, build=build)


@contextmanager
def ended_at_last(run: RunDirectory) -> Iterator[None]:
    """Whatever happened, no process of the run is left."""
    yield
    for process in Path("/proc").iterdir():
        try:
            command = process.joinpath("cmdline").read_bytes().split(b"\0") if process.name.isdecimal() else []
        except OSError:
            continue
        assert str(run.path).encode() not in command, command


def script(text: str) -> tuple[str, ...]:
    """A worker of a few lines, with the run's directory and the attempt's journal at hand."""
    head = (
        "import os, sys, time, shutil\nfrom pathlib import Path\n"
        "from mpt.running.run_directory import RunDirectory\nfrom mpt.running.journal import Journal\n"
        "run = RunDirectory(Path(sys.argv[1]))\njournal = Journal(run.journal, int(sys.argv[2]))\n"
    )
    return (sys.executable, "-c", head + text)


def test_a_worker_that_does_not_leave_after_its_last_word_is_ended(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "LEAVING_S", 0.3)
    assert carry_out(run, leave_s=300).outcome is Outcome.FINISHED
    ended = next(event for event in read_events(run.journal) if event["kind"] == "attempt_ended")
    assert (ended["returncode"], ended["verdict"]) == (-signal.SIGKILL, "finished")


@pytest.mark.fault(7)
def test_a_worker_that_does_not_stop_in_time_is_ended_and_the_reason_is_given(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "STOP_GRACE_S", 0.5)
    wish = StopWish(is_immediate=False)
    read = attempt.LineFollower.new

    def wish_at_step_seven(follower: attempt.LineFollower) -> Iterator[dict[str, Any]]:
        for line in read(follower):
            if line.get("step") == 7 and wish.signal is None:
                wish.on_signal(signal.SIGTERM, None)
            yield line

    monkeypatch.setattr(attempt.LineFollower, "new", wish_at_step_seven)
    stop = carry_out(run, wish=wish, ignore_stop=True, steps=10_000, step_s=0.05)
    assert (stop.outcome, stop.exit_code) == (Outcome.STOPPED, 143)
    assert "was ended" in stop.reason
    assert "goes on from the last checkpoint" in stop.remedy


def test_a_wish_before_the_first_attempt_starts_no_worker(run: RunDirectory) -> None:
    wish = StopWish(signal=signal.SIGINT, is_immediate=False)
    stop = carry_out(run, wish=wish)
    assert (stop.outcome, stop.exit_code) == (Outcome.STOPPED, 130)
    assert run.attempt_numbers() == []
    assert summarise(run)["outcome"] == "stopped"


def test_the_first_last_word_wins(run: RunDirectory) -> None:
    worker = script(
        "journal.append('failed', problem='the cause', remedy='Mend it.', exit_code=2)\n"
        "journal.append('failed', problem='connection reset by peer', remedy='', exit_code=1)\n"
        "journal.append('finished', step=1, train_loss=1.0, eval_loss=None)\n"
    )
    stop = carry_out(run, worker)
    assert (stop.outcome, stop.exit_code, stop.reason) == (Outcome.FAILED, 2, "the cause")
    assert summarise(run)["outcome"] == "failed"


@pytest.mark.parametrize("place", ["attempts", "attempts/001", "attempts/001/worker.log"])
def test_an_attempt_that_can_not_be_written_ends_the_run_with_83(run: RunDirectory, place: str) -> None:
    path = run.path / place
    if place.endswith(".log"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True)
        path.write_text("a file")
    stop = carry_out(run)
    assert (stop.outcome, stop.exit_code) == (Outcome.FAILED, 83)
    assert place in stop.reason
    assert read_events(run.journal)[-1]["exit_code"] == 83


def test_a_run_whose_directory_is_deleted_under_it_ends_with_83_and_its_worker_with_it(run: RunDirectory) -> None:
    worker = script("shutil.rmtree(run.path)\n")
    stop = carry_out(run, worker)
    assert stop.outcome is Outcome.FAILED
    assert stop.exit_code in (82, 83)
    shutil.rmtree(run.path, ignore_errors=True)


def test_a_worker_that_fills_the_journal_with_rubbish_ends_the_run_with_83(run: RunDirectory) -> None:
    worker = script("run.journal.write_bytes(b'rubbish\\n' * 3)\ntime.sleep(0.3)\n")
    stop = carry_out(run, worker)
    assert (stop.outcome, stop.exit_code) == (Outcome.FAILED, 83)
    assert "journal.jsonl:1" in stop.reason

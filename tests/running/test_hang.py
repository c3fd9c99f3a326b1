"""A rank that falls silent is found out by what it was doing, its stacks are kept, and the run goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.recipe.schema import RestartSection
from mpt.running.hang import LONGEST_LOOK_S, HangWatch, limit_for
from mpt.running.heartbeat import LINE_BYTES, Beat, Heartbeat, read_beat
from mpt.running.run_directory import AttemptDirectory
from mpt.running.stacks import GONE, STOPPED, collect_stacks
from tests.running.small_runs import ROOT, SmallRun, wait, wait_until, workers_of

NewRun = Callable[..., SmallRun]


# --- limits


@pytest.mark.parametrize(
    ("kind", "seen", "limit"),
    [
        ("step", 0.0, 600),
        ("step", 120.0, 600),
        ("step", 121.0, 605),
        ("first_step", 0.0, 1800),
        ("first_step", 600.0, 3000),
        ("loading", 0.0, 7200),
        ("loading", 2000.0, 10_000),
        ("saving", 0.0, 1800),
        ("saving", 400.0, 2000),
        ("evaluating", 0.0, 1800),
        ("sampling", 361.0, 1805),
        ("a phase of tomorrow", 0.0, 1800),
    ],
)
def test_a_limit_is_a_floor_or_five_times_the_longest_silence_of_its_kind(kind: str, seen: float, limit: float) -> None:
    others = dict.fromkeys(("step", "first_step", "loading", "saving", "evaluating", "sampling"), 1e6)
    others.pop(kind, None)
    assert limit_for(kind, others | {kind: seen}, RestartSection()) == limit


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("step_timeout", "step"),
        ("first_step_timeout", "first_step"),
        ("loading_timeout", "loading"),
        ("phase_timeout", "saving"),
    ],
)
def test_a_limit_is_the_recipe_s_and_zero_is_none(key: str, kind: str) -> None:
    policy = RestartSection.model_validate({key: "90s"})
    assert limit_for(kind, {}, policy) == 90
    assert limit_for(kind, {kind: 1e9}, RestartSection.model_validate({key: 0})) is None


# --- silence, by a clock of our own


class Watched:
    """Two ranks whose heartbeats are looked at once a second, by a clock that is turned by hand."""

    def __init__(self, folder: Path) -> None:
        self.files = AttemptDirectory(folder)
        self.ranks = [Heartbeat(self.files, rank) for rank in (0, 1)]
        self.now = 100.0
        policy = RestartSection(step_timeout=10, first_step_timeout=30, loading_timeout=60, phase_timeout=20)
        self.watch = HangWatch(self.files, 2, policy, {}, self.now)

    def silent_until_hung(self, of: int = 200) -> int | None:
        """Let seconds go by; give the number after which a hang was seen."""
        for second in range(of):
            self.now += 1
            if self.watch.look(self.now) is not None:
                return second
        return None

    def both(self, act: Callable[[Heartbeat], None]) -> None:
        for rank in self.ranks:
            act(rank)


@pytest.mark.parametrize(
    ("acts", "seconds"),
    [
        ([], 61),  # the first look sees the first beat
        ([lambda beat: beat.phase("model")], 60),
        ([lambda beat: beat.phase("training")], 30),
        ([lambda beat: beat.step(1)], 30),
        ([lambda beat: beat.step(1), lambda beat: beat.step(2)], 10),
        ([lambda beat: beat.step(7), lambda beat: beat.step(8), lambda beat: beat.phase("saving")], 20),
        ([lambda beat: beat.step(7), lambda beat: beat.step(8), lambda beat: beat.phase("evaluating")], 20),
    ],
)
def test_the_limit_is_that_of_what_the_ranks_do(
    tmp_path: Path, acts: list[Callable[[Heartbeat], None]], seconds: int
) -> None:
    watched = Watched(tmp_path)
    for act in acts:
        watched.both(act)
        watched.watch.look(watched.now)
    assert watched.silent_until_hung() == seconds


def test_the_rank_that_fell_silent_first_is_named_first(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in (1, 2):
        watched.both(lambda beat, number=number: beat.step(number))  # type: ignore[misc]
        watched.watch.look(watched.now)
    watched.now += 1
    watched.ranks[0].step(3)
    assert watched.watch.look(watched.now) is None
    assert watched.silent_until_hung() == 9
    hang = watched.watch.look(watched.now + 1)
    assert hang is not None
    assert (hang.phase, hang.step, hang.ranks, hang.limit_s) == ("training", 2, (1, 0), 10)
    assert str(hang).startswith("ranks 0, 1 hung while training at step 2")


def test_a_slow_step_makes_the_run_patient(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in (1, 2):
        watched.both(lambda beat, number=number: beat.step(number))  # type: ignore[misc]
        watched.watch.look(watched.now)
    assert watched.silent_until_hung(9) is None
    watched.both(lambda beat: beat.beat())
    assert watched.silent_until_hung() == 51  # five times the ten seconds, after the look that saw the beat
    assert watched.watch.seen["step"] == 10


def test_time_in_which_the_supervisor_itself_stood_still_is_nobody_s_silence(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for number in (1, 2):
        watched.both(lambda beat, number=number: beat.step(number))  # type: ignore[misc]
        watched.watch.look(watched.now)
    assert watched.watch.look(watched.now + 1e6) is None
    assert watched.watch.known[0].silent_s == LONGEST_LOOK_S


def test_a_rank_without_a_heartbeat_is_loading(tmp_path: Path) -> None:
    watch = HangWatch(AttemptDirectory(tmp_path), 1, RestartSection(loading_timeout=2), {}, 0.0)
    assert [watch.look(now) for now in (1.0, 2.0)] == [None, None]
    hang = watch.look(3.0)
    assert hang is not None
    assert (hang.phase, hang.ranks) == ("starting", (0,))


# --- the file


def test_a_heartbeat_is_one_line_of_a_fixed_length_however_often_it_is_written(tmp_path: Path) -> None:
    files = AttemptDirectory(tmp_path)
    beat = Heartbeat(files, 3)
    for number in range(1, 100_001, 9999):
        beat.step(number)
    beat.phase("evaluating")
    assert files.heartbeat(3).stat().st_size == LINE_BYTES
    assert read_beat(files.heartbeat(3)) == Beat("evaluating", 99_991, 11, 13, os.getpid())


@pytest.mark.parametrize("text", ["", "{", '{"phase": "x"}', "[]", "null", "\x00" * 128])
def test_a_heartbeat_that_can_not_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "beat").write_text(text)
    assert read_beat(tmp_path / "beat") is None
    assert read_beat(tmp_path / "nothing") is None


def test_a_heartbeat_that_can_not_be_written_is_no_trouble(tmp_path: Path) -> None:
    Heartbeat(AttemptDirectory(tmp_path / "nowhere"), 0).step(1)


# --- stacks

SLEEPER = """
import sys, time
from pathlib import Path
from mpt.running.run_directory import AttemptDirectory
from mpt.running.stacks import answer_with_stacks
answer_with_stacks(AttemptDirectory(Path(sys.argv[1])), int(sys.argv[2]))
def where_it_waits():
    print("ready", flush=True)
    time.sleep(300)
where_it_waits()
"""


def sleeper(folder: Path, rank: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLEEPER, str(folder), str(rank)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_every_rank_that_can_answer_says_where_it_stands(tmp_path: Path) -> None:
    files = AttemptDirectory(tmp_path)
    processes = [sleeper(tmp_path, rank) for rank in (0, 1)]
    pids = {rank: process.pid for rank, process in enumerate(processes)}
    try:
        processes[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: " T " in Path(f"/proc/{pids[1]}/stat").read_text())
        stranger = os.getpid()  # a pid that was given to somebody else meanwhile must not be signalled
        said = collect_stacks(files, {**pids, 2: stranger}, pids.values())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said == {0: "stacks-0.txt", 1: STOPPED, 2: GONE}
    assert "where_it_waits" in files.stacks(0).read_text()


# --- whole runs


def hangs_of(run: SmallRun) -> list[dict[str, Any]]:
    return [event for event in run.events if event["kind"] == "hang"]


@pytest.mark.fault(9)
@pytest.mark.fault(10)
@pytest.mark.parametrize(("do", "answer"), [("sleep", "stacks-0.txt"), ("stop_itself", STOPPED)])
def test_a_worker_that_hangs_in_a_step_is_ended_and_the_run_goes_on(
    new_run: NewRun, undisturbed: str, do: str, answer: str
) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 7, "do": do}])
    ended = run.train("step_timeout=1")
    assert (ended.code, ended.summary["attempts"]) == (0, 2), ended.err
    (hang,) = hangs_of(run)
    assert (hang["phase"], hang["step"], hang["ranks"], hang["stacks"]) == ("training", 7, [0], {"0": answer})
    assert hang["silent_s"] > hang["limit_s"] >= 1
    stacks = run.directory.attempt(1).stacks(0)
    assert stacks.exists() == (do == "sleep")
    if do == "sleep":
        assert "small_worker.py" in stacks.read_text()
    assert "rank 0 hung while training at step 7" in ended.err
    assert not run.directory.attempt(2).stacks(0).exists()
    assert not workers_of(run)
    assert run.state == undisturbed
    # The time lost began with the last sign of life.
    (seconds,) = run.kinds("recovered", "seconds")
    assert seconds > hang["silent_s"]


@pytest.mark.fault(10)
def test_a_save_that_takes_longer_than_a_step_may_is_no_hang(new_run: NewRun) -> None:
    run = new_run(save_s=2.0, steps=10)
    assert run.train("step_timeout=1").code == 0
    assert hangs_of(run) == []
    assert len(run.directory.attempt_numbers()) == 1


def test_a_save_that_never_ends_is_one(new_run: NewRun) -> None:
    run = new_run(save_s=300, steps=10)
    ended = run.train("phase_timeout=1", "max_restarts=0")
    assert (ended.code, ended.summary["outcome"]) == (87, "failed")
    assert [(hang["phase"], hang["step"]) for hang in hangs_of(run)] == [("saving", 5)]


def test_hanging_again_and_again_ends_the_run_with_87(new_run: NewRun) -> None:
    run = new_run(faults=[{"step": 7, "do": "sleep"}])
    ended = run.train("step_timeout=0.5", "backoff=0")
    assert ended.code == 87
    assert len(hangs_of(run)) == 4  # the first attempt came to step 5, three more came no further
    assert run.kinds("run_finished", "exit_code") == [87]


def test_a_stop_that_meets_a_hang_ends(new_run: NewRun) -> None:
    run = new_run(faults=[{"step": 7, "do": "sleep"}])
    process = run.start("step_timeout=2")
    wait_until(lambda: run.steps >= 6)
    process.send_signal(signal.SIGTERM)
    ended = wait(process)
    assert (ended.code, ended.summary["outcome"], ended.summary["attempts"]) == (143, "stopped", 1)
    assert "while it was stopping: rank 0 hung" in ended.err


@pytest.mark.slow
@pytest.mark.fault(9)
def test_one_of_two_ranks_stopped_is_named_and_both_are_ended(new_run: NewRun) -> None:
    """Through the real torchrun."""
    run = new_run(step_s=0.1, steps=60, faults=[{"attempt": 1, "step": 8, "rank": 1, "do": "stop_itself"}])
    ended = run.train("processes=2", "step_timeout=1", "phase_timeout=300", timeout=200)
    assert (ended.code, ended.summary["attempts"]) == (0, 2), ended.err
    (hang,) = hangs_of(run)
    assert (hang["step"], hang["ranks"]) == (8, [1])
    assert hang["stacks"]["1"] == STOPPED
    assert not workers_of(run)

"""What the supervisor changes, counts and measures when a run breaks again and again."""

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.running.small_runs import SmallRun, wait, wait_until

NewRun = Callable[..., SmallRun]
NEEDS_MEMORY = [{"step": 7, "do": "need_memory"}]  # at a micro batch above 2, in every attempt


def micro_batches(run: SmallRun) -> list[tuple[int, int]]:
    """Micro batch and accumulation of each attempt."""
    found = []
    for number in run.directory.attempt_numbers():
        values = json.loads(run.directory.attempt(number).plan.read_text())["values"]
        found.append((values["micro_batch_size"]["value"], values["gradient_accumulation_steps"]["value"]))
    return found


# --- memory


@pytest.mark.fault(29)
def test_too_little_memory_halves_the_micro_batch_until_it_fits(new_run: NewRun) -> None:
    run = new_run(faults=NEEDS_MEMORY)
    ended = run.train("micro_batch_size=8", "max_attempts_without_progress=1")
    assert (ended.code, ended.summary["attempts"]) == (0, 3), ended.err
    assert micro_batches(run) == [(8, 1), (4, 2), (2, 4)]
    assert run.kinds("plan_changed", "changes")[0] == [
        {"key": "micro_batch_size", "was": 8, "now": 4},
        {"key": "gradient_accumulation_steps", "was": 1, "now": 2},
    ]
    assert run.kinds("plan_changed", "reason") == ["out of memory: 8", "out of memory: 4"]
    assert "micro_batch_size 8 -> 4" in ended.err
    assert run.kinds("attempt_started", "resume_from") == [None, "checkpoint-5", "checkpoint-5"]


def test_a_supervisor_that_is_killed_goes_on_with_the_changed_plan(new_run: NewRun) -> None:
    run = new_run(faults=NEEDS_MEMORY, step_s=0.1)
    process = run.start("micro_batch_size=4")
    wait_until(lambda: run.steps >= 9)
    process.kill()
    wait(process)
    ended = run.train("micro_batch_size=4")
    assert ended.code == 0, ended.err
    assert micro_batches(run) == [(4, 1), (2, 2), (2, 2)]
    assert run.kinds("changes_accepted", "changes") == []
    assert run.train("micro_batch_size=4").code == 0  # it had finished
    assert len(micro_batches(run)) == 3


def test_a_change_that_was_journalled_and_not_yet_tried_is_not_lost(new_run: NewRun) -> None:
    run = new_run(faults=NEEDS_MEMORY)
    process = run.start("micro_batch_size=4")
    wait_until(lambda: bool(run.directory.journal.exists() and run.kinds("plan_changed", "reason")))
    process.kill()
    wait(process)
    assert run.train("micro_batch_size=4").code == 0
    assert micro_batches(run)[0] == (4, 1)
    assert set(micro_batches(run)[1:]) == {(2, 2)}


def test_a_batch_that_the_user_sets_anew_is_taken(new_run: NewRun) -> None:
    run = new_run(faults=[*NEEDS_MEMORY, {"attempt": 2, "step": 13, "do": "2"}])
    assert run.train("micro_batch_size=4").code == 2
    run.wishes = {}
    assert run.train("micro_batch_size=6").code == 2
    assert run.train("micro_batch_size=6", "accept").code == 0
    assert micro_batches(run) == [(4, 1), (2, 2), (6, 1)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["micro_batch_size=1"], "the micro batch is 1"),
        (["micro_batch_size=4", "halve_micro_batch=false"], "restart allows no smaller micro batch"),
        (["micro_batch_size=4", "max_restarts=0"], "restart allows no smaller micro batch"),
    ],
)
def test_too_little_memory_at_the_last_is_86(new_run: NewRun, changes: list[str], why: str) -> None:
    run = new_run(faults=[{"step": 7, "do": "86"}])
    ended = run.train(*changes)
    assert (ended.code, ended.summary["attempts"]) == (86, 1)
    assert why in ended.err


# --- progress


@pytest.mark.fault(13)
def test_three_attempts_that_come_no_further_end_the_run_whatever_the_budget(new_run: NewRun) -> None:
    run = new_run(faults=[{"step": 7, "do": "raise"}])
    ended = run.train("max_restarts=100", "backoff=0")
    assert (ended.code, ended.summary["attempts"]) == (82, 4)  # the first came from 0 to 5
    assert "ValueError: odd; 3 attempts in a row saved no newer checkpoint" in ended.err


def test_attempts_that_come_further_may_go_on_for_long(new_run: NewRun) -> None:
    crashes = [{"attempt": number, "step": 5 * number + 1, "do": "raise"} for number in range(1, 7)]
    run = new_run(steps=40, faults=crashes)
    ended = run.train("max_restarts=100", "max_attempts_without_progress=1", "backoff=1h")
    assert (ended.code, ended.summary["attempts"]) == (0, 7)


def test_the_time_from_a_fault_to_the_next_step_is_journalled_and_shown(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 7, "do": "kill"}])
    ended = run.train()
    (event,) = [event for event in run.events if event["kind"] == "recovered"]
    assert (event["from_attempt"], event["attempt"], event["step"]) == (1, 2, 6)
    assert event["seconds"] > 0
    assert "step 6  the first after attempt 1 broke" in ended.err


# --- the first cause


@pytest.mark.slow
@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("do", "reason"), [("exit", "rank 1 died without a last word (exit status 17)"), ("raise", "ValueError: odd")]
)
def test_the_rank_that_failed_is_the_cause_and_not_its_peer(new_run: NewRun, do: str, reason: str) -> None:
    """Rank 0 notices its peer's end and says so before it dies too, as one that waits in a collective does."""
    faults: list[dict[str, Any]] = [
        {"attempt": 1, "step": 8, "rank": 1, "do": do},
        {"attempt": 1, "step": 8, "rank": 0, "do": "lose_peer"},
    ]
    run = new_run(step_s=0.05, faults=faults)
    ended = run.train("processes=2", "max_restarts=0", timeout=200)
    assert ended.code == 82
    assert run.kinds("attempt_ended", "reason")[0].startswith(reason)
    assert reason in ended.err


# --- the time that is left


@pytest.mark.parametrize("of", ["recipe", "slurm"])
def test_the_run_saves_and_ends_while_there_is_time(new_run: NewRun, of: str) -> None:
    run = new_run(steps=100_000, step_s=0.02)
    changes = ["stop_before=1h"]
    if of == "recipe":
        changes.append("time_limit=3603")
    else:
        run.environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 3604)}
    ended = run.train(*changes)
    assert (ended.code, ended.summary["outcome"]) == (80, "stopped"), ended.err
    assert run.kinds("stopped", "checkpoint") == [f"checkpoint-{ended.summary['steps']}"]
    assert "3600 s are left" in run.kinds("stop_requested", "by")[0]


def test_a_second_signal_after_the_time_is_up_ends_at_once(new_run: NewRun) -> None:
    run = new_run(steps=100_000, step_s=0.02, ignore_stop=True)
    process = run.start("stop_before=1h", "time_limit=3602")
    wait_until(lambda: bool(run.directory.journal.exists() and run.kinds("stop_requested", "by")))
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    assert wait(process).code == 143


def test_where_no_end_is_known_that_is_said(new_run: NewRun) -> None:
    ended = new_run().train("stop_before=1h")
    assert ended.code == 0
    assert "restart.stop_before has nothing to go by" in ended.err

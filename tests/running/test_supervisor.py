"""Whatever befalls the worker, the run ends where an uninterrupted one ends, or says why not."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running.small_runs import SmallRun, is_alive, wait, wait_until, workers_of

NewRun = Callable[..., SmallRun]


def test_a_run_leaves_everything_in_its_directory(new_run: NewRun) -> None:
    run = new_run()
    ended = run.train()
    assert (ended.code, ended.summary["outcome"], ended.summary["steps"]) == (0, "finished", 20)
    assert (ended.summary["attempts"], ended.summary["incidents"]) == (1, 0)
    folder = run.directory
    files = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "machine.json", "journal.jsonl", "metrics.jsonl", "lock", "final/state"} <= files
    assert {f"attempts/001/{name}" for name in ("plan.json", "command.txt", "worker.log")} <= files
    assert run.checkpoints == ["checkpoint-10", "checkpoint-15", "checkpoint-20", "checkpoint-5"]
    assert [event["kind"] for event in run.events][:2] == ["run_created", "attempt_started"]
    assert run.kinds("run_finished", "exit_code") == [0]
    assert run.kinds("attempt_ended", "verdict") == ["finished"]


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("do", "step"), [*(("kill", step) for step in (0, 1, 5, 6, 13, 20)), ("exit", 6), ("raise", 6), ("exit", 0)]
)
def test_a_crash_at_any_step_is_made_good(new_run: NewRun, undisturbed: str, do: str, step: int) -> None:
    run = new_run(faults=[{"attempt": 1, "step": step, "do": do}])
    ended = run.train()
    assert (ended.code, ended.summary["attempts"], ended.summary["incidents"]) == (0, 2, 1)
    assert run.state == undisturbed
    saved = (step - 1) // 5 * 5
    expected = f"checkpoint-{saved}" if saved > 0 else None
    assert run.kinds("attempt_started", "resume_from") == [None, expected]
    plan = json.loads(run.directory.attempt(2).plan.read_text())
    assert plan["resume_from"] == expected
    # What the second attempt did differently is the difference between the two plans.
    first = json.loads(run.directory.attempt(1).plan.read_text())
    assert plan | {"resume_from": None} == first


def test_a_crash_in_every_attempt_spends_the_budget(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": n, "step": 7, "do": "exit"} for n in range(1, 9)])
    ended = run.train("max_restarts=2")
    assert ended.code == 82
    assert (ended.summary["outcome"], ended.summary["attempts"]) == ("failed", 3)
    assert "max_restarts is 2" in ended.err
    assert "the last thing it said" in ended.err
    assert str(run.directory.attempt(3).log) in ended.err
    run.wishes = {}
    assert run.train("max_restarts=2").code == 0  # the same command goes on


@pytest.mark.fault(14)
def test_a_crash_before_the_first_checkpoint_begins_again_within_the_budget(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": n, "step": 2, "do": "kill"} for n in range(1, 9)])
    assert run.train("max_restarts=1").code == 82
    assert run.kinds("attempt_started", "resume_from") == [None, None]


@pytest.mark.parametrize("code", [2, 3, 83, 84, 86])
def test_what_would_fail_again_is_not_tried_again(new_run: NewRun, code: int) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 7, "do": str(code)}])
    ended = run.train()
    assert (ended.code, ended.summary["outcome"], ended.summary["attempts"]) == (code, "failed", 1)
    assert f"a problem {code}" in ended.err
    assert "Mend it." in ended.err


def test_divergence_ends_the_run_with_its_own_code(new_run: NewRun) -> None:
    ended = new_run(faults=[{"attempt": 1, "step": 7, "do": "diverge"}]).train("recovery={rungs: []}")
    assert (ended.code, ended.summary["outcome"], ended.summary["attempts"]) == (81, "diverged", 1)
    assert "loss is nan, for 3 steps in a row (step 7, N2)" in ended.err


def test_a_worker_that_does_not_leave_after_its_last_word_is_ended(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(leave_s=300)
    process = run.start()
    wait_until(lambda: bool(run.kinds("finished", "step")))
    (worker,) = workers_of(run)
    os.kill(worker, signal.SIGKILL)  # instead of waiting out the minute that it is given
    assert wait(process).code == 0


@pytest.mark.fault(3)
def test_the_supervisor_killed_at_any_moment_takes_its_workers_along_and_the_run_goes_on(
    new_run: NewRun, undisturbed: str
) -> None:
    run = new_run(step_s=0.03)
    for after_rows in (1, 4, 9, 14):
        process = run.start()
        wait_until(lambda: run.steps >= after_rows)  # noqa: B023
        process.kill()
        wait(process)
        wait_until(lambda: not workers_of(run), timeout=5)
    assert run.train().code == 0
    assert run.state == undisturbed
    summary = run.train().summary
    assert (summary["outcome"], summary["steps"]) == ("finished", 20)


def test_a_child_that_outlives_its_worker_is_ended_too(new_run: NewRun, undisturbed: str) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 7, "do": "leave_an_orphan"}])
    assert run.train().code == 0
    assert not is_alive(int(run.directory.path.joinpath("orphan").read_text()))
    assert run.state == undisturbed


@pytest.mark.fault(31)
def test_a_second_supervisor_is_refused_and_does_not_disturb(new_run: NewRun, undisturbed: str) -> None:
    run = new_run(step_s=0.1)
    first = run.start()
    wait_until(lambda: run.steps > 0)
    second = run.train()
    assert second.code == 85
    assert f"process {first.pid} on" in second.err
    assert wait(first).code == 0
    assert run.state == undisturbed


@pytest.mark.fault(17)
@pytest.mark.fault(20)
@pytest.mark.parametrize("target", ["state", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_put_away(new_run: NewRun, undisturbed: str, target: str) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "2"}])
    assert run.train().code == 2
    run.directory.checkpoints.joinpath("checkpoint-10", target).write_text("x")
    run.wishes = {}
    ended = run.train()
    assert (ended.code, ended.summary["incidents"]) == (0, 1)
    assert "checkpoint-10 is not used" in ended.err
    assert run.kinds("attempt_started", "resume_from") == [None, "checkpoint-5"]
    assert run.kinds("checkpoint_passed_over", "name") == ["checkpoint-10"]
    assert "quarantine-1" in run.checkpoints
    assert run.state == undisturbed


@pytest.mark.fault(21)
def test_when_no_checkpoint_is_usable_the_run_does_not_begin_anew_by_itself(new_run: NewRun, undisturbed: str) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "2"}])
    run.train()
    for name in ("checkpoint-5", "checkpoint-10"):
        run.directory.checkpoints.joinpath(name, "state").unlink()
    run.wishes = {}
    refused = run.train()
    assert refused.code == 84
    assert "checkpoint-5: state is missing" in refused.err
    assert run.kinds("attempt_started", "resume_from") == [None]
    assert run.train(resume="never").code == 0
    assert run.state == undisturbed
    assert (run.runs_dir / "small.old-1" / "journal.jsonl").exists()


@pytest.mark.fault(21)
def test_checkpoints_that_go_bad_while_the_run_goes_on_end_it_with_84(new_run: NewRun) -> None:
    run = new_run(step_s=0.05, faults=[{"attempt": 1, "step": 20, "do": "kill"}])
    process = run.start()
    wait_until(lambda: run.steps >= 17)
    for path in run.directory.checkpoints.glob("checkpoint-*/state"):
        path.write_text("x")
    ended = wait(process)
    assert (ended.code, ended.summary["outcome"]) == (84, "failed")
    assert run.kinds("run_finished", "exit_code") == [84]


def test_a_finished_run_is_left_alone(new_run: NewRun) -> None:
    run = new_run()
    first = run.train()
    journal = run.directory.journal.read_bytes()
    again = run.train()
    assert again.code == 0
    assert again.summary == first.summary
    assert run.directory.journal.read_bytes() == journal


@pytest.mark.fault(32)
def test_other_values_are_refused_with_the_differences_listed(new_run: NewRun) -> None:
    run = new_run()
    run.train()
    before = {path: path.read_bytes() for path in run.directory.path.rglob("*") if path.is_file()}
    refused = run.train("max_steps=30")
    assert refused.code == 2
    assert "training.max_steps: 20 -> 30" in refused.err
    assert refused.err.count("max_steps") == 1
    lock = run.directory.lock
    after = {path: path.read_bytes() for path in run.directory.path.rglob("*") if path.is_file()}
    assert after | {lock: b""} == before | {lock: b""}


@pytest.mark.fault(32)
def test_accepted_changes_are_journalled_and_the_run_goes_on_under_them(new_run: NewRun) -> None:
    run = new_run()
    run.train()
    run.wishes = {"steps": 30, "faults": [{"attempt": 2, "step": 27, "do": "2"}]}
    assert run.train("max_steps=30", "accept").code == 2
    changes = run.kinds("changes_accepted", "changes")
    assert changes == [[{"key": "training.max_steps", "was": 20, "now": 30}]]
    assert "max_steps: 30" in run.directory.recipe.read_text()
    run.wishes = {"steps": 30}
    ended = run.train("max_steps=30")  # the earlier finish is not this one's
    assert (ended.code, ended.summary["steps"]) == (0, 30)
    assert run.kinds("attempt_started", "resume_from") == [None, "checkpoint-20", "checkpoint-25"]


def test_a_higher_restart_budget_is_no_change_of_the_run(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "kill"}])
    assert run.train("max_restarts=0").code == 82
    assert run.train("max_restarts=5").code == 0


def test_going_back_to_a_checkpoint_leaves_later_ones_out_of_reach(new_run: NewRun, undisturbed: str) -> None:
    run = new_run()
    run.train()
    run.wishes = {"faults": [{"attempt": 2, "step": 8, "do": "2"}]}
    ended = run.train(resume="checkpoint-5")
    assert "checkpoint-10, checkpoint-15, checkpoint-20 moved" in ended.err
    assert ended.summary["steps"] == 7  # rows of the abandoned lineage don't count
    run.wishes = {}
    assert run.train().code == 0
    assert run.kinds("attempt_started", "resume_from") == [None, "checkpoint-5", "checkpoint-5"]
    assert run.state == undisturbed


@pytest.mark.parametrize("resume", ["checkpoint-6", "checkpoint-10/../../x", "nonsense"])
def test_a_checkpoint_that_is_not_there_is_the_user_s_error(new_run: NewRun, resume: str) -> None:
    run = new_run()
    assert run.train(resume=resume).code == 2
    assert not run.runs_dir.exists()
    run.train()
    refused = run.train(resume=resume)
    assert refused.code == 2
    assert "checkpoint-5" in refused.err


def test_a_run_directory_can_be_moved_and_goes_on(new_run: NewRun, undisturbed: str) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "2"}])
    run.train()
    moved = SmallRun(run.runs_dir.with_name("elsewhere"))
    run.runs_dir.rename(moved.runs_dir)
    assert moved.train().code == 0
    assert moved.kinds("attempt_started", "resume_from") == [None, "checkpoint-10"]
    assert moved.state == undisturbed


@pytest.mark.fault(3)
def test_a_torn_journal_and_torn_metrics_are_gone_on_with(new_run: NewRun, undisturbed: str) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 13, "do": "2"}])
    run.train()
    for path in (run.directory.journal, run.directory.metrics):
        with path.open("ab") as file:
            file.write(b'{"time": "2026-01-01T00:00:00", "att')
    run.wishes = {}
    assert run.train().code == 0
    assert run.state == undisturbed


def test_the_supervisor_stays_small(new_run: NewRun) -> None:
    run = new_run(step_s=0.1)
    process = run.start()
    wait_until(lambda: run.steps > 2)
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    process.kill()
    assert peak_mib < 100


@pytest.mark.slow
@pytest.mark.fault(11)
def test_one_of_two_ranks_killed_ends_both_and_the_run_goes_on(new_run: NewRun, undisturbed: str) -> None:
    """Through the real torchrun."""
    run = new_run(step_s=0.1, faults=[{"attempt": 1, "step": 8, "rank": 1, "do": "kill"}])
    process = run.start("processes=2")
    wait_until(lambda: run.kinds("attempt_ended", "verdict") == ["restart"], timeout=100)
    run.wishes = {}
    ended = wait(process)
    assert (ended.code, ended.summary["attempts"]) == (0, 2), ended.err
    assert "rank 1 was killed (SIGKILL)" in ended.err
    assert not workers_of(run)
    assert run.state == undisturbed


@pytest.mark.slow
@pytest.mark.fault(3)
def test_torchrun_s_workers_die_with_the_supervisor(new_run: NewRun) -> None:
    run = new_run(step_s=0.5)
    process = run.start("processes=2")
    wait_until(lambda: run.steps > 0, timeout=100)
    assert len(workers_of(run)) == 3
    process.kill()
    wait(process)
    wait_until(lambda: not workers_of(run), timeout=5)

"""A wish to stop is granted: gracefully once, at once when it is repeated."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mpt.running.signals import ONE_WISH_S
from tests.running.small_runs import ROOT, SmallRun, wait, wait_until, workers_of

NewRun = Callable[..., SmallRun]


def training(run: SmallRun, *changes: str) -> "subprocess.Popen[str]":
    process = run.start(*changes)
    wait_until(lambda: run.steps >= 2, timeout=100)
    return process


@pytest.mark.fault(5)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_saves_and_the_same_command_goes_on(
    new_run: NewRun, number: signal.Signals, undisturbed: str
) -> None:
    run = new_run(step_s=0.15)
    process = training(run)
    process.send_signal(number)
    ended = wait(process)
    assert (ended.code, ended.summary["outcome"], ended.summary["attempts"]) == (80, "stopped", 1)
    stopped = ended.summary["steps"]
    assert stopped < 20
    assert run.kinds("stopped", "checkpoint") == [f"checkpoint-{stopped}"]
    assert run.kinds("stop_requested", "by") == [number.name, "stop file"]
    assert not workers_of(run)
    assert run.train().code == 0
    assert run.kinds("attempt_started", "resume_from") == [None, f"checkpoint-{stopped}"]
    assert run.state == undisturbed


def test_a_signal_that_comes_twice_at_once_is_one_wish(new_run: NewRun) -> None:
    run = new_run(step_s=0.15)
    process = training(run)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert wait(process).code == 80


@pytest.mark.fault(7)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_keeps_the_last_checkpoint(
    new_run: NewRun, number: signal.Signals, code: int
) -> None:
    run = new_run(ignore_stop=True, step_s=0.1, steps=1000)
    process = run.start()
    wait_until(lambda: run.steps >= 7)
    process.send_signal(number)
    time.sleep(ONE_WISH_S + 0.2)
    assert process.poll() is None
    process.send_signal(number)
    began = time.monotonic()
    ended = wait(process)
    assert time.monotonic() - began < 3
    assert (ended.code, ended.summary["outcome"]) == (code, "stopped")
    assert "goes on from the last checkpoint" in ended.err
    assert not workers_of(run)
    run.wishes = {}
    assert run.train().code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_one_signal_ends_at_once(new_run: NewRun, number: signal.Signals, code: int) -> None:
    run = new_run(setup_s=300)
    process = run.start()
    wait_until(lambda: bool(run.kinds("phase", "phase")))
    process.send_signal(number)
    ended = wait(process, timeout=10)
    assert (ended.code, ended.summary["outcome"]) == (code, "stopped")
    assert "begins again" in ended.err
    assert not workers_of(run)
    run.wishes = {}
    assert run.train().code == 0


def test_before_the_first_step_of_a_resumed_run_nothing_is_lost(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": 1, "step": 7, "do": "2"}])
    run.train()
    run.wishes = {"setup_s": 300}
    process = run.start()
    wait_until(lambda: len(run.kinds("phase", "phase")) == 2)
    process.send_signal(signal.SIGTERM)
    ended = wait(process, timeout=10)
    assert (ended.code, ended.summary["outcome"]) == (80, "stopped")


@pytest.mark.fault(6)
def test_a_signal_during_a_save_lets_the_commit_finish(new_run: NewRun) -> None:
    run = new_run(save_s=1.0)
    process = run.start()
    wait_until(lambda: (run.directory.checkpoints / ".staging-5").exists())
    process.send_signal(signal.SIGTERM)
    ended = wait(process)
    assert ended.code == 80
    assert "checkpoint-5" in run.checkpoints
    assert not [name for name in run.checkpoints if name.startswith(".staging")]


def test_a_signal_in_the_pause_before_a_restart_ends_without_another_attempt(new_run: NewRun) -> None:
    run = new_run(faults=[{"attempt": n, "step": 7, "do": "kill"} for n in range(1, 9)])
    process = run.start("max_restarts=8", "backoff=1h")
    wait_until(lambda: len(run.kinds("attempt_ended", "verdict")) == 3)
    process.send_signal(signal.SIGTERM)
    ended = wait(process, timeout=30)
    assert ended.code == 80  # the checkpoint is there, and no step after it was given up
    assert ended.summary["attempts"] == 3


def test_a_reader_that_goes_away_does_not_end_the_training(new_run: NewRun) -> None:
    run = new_run(step_s=0.15)
    process = training(run)
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) in (0, 1)  # 1: the summary itself could not be printed
    assert run.kinds("run_finished", "outcome") == ["finished"]


@pytest.mark.slow
def test_a_stop_reaches_both_ranks_of_torchrun_and_none_is_left(new_run: NewRun) -> None:
    run = new_run(step_s=0.3)
    process = training(run, "processes=2")
    process.send_signal(signal.SIGINT)
    time.sleep(ONE_WISH_S + 0.2)
    process.send_signal(signal.SIGINT)
    assert wait(process).code in (80, 130)
    wait_until(lambda: not workers_of(run), timeout=5)


LATE = """
import os, signal, sys
from mpt.running.signals import listening
with listening() as wish:
    wish.is_immediate = False
    if sys.argv[1] == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(80)
"""


@pytest.mark.parametrize(("how", "code"), [("stopped", 80), ("undisturbed", -signal.SIGTERM)])
def test_a_signal_after_the_stop_does_not_change_what_the_exit_code_says(how: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, how], cwd=ROOT, check=False)
    assert done.returncode == code

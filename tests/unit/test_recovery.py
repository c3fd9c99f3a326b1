"""What follows from the way an attempt ended."""

import signal

import pytest

from mpt.errors import ExitCode
from mpt.running.recovery import Ended, Outcome, Restart, Stop, decide

FINISHED = {"kind": "finished", "step": 8, "train_loss": 1.0, "eval_loss": None}
STOPPED = {"kind": "stopped", "step": 3, "checkpoint": "checkpoint-3"}
DIVERGED = {"kind": "diverged", "step": 3, "what": "loss", "value": "nan"}


def failed(code: int) -> dict[str, object]:
    return {"kind": "failed", "problem": "a problem", "remedy": "a remedy", "exit_code": code}


@pytest.mark.parametrize(
    ("word", "outcome", "code"),
    [
        (FINISHED, Outcome.FINISHED, 0),
        (STOPPED, Outcome.STOPPED, 80),
        (DIVERGED, Outcome.DIVERGED, 81),
        *((failed(code), Outcome.FAILED, code) for code in (2, 3, 83, 84, 86)),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("return_code", [0, 1, -9, 143])
@pytest.mark.parametrize("stop_signal", [None, signal.SIGTERM])
def test_the_last_word_decides_and_the_return_code_is_a_hint(
    word: dict[str, object], outcome: Outcome, code: int, return_code: int, stop_signal: int | None
) -> None:
    verdict = decide(Ended(word, return_code, stop_signal), restarts=0, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code) == (outcome, code)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [("loss", "training.learning_rate"), ("grad_norm", "warmup_steps"), ("loss_scale", "precision.loss_scale.static")],
)
def test_the_remedy_fits_what_went_bad(what: str, remedy: str) -> None:
    verdict = decide(Ended(DIVERGED | {"what": what}, 81), restarts=0, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert remedy in verdict.remedy


@pytest.mark.parametrize(
    ("word", "return_code", "reason"),
    [
        (None, -9, "killed"),
        (None, -11, "signal 11"),
        (None, 1, "exit status 1"),
        (None, 0, "exit status 0"),
        (failed(1), 1, "a problem"),
        (failed(87), 1, "a problem"),
    ],
)
def test_a_crash_is_tried_again_until_the_budget_is_spent(
    word: dict[str, object] | None, return_code: int, reason: str
) -> None:
    ended = Ended(word, return_code)
    pauses = []
    for restarts in range(3):
        verdict = decide(ended, restarts, max_restarts=3)
        assert isinstance(verdict, Restart)
        assert reason in verdict.reason
        pauses.append(verdict.after_s)
    assert pauses == [0, 1, 2]
    verdict = decide(ended, 3, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code) == (Outcome.FAILED, ExitCode.NO_PROGRESS)
    assert reason in verdict.reason


def test_a_killed_rank_is_the_cause_and_not_what_its_peers_then_say() -> None:
    verdict = decide(Ended(failed(1), 1, killed_rank=(1, signal.SIGKILL)), 0, max_restarts=3)
    assert isinstance(verdict, Restart)
    assert verdict.reason == "rank 1 was killed (SIGKILL), by somebody or by the kernel for want of memory"


def test_no_budget_is_no_restart_and_the_pause_has_a_bound() -> None:
    assert isinstance(decide(Ended(None, 1), 0, max_restarts=0), Stop)
    verdict = decide(Ended(None, 1), 99, max_restarts=100)
    assert isinstance(verdict, Restart)
    assert verdict.after_s == 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("word", [None, failed(1)])
def test_an_end_by_force_after_a_wish_to_stop_is_no_crash(
    number: int, code: int, word: dict[str, object] | None
) -> None:
    verdict = decide(Ended(word, -9, number, has_checkpoint=True), restarts=0, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code) == (Outcome.STOPPED, code)
    assert "last checkpoint" in verdict.remedy


@pytest.mark.parametrize(
    ("has_started", "has_checkpoint", "code", "remedy"),
    [
        (True, True, 143, "goes on from the last checkpoint"),
        (True, False, 143, "begins again"),
        (False, False, 143, "begins again"),
        (False, True, 80, "goes on from the last checkpoint"),
    ],
)
def test_an_end_that_loses_no_step_since_a_checkpoint_is_as_good_as_stopped_with_one(
    has_started: bool, has_checkpoint: bool, code: int, remedy: str
) -> None:
    ended = Ended(None, -9, signal.SIGTERM, "ended at once, as asked", has_started, has_checkpoint)
    verdict = decide(ended, restarts=0, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code, verdict.reason) == (Outcome.STOPPED, code, "ended at once, as asked")
    assert remedy in verdict.remedy


def test_a_crash_while_stopping_is_named_and_not_tried_again() -> None:
    verdict = decide(Ended(failed(1), 1, signal.SIGTERM), restarts=0, max_restarts=3)
    assert isinstance(verdict, Stop)
    assert verdict.reason == "while it was stopping: a problem"

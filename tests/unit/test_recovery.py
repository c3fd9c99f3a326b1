"""What follows from the way an attempt ended."""

import signal

import pytest

from mpt.errors import ExitCode
from mpt.planning.repair import Repair
from mpt.recipe.schema import RestartSection
from mpt.running.hang import Hang
from mpt.running.recovery import Ended, History, Outcome, Restart, Stop, decide

FINISHED = {"kind": "finished", "step": 8, "train_loss": 1.0, "eval_loss": None}
STOPPED = {"kind": "stopped", "step": 3, "checkpoint": "checkpoint-3"}
POLICY = RestartSection(max_restarts=3)
SMALLER = Repair("micro_batch", {"micro_batch_size": 2})
HANG = Hang("training", 7, 601.0, 600.0, (1,))
DIVERGED = {
    "kind": "diverged",
    "step": 3,
    "what": "loss",
    "value": "nan",
    "code": "N2",
    "reason": "loss is nan",
    "onset": 1,
}


def failed(code: int) -> dict[str, object]:
    return {"kind": "failed", "problem": "a problem", "remedy": "a remedy", "exit_code": code}


@pytest.mark.parametrize(
    ("word", "outcome", "code"),
    [
        (FINISHED, Outcome.FINISHED, 0),
        (STOPPED, Outcome.STOPPED, 80),
        (DIVERGED, Outcome.DIVERGED, 81),
        *((failed(code), Outcome.FAILED, code) for code in (2, 3, 83, 84)),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("return_code", [0, 1, -9, 143])
@pytest.mark.parametrize("stop_signal", [None, signal.SIGTERM])
def test_the_last_word_decides_and_the_return_code_is_a_hint(
    word: dict[str, object], outcome: Outcome, code: int, return_code: int, stop_signal: int | None
) -> None:
    verdict = decide(Ended(word, return_code, stop_signal), History(), POLICY)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code) == (outcome, code)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [("loss", "training.learning_rate"), ("grad_norm", "warmup_steps"), ("loss_scale", "precision.loss_scale.static")],
)
def test_the_remedy_fits_what_went_bad(what: str, remedy: str) -> None:
    verdict = decide(Ended(DIVERGED | {"what": what}, 81), History(), POLICY)
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
    history = History()
    for restarts in range(3):
        verdict = decide(Ended(word, return_code, has_progressed=True), history, POLICY)
        assert isinstance(verdict, Restart)
        assert reason in verdict.reason
        assert verdict.after_s == 0
        history = verdict.history
        assert history == History(restarts + 1, 0)
    verdict = decide(Ended(word, return_code, has_progressed=True), history, POLICY)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code) == (Outcome.FAILED, ExitCode.NO_PROGRESS)
    assert reason in verdict.reason


def pauses_of(ended: Ended, policy: RestartSection, history: History | None = None) -> tuple[list[float], Stop]:
    """Let an attempt end the same way again and again."""
    history, pauses = history or History(), []
    while isinstance(verdict := decide(ended, history, policy), Restart):
        pauses.append(verdict.after_s)
        history = verdict.history
    return pauses, verdict


def test_attempts_that_save_no_newer_checkpoint_end_the_run_before_its_budget() -> None:
    pauses, stop = pauses_of(Ended(failed(1), 1), RestartSection())
    assert pauses == [0, 5]
    assert stop.exit_code == ExitCode.NO_PROGRESS
    assert stop.reason == "a problem; 3 attempts in a row saved no newer checkpoint"


def test_progress_sets_the_count_back() -> None:
    verdict = decide(Ended(None, 1, has_progressed=True), History(7, 2), RestartSection())
    assert isinstance(verdict, Restart)
    assert (verdict.history, verdict.after_s) == (History(8, 0), 0)


def test_the_pause_doubles_from_the_second_vain_attempt_on_up_to_five_minutes() -> None:
    policy = RestartSection(max_restarts=100, max_attempts_without_progress=100)
    pauses, _ = pauses_of(Ended(None, 1), policy)
    assert pauses[:9] == [0, 5, 10, 20, 40, 80, 160, 300, 300]
    assert max(pauses) == 300
    assert set(pauses_of(Ended(None, 1), policy.model_copy(update={"backoff": 0.0}))[0]) == {0.0}


@pytest.mark.parametrize(("limit", "attempts"), [(1, "an attempt saved"), (2, "2 attempts in a row saved")])
def test_the_limit_of_vain_attempts_is_the_recipe_s(limit: int, attempts: str) -> None:
    pauses, stop = pauses_of(Ended(None, 1), RestartSection(max_attempts_without_progress=limit))
    assert len(pauses) == limit - 1
    assert attempts in stop.reason


@pytest.mark.parametrize(
    ("code", "reason"), [(-9, "rank 1 was killed (SIGKILL)"), (17, "rank 1 died without a last word (exit status 17)")]
)
def test_a_rank_that_died_silently_is_the_cause_and_not_what_its_peers_then_say(code: int, reason: str) -> None:
    verdict = decide(Ended(failed(1), 1, silent_rank=(1, code)), History(), POLICY)
    assert isinstance(verdict, Restart)
    assert verdict.reason.startswith(reason)


def test_hangs_are_restarted_and_spend_the_budget_with_a_code_of_their_own() -> None:
    verdict = decide(Ended(None, -9, hang=HANG), History(), POLICY)
    assert isinstance(verdict, Restart)
    assert verdict.reason == "rank 1 hung while training at step 7: silent for 601 s, and the limit was 600"
    for history in (History(3, 0), History(0, 2)):
        stop = decide(Ended(None, -9, hang=HANG), history, POLICY)
        assert isinstance(stop, Stop)
        assert stop.exit_code == ExitCode.HUNG


def test_too_little_memory_goes_on_with_less_and_is_no_attempt_in_vain() -> None:
    verdict = decide(Ended(failed(86), 1), History(1, 2), POLICY, smaller_batch=SMALLER)
    assert verdict == Restart("a problem", 0.0, History(2, 2), SMALLER)


@pytest.mark.parametrize(
    ("history", "policy", "smaller", "why"),
    [
        (History(), POLICY, None, "the micro batch is 1"),
        (History(), RestartSection(halve_micro_batch=False), SMALLER, "restart allows no smaller"),
        (History(3), POLICY, SMALLER, "restart allows no smaller"),
    ],
)
def test_too_little_memory_ends_the_run_where_it_can_not_or_may_not_do_with_less(
    history: History, policy: RestartSection, smaller: Repair | None, why: str
) -> None:
    verdict = decide(Ended(failed(86), 1), history, policy, smaller_batch=smaller)
    assert isinstance(verdict, Stop)
    assert verdict.exit_code == ExitCode.OUT_OF_MEMORY
    assert why in verdict.reason


def test_a_stop_that_was_asked_for_is_not_followed_by_an_attempt_with_less_memory() -> None:
    verdict = decide(Ended(failed(86), 1, signal.SIGTERM), History(), POLICY, smaller_batch=SMALLER)
    assert isinstance(verdict, Stop)
    assert verdict.outcome is Outcome.STOPPED


def test_no_budget_is_no_restart() -> None:
    assert isinstance(decide(Ended(None, 1), History(), RestartSection(max_restarts=0)), Stop)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("word", [None, failed(1)])
def test_an_end_by_force_after_a_wish_to_stop_is_no_crash(
    number: int, code: int, word: dict[str, object] | None
) -> None:
    verdict = decide(Ended(word, -9, number, has_checkpoint=True), History(), POLICY)
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
    verdict = decide(ended, History(), POLICY)
    assert isinstance(verdict, Stop)
    assert (verdict.outcome, verdict.exit_code, verdict.reason) == (Outcome.STOPPED, code, "ended at once, as asked")
    assert remedy in verdict.remedy


def test_a_crash_while_stopping_is_named_and_not_tried_again() -> None:
    verdict = decide(Ended(failed(1), 1, signal.SIGTERM), History(), POLICY)
    assert isinstance(verdict, Stop)
    assert verdict.reason == "while it was stopping: a problem"

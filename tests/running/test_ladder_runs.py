"""What the supervisor does where the numbers go bad for good: back to a good checkpoint, on under a changed plan."""

import json
from collections.abc import Callable

import pytest

from tests.running.small_runs import SmallRun, wait, wait_until

NewRun = Callable[..., SmallRun]
BAD_AT_12 = [{"step": 12, "do": "diverge"}]  # in every attempt whose learning rate is above `calm_rate`
RATE = 5e-5  # transformers' default


def plans(run: SmallRun) -> list[tuple[float, str | None]]:
    """The learning rate of each attempt, and where it began."""
    found = []
    for number in run.directory.attempt_numbers():
        plan = json.loads(run.directory.attempt(number).plan.read_text())
        found.append((plan["values"]["learning_rate"]["value"], plan["resume_from"]))
    return found


def test_a_run_goes_back_and_lowers_its_rate_until_the_numbers_stay_good(new_run: NewRun) -> None:
    whole = new_run()
    assert whole.train().code == 0
    run = new_run(faults=BAD_AT_12, calm_rate=RATE / 4)
    ended = run.train("recovery={margin: 1}", "max_attempts_without_progress=1")
    assert (ended.code, ended.summary["outcome"]) == (0, "finished"), ended.err
    assert plans(run) == [
        (RATE, None),
        (RATE, "checkpoint-10"),  # once unchanged
        (RATE / 2, "checkpoint-10"),
        (RATE / 4, "checkpoint-10"),
    ]
    assert run.state == whole.state
    kinds = [repair["kind"] for repair in run.kinds("plan_changed", "repair")]
    assert kinds == ["retry", "learning_rate", "learning_rate"]
    assert "going back to checkpoint-10" in ended.err
    assert "learning_rate 5e-05 -> 2.5e-05" in ended.err


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("margin", "promotes", "begins_with"),
    [(1, True, "checkpoint-5"), (1, False, "checkpoint-10"), (8, True, "checkpoint-5"), (12, False, "checkpoint-10")],
)
def test_it_goes_back_to_a_checkpoint_that_is_known_to_be_good(
    margin: int, promotes: bool, begins_with: str, new_run: NewRun
) -> None:
    run = new_run(faults=BAD_AT_12, promotes=promotes)
    ended = run.train(f"recovery={{margin: {margin}, rungs: [retry]}}")
    assert ended.code == 81, ended.err
    assert plans(run)[1][1] == begins_with
    if promotes:
        assert run.kinds("checkpoints_quarantined", "names") == [["checkpoint-10"]] * 1


def test_a_run_that_no_rung_helps_says_what_was_tried(new_run: NewRun) -> None:
    run = new_run(faults=BAD_AT_12)
    ended = run.train("recovery={margin: 1}")
    assert (ended.code, ended.summary["outcome"], ended.summary["attempts"]) == (81, "diverged", 4), ended.err
    assert "tried: trained again unchanged, learning rate 2.5e-05, learning rate 1.25e-05" in ended.err


@pytest.mark.parametrize(("block", "attempts"), [("{rungs: []}", 1), ("{rungs: [lower_learning_rate]}", 3)])
def test_the_recipe_chooses_the_rungs(block: str, attempts: int, new_run: NewRun) -> None:
    ended = new_run(faults=BAD_AT_12).train(f"recovery={block}")
    assert (ended.code, ended.summary["attempts"]) == (81, attempts), ended.err


def test_a_supervisor_that_is_killed_climbs_on_where_it_was(new_run: NewRun) -> None:
    run = new_run(faults=BAD_AT_12, calm_rate=RATE / 4, step_s=0.1)
    process = run.start("recovery={margin: 1}")
    wait_until(lambda: bool(run.directory.journal.exists() and len(run.kinds("plan_changed", "repair")) >= 2))
    process.kill()
    wait(process)
    ended = run.train("recovery={margin: 1}")
    assert ended.code == 0, ended.err
    assert [rate for rate, _ in plans(run)][-1] == RATE / 4
    assert len(run.kinds("plan_changed", "repair")) == 3

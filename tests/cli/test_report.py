"""`mpt report`: a run attempt by attempt, and what each restart changed of the plan."""

import json
import subprocess
from collections.abc import Callable

import pytest

from mpt.running.journal import Journal
from tests.cli.real_runs import MPT
from tests.running.small_runs import SmallRun

NewRun = Callable[..., SmallRun]


def report(run: SmallRun, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [*MPT, "report", str(run.directory.path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run that was tried again unchanged, and then with half the learning rate."""
    wishes = {"faults": [{"step": 12, "do": "diverge"}], "calm_rate": 5e-5 / 2}
    run = SmallRun(tmp_path_factory.mktemp("climbed"), wishes)
    ended = run.train("recovery={margin: 1, rungs: [retry, lower_learning_rate]}")
    assert ended.code == 0, ended.err
    return run


def test_each_attempt_says_what_its_plan_changed_and_why(climbed: SmallRun) -> None:
    done = report(climbed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{climbed.directory.path}: finished, 20 steps")
    assert "  changed  learning_rate: 5e-05 -> 2.5e-05" in lines
    assert sum(line.startswith("  changed") for line in lines) == 1
    third = lines.index("attempt 3: from checkpoint-10, steps 11 to 20")
    assert lines[third + 1].startswith("  because  ") and "the learning rate is lowered to 2.5e-05" in lines[third + 1]
    assert lines[-1] == "  ended    finished at step 20"


def test_the_same_as_json(climbed: SmallRun) -> None:
    told = json.loads(report(climbed, "--json").stdout)
    assert told["outcome"] == "finished" and [attempt["number"] for attempt in told["attempts"]] == [1, 2, 3]
    assert told["attempts"][1]["changes"] == [] and "once more" in told["attempts"][1]["reason"]
    assert told["attempts"][2]["changes"] == [{"key": "learning_rate", "was": 5e-5, "now": 2.5e-5}]


def test_evaluations_and_samples_are_listed_by_step_and_without_what_steers_a_terminal(climbed: SmallRun) -> None:
    journal, metrics = climbed.directory.journal, climbed.directory.metrics
    before, rows = journal.read_bytes(), metrics.read_bytes()
    writer = Journal(journal, 3)
    for step in (10, 20):
        row = {"step": step, "attempt": 3, "eval_loss": 4 - step / 20, "eval_accuracy": 0.5, "eval_runtime": 1.0}
        metrics.write_text(f"{metrics.read_text()}{json.dumps(row)}\n")
        for prompt in ("The ", "A "):
            writer.append("sample", step=step, prompt=prompt, text=f"end\n\x1b[2J of {step}", is_answer=False)
    writer.append("sample", step=20, prompt="The ", text="once more", is_answer=False)
    try:
        lines = report(climbed).stdout.splitlines()
        told = json.loads(report(climbed, "--json").stdout)
    finally:
        journal.write_bytes(before)
        metrics.write_bytes(rows)
    place = lines.index("evaluations")
    evaluated = [f"  step {step}     loss {loss}, accuracy 0.5000" for step, loss in ((10, "3.5000"), (20, "3.0000"))]
    assert lines[place : place + 3] == ["evaluations", *evaluated]
    assert lines[place + 3 :] == [
        *("samples of 'The'", "  step 10     end [2J of 10", "  step 20     once more"),
        *("samples of 'A'", "  step 10     end [2J of 10", "  step 20     end [2J of 20"),
    ]
    assert told["evaluations"] == [
        {"step": step, "loss": loss, "accuracy": 0.5} for step, loss in ((10, 3.5), (20, 3.0))
    ]
    assert [(sample["step"], sample["prompt"]) for sample in told["samples"]][:2] == [(10, "The "), (10, "A ")]


def test_a_damaged_plan_is_said_and_not_passed_over(climbed: SmallRun) -> None:
    plan = climbed.directory.attempt(2).plan
    whole = plan.read_text()
    plan.write_text(whole[:-200])
    try:
        done = report(climbed)
    finally:
        plan.write_text(whole)
    assert done.returncode == 83
    assert str(plan) in done.stderr and "Traceback" not in done.stderr


def test_no_run_is_one_message(tmp_path: object) -> None:
    done = subprocess.run([*MPT, "report", "nothing"], capture_output=True, text=True, cwd=str(tmp_path), check=False)
    assert done.returncode == 2 and "nothing" in done.stderr

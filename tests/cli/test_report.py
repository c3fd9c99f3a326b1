"""`mpt report`: a run attempt by attempt, and what each restart changed of the plan."""

import json
import subprocess
from collections.abc import Callable

import pytest

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

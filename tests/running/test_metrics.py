"""Of each step, the row that counts is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.running.metrics import evaluations, read_rows
from mpt.running.run_directory import RunDirectory


def row(attempt: int, step: int, **more: Any) -> str:
    return json.dumps({"step": step, "attempt": attempt, "loss": attempt + step / 10} | more)


FIRST = [row(1, 1), row(1, 2), row(1, 3)]


@pytest.mark.parametrize(
    ("lines", "losses"),
    [
        ([], {}),
        (FIRST, {1: 1.1, 2: 1.2, 3: 1.3}),
        pytest.param([*FIRST, row(2, 3)], {1: 1.1, 2: 1.2, 3: 2.3}, id="a step made anew"),
        pytest.param([*FIRST, row(2, 2)], {1: 1.1, 2: 2.2}, id="what was made after the checkpoint is void"),
        pytest.param([*FIRST, '{"step": 4, "att'], {1: 1.1, 2: 1.2, 3: 1.3}, id="a torn last line"),
        pytest.param([*FIRST, '{"step": 4, "att', row(2, 3)], {1: 1.1, 2: 1.2, 3: 2.3}, id="a torn line between"),
        pytest.param([*FIRST, "7", "\x00\x00", "[]", ""], {1: 1.1, 2: 1.2, 3: 1.3}, id="what is no row"),
        pytest.param([row(1, 1), '{"step": 1, "attempt": 1, "eval_loss": 3}'], {1: 1.1}, id="an evaluation"),
        pytest.param([row(1, 1, loss="nan")], {1: "nan"}, id="a loss that is no number"),
    ],
)
def test_the_valid_row_of_each_step_is_read(lines: list[str], losses: dict[int, Any], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text("\n".join(lines))
    assert {step: row["loss"] for step, row in read_rows(run).items()} == losses


def test_without_metrics_there_are_no_rows(tmp_path: Path) -> None:
    assert read_rows(RunDirectory(tmp_path)) == {}


def evaluation(attempt: int, step: int, loss: float, **more: Any) -> str:
    return json.dumps({"step": step, "attempt": attempt, "eval_loss": loss, "eval_runtime": 1.0} | more)


@pytest.mark.parametrize(
    ("lines", "losses"),
    [
        pytest.param([row(1, 1), evaluation(1, 1, 3.0), evaluation(1, 1, 2.0)], {1: 2.0}, id="evaluated again"),
        pytest.param(
            [evaluation(1, 2, 3.0), evaluation(1, 4, 2.0), evaluation(1, 4, 1.5, best_step=2)],
            {2: 3.0, 4: 2.0},
            id="the best weights at the end are not those of the last step",
        ),
        pytest.param(
            [row(1, 2), evaluation(1, 2, 3.0), row(1, 4), evaluation(1, 4, 9.0), row(2, 3)],
            {2: 3.0},
            id="what was evaluated after the checkpoint is void",
        ),
    ],
)
def test_the_evaluation_of_each_step_is_read(lines: list[str], losses: dict[int, float], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text("\n".join(lines))
    assert {step: came["loss"] for step, came in evaluations(run).items()} == losses
    assert all(came.keys() == {"loss"} for came in evaluations(run).values())

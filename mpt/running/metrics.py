"""The metrics of a run as they count: one row a step, whichever attempt made it."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mpt.running.run_directory import RunDirectory

EVALUATED = "eval_"
# How long it took, in the Trainer's words.
TIMES = ("runtime", "_per_second", "_time")


def read_rows(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """Read the metrics: the valid row of each optimizer step, by step; none where there are no metrics yet."""
    return valid_rows(every_row(run))


def every_row(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """Read every row of an optimizer step in the order written, those of steps that were made again included."""
    return (row for row in _rows(run) if "loss" in row)


def evaluations(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """Read what each evaluation came to, by step and name: the loss, and the metrics of the task. Of a step that was
    evaluated again the later one counts, and none of steps that a later attempt has not made yet. That of the best
    weights at the end of a run is none of its last step."""
    found: dict[int, dict[str, Any]] = {}
    attempt: object = None
    for row in _rows(run):
        if row.get("best_step") is not None:
            continue
        if row["attempt"] != attempt:
            attempt = row["attempt"]
            found = {step: came for step, came in found.items() if step < row["step"]}
        told = {key.removeprefix(EVALUATED): value for key, value in row.items() if key.startswith(EVALUATED)}
        if told:
            found[int(row["step"])] = {key: value for key, value in told.items() if not key.endswith(TIMES)}
    return dict(sorted(found.items()))


def _rows(run: RunDirectory) -> Iterator[dict[str, Any]]:
    if not run.metrics.exists():
        return
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(row, dict) and {"step", "attempt"} <= row.keys():
            yield row


def valid_rows(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Give the row of each step that counts, by step.

    An attempt that goes on from a checkpoint makes the steps after it anew; what was written of them before is void.
    """
    valid: dict[int, dict[str, Any]] = {}
    attempt: object = None
    for row in rows:
        if row["attempt"] != attempt:
            attempt = row["attempt"]
            valid = {step: kept for step, kept in valid.items() if step < row["step"]}
        valid[row["step"]] = row
    return valid

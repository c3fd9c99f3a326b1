"""What a run came to, read from its directory: the object that `mpt train --json` prints."""

import json
from typing import Any

from mpt.running.journal import read_events
from mpt.running.run_directory import RunDirectory

INCIDENTS = ("non_finite", "spike", "checkpoint_passed_over")


def read_rows(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """Read the metrics: the last row of each optimizer step, by step."""
    rows: dict[int, dict[str, Any]] = {}
    if not run.metrics.exists():
        return rows
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(row, dict) and "loss" in row:
            rows[row["step"]] = row
    return rows


def summarise(run: RunDirectory) -> dict[str, Any]:
    """Sum up a run: outcome, steps, losses, attempts, incidents.

    `train_loss` is the mean over the run where it finished, else the last step's; None where there is none.
    """
    events = read_events(run.journal)
    finished = next((event for event in reversed(events) if event["kind"] == "finished"), None)
    closed = next((event for event in reversed(events) if event["kind"] == "run_finished"), None)
    evaluated = next((event for event in reversed(events) if event["kind"] == "evaluated"), None)
    rows = read_rows(run)
    last_step = max(rows, default=0)
    restarts = [event for event in events if event["kind"] == "attempt_ended" and event["verdict"] == "restart"]
    if closed is not None:
        outcome = closed["outcome"]
    else:
        outcome = "interrupted"
    return {
        "outcome": "finished" if finished is not None and closed is None else outcome,
        "run_dir": str(run.path),
        "steps": finished["step"] if finished is not None else last_step,
        "train_loss": finished["train_loss"] if finished is not None else rows.get(last_step, {}).get("loss"),
        "eval_loss": evaluated["eval_loss"] if evaluated is not None else None,
        "attempts": len(run.attempt_numbers()),
        "incidents": sum(event["kind"] in INCIDENTS for event in events) + len(restarts),
    }


def last_sample(run: RunDirectory) -> dict[str, Any] | None:
    """Give the text that the run generated at its end."""
    return next((event for event in reversed(read_events(run.journal)) if event["kind"] == "sample"), None)

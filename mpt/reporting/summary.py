"""What a run came to, read from its directory: the object that `mpt train --json` prints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt.running.journal import read_events
from mpt.running.metrics import read_rows
from mpt.running.run_directory import RunDirectory

INCIDENTS = ("health", "checkpoint_passed_over", "save_failed")
LOG_TAIL_BYTES = 16384
TRACEBACK_FRAME = '  File "'


def summarise(run: RunDirectory) -> dict[str, Any]:
    """Sum up a run: outcome, steps, losses, metrics, loss scale, attempts, incidents.

    `outcome` is "interrupted" where the run neither ended nor is known to go on. `train_loss` is the mean over the run
    where it finished, else the last step's; a loss is None where there is none. `metrics` are those of the last
    evaluation, beside its loss; `stopped_early`: evaluations showed no more gain. `loss_scale` is the last step's, None
    without fp16; `skipped_steps` counts the steps that overflowed, the one that ended the run included.
    """
    events = read_events(run.journal)
    rows = read_rows(run)
    last_step = max(rows, default=0)
    last_row = rows.get(last_step, {})
    outcome, finished, eval_loss, incidents = "interrupted", None, None, 0
    metrics: Mapping[str, Any] = {}
    for event in events:
        kind = event["kind"]
        incidents += kind in INCIDENTS or (kind == "attempt_ended" and event["verdict"] == "restart")
        if kind in ("run_created", "run_resumed", "attempt_started"):
            outcome, finished = "interrupted", None
        elif kind == "finished":
            outcome, finished = "finished", event
            eval_loss, metrics = event.get("eval_loss", eval_loss), event.get("metrics") or metrics
        elif kind == "run_finished":
            outcome = event["outcome"]
        elif kind == "evaluated":
            eval_loss, metrics = event.get("eval_loss"), event.get("metrics") or {}
    return {
        "outcome": outcome,
        "run_dir": str(run.path),
        "steps": last_step if finished is None else finished["step"],
        "train_loss": last_row.get("loss") if finished is None else finished["train_loss"],
        "eval_loss": eval_loss,
        "metrics": dict(metrics),
        "stopped_early": bool(finished and finished.get("stopped_early")),
        "loss_scale": last_row.get("loss_scale"),
        "skipped_steps": _skipped(rows, events),
        "attempts": len(run.attempt_numbers()),
        "incidents": incidents,
    }


def _skipped(rows: Mapping[int, Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> int:
    """Count skipped steps: those that have a row, and one that ended its attempt before it had one."""
    last = max(rows, default=0)
    beyond = {event["step"] for event in events if event["kind"] == "step_skipped" and event["step"] > last}
    return sum(bool(row.get("skipped")) for row in rows.values()) + len(beyond)


def last_log_lines(log: Path, count: int = 3) -> list[str]:
    """Give the last lines of a log that say something: no empty ones, and no frames of a traceback."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    telling = [line for line in lines if line.strip() and not line.startswith((TRACEBACK_FRAME, "    "))]
    return telling[-count:]

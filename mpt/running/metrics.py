"""The metrics of a run as they count: one row a step, whichever attempt made it."""

import json
from typing import Any

from mpt.running.run_directory import RunDirectory


def read_rows(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """Read the metrics: the valid row of each optimizer step, by step; none where there are no metrics yet.

    An attempt that goes on from a checkpoint makes the steps after it anew; what was written of them before is void.
    """
    rows: dict[int, dict[str, Any]] = {}
    if not run.metrics.exists():
        return rows
    attempt: object = None
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if not isinstance(row, dict) or "loss" not in row:
            continue
        if row["attempt"] != attempt:
            attempt = row["attempt"]
            rows = {step: kept for step, kept in rows.items() if step < row["step"]}
        rows[row["step"]] = row
    return rows

"""What a run's data says of its model, such as the classes, kept in the run directory: every attempt builds the same
model, and so does a replay, which has no data."""

import json
from collections.abc import Mapping
from typing import Any

from mpt.errors import MptError
from mpt.running.run_directory import RunDirectory, write_json


def read_from_data(run: RunDirectory) -> dict[str, Any]:
    """Read what was kept; nothing where the data says nothing."""
    return dict(json.loads(run.from_data.read_text(encoding="utf-8"))) if run.from_data.exists() else {}


def keep_from_data(run: RunDirectory, said: Mapping[str, Any]) -> None:
    """Keep what the data says. Raises MptError where it says something else than when the run began: the model that is
    being trained has an output for each class of then."""
    if not said or (kept := read_from_data(run)) == dict(said):
        return
    if kept and run.has_checkpoint:
        raise MptError(
            f"the data has other classes than this run began with: {_told(kept)} -> {_told(said)}",
            remedy="Put the old data back, or begin anew with --resume never (the old run is kept beside it).",
        )
    write_json(run.from_data, dict(said))


def _told(said: Mapping[str, Any]) -> str:
    return json.dumps(said, ensure_ascii=False)[:200]

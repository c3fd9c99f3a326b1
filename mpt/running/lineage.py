"""Lineages: what a run leaves behind when it goes back to an earlier checkpoint.

The checkpoints after that one belong to a course that is given up; left in place, the highest number would be resumed.
They are moved to `checkpoints/quarantine-N/`, N being the lineage that ended, and a new lineage begins. The intent is
journalled before the first move and its completion after the last, so that a kill between is made good at the next
start.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpt.running.checkpoints import list_checkpoints
from mpt.running.journal import Journal, read_events
from mpt.running.run_directory import RunDirectory, make_durable, writing

QUARANTINE = "quarantine-"


def current_lineage(run: RunDirectory) -> int:
    """Count the lineage that the run is in, from 1: one more than the last that was given up.

    Raises StorageError where the journal is damaged.
    """
    journalled = [event["lineage"] for event in read_events(run.journal) if event["kind"] == "checkpoints_quarantined"]
    return 1 + max([*journalled, *(number for number, _ in list_quarantines(run))], default=0)


def list_quarantines(run: RunDirectory) -> list[tuple[int, Path]]:
    """List the quarantine folders with the lineages that they hold, oldest first."""
    found = []
    for path in run.checkpoints.glob(f"{QUARANTINE}*"):
        number = path.name.removeprefix(QUARANTINE)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def quarantine_later(run: RunDirectory, journal: Journal, step: int, reason: str) -> list[str]:
    """Give up the lineage that went on after `step`: move its checkpoints out of reach and give their names.

    Where there are none after it, nothing happens and the lineage goes on. `step` 0: back to the beginning. Nobody may
    be training meanwhile. Raises StorageError.
    """
    names = [path.name for number, path in list_checkpoints(run) if number > step]
    if not names:
        return []
    complete_quarantine(run, journal)
    lineage = current_lineage(run)
    journal.append("checkpoints_quarantined", names=names, lineage=lineage, step=step, reason=reason)
    _move(run, journal, names, lineage)
    return names


def complete_quarantine(run: RunDirectory, journal: Journal) -> list[str]:
    """Finish the moves that a kill cut short; give the names that they were about. Called before a run is gone on with,
    with its lock held. Raises StorageError."""
    intent = pending_quarantine(read_events(run.journal))
    if intent is None:
        return []
    _move(run, journal, intent["names"], intent["lineage"])
    return list(intent["names"])


def pending_quarantine(events: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Find the quarantine that was begun and not completed.

    >>> pending_quarantine([{"kind": "checkpoints_quarantined", "lineage": 1}, {"kind": "quarantine_completed"}])
    """
    pending = None
    for event in events:
        if event["kind"] == "checkpoints_quarantined":
            pending = event
        elif event["kind"] == "quarantine_completed":
            pending = None
    return pending


def _move(run: RunDirectory, journal: Journal, names: Iterable[str], lineage: int) -> None:
    folder = run.checkpoints / f"{QUARANTINE}{lineage}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if run.checkpoints.joinpath(name).exists():
                run.checkpoints.joinpath(name).rename(folder / name)
        make_durable(folder)
        make_durable(run.checkpoints)
    journal.append("quarantine_completed", lineage=lineage)

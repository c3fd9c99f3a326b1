"""The checkpoints of a run as a person or a program asks for them: what is there, what state it is in, how it reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mpt.errors import UnsupportedError
from mpt.running.checkpoints import best_checkpoint, list_checkpoints, list_in, promoted
from mpt.running.journal import read_events
from mpt.running.lineage import list_quarantines, pending_quarantine
from mpt.running.manifest import problem_with, read_manifest
from mpt.running.run_directory import RunDirectory

KIB = 1024


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """One checkpoint. `name` is its path under `checkpoints/`; `problem` says why it is damaged.

    `saved_at` and `lineage` are None where no manifest tells.
    """

    name: str
    step: int
    size_bytes: int
    saved_at: str | None
    lineage: int | None
    state: Literal["committed", "damaged", "quarantined"]
    known_good: bool = False
    best: bool = False
    problem: str | None = None


def describe(run: RunDirectory, *, hashes: bool) -> list[ListedCheckpoint]:
    """List a run's checkpoints by step, and then those in quarantine; with `hashes` every byte of the former is read.

    Raises StorageError where the journal is damaged.
    """
    events = read_events(run.journal)
    pending = pending_quarantine(events)
    given_up = frozenset() if pending is None else frozenset(pending["names"])
    good = promoted(events)
    checkpoints = list_checkpoints(run)
    best = best_checkpoint([path for _, path in checkpoints if path.name not in given_up])
    listed = []
    for step, path in checkpoints:
        if path.name in given_up:
            listed.append(_listed(path, path.name, step, None, "quarantined"))
            continue
        problem = problem_with(path, hashes=hashes)
        is_good, is_best = (path.name in good, path.name == best) if problem is None else (False, False)
        state: Literal["committed", "damaged"] = "committed" if problem is None else "damaged"
        listed.append(_listed(path, path.name, step, None, state, is_good, is_best, problem))
    for lineage, folder in list_quarantines(run):
        for step, path in list_in(folder):
            listed.append(_listed(path, f"{folder.name}/{path.name}", step, lineage, "quarantined"))
    # A run that goes on meanwhile may have pruned some: those are not damaged, they are gone.
    return [entry for entry in listed if run.checkpoints.joinpath(entry.name).is_dir()]


def to_table(listed: Sequence[ListedCheckpoint], now: datetime) -> str:
    """Write one line a checkpoint: name, step, size, age, lineage, state."""
    rows = [("checkpoint", "step", "size", "age", "lineage", "state")]
    for entry in listed:
        age = (
            "unknown"
            if entry.saved_at is None
            else spell_age((now - datetime.fromisoformat(entry.saved_at)).total_seconds())
        )
        lineage = "unknown" if entry.lineage is None else str(entry.lineage)
        rows.append((entry.name, str(entry.step), spell_size(entry.size_bytes), age, lineage, spell_state(entry)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    aligned = [
        [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, 5)), row[5]]
        for row in rows
    ]
    return "\n".join("  ".join(row) for row in aligned)


def spell_state(entry: ListedCheckpoint) -> str:
    """Say what is to be known of a checkpoint in a few words."""
    if entry.problem is not None:
        return f"{entry.state}: {entry.problem}"
    marks = [word for word, holds in (("known-good", entry.known_good), ("best", entry.best)) if holds]
    return ", ".join(marks) or entry.state


def spell_size(size_bytes: int) -> str:
    """Spell a size in binary units.

    >>> spell_size(999), spell_size(1536), spell_size(5 * 2**30)
    ('999 B', '1.5 KiB', '5.0 GiB')
    """
    if size_bytes < KIB:
        return f"{size_bytes} B"
    size, unit = size_bytes / KIB, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size >= KIB:
            size, unit = size / KIB, larger
    return f"{size:.1f} {unit}"


def spell_age(seconds: float) -> str:
    """Spell an age in its largest unit; a clock that was set back makes none negative.

    >>> spell_age(-5), spell_age(59), spell_age(3600), spell_age(200_000)
    ('0 s', '59 s', '1 h', '2 d')
    """
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{int(seconds // length_s)} {unit}"
    return f"{max(0, int(seconds))} s"


def _listed(
    path: Path,
    name: str,
    step: int,
    lineage: int | None,
    state: Literal["committed", "damaged", "quarantined"],
    *marks: Any,
) -> ListedCheckpoint:
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, UnsupportedError):
        manifest = {}
    return ListedCheckpoint(
        name, step, _size_of(path), manifest.get("time"), manifest.get("lineage", lineage), state, *marks
    )


def _size_of(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except FileNotFoundError:
        return 0  # pruned this moment

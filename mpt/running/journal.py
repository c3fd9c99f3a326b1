"""The journal of a run: one JSON object a line, appended whole and fsynced, so that whatever is killed whenever, what
was written is there. A torn last line is skipped by the reader; damage before it is an error.
"""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt.errors import StorageError

LAST_WORDS = ("finished", "stopped", "diverged", "failed")


class Journal:
    """The appending end, for one process of one attempt (0: the supervisor before any attempt)."""

    def __init__(self, path: Path, attempt: int, rank: int = 0) -> None:
        self.path = path
        self.attempt = attempt
        self.rank = rank

    def append(self, kind: str, **payload: Any) -> None:
        """Write an event and make it durable. Raises StorageError where the journal can't be written."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "attempt": self.attempt,
            "rank": self.rank,
            "kind": kind,
            **payload,
        }
        line = json.dumps(spell_non_finite(record), allow_nan=False)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, f"{_line_break_owed(descriptor)}{line}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(
                f"{self.path} can't be written: {error.strerror or error}",
                remedy="Free space or mend permissions there, and start the same command again.",
            ) from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read every event, oldest first; none where there is no journal.

    A last line without its end was torn by a kill and is skipped. Raises StorageError naming a damaged line before it.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not torn:
                break  # torn, and then closed off by the next writer's line break
            if _is_torn_record(line):
                continue
            raise StorageError(
                f"{path}:{number}: this line is no JSON object",
                remedy="Restore the file from a copy, or remove the line if you know what it was.",
            ) from error
        if not isinstance(event, dict):
            raise StorageError(
                f"{path}:{number}: this line is no JSON object",
                remedy="Restore the file from a copy, or remove the line if you know what it was.",
            )
        events.append(event)
    return events


def last_word(events: list[dict[str, Any]], attempt: int) -> dict[str, Any] | None:
    """Give an attempt's verdict: the first last word counts, what the other ranks said after it is noise."""
    return next((event for event in events if event["attempt"] == attempt and event["kind"] in LAST_WORDS), None)


def spell_non_finite(value: Any) -> Any:
    """Write NaN and infinities as the texts "nan", "inf" and "-inf", which JSON can hold.

    >>> spell_non_finite({"loss": float("nan"), "norms": [1.0, float("-inf")]})
    {'loss': 'nan', 'norms': [1.0, '-inf']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: spell_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [spell_non_finite(entry) for entry in value]
    return value


def _line_break_owed(descriptor: int) -> str:
    """Begin a new line where a kill tore the last one."""
    size = os.fstat(descriptor).st_size
    return "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""


def _is_torn_record(line: bytes) -> bool:
    """Whether a line is the beginning of a record that a kill cut: it opens like ours and never closes."""
    return line.startswith(b'{"time"') and not line.rstrip().endswith(b"}")

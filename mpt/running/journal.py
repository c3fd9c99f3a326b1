"""The journal of a run: one JSON object a line, appended whole and fsynced, so that whatever is killed whenever, what
was written is there. A torn last line is skipped by the reader; damage before it is an error.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt.errors import StorageError
from mpt.running.run_directory import writing
from mpt.secrets import redact_all

# How every record begins.
OPENING = b'{"time"'
LAST_WORDS = ("finished", "stopped", "diverged", "failed")


class Journal:
    """The appending end, for one process of one attempt (0: the supervisor before any attempt)."""

    def __init__(self, path: Path, attempt: int, rank: int = 0) -> None:
        self.path = path
        self.attempt = attempt
        self.rank = rank

    def append(self, kind: str, **payload: Any) -> None:
        """Write an event without its secrets, and make it durable. Raises StorageError where that can't be done."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "attempt": self.attempt,
            "rank": self.rank,
            "kind": kind,
            **payload,
        }
        line = json.dumps(redact_all(spell_non_finite(record)), allow_nan=False)
        with writing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                text = f"{_line_break_owed(descriptor)}{line}\n".encode()
                if os.write(descriptor, text) < len(text):  # a disk that fills up takes a part and says nothing
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read every event, oldest first; none where there is no journal.

    A last line without its end was torn by a kill and is skipped. Raises StorageError naming a damaged line before it.
    """
    if not path.exists():
        return []
    with _reading(path):
        *lines, torn = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not {"kind", "attempt"} <= event.keys():
                raise ValueError("no event")
        except ValueError as error:
            if _was_torn(line, error) or (number == len(lines) and not torn):
                continue
            raise StorageError(
                f"{path}:{number}: this line is no event of a run",
                remedy="Restore the file from a copy, or remove the line if you know what it was.",
            ) from error
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


def _was_torn(line: bytes, error: ValueError) -> bool:
    """Whether a line is the beginning of a record that a kill cut: it opens like ours and breaks off."""
    if line[: len(OPENING)] != OPENING[: len(line)]:
        return False
    breaks_off = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    return breaks_off or not line.endswith(b"}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} can't be read: {error.strerror or error}", remedy="Mend its permissions, or restore it."
        ) from error

"""One supervisor a run directory: a lock that the kernel gives back when its owner dies, however it dies."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mpt.errors import RunLockedError, StorageError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock; the file says who holds it. It stays behind, unlocked, and is taken over by the next owner.

    Raises RunLockedError naming the live owner, StorageError where the file can't be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _owned(path) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{json.dumps(owner)}\n".encode(), 0)
        except OSError as error:
            raise _unwritable(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _owned(path: Path) -> RunLockedError:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return RunLockedError(
        f"{path.parent} belongs to a live run: {who}",
        remedy="Wait for it, stop it (Ctrl-C there saves first), or give this run another --name.",
    )


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} can't be written: {error.strerror or error}",
        remedy="Free space or mend permissions there, or choose another --runs-dir.",
    )

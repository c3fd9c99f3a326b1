"""One supervisor a run directory: a lock that the kernel gives back when its owner dies, however it dies."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt.errors import RunLockedError, StorageError
from mpt.running.run_directory import writing

# What flock answers where there are none: NFS without its lock service, Lustre without -o flock, some FUSE.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock; the file says who holds it. It stays behind, unlocked, and is taken over by the next owner.

    Children don't inherit it. Raises RunLockedError naming the live owner, StorageError where the file can't be made or
    its file system has no locks.
    """
    descriptor = _take(path)
    try:
        with suppress(OSError):  # a full disk: the lock holds without a name on it, and the next write will tell
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{json.dumps(_myself())}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def owner_of(path: Path) -> str | None:
    """Say who holds the lock; None where nobody does, or where nobody can tell.

    Asked by a shared lock that is given back at once: a supervisor that starts in that moment is refused, and may start
    again.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(path)[0]
    except OSError:
        return None  # a file system without locks
    finally:
        os.close(descriptor)
    return None


def _take(path: Path) -> int:
    """Open and lock the file; give its descriptor."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with writing(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # between the two calls its owner moved the run away, and the file with it
        except StorageError as error:
            os.close(descriptor)
            if isinstance(error.__cause__, BlockingIOError):
                raise _owned(path) from None
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in WITHOUT_LOCKS:
                raise StorageError(
                    f"the file system of {path.parent} has no locks ({error.__cause__.strerror}), and without one two "
                    "processes could train the same run",
                    remedy="Choose a --runs-dir on another file system, or mount this one with locks (-o flock).",
                ) from error
            raise


def _myself() -> dict[str, Any]:
    """Describe this process for the people who meet its lock; the boot tells a reused pid from the old one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat("T", "seconds"),
        "boot_id": boot.read_text(encoding="ascii").strip() if boot.exists() else None,
    }


def _owned(path: Path) -> RunLockedError:
    remedy = "Wait for it, stop it (Ctrl-C there saves first), or give this run another --name."
    who, host = _read_owner(path)
    if host not in (None, socket.gethostname()):
        remedy += f" If {host} is dead, its file server gives the lock back when the lease ends: minutes."
    return RunLockedError(f"{path.parent} belongs to a live run: {who}", remedy=remedy)


def _read_owner(path: Path) -> tuple[str, str | None]:
    """Read who holds the lock, in words, and on which host; None: it does not say."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}", str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process", None

"""Where prepared data is kept: `mpt/` in the cache of `datasets` (HF_DATASETS_CACHE), or where MPT_CACHE says.

Everything in it is named after the content that it follows from, appears whole or not at all, and can be removed at any
time that nothing is prepared; what is missing is made again.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import xxhash

from mpt.errors import MptError, StorageError
from mpt.running.run_directory import NO_ROOM, make_durable
from mpt.training.progress import beat

READ_BYTES = 1 << 22
# A file system's clock ticks every few milliseconds: what changed just now may change once more at the same time.
SETTLED_S = 2.0
WAIT_S = 0.2


def cache_folder(kind: str) -> Path:
    """Give the folder of one kind of prepared data; it is made. Raises StorageError where it can't be."""
    own = os.environ.get("MPT_CACHE")
    folder = (Path(own).expanduser() if own else Path(datasets.config.HF_DATASETS_CACHE) / "mpt") / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
    return folder


def _refused(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"prepared data can't be kept in {folder}: {error.strerror}",
        remedy="Free space or mend permissions there, or name another folder with MPT_CACHE.",
    )


def digest(*parts: object) -> str:
    """Hash what `repr` says of values: names and numbers.

    >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
    True
    """
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def hash_files(paths: Sequence[Path]) -> str:
    """Hash the content of files. It is read once: after that, only when a file's size or times have changed.

    The time of the inode's last change is among them, which no program can set back.
    """
    stats = [path.stat() for path in paths]
    pairs = list(zip(paths, stats, strict=True))
    facts = [(str(path.resolve()), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in pairs]
    known = cache_folder("contents") / digest(facts)
    if known.exists():
        return known.read_text(encoding="utf-8")
    found = xxhash.xxh3_128()
    for path, stat in pairs:
        found.update(stat.st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                found.update(piece)
    if all(time.time() - stat.st_ctime > SETTLED_S for stat in stats):
        staging = known.with_name(f".{known.name}-{os.getpid()}")
        with suppress(OSError):  # a cache that can't be written may hold all that is needed
            staging.write_text(found.hexdigest(), encoding="utf-8")
            make_durable(staging)
            staging.replace(known)
    return found.hexdigest()


def check_unchanged(paths: Sequence[Path], content: str) -> None:
    """Raise MptError where files no longer have the content that `hash_files` found: what was read bears its name."""
    if hash_files(paths) != content:
        more = f" or one of {len(paths) - 1} more files" if len(paths) > 1 else ""
        raise MptError(f"{paths[0]}{more} changed while it was read", remedy="Start again when it is written.")


@contextmanager
def making(final: Path) -> Iterator[Path | None]:
    """Give the folder to prepare `final` in, with what an interrupted preparation left there; None where it is there.

    It gets its final name when the block ends without an error. One process at a time prepares: the others wait,
    and beat. A process that is killed leaves no lock. Raises StorageError where the disk refuses.
    """
    staging = final.with_name(f".{final.name}.part")
    lock = -1
    try:
        while not final.exists():
            staging.mkdir(parents=True, exist_ok=True)
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            if _is_locked(lock, staging):
                break
            os.close(lock)
            lock = -1
            beat()
            time.sleep(WAIT_S)
        if lock < 0:
            yield None
            return
        yield staging
        for path in staging.iterdir():  # a power cut after the rename would leave rows out
            make_durable(path)
        staging.rename(final)
    except OSError as error:
        if error.errno not in (*NO_ROOM, errno.EACCES, errno.EPERM):
            raise
        raise _refused(final.parent, error) from error
    finally:
        if lock >= 0:
            os.close(lock)


def _is_locked(descriptor: int, staging: Path) -> bool:
    """Whether this process now has the lock of a folder that still has its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return staging.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False

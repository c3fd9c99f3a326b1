"""The cache of prepared data as a person sees it: where it is, what it takes, and emptying it. What stands in it is the
affair of `mpt.training.cache`; this module imports no library that would have to be waited for.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt.errors import StorageError

KINDS = {
    "tokens": "tokenised rows",
    "rows": "texts and rows of files",
    "conversations": "conversations of files",
    "contents": "hashes of files",
}
OURS = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}(\.part|-\d+)")  # prepared, being prepared


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of prepared data takes."""

    name: str
    what: str
    entries: int
    bytes: int


def cache_root(environ: Mapping[str, str]) -> Path:
    """Give the folder of the cache, as `mpt.training.cache` and `datasets` find it.

    >>> str(cache_root({"HF_HOME": "/data/hf"})), str(cache_root({"HF_HOME": "/data/hf", "MPT_CACHE": "/mpt"}))
    ('/data/hf/datasets/mpt', '/mpt')
    """
    if environ.get("MPT_CACHE"):
        return Path(environ["MPT_CACHE"]).expanduser()
    if "HF_DATASETS_CACHE" in environ:
        return Path(environ["HF_DATASETS_CACHE"]) / "mpt"
    home = environ.get("HF_HOME", os.path.join(environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))  # noqa: PTH118
    return Path(home).expanduser() / "datasets" / "mpt"


def measure(root: Path) -> list[Kind]:
    """Count the entries of each kind and their bytes."""
    found = []
    for name, what in KINDS.items():
        entries = _entries(root / name)
        sizes = [_size(file) for entry in entries for file in (entry, *entry.rglob("*"))]
        found.append(Kind(name, what, len(entries), sum(sizes)))
    return found


def clear(root: Path) -> list[Path]:
    """Remove what is in the cache; give what is being prepared and stays. Raises StorageError where that is refused."""
    kept = []
    try:
        for entry in (entry for name in KINDS for entry in _entries(root / name)):
            if not entry.is_dir():
                entry.unlink(missing_ok=True)
            elif not _remove(entry):
                kept.append(entry)
    except OSError as error:
        raise StorageError(
            f"{error.filename} can't be removed: {error.strerror}", remedy="Mend permissions there."
        ) from error
    return kept


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if OURS.fullmatch(path.name)) if folder.is_dir() else []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _remove(folder: Path) -> bool:
    """Remove a folder, unless a process holds its lock: it prepares there."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True

"""The cache of operators that DeepSpeed compiles at their first use, and the locks that killed compilations leave in
it.

torch marks a build by a file named `lock` (torch/utils/file_baton.py), which the building process holds open and
removes at the end. A process that is killed meanwhile leaves the file, and every later one waits for it without end and
without a word.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

# The owner may be on another host where the cache is shared. One that compiles writes files more often than this.
SHARED_SILENCE_S = 900.0
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "ceph", "beegfs", "9p", "virtiofs")


def cache_root(environment: Mapping[str, str]) -> Path:
    """Name the folder of compiled extensions, as torch does (torch/utils/cpp_extension.py, get_default_build_root)."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def builds(root: Path) -> list[Path]:
    """List the extensions that are marked as being built: the folders with a lock, in `root` or one level down (torch
    adds one such as `py311_cu130` unless TORCH_EXTENSIONS_DIR is set)."""
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return sorted(lock.parent for lock in found if lock.is_file())


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove the locks whose owner is gone and under which nobody compiles; give the extensions' folders."""
    stale = [folder for folder in builds(root) if _is_stale(folder)]
    for folder in stale:
        folder.joinpath("lock").unlink(missing_ok=True)
    return stale


def _is_stale(folder: Path) -> bool:
    if sys.platform != "linux" or _is_in_use(folder.resolve()):
        return False
    return not _is_shared(folder) or _silence_s(folder) > SHARED_SILENCE_S


def _is_in_use(folder: Path) -> bool:
    """Whether a process of this host holds the lock open, or works in the folder as ninja and the compiler do: they
    outlive a killed owner for a while."""
    lock = folder / "lock"
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if process.joinpath("cwd").readlink().is_relative_to(folder):
                return True
            if any(_target(descriptor) == lock for descriptor in process.joinpath("fd").iterdir()):
                return True
        except OSError:
            continue  # it ended, or belongs to somebody else
    return False


def _target(descriptor: Path) -> Path | None:
    try:
        return descriptor.readlink()
    except OSError:
        return None  # closed this moment


def _is_shared(folder: Path) -> bool:
    """Whether the folder lies on a network file system (the innermost mount of /proc/mounts)."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    around = [(len(mount[1]), mount[2]) for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    kind = max(around, default=(0, ""))[1]
    return kind.startswith("fuse.") or kind in SHARED_FILE_SYSTEMS


def _silence_s(folder: Path) -> float:
    """Measure how long nothing in the folder has changed, in seconds."""
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return 0.0  # something changes right now

"""The cache of operators that DeepSpeed compiles at their first use, and the locks that killed compilations leave in it.

torch marks a build by a file named `lock` (torch/utils/file_baton.py) and removes it at the end. A process that is killed
meanwhile leaves the file, and every later process waits for it without end and without a word.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

# A build runs ninja and the compiler with the extension's folder as working directory; before and after that it only
# writes and loads small files. A lock older than this in whose folder nobody works has lost its owner.
UNATTENDED_S = 60.0


def cache_root(environment: Mapping[str, str]) -> Path:
    """Name the folder of compiled extensions, as torch does (torch/utils/cpp_extension.py, get_default_build_root)."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def builds(root: Path) -> list[Path]:
    """List the extensions that are marked as being built: the folders with a lock."""
    return sorted(lock.parent for lock in root.glob("**/lock") if lock.is_file())


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove the locks that nobody works under any more; give the extensions' folders."""
    marked = builds(root)
    stale = [folder for folder in marked if _is_stale(folder)] if marked else []
    for folder in stale:
        folder.joinpath("lock").unlink(missing_ok=True)
    return stale


def _is_stale(folder: Path) -> bool:
    try:
        age_s = time.time() - folder.joinpath("lock").stat().st_mtime
    except FileNotFoundError:
        return False  # released this moment
    return age_s > UNATTENDED_S and sys.platform == "linux" and not _somebody_works_in(folder.resolve())


def _somebody_works_in(folder: Path) -> bool:
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if process.joinpath("cwd").readlink().is_relative_to(folder):
                    return True
            except OSError:
                continue  # it ended, or belongs to somebody else
    return False

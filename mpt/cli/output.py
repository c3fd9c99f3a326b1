"""Writing the file that `-o` names."""

from pathlib import Path

from mpt.errors import StorageError
from mpt.running.run_directory import write_atomically

REMEDY = "Give -o a file in a folder that exists and can be written."


def write_output(path: Path, text: str) -> None:
    """Write a command's result whole. Raises StorageError; a folder that isn't there is not made."""
    if not path.parent.is_dir():
        raise StorageError(f"can't write {path}: there is no folder {path.parent}", remedy=REMEDY)
    if path.is_dir():
        raise StorageError(f"can't write {path}: it is a folder", remedy=REMEDY)
    try:
        write_atomically(path, text)
    except StorageError as error:
        raise StorageError(error.problem, remedy=REMEDY) from error

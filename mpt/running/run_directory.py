"""Every path inside a run directory, and writing that is whole or absent.

The run directory is the only channel between supervisor and worker, and a contract that programs may rely on. It holds
no absolute path that decides anything: moved or copied as a whole, a run goes on.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpt.errors import MptError, StorageError

# What the system says of a disk that is full, read-only or broken.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class AttemptDirectory:
    """The files of one attempt: what was planned, how it was started, what it said."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def command(self) -> Path:
        return self.path / "command.txt"

    @property
    def log(self) -> Path:
        return self.path / "worker.log"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def stop(self) -> Path:
        """A file that, by being there, asks every rank to stop at the next step boundary."""
        return self.path / "stop"

    def heartbeat(self, rank: int) -> Path:
        """Where a rank is, written anew all the time: its silence is what a hang is known by."""
        return self.path / f"heartbeat-{rank}"

    def stacks(self, rank: int) -> Path:
        """Where each thread of a rank stood when it was taken to hang."""
        return self.path / f"stacks-{rank}.txt"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def machine(self) -> Path:
        return self.path / "machine.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def incidents(self) -> Path:
        """A folder for each event of the numbers that was looked into, with its autopsy.json."""
        return self.path / "incidents"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run trained on its own text, if it did."""
        return self.path / "tokenizer"

    @property
    def trackers(self) -> Path:
        """The ids of this run in its trackers."""
        return self.path / "trackers.json"

    @property
    def from_data(self) -> Path:
        """What the data says of the model, such as its classes; where it says nothing there is no such file."""
        return self.path / "from_data.json"

    @property
    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("checkpoint-*"))

    @property
    def final(self) -> Path:
        return self.path / "final"

    def attempt(self, number: int) -> AttemptDirectory:
        """Name the folder of an attempt, counted from 1."""
        return AttemptDirectory(self.path / "attempts" / f"{number:03d}")

    def attempt_numbers(self) -> list[int]:
        """List the attempts that have a plan, oldest first."""
        folders = self.path.joinpath("attempts").glob("[0-9]*/plan.json")
        return sorted(int(plan.parent.name) for plan in folders)

    @property
    def exists(self) -> bool:
        """Whether a run was begun here; an empty folder is none."""
        return self.journal.exists()


def find_run(name: str, runs_dir: Path) -> RunDirectory:
    """Find a run by its directory, or by its name under `runs_dir`; a directory that is a run wins.

    Raises MptError with the runs that there are, StorageError where a folder can't be looked into.
    """
    try:
        for path in (Path(name), runs_dir / name):
            if name and RunDirectory(path).exists:
                return RunDirectory(path)
        known = sorted(path.parent.name for path in runs_dir.glob("*/journal.jsonl"))
        is_folder = bool(name) and Path(name).is_dir()
    except OSError as error:
        raise StorageError(
            f"{name} can't be looked into: {error.strerror}", remedy="Give a run's directory that you may read."
        ) from error
    problem = f"{name} is no run: it holds no journal.jsonl" if is_folder else f"there is no run {name!r}"
    there = f" In {runs_dir}: {', '.join(known)}." if known else f" In {runs_dir} there is none."
    raise MptError(problem, remedy=f"Give a run's directory, or its name with --runs-dir.{there}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write at `path` into a StorageError that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}",
            remedy="Free space or mend permissions there, or choose another --runs-dir.",
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole: a reader, or a kill at any moment, sees the old content or the new.

    A link stays one, and its target is written; a device or pipe is written to, never replaced. Raises StorageError
    where the folder can't be written.
    """
    with writing(path):
        path = path.resolve()
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        make_durable(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write JSON as people read it. Raises StorageError where the folder can't be written."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def make_durable(path: Path) -> None:
    """Put a file's content, or a folder's entries, on the disk: a rename is there only after its folder's."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

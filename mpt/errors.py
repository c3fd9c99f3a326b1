"""The errors that mpt answers with, and the exit codes that programs may rely on.

An `MptError` is a message for the person at the terminal: what is wrong, and what to do about it. Any other
exception is a bug of ours. Only the two `main` functions (`mpt.cli.main`, `mpt.training.worker`) turn either into
an exit status.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """How an mpt process ends. Clear of 64-78 and 126-165, which shells, sysexits and schedulers use."""

    DONE = 0
    BUG = 1
    USAGE = 2  # usage, recipe or configuration: never worth a retry
    UNSUPPORTED = 3  # this machine can't: precision, memory, missing package
    STOPPED = 80  # stopped on request with a checkpoint committed: requeue
    DIVERGED = 81  # the numbers went bad
    NO_PROGRESS = 82  # restart budget spent
    STORAGE = 83
    NO_USABLE_CHECKPOINT = 84
    LOCKED = 85
    OUT_OF_MEMORY = 86  # at micro batch 1
    HUNG = 87
    INTERRUPTED = 130  # Ctrl-C before a commit
    TERMINATED = 143  # SIGTERM before a commit


class MptError(Exception):
    """A problem that the user can mend: `problem` says what was found, `remedy` what to do."""

    exit_code: ExitCode = ExitCode.USAGE

    def __init__(self, problem: str, *, remedy: str, exit_code: ExitCode | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        if exit_code is not None:
            self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its arguments, and `remedy` is a keyword: processes hand errors on.
        return _revive, (type(self), self.args, self.__dict__)


def _revive(kind: type[MptError], arguments: tuple[Any, ...], values: dict[str, Any]) -> MptError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(values)
    return error


@dataclass(frozen=True, slots=True)
class RecipeProblem:
    """One thing wrong in a recipe, where it stands, and how to mend it. `line` counts from 1; None: not in the text."""

    file: str
    line: int | None
    key: str
    problem: str
    suggestion: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = f"{place}: {self.key}: {self.problem}" if self.key else f"{place}: {self.problem}"
        return f"{text}; {self.suggestion}" if self.suggestion else text


class RecipeError(MptError):
    """Everything that is wrong with a recipe, at once."""

    def __init__(
        self,
        problems: Sequence[RecipeProblem],
        *,
        remedy: str = "Mend the lines above; `mpt validate RECIPE` checks again, `mpt schema` lists every key.",
    ) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), remedy=remedy)
        self.problems = tuple(problems)


class UnsupportedError(MptError):
    """This machine, or what is installed on it, can't do what was asked."""

    exit_code = ExitCode.UNSUPPORTED


class StorageError(MptError):
    """A run directory can't be written or read."""

    exit_code = ExitCode.STORAGE


class NoUsableCheckpointError(MptError):
    """Checkpoints exist and none of them verifies."""

    exit_code = ExitCode.NO_USABLE_CHECKPOINT


class RunLockedError(MptError):
    """Another process owns the run directory."""

    exit_code = ExitCode.LOCKED

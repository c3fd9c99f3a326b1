"""A sign of life of one rank: a small file that is written anew in place, at each phase, step and batch.

The writer costs one pwrite of a few microseconds and never fsyncs. What counts for the reader is that the content
changed since its last look, by its own clock: no time of another host or file system is believed.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpt.running.run_directory import AttemptDirectory

LINE_BYTES = 128


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is: its phase, the optimizer step in the works, and how many steps this process has begun.

    `count` grows with each beat; `pid` is the process to ask for its stacks.
    """

    phase: str
    step: int
    steps_begun: int
    count: int
    pid: int


class Heartbeat:
    """The writing end, for one rank of an attempt. A disk that refuses it never stops the training."""

    def __init__(self, attempt: AttemptDirectory, rank: int) -> None:
        self._phase, self._step, self._steps_begun, self._count = "imports", 0, 0, 0
        self._descriptor = -1
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(attempt.heartbeat(rank), flags, 0o644)
        self.beat()

    def phase(self, phase: str) -> None:
        """Say that a phase begins, or goes on."""
        self._phase = phase
        self.beat()

    def step(self, number: int) -> None:
        """Say that an optimizer step begins."""
        self._step, self._steps_begun = number, self._steps_begun + 1
        self.phase("training")

    def beat(self) -> None:
        """Say that the phase goes on."""
        self._count += 1
        line = (
            f'{{"phase": "{self._phase}", "step": {self._step}, "steps_begun": {self._steps_begun}, '
            f'"count": {self._count}, "pid": {os.getpid()}}}'
        )
        if self._descriptor >= 0:
            with suppress(OSError):
                os.pwrite(self._descriptor, f"{line:<{LINE_BYTES - 1}}\n".encode(), 0)


def read_beat(path: Path) -> Beat | None:
    """Read a rank's newest beat; None where there is none, or one is being written."""
    try:
        beat = Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return beat

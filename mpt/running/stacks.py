"""Where each thread of a worker stands, written down by the worker itself when the supervisor signals it.

Python's faulthandler does it in the signal handler, also while the interpreter waits inside C code; a process that was
stopped (SIGSTOP), or that waits in the kernel for a device, can't answer.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mpt.running.run_directory import AttemptDirectory

# Free: schedulers use SIGUSR1, torchrun the terminal's.
ASK = signal.SIGUSR2
ANSWER_S = 2.0
QUIET_S = 0.2
STOPPED = "none: the process was stopped (SIGSTOP), and can't answer"
GONE = "none: the process is gone"
SILENT = "none: the process did not answer"


def answer_with_stacks(attempt: AttemptDirectory, rank: int) -> None:
    """Let this process write the stacks of its threads when it is asked; called by a worker at its start."""
    try:
        file = attempt.stacks(rank).open("a", encoding="utf-8")
    except OSError:
        return  # no reason not to train
    faulthandler.register(ASK, file=file, all_threads=True)


def collect_stacks(attempt: AttemptDirectory, pids: Mapping[int, int], alive: Iterable[int]) -> dict[int, str]:
    """Ask each rank's process for its stacks and wait for the answers; give the file of each, or why there is none.

    `alive` are the processes of the attempt: a pid that is none of them belongs to somebody else by now.
    """
    alive = set(alive)
    found = {rank: _ask(pid) if pid in alive else GONE for rank, pid in pids.items()}
    asked = {rank for rank, said in found.items() if not said}
    sizes: dict[int, int] = {}
    until, quiet_since = time.monotonic() + ANSWER_S, time.monotonic()
    while asked and time.monotonic() < until:
        now = {rank: _size(attempt.stacks(rank)) for rank in asked}
        if now != sizes:
            sizes, quiet_since = now, time.monotonic()
        if all(sizes.values()) and time.monotonic() - quiet_since > QUIET_S:
            break
        time.sleep(0.02)
    return found | {rank: attempt.stacks(rank).name if _size(attempt.stacks(rank)) else SILENT for rank in asked}


def remove_empty(attempt: AttemptDirectory) -> None:
    """Remove the files of ranks that were never asked."""
    for path in attempt.path.glob("stacks-*.txt"):
        if not _size(path):
            path.unlink(missing_ok=True)


def _ask(pid: int) -> str:
    """Signal a process; "" where it can answer, else why not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        if state in "Tt":
            return STOPPED
        os.kill(pid, ASK)
    except OSError:
        return GONE
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

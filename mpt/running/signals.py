"""What the user wishes by signals: the first asks for a graceful end, a second one for an immediate one."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from mpt.errors import ExitCode

# timeout(1) signals its child and then the child's group; both are one wish.
ONE_WISH_S = 0.5
# SIGUSR1 is what Slurm is usually told to send before the time is up: `#SBATCH --signal=B:USR1@90`.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(slots=True)
class StopWish:
    """The first signal that came, None before any, and whether another one followed.

    `by` says who wished it, in words. While `is_immediate` there is nothing yet that could be stopped gracefully: a
    signal then ends the process.
    """

    signal: int | None = None
    is_urgent: bool = False
    is_immediate: bool = True
    last: float = 0.0
    by: str = ""

    def ask(self, by: str) -> None:
        """Wish for a graceful end, as SIGTERM does, without a signal."""
        if self.signal is None:
            self.signal, self.by, self.last = signal.SIGTERM, by, time.monotonic()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; raises SystemExit where it ends the process."""
        if self.is_immediate:
            raise SystemExit(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.by = number, signal.Signals(number).name
        elif now - self.last > ONE_WISH_S:
            self.is_urgent = True
        self.last = now


@contextmanager
def listening() -> Iterator[StopWish]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and a closed terminal into wishes for as long as the context lasts.

    What was ignored before stays ignored: `nohup` means it. Once a wish was heard, later signals are ignored when the
    context is over: the process only has its last words to say, and its exit code has to tell that the stop was made.
    """
    wish = StopWish()
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, wish.on_signal)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if wish.signal is None else signal.SIG_IGN)

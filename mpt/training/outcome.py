"""How a worker's training ends other than by finishing. Raised in the loop, caught by `mpt.training.worker`."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType


class Diverged(Exception):  # noqa: N818 - an outcome, as StopIteration is one
    """The numbers went bad for good; raised before the optimizer step that would have spread them into the weights.

    `what` is "loss", "grad_norm", "loss_scale", "update" or "weights"; `code` one of `mpt.training.verdict.Code`;
    `onset` the first step of the event.
    """

    def __init__(self, step: int, what: str, value: float, *, code: str, reason: str, onset: int) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.what = what
        self.value = value
        self.code = code
        self.reason = reason
        self.onset = onset


class Stopped(Exception):  # noqa: N818
    """A stop was asked for, every rank agreed, and `checkpoint` is committed."""

    def __init__(self, step: int, checkpoint: str) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step
        self.checkpoint = checkpoint


@dataclass(slots=True)
class StopRequest:
    """Whether somebody asked this process to stop: by a signal, or by the attempt's stop file."""

    stop_file: Path
    signalled: str | None = field(default=None)

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as a wish to stop at the next step boundary, and leave Ctrl-C to the supervisor."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)  # Slurm's, where it goes to every process of the job
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def by(self) -> str | None:
        """Say who asked; None: nobody yet."""
        if self.signalled:
            return self.signalled
        return "stop file" if self.stop_file.exists() else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = signal.Signals(number).name

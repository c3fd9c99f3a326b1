"""What to do after an attempt has ended: a pure function of how it ended and of what was tried."""

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mpt.errors import ExitCode

# Another try would end the same way.
FINAL_FAILURES = (
    ExitCode.USAGE,
    ExitCode.UNSUPPORTED,
    ExitCode.STORAGE,
    ExitCode.NO_USABLE_CHECKPOINT,
    ExitCode.OUT_OF_MEMORY,
)
MAX_BACKOFF_S = 60.0
DIVERGED_REMEDY = (
    "Lower training.learning_rate, lengthen training.warmup_steps, or take a precision with more range; the "
    "checkpoints before it are sound."
)
LOSS_SCALE_REMEDY = (
    "Gradients overflow at the lowest loss scale that the recipe allows: leave precision.loss_scale.static or min out "
    "or lower it, keep the layers that overflow in fp32 through precision.layers, or ask for bf16 or fp32; the "
    "checkpoints before it are sound."
)


class Outcome(StrEnum):
    """How a run ends."""

    FINISHED = "finished"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended.

    `word` is its last word in the journal, None where it died without one; the return code is a hint only, because
    torchrun turns every cause into 1. `stop_signal` is what the user sent, None where nothing; `forced` says why the
    supervisor ended the attempt, None where it ended by itself. `killed_rank` is the rank that a signal ended first,
    with the signal: what the other ranks then say of lost connections is noise.
    """

    word: dict[str, Any] | None
    return_code: int
    stop_signal: int | None = None
    forced: str | None = None
    has_started: bool = True
    has_checkpoint: bool = False
    killed_rank: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """Try again from the newest checkpoint, after a pause."""

    reason: str
    after_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over."""

    outcome: Outcome
    exit_code: ExitCode
    reason: str
    remedy: str = ""


def decide(ended: Ended, restarts: int, max_restarts: int) -> Restart | Stop:
    """Judge an ended attempt after `restarts` earlier restarts."""
    word = ended.word
    if word is not None and word["kind"] == "finished":
        return Stop(Outcome.FINISHED, ExitCode.DONE, f"finished at step {word['step']}")
    if word is not None and word["kind"] == "stopped":
        return Stop(
            Outcome.STOPPED,
            ExitCode.STOPPED,
            f"at step {word['step']}, as asked; saved as {word['checkpoint']}",
            "The same command goes on from there.",
        )
    if word is not None and word["kind"] == "diverged":
        return Stop(
            Outcome.DIVERGED,
            ExitCode.DIVERGED,
            f"{word['reason']} (step {word['step']}, {word['code']})",
            LOSS_SCALE_REMEDY if word["what"] == "loss_scale" else DIVERGED_REMEDY,
        )
    if word is not None and word["exit_code"] in FINAL_FAILURES:
        return Stop(Outcome.FAILED, ExitCode(word["exit_code"]), word["problem"], word["remedy"])
    cause = _cause(ended)
    if ended.stop_signal is not None:
        return interrupted(
            ended.stop_signal,
            ended.forced or f"while it was stopping: {cause}",
            loses_steps=ended.has_started,
            has_checkpoint=ended.has_checkpoint,
        )
    if restarts >= max_restarts:
        return Stop(
            Outcome.FAILED,
            ExitCode.NO_PROGRESS,
            f"{cause}; {_times(restarts)} restarted, and restart.max_restarts is {max_restarts}",
            "See the log. The same command goes on from the last checkpoint.",
        )
    return Restart(cause, 0.0 if restarts == 0 else min(MAX_BACKOFF_S, 2.0 ** (restarts - 1)))


def interrupted(stop_signal: int, reason: str, *, loses_steps: bool, has_checkpoint: bool) -> Stop:
    """Judge a run that ended without a save because the user wished it, by SIGINT (2) or another signal.

    Where no step was made since the last checkpoint it is as good as stopped with one.
    """
    remedy = f"The same command {'goes on from the last checkpoint' if has_checkpoint else 'begins again'}."
    if has_checkpoint and not loses_steps:
        return Stop(Outcome.STOPPED, ExitCode.STOPPED, reason, remedy)
    code = ExitCode.INTERRUPTED if stop_signal == signal.SIGINT else ExitCode.TERMINATED
    return Stop(Outcome.STOPPED, code, reason, remedy)


def _cause(ended: Ended) -> str:
    if ended.killed_rank is not None:
        return _killed(f"rank {ended.killed_rank[0]}", ended.killed_rank[1])
    if ended.word is not None:
        return str(ended.word["problem"])
    if ended.return_code < 0:
        return _killed("the worker", -ended.return_code)
    return f"a worker died without a last word (exit status {ended.return_code})"


def _killed(who: str, number: int) -> str:
    if number == signal.SIGKILL:
        return f"{who} was killed (SIGKILL), by somebody or by the kernel for want of memory"
    return f"{who} was killed by signal {number}"


def _times(restarts: int) -> str:
    return {0: "not", 1: "once", 2: "twice"}.get(restarts, f"{restarts} times")

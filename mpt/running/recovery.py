"""What to do after an attempt has ended: a pure function of how it ended and of what was tried."""

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mpt.errors import ExitCode
from mpt.planning.repair import Repair
from mpt.recipe.schema import RestartSection
from mpt.running.hang import Hang
from mpt.running.ladder import Rung

# Another try would end the same way.
FINAL_FAILURES = (
    ExitCode.USAGE,
    ExitCode.UNSUPPORTED,
    ExitCode.STORAGE,
    ExitCode.NO_USABLE_CHECKPOINT,
)
MAX_BACKOFF_S = 300.0
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
    supervisor ended the attempt, None where it ended by itself. `hang` is what it was ended for where a rank fell
    silent. `silent_rank` is a rank that ended without a last word, with its exit status: what the other ranks then say
    of lost connections is noise. `has_progressed`: a checkpoint newer than the one it began with was committed.
    """

    word: dict[str, Any] | None
    return_code: int
    stop_signal: int | None = None
    forced: str | None = None
    has_started: bool = True
    has_checkpoint: bool = False
    silent_rank: tuple[int, int] | None = None
    hang: Hang | None = None
    has_progressed: bool = False


@dataclass(frozen=True, slots=True)
class History:
    """What was tried since the supervisor began: restarts in all, and attempts in a row that came no further."""

    restarts: int = 0
    fruitless: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    """Try again from the newest checkpoint, after a pause, under a changed plan where there is a `repair`.

    `onset`: from a checkpoint before that step, where the numbers went bad.
    """

    reason: str
    after_s: float
    history: History
    repair: Repair | None = None
    onset: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over."""

    outcome: Outcome
    exit_code: ExitCode
    reason: str
    remedy: str = ""


def decide(
    ended: Ended,
    history: History,
    policy: RestartSection,
    *,
    smaller_batch: Repair | None = None,
    rung: Rung | None = None,
    tried: str = "nothing",
) -> Restart | Stop:
    """Judge an ended attempt by what was tried before it.

    `smaller_batch` is the repair for too little memory, None where the micro batch is 1 already. `rung` is what to try
    next where the numbers went bad, None where nothing is left, and `tried` what was.
    """
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
        return _after_bad_numbers(word, ended, history, policy, rung, tried)
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
    if word is not None and word["exit_code"] == ExitCode.OUT_OF_MEMORY and ended.hang is None:
        return _with_less_memory(word, ended, history, policy, smaller_batch)
    return _again(cause, ended, history, policy)


def _after_bad_numbers(
    word: dict[str, Any], ended: Ended, history: History, policy: RestartSection, rung: Rung | None, tried: str
) -> Restart | Stop:
    """Climb a rung, from a checkpoint before the event; to go back on purpose is no attempt in vain."""
    if rung is not None and ended.stop_signal is None and history.restarts < policy.max_restarts:
        return Restart(rung.reason, 0.0, History(history.restarts + 1, history.fruitless), rung.repair, word["onset"])
    return Stop(
        Outcome.DIVERGED,
        ExitCode.DIVERGED,
        f"{word['reason']} (step {word['step']}, {word['code']}); tried: {tried}",
        LOSS_SCALE_REMEDY if word["what"] == "loss_scale" else DIVERGED_REMEDY,
    )


def _again(cause: str, ended: Ended, history: History, policy: RestartSection) -> Restart | Stop:
    """Try the same again while that makes sense: within the budget, and unless it keeps coming no further."""
    code = ExitCode.NO_PROGRESS if ended.hang is None else ExitCode.HUNG
    remedy = "See the log. The same command goes on from the last checkpoint."
    if history.restarts >= policy.max_restarts:
        tried = f"{_times(history.restarts)} restarted, and restart.max_restarts is {policy.max_restarts}"
        return Stop(Outcome.FAILED, code, f"{cause}; {tried}", remedy)
    fruitless = 0 if ended.has_progressed else history.fruitless + 1
    if fruitless >= policy.max_attempts_without_progress:
        tried = f"{fruitless} attempts in a row" if fruitless > 1 else "an attempt"
        return Stop(Outcome.FAILED, code, f"{cause}; {tried} saved no newer checkpoint", remedy)
    pause = min(MAX_BACKOFF_S, policy.backoff * 2.0 ** min(fruitless - 2, 30)) if fruitless > 1 else 0.0
    return Restart(cause, pause, History(history.restarts + 1, fruitless))


def _with_less_memory(
    word: dict[str, Any], ended: Ended, history: History, policy: RestartSection, smaller_batch: Repair | None
) -> Restart | Stop:
    """Change the plan so that it needs less; a change of plan is no attempt in vain."""
    is_allowed = policy.halve_micro_batch and history.restarts < policy.max_restarts
    if smaller_batch is None or not is_allowed:
        why = "the micro batch is 1" if smaller_batch is None else "restart allows no smaller micro batch"
        return Stop(Outcome.FAILED, ExitCode.OUT_OF_MEMORY, f"{word['problem']}; {why}", word["remedy"])
    fruitless = 0 if ended.has_progressed else history.fruitless
    return Restart(word["problem"], 0.0, History(history.restarts + 1, fruitless), smaller_batch)


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
    if ended.hang is not None:
        return str(ended.hang)
    if ended.silent_rank is not None:
        rank, code = ended.silent_rank
        if code < 0:
            return _killed(f"rank {rank}", -code)
        return f"rank {rank} died without a last word (exit status {code})"
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

"""Start an attempt, watch it, judge its end, decide, repeat: the parent of a run.

It holds the run's lock, writes plans, and reads what the worker writes into the run directory. It imports no torch, so that
it can't run out of memory or meet a NaN itself, and it can be killed at any moment: its workers die with it, and the next
`mpt train` goes on from the directory.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

from mpt.planning.plan import Plan
from mpt.running import checkpoints, launcher
from mpt.running.follow import LineFollower
from mpt.running.jit_cache import builds, cache_root, remove_stale_locks
from mpt.running.journal import LAST_WORDS, Journal, last_word, read_events
from mpt.running.recovery import Ended, Stop, decide
from mpt.running.run_directory import RunDirectory, write_atomically

POLL_S = 0.1
JIT_CHECK_S = 5.0
# After an attempt's last word its processes have nothing left to do but end.
LEAVING_S = 60.0
# A step, an evaluation or a save that takes longer than this after a stop was asked for is given up.
STOP_GRACE_S = 600.0

BuildCommand = Callable[[Plan, RunDirectory, int, Mapping[str, str]], launcher.Command]


class View(Protocol):
    """Whoever shows the run while it goes on."""

    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class StopWish:
    """What the user asked for by signals: the first one asks for a graceful end, a second one for an immediate one."""

    first: int | None = None
    count: int = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.count += 1


@contextmanager
def listening() -> Iterator[StopWish]:
    """Turn SIGINT and SIGTERM into wishes for as long as the context lasts."""
    wish = StopWish()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, wish.on_signal) for number in numbers}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    plan: Plan,
    run: RunDirectory,
    view: View,
    wish: StopWish,
    *,
    start_from: checkpoints.Choice | None,
    build_command: BuildCommand = launcher.build_command,
    environment: Mapping[str, str] | None = None,
) -> Stop:
    """Carry out a plan in a run directory whose lock is held; give the verdict on the run.

    `start_from` is the checkpoint of the first attempt; later ones take the newest that verifies.
    """
    environment = os.environ if environment is None else environment
    restarts = 0
    while True:
        number = max(run.attempt_numbers(), default=0) + 1
        attempt = Attempt(plan, run, number, view, wish)
        ended = attempt.carry_out(start_from, build_command, environment)
        verdict = decide(ended, restarts, plan.recipe.restart.max_restarts)
        journal = Journal(run.journal, number)
        outcome = verdict.outcome.value if isinstance(verdict, Stop) else "restart"
        journal.append("attempt_ended", return_code=ended.return_code, verdict=outcome, reason=verdict.reason)
        if isinstance(verdict, Stop):
            journal.append("run_finished", outcome=verdict.outcome, exit_code=verdict.exit_code, reason=verdict.reason)
            return verdict
        restarts += 1
        view.note(f"{verdict.reason}: restart {restarts} of {plan.recipe.restart.max_restarts}")
        _wait(verdict.after_s, wish)
        start_from = checkpoints.newest_usable(run)


class Attempt:
    """One life of the worker."""

    def __init__(self, plan: Plan, run: RunDirectory, number: int, view: View, wish: StopWish) -> None:
        self.plan = plan
        self.run = run
        self.number = number
        self.view = view
        self.wish = wish
        self.journal = Journal(run.journal, number)
        self.files = run.attempt(number)
        self._has_started = False
        self._word_since: float | None = None
        self._asked_since: float | None = None
        self._jit_checked = 0.0
        self._compiling: tuple[str, ...] = ()

    def carry_out(
        self, start_from: checkpoints.Choice | None, build_command: BuildCommand, environment: Mapping[str, str]
    ) -> Ended:
        """Write the plan, start the worker, follow it to its end."""
        resume_from = None if start_from is None else start_from.path.name
        plan = replace(self.plan, resume_from=resume_from)
        self.files.path.mkdir(parents=True, exist_ok=True)
        self.files.stop.unlink(missing_ok=True)
        if plan.deepspeed is not None:
            write_atomically(self.files.deepspeed, to_text(plan.deepspeed))
            self._clear_jit_cache(environment)
        write_atomically(self.files.plan, to_text(plan.to_json()))
        if start_from is not None:
            for name, wrong in start_from.passed_over:
                self.journal.append("checkpoint_passed_over", name=name, reason=wrong)
                self.view.note(f"{name} is not used: {wrong}")
        command = build_command(plan, self.run, self.number, environment)
        self.journal.append("attempt_started", resume_from=resume_from, command=str(command))
        self.view.attempt(self.number, resume_from)
        events, rows = LineFollower(self.run.journal), LineFollower(self.run.metrics)
        if self.wish.count:  # asked before there was anything to stop
            return self._ended(0)
        process = launcher.start(command, self.files.log, self.files.command)
        try:
            while process.poll() is None:
                self._follow(events, rows)
                if plan.deepspeed is not None and not self._has_started:
                    self._watch_compilation(environment)
                if self._must_end(process):
                    break
                time.sleep(POLL_S)
        finally:
            return_code = launcher.end(process, grace_s=0)
        self._follow(events, rows)
        return self._ended(return_code)

    def _follow(self, events: LineFollower, rows: LineFollower) -> None:
        for event in events.new():
            if event.get("attempt") != self.number:
                continue
            if event["kind"] == "training_started":
                self._has_started = True
            if event["kind"] in LAST_WORDS and self._word_since is None:
                self._word_since = time.monotonic()
            self.view.event(event)
        for row in rows.new():
            if row.get("attempt") == self.number:
                self.view.row(row)

    def _must_end(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether the attempt is to be ended by force: a stop that can't wait, or a worker that does not leave."""
        now = time.monotonic()
        if self._word_since is not None:
            return now - self._word_since > LEAVING_S
        if not self.wish.count:
            return False
        if self._asked_since is None:
            self._asked_since = now
            self.journal.append("stop_requested", by=signal.Signals(self.wish.first or signal.SIGTERM).name)
            if self._has_started:
                self.files.stop.touch()
                self.view.note("stopping: the step is finished and saved; once more ends at once")
        if self.wish.count > 1 or not self._has_started:
            return True  # before the first step there is nothing to save
        return now - self._asked_since > STOP_GRACE_S

    def _ended(self, return_code: int) -> Ended:
        word = last_word(read_events(self.run.journal), self.number)
        has_checkpoint = bool(checkpoints.list_checkpoints(self.run))
        return Ended(word, return_code, self.wish.first, has_checkpoint)

    def _clear_jit_cache(self, environment: Mapping[str, str]) -> None:
        for folder in remove_stale_locks(cache_root(environment)):
            self.journal.append("notice", text=f"removed the lock of a killed compilation in {folder}")
            self.view.note(f"removed the lock that a killed compilation left in {folder}")

    def _watch_compilation(self, environment: Mapping[str, str]) -> None:
        """Say when DeepSpeed compiles its operators, and free a worker that waits for a dead process's lock."""
        now = time.monotonic()
        if now - self._jit_checked < JIT_CHECK_S:
            return
        self._jit_checked = now
        self._clear_jit_cache(environment)
        compiling = tuple(folder.name for folder in builds(cache_root(environment)))
        if compiling and compiling != self._compiling:
            names = ", ".join(compiling)
            self.view.note(f"DeepSpeed compiles {names}: minutes the first time, cached from then on")
        self._compiling = compiling


def to_text(value: object) -> str:
    """Write JSON as people read it."""
    return json.dumps(value, indent=2) + "\n"


def _wait(seconds: float, wish: StopWish) -> None:
    """Pause before a restart; a wish to stop ends the pause."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not wish.count:
        time.sleep(POLL_S)

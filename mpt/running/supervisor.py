"""Start an attempt, watch it, judge its end, decide, repeat: the parent of a run.

It writes plans and reads what the worker writes into the run directory. It imports no torch, so that it can't run out
of memory or meet a NaN itself, and it can be killed at any moment: its workers die with it, and the next `mpt train`
goes on from the directory.
"""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from mpt.errors import MptError, StorageError
from mpt.planning.plan import Plan
from mpt.running import checkpoints
from mpt.running.follow import LineFollower
from mpt.running.jit_cache import builds, cache_root, remove_stale_locks
from mpt.running.journal import LAST_WORDS, Journal, last_word, read_events
from mpt.running.launcher import Command, Processes, build_command, killed_rank
from mpt.running.lineage import quarantine_later
from mpt.running.recovery import Ended, Outcome, Restart, Stop, decide, interrupted
from mpt.running.run_directory import RunDirectory, write_json, writing
from mpt.running.signals import StopWish

POLL_S = 0.1
JIT_CHECK_S = 3.0
# After an attempt's last word its processes have nothing left to do but end.
LEAVING_S = 60.0
# A step, an evaluation or a save that takes longer than this after a stop was asked for is given up.
STOP_GRACE_S = 600.0

BuildCommand = Callable[[Plan, RunDirectory, int, Mapping[str, str]], Command]


class View(Protocol):
    """Whoever shows the run while it goes on."""

    def attempt(self, number: int, resume_from: str | None) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


def supervise(
    plan: Plan,
    run: RunDirectory,
    view: View,
    wish: StopWish,
    environment: Mapping[str, str],
    *,
    start_from: checkpoints.Choice | None,
    build: BuildCommand = build_command,
) -> Stop:
    """Carry out a plan in a run directory whose lock is held; give the verdict on the run.

    `start_from` is the checkpoint of the first attempt; later ones take the newest that verifies. An MptError on the
    way is the verdict too, and is journalled as far as the disk allows.
    """
    try:
        stop = _until_it_ends(plan, run, view, wish, environment, start_from, build)
    except MptError as error:
        stop = Stop(Outcome.FAILED, error.exit_code, error.problem, error.remedy)
    with suppress(StorageError):
        journal = Journal(run.journal, _newest_attempt(run))
        journal.append("run_finished", outcome=stop.outcome, exit_code=stop.exit_code, reason=stop.reason)
    return stop


def _until_it_ends(
    plan: Plan,
    run: RunDirectory,
    view: View,
    wish: StopWish,
    environment: Mapping[str, str],
    start_from: checkpoints.Choice | None,
    build: BuildCommand,
) -> Stop:
    budget = plan.recipe.restart.max_restarts
    restarts = 0
    while wish.signal is None:
        attempt = Attempt(plan, run, _newest_attempt(run) + 1, view, wish, environment)
        ended = attempt.carry_out(start_from, build)
        verdict = decide(ended, restarts, budget)
        attempt.close(ended, verdict)
        if isinstance(verdict, Stop):
            return verdict
        restarts += 1
        view.note(f"{verdict.reason}: restart {restarts} of {budget}")
        _wait(verdict.after_s, wish)
        start_from = checkpoints.newest_usable(run)
    has_checkpoint = bool(checkpoints.list_checkpoints(run))
    return interrupted(
        wish.signal,
        "between two attempts, as asked" if restarts else "before it began, as asked",
        loses_steps=False,
        has_checkpoint=has_checkpoint,
    )


class Attempt:
    """One life of the worker."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        number: int,
        view: View,
        wish: StopWish,
        environment: Mapping[str, str],
    ) -> None:
        self.plan = plan
        self.run = run
        self.number = number
        self.view = view
        self.wish = wish
        self.environment = environment
        self.journal = Journal(run.journal, number)
        self.files = run.attempt(number)
        self._has_started = False
        self._word_since: float | None = None
        self._asked_since: float | None = None
        self._forced: str | None = None
        self._jit_checked = 0.0
        self._compiling: list[str] = []

    def carry_out(self, start_from: checkpoints.Choice | None, build: BuildCommand) -> Ended:
        """Write the plan, start the worker, follow it to its end; none of its processes is left."""
        self._leave_lineage(start_from)
        resume_from = None if start_from is None else start_from.path.name
        plan = replace(self.plan, resume_from=resume_from)
        if plan.deepspeed is not None:
            write_json(self.files.deepspeed, plan.deepspeed)
            self._clear_jit_cache()
        write_json(self.files.plan, plan.to_json())
        command = build(plan, self.run, self.number, self.environment)
        self._note_threads(command, resume_from)
        self.view.attempt(self.number, resume_from)
        events, rows = LineFollower(self.run.journal), LineFollower(self.run.metrics)
        processes = Processes(command, self.files, self.environment)
        try:
            while processes.is_running:
                self._follow(events, rows)
                self._watch_compilation()
                if self._must_end():
                    break
                time.sleep(POLL_S)
        finally:
            return_code = processes.end()
        self._follow(events, rows)
        word = last_word(read_events(self.run.journal), self.number)
        return Ended(
            word,
            return_code,
            stop_signal=self.wish.signal,
            forced=self._forced,
            has_started=self._has_started,
            has_checkpoint=bool(checkpoints.list_checkpoints(self.run)),
            killed_rank=killed_rank(self.files.log),
        )

    def close(self, ended: Ended, verdict: Restart | Stop) -> None:
        """Journal what was decided, if the disk allows: what the attempt came to is true without it."""
        outcome = verdict.outcome.value if isinstance(verdict, Stop) else "restart"
        with suppress(StorageError):
            self.journal.append("attempt_ended", returncode=ended.return_code, verdict=outcome, reason=verdict.reason)

    def _leave_lineage(self, start_from: checkpoints.Choice | None) -> None:
        """Put checkpoints out of reach that are newer than the one to go on from: they did not verify."""
        if start_from is None:
            return
        for name, wrong in start_from.passed_over:
            self.journal.append("checkpoint_passed_over", name=name, reason=wrong)
            self.view.note(f"{name} is not used: {wrong}")
        reason = f"going on from {start_from.path.name}"
        quarantine_later(self.run, self.journal, start_from.step, reason)

    def _note_threads(self, command: Command, resume_from: str | None) -> None:
        threads = command.environment.get("OMP_NUM_THREADS", self.environment.get("OMP_NUM_THREADS"))
        starts = [event for event in read_events(self.run.journal) if event["kind"] == "attempt_started"]
        before = starts[-1].get("threads") if starts else None
        if resume_from is not None and before not in (None, threads):
            self.view.note(f"OMP_NUM_THREADS was {before} and is {threads}: the last bits of sums may differ")
        self.journal.append("attempt_started", resume_from=resume_from, command=str(command), threads=threads)

    def _follow(self, events: LineFollower, rows: LineFollower) -> None:
        for event in events.new():
            kind = event.get("kind")
            if event.get("attempt") != self.number or kind is None:
                continue
            self._has_started = self._has_started or kind == "training_started"
            if kind in LAST_WORDS and self._word_since is None:
                self._word_since = time.monotonic()
            self.view.event(event)
        for row in rows.new():
            if row.get("attempt") == self.number:
                self.view.row(row)

    def _must_end(self) -> bool:
        """Whether the attempt is to be ended by force: a stop that can't wait, or a worker that does not leave."""
        now = time.monotonic()
        if self._word_since is not None:
            return now - self._word_since > LEAVING_S
        if self.wish.signal is None:
            return False
        if self._asked_since is None:
            self._asked_since = now
            if self._has_started:
                with writing(self.files.stop):
                    self.files.stop.touch()
                self.view.note("stopping: the step is finished and saved; once more ends at once")
            with suppress(StorageError):  # the stop is worth more than the record of it
                self.journal.append("stop_requested", by=signal.Signals(self.wish.signal).name)
        if not self._has_started:
            self._forced = "before training began, as asked"  # there is nothing to save
        elif self.wish.is_urgent:
            self._forced = "ended at once, as asked"
        elif now - self._asked_since > STOP_GRACE_S:
            self._forced = f"it had not stopped {STOP_GRACE_S:.0f} s after it was asked to, and was ended"
        return self._forced is not None

    def _clear_jit_cache(self) -> None:
        for folder in remove_stale_locks(cache_root(self.environment)):
            text = f"removed the lock that a killed compilation left in {folder}"
            self.journal.append("jit_lock_removed", folder=str(folder))
            self.view.note(text)

    def _watch_compilation(self) -> None:
        """Say when DeepSpeed compiles its operators, and free a worker that waits for a dead process's lock."""
        now = time.monotonic()
        if self.plan.deepspeed is None or self._has_started or now - self._jit_checked < JIT_CHECK_S:
            return
        self._jit_checked = now
        self._clear_jit_cache()
        compiling = [folder.name for folder in builds(cache_root(self.environment))]
        if compiling and compiling != self._compiling:
            self.view.event({"kind": "phase", "phase": "compiling"})
            self.view.note(f"compiling DeepSpeed's {', '.join(compiling)} (first run only, minutes)")
        elif self._compiling and not compiling:
            self.view.event({"kind": "phase", "phase": "setup"})
        self._compiling = compiling


def _newest_attempt(run: RunDirectory) -> int:
    return max(run.attempt_numbers(), default=0)


def _wait(seconds: float, wish: StopWish) -> None:
    """Pause before a restart; a wish to stop ends the pause."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and wish.signal is None:
        time.sleep(POLL_S)

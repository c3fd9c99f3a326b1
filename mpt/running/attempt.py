"""One life of the worker: written down, started, followed to its end, and none of its processes left."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mpt.errors import StorageError
from mpt.planning.plan import Plan
from mpt.running import checkpoints
from mpt.running.deadline import Deadline
from mpt.running.follow import LineFollower
from mpt.running.hang import Hang, HangWatch, to_event
from mpt.running.jit_cache import builds, cache_root, remove_stale_locks
from mpt.running.journal import LAST_WORDS, Journal, last_word, read_events
from mpt.running.launcher import Command, Processes, failed_ranks
from mpt.running.lineage import quarantine_later
from mpt.running.recovery import Ended, Restart, Stop
from mpt.running.run_directory import RunDirectory, write_json, writing
from mpt.running.signals import StopWish
from mpt.running.stacks import collect_stacks, remove_empty

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


@dataclass(frozen=True, slots=True)
class Fault:
    """What the next attempt has to make good: the attempt that broke, and when (monotonic seconds)."""

    attempt: int
    at: float


class Attempt:
    """An attempt to carry out a plan. `seen` are the longest silences of the run so far; `after` is what it follows."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        number: int,
        view: View,
        wish: StopWish,
        environment: Mapping[str, str],
        deadline: Deadline,
        seen: dict[str, float],
        after: Fault | None,
    ) -> None:
        self.plan = plan
        self.run = run
        self.number = number
        self.view = view
        self.wish = wish
        self.environment = environment
        self.deadline = deadline
        self.after = after
        self.fault: Fault | None = None
        self.journal = Journal(run.journal, number)
        self.files = run.attempt(number)
        self._hangs = HangWatch(
            self.files, plan.value("processes_per_node"), plan.recipe.restart, seen, time.monotonic()
        )
        self._hang: Hang | None = None
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
        self._hangs.looked_at = time.monotonic()
        try:
            while processes.is_running:
                self._follow(events, rows)
                self._watch_compilation()
                self.deadline.check(time.monotonic(), self.wish)
                if self._hung(processes) or self._must_end():
                    break
                time.sleep(POLL_S)
        finally:
            silent_s = 0.0 if self._hang is None else self._hang.silent_s
            self.fault = Fault(self.number, time.monotonic() - silent_s)
            return_code = processes.end()
            remove_empty(self.files)
        self._follow(events, rows)
        return self._ended(return_code, 0 if start_from is None else start_from.step)

    def _ended(self, return_code: int, began_at: int) -> Ended:
        """Gather what the attempt came to; `began_at` is the step that it went on from."""
        events = [event for event in read_events(self.run.journal) if event["attempt"] == self.number]
        word = last_word(events, self.number)
        spoke = {event.get("rank") for event in events if event["kind"] in LAST_WORDS}
        silent = [(rank, code) for rank, code in failed_ranks(self.files.log) if rank not in spoke]
        saved = [int(event["step"]) for event in events if event["kind"] == "checkpoint_saved"]
        return Ended(
            word,
            return_code,
            stop_signal=self.wish.signal,
            forced=self._forced,
            has_started=self._has_started,
            has_checkpoint=bool(checkpoints.list_checkpoints(self.run)),
            silent_rank=silent[0] if silent else None,
            hang=self._hang,
            has_progressed=max(saved, default=0) > began_at,
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
                self._note_recovery(row)
                self.view.row(row)

    def _note_recovery(self, row: Mapping[str, Any]) -> None:
        """Say once how long it took from a fault to the first step after it."""
        if self.after is None or "loss" not in row:
            return
        took = {"from_attempt": self.after.attempt, "step": row["step"], "seconds": time.monotonic() - self.after.at}
        self.after = None
        with suppress(StorageError):
            self.journal.append("recovered", **took | {"seconds": round(took["seconds"], 3)})

    def _hung(self, processes: Processes) -> bool:
        """Whether a rank is silent beyond its limit; then its stacks are written down."""
        if self._word_since is not None:
            return False
        self._hang = self._hangs.look(time.monotonic())
        if self._hang is None:
            return False
        stacks = collect_stacks(self.files, self._hangs.pids(), processes.pids())
        self.view.note(f"{self._hang}; stacks in {self.files.path}" if stacks else str(self._hang))
        with suppress(StorageError):
            self.journal.append("hang", **to_event(self._hang, stacks))
        return True

    def _must_end(self) -> bool:
        """Whether the attempt is to be ended by force: a stop that can't wait, or a worker that does not leave."""
        now = time.monotonic()
        if self._word_since is not None:
            return now - self._word_since > LEAVING_S
        if self.wish.signal is None:
            return False
        if self._asked_since is None:
            self._asked_since = now
            with suppress(StorageError):  # the stop is worth more than the record of it
                self.journal.append("stop_requested", by=self.wish.by or signal.Signals(self.wish.signal).name)
            if self._has_started:
                with writing(self.files.stop):
                    self.files.stop.touch()
                self.view.note("stopping: the step is finished and saved; once more ends at once")
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

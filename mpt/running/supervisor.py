"""Start an attempt, watch it, judge its end, decide, repeat: the parent of a run.

It writes plans and reads what the worker writes into the run directory. It imports no torch, so that it can't run out
of memory or meet a NaN itself, and it can be killed at any moment: its workers die with it, and the next `mpt train`
goes on from the directory.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from mpt.errors import MptError, StorageError
from mpt.planning.data_window import Epoch
from mpt.planning.plan import Plan
from mpt.planning.repair import Repair, halve_micro_batch
from mpt.running import checkpoints
from mpt.running.attempt import POLL_S, Attempt, BuildCommand, Fault, View
from mpt.running.deadline import Deadline, deadline_of
from mpt.running.journal import Journal, read_events
from mpt.running.ladder import Rung, next_rung, tried
from mpt.running.launcher import build_command
from mpt.running.lineage import quarantine_later
from mpt.running.recovery import Ended, History, Outcome, Stop, decide, interrupted
from mpt.running.repairs import repaired, repairs_of, to_event
from mpt.running.run_directory import RunDirectory
from mpt.running.signals import StopWish


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

    `plan` is the recipe's own: what recovery has changed in this run before, the journal knows. `start_from` is the
    checkpoint of the first attempt; later ones take the newest that verifies. An MptError on the way is the verdict
    too, and is journalled as far as the disk allows.
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
    policy = plan.recipe.restart
    deadline, note = deadline_of(policy, environment, now=time.monotonic(), epoch=time.time())
    if note is not None:
        view.note(note)
    history = History()
    fault: Fault | None = None
    seen: dict[str, float] = {}
    repairs = repairs_of(read_events(run.journal))
    current = repaired(plan, repairs)
    deadline.check(time.monotonic(), wish)
    while wish.signal is None:
        attempt = Attempt(current, run, _newest_attempt(run) + 1, view, wish, environment, deadline, seen, fault)
        ended = attempt.carry_out(start_from, build)
        verdict = decide(
            ended,
            history,
            policy,
            smaller_batch=halve_micro_batch(current),
            rung=_next_rung(ended, repairs, current, run),
            tried=tried(repairs),
        )
        attempt.close(ended, verdict)
        if isinstance(verdict, Stop):
            return verdict
        history, fault = verdict.history, attempt.fault
        view.note(f"{verdict.reason}: restart {history.restarts} of {policy.max_restarts}")
        if verdict.onset is not None:  # before the change is journalled: a kill between is a retry
            _go_back(run, attempt.journal, view, verdict.onset, plan.recipe.recovery.margin)
        if verdict.repair is not None:
            repairs = (*repairs, verdict.repair)
            changed = repaired(plan, repairs)
            change = to_event(current, changed, verdict.repair, verdict.reason)
            attempt.journal.append("plan_changed", **change)
            view.event({"kind": "plan_changed"} | change)
            current = changed
        _wait(verdict.after_s, wish, deadline)
        start_from = checkpoints.newest_usable(run)
    has_checkpoint = bool(checkpoints.list_checkpoints(run))
    return interrupted(
        wish.signal,
        "between two attempts, as asked" if history.restarts else "before it began, as asked",
        loses_steps=False,
        has_checkpoint=has_checkpoint,
    )


def _next_rung(ended: Ended, repairs: Sequence[Repair], plan: Plan, run: RunDirectory) -> Rung | None:
    word = ended.word
    if word is None or word["kind"] != "diverged":
        return None
    return next_rung(word, repairs, plan, plan.recipe.recovery, _epoch(run))


def _epoch(run: RunDirectory) -> Epoch | None:
    """Read how long a pass over the data is, from the last attempt that began to train; None: it has no length."""
    started = [event for event in read_events(run.journal) if event["kind"] == "training_started"]
    if not started or started[-1].get("samples") is None or started[-1].get("steps_per_epoch") is None:
        return None
    return Epoch(started[-1]["samples"], started[-1]["steps_per_epoch"])


def _go_back(run: RunDirectory, journal: Journal, view: View, onset: int, margin: int) -> None:
    """Give up what came after the best checkpoint before `onset`: it is the newest one then."""
    target = checkpoints.roll_back_target(run, onset, margin)
    where = "the beginning" if target is None else target.path.name
    view.note(f"going back to {where}")
    quarantine_later(run, journal, 0 if target is None else target.step, f"the numbers went bad at step {onset}")


def _newest_attempt(run: RunDirectory) -> int:
    return max(run.attempt_numbers(), default=0)


def _wait(seconds: float, wish: StopWish, deadline: Deadline) -> None:
    """Pause before a restart; a wish to stop ends the pause."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and wish.signal is None:
        time.sleep(POLL_S)
        deadline.check(time.monotonic(), wish)

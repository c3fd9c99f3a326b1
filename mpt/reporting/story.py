"""What happened in a run, as values: attempts, bad numbers, changes, checkpoints. Pure; what follows from it for the
recipe is `mpt.reporting.advice`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from mpt.reporting.checkpoint_list import ListedCheckpoint
from mpt.reporting.evidence import Evidence
from mpt.running.journal import last_word
from mpt.running.metrics import valid_rows

# The codes of `mpt.training.verdict`, in the order in which they are told.
MEANINGS = {
    "N0": "a gradient overflowed at the loss scale of that step, which then came down",
    "N1": "the loss scale could give no more room",
    "N2": "the loss was not finite",
    "N3": "a gradient was not finite",
    "N4": "a weight or an optimizer state was not finite",
    "N5": "the gradient norm was far above the last ones",
    "N6": "the loss was far above the last ones",
    "N7": "no weight changed for too long",
    "dead": "nothing was learnt any more",
}
# What is journalled under an attempt's number when its life is over, perhaps by a start of the next day.
AFTERWARDS = (
    "changes_accepted",
    "checkpoints_pruned",
    "checkpoints_quarantined",
    "plan_changed",
    "quarantine_completed",
    "run_finished",
    "run_resumed",
)
Ending = Literal["running", "finished", "stopped", "diverged", "hung", "failed", "died", "cut off"]


@dataclass(frozen=True, slots=True)
class AttemptTold:
    """One life of the worker. `steps` counts the rows that it wrote; `told` says how it ended, in words.

    `exit_code` is what it ended with by its own word, None without one. `ending`: "died" is without a last word, and
    "cut off" together with its supervisor.
    """

    number: int
    resume_from: str | None
    first_step: int | None
    last_step: int | None
    steps: int
    saved: int
    seconds: float | None
    ending: Ending
    told: str
    exit_code: int | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """Events of one code. `actions` counts what was done: skip, clip, roll_back, or apply where it was only noted."""

    code: str
    meaning: str
    count: int
    first_step: int
    last_step: int
    attempts: tuple[int, ...]
    actions: Mapping[str, int]
    last_reason: str


@dataclass(frozen=True, slots=True)
class Scaling:
    """What fp16's loss scale did, over the steps that count."""

    lowest: float
    highest: float
    last: float
    skipped: int
    steps: int

    @property
    def share(self) -> float:
        """The share of the steps that were skipped, 0 to 1."""
        return self.skipped / self.steps


@dataclass(frozen=True, slots=True)
class Changed:
    """A change of plan: by recovery (its `kind` of repair), or "accepted": by the user. `changes`: (key, was, now)."""

    after_attempt: int
    kind: str
    changes: tuple[tuple[str, Any, Any], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class WentBack:
    """Checkpoints that were given up for an earlier one; `to_step` 0 is the beginning."""

    after_attempt: int
    to_step: int
    names: tuple[str, ...]
    lineage: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointsTold:
    """What can be gone on from. `damaged`: (name, problem); `unused`: those that a start passed over, and why."""

    newest: str | None
    newest_good: str | None
    usable: tuple[str, ...]
    quarantined: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    unused: tuple[tuple[str, str], ...]
    bytes_usable: int
    bytes_quarantined: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """The time from a fault to the first step after it."""

    from_attempt: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Story:
    """A run from its beginning to now.

    `outcome` is that of `mpt train`, "interrupted" where nobody said how it ended, or "running". `steps_made` counts
    what all attempts made, `step` is how far the run is.
    """

    outcome: str
    exit_code: int | None
    reason: str
    step: int
    max_steps: int | None
    steps_made: int
    loss: Any
    eval_loss: Any
    attempts: tuple[AttemptTold, ...]
    numbers: tuple[Seen, ...]
    scaling: Scaling | None
    changes: tuple[Changed, ...]
    went_back: tuple[WentBack, ...]
    recovered: tuple[Recovered, ...]
    checkpoints: CheckpointsTold

    def seen(self, code: str) -> Seen | None:
        """Give the events of a code."""
        return next((seen for seen in self.numbers if seen.code == code), None)


def tell(evidence: Evidence) -> Story:
    """Put a run's story together."""
    events, rows = evidence.events, valid_rows(evidence.rows)
    outcome, exit_code, reason = _outcome(events)
    if evidence.owner is not None:
        outcome, exit_code, reason = "running", None, ""
    finished = [event for event in events if event["kind"] == "finished"]
    step = max(rows, default=0)
    return Story(
        outcome=outcome,
        exit_code=exit_code,
        reason=reason,
        step=int(finished[-1].get("step", step)) if outcome == "finished" and finished else step,
        max_steps=_max_steps(evidence),
        steps_made=len(evidence.rows),
        loss=finished[-1].get("train_loss") if outcome == "finished" and finished else rows.get(step, {}).get("loss"),
        eval_loss=_newest(events, ("evaluated", "finished"), "eval_loss"),
        attempts=_attempts(evidence),
        numbers=_numbers(events),
        scaling=_scaling(rows.values()),
        changes=tuple(_changes(events)),
        went_back=tuple(_went_back(events)),
        recovered=tuple(
            Recovered(int(event["from_attempt"]), int(event["step"]), float(event["seconds"]))
            for event in events
            if event["kind"] == "recovered"
        ),
        checkpoints=_checkpoints(evidence.checkpoints, events),
    )


def _outcome(events: Iterable[Mapping[str, Any]]) -> tuple[str, int | None, str]:
    outcome: tuple[str, int | None, str] = ("interrupted", None, "")
    for event in events:
        if event["kind"] in ("run_created", "run_resumed", "attempt_started"):
            outcome = ("interrupted", None, "")
        elif event["kind"] == "finished":
            outcome = ("finished", 0, "")
        elif event["kind"] == "run_finished":
            outcome = (str(event.get("outcome")), event.get("exit_code"), str(event.get("reason", "")))
    return outcome


def _max_steps(evidence: Evidence) -> int | None:
    told = None if evidence.newest_plan is None else evidence.newest_plan.value("max_steps")
    if told is None:  # epochs: the worker has counted
        told = _newest(evidence.events, ("training_started",), "max_steps")
    return None if told is None else int(told)


def _newest(events: Sequence[Mapping[str, Any]], kinds: Sequence[str], key: str) -> Any:
    told = (event[key] for event in reversed(events) if event["kind"] in kinds and event.get(key) is not None)
    return next(told, None)


def _attempts(evidence: Evidence) -> tuple[AttemptTold, ...]:
    by_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for event in evidence.events:
        by_attempt.setdefault(event["attempt"], []).append(event)
    steps: dict[int, list[int]] = {}
    for row in evidence.rows:
        steps.setdefault(row["attempt"], []).append(row["step"])
    started = [event["attempt"] for event in evidence.events if event["kind"] == "attempt_started"]
    runs_now = {started[-1]} if started and evidence.owner is not None else set()
    return tuple(
        _attempt(number, by_attempt[number], steps.get(number, []), is_last_and_owned=number in runs_now)
        for number in dict.fromkeys(started)
    )


def _attempt(
    number: int, events: Sequence[Mapping[str, Any]], steps: Sequence[int], *, is_last_and_owned: bool
) -> AttemptTold:
    start = next(event for event in events if event["kind"] == "attempt_started")
    ended = next((event for event in events if event["kind"] == "attempt_ended"), None)
    word = last_word([dict(event) for event in events], number)
    ending, told = _ending(events, word, ended)
    if ended is None and word is None and is_last_and_owned:
        ending, told = "running", "at work"
    last = ended or [event for event in events if event["kind"] not in AFTERWARDS][-1]
    return AttemptTold(
        number=number,
        resume_from=start.get("resume_from"),
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
        steps=len(steps),
        saved=sum(event["kind"] == "checkpoint_saved" for event in events),
        seconds=_seconds(start, last),
        ending=ending,
        told=told,
        exit_code=None if word is None or word["kind"] != "failed" else word.get("exit_code"),
        remedy="" if word is None else str(word.get("remedy", "")),
    )


def _ending(
    events: Iterable[Mapping[str, Any]], word: Mapping[str, Any] | None, ended: Mapping[str, Any] | None
) -> tuple[Ending, str]:
    kind = None if word is None else word["kind"]
    if word is not None and kind == "finished":
        return "finished", f"finished at step {word.get('step')}"
    if word is not None and kind == "stopped":
        return "stopped", f"stopped at step {word.get('step')} as asked, saved as {word.get('checkpoint')}"
    if word is not None and kind == "diverged":
        return "diverged", f"{word.get('code')} at step {word.get('onset', word.get('step'))}: {word.get('reason')}"
    hang = next((event for event in events if event["kind"] == "hang"), None)
    if hang is not None:
        at = f" at step {hang['step']}" if hang.get("step") else ""
        limit = f"silent for {hang.get('silent_s', 0):.0f} s, and the limit was {hang.get('limit_s', 0):.0f}"
        return "hung", f"hung while {hang.get('phase')}{at}: {limit}"
    if ended is not None and ended.get("verdict") == "stopped":
        return "stopped", str(ended.get("reason"))
    if word is not None:
        return "failed", str(word.get("problem"))
    if ended is not None:
        return "died", str(ended.get("reason"))
    return "cut off", "cut off in the middle, and its supervisor with it"


def _seconds(start: Mapping[str, Any], end: Mapping[str, Any]) -> float | None:
    try:
        began, ended = datetime.fromisoformat(start["time"]), datetime.fromisoformat(end["time"])
        return max(0.0, (ended - began).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None


def _numbers(events: Iterable[Mapping[str, Any]]) -> tuple[Seen, ...]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["kind"] == "health":
            found.setdefault(str(event.get("code")), []).append(event)
        elif event["kind"] == "step_skipped":
            found.setdefault("N0", []).append({**event, "action": "skip"})
        elif event["kind"] == "diverged" and event.get("code") is not None:
            told = found.setdefault(str(event["code"]), [])
            if not any(_is_same(one, event) for one in told):  # the roll back was not journalled by itself
                told.append({**event, "action": "roll_back"})
    order = list(MEANINGS)
    codes = sorted(found, key=lambda code: order.index(code) if code in order else len(order))
    return tuple(_seen(code, found[code]) for code in codes)


def _is_same(health: Mapping[str, Any], diverged: Mapping[str, Any]) -> bool:
    return health["attempt"] == diverged["attempt"] and health.get("action") == "roll_back"


def _seen(code: str, events: Sequence[Mapping[str, Any]]) -> Seen:
    steps = [int(event["step"]) for event in events]
    actions: dict[str, int] = {}
    for event in events:
        action = str(event.get("action"))
        actions[action] = actions.get(action, 0) + 1
    attempts = tuple(dict.fromkeys(int(event["attempt"]) for event in events))
    meaning = MEANINGS.get(code, "a code that this mpt does not know")
    reason = str(events[-1].get("reason", ""))
    return Seen(code, meaning, len(events), min(steps), max(steps), attempts, actions, reason)


def _scaling(rows: Iterable[Mapping[str, Any]]) -> Scaling | None:
    scaled = [row for row in rows if isinstance(row.get("loss_scale"), (int, float))]
    if not scaled:
        return None
    scales = [float(row["loss_scale"]) for row in scaled]
    skipped = sum(bool(row.get("skipped")) for row in scaled)
    return Scaling(min(scales), max(scales), scales[-1], skipped, len(scaled))


def _changes(events: Iterable[Mapping[str, Any]]) -> Iterable[Changed]:
    for event in events:
        if event["kind"] not in ("plan_changed", "changes_accepted"):
            continue
        changes = tuple((change["key"], change["was"], change["now"]) for change in event["changes"])
        kind = "accepted" if event["kind"] == "changes_accepted" else str(event["repair"]["kind"])
        yield Changed(int(event["attempt"]), kind, changes, str(event.get("reason", "")))


def _went_back(events: Iterable[Mapping[str, Any]]) -> Iterable[WentBack]:
    for event in events:
        if event["kind"] == "checkpoints_quarantined":
            names, reason = tuple(event["names"]), str(event.get("reason", ""))
            yield WentBack(int(event["attempt"]), int(event["step"]), names, int(event["lineage"]), reason)


def _checkpoints(listed: Sequence[ListedCheckpoint], events: Iterable[Mapping[str, Any]]) -> CheckpointsTold:
    usable = [entry for entry in listed if entry.state == "committed"]
    quarantined = [entry for entry in listed if entry.state == "quarantined"]
    good = [entry.name for entry in usable if entry.known_good]
    passed_over = [event for event in events if event["kind"] == "checkpoint_passed_over"]
    return CheckpointsTold(
        newest=usable[-1].name if usable else None,
        newest_good=good[-1] if good else None,
        usable=tuple(entry.name for entry in usable),
        quarantined=tuple(entry.name for entry in quarantined),
        damaged=tuple((entry.name, str(entry.problem)) for entry in listed if entry.state == "damaged"),
        unused=tuple(dict.fromkeys((str(event.get("name")), str(event.get("reason"))) for event in passed_over)),
        bytes_usable=sum(entry.size_bytes for entry in usable),
        bytes_quarantined=sum(entry.size_bytes for entry in quarantined),
    )


def is_same_place(onsets: Sequence[int], within: int) -> bool:
    """Whether steps lie so close together that the data there is the same.

    >>> is_same_place([40, 44, 41], 8), is_same_place([40, 400], 8), is_same_place([40], 8)
    (True, False, False)
    """
    return len(onsets) > 1 and all(abs(one - other) <= within for one, other in pairwise(sorted(onsets)))

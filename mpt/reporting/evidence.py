"""Everything about a run that a diagnosis goes by, read from its directory. Nothing is judged here
(`mpt.reporting.story`, `advice`), and no lock is taken: the run may be at work."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpt.errors import StorageError
from mpt.planning.plan import Plan
from mpt.reporting.checkpoint_list import ListedCheckpoint, describe
from mpt.reporting.summary import last_log_lines
from mpt.running.journal import read_events
from mpt.running.lock import owner_of
from mpt.running.metrics import every_row
from mpt.running.plan_file import read_plan
from mpt.running.run_directory import RunDirectory

# What an event must say to be told; the rest of it is told where it is there.
NEEDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "health": {"step": int, "code": str},
    "step_skipped": {"step": int},
    "diverged": {"step": int},
    "plan_changed": {"changes": list, "repair": dict},
    "changes_accepted": {"changes": list},
    "checkpoints_quarantined": {"names": list, "step": int, "lineage": int},
    "recovered": {"from_attempt": int, "step": int, "seconds": (int, float)},
    "hang": {"phase": str, "silent_s": (int, float), "limit_s": (int, float), "stacks": dict},
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run has left. `rows` are all rows of steps in the order written, `plans` those of the attempts, by number.

    `owner` says who is at work on the run, None: nobody. `autopsies` are what was found about incidents, by folder;
    None for one that can't be read. `log_tail` are the last lines of the newest attempt's log.
    """

    path: Path
    events: Sequence[Mapping[str, Any]]
    rows: Sequence[dict[str, Any]] = ()
    checkpoints: Sequence[ListedCheckpoint] = ()
    plans: Mapping[int, Plan] = field(default_factory=dict)
    autopsies: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    owner: str | None = None
    log_tail: tuple[str, ...] = ()

    @property
    def newest_plan(self) -> Plan | None:
        """The plan of the newest attempt."""
        return self.plans[max(self.plans)] if self.plans else None


def gather(run: RunDirectory) -> Evidence:
    """Read a run's directory; of the checkpoints only the sizes are compared with their manifests.

    Raises StorageError where the journal is damaged, a plan is of another version of mpt, or a file can't be read.
    """
    try:
        numbers = run.attempt_numbers()
        return Evidence(
            path=run.path,
            owner=owner_of(run.lock),  # asked first: what it did until it ended is then in the journal
            events=_checked(read_events(run.journal), run.journal),
            rows=tuple(every_row(run)),
            checkpoints=tuple(describe(run, hashes=False)),
            plans={number: read_plan(run.attempt(number).plan) for number in numbers},
            autopsies={path.parent.name: _read_autopsy(path) for path in sorted(run.incidents.glob("*/autopsy.json"))},
            log_tail=tuple(last_log_lines(run.attempt(numbers[-1]).log)) if numbers else (),
        )
    except OSError as error:
        raise StorageError(
            f"{error.filename or run.path} can't be read: {error.strerror or error}",
            remedy="Mend its permissions, or restore it from a copy.",
        ) from error


def _checked(events: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Give the events back; raises StorageError for one that lacks what it is about: another hand wrote it."""
    for event in events:
        needed = NEEDS.get(event["kind"], {}) if isinstance(event["kind"], str) else {"kind": str}
        lacks = [key for key, kind in ({"attempt": int} | needed).items() if not isinstance(event.get(key), kind)]
        if lacks:
            raise StorageError(
                f"{path}: a {event['kind']} event, of {event.get('time', 'an unknown time')}, has no usable {lacks[0]}",
                remedy="Restore the file from a copy, or ask the mpt that wrote it.",
            )
    return events


def _read_autopsy(path: Path) -> Mapping[str, Any] | None:
    try:
        autopsy = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return autopsy if isinstance(autopsy, dict) else None

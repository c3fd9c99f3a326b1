"""What a run was trained on, as its journal tells it, and whether that may change now.

The recipe names the data, and its files may be others at the next start. Whoever prepares data (the worker, rank 0)
records what it came to in a `data_prepared` event; a later attempt that comes to something else is refused, unless
`mpt train --accept-changes` allowed it. Nothing here reads the data.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mpt.errors import MptError
from mpt.running.journal import Journal, read_events
from mpt.running.run_directory import RunDirectory

PREPARED = "data_prepared"


def record(run: RunDirectory, journal: Journal, found: Mapping[str, Any]) -> None:
    """Journal what the data came to, after comparing it with what the run was trained on.

    Raises MptError with every difference where it is other data and that was not allowed, StorageError where the
    journal is damaged. What was allowed is journalled as `changes_accepted`.
    """
    events = read_events(run.journal)
    before = trained_on(events)
    changes = [] if before is None else differences(before, found)
    if changes and not is_allowed(events):
        listed = "\n".join(f"    {key}: {was} -> {now}" for key, was, now in changes)
        raise MptError(
            f"the data is not what this run was trained on before:\n{listed}",
            remedy="Put the old data back, give the new run another --name, take the change with --accept-changes, or "
            "begin anew with --resume never (the old run is kept beside it).",
        )
    if changes:
        told = [{"key": f"data.{key}", "was": was, "now": now} for key, was, now in changes]
        journal.append("changes_accepted", changes=told)
    journal.append(PREPARED, **found)


def trained_on(events: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Find what a run was last trained on; None where it came to no step yet, or an earlier mpt began it.

    >>> trained_on([{"kind": "data_prepared", "attempt": 1, "tokens": 9}])
    >>> trained_on([{"kind": "data_prepared", "attempt": 1, "tokens": 9}, {"kind": "training_started"}])
    {'tokens': 9}
    """
    known, has_trained = None, False
    for event in events:
        if event["kind"] == PREPARED:
            known = event
        has_trained = has_trained or event["kind"] == "training_started"
    if known is None or not has_trained:
        return None
    return {key: value for key, value in known.items() if key not in ("time", "attempt", "rank", "kind")}


def is_allowed(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether other data may be taken now: the newest start said so, and no data was prepared since then.

    >>> allowed = {"kind": "run_resumed", "accepts_changes": True}
    >>> is_allowed([allowed]), is_allowed([allowed, {"kind": "data_prepared"}]), is_allowed([])
    (True, False, False)
    """
    allowed = False
    for event in events:
        if event["kind"] == "run_resumed":
            allowed = bool(event.get("accepts_changes"))
        elif event["kind"] == PREPARED:
            allowed = False
    return allowed


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List what differs, as (what, was, now).

    >>> differences({"tokens": 9, "hash": "a"}, {"tokens": 9, "hash": "b"})
    [('hash', 'a', 'b')]
    """
    return [(key, was.get(key), now.get(key)) for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]

"""Which checkpoints stay: decided by step, health and lineage, never by the clock of a file.

Hugging Face rotates by modification time and knows no health: after a NaN its two kept checkpoints are both dead.
"""

import shutil
from collections.abc import Sequence, Set

from mpt.running.checkpoints import best_checkpoint, list_checkpoints, promoted, put_aside
from mpt.running.journal import read_events
from mpt.running.lineage import QUARANTINE, list_quarantines, pending_quarantine
from mpt.running.manifest import problem_with
from mpt.running.run_directory import RunDirectory, make_durable, writing

KEPT_CHECKPOINTS = 2
KEPT_QUARANTINES = 2


def prune(
    run: RunDirectory, keep: int = KEPT_CHECKPOINTS, protect: Set[str] = frozenset(), *, hashes: bool = False
) -> list[str]:
    """Delete what `superfluous` names, and what an earlier deletion left; give the names.

    Called by the process that holds the run's lock, or by rank 0 under it. Raises StorageError.
    """
    names = superfluous(run, keep, protect, hashes=hashes)
    with writing(run.checkpoints):
        for name in names:
            put_aside(run.checkpoints / name)
        if names:
            make_durable(run.checkpoints)
    for leftover in run.checkpoints.glob(".trash-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return names


def superfluous(
    run: RunDirectory, keep: int = KEPT_CHECKPOINTS, protect: Set[str] = frozenset(), *, hashes: bool = False
) -> list[str]:
    """Name the checkpoints and quarantine folders that nobody needs.

    The newest `keep` checkpoints stay, the newest that is known to be good, the best, those named in `protect` (what an
    incident needs), and the two newest quarantines. One that does not verify doesn't count as kept; with `hashes` it is
    read to find that out. Raises StorageError where the journal is damaged.
    """
    events = read_events(run.journal)
    pending = pending_quarantine(events)  # as good as done
    given_up = set() if pending is None else set(pending["names"])
    quarantines = {number for number, _ in list_quarantines(run)} | ({pending["lineage"]} if pending else set())
    available = [path for _, path in list_checkpoints(run) if path.name not in given_up]
    usable = {path.name for path in available if problem_with(path, hashes=hashes) is None}
    names = [path.name for path in available]
    good = [name for name in names if name in usable & promoted(events)][-1:]
    best = best_checkpoint(available)
    needed = {*protect, *good, *([] if best is None else [best])}
    oldest = [f"{QUARANTINE}{number}" for number in sorted(quarantines)[:-KEPT_QUARANTINES]]
    return [
        *choose_superfluous(names, usable, needed, keep),
        *(name for name in oldest if name not in protect),
    ]


def choose_superfluous(names: Sequence[str], usable: Set[str], needed: Set[str], keep: int) -> list[str]:
    """Name what may go of `names`, oldest first: what is older than the newest `keep` usable ones, and not needed.

    >>> choose_superfluous(["a", "b", "c", "d"], {"a", "b", "c"}, {"a"}, keep=1)
    ['b']
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least one checkpoint stays")
    kept = [name for name in names if name in usable][-keep:]
    if not kept:
        return []
    return [name for name in names[: names.index(kept[0])] if name not in needed]

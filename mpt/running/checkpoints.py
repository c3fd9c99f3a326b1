"""Checkpoints that can be trusted: committed whole, verified before use, chosen by step and health.

A checkpoint exists when its manifest verifies. Hugging Face writes in place and takes the highest number however
incomplete; here a checkpoint is written aside, hashed into `manifest.json`, made durable and renamed, and what does not
verify is not offered. It is *known good* once the worker has found its run healthy for some further steps.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import MptError, NoUsableCheckpointError
from mpt.running.journal import Journal, read_events
from mpt.running.manifest import verify, write_manifest
from mpt.running.run_directory import RunDirectory, make_durable

PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to go on from, and those before it in the order of choice that did not verify, each with what is
    wrong."""

    path: Path
    step: int
    passed_over: tuple[tuple[str, str], ...] = ()


def commit(staging: Path, final: Path, *, step: int, world_size: int, lineage: int, health: Mapping[str, Any]) -> None:
    """Turn a folder that every rank has finished writing into a checkpoint: hash, make durable, rename.

    `lineage` is `mpt.running.lineage.current_lineage(run)`; `health` is what the caller found before it saved, such as
    {"finite": True}. Raises OSError or StorageError where the disk refuses; what was committed before stays as it is.
    """
    write_manifest(staging, step=step, world_size=world_size, lineage=lineage, health=health)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = put_aside(final) if final.exists() else None  # saved before, by an attempt that was then thrown away
    staging.rename(final)
    make_durable(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def promote(journal: Journal, step: int) -> None:
    """Journal that the checkpoint of `step` is known to be good: its run was healthy for long enough after it.

    Called by rank 0 of the attempt that saved the checkpoint or started from it. Raises StorageError.
    """
    journal.append("checkpoint_good", step=step, name=f"{PREFIX}{step}")


def list_checkpoints(run: RunDirectory) -> list[tuple[int, Path]]:
    """List what is named like a checkpoint, oldest step first, whether it verifies or not."""
    return list_in(run.checkpoints)


def list_in(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints in a folder, which may be a quarantine."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def known_good(run: RunDirectory) -> tuple[str, ...]:
    """Name the checkpoints that are there and known to be good, oldest step first. Raises StorageError where the
    journal is damaged."""
    good = promoted(read_events(run.journal))
    return tuple(path.name for _, path in list_checkpoints(run) if path.name in good)


def promoted(events: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Name the checkpoints that were promoted and neither given up nor written again since.

    >>> sorted(promoted([{"kind": "checkpoint_good", "name": "checkpoint-5"},
    ...                  {"kind": "checkpoint_good", "name": "checkpoint-10"},
    ...                  {"kind": "checkpoints_quarantined", "names": ["checkpoint-10"]}]))
    ['checkpoint-5']
    """
    good: set[str] = set()
    for event in events:
        if event["kind"] == "checkpoint_good":
            good.add(event["name"])
        elif event["kind"] == "checkpoint_saved":
            good.discard(event["name"])
        elif event["kind"] == "checkpoints_quarantined":
            good.difference_update(event["names"])
    return frozenset(good)


def newest_usable(run: RunDirectory) -> Choice | None:
    """Choose the newest checkpoint that verifies; None where there is none at all.

    Raises NoUsableCheckpointError where there are some and none verifies: never silently from the beginning. Raises
    UnsupportedError where a newer mpt wrote the one in question.
    """
    available = list_checkpoints(run)
    choice, passed_over = _first_usable(reversed(available))
    if choice is None and available:
        raise no_usable(run, passed_over)
    return choice


def no_usable(run: RunDirectory, problems: Iterable[tuple[str, str]]) -> NoUsableCheckpointError:
    """Make the error that says of every checkpoint why it can't be used."""
    return NoUsableCheckpointError(
        f"no checkpoint in {run.checkpoints} can be used: " + "; ".join(f"{name}: {wrong}" for name, wrong in problems),
        remedy="Restore one from a copy, or begin anew with --resume never.",
    )


def roll_back_target(run: RunDirectory, onset: int, margin: int) -> Choice | None:
    """Choose where to go back to from numbers that went bad at step `onset`.

    That is the newest known-good checkpoint at least `margin` steps before it; where none verifies, the newest
    known-good one before it; then the newest one before it. None: there is only the beginning, and the caller says so.
    Raises StorageError where the journal is damaged, UnsupportedError as `newest_usable` does.
    """
    available = dict(list_checkpoints(run))
    promoted_names = known_good(run)
    good = {step for step, path in available.items() if path.name in promoted_names}
    order = roll_back_order(list(available), good, onset, margin)
    return _first_usable((step, available[step]) for step in order)[0]


def roll_back_order(steps: Sequence[int], good: Set[int], onset: int, margin: int) -> list[int]:
    """Order the steps that a rollback may go to, the best first. A checkpoint of step `onset` holds the bad update.

    >>> roll_back_order([100, 200, 300, 400, 500], {100, 200, 400}, onset=450, margin=100)
    [200, 100, 400, 300]
    """
    before = sorted((step for step in steps if step < onset), reverse=True)
    far = [step for step in before if step in good and step <= onset - margin]
    near = [step for step in before if step in good and step not in far]
    return [*far, *near, *(step for step in before if step not in good)]


def named(run: RunDirectory, name: str) -> Choice:
    """Take the checkpoint that the user names: by its folder's name, its step, or its path.

    Raises MptError where it is not in this run, NoUsableCheckpointError where it does not verify.
    """
    available = list_checkpoints(run)
    for step, path in available:
        if name in (path.name, str(step)) or ("/" in name and Path(name).resolve() == path.resolve()):
            wrong = verify(path)
            if wrong is None:
                return Choice(path, step)
            raise NoUsableCheckpointError(
                f"{path} can't be used: {wrong}", remedy="Name another, or let --resume auto choose."
            )
    known = ", ".join(path.name for _, path in available) or "none"
    raise MptError(f"there is no checkpoint {name} in {run.checkpoints}", remedy=f"There: {known}.")


def best_checkpoint(available: Sequence[Path]) -> str | None:
    """Name the checkpoint with the best evaluation, by the Trainer's state in the newest one of `available` (oldest
    first) that can be read; None where it names none of them."""
    for path in reversed(available):
        try:
            best = json.loads(path.joinpath("trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the one before it will know
        name = Path(str(best)).name
        return name if name in {path.name for path in available} else None
    return None


def put_aside(path: Path) -> Path:
    """Take a folder's name away before it is deleted: a kill midway leaves nothing that looks like a checkpoint."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    return trash


def _first_usable(candidates: Iterable[tuple[int, Path]]) -> tuple[Choice | None, list[tuple[str, str]]]:
    """Take the first candidate that verifies; also give those before it, with what is wrong."""
    passed_over: list[tuple[str, str]] = []
    for step, path in candidates:
        wrong = verify(path)
        if wrong is None:
            return Choice(path, step, tuple(passed_over)), passed_over
        passed_over.append((path.name, wrong))
    return None, passed_over

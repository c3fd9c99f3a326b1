"""Begin a run, or take up one that exists: what is allowed with a directory that is already there.

Called with the plan made and before anything is started; a refusal leaves the directory as it was, and none behind.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpt import __version__
from mpt.errors import MptError, StorageError
from mpt.hardware.machine_json import machine_to_json
from mpt.planning.plan import Plan
from mpt.running import checkpoints
from mpt.running.journal import Journal, read_events
from mpt.running.lock import locked
from mpt.running.run_directory import RunDirectory, write_atomically
from mpt.running.supervisor import to_text

# What may change between two starts of a run without changing what is trained.
FREE = ("recipe.description", "recipe.name", "recipe.restart.max_restarts")


@dataclass(frozen=True, slots=True)
class Opened:
    """A run whose lock is held. `finished`: there is nothing left to do. `start_from` None: from the beginning."""

    run: RunDirectory
    start_from: checkpoints.Choice | None
    finished: bool
    notes: tuple[str, ...] = ()


@contextmanager
def opened(plan: Plan, run: RunDirectory, *, resume: str, accept_changes: bool) -> Iterator[Opened]:
    """Open the run directory, hold its lock, and say where to begin.

    `resume` is "auto", "never" or a checkpoint's name. Raises StorageError, RunLockedError, NoUsableCheckpointError, or
    MptError where the run exists with other values and `accept_changes` is False.
    """
    made = _make_folders(run.path)
    try:
        with locked(run.lock):
            notes: list[str] = []
            if resume == "never" and run.exists:
                notes.append(f"the run that was here is kept in {_move_aside(run)}")
            if run.exists:
                yield _reopen(plan, run, resume, accept_changes, notes)
            else:
                if resume not in ("auto", "never"):
                    raise MptError(
                        f"there is no run in {run.path} whose {resume} could be resumed", remedy="Leave --resume out."
                    )
                _begin(plan, run)
                yield Opened(run, None, finished=False, notes=tuple(notes))
    finally:
        _remove_empty(run, made)


def _begin(plan: Plan, run: RunDirectory) -> None:
    _write_recipe(plan, run)
    write_atomically(run.machine, to_text(machine_to_json(plan.machine)))
    try:
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(run.checkpoints, error) from error
    Journal(run.journal, 0).append("run_created", name=plan.name, mpt=__version__)


def _reopen(plan: Plan, run: RunDirectory, resume: str, accept_changes: bool, notes: list[str]) -> Opened:
    events = read_events(run.journal)
    changes = _changes(plan, run)
    if changes and not accept_changes:
        listed = "\n".join(f"    {key}: {was} -> {now}" for key, was, now in changes)
        raise MptError(
            f"the run in {run.path} was begun with other values:\n{listed}",
            remedy="Go on with the old values, give the new run another --name, take the change with --accept-changes, "
            "or begin anew with --resume never (the old run is kept beside it).",
        )
    finished = any(event["kind"] == "finished" for event in events) and run.final.is_dir()
    if finished and not changes and resume == "auto":
        return Opened(run, None, finished=True, notes=tuple(notes))
    if resume in ("auto", "never"):
        start_from = checkpoints.newest_usable(run)
    else:
        start_from = checkpoints.named(run, resume)
        moved = checkpoints.quarantine_later(run, start_from.step)
        if moved:
            notes.append(f"{', '.join(moved)} moved to a quarantine folder: the run goes on from {start_from.path.name}")
    journal = Journal(run.journal, max(run.attempt_numbers(), default=0))
    if changes:
        journal.append("changes_accepted", changes=[{"key": key, "was": was, "now": now} for key, was, now in changes])
        _write_recipe(plan, run)
    journal.append("run_resumed", checkpoint=None if start_from is None else start_from.path.name)
    return Opened(run, start_from, finished=False, notes=tuple(notes))


def _changes(plan: Plan, run: RunDirectory) -> list[tuple[str, Any, Any]]:
    """List what the new plan would do otherwise than the newest one in the directory, as (key, was, now)."""
    numbers = run.attempt_numbers()
    if not numbers:
        return []
    before = Plan.from_json(json.loads(run.attempt(numbers[-1]).plan.read_text(encoding="utf-8")))
    was, now = _identity(before), _identity(plan)
    keys = [key for key in [*was, *now] if key not in FREE]
    return [(key, was.get(key), now.get(key)) for key in dict.fromkeys(keys) if was.get(key) != now.get(key)]


def _identity(plan: Plan) -> dict[str, Any]:
    """Flatten what decides a run's numbers: the recipe's values and the plan's decisions."""
    flat = _flatten("recipe", plan.recipe.model_dump(mode="json", exclude_unset=True))
    return flat | {key: decision.value for key, decision in plan.values.items()}


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(f"{prefix}.{key}", entry)
    return flat


def _write_recipe(plan: Plan, run: RunDirectory) -> None:
    recipe = plan.recipe.model_dump(mode="json", exclude_unset=True)
    header = f"# As mpt {__version__} read it, overrides included.\n"
    write_atomically(run.recipe, header + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))


def _make_folders(path: Path) -> list[Path]:
    """Make the run's folder and give what had to be made, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
        raise _unwritable(path, error) from error
    return missing


def _remove_empty(run: RunDirectory, made: list[Path]) -> None:
    """Take back what was made for a run that was then refused."""
    if run.exists or run.path not in made:
        return
    shutil.rmtree(run.path, ignore_errors=True)
    for folder in made[1:]:
        try:
            folder.rmdir()
        except OSError:
            return


def _move_aside(run: RunDirectory) -> Path:
    """Rename everything in the folder but the lock into a numbered sibling, which is a whole run of its own."""
    number = 1
    while (aside := run.path.with_name(f"{run.path.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for entry in run.path.iterdir():
        if entry != run.lock:
            entry.rename(aside / entry.name)
    return aside


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} can't be made: {error.strerror or error}",
        remedy="Free space or mend permissions there, or choose another --runs-dir.",
    )

"""Begin a run, or take up one that exists: what is allowed with a directory that is already there.

Called with the plan made and before anything is started; a refusal leaves the directory as it was, and none behind.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpt import __version__
from mpt.errors import MptError, StorageError
from mpt.hardware.machine_json import machine_to_json
from mpt.planning.plan import Plan
from mpt.planning.repair import Repair
from mpt.running import checkpoints
from mpt.running.carrying_over import check_batch, check_loads
from mpt.running.journal import Journal, last_word, read_events
from mpt.running.lineage import complete_quarantine, quarantine_later
from mpt.running.lock import locked
from mpt.running.manifest import read_manifest
from mpt.running.repairs import repaired
from mpt.running.run_directory import RunDirectory, write_atomically, write_json, writing

# What may change between two starts of a run without changing what is trained; the keys below each one too.
FREE = (
    *("description", "name", "restart", "recovery", "compare", "background_saving", "sample", "preflight"),
    *("trackers", "training.report_to", "training.run_name", "training.project"),
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")


@dataclass(frozen=True, slots=True)
class Opened:
    """A run whose lock is held. `finished`: there is nothing left to do. `start_from` None: from the beginning."""

    start_from: checkpoints.Choice | None
    finished: bool = False
    notes: tuple[str, ...] = ()


def locate(runs_dir: Path, name: str) -> RunDirectory:
    """Name a run's directory; raises MptError for a name that is no folder's name."""
    if not NAME.fullmatch(name):
        raise MptError(
            f"{name!r} is no name for a run", remedy="Begin with a letter or digit; then also dot, dash, underline."
        )
    return RunDirectory(runs_dir / name)


@contextmanager
def opened(plan: Plan, run: RunDirectory, *, resume: str, accept_changes: bool) -> Iterator[Opened]:
    """Open the run directory, hold its lock, and say where to begin.

    `resume` is "auto", "never" or a checkpoint's name. Raises StorageError, RunLockedError, NoUsableCheckpointError, or
    MptError where the run exists with other values and `accept_changes` is False.
    """
    aside = _set_aside(run) if resume == "never" and run.exists else None
    notes = [] if aside is None else [f"the run that was here is now {aside}"]
    made: list[Path] = []
    try:
        made = _make_folders(run.path)
        with locked(run.lock):
            try:
                found = _open(plan, run, resume, accept_changes, notes)
            except BaseException:
                if made and not run.exists:
                    shutil.rmtree(run.path, ignore_errors=True)
                raise
            yield found
    except BaseException:
        _remove_empty(made)
        if aside is not None and not run.path.exists():
            aside.rename(run.path)
        raise


def _open(plan: Plan, run: RunDirectory, resume: str, accept_changes: bool, notes: list[str]) -> Opened:
    if run.exists:
        return _reopen(plan, run, resume, accept_changes, notes)
    if resume not in ("auto", "never"):
        raise MptError(
            f"there is no run in {run.path}, and so no {resume} to go on from", remedy="Leave --resume out to begin."
        )
    _begin(plan, run)
    return Opened(None, notes=tuple(notes))


def _begin(plan: Plan, run: RunDirectory) -> None:
    """Write what a run consists of before its first attempt; the journal comes last, and makes it a run."""
    _write_recipe(plan, run)
    write_json(run.machine, machine_to_json(plan.machine))
    with writing(run.checkpoints):
        run.checkpoints.mkdir(exist_ok=True)
    try:
        Journal(run.journal, 0).append("run_created", recipe=plan.name, mpt=__version__)
    except StorageError:
        run.journal.unlink(missing_ok=True)
        raise


def _reopen(plan: Plan, run: RunDirectory, resume: str, accept_changes: bool, notes: list[str]) -> Opened:
    accepts_data = accept_changes  # the worker will see whether it changed (`mpt.running.data_record`)
    events = read_events(run.journal)
    newest = max(run.attempt_numbers(), default=0)
    before = _newest_plan(run, newest)
    changes = [] if before is None else _changes(before, plan)
    if changes and not _has_trained(run, events):
        notes.append("nothing was trained yet, so the new values are taken")
        accept_changes = True
        shutil.rmtree(run.tokenizer, ignore_errors=True)  # made of what has changed, perhaps
    if changes and not accept_changes:
        listed = "\n".join(f"    {key}: {_say(was)} -> {_say(now)}" for key, was, now in changes)
        raise MptError(
            f"the run in {run.path} was begun with other values:\n{listed}",
            remedy="Go on with the old values, give the new run another --name, take the changes with "
            "--accept-changes, or begin anew with --resume never (the old run is kept beside it).",
        )
    word = last_word(events, newest)
    if word is not None and word["kind"] == "finished" and run.final.is_dir() and not changes and resume == "auto":
        return Opened(None, finished=True, notes=tuple(notes))
    journal = Journal(run.journal, newest)
    complete_quarantine(run, journal)
    start_from = checkpoints.newest_usable(run) if resume == "auto" else checkpoints.named(run, resume)
    if before is not None and start_from is not None:
        _check_carried_over(before, plan, start_from)
    if start_from is not None and resume != "auto":
        moved = quarantine_later(run, journal, start_from.step, f"--resume {resume}")
        if moved:
            notes.append(f"going back to {start_from.path.name}; {', '.join(moved)} moved to a quarantine folder")
    if changes:
        journal.append("changes_accepted", changes=[{"key": key, "was": was, "now": now} for key, was, now in changes])
        _write_recipe(plan, run)
    name = None if start_from is None else start_from.path.name
    journal.append("run_resumed", checkpoint=name, accepts_changes=accepts_data)
    return Opened(start_from, notes=tuple(notes))


def _has_trained(run: RunDirectory, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run came to its first step: from then on its values are what its numbers rest on."""
    has_started = any(event["kind"] == "training_started" for event in events)
    return has_started or bool(checkpoints.list_checkpoints(run))


def _newest_plan(run: RunDirectory, newest: int) -> Plan | None:
    if newest == 0:
        return None
    path = run.attempt(newest).plan
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} can't be read ({error})", remedy="Restore it from a copy, or begin anew with --resume never."
        ) from error


def _changes(before: Plan, plan: Plan) -> list[tuple[str, Any, Any]]:
    """List what the new plan would do otherwise than the newest one in the directory, as (key, was, now).

    A decision that merely repeats a changed key of the recipe is not listed again.
    """
    plan = _like(before, plan)
    asked = _differences(_asked(before), _asked(plan))
    told = {_in_short(change) for change in asked}
    decided = [change for change in _differences(_decided(before), _decided(plan)) if _in_short(change) not in told]
    return [change for change in (*asked, *decided) if not _is_free(change[0])]


def _in_short(change: tuple[str, Any, Any]) -> tuple[str, str, str]:
    """Give what tells one change from another, however its key is spelt."""
    key, was, now = change
    return key.rpartition(".")[2], str(was), str(now)


def _like(before: Plan, plan: Plan) -> Plan:
    """Repair a plan as `before` is repaired: what recovery changed is no change of the user's."""
    return repaired(plan, [Repair.from_json(data) for data in before.repairs])


def _check_carried_over(before: Plan, plan: Plan, start_from: checkpoints.Choice) -> None:
    plan = _like(before, plan)
    written_by = read_manifest(start_from.path).get("world_size", before.value("world_size"))
    check_loads(before, plan, start_from.path.name, written_by)
    check_batch(before, plan, {key for key, _, _ in _differences(_asked(before), _asked(plan))})


def _is_free(key: str) -> bool:
    """Whether a key of the recipe may change.

    >>> _is_free("compare.require.max_loss_gap"), _is_free("compare"), _is_free("name"), _is_free("names")
    (True, True, True, False)
    """
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*was, *now])
    return [(key, was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)]


def _asked(plan: Plan) -> dict[str, Any]:
    return _flatten("", plan.recipe.model_dump(mode="json", exclude_unset=True))


def _decided(plan: Plan) -> dict[str, Any]:
    # Through JSON, as the plan on the disk went.
    return {key: json.loads(json.dumps(decision.value)) for key, decision in plan.values.items()}


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(f"{prefix}.{key}" if prefix else str(key), entry)
    return flat


def _say(value: Any) -> str:
    return "(not given)" if value is None else str(value)


def _write_recipe(plan: Plan, run: RunDirectory) -> None:
    recipe = plan.recipe.model_dump(mode="json", exclude_unset=True)
    header = f"# As mpt {__version__} read it, overrides included.\n"
    write_atomically(run.recipe, header + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))


def _make_folders(path: Path) -> list[Path]:
    """Make the run's folder and give what had to be made, innermost first."""
    missing: list[Path] = []
    try:
        with writing(path):
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
    except StorageError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Take back folders that were made for a run that was then refused; one that holds something stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _set_aside(run: RunDirectory) -> Path:
    """Rename a run that nobody is at to a numbered sibling, whole; it remains a run that can be gone on with."""
    with locked(run.lock), writing(run.path):
        number = 1
        while (aside := run.path.with_name(f"{run.path.name}.old-{number}")).exists():
            number += 1
        run.path.rename(aside)
    return aside

"""Checkpoints that can be trusted: committed whole, verified before use, pruned by step.

A checkpoint exists when its manifest verifies. Hugging Face writes in place and takes the highest number however
incomplete; safetensors and torch load flipped bits without a word. So a checkpoint is written aside, hashed into
`manifest.json`, made durable and renamed; what has no manifest that verifies is not offered.
"""

import json
import os
import shutil
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mpt.errors import MptError, NoUsableCheckpointError
from mpt.running.run_directory import RunDirectory, sync_folder, write_atomically, writing

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to go on from, and the newer ones that did not verify, each with what is wrong."""

    path: Path
    step: int
    passed_over: tuple[tuple[str, str], ...] = ()


def commit(staging: Path, final: Path, *, step: int, world_size: int) -> None:
    """Turn a folder that every rank has finished writing into a checkpoint: hash, make durable, rename.

    Raises OSError or StorageError where the disk refuses; what was committed before stays as it is.
    """
    files = {}
    for path in _files(staging):
        files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "xxh3_128": hash_file(path)}
        _sync_file(path)
    manifest = {"version": 1, "step": step, "world_size": world_size, "files": files}
    write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for folder in {path.parent for path in _files(staging)} | {staging}:
        sync_folder(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = _put_aside(final) if final.exists() else None  # saved before, by an attempt that was then thrown away
    staging.rename(final)
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def verify(path: Path) -> str | None:
    """Compare a checkpoint with its manifest, hashes included; None is good, else what is wrong."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return "it has no manifest: the commit was never finished"
    except (OSError, ValueError) as error:
        return f"its manifest can't be read ({error})"
    if path.name != f"{PREFIX}{manifest['step']}":
        return f"its manifest is that of step {manifest['step']}"
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, and the manifest says {entry['size']}"
            if hash_file(file) != entry["xxh3_128"]:
                return f"{name} is not what was saved: its hash differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest. Raises FileNotFoundError, OSError, or ValueError where it is torn or not ours."""
    manifest: Any = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files or "step" not in manifest:
        raise ValueError("it lists no files")
    if not all(isinstance(entry, dict) and {"size", "xxh3_128"} <= entry.keys() for entry in files.values()):
        raise ValueError("it lacks sizes or hashes")
    return dict(manifest)


def list_checkpoints(run: RunDirectory) -> list[tuple[int, Path]]:
    """List what is named like a checkpoint, oldest step first, whether it verifies or not."""
    found = []
    for path in run.checkpoints.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def newest_usable(run: RunDirectory) -> Choice | None:
    """Choose the newest checkpoint that verifies; None where there is none at all.

    Raises NoUsableCheckpointError where there are some and none verifies: never silently from the beginning.
    """
    passed_over: list[tuple[str, str]] = []
    for step, path in reversed(list_checkpoints(run)):
        wrong = verify(path)
        if wrong is None:
            return Choice(path, step, tuple(passed_over))
        passed_over.append((path.name, wrong))
    if not passed_over:
        return None
    raise NoUsableCheckpointError(
        f"no checkpoint in {run.checkpoints} can be used: "
        + "; ".join(f"{name}: {wrong}" for name, wrong in passed_over),
        remedy="Restore one from a copy, or begin anew with --resume never.",
    )


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


def quarantine_later(run: RunDirectory, step: int) -> list[str]:
    """Move checkpoints after `step` out of the way: they belong to a lineage that is given up.

    Gives the names that were moved; they are kept under `checkpoints/quarantine-N/`.
    """
    later = [path for number, path in list_checkpoints(run) if number > step]
    if not later:
        return []
    number = 1
    while (folder := run.checkpoints / f"quarantine-{number}").exists():
        number += 1
    with writing(folder):
        folder.mkdir()
        for path in later:
            path.rename(folder / path.name)
        sync_folder(folder)
        sync_folder(run.checkpoints)
    return [path.name for path in later]


def prune(run: RunDirectory, keep: int, protect: Set[str] = frozenset()) -> list[str]:
    """Delete all but the newest `keep` checkpoints by step; those named in `protect` stay. Gives the deleted names."""
    superfluous = [path for _, path in list_checkpoints(run)[: -keep or None] if path.name not in protect]
    for path in superfluous:
        _put_aside(path)
    for leftover in run.checkpoints.glob(".trash-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return [path.name for path in superfluous]


def hash_file(path: Path) -> str:
    """Hash a file with xxh3-128: 14 GB a second and core, where SHA-256 does 1.3."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _put_aside(path: Path) -> Path:
    """Take a checkpoint's name away before it is deleted: a kill midway leaves nothing that looks like one."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    return trash


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

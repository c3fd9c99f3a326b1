"""The manifest of a checkpoint: of which bytes it consists, and what was known about it when it was saved.

safetensors and torch load flipped bits without a word, and Hugging Face begins with a fresh optimizer where a file is
missing; the manifest's sizes and hashes tell. It carries a digest of its own content, so that an edit is seen too.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from mpt.errors import UnsupportedError
from mpt.running.run_directory import make_durable, write_atomically

MANIFEST = "manifest.json"
# Version 1 had no lineage, no health, no time, and no digest of its own.
VERSION = 2
CHUNK = 1 << 20


def write_manifest(folder: Path, *, step: int, world_size: int, lineage: int, health: Mapping[str, Any]) -> None:
    """Hash every file of a folder, make them durable, and write its manifest. Raises OSError or StorageError.

    The disk writes while the files are hashed, which are in memory still; hashing releases the interpreter's lock.
    """
    files = {}
    paths = list(_files(folder))
    with ThreadPoolExecutor(max_workers=1) as disk:
        durable = [disk.submit(make_durable, path) for path in paths]
        for path in paths:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "xxh3_128": hash_file(path)}
        for one in durable:
            one.result()
    manifest = {
        "version": VERSION,
        "step": step,
        "world_size": world_size,
        "lineage": lineage,
        "health": dict(health),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    manifest["digest"] = digest(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for subfolder in {path.parent for path in _files(folder)} | {folder}:
        make_durable(subfolder)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest; what an older mpt did not write is filled in.

    Raises FileNotFoundError, OSError, ValueError where it is torn, edited or not ours, and UnsupportedError where a
    newer mpt wrote it.
    """
    manifest: Any = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("it is no map")
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"its version is {version!r}")
    if version > VERSION:
        raise UnsupportedError(
            f"{path / MANIFEST} was written by a newer mpt (its version is {version}, this mpt reads up to {VERSION})",
            remedy="Use the mpt that wrote it, or a later one.",
        )
    if (version >= 2 or "digest" in manifest) and manifest.get("digest") != digest(manifest):
        raise ValueError("its digest differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or "step" not in manifest:
        raise ValueError("it lists no files")
    if not all(isinstance(entry, dict) and {"size", "xxh3_128"} <= entry.keys() for entry in files.values()):
        raise ValueError("it lacks sizes or hashes")
    return {"lineage": 1, "health": {}, "time": None} | manifest


def verify(path: Path, *, hashes: bool = True) -> str | None:
    """Compare a checkpoint's files with its manifest; None is good, else what is wrong.

    Without `hashes` only the sizes are compared, which reads no file. Raises UnsupportedError where a newer mpt wrote
    the manifest: its checkpoint may be sound, and is not to be passed over.
    """
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: the commit was never finished"
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    except ValueError as error:
        return f"{MANIFEST} was edited or damaged ({error})"
    if path.name != f"checkpoint-{manifest['step']}":
        return f"its {MANIFEST} is that of step {manifest['step']}"
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, and {MANIFEST} says {entry['size']}"
            if hashes and hash_file(file) != entry["xxh3_128"]:
                return f"{name} is not what was saved: its hash differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def problem_with(path: Path, *, hashes: bool = True) -> str | None:
    """Say what keeps a checkpoint from being used here, a newer mpt's manifest included; None: nothing."""
    try:
        return verify(path, hashes=hashes)
    except UnsupportedError as error:
        return error.problem


def hash_file(path: Path) -> str:
    """Hash a file with xxh3-128: 14 GB a second and core, where SHA-256 does 1.3."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def digest(manifest: Mapping[str, Any]) -> str:
    """Hash a manifest's content, its digest left out; neither order nor layout of the text counts.

    >>> digest({"step": 5, "files": {}}) == digest({"files": {}, "step": 5, "digest": "any"})
    True
    """
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)

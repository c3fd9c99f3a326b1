"""The files that `data.source` names: found, readable, of a known kind. Asked before a run, and by the reader."""

import os
from glob import glob, has_magic
from pathlib import Path

from mpt.errors import MptError
from mpt.recipe.schema import DataSection

BUILTIN = "builtin:python-reference"
QUESTIONS = "builtin:python-questions"  # conversations, for sft
SUFFIXES = (".csv", ".json", ".jsonl", ".md", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")  # after any of these but .parquet, which compresses by itself
FILL = "Remove it from data.source, or fill it."


def check_sources(section: DataSection) -> None:
    """Look for every local source of a recipe; hub data sets are looked for when they are loaded.

    Raises MptError for a source that isn't there, can't be read, is of no known kind, or holds nothing at all.
    """
    for source in (*section.source_names, *section.eval_source_names):
        if source.startswith("builtin:"):
            check_builtin(source)
        elif not source.startswith("hub:"):
            expand(source)


def check_builtin(source: str) -> None:
    """Raise MptError for a built-in corpus that there isn't."""
    if source not in (BUILTIN, QUESTIONS):
        raise MptError(
            f"data.source: there is no {source}", remedy=f"Built in are the text {BUILTIN} and, for sft, {QUESTIONS}."
        )


def expand(source: str) -> list[Path]:
    """List the files that a path or glob names, sorted. Raises MptError where none can be read."""
    paths = _matching(source) if has_magic(source) else [_existing(source)]
    for path in paths:
        if kind_of(path) not in SUFFIXES:
            raise MptError(
                f"data.source: {path} is of no known kind",
                remedy=f"mpt reads {' '.join(SUFFIXES)}, by the suffix; all but .parquet also with "
                f"{' or '.join(COMPRESSED)} after it.",
            )
        if not os.access(path, os.R_OK):
            raise MptError(f"data.source: {path} can't be read", remedy="Mend its permissions.")
    if not any(path.stat().st_size for path in paths):
        raise MptError(f"data.source: {source} is empty", remedy=FILL)
    return paths


def kind_of(path: Path) -> str:
    """Give the suffix that says what a file holds, without that of its compression.

    >>> kind_of(Path("a.JSONL")), kind_of(Path("a.b.jsonl.gz")), kind_of(Path("a.parquet.gz"))
    ('.jsonl', '.jsonl', '.gz')
    """
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSED and inner in SUFFIXES and inner != ".parquet" else suffix


def _matching(pattern: str) -> list[Path]:
    # Path.glob takes no absolute pattern.
    paths = sorted(Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not paths:
        raise MptError(
            f"data.source: no file matches {pattern}", remedy=f"Mend the pattern; mpt looked in {Path.cwd()}."
        )
    return paths


def _existing(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        raise MptError(
            f"data.source: {source} is a directory",
            remedy=f"Name the files in it, such as {source.rstrip('/')}/*.txt.",
        )
    if not path.exists():
        raise MptError(f"data.source: {source} does not exist", remedy=f"Mend the path; mpt looked in {Path.cwd()}.")
    return path

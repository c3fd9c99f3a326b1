"""Rows of files -> a memory-mapped `datasets` table in the cache, made once for a content. Called by
`mpt.training.corpus`.

A column of all rows holds one kind of value: text, numbers, true or false, or nested JSON, which comes back as it was
written. A row that disagrees with the rows before it is a bad row.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from mpt.recipe.sources import kind_of
from mpt.training.bad_rows import SHOWN
from mpt.training.cache import cache_folder, check_unchanged, digest, hash_files, making
from mpt.training.progress import beat
from mpt.training.row_files import TEXT, BadRow, Rows, json_kind, read_file

VERSION = "rows-2"
GROUP_BYTES = 1 << 28  # of small files that share a table
BATCH_ROWS = 1000
BATCH_BYTES = 1 << 20
LONG_NUMBER = re.compile(r"\d{19}")

FEATURES: dict[str, Any] = {
    "text": datasets.Value("string"),
    "true or false": datasets.Value("bool"),
    "a whole number": datasets.Value("int64"),
    "a number": datasets.Value("float64"),
    "nested": datasets.Json(),
    "null": datasets.Value("string"),
}


@dataclass(frozen=True, slots=True)
class RowTable:
    """The good rows of some files. Of the bad ones the number, and the first few: place, problem, remedy."""

    table: datasets.Dataset
    bad: int
    examples: tuple[tuple[str, str, str], ...]


def groups(paths: Sequence[Path]) -> list[list[Path]]:
    """Divide files into stretches of one kind that share a table; a large file has its own."""
    found: list[list[Path]] = []
    size = 0
    for path in paths:
        own = path.stat().st_size
        if found and kind_of(found[-1][0]) == kind_of(path) and size + own <= GROUP_BYTES:
            found[-1].append(path)
            size += own
        else:
            found.append([path])
            size = own
    return found


def read_table(
    paths: Sequence[Path],
    column: str | None,
    *,
    max_row_bytes: int,
    on_bad: Callable[[str, BadRow], None],
) -> RowTable:
    """Read rows from the cache, or from the files into it: `column` alone under the name `text`, or (None) all columns.

    `on_bad` hears of each bad row when the files are read, and may raise. Raises MptError for a file that is broken or
    changes while it is read.
    """
    content = hash_files(paths)
    key = digest(VERSION, content, [kind_of(path) for path in paths], column, max_row_bytes)
    folder = cache_folder("rows") / key
    with making(folder) as staging:
        if staging is not None:
            _write(paths, column, max_row_bytes, staging, on_bad)
            check_unchanged(paths, content)
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    table._fingerprint = key
    told = json.loads((folder / "bad.json").read_text(encoding="utf-8"))
    examples = tuple((f"{paths[number]}{at}", problem, remedy) for number, at, problem, remedy in told["rows"])
    return RowTable(table, told["count"], examples)


def checked_rows(
    paths: Sequence[Path], column: str | None, *, max_row_bytes: int, columns: "Columns | None" = None
) -> Rows:
    """Yield the rows of files as they go into the table, and those that don't as BadRows.

    Where all columns are asked for, `columns` comes to know them.
    """
    known = Columns() if columns is None else columns
    for path in paths:
        for place, row in read_file(path, max_row_bytes=max_row_bytes):
            if isinstance(row, BadRow):
                yield place, row
            elif column is not None:
                yield place, _text_of(row, column)
            else:
                yield place, known.add(place, row) or row


def _text_of(row: dict[str, Any], column: str) -> dict[str, Any] | BadRow:
    text = row.get(column)
    if isinstance(text, str):
        return {TEXT: text}
    if column not in row:
        return BadRow(
            f"has no column {column}; it has {', '.join(row) or 'none'}",
            "Name the column of the text with data.text_column.",
        )
    return BadRow(f"{column} is {json_kind(text)}, not text", "Give every row a text, or remove the row.")


@dataclass(slots=True)
class Columns:
    """The kinds of the columns so far, and where each was first seen."""

    kinds: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, row: dict[str, Any]) -> BadRow | None:
        """Take a row's kinds over; a BadRow where they contradict what was seen before."""
        new: dict[str, str] = {}
        for name, value in row.items():
            if is_beyond_64_bits(value):
                return BadRow(f"column {name} holds an integer beyond 64 bits", "Write it as text.")
            kind, known = value_kind(value), self.kinds.get(name, "null")
            joined = join_kinds(known, kind)
            if joined is None:
                return BadRow(
                    f"column {name} is {json_kind(value)} here and {known.replace('nested', 'a list or object')} in "
                    f"{self.places[name]}",
                    "Rows of one source have one schema: make them alike, or put them into files of their own.",
                )
            if name not in self.kinds or joined != known:
                new[name] = joined
        for name, kind in new.items():
            if self.kinds.get(name, "null") == "null":
                self.places[name] = place
            self.kinds[name] = kind
        return None

    @property
    def features(self) -> datasets.Features:
        return datasets.Features({name: FEATURES[kind] for name, kind in self.kinds.items()})


def value_kind(value: Any) -> str:
    """Name the kind of column that a value asks for.

    >>> [value_kind(value) for value in (None, True, 7, 0.5, "a", [1], {})]
    ['null', 'true or false', 'a whole number', 'a number', 'text', 'nested', 'nested']
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return "a whole number"
    return "nested" if isinstance(value, (list, dict)) else json_kind(value)


def is_beyond_64_bits(value: Any) -> bool:
    """Whether a value, or one within it, is an integer that Arrow and the reader of nested columns don't know.

    >>> is_beyond_64_bits(2**63), is_beyond_64_bits({"a": [-(2**63), 0.5, "9" * 30]})
    (True, False)
    """
    if isinstance(value, (list, dict)):
        if not LONG_NUMBER.search(json.dumps(value)):  # at C's speed
            return False
        return any(map(is_beyond_64_bits, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def join_kinds(known: str, new: str) -> str | None:
    """Give the kind that holds both; None where none does.

    >>> join_kinds("null", "text"), join_kinds("a whole number", "a number"), join_kinds("text", "a number")
    ('text', 'a number', None)
    """
    if known == new or new == "null":
        return known
    if known == "null":
        return new
    return "a number" if {known, new} == {"a whole number", "a number"} else None


@dataclass(slots=True)
class _Found:
    """The bad rows of a table; places without the names of the files, which may be moved."""

    paths: Sequence[Path]
    count: int = 0
    examples: list[tuple[int, str, str, str]] = field(default_factory=list)

    def add(self, place: str, row: BadRow) -> None:
        self.count += 1
        if len(self.examples) < SHOWN:
            number = next(n for n, path in enumerate(self.paths) if place.startswith(f"{path}:"))
            self.examples.append((number, place.removeprefix(str(self.paths[number])), row.problem, row.remedy))


def _write(
    paths: Sequence[Path],
    column: str | None,
    max_row_bytes: int,
    folder: Path,
    on_bad: Callable[[str, BadRow], None],
) -> None:
    """Write rows.arrow and bad.json.

    The schema is that of the first batch. Where a later row shows that it is wider, all is written once more.
    """
    found, columns = _Found(paths), Columns()

    def note(place: str, row: BadRow) -> None:
        on_bad(place, row)
        found.add(place, row)

    if column is not None:
        columns.kinds = {TEXT: "text"}
    rows = checked_rows(paths, column, max_row_bytes=max_row_bytes, columns=columns)
    features = _write_rows(rows, folder, columns, note)
    if features != columns.features:
        rows = checked_rows(paths, column, max_row_bytes=max_row_bytes)
        _write_rows(rows, folder, columns, lambda _place, _row: None)
    (folder / "bad.json").write_text(json.dumps({"count": found.count, "rows": found.examples}), encoding="utf-8")


def _write_rows(rows: Rows, folder: Path, columns: Columns, on_bad: Callable[[str, BadRow], None]) -> datasets.Features:
    """Write the good rows with the columns as they are known after the first batch, for as long as these hold; give
    these."""
    writer: _Writer | None = None
    for batch in _batches(rows):
        beat()
        good = []
        for place, row in batch:
            if isinstance(row, BadRow):
                on_bad(place, row)
            else:
                good.append(row)
        writer = writer or _Writer(folder / "rows.arrow", columns.features)
        if writer.features == columns.features:
            writer.write(good)
    writer = writer or _Writer(folder / "rows.arrow", columns.features)
    writer.close()
    return writer.features


def _batches(rows: Rows) -> Iterator[list[tuple[str, Any]]]:
    batch: list[tuple[str, Any]] = []
    size = 0
    for place, row in rows:
        batch.append((place, row))
        size += 0 if isinstance(row, BadRow) else sum(len(v) if isinstance(v, str) else 100 for v in row.values())
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes rows as an Arrow stream that `datasets` maps into memory."""

    def __init__(self, path: Path, features: datasets.Features) -> None:
        self.features = features
        self.schema = features.arrow_schema
        self.writer = pa.ipc.new_stream(str(path), self.schema)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        columns = [_column([row.get(name) for row in rows], self.schema.field(name).type) for name in self.schema.names]
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))

    def close(self) -> None:
        self.writer.close()


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.ExtensionArray.from_storage(kind, pa.array(texts, pa.string()))
    if pa.types.is_floating(kind):
        return pa.array([None if value is None else float(value) for value in values], kind)
    return pa.array(values, kind)

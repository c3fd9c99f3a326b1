"""Read text: the built-in corpus, files, hub data sets. Every source becomes a `datasets` table, a document a row, with
one column, `text`.

Reading is left to `datasets`; only when it fails are the files read again here, to say which line of which file is
wrong. Called by `mpt.training.data`.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.recipe.sources import FILL, check_builtin, expand

TEXT = "text"

# Suffix -> the builder of `datasets`, and its options. Of a CSV every cell is taken as it stands: pandas would turn
# "NA", "null" and an empty cell into missing values.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False, "na_filter": False}),
    ".parquet": ("parquet", {}),
}

BUILDING_FAILED = (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, ValueError, OSError)


def read_corpus(section: DataSection, source: str | list[str], *, split: str) -> datasets.Dataset:
    """Read every document of `source`; `split` is for hub data sets.

    Raises MptError for what can't be read or holds no text.
    """
    sources = [source] if isinstance(source, str) else source
    tables = [_read_one(section, one, split=split) for one in sources]
    table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    column = table.data.column(TEXT)
    if len(table) == 0 or not pc.any(pc.not_equal(pc.utf8_trim_whitespace(column), "")).as_py():
        raise MptError(f"the data set is empty: {_named(sources)} holds no text", remedy="Check data.source.")
    return table


def stream_corpus(section: DataSection, source: str | list[str], *, split: str) -> datasets.IterableDataset:
    """Open `source` without reading it. Raises MptError where its beginning can't be read."""
    sources = [source] if isinstance(source, str) else source
    streams = []
    for one in sources:
        stream = _load_hub(section, one, split, streaming=True) if one.startswith("hub:") else _stream_files(one)
        column = TEXT if _is_plain_text(one) else section.text_column
        first = next(iter(stream), None)
        if first is None:
            raise MptError(f"the data set is empty: {one}", remedy="Check data.source.")
        _check_column(list(first), column, one)
        stream = stream.select_columns([column]).rename_columns({} if column == TEXT else {column: TEXT})
        # A csv's text is a string and a jsonl's may be a large_string, which don't join.
        streams.append(stream.cast(datasets.Features({TEXT: datasets.Value("string")})))
    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def builtin_documents() -> list[str]:
    """List the Python language reference as it comes with Python: a document a topic, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_one(section: DataSection, source: str, *, split: str) -> datasets.Dataset:
    if source.startswith("builtin:"):
        check_builtin(source)
        return datasets.Dataset.from_dict({TEXT: builtin_documents()})
    if source.startswith("hub:"):
        table = _load_hub(section, source, split, streaming=False)
        return _text_only(table, section.text_column, source)
    by_kind: list[list[Path]] = []
    for path in expand(source):
        # One builder for a stretch of files of one kind keeps the order of the files.
        if by_kind and by_kind[-1][0].suffix.lower() == path.suffix.lower():
            by_kind[-1].append(path)
        else:
            by_kind.append([path])
    tables = [_read_files(paths, section.text_column) for paths in by_kind]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _read_files(paths: Sequence[Path], text_column: str) -> datasets.Dataset:
    builder, options = BUILDERS[paths[0].suffix.lower()]
    column = TEXT if builder == "text" else text_column
    try:
        table = datasets.load_dataset(builder, data_files=[str(path) for path in paths], split="train", **options)
    except (*BUILDING_FAILED, StopIteration) as error:
        for path in paths:
            _explain(path, column)
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise MptError(f"{_named([str(path) for path in paths])} is empty: it has no rows", remedy=FILL) from error
        cause = error.__cause__ or error
        raise MptError(
            f"{_named([str(path) for path in paths])} can't be read: {_one_line(cause)}",
            remedy="Mend the file; the worker's log holds the whole message.",
        ) from error
    return _text_only(table, column, _named([str(path) for path in paths]), paths)


def _stream_files(source: str) -> datasets.IterableDataset:
    paths = expand(source)
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise MptError(
            f"data.source: {source} names files of several kinds, {' '.join(sorted(kinds))}",
            remedy="Streaming reads one kind a source: list a pattern for each kind.",
        )
    builder, options = BUILDERS[kinds.pop()]
    return datasets.load_dataset(
        builder, data_files=[str(path) for path in paths], split="train", streaming=True, **options
    )


def _load_hub(section: DataSection, source: str, split: str, *, streaming: bool) -> Any:
    name = source.removeprefix("hub:")
    try:
        return datasets.load_dataset(name, section.config, revision=section.revision, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError, OSError) as error:
        raise MptError(
            f"the hub data set {name} can't be loaded: {_one_line(error)}",
            remedy="Check the name, data.config and the network; HF_TOKEN is needed for private or gated data.",
        ) from error
    except ValueError as error:  # unknown configuration or split: the message lists those that exist
        raise MptError(
            f"the hub data set {name}: {_one_line(error)}", remedy="Set data.config and data.split to one of these."
        ) from error


def _text_only(table: datasets.Dataset, column: str, source: str, paths: Sequence[Path] = ()) -> datasets.Dataset:
    """Keep the text column alone, after making sure that it is there and holds text in every row."""
    _check_column(table.column_names, column, source)
    kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
    if kind not in ("string", "large_string"):
        for path in paths:
            _explain(path, column)
        raise MptError(
            f"{source}: column {column} holds {kind}, not text",
            remedy="Name the column of the text with data.text_column.",
        )
    try:  # pyarrow's JSON and Parquet readers let bytes through that are no UTF-8
        table.data.column(column).validate(full=True)
    except pa.ArrowInvalid as error:
        for path in paths:
            _explain(path, column)
        raise MptError(
            f"{source}: column {column} is not UTF-8", remedy="Write the file anew with its text in UTF-8."
        ) from error
    nulls = table.data.column(column).null_count
    if nulls:
        for path in paths:
            _explain(path, column)
        row = pc.index(pc.is_null(table.data.column(column)), True).as_py() + 1
        raise MptError(
            f"{source}: {nulls} of {len(table)} rows have no text in column {column}; the first is row {row}",
            remedy="Remove those rows, or give them a text (an empty one is skipped).",
        )
    table = table.select_columns([column])
    if column != TEXT:
        table = table.rename_column(column, TEXT)
    return table.cast(datasets.Features({TEXT: datasets.Value("string")})) if kind != "string" else table


def _check_column(columns: Sequence[str], column: str, source: str) -> None:
    if column not in columns:
        raise MptError(
            f"{source} has no column {column}; it has {', '.join(columns)}",
            remedy="Name the column of the text with data.text_column.",
        )


def _explain(path: Path, column: str) -> None:
    """Raise an MptError with file and line if the file itself is wrong; return if it looks right."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MptError(
            f"{path} can't be read: {error.strerror}", remedy="Check the path and its permissions."
        ) from error
    if path.suffix.lower() == ".parquet":
        return
    if not raw.strip():
        raise MptError(f"{path} is empty", remedy=FILL)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MptError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})",
            remedy=f"Convert it, for example: iconv -f latin1 -t utf-8 {path} > new{path.suffix}",
        ) from error
    for place, row in _rows(path, text, column):
        if not isinstance(row, dict):
            raise MptError(f"{place}: not a JSON object", remedy=f'Each line is an object: {{"{column}": "..."}}.')
        if column not in row and row:
            continue  # columns as a whole are judged where they are known
        if not isinstance(row.get(column), str):
            found = "null" if row.get(column) is None else type(row[column]).__name__
            raise MptError(
                f"{place}: {column} is {found}, not text", remedy="Give every row a text, or remove the row."
            )


def _rows(path: Path, text: str, column: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of a JSON, JSON lines or CSV file; raise MptError for a malformed one."""
    kind = path.suffix.lower()
    if kind == ".csv":
        lines = csv.DictReader(text.splitlines())
        for row in lines:
            if None in row:
                raise MptError(
                    f"{path}:{lines.line_num}: more cells than the header has", remedy="Quote cells that hold a comma."
                )
            yield f"{path}:{lines.line_num}", {key: value or "" for key, value in row.items()}
        return
    if kind == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else JSON lines under the name .json
                raise MptError(f"{path}:{error.lineno}: not JSON: {error.msg}", remedy="Mend that line.") from error
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
            return
    if kind in (".json", ".jsonl"):
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise MptError(
                    f"{path}:{number}: not JSON: {error.msg} at column {error.colno}",
                    remedy="Mend or remove that line: JSON lines hold one object a line.",
                ) from error


def _is_plain_text(source: str) -> bool:
    return not source.startswith("hub:") and BUILDERS.get(Path(source).suffix.lower(), ("", {}))[0] == "text"


def _named(sources: Sequence[str]) -> str:
    return sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]

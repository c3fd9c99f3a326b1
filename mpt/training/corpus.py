"""Read the recipe's data: the built-in corpus, files, hub data sets. Every source becomes a `datasets` table, mapped
from the disk: a document a row with one column, `text` (`read_corpus`), or rows with all their columns (`read_rows`).

Files are read by `mpt.training.row_files`, which knows the line of each row; hub data sets by `datasets`. Called by
`mpt.training.data` and by the tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.recipe.sources import check_builtin, expand, kind_of
from mpt.training.bad_rows import SHOWN, BadRows, add_streamed
from mpt.training.cache import digest
from mpt.training.row_files import TEXT, BadRow
from mpt.training.row_tables import checked_rows, groups, read_table

READING_FAILED = (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, ValueError, OSError)


def read_corpus(
    section: DataSection,
    source: str | list[str],
    *,
    split: str,
    bad: BadRows | None = None,
) -> datasets.Dataset:
    """Read every document of `source`; `split` is for hub data sets. `bad` comes to know what is left out.

    Raises MptError for what can't be read or holds no text.
    """
    sources = [source] if isinstance(source, str) else source
    bad = BadRows(section.max_bad_rows) if bad is None else bad
    tables = [
        table
        for one in sources
        for table in _tables(section, one, split, lambda kind: TEXT if is_plain(kind) else section.text_column, bad)
    ]
    table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    bad.check_share(len(table))
    if not any(_holds_text(chunk) for chunk in table.data.column(TEXT).chunks):
        raise MptError(f"the data set is empty: {_named(sources)} holds no text", remedy="Check data.source.")
    return table


def read_rows(
    section: DataSection,
    source: str | list[str],
    *,
    split: str,
    bad: BadRows | None = None,
) -> datasets.Dataset:
    """Read every row of `source` with all its columns; lists and objects come back as they were written.

    Raises MptError for what can't be read, for rows that contradict each other, and where there is none.
    """
    sources = [source] if isinstance(source, str) else source
    bad = BadRows(section.max_bad_rows) if bad is None else bad
    tables = [table for one in sources for table in _tables(section, one, split, lambda _kind: None, bad)]
    try:
        table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise MptError(
            f"the files of {_named(sources)} have different columns: {_one_line(error)}",
            remedy="Make their rows alike, or train on those of one kind.",
        ) from error
    bad.check_share(len(table))
    if len(table) == 0:
        raise MptError(f"the data set is empty: {_named(sources)} has no rows", remedy="Check data.source.")
    return table


def explain_rows(
    section: DataSection, source: str | list[str], check: Callable[[dict[str, Any]], BadRow | None]
) -> None:
    """Raise MptError with file and line (of a Parquet file or a JSON array: the row) for the first row of `source` that
    `check` finds wrong; return where it finds none. For local files; rows that `read_rows` leaves out are passed over.
    """
    for place, row in rows_with_places(section, source):
        found = check(row)
        if found is not None:
            raise MptError(f"{place}: {found.problem}", remedy=found.remedy)


def rows_with_places(section: DataSection, source: str | list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of local files in the order of the table, each with its place."""
    for one in [source] if isinstance(source, str) else source:
        if one.startswith(("hub:", "builtin:")):
            continue
        for paths in groups(expand(one)):
            for place, row in checked_rows(paths, None, max_row_bytes=section.max_row_bytes):
                if not isinstance(row, BadRow):
                    yield place, row


def stream_corpus(section: DataSection, source: str | list[str], *, split: str) -> datasets.IterableDataset:
    """Open `source` without reading it. Raises MptError where its beginning can't be read."""
    sources = [source] if isinstance(source, str) else source
    streams = []
    for one in sources:
        if one.startswith("hub:"):
            stream = load_hub(section, one, split, streaming=True)
            first = next(iter(stream), None)
            if first is not None:
                _check_column(list(first), section.text_column, one)
                stream = stream.select_columns([section.text_column])
                if section.text_column != TEXT:
                    stream = stream.rename_columns({section.text_column: TEXT})
        else:
            stream = _stream_files(section, one)
            first = next(iter(stream), None)
        if first is None:
            raise MptError(f"the data set is empty: {one}", remedy="Check data.source.")
        # The types of a string are two, which don't join.
        streams.append(stream.cast(datasets.Features({TEXT: datasets.Value("string")})))
    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def builtin_documents() -> list[str]:
    """List the Python language reference as it comes with Python: a document a topic, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def is_plain(kind: str) -> bool:
    """Whether files of a kind are text as they stand, without columns."""
    return kind in (".txt", ".md")


def _tables(
    section: DataSection,
    source: str,
    split: str,
    column_of: Callable[[str], str | None],
    bad: BadRows,
) -> Iterator[datasets.Dataset]:
    """Read one source as tables, with the column that `column_of` names for a kind of file, or with all (None)."""
    if source.startswith("builtin:"):
        check_builtin(source)
        texts = builtin_documents()
        table = datasets.Dataset.from_dict({TEXT: texts})
        table._fingerprint = digest("builtin", texts)
        yield table
        return
    if source.startswith("hub:"):
        table = load_hub(section, source, split, streaming=False)
        column = column_of("hub")
        yield table if column is None else _text_only(table, column, source, bad)
        return
    for paths in groups(expand(source)):
        kind = kind_of(paths[0])
        column = column_of(kind)
        if kind == ".parquet" and column is None:
            yield _load_parquet(paths)
            continue
        told = bad.count
        found = read_table(
            paths,
            column,
            max_row_bytes=section.max_row_bytes,
            on_bad=lambda place, row: bad.add(place, row.problem, row.remedy),
        )
        if found.bad and bad.count == told:  # it comes from the cache
            for place, problem, remedy in found.examples:
                bad.add(place, problem, remedy)
            bad.add_unnamed(found.bad - len(found.examples))
        yield found.table


def _load_parquet(paths: Sequence[Path]) -> datasets.Dataset:
    """Load Parquet files with their own types."""
    try:
        return datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    except READING_FAILED as error:
        raise MptError(
            f"{_named([str(path) for path in paths])} can't be read: {_one_line(error.__cause__ or error)}",
            remedy="Mend the file; the worker's log holds the whole message.",
        ) from error


def _stream_files(section: DataSection, source: str) -> datasets.IterableDataset:
    """Stream the texts of files, a file a shard; a bad row ends it, or is left out where so many are allowed."""
    paths = expand(source)
    kinds = {kind_of(path) for path in paths}
    if len(kinds) > 1:
        raise MptError(
            f"data.source: {source} names files of several kinds, {' '.join(sorted(kinds))}",
            remedy="Streaming reads one kind a source: list a pattern for each kind.",
        )
    column = TEXT if is_plain(kinds.pop()) else section.text_column
    return datasets.IterableDataset.from_generator(
        stream_texts,
        features=datasets.Features({TEXT: datasets.Value("string")}),
        gen_kwargs={
            "paths": [str(path) for path in paths],
            "column": column,
            "max_row_bytes": section.max_row_bytes,
            "allowed": section.max_bad_rows,
        },
    )


def stream_texts(paths: list[str], column: str, max_row_bytes: int, allowed: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of files that hold text.

    A number of bad rows is allowed of each pass over the files by one process; a share, of the rows of each file.
    """
    bad = BadRows(allowed)
    for path in paths:
        good = 0
        if allowed < 1:
            bad = BadRows(allowed)
        for place, row in checked_rows([Path(path)], column, max_row_bytes=max_row_bytes):
            if isinstance(row, BadRow):
                add_streamed(bad, place, row.problem, row.remedy)
            else:
                good += 1
                yield row
        bad.check_share(good)


def load_hub(section: DataSection, source: str, split: str, *, streaming: bool) -> Any:
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


def _text_only(table: datasets.Dataset, column: str, source: str, bad: BadRows) -> datasets.Dataset:
    """Keep the text column of a hub data set alone, after making sure that it is there and holds text in every row."""
    _check_column(table.column_names, column, source)
    kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise MptError(
            f"{source}: column {column} holds {kind}, not text",
            remedy="Name the column of the text with data.text_column.",
        )
    try:  # pyarrow lets bytes through that are no UTF-8
        table.data.column(column).validate(full=True)
    except pa.ArrowInvalid as error:
        raise MptError(
            f"{source}: column {column} is not UTF-8", remedy="Write the file anew with its text in UTF-8."
        ) from error
    if table.data.column(column).null_count:
        is_null = np.concatenate([pc.is_null(chunk).to_numpy(False) for chunk in table.data.column(column).chunks])
        missing = np.flatnonzero(is_null)
        for row in missing[:SHOWN]:
            bad.add(f"{source}: row {row + 1}", f"{column} is null, not text", "Remove such rows.")
        bad.add_unnamed(len(missing) - SHOWN)
        table = table.select(np.flatnonzero(~is_null))
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


def _holds_text(chunk: pa.Array) -> bool:
    return bool(pc.any(pc.not_equal(pc.utf8_trim_whitespace(chunk), "")).as_py())


def _named(sources: Sequence[str]) -> str:
    return sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]

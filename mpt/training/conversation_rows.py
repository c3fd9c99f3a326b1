"""Read conversations, in any known layout: files, hub data sets and the built-in questions.

Every source becomes a table with the columns `conversation` (JSON, in the words of `mpt.training.layouts`) and `place`
(the file with the line or row, for whatever is said of the row later). Called by `mpt.training.tasks.sft`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.recipe.sources import FILL, check_builtin, expand, kind_of
from mpt.training.bad_rows import BadRows, add_streamed
from mpt.training.builtin_questions import builtin_questions
from mpt.training.cache import cache_folder, check_unchanged, digest, hash_files, making
from mpt.training.corpus import load_hub
from mpt.training.layouts import BadRowError, known_layouts, layout_of, to_conversation
from mpt.training.progress import beat
from mpt.training.row_files import BadRow, read_file

CONVERSATION, PLACE = "conversation", "place"
FEATURES = datasets.Features({CONVERSATION: datasets.Value("string"), PLACE: datasets.Value("string")})
VERSION = "conversations-2"  # of what they look like, for the cache
BATCH_ROWS = 1000

Rows = Iterator[tuple[str, Mapping[str, Any] | BadRow]]


def read_conversations(section: DataSection, split: str) -> tuple[Any, tuple[str, ...]]:
    """Read every conversation of a section's source, which is one text; a stream, unread, where it streams.

    The second value tells what was left out. Raises MptError with the place of a row that is no conversation, and for a
    source that has no known layout.
    """
    source = _Source(section, split)
    layout = _layout(section, source)
    if section.streaming:
        streamed = {"files": source.files} if source.files else {}
        rows = partial(_stream, source=source, layout=layout)
        return datasets.IterableDataset.from_generator(rows, features=FEATURES, gen_kwargs=streamed), ()
    return _table(source, layout)


class _Source:
    """Where rows come from: files, a hub data set or the built-in questions."""

    def __init__(self, section: DataSection, split: str) -> None:
        self.section = section
        self.name = str(section.source)
        self.files: list[str] = []
        self.identity = ""
        """What the rows follow from."""
        self.content: str | None = None
        """Of files that are read whole: its hash."""
        self._rows: Any = None
        if self.name.startswith("builtin:"):
            check_builtin(self.name)
            self._rows = builtin_questions()
            self.identity = digest(self._rows)
        elif self.name.startswith("hub:"):
            self._rows = load_hub(section, self.name, split, streaming=section.streaming)
            self.identity = self._rows._fingerprint if not section.streaming else ""
        else:
            paths = expand(self.name)
            self.files = [str(path) for path in paths]
            if not section.streaming:
                self.content = hash_files(paths)
                self.identity = digest(self.files, self.content)

    def rows(self, files: Iterable[str] | None = None) -> Rows:
        """Yield the place and content of each row; of some of the files, where there are files."""
        if not self.files:
            yield from ((f"{self.name}: row {number}", without_nulls(row)) for number, row in enumerate(self._rows, 1))
            return
        for path in map(Path, self.files if files is None else files):
            if kind_of(path) in (".txt", ".md"):
                raise MptError(
                    f"data.source: {path} holds plain text, and sft learns from conversations",
                    remedy="Give .jsonl, .json, .csv or .parquet with a known layout, or set task: causal_lm.",
                )
            is_typed = kind_of(path) == ".parquet"
            for place, row in read_file(path, max_row_bytes=self.section.max_row_bytes):
                yield place, without_nulls(row) if is_typed and not isinstance(row, BadRow) else row


def without_nulls(value: Any) -> Any:
    """Leave out what a typed table had to fill in: there, every map of a column has the keys of all of them.

    >>> without_nulls({"role": "user", "content": "Hi", "tool_calls": None, "parts": [{"a": None}]})
    {'role': 'user', 'content': 'Hi', 'parts': [{}]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _layout(section: DataSection, source: _Source) -> str:
    """Take the layout that is asked for, or know it by the columns of the first row that can be read."""
    layout: str | None = section.layout
    if section.layout == "auto":
        first = next((row for _, row in source.rows() if not isinstance(row, BadRow)), None)
        if first is None:
            for place, row in source.rows():
                if isinstance(row, BadRow):
                    raise MptError(f"{place}: {row.problem}", remedy=row.remedy)
            raise MptError(f"{source.name} is empty: it has no rows", remedy=FILL)
        layout = layout_of(list(first), section.messages_column)
        if layout is None:
            raise MptError(
                f"{source.name} has the columns {', '.join(first) or '(none)'}, which are no known layout",
                remedy=f"Known are: {known_layouts(section.messages_column)}. Rename the columns, or name that of the "
                "conversation with data.messages_column.",
            )
    if section.train_on == "completion" and layout != "prompt_completion":
        raise MptError(
            f"data.train_on: {source.name} has the layout {layout}, and only prompt_completion has a completion",
            remedy="Set data.train_on: assistant or last_assistant.",
        )
    assert layout is not None
    return layout


def _conversations(source: _Source, layout: str, files: Iterable[str] | None = None) -> Rows:
    section = source.section
    for place, row in source.rows(files):
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            needs_answer = section.train_on != "all"
            yield place, to_conversation(row, layout, section.messages_column, needs_answer=needs_answer)
        except BadRowError as error:
            yield place, BadRow(error.problem, error.remedy)


def _stream(source: _Source, layout: str, files: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Yield the conversations of a stream. As of streamed text, a number of bad rows is allowed of each pass of one
    process; a share, of the rows of each file."""
    allowed = source.section.max_bad_rows
    bad = BadRows(allowed)
    for part in [None] if files is None else [[path] for path in files]:
        good = 0
        if allowed < 1:
            bad = BadRows(allowed)
        for place, row in _conversations(source, layout, part):
            if isinstance(row, BadRow):
                add_streamed(bad, place, row.problem, row.remedy)
            else:
                good += 1
                yield {CONVERSATION: json.dumps(row, ensure_ascii=False), PLACE: place}
        bad.check_share(good)


def _table(source: _Source, layout: str) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Take the conversations from the cache, or write them there."""
    section = source.section
    asked = (layout, section.messages_column, section.train_on == "all", section.max_bad_rows, section.max_row_bytes)
    folder = cache_folder("conversations") / digest(VERSION, source.identity, *asked)
    with making(folder) as staging:
        if staging is not None:
            notices = _write(source, layout, staging / "rows.arrow")
            if source.content is not None:
                check_unchanged(list(map(Path, source.files)), source.content)
            (staging / "notices.json").write_text(json.dumps(notices), encoding="utf-8")
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    table._fingerprint = folder.name
    return table, tuple(json.loads((folder / "notices.json").read_text(encoding="utf-8")))


def _write(source: _Source, layout: str, path: Path) -> list[str]:
    bad, count = BadRows(source.section.max_bad_rows), 0
    schema = FEATURES.arrow_schema
    found = _conversations(source, layout)
    with pa.ipc.new_stream(str(path), schema) as writer:
        while batch := list(islice(found, BATCH_ROWS)):
            beat()
            places, texts = [], []
            for place, row in batch:
                if isinstance(row, BadRow):
                    bad.add(place, row.problem, row.remedy)
                else:
                    places.append(place)
                    texts.append(json.dumps(row, ensure_ascii=False))
            count += len(texts)
            writer.write_batch(
                pa.record_batch([pa.array(texts, pa.string()), pa.array(places, pa.string())], schema=schema)
            )
    bad.check_share(count)
    if count == 0:
        raise MptError(f"the data set is empty: {source.name} holds no conversation", remedy="Check data.source.")
    return bad.notices(count)

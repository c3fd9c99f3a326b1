"""Gather what a preflight must know of prepared data and its tokenizer; `mpt.planning.checks` judges it.

Cheap beside the tokenising: columns are read where they lie in memory, a stretch at a time, and of each row 8 bytes are
kept, its hash. What would take long is looked at in part, and said so.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash

from mpt.planning.checks.data_facts import Count, DataFacts, TokenizerFacts
from mpt.planning.padding import PaddingShares, padding_shares
from mpt.planning.plan import Plan
from mpt.recipe.chat_template import BUILT_IN, read_template
from mpt.recipe.rules import groups_by_length
from mpt.recipe.sources import expand, kind_of
from mpt.terms import Packing
from mpt.training.collation import IGNORED
from mpt.training.conversation_rows import CONVERSATION, PLACE
from mpt.training.conversations import MARKS
from mpt.training.corpus import is_plain
from mpt.training.data import Documents, Samples
from mpt.training.packing import BestFitBins, PackedBlocks, lengths_of
from mpt.training.progress import beat
from mpt.training.row_files import TEXT, BadRow
from mpt.training.row_tables import checked_rows, groups

MOST_ROWS = 5_000_000
"""Rows that are hashed: some 2 seconds of one core, and 40 MB."""
STREAMED_ROWS = 1_000
STREAMED_CHARACTERS = 2_000_000
FARTHEST_PLACE = 100_000
"""The last row whose line in a file is looked up, which takes reading up to it."""
EXAMPLES = 3
SNIPPET = 60
AROUND = 8

Rows = np.ndarray[Any, np.dtype[np.int64]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def gather(plan: Plan, documents: Documents, samples: Samples, tokenizer: Any, *, had_template: bool) -> DataFacts:
    """Look at the rows as they were read and at the samples that they became.

    `had_template`: whether the tokenizer came with a chat template, before the task readied it.
    """
    of_tokenizer = tokenizer_facts(tokenizer, had_template=had_template if samples.is_chat else None)
    if not isinstance(documents.train, datasets.Dataset):
        return _of_stream(plan, documents, of_tokenizer, tokenizer)
    rows, held_out = Table(documents.train), None
    if documents.held_out is not None:
        held_out = Table(documents.held_out, rows)
    places = Places(plan, documents)
    tokens, highest, unknown = _of_tokens(samples.train, tokenizer)
    return DataFacts(
        tokenizer=of_tokenizer,
        samples=len(samples.train),
        tokens=tokens,
        empty=_count(np.flatnonzero(rows.is_empty), len(rows.is_empty), rows, places),
        duplicates=_duplicates(rows, places),
        truncated=Count(samples.cuts.truncated, _rows_of(samples.train), _longest(samples)),
        lost_tokens=samples.cuts.lost_tokens,
        nothing_learnt=_nothing_learnt(samples),
        unknown=unknown,
        highest_token=highest,
        overlap=None if held_out is None else _overlap(rows, held_out),
        padding=_padding(plan, samples.train),
        limits=rows.limits,
    )


def tokenizer_facts(tokenizer: Any, *, had_template: bool | None) -> TokenizerFacts:
    """Describe a tokenizer; `had_template` None: no conversation is written."""
    template = tokenizer.chat_template if had_template is not None else None
    return TokenizerFacts(
        size=max(tokenizer.get_vocab().values(), default=-1) + 1,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        unknown_id=tokenizer.unk_token_id,
        has_template=had_template,
        template=None if had_template is None else _name_of(template),
        marks_answers=MARKS.search(template) is not None if isinstance(template, str) else None,
    )


class Table:
    """A table's rows by their hashes. `other` is a part of the same table, whose hashes serve."""

    def __init__(self, table: datasets.Dataset, other: "Table | None" = None) -> None:
        self.table = table
        self.columns = [name for name in table.column_names if name != PLACE]
        self._lies_at = [_address(chunk) for name in self.columns for chunk in table.data.column(name).chunks]
        shares = other is not None and (other.columns, other._lies_at) == (self.columns, self._lies_at)
        self._hashes: Hashes
        self._empty: Flags
        self._hashes, self._empty = (other._hashes, other._empty) if shares and other is not None else self._read()
        indices = table._indices
        rows = np.arange(len(table)) if indices is None else indices.column(0).to_numpy()
        self.stored: Rows = rows[rows < len(self._hashes)].astype(np.int64)
        """The number of each row in the table as it was read, in the order of this one."""
        self.hashes, self.is_empty = self._hashes[self.stored], self._empty[self.stored]
        looked, total = len(self._hashes), len(table.data)
        self.limits = (f"repetitions among the first {looked} of {total} rows",) if looked < total else ()

    def _read(self) -> tuple[Hashes, Flags]:
        hashes = np.zeros(min(len(self.table.data), MOST_ROWS), np.uint64)
        is_empty = np.full(len(hashes), self.columns == [TEXT])
        for column in self.columns:
            start = 0
            for chunk in self.table.data.column(column).chunks:
                part = chunk[: len(hashes) - start]
                stretch = slice(start, start + len(part))
                hashes[stretch] = hashes[stretch] * np.uint64(31) + _hash_each(part)
                if self.columns == [TEXT]:
                    blank = pc.equal(pc.utf8_trim_whitespace(part), "")
                    is_empty[stretch] = blank.fill_null(True).to_numpy(zero_copy_only=False)
                start += len(part)
                beat()
        return hashes, is_empty

    def snippet(self, stored: int) -> str:
        """Show the beginning of a row, by its number in the table as it was read."""
        values = [self.table.data.column(name)[stored].as_py() for name in self.columns]
        return shorten(" | ".join(value if isinstance(value, str) else json.dumps(value) for value in values))


class Places:
    """Where rows stand: the file and line, where that is known, else the number of the row."""

    def __init__(self, plan: Plan, documents: Documents) -> None:
        self._plan = plan
        self._table = documents.train
        self._known: dict[int, str] | None = None

    def of(self, stored: Sequence[int]) -> list[str]:
        """Name the places of some rows, which are numbered as the table was read."""
        if PLACE in self._table.column_names:
            return [str(self._table.data.column(PLACE)[row].as_py()) for row in stored]
        lines = self._lines(max(stored, default=-1))
        return [lines.get(row, f"row {row + 1}") for row in stored]

    def _lines(self, last: int) -> dict[int, str]:
        """Read the files up to a row; no places where the table is not one column of text from local files."""
        section = self._plan.recipe.data
        is_local = not any(source.startswith(("hub:", "builtin:")) for source in section.source_names)
        can_tell = is_local and section.has_plain_sources and self._table.column_names == [TEXT]
        if not can_tell or last >= FARTHEST_PLACE:
            return {}
        return dict(enumerate(islice(self._places(section.source_names), last + 1)))

    def _places(self, sources: Sequence[str]) -> Iterator[str]:
        section = self._plan.recipe.data
        for source in sources:
            for paths in groups(expand(source)):
                kind = kind_of(paths[0])
                column = TEXT if is_plain(kind) else section.text_column
                for place, row in checked_rows(paths, column, max_row_bytes=section.max_row_bytes):
                    if not isinstance(row, BadRow):
                        yield place


def shorten(text: str) -> str:
    """Show the beginning of a text on one line.

    >>> shorten("a  b" + "c" * 99)[-5:]
    'cc...'
    """
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return line if len(line) <= SNIPPET else f"{line[: SNIPPET - 3]}..."


def _address(chunk: pa.Array) -> tuple[int, int, int]:
    """Say where a column's values lie in memory, and which of them they are: parts of one table share them."""
    values = [buffer.address for buffer in chunk.buffers() if buffer is not None]
    return (values[-1] if values else 0, chunk.offset, len(chunk))


def _hash_each(chunk: pa.Array) -> Hashes:
    """Hash each value of a column: texts where they lie, others as JSON."""
    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    if pa.types.is_primitive(chunk.type):
        chunk = chunk.cast(pa.string())
    if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
        chunk = pa.array([json.dumps(value, sort_keys=True, default=str) for value in chunk.to_pylist()], pa.string())
    if not len(chunk):
        return np.zeros(0, np.uint64)
    _, places, data = chunk.buffers()
    kind = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    ends = np.frombuffer(places, kind)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    text = memoryview(data) if data is not None else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(text[start:end]) for start, end in pairwise(ends)), np.uint64, len(chunk))


def _count(found: Rows, of: int, rows: Table, places: Places) -> Count:
    stored = rows.stored[found[:EXAMPLES]].tolist()
    return Count(len(found), of, tuple(places.of(stored)))


def _duplicates(rows: Table, places: Places) -> Count:
    """Count the rows that repeat an earlier one; empty ones are counted as such, and rows that a mixture takes several
    times are one."""
    once = np.sort(np.unique(rows.stored, return_index=True)[1])
    full = once[~rows.is_empty[once]]
    _, firsts, group = np.unique(rows.hashes[full], return_index=True, return_inverse=True)
    earlier = firsts[group]
    repeats = np.flatnonzero(earlier != np.arange(len(full)))
    shown = repeats[:EXAMPLES]
    ones = rows.stored[full[shown]].tolist()
    others = rows.stored[full[earlier[shown]]].tolist()
    named = zip(ones, places.of(ones), places.of(others), strict=True)
    examples = tuple(f"{one} repeats {other}: {rows.snippet(row)}" for row, one, other in named)
    return Count(len(repeats), len(once), examples)


def _overlap(rows: Table, held_out: Table) -> Count:
    """Count evaluation rows that training has too."""
    both = np.isin(held_out.hashes, rows.hashes) & ~held_out.is_empty
    shown = held_out.stored[np.flatnonzero(both)[:EXAMPLES]].tolist()
    return Count(int(both.sum()), len(held_out.hashes), tuple(map(held_out.snippet, shown)))


def _of_tokens(samples: Any, tokenizer: Any) -> tuple[int, int, Count]:
    """Count the tokens, find the highest, and count the unknown ones."""
    unknown_id, counts = tokenizer.unk_token_id, _counts_unknown(tokenizer)
    tokens, highest, unknown = 0, -1, 0
    examples: list[str] = []
    for numbers in _stretches(samples):
        if not len(numbers):
            continue
        tokens += len(numbers)
        highest = max(highest, int(numbers.max()))
        if counts:
            places = np.flatnonzero(numbers == unknown_id)
            unknown += len(places)
            for place in places[: EXAMPLES - len(examples)].tolist():
                around = numbers[max(place - AROUND, 0) : place + AROUND].tolist()
                examples.append(shorten(tokenizer.decode(around)))
    return tokens, highest, Count(unknown, tokens, tuple(examples))


def _counts_unknown(tokenizer: Any) -> bool:
    """Whether the unknown token tells something: of GPT-2 and others it is the end of text too, and never needed."""
    return tokenizer.unk_token_id not in (None, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _stretches(samples: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the tokens of samples where they lie."""
    if isinstance(samples, PackedBlocks):
        yield from samples.chunks
    elif isinstance(samples, BestFitBins):
        yield from samples.columns["input_ids"].chunks
    else:
        for chunk in samples.data.column("input_ids").chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=True)


def _nothing_learnt(samples: Samples) -> Count:
    """Count samples without a label: those that the task left out, and those that are still there."""
    table = samples.train
    left_out = samples.cuts.left_out
    if not isinstance(table, datasets.Dataset) or not isinstance(table.features.get("labels"), datasets.List):
        return Count(left_out, _rows_of(table) + left_out)
    masked = 0
    for chunk in table.data.column("labels").chunks:
        learnt = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy() != IGNORED)])
        ends = np.concatenate([[0], np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))]).astype(int)
        # The first token of a sample has none before it that would predict it.
        masked += int(np.count_nonzero(learnt[ends[1:]] == learnt[np.minimum(ends[:-1] + 1, ends[1:])]))
    return Count(masked + left_out, len(table) + left_out)


def padding_of(plan: Plan, samples: Any) -> PaddingShares | None:
    """Work out how much of the batches is padding, by the real lengths; None where documents are joined or streamed."""
    lengths = lengths_of(samples)
    if lengths is None or not len(lengths):
        return None
    return padding_shares(
        dict(zip(*(found.tolist() for found in np.unique(lengths, return_counts=True)), strict=True)),
        sequence_length=plan.value("sequence_length"),
        micro_batch_size=plan.value("micro_batch_size"),
        multiple=plan.value("pad_to_multiple_of"),
    )


def _padding(plan: Plan, samples: Any) -> dict[str, float]:
    """Give the shares of padding, and `now`: the one of the batches as they are planned."""
    shares = padding_of(plan, samples)
    if shares is None:
        return {}
    told = shares.to_json()
    way = "grouped" if groups_by_length(plan.recipe) else "none"
    if plan.value("packing") == Packing.BEST_FIT:
        way = "best_fit"
    return told | {"now": 0.0 if plan.value("padding_free") else told[way]}


def _rows_of(samples: Any) -> int:
    """Count the rows that samples are made of: several may share one."""
    lengths = lengths_of(samples)
    return len(samples) if lengths is None else len(lengths)


def _longest(samples: Samples) -> tuple[str, ...]:
    cuts = samples.cuts
    return (f"the longest has {cuts.longest} tokens",) if cuts.truncated and cuts.longest else ()


def _name_of(template: Any) -> str | None:
    """Name a built-in chat template; None for any other."""
    return next((name for name in BUILT_IN if read_template(name) == template), None)


def _of_stream(plan: Plan, documents: Documents, of_tokenizer: TokenizerFacts, tokenizer: Any) -> DataFacts:
    """Look at the first rows of a stream, which can't be known whole before it is trained on."""
    rows = list(islice(documents.train, STREAMED_ROWS))
    columns = [name for name in (TEXT, CONVERSATION) if rows and name in rows[0]]
    texts = [" ".join(str(row[name]) for name in columns) for row in rows]
    full = [text for text in texts if text.strip()]
    facts = DataFacts(
        tokenizer=of_tokenizer,
        samples=0,
        tokens=0,
        empty=Count(len(texts) - len(full), len(texts)),
        duplicates=Count(len(full) - len(set(full)), len(texts)),
        limits=(f"a stream: the first {len(rows)} rows",),
    )
    return facts if columns != [TEXT] else _with_tokens(facts, plan, full, tokenizer)


def _with_tokens(facts: DataFacts, plan: Plan, texts: list[str], tokenizer: Any) -> DataFacts:
    """Tokenise the first texts of a stream, so that what is cut there is not cut without a word."""
    sizes = np.cumsum([len(text) for text in texts])
    texts = texts[: int(np.searchsorted(sizes, STREAMED_CHARACTERS)) + 1]
    if not texts:
        return facts
    encoded = [np.asarray(row, np.int64) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    limit = plan.value("sequence_length")
    whole = [len(row) + (tokenizer.eos_token_id is not None) for row in encoded]
    beyond = [max(length - limit, 0) for length in whole] if plan.value("packing") == Packing.NONE else [0] * len(whole)
    joined = np.concatenate(encoded)
    unknown = int(np.count_nonzero(joined == tokenizer.unk_token_id)) if _counts_unknown(tokenizer) else 0
    cut = sum(size > 0 for size in beyond)
    return replace(
        facts,
        tokens=sum(whole) - sum(beyond),
        truncated=Count(cut, len(texts), (f"the longest has {max(whole)} tokens",) if cut else ()),
        lost_tokens=sum(beyond),
        unknown=Count(unknown, len(joined)),
        highest_token=int(joined.max(initial=-1)),
    )

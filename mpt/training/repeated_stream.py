"""A stream that begins again when it ends, in another order each time. The session puts it around streamed samples.

The Trainer takes a stream for one epoch as long as the whole run, and on a resume skips as many batches as were trained
on. Where a stream ends before that it would count them from the second pass on, and train on other data than a run that
was never interrupted; and the gradients of the pass's last, incomplete accumulation would leak into the next one.

What is skipped need not be made: bookmarks in the run directory say which row of the stream a sample begins with. Rows
before that are read, because a shuffled stream knows its order no other way, and not tokenised.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch

BATCH_ROWS = 1000
BOOKMARK_EVERY = 16  # batches of rows; one holds as many tokens as a block has


@dataclass(frozen=True, slots=True)
class StreamedRows:
    """A stream of rows, and what makes samples of a batch of them: blocks of `length` tokens where that is given, which
    are cut across batches, else a sample for each row that `convert` gives."""

    rows: datasets.IterableDataset
    convert: Callable[[dict[str, list[Any]]], dict[str, list[Any]]] | None
    length: int | None = None

    def then(self, function: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> "StreamedRows":
        """Let `function` make other samples of those that a batch of rows gives."""
        convert = self.convert
        assert convert is not None and self.length is None
        return StreamedRows(self.rows, lambda batch: function(convert(batch)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of one pass."""
        found = iter(self.rows)
        left: list[int] = []
        while batch := list(islice(found, BATCH_ROWS)):
            samples, left = self.convert_batch(batch, left)
            yield from samples

    def convert_batch(self, batch: list[dict[str, Any]], left: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
        """Make samples of rows; `left` are the tokens before them, and those after the last whole block."""
        if self.convert is None:
            return batch, left
        columns = self.convert({name: [row[name] for row in batch] for name in batch[0]})
        length = self.length
        if length is None:
            names = list(columns)
            return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)], left
        joined = [*left, *(token for row in columns["input_ids"] for token in row)]
        end = len(joined) // length * length
        return [{"input_ids": joined[start : start + length]} for start in range(0, end, length)], joined[end:]


@dataclass(frozen=True, slots=True)
class Bookmark:
    """So many samples come before row `row` of pass `number`; `left` are the tokens that belong to the next block."""

    samples: int = 0
    number: int = 0
    row: int = 0
    left: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """How much of a stream was trained on: batches of the loader, and the samples that one takes of the stream."""

    batches: int
    samples_a_batch: int

    def samples(self, worker: int, workers: int) -> int:
        """Give the samples that one of the loader's processes has made: they take turns, a batch each.

        >>> [Resume(5, 8).samples(worker, 2) for worker in (0, 1)], Resume(5, 8).samples(0, 1)
        ([24, 16], 40)
        """
        return max(0, -(-(self.batches - worker) // workers)) * self.samples_a_batch


class RepeatedStream(torch.utils.data.IterableDataset):
    """Pass after pass of a shuffled stream, each in the order that its number (`set_epoch`) gives, without an end.

    `bookmarks` names the files to note places in, one for each process that reads: they follow from data, seed and
    loader alone, and whoever names them sees to that. With `resume` the samples before the nearest bookmark are stood
    in for by one that no model can take: the Trainer throws them away.
    """

    def __init__(
        self,
        stream: StreamedRows | datasets.IterableDataset,
        *,
        bookmarks: Path | None = None,
        resume: Resume | None = None,
    ) -> None:
        self.stream = stream if isinstance(stream, StreamedRows) else StreamedRows(stream, None)
        self.bookmarks = bookmarks
        self.resume = resume

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        notes = None if self.bookmarks is None else self.bookmarks.with_name(f"{self.bookmarks.name}-{worker}.jsonl")
        skipped = 0 if self.resume is None else self.resume.samples(worker, workers)
        start = Bookmark() if notes is None else nearest(notes, skipped)
        made = self._samples(start, notes)
        first = next(made, None)
        if first is None:  # a loader process without a part of the stream
            return
        stand_in = first | {"input_ids": [-1] * len(first["input_ids"])}
        for _ in range(start.samples):
            yield stand_in
        yield first
        yield from made

    def _samples(self, start: Bookmark, notes: Path | None) -> Iterator[dict[str, Any]]:
        # Loader processes share the number of a pass, and each of them comes to the end of its part at another time.
        rows = copy.deepcopy(self.stream.rows)
        made = start.samples
        for number in count(start.number):
            rows.set_epoch(number)
            is_first = number == start.number
            found = iter(rows)
            row = begun = start.row if is_first else 0
            before = made
            left = list(start.left) if is_first else []
            if row:
                next(islice(found, row - 1, row), None)
            for turn in count():
                batch = list(islice(found, BATCH_ROWS))
                if not batch:
                    break
                if notes is not None and turn % BOOKMARK_EVERY == 0:
                    _note(notes, Bookmark(made, number, row, tuple(left)))
                samples, left = self.stream.convert_batch(batch, left)
                for sample in samples:
                    made += 1
                    yield sample
                row += len(batch)
            if made == before and not begun:  # a whole pass gave nothing: so would the next
                return


def nearest(notes: Path, samples: int) -> Bookmark:
    """Find the last bookmark with at most `samples` samples before it; the beginning where there is none."""
    found = Bookmark()
    if not notes.exists():
        return found
    with notes.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                made, number, row, left = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if found.samples <= made <= samples:
                found = Bookmark(made, number, row, tuple(left))
    return found


def _note(notes: Path, mark: Bookmark) -> None:
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.open("a", encoding="utf-8") as file:
        file.write(json.dumps([mark.samples, mark.number, mark.row, list(mark.left)]) + "\n")

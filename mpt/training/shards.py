"""A table -> a prepared one (tokens), in shards that several processes make, kept in the cache.

How the table is divided follows from the table alone, so that any number of processes gives the same bytes. A finished
shard stays: a preparation that was killed goes on with the others. Called by `mpt.training.data` and the tasks.
"""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from mpt.errors import MptError
from mpt.running.tie import TIED, die_with_parent
from mpt.training.cache import cache_folder, digest, making
from mpt.training.progress import beat

SHARD_BYTES = 1 << 24  # of the table: some seconds of tokenising
MOST_SHARDS = 2048  # a process may map 65,530 files at a time (Linux, vm.max_map_count)
BATCH_BYTES = 1 << 20
BATCH_ROWS = 1000


class Prepare(Protocol):
    """What is done to a table, a batch of rows at a time. It can be pickled, and gives the same for the same rows."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that the result depends on beside the rows: part of the name in the cache."""

    @property
    def features(self) -> datasets.Features:
        """The columns of the result."""

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Give the columns for a batch of rows; there may be fewer rows or more."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared table, and how many of its shards were there already."""

    table: datasets.Dataset
    shards: int
    found: int

    @property
    def notices(self) -> list[str]:
        """Say what was taken from the cache; a small table goes without saying."""
        if self.found == self.shards:
            return [f"tokenised data taken from the cache ({len(self.table)} rows)"]
        if self.found:
            return [f"an interrupted preparation goes on: {self.found} of {self.shards} shards of tokens were there"]
        return []


def prepare_table(table: datasets.Dataset, prepare: Prepare, *, workers: int) -> Prepared:
    """Prepare a table with at most `workers` processes, or take it from the cache.

    Raises what `prepare` raises, and MptError where one of the processes dies.
    """
    key = digest(table._fingerprint, prepare.identity)
    folder = cache_folder("tokens") / key
    bounds = divide(row_sizes(table), SHARD_BYTES)
    names = [f"{number:05}.arrow" for number in range(len(bounds) - 1)]
    found = len(names)
    with making(folder) as staging:
        if staging is not None:
            missing = [number for number, name in enumerate(names) if not (staging / name).exists()]
            found -= len(missing)
            job = Job(table, prepare, staging)
            _make([(number, bounds[number], bounds[number + 1]) for number in missing], job, workers)
    parts = [datasets.Dataset.from_file(str(folder / name)) for name in names]
    whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    whole._fingerprint = key
    return Prepared(whole, len(names), found)


def row_sizes(table: datasets.Dataset) -> np.ndarray:
    """Give the bytes of text in each row of a table, of nested columns too."""
    sizes = np.zeros(len(table.data), np.int64)
    for column in table.data.columns:
        start = 0
        for chunk in column.chunks:
            stored = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            if pa.types.is_string(stored.type) or pa.types.is_large_string(stored.type):
                lengths = pc.fill_null(pc.binary_length(stored), 0).to_numpy(zero_copy_only=False)
                sizes[start : start + len(chunk)] += lengths
            start += len(chunk)
    if table._indices is None:
        return sizes
    return sizes[table._indices.column(0).to_numpy()]


def divide(sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """Give the bounds of the shards, as row numbers.

    >>> divide(np.array([5, 5, 5, 30, 1]), 10), divide(np.array([], np.int64), 10)
    ([0, 2, 4, 5], [0, 0])
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    step = max(shard_bytes, -(-total // MOST_SHARDS))
    # A shard ends with the row that fills it.
    cuts = np.searchsorted(ends, np.arange(step, total, step)) + 1
    return [0, *np.unique(cuts[cuts < len(sizes)]).tolist(), len(sizes)]


@dataclass(frozen=True, slots=True)
class Job:
    """What all shards of a table have in common."""

    table: datasets.Dataset
    prepare: Prepare
    folder: Path

    def make(self, number: int, start: int, stop: int) -> None:
        """Make a shard; it has its name when it is on the disk."""
        schema = self.prepare.features.arrow_schema
        path = self.folder / f"{number:05}.arrow"
        staging = path.with_suffix(".part")
        with staging.open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for rows in _batches(self.table, start, stop):
                    columns = self.prepare(rows)
                    arrays = [pa.array(columns[name], schema.field(name).type) for name in schema.names]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    beat()
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)


def _batches(table: datasets.Dataset, start: int, stop: int) -> Any:
    """Yield the rows of a shard, few at a time."""
    ends = np.cumsum(row_sizes(table.select(range(start, stop))))
    first = start
    while first < stop:
        done = int(ends[first - start - 1]) if first > start else 0
        last = start + int(np.searchsorted(ends, done + BATCH_BYTES)) + 1
        last = min(last, first + BATCH_ROWS, stop)
        yield table[first:last]
        first = last


_job: Job | None = None  # of this process, where it is one of those that make shards


def _start(job: Job) -> None:
    """Begin a process that makes shards: it ends with the one that started it, which hears of Ctrl-C."""
    global _job  # sent once to a process, and not with each shard
    os.environ.pop(TIED, None)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _job = job


def _make_one(number: int, start: int, stop: int) -> None:
    assert _job is not None
    _job.make(number, start, stop)


def _make(shards: Sequence[tuple[int, int, int]], job: Job, workers: int) -> None:
    processes = min(workers, len(shards))
    if processes <= 1:
        for shard in shards:
            job.make(*shard)
        return
    # Processes that begin anew: a fork would copy threads' locks, and a GPU's context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(job,)) as pool:
        try:
            waiting = {pool.submit(_make_one, *shard) for shard in shards}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                beat()
        except BrokenProcessPool as error:
            raise MptError(
                "a process that tokenised was killed, most likely because memory ran out",
                remedy="Set data.workers lower. What is finished is kept: the next start goes on with the rest.",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

"""Rows of several sources -> what is trained on and what is held out.

Called by the tasks whose rows are no documents."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.data import SHUFFLE_BUFFER, STREAMED_EVAL_DOCUMENTS, Documents

Read = Callable[[DataSection, str], tuple[Any, tuple[str, ...]]]
"""Reads a section's one source, of a split: a table or stream, and notices."""


def read_parts(section: DataSection, read: Read, *, seed: int) -> Documents:
    """Read every source, and hold out what is evaluated on: of each source its share, or what the recipe names."""
    found, notices = _read_all(section.parts, section.split, read)
    held_out: list[Any] = []
    if section.eval_source is not None:
        others = section.model_copy(update={"source": section.eval_source})
        held_out, more = _read_all(others.parts, section.split, read)
        notices += more
    elif section.eval_split is not None:
        held_out, more = _read_all(section.parts, section.eval_split, read)
        notices += more
    elif section.eval_fraction > 0:
        found, held_out, more = _divide(found, section.eval_fraction, seed)
        notices += more
    train = _joined(found)
    if section.streaming:
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Documents(train, _joined(held_out) if held_out else None, tuple(notices))


def _read_all(parts: Sequence[DataSection], split: str, read: Read) -> tuple[list[Any], list[str]]:
    read_parts = [read(part, split) for part in parts]
    return [table for table, _ in read_parts], [notice for _, notices in read_parts for notice in notices]


def _divide(tables: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any], list[str]]:
    """Hold out a share of each table; of streams, the first rows."""
    if not isinstance(tables[0], datasets.Dataset):
        return _divide_streams(tables)
    counts = [int(len(table) * fraction + 0.5) for table in tables]
    if not any(counts):
        largest = max(range(len(tables)), key=lambda index: len(tables[index]))
        counts[largest] = int(len(tables[largest]) > 1)
    train, held_out = [], []
    for number, (table, count) in enumerate(zip(tables, counts, strict=True)):
        order = np.random.default_rng([seed, number]).permutation(len(table))
        train.append(table.select(np.sort(order[count:])))
        held_out += [table.select(np.sort(order[:count]))] if count else []
    return train, held_out, []


def _divide_streams(streams: list[Any]) -> tuple[list[Any], list[Any], list[str]]:
    count = STREAMED_EVAL_DOCUMENTS // len(streams)
    rest = [stream.skip(count) for stream in streams]
    if all(next(iter(stream), None) is None for stream in rest):
        raise MptError(
            f"streaming holds out the first {count} rows of each source, and there are no more to train on",
            remedy="Leave data.streaming out for data this small, or set data.eval_fraction to 0.",
        )
    notice = f"streaming: the first {count} rows of each source are held out for evaluation"
    return rest, [stream.take(count) for stream in streams], [notice]


def _joined(tables: list[Any]) -> Any:
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)

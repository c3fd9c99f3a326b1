"""Several sources -> what is trained on and what is held out: each is read and divided for itself, then they are
joined, or mixed by their weights. Called by the tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from mpt.errors import MptError
from mpt.planning.mixing import rows_of_mixture
from mpt.recipe.schema import DataSection
from mpt.training.data import SHUFFLE_BUFFER, STREAMED_EVAL_DOCUMENTS, Documents

Read = Callable[[DataSection, str], tuple[Any, tuple[str, ...]]]
"""Reads a section's one source, of a split: a table or stream, and notices."""


def read_parts(section: DataSection, read: Read, *, seed: int) -> Documents:
    """Read every source, and hold out what is evaluated on: of each source its share, or what the recipe names."""
    found, notices = _read_all(section.parts, None, read)
    held_out: list[Any] = []
    if section.eval_source is not None:
        held_out, more = _read_all(section.eval_parts, None, read)
        notices += more
    elif section.eval_split is not None:
        held_out, more = _read_all(section.parts, section.eval_split, read)
        notices += more
    elif section.eval_fraction > 0:
        found, held_out, more = _divide(found, section.eval_fraction, seed)
        notices += more
    if section.weights is None:
        train = _joined(found)
    elif section.streaming:
        train = _mix_streams(found, section, seed)
    else:
        train, notice = _mix(found, section, seed)
        notices.append(notice)
    if section.streaming:
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Documents(train, _joined(held_out) if held_out else None, tuple(notices))


def _read_all(parts: Sequence[DataSection], split: str | None, read: Read) -> tuple[list[Any], list[str]]:
    found = [read(part, split or part.split) for part in parts]
    return [table for table, _ in found], [notice for _, notices in found for notice in notices]


def _divide(tables: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any], list[str]]:
    """Hold out a share of each table, a row of the largest at least and never a whole one; of streams the first."""
    if not isinstance(tables[0], datasets.Dataset):
        return _divide_streams(tables)
    counts = [min(int(len(table) * fraction + 0.5), len(table) - 1) for table in tables]
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
    count = max(1, STREAMED_EVAL_DOCUMENTS // len(streams))
    rest = [stream.skip(count) for stream in streams]
    if any(next(iter(stream), None) is None for stream in rest):
        raise MptError(
            f"streaming holds out the first {count} rows of each source, and one has no more to train on",
            remedy="Leave data.streaming out for data this small, or set data.eval_fraction to 0.",
        )
    notice = f"streaming: the first {count} rows of each source are held out for evaluation"
    return rest, [stream.take(count) for stream in streams], [notice]


def _mix(tables: list[Any], section: DataSection, seed: int) -> tuple[Any, str]:
    """Take of each table its number of rows, drawn without repetition before any row comes again, in a drawn order."""
    assert section.weights is not None
    lengths = [len(table) for table in tables]
    wanted = rows_of_mixture(lengths, section.weights, section.mixing)
    draw = np.random.default_rng([seed, len(tables)])
    rows, start, told = [], 0, []
    for part, length, count in zip(section.parts, lengths, wanted, strict=True):
        passes, rest = divmod(count, length)
        rows += [np.tile(np.arange(length), passes) + start, draw.permutation(length)[:rest] + start]
        start += length
        told.append(f"{part.source} {count} rows ({count / sum(wanted):.0%}; it has {length})")
    order = draw.permutation(np.concatenate(rows))
    return _joined(tables).select(order), f"a pass over the mixture: {', '.join(told)}"


def _mix_streams(streams: list[Any], section: DataSection, seed: int) -> Any:
    assert section.weights is not None
    total = sum(section.weights)
    return datasets.interleave_datasets(
        streams,
        probabilities=[weight / total for weight in section.weights],
        seed=seed,
        stopping_strategy="all_exhausted" if section.mixing == "oversample" else "first_exhausted",
    )


def _joined(tables: list[Any]) -> Any:
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)

"""Many documents -> samples of one length. Called by `mpt.training.data` and the tasks.

`PackedBlocks` joins documents and cuts; `BestFitBins` keeps them whole and apart, each bin saying how long its
documents are. Both are an index over the tokenised table: the tokens stay in the memory-mapped file.
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch

from mpt.planning.best_fit import placements

LENGTHS = "seq_lengths"
"""The key under which a sample says how long its documents are; one without it is one document."""


class TokenColumn:
    """A column of token lists as one array, read from the chunks of the table."""

    def __init__(self, table: datasets.Dataset, name: str) -> None:
        column = table.data.column(name)
        chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64).tolist()
        self.tokens = self.ends[-1] if self.ends else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop = place.start, place.stop
        parts = []
        chunk = bisect_right(self.ends, start)
        while start < stop:
            begin = self.ends[chunk] - len(self.chunks[chunk])
            end = min(stop, self.ends[chunk])
            parts.append(self.chunks[chunk][start - begin : end - begin])
            start, chunk = end, chunk + 1
        return np.concatenate(parts).astype(np.int64)


class PackedBlocks(torch.utils.data.Dataset):
    """Blocks of `length` tokens cut from the joined documents."""

    def __init__(self, table: datasets.Dataset, length: int) -> None:
        self._column = TokenColumn(table, "input_ids")
        self.chunks = self._column.chunks
        self.tokens = self._column.tokens
        self.length = length

    def __len__(self) -> int:
        return self.tokens // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": torch.from_numpy(self._column[index * self.length : (index + 1) * self.length])}


class BestFitBins(torch.utils.data.Dataset):
    """Bins of at most `length` tokens that hold whole documents, or pieces of those that are longer.

    The bins stand in the order of their first documents, and so do the documents within a bin: the same table makes the
    same bins. A piece of one token, which has nothing to predict, is left out.
    """

    def __init__(self, table: datasets.Dataset, length: int) -> None:
        table = table.flatten_indices() if table._indices is not None else table
        self.columns = {
            name: TokenColumn(table, name) for name in ("input_ids", "labels") if name in table.column_names
        }
        self.length = length
        self.document_lengths = document_lengths(table)
        starts, sizes = cut(self.document_lengths, length)
        bins = fit(sizes, length)
        order = np.argsort(bins, kind="stable")
        self.starts, self.sizes = starts[order], sizes[order]
        self.ends = np.cumsum(np.bincount(bins)) if len(bins) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        starts, sizes = self.starts[places].tolist(), self.sizes[places].tolist()
        sample: dict[str, Any] = {
            name: torch.from_numpy(
                np.concatenate([column[start : start + size] for start, size in zip(starts, sizes, strict=True)])
            )
            for name, column in self.columns.items()
        }
        return sample | {LENGTHS: sizes}

    @property
    def notices(self) -> tuple[str, ...]:
        """Say what was packed, and which documents had to be cut."""
        cut_up = int(np.count_nonzero(self.document_lengths > self.length))
        packed = f"{len(self.document_lengths)} documents packed into {len(self)} samples of {self.length} tokens"
        return (packed + (f"; {cut_up} were longer, and are in pieces" if cut_up else ""),)


def pack_rows(rows: Mapping[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Pack a batch of a stream: columns of token lists, bins out, with the lengths of their documents."""
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in rows})
    bins = BestFitBins(datasets.Dataset.from_dict(dict(rows), features=features), length)
    packed = [bins[index] for index in range(len(bins))]
    tokens = {name: [sample[name].tolist() for sample in packed] for name in bins.columns}
    return tokens | {LENGTHS: [sample[LENGTHS] for sample in packed]}


def lengths_of(samples: Any) -> np.ndarray | None:
    """Count the tokens of each document, packed or not; None where documents are joined, or streamed."""
    if isinstance(samples, BestFitBins):
        return samples.document_lengths
    if not isinstance(samples, datasets.Dataset) or "input_ids" not in samples.column_names:
        return None
    return document_lengths(samples.flatten_indices() if samples._indices is not None else samples)


def document_lengths(table: datasets.Dataset) -> np.ndarray:
    """Count the tokens of each document."""
    chunks = table.data.column("input_ids").chunks
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents that lie one after another into pieces of at most `capacity`: where each starts, and its size."""
    begins = np.cumsum(lengths) - lengths
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(lengths[document] - number * capacity, capacity)
    kept = sizes > 1
    return (begins[document] + number * capacity)[kept], sizes[kept].astype(np.int32)


def fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Give each piece the number of its bin (`mpt.planning.best_fit` says which); bins count by their first pieces."""
    values, counts = np.unique(sizes, return_counts=True)
    longest_first = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int32)
    open_bins: dict[int, list[np.ndarray]] = {}  # by the tokens left; stacks of stretches
    placed = made = 0
    for size, space, per_bin, number in placements(dict(zip(values.tolist(), counts.tolist(), strict=True)), capacity):
        if space is None:
            taken = np.arange(made, made + number, dtype=np.int32)
            made += number
        else:
            taken = _pop(open_bins[space], number)
        bins[longest_first[placed : placed + number * per_bin]] = np.repeat(taken, per_bin)
        placed += number * per_bin
        rest = (capacity if space is None else space) - per_bin * size
        if rest:
            open_bins.setdefault(rest, []).append(taken)
    firsts = np.full(made, len(sizes), np.int64)
    np.minimum.at(firsts, bins, np.arange(len(sizes)))
    renumbered = np.empty(made, np.int32)
    renumbered[np.argsort(firsts)] = np.arange(made, dtype=np.int32)
    return renumbered[bins]


def _pop(stretches: list[np.ndarray], number: int) -> np.ndarray:
    taken = []
    while number:
        last = stretches.pop()
        if len(last) > number:
            stretches.append(last[:-number])
            last = last[-number:]
        taken.append(last)
        number -= len(last)
    return np.concatenate(taken)

"""Tokens of many documents -> blocks of one length. Called by `mpt.training.data`."""

from bisect import bisect_right

import datasets
import numpy as np
import torch


class PackedBlocks(torch.utils.data.Dataset):
    """Blocks of `length` tokens cut from the joined documents; the tokens stay in the memory-mapped table."""

    def __init__(self, table: datasets.Dataset, length: int) -> None:
        chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in table.data.column("input_ids").chunks]
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64).tolist()
        self.tokens = self.ends[-1] if self.ends else 0
        self.length = length

    def __len__(self) -> int:
        return self.tokens // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": torch.from_numpy(self._slice(index * self.length, (index + 1) * self.length))}

    def _slice(self, start: int, stop: int) -> np.ndarray:
        parts = []
        chunk = bisect_right(self.ends, start)
        while start < stop:
            begin = self.ends[chunk] - len(self.chunks[chunk])
            end = min(stop, self.ends[chunk])
            parts.append(self.chunks[chunk][start - begin : end - begin])
            start, chunk = end, chunk + 1
        return np.concatenate(parts).astype(np.int64)

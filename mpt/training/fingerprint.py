"""Know data by its content: how much it is, and a hash of it. The session records it (`mpt.running.data_record`).

What is read whole is known by every token, as it goes into the model: text, tokenizer and division into samples are all
in there. A stream is not read before it is trained on, and is known by less: its tokenizer, and of each file the size
and three pieces, of each hub data set the first rows. What changes between the pieces of a large file, at the same
size, or after those rows, is not seen.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash
from transformers import PreTrainedTokenizerBase

from mpt.recipe.schema import DataSection
from mpt.recipe.sources import expand
from mpt.training.corpus import load_hub
from mpt.training.data import Documents, Samples
from mpt.training.encoding import identify
from mpt.training.packing import BestFitBins, PackedBlocks

PIECE = 1 << 18  # bytes; a file of at most three pieces is read whole
ROWS = 100  # of a streamed hub data set


def fingerprint(
    section: DataSection, documents: Documents, samples: Samples, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Say how much there is to train on and to evaluate on, and hash it.

    Reads every token once: 0.07 CPU seconds a GB of tokens, which is about a GB of text (one core of an AMD EPYC, the
    table in memory; from a disk, what the disk takes).
    """
    if section.streaming:
        of_source = {
            "fingerprint": hash_sources(section.parts),
            "tokenizer": xxhash.xxh3_128_hexdigest(identify(tokenizer).encode()),
        }
        if samples.is_chat:
            of_source["chat_template"] = xxhash.xxh3_128_hexdigest(str(tokenizer.chat_template).encode())
        if section.eval_source is not None:
            of_source["eval_fingerprint"] = hash_sources(section.eval_parts)
        return of_source
    found = {"documents": len(documents.train)} | measure(samples.train)
    if samples.held_out is None:
        return found
    held_out = {"documents": len(documents.held_out)} | measure(samples.held_out)
    return found | {f"eval_{key}": value for key, value in held_out.items()}


def measure(samples: Any) -> dict[str, Any]:
    """Count samples and their tokens, and hash them, with which of them are learnt; how the table is cut into chunks on
    the disk has no part in it."""
    samples = getattr(samples, "unmasked", samples)
    tokens, lengths = xxhash.xxh3_128(), xxhash.xxh3_128()
    count = 0
    for numbers, sizes in _chunks(samples):
        tokens.update(np.ascontiguousarray(numbers).data)
        lengths.update(sizes.data)
        count += len(numbers)
    tokens.update(lengths.digest())
    for numbers in _other_numbers(samples):
        tokens.update(np.ascontiguousarray(numbers).data)
    return {"samples": len(samples), "tokens": count, "fingerprint": tokens.hexdigest()}


def hash_sources(parts: Iterable[DataSection]) -> str:
    """Hash the sizes and pieces of files and the first rows of hub data sets, in the order in which they are read."""
    found = xxhash.xxh3_128()
    for part in parts:
        one = str(part.source)
        if one.startswith("hub:"):
            rows = load_hub(part, one, part.split, streaming=True)
            pieces: Iterable[bytes] = (_written(row) for row in islice(rows, ROWS))
        else:
            pieces = (piece for path in expand(one) for piece in _pieces(path))
        for piece in pieces:
            found.update(len(piece).to_bytes(8, "little"))
            found.update(piece)
    return found.hexdigest()


def _written(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode()


def _chunks(samples: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tokens of a table stretch by stretch, with the lengths of the samples where they differ."""
    if isinstance(samples, PackedBlocks):
        yield from ((chunk, np.empty(0, np.int64)) for chunk in samples.chunks)
        return
    if isinstance(samples, BestFitBins):
        for column in samples.columns.values():
            yield from ((chunk, np.empty(0, np.int64)) for chunk in column.chunks)
        yield np.empty(0, np.int32), np.concatenate([samples.starts, samples.sizes, samples.ends]).astype(np.int64)
        return
    for chunk in samples.data.column("input_ids").chunks:
        lengths = pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64)
        yield chunk.flatten().to_numpy(zero_copy_only=True), lengths


def _other_numbers(samples: Any) -> Iterator[np.ndarray]:
    """Yield what a table holds beside its tokens, column by column: labels, a number a sample or a token."""
    for name in sorted(set(getattr(samples, "column_names", ())) - {"input_ids"}):
        for chunk in samples.data.column(name).chunks:
            numbers = chunk.flatten() if isinstance(chunk, (pa.ListArray, pa.LargeListArray)) else chunk
            yield numbers.to_numpy(zero_copy_only=False)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's size and its beginning, middle and end; a small one whole."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        if size <= 3 * PIECE:
            yield file.read()
            return
        for start in (0, (size - PIECE) // 2, size - PIECE):
            file.seek(start)
            yield file.read(PIECE)

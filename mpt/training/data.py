"""Documents -> samples: hold some out, tokenise, and pack into blocks or truncate. Called by the tasks.

What the reader should hear of (a remainder dropped, documents truncated) comes back as notices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.terms import Packing
from mpt.training.bad_rows import BadRows
from mpt.training.cache import digest
from mpt.training.corpus import read_corpus, stream_corpus
from mpt.training.encoding import LENGTH, Encoder, TokenRows
from mpt.training.packing import BestFitBins, PackedBlocks, pack_rows
from mpt.training.repeated_stream import BATCH_ROWS, StreamedRows
from mpt.training.row_files import TEXT
from mpt.training.shards import prepare_table, row_sizes

STREAMED_EVAL_DOCUMENTS = 200
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class Documents:
    """The text of a run: what is trained on, and what is held out (None: nothing)."""

    train: Any
    held_out: Any
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cuts:
    """What the sequence length did to the training rows: how many were cut, the tokens lost with that, and how many are
    no sample because nothing to learn was left of them. `longest`: the tokens of the longest before the cut, 0 where
    nobody counted; lost tokens that nobody counted are None.
    """

    truncated: int = 0
    lost_tokens: int | None = 0
    left_out: int = 0
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokenised samples, ready for the Trainer. `is_chat`: a chat template has written them. `from_data` is what the
    model must know of them, such as the classes, in JSON's types: it is kept with the run."""

    train: Any
    held_out: Any
    notices: tuple[str, ...] = ()
    is_chat: bool = False
    from_data: Mapping[str, Any] = field(default_factory=dict)
    cuts: Cuts = Cuts()


def read_documents(section: DataSection, *, seed: int) -> Documents:
    """Read the recipe's text and hold out what is evaluated on; the split is by document and repeats for a seed."""
    if section.streaming:
        return _streamed(section, seed)
    train, notices = _read(section, section.source_names, section.split)
    if section.eval_source is not None or section.eval_split is not None:
        source = section.source_names if section.eval_source is None else section.eval_source_names
        held_out, more = _read(section, source, section.eval_split or section.split)
        return Documents(train, held_out, (*notices, *more))
    if section.eval_fraction == 0:
        return Documents(train, None, notices)
    count = min(int(len(train) * section.eval_fraction + 0.5), len(train) - 1)
    if count <= 0:
        cut = _cut_tail(train, section.eval_fraction)
        return replace(cut, notices=(*notices, *cut.notices))
    order = np.random.default_rng(seed).permutation(len(train))
    return Documents(train.select(np.sort(order[count:])), train.select(np.sort(order[:count])), notices)


def read_texts(section: DataSection, split: str) -> tuple[Any, tuple[str, ...]]:
    """Read the text of a section's one source, of a split: a table or stream, and what was left out."""
    if section.streaming:
        return stream_corpus(section, str(section.source), split=split), ()
    return _read(section, str(section.source), split)


def _read(section: DataSection, source: str | list[str], split: str) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Read documents, and say what was left out."""
    bad = BadRows(section.max_bad_rows)
    table = read_corpus(section, source, split=split, bad=bad)
    return table, tuple(bad.notices(len(table)))


def prepare_samples(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: str,
    source: str,
    marks_text: bool = False,
    workers: int = 1,
) -> Samples:
    """Tokenise, and pack or truncate; `workers` processes do it. Raises MptError where the text is too short.

    `marks_text`: the tokenizer's own marks stand around each document, in the place of an end of text after it.
    """
    encode = Encoder(tokenizer, marks_text=marks_text)
    if not isinstance(documents.train, datasets.Dataset):
        return _stream_samples(documents, encode, sequence_length, packing)
    notices = list(documents.notices)
    if tokenizer.eos_token_id is None and not marks_text:
        notices.append("the tokenizer has no end-of-text token: documents follow one another unmarked")
    rows = TokenRows(encode, sequence_length if packing == Packing.NONE else None)
    prepared = prepare_table(documents.train, rows, workers=workers)
    notices += prepared.notices
    train = prepared.table
    held_out = None
    if documents.held_out is not None:
        held_out = prepare_table(documents.held_out, rows, workers=workers).table
    if packing == Packing.BEST_FIT:
        packed = pack_apart(Samples(train, held_out, tuple(notices)), sequence_length)
        if len(packed.train) == 0:
            raise MptError(
                f"the data set is empty: no document of {source} has two tokens", remedy="Check data.source."
            )
        return packed
    if packing == Packing.NONE:
        cuts = count_cuts(train, sequence_length)
        notices += _truncation_notice(cuts, len(train), sequence_length)
        return Samples(
            _not_empty(train, source),
            held_out.select_columns(["input_ids"]) if held_out is not None and len(held_out) else None,
            tuple(notices),
            cuts=cuts,
        )
    blocks = PackedBlocks(train, sequence_length)
    if len(blocks) == 0:
        raise MptError(
            f"{source} has {blocks.tokens} tokens{_left(documents)}, less than one block of data.sequence_length "
            f"{sequence_length}",
            remedy="Set data.sequence_length lower, set data.packing: best_fit or none, or give more text.",
        )
    dropped = blocks.tokens % sequence_length
    if dropped:
        notices.append(
            f"{len(blocks)} blocks of {sequence_length} tokens; the last {dropped} of {blocks.tokens} are left out"
        )
    eval_blocks = None if held_out is None else PackedBlocks(held_out, sequence_length)
    if eval_blocks is not None and len(eval_blocks) == 0:
        # Less than one block is held out: a shorter one still measures something.
        eval_blocks = PackedBlocks(held_out, eval_blocks.tokens) if eval_blocks.tokens > 1 else None
        notices.append(
            "the held-out text is empty: nothing is evaluated"
            if eval_blocks is None
            else f"the held-out text is one block of {eval_blocks.tokens} tokens"
        )
    return Samples(blocks, eval_blocks, tuple(notices))


def _left(documents: Documents) -> str:
    """Say that what is held out is not counted; where the same text is evaluated on, nothing is."""
    held_out = documents.held_out
    is_apart = held_out is not None and held_out._fingerprint != documents.train._fingerprint
    return " left to train on" if is_apart else ""


def pack_apart(samples: Samples, length: int) -> Samples:
    """Let documents share samples of `length` tokens without seeing one another; of a stream, 1,000 at a time."""
    if not isinstance(samples.train, datasets.Dataset):
        pack = partial(pack_rows, length=length)
        train, held_out = samples.train.then(pack), samples.held_out
        if held_out is not None:
            held_out = held_out.map(pack, batched=True, batch_size=BATCH_ROWS)
        notice = "streaming packs 1,000 documents at a time"
        return replace(samples, train=train, held_out=held_out, notices=(*samples.notices, notice))
    bins = BestFitBins(samples.train, length)
    held_out = None if samples.held_out is None else BestFitBins(samples.held_out, length)
    return replace(samples, train=bins, held_out=held_out or None, notices=(*samples.notices, *bins.notices))


def _cut_tail(train: datasets.Dataset, fraction: float) -> Documents:
    """Hold out the end of the longest document where the documents are too few to hold a whole one out."""
    sizes = row_sizes(train)
    longest = int(np.argmax(sizes))
    text = train[longest][TEXT]
    # Bytes and characters: a share of the whole, however it is counted.
    size = min(int(len(text) * fraction * sizes.sum() / sizes[longest]), len(text) // 2)
    cut = text.find("\n", len(text) - size) + 1
    if cut <= 0:
        cut = len(text) - size
    before, after = range(longest), range(longest + 1, len(train))
    parts = [train.select(rows) if rows else None for rows in (before, after)]
    kept = [parts[0], _one_document(text[:cut], train), parts[1]]
    count = f"{len(train)} document{'s' if len(train) > 1 else ''}"
    return Documents(
        datasets.concatenate_datasets([part for part in kept if part is not None]),
        _one_document(text[cut:], train),
        (f"{count}: the end of the longest ({len(text) - cut} characters) is held out for evaluation",),
    )


def _one_document(text: str, like: datasets.Dataset) -> datasets.Dataset:
    table = datasets.Dataset.from_dict({TEXT: [text]}, features=like.features)
    table._fingerprint = digest("document", text)
    return table


def count_cuts(table: datasets.Dataset, limit: int, left_out: int = 0) -> Cuts:
    """Count what was cut off at `limit` tokens, by the column that says how long each row was."""
    truncated = lost = longest = 0
    for chunk in table.data.column(LENGTH).chunks:
        lengths = chunk.to_numpy().astype(np.int64)
        if len(lengths):
            beyond = np.maximum(lengths - limit, 0)
            truncated += int(np.count_nonzero(beyond))
            lost += int(beyond.sum())
            longest = max(longest, int(lengths.max()))
    return Cuts(truncated, lost, left_out, longest)


def _truncation_notice(cuts: Cuts, documents: int, limit: int) -> list[str]:
    if not cuts.truncated:
        return []
    return [f"{cuts.truncated} of {documents} documents are longer than {limit} tokens and were truncated"]


def _not_empty(train: datasets.Dataset, source: str) -> datasets.Dataset:
    if len(train) == 0:
        raise MptError(f"the data set is empty: no document of {source} has two tokens", remedy="Check data.source.")
    return train.select_columns(["input_ids"])


def _streamed(section: DataSection, seed: int) -> Documents:
    train = stream_corpus(section, section.source_names, split=section.split)
    if section.eval_source is not None:
        held_out = stream_corpus(section, section.eval_source_names, split=section.split)
    elif section.eval_split is not None:
        held_out = stream_corpus(section, section.source_names, split=section.eval_split)
    elif section.eval_fraction == 0:
        held_out = None
    else:
        held_out = train.take(STREAMED_EVAL_DOCUMENTS)
        train = train.skip(STREAMED_EVAL_DOCUMENTS)
        if next(iter(train), None) is None:
            raise MptError(
                f"streaming holds out the first {STREAMED_EVAL_DOCUMENTS} documents, and there are no more to train on",
                remedy="Leave data.streaming out for data this small, or set data.eval_fraction to 0.",
            )
        notice = f"streaming: the first {STREAMED_EVAL_DOCUMENTS} documents are held out for evaluation"
        return Documents(train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), held_out, (notice,))
    return Documents(train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), held_out)


def _stream_samples(documents: Documents, encode_texts: Encoder, sequence_length: int, packing: str) -> Samples:
    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        for text in batch[TEXT]:
            if not isinstance(text, str):
                raise MptError(
                    f"a row of the stream has {type(text).__name__}, not text", remedy="Give every row a text."
                )
        rows = encode_texts(batch[TEXT])
        if packing != Packing.NONE:
            return {"input_ids": rows}
        whole = [row for row in rows if encode_texts.is_enough(row)]
        return {"input_ids": [encode_texts.cut(row, sequence_length) for row in whole]}

    def blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        joined = [token for row in batch["input_ids"] for token in row]
        end = len(joined) // sequence_length * sequence_length
        return {"input_ids": [joined[start : start + sequence_length] for start in range(0, end, sequence_length)]}

    held_out = documents.held_out
    if held_out is not None:
        held_out = held_out.map(encode, batched=True, batch_size=BATCH_ROWS, remove_columns=[TEXT])
    train = StreamedRows(documents.train, encode)
    if packing == Packing.BEST_FIT:
        return pack_apart(Samples(train, held_out, documents.notices), sequence_length)
    if packing == Packing.NONE:
        return Samples(train, held_out, documents.notices)
    if held_out is not None:
        held_out = held_out.map(blocks, batched=True, batch_size=BATCH_ROWS)
    notice = f"streaming: the last tokens of each pass, fewer than {sequence_length}, are left out"
    return Samples(replace(train, length=sequence_length), held_out, (*documents.notices, notice))

"""Documents -> samples: hold some out, tokenise, and pack into blocks or truncate. Called by the tasks.

What the reader should hear of (a remainder dropped, documents truncated) comes back as notices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.bad_rows import BadRows
from mpt.training.corpus import no_beat, read_corpus, stream_corpus
from mpt.training.packing import PackedBlocks
from mpt.training.row_files import TEXT

STREAMED_EVAL_DOCUMENTS = 200
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class Documents:
    """The text of a run: what is trained on, and what is held out (None: nothing)."""

    train: Any
    held_out: Any
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokenised samples, ready for the Trainer. `is_chat`: a chat template has written them."""

    train: Any
    held_out: Any
    notices: tuple[str, ...] = ()
    is_chat: bool = False


def read_documents(section: DataSection, *, seed: int, beat: Callable[[], None] = no_beat) -> Documents:
    """Read the recipe's text and hold out what is evaluated on; the split is by document and repeats for a seed."""
    if section.streaming:
        return _streamed(section, seed)
    train, notices = _read(section, section.source_names, section.split, beat)
    if section.eval_source is not None or section.eval_split is not None:
        source = section.source_names if section.eval_source is None else section.eval_source_names
        held_out, more = _read(section, source, section.eval_split or section.split, beat)
        return Documents(train, held_out, (*notices, *more))
    if section.eval_fraction == 0:
        return Documents(train, None, notices)
    count = int(len(train) * section.eval_fraction + 0.5)
    if count == 0:
        cut = _cut_tail(train, section.eval_fraction)
        return replace(cut, notices=(*notices, *cut.notices))
    order = np.random.default_rng(seed).permutation(len(train))
    return Documents(train.select(np.sort(order[count:])), train.select(np.sort(order[:count])), notices)


def read_texts(section: DataSection, split: str) -> tuple[Any, tuple[str, ...]]:
    """Read the text of a section's one source, of a split: a table or stream, and what was left out."""
    if section.streaming:
        return stream_corpus(section, str(section.source), split=split), ()
    return _read(section, str(section.source), split, no_beat)


def _read(
    section: DataSection, source: str | list[str], split: str, beat: Callable[[], None]
) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Read documents, and say what was left out."""
    bad = BadRows(section.max_bad_rows)
    table = read_corpus(section, source, split=split, bad=bad, beat=beat)
    return table, tuple(bad.notices(len(table)))


def prepare_samples(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: bool,
    source: str,
    marks_text: bool = False,
) -> Samples:
    """Tokenise, and pack or truncate. Raises MptError where the text is too short for one sample.

    `marks_text`: the tokenizer's own marks stand around each document, in the place of an end of text after it.
    """
    encode = Encoder(tokenizer, marks_text=marks_text)
    if not isinstance(documents.train, datasets.Dataset):
        return _stream_samples(documents, encode, sequence_length, packing)
    notices = list(documents.notices)
    if tokenizer.eos_token_id is None and not marks_text:
        notices.append("the tokenizer has no end-of-text token: documents follow one another unmarked")
    train = _tokenise(documents.train, encode, None if packing else sequence_length)
    held_out = None
    if documents.held_out is not None:
        held_out = _tokenise(documents.held_out, encode, None if packing else sequence_length)
    if not packing:
        notices += _truncation_notice(train, sequence_length)
        return Samples(
            _not_empty(train, source), held_out if held_out is not None and len(held_out) else None, tuple(notices)
        )
    blocks = PackedBlocks(train, sequence_length)
    if len(blocks) == 0:
        raise MptError(
            f"{source} has {blocks.tokens} tokens to train on, less than one block of data.sequence_length "
            f"{sequence_length}",
            remedy="Set data.sequence_length lower, set data.packing: false, or give more text.",
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


def _cut_tail(train: datasets.Dataset, fraction: float) -> Documents:
    """Hold out the end of the longest document where the documents are too few to hold a whole one out."""
    texts: list[str] = train[TEXT][:]
    longest = max(range(len(texts)), key=lambda index: len(texts[index]))
    text = texts[longest]
    size = min(int(sum(map(len, texts)) * fraction), len(text) // 2)
    cut = text.find("\n", len(text) - size) + 1
    if cut <= 0:
        cut = len(text) - size
    kept = [text[:cut] if index == longest else other for index, other in enumerate(texts)]
    count = f"{len(texts)} document{'s' if len(texts) > 1 else ''}"
    return Documents(
        datasets.Dataset.from_dict({TEXT: kept}),
        datasets.Dataset.from_dict({TEXT: [text[cut:]]}),
        (f"{count}: the end of the longest ({len(text) - cut} characters) is held out for evaluation",),
    )


class Encoder:
    """Texts -> tokens, a row a document: marked as the tokenizer marks one, or with an end of text after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, marks_text: bool) -> None:
        self.tokenizer = tokenizer
        self.marks_text = marks_text
        self._end = [] if tokenizer.eos_token_id is None or marks_text else [tokenizer.eos_token_id]
        # One token has no next one to predict, and marks alone are no text.
        self._fewest = 1 + tokenizer.num_special_tokens_to_add() if marks_text else 2

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Encode the texts; those without a visible character are left out."""
        texts = [text for text in texts if text.strip()]
        rows = self.tokenizer(texts, add_special_tokens=self.marks_text)["input_ids"] if texts else []
        return [row + self._end for row in rows]

    def is_enough(self, row: list[int]) -> bool:
        """Whether a row teaches anything by itself."""
        return len(row) >= self._fewest

    def cut(self, row: list[int], limit: int) -> list[int]:
        """Truncate a row; the mark at its end stays."""
        if len(row) <= limit or not self.marks_text:
            return row[:limit]
        return [*row[: limit - 1], row[-1]]

    @property
    def identity(self) -> tuple[str, bool]:
        return identify(self.tokenizer), self.marks_text


def _tokenise(table: datasets.Dataset, encode_texts: Encoder, limit: int | None) -> datasets.Dataset:
    """Encode every document; with `limit`, at most so many tokens of it.

    The result is cached by `datasets`, beside the table it came from (in Hugging Face's cache, never by the user's
    files); the fingerprint is ours, because a tokenizer's pickle changes with use.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = encode_texts(batch[TEXT])
        if limit is None:
            return {"input_ids": rows}
        rows = [row for row in rows if encode_texts.is_enough(row)]
        cut = [encode_texts.cut(row, limit) for row in rows]
        return {"input_ids": cut, "truncated": [len(row) > limit for row in rows]}

    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    if limit is not None:
        features["truncated"] = datasets.Value("bool")
    in_memory = not table.cache_files
    identity = "" if in_memory else Hasher.hash((table._fingerprint, encode_texts.identity, limit, "tokenised-2"))
    return table.map(
        encode,
        batched=True,
        remove_columns=table.column_names,
        features=datasets.Features(features),
        keep_in_memory=in_memory,
        load_from_cache_file=not in_memory,
        new_fingerprint=identity or None,
    )


def identify(tokenizer: PreTrainedTokenizerBase) -> str:
    """Write down what a tokenizer does; its pickle changes with use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend.to_str() if backend is not None else f"{tokenizer.name_or_path} {sorted(tokenizer.get_vocab().items())}"
    )


def _truncation_notice(train: datasets.Dataset, limit: int) -> list[str]:
    count = int(np.count_nonzero(train.with_format("numpy")["truncated"][:])) if len(train) else 0
    return [f"{count} of {len(train)} documents are longer than {limit} tokens and were truncated"] if count else []


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


def _stream_samples(documents: Documents, encode_texts: Encoder, sequence_length: int, packing: bool) -> Samples:
    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        for text in batch[TEXT]:
            if not isinstance(text, str):
                raise MptError(
                    f"a row of the stream has {type(text).__name__}, not text", remedy="Give every row a text."
                )
        rows = encode_texts(batch[TEXT])
        if not packing:
            whole = [row for row in rows if encode_texts.is_enough(row)]
            return {"input_ids": [encode_texts.cut(row, sequence_length) for row in whole]}
        joined = [token for row in rows for token in row]
        end = len(joined) // sequence_length * sequence_length
        return {"input_ids": [joined[start : start + sequence_length] for start in range(0, end, sequence_length)]}

    def samples(stream: Any) -> Any:
        return None if stream is None else stream.map(encode, batched=True, batch_size=1000, remove_columns=[TEXT])

    notices = [*documents.notices]
    if packing:
        notices.append(
            "streaming packs 1,000 documents at a time and leaves out the last tokens of each thousand, fewer than "
            f"{sequence_length}"
        )
    return Samples(samples(documents.train), samples(documents.held_out), tuple(notices))

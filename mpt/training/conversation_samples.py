"""Conversations -> tokenised samples with labels, truncated at the sequence length. Called by the task sft.

What the user should hear of comes back as notices: how many were truncated and what that cost, and how many are left
out because no token that is learnt lies within the sequence length.
"""

import json
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mpt.errors import MptError
from mpt.training.collation import IGNORED
from mpt.training.conversation_rows import CONVERSATION, PLACE
from mpt.training.conversations import ConversationWriter, encode
from mpt.training.data import Documents, Samples, count_cuts
from mpt.training.encoding import LENGTH, identify
from mpt.training.repeated_stream import StreamedRows
from mpt.training.shards import prepare_table

TOKENS = datasets.List(datasets.Value("int32"))
FEATURES = {"input_ids": TOKENS, "labels": TOKENS}
# Of a sample before truncation: all tokens, and those to learn.
COUNTS = {LENGTH: datasets.Value("int32"), "learnt": datasets.Value("int32")}
VERSION = "conversations-3"


def prepare_conversations(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    train_on: str,
    source: str,
    workers: int = 1,
) -> Samples:
    """Tokenise. Raises MptError where nothing is left to learn, or where the template can't write a conversation."""
    if not isinstance(documents.train, datasets.Dataset):
        return _stream(documents, tokenizer, sequence_length, train_on)
    rows = ConversationRows(tokenizer, sequence_length, train_on)
    prepared = prepare_table(documents.train, rows, workers=workers)
    train = prepared.table
    if len(train) == 0:
        raise MptError(
            f"no conversation of {source} has a token to learn within data.sequence_length {sequence_length}",
            remedy="Set data.sequence_length higher (mpt truncates at the end), or look at data.train_on.",
        )
    held_out = None
    if documents.held_out is not None and len(documents.held_out):
        held_out = prepare_table(documents.held_out, rows, workers=workers).table
    notices = [*documents.notices, *prepared.notices, *_told(train, len(documents.train), sequence_length)]
    if documents.held_out is not None and not held_out:
        notices.append("no held-out conversation has a token to learn: nothing is evaluated")
    columns = list(FEATURES)
    return Samples(
        train.select_columns(columns),
        held_out.select_columns(columns) if held_out else None,
        tuple(notices),
        cuts=count_cuts(train, sequence_length, left_out=len(documents.train) - len(train)),
    )


class ConversationRows:
    """Prepares a table of conversations: the tokens and labels of each; those with nothing to learn are left out."""

    features = datasets.Features(FEATURES | COUNTS)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int, train_on: str) -> None:
        self.tokenizer, self.limit, self.train_on = tokenizer, limit, train_on
        known = (identify(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map)
        self.identity = (*known, limit, train_on, VERSION)
        self._convert = _encoder(tokenizer, limit, train_on, counts=True)

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        """Tokenise a batch."""
        return self._convert(batch)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversationRows, (self.tokenizer, self.limit, self.train_on)


def _encoder(
    tokenizer: PreTrainedTokenizerBase, limit: int, train_on: str, *, counts: bool
) -> Callable[[dict[str, list[str]]], dict[str, list[Any]]]:
    writer = ConversationWriter(tokenizer, train_on)

    def convert(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = zip(batch[CONVERSATION], batch[PLACE], strict=True)
        written = [writer.write(json.loads(conversation), place) for conversation, place in rows]
        made: dict[str, list[Any]] = {key: [] for key in (FEATURES | COUNTS if counts else FEATURES)}
        for tokens, labels in encode(tokenizer, written):
            # The first token of a sample has none before it that would predict it.
            if not np.any(labels[1:limit] != IGNORED):
                continue
            made["input_ids"].append(tokens[:limit])
            made["labels"].append(labels[:limit])
            if counts:
                made[LENGTH].append(len(tokens))
                made["learnt"].append(int(np.count_nonzero(labels != IGNORED)))
        return made

    return convert


def _told(train: datasets.Dataset, conversations: int, limit: int) -> list[str]:
    told = []
    numbers = train.with_format("numpy")
    lengths, learnt = numbers[LENGTH][:], numbers["learnt"][:]
    long = int(np.count_nonzero(lengths > limit))
    if long:
        labels = train.data.column("labels")
        kept = sum(int(np.count_nonzero(chunk.flatten().to_numpy() != IGNORED)) for chunk in labels.chunks)
        lost = 1 - kept / int(learnt.sum())
        told.append(
            f"{long} of {len(train)} conversations are longer than {limit} tokens (the longest has {lengths.max()}) "
            f"and were truncated: {lost:.1%} of the tokens to learn are lost"
        )
    left_out = conversations - len(train)
    if left_out:
        told.append(
            f"{left_out} of {conversations} conversations are left out: no token to learn lies within their first "
            f"{limit}"
        )
    return told


def _stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, limit: int, train_on: str) -> Samples:
    convert = _encoder(tokenizer, limit, train_on, counts=False)
    held_out = documents.held_out
    if held_out is not None:
        held_out = held_out.map(
            convert, batched=True, remove_columns=[CONVERSATION, PLACE], features=datasets.Features(FEATURES)
        )
    notice = f"streaming: conversations are cut at {limit} tokens, and left out where nothing to learn remains"
    return Samples(
        StreamedRows(documents.train, convert),
        held_out,
        (*documents.notices, notice),
    )

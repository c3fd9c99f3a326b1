"""Samples -> a batch of tensors. A collator that draws no random numbers says so.

A sample has `input_ids`; `labels` where not all of them are learnt; and `seq_lengths` where it is several documents
that must not see one another. Which collator a run has stands in its plan: `build_collator`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from mpt.planning.plan import Plan
from mpt.training.packing import LENGTHS

IGNORED = -100  # the label that transformers' losses leave out

Samples = Sequence[Mapping[str, Any]]
Collator = Callable[[Samples], dict[str, Any]]


def build_collator(plan: Plan, tokenizer: Any) -> Collator:
    """Build the collator of a task whose samples are tokens and their labels."""
    if plan.value("packing") == "blocks":
        return PackedCollator()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad = pad or 0  # nothing attends to a pad: any token will do
    multiple = plan.value("pad_to_multiple_of")
    if plan.value("padding_free"):
        return FlattenedCollator(pad, multiple=multiple)
    make = BinCollator if plan.value("packing") == "best_fit" else PaddedCollator
    return make(pad, multiple=multiple, limit=plan.value("sequence_length"))


class PackedCollator:
    """Stack blocks of one length; the labels are the tokens themselves (the model shifts them)."""

    draws_random_numbers = False

    def __call__(self, samples: Samples) -> dict[str, torch.Tensor]:
        tokens = torch.stack([torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples])
        return {"input_ids": tokens, "labels": tokens}


class PaddedCollator:
    """Pad to the longest sample of the batch, and on to a multiple of `multiple` that is at most `limit`; pads are
    masked and their labels ignored. Samples without `labels` are learnt whole."""

    draws_random_numbers = False

    def __init__(self, pad_token_id: int, *, multiple: int = 1, limit: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = multiple
        self.limit = limit

    def __call__(self, samples: Samples) -> dict[str, torch.Tensor]:
        tokens, labels = self.pad(samples)
        mask = torch.zeros_like(tokens)
        for row, sample in enumerate(samples):
            mask[row, : len(sample["input_ids"])] = 1
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def pad(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        """Give tokens and labels as two rectangles."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.multiple) * self.multiple
        if self.limit is not None:
            width = max(longest, min(width, self.limit))
        tokens = torch.full((len(samples), width), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(samples), width), IGNORED, dtype=torch.int64)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            tokens[row, :length] = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
            labels[row, :length] = torch.as_tensor(sample.get("labels", sample["input_ids"]), dtype=torch.int64)
        return tokens, labels


class BinCollator(PaddedCollator):
    """A row for each bin of documents, whose positions begin anew at each document.

    transformers builds a mask that keeps the documents apart from such positions, where no attention mask is given
    (transformers 5.23, masking_utils.find_packed_sequence_indices). A document's first token is predicted by nothing.
    The pads lengthen the last document, which does not see them: attention is causal.
    """

    def __call__(self, samples: Samples) -> dict[str, torch.Tensor]:
        tokens, labels = self.pad(samples)
        positions = torch.empty_like(tokens)
        for row, sample in enumerate(samples):
            for start, _ in _documents(sample):
                positions[row, start:] = torch.arange(tokens.shape[1] - start)
                labels[row, start] = IGNORED
        return {"input_ids": tokens, "position_ids": positions, "labels": labels}


class FlattenedCollator:
    """All documents of the batch in one row, for Flash Attention's kernels of varying lengths. Where the row has to be
    a multiple of `multiple` long, a document of pads ends it.

    The boundaries are given as `cu_seq_lens_*`, so that no layer has to find them in `position_ids`, which costs a
    synchronisation each (transformers 5.23, modeling_flash_attention_utils._is_packed_sequence).
    """

    draws_random_numbers = False

    def __init__(self, pad_token_id: int, *, multiple: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = multiple

    def __call__(self, samples: Samples) -> dict[str, Any]:
        rows = [torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
        learnt = [torch.as_tensor(sample.get("labels", sample["input_ids"]), dtype=torch.int64) for sample in samples]
        lengths = [end - start for sample in samples for start, end in _documents(sample)]
        pads = -sum(lengths) % self.multiple
        if pads:
            rows.append(torch.full((pads,), self.pad_token_id))
            learnt.append(torch.full((pads,), IGNORED))
            lengths.append(pads)
        tokens, labels = torch.cat(rows), torch.cat(learnt)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        labels[ends[:-1].long()] = IGNORED
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {
            "input_ids": tokens[None],
            "position_ids": positions[None],
            "labels": labels[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


def _documents(sample: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield where each document of a sample starts and ends."""
    start = 0
    for length in sample.get(LENGTHS) or [len(sample["input_ids"])]:
        yield start, start + length
        start += length

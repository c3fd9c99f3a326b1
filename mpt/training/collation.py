"""Samples -> a batch of tensors. A collator that draws no random numbers says so."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IGNORED = -100  # the label that transformers' losses leave out


class PackedCollator:
    """Stack blocks of one length; the labels are the tokens themselves (the model shifts them)."""

    draws_random_numbers = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = torch.stack([torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples])
        return {"input_ids": tokens, "labels": tokens}


class PaddedCollator:
    """Pad to the longest sample of the batch; pads are masked and their labels ignored. Samples without `labels` are
    learnt whole."""

    draws_random_numbers = False

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        tokens = torch.full((len(samples), longest), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(samples), longest), IGNORED, dtype=torch.int64)
        mask = torch.zeros((len(samples), longest), dtype=torch.int64)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            tokens[row, :length] = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
            labels[row, :length] = torch.as_tensor(sample.get("labels", sample["input_ids"]), dtype=torch.int64)
            mask[row, :length] = 1
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

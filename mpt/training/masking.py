"""Masked language modelling: which tokens of a sample are hidden, for the model to guess (Devlin et al. 2019, 3.1).

Of the tokens that are chosen, 8 in 10 become the mask, 1 in 10 another token, and 1 in 10 stays. Training masks a
sample anew each time, with random numbers that follow from its place in the data (`mpt.training.data_order`); what is
evaluated on is masked once, so that one evaluation compares with another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from mpt.training.collation import IGNORED, PaddedCollator
from mpt.training.data_order import keyed_randomness


class MaskedCollator:
    """Pad samples to one length and mask them; those that have labels are masked already.

    Of each sample at least one token is masked, as in BERT's own data: a batch without any has no loss.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        *,
        multiple: int = 1,
        limit: int | None = None,
    ) -> None:
        self._pad = PaddedCollator(tokenizer.pad_token_id, multiple=multiple, limit=limit)
        self._mask_token_id = tokenizer.mask_token_id
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._pad(samples)
        if "labels" in samples[0]:
            return batch
        tokens = batch["input_ids"]
        is_special = torch.isin(tokens, self._special)
        masked, labels = self._masking.torch_mask_tokens(tokens.clone(), special_tokens_mask=is_special)
        for row in torch.nonzero((labels == IGNORED).all(dim=1) & ~is_special.all(dim=1)).flatten().tolist():
            plain = torch.nonzero(~is_special[row]).flatten()
            chosen = plain[torch.randint(len(plain), ())]
            labels[row, chosen], masked[row, chosen] = tokens[row, chosen], self._mask_token_id
        return batch | {"input_ids": masked, "labels": labels}


class FixedMasks(Dataset[dict[str, torch.Tensor]]):
    """Samples that are masked alike whenever they are asked for: by the seed and their number."""

    def __init__(self, samples: Any, collator: MaskedCollator, seed: int) -> None:
        self.unmasked = samples
        self._collator = collator
        self._seed = seed

    def __len__(self) -> int:
        return len(self.unmasked)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return mask_one(self.unmasked[index], index, self._collator, self._seed)


def mask_one(sample: Mapping[str, Any], index: int, collator: MaskedCollator, seed: int) -> dict[str, torch.Tensor]:
    """Mask the sample of this number as it is masked every time."""
    with keyed_randomness(seed, index):
        batch = collator([{"input_ids": sample["input_ids"]}])
    length = len(sample["input_ids"])
    return {"input_ids": batch["input_ids"][0, :length], "labels": batch["labels"][0, :length]}

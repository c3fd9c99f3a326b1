"""The loss of an evaluation of a language model: the mean over its tokens, however they are divided into batches.

transformers averages the batches' means, each for as many samples as it has (5.23, Trainer.evaluation_loop): a token in
a batch of short samples would count for more than one in a batch of long ones, and the loss, and with it the
perplexity, would follow from the batch size and from the number of processes. Called by the trainer.
"""

from collections.abc import MutableMapping
from typing import Any

import torch

from mpt.training.collation import IGNORED
from mpt.training.data_order import SAMPLE_TOKENS


class TokenLoss:
    """Sums up what the batches of one evaluation lose on this process. `shift`: a label is that of the next token."""

    def __init__(self, *, shift: bool) -> None:
        self._shift = shift
        self._batches: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Take the mean loss of a batch; one of a batch without labels is no number, and none is taken."""
        asked = labels[..., 1:] if self._shift else labels
        tokens = (asked != IGNORED).sum().to(loss.device)
        total = torch.where(tokens > 0, loss.detach().float() * tokens, 0.0)
        self._batches.append(torch.stack([total, tokens.float()]))

    def mean(self, accelerator: Any) -> float:
        """Give the mean over the tokens of all processes, each of which calls this; nan where there are none."""
        sums = torch.stack(self._batches).cpu().double().sum(dim=0) if self._batches else torch.zeros(2).double()
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
        total, tokens = sums.tolist()
        return total / tokens if tokens else float("nan")


def ignore_repeated(inputs: MutableMapping[str, Any], accelerator: Any) -> None:
    """Take the labels from the samples that accelerate repeats, so that the last batches of all processes are full."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return
    lengths = inputs[SAMPLE_TOKENS]
    kept = max(0, state.remainder - accelerator.process_index * len(lengths))
    labels = inputs["labels"].clone()  # may be the tokens themselves
    if len(labels) == len(lengths):
        labels[kept:] = IGNORED
    else:  # all samples stand in one row
        labels[:, int(lengths[:kept].sum()) :] = IGNORED
    inputs["labels"] = labels

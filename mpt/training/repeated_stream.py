"""A stream that begins again when it ends, in another order each time. The session puts it around streamed samples.

The Trainer takes a stream for one epoch as long as the whole run, and on a resume skips as many batches as were trained
on. Where a stream ends before that it would count them from the second pass on, and train on other data than a run that
was never interrupted; and the gradients of the pass's last, incomplete accumulation would leak into the next one.
"""

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

import datasets
import torch


class RepeatedStream(torch.utils.data.IterableDataset):
    """Pass after pass of a shuffled stream, each in the order that its number (`set_epoch`) gives, without an end."""

    def __init__(self, stream: datasets.IterableDataset) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Loader processes share the number of a pass, and each of them comes to the end of its part at another time.
        stream = copy.deepcopy(self.stream)
        for number in count():
            stream.set_epoch(number)
            is_empty = True
            for sample in stream:
                is_empty = False
                yield sample
            if is_empty:  # a loader process without a part of the stream
                return

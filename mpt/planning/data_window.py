"""Stretches of the data that a run leaves out because its numbers go bad on them: where they lie, and the order that is
left. Pure; the supervisor places a window, and the worker's sampler obeys it (`mpt.training.data_order`).

A window is counted in samples of one epoch's order, so that another micro batch changes nothing about it. Its samples
are left out from there on, in later epochs too; what came before it stays as it was, and every epoch keeps its length,
so that the Trainer's own arithmetic for taking a run up again still finds the right sample.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

# The larger of the two bounds the window: a share of an epoch, and batches below which nothing would be caught.
MAX_SHARE = 0.02
MIN_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Epoch:
    """How long one pass over the data is: its samples, and its optimizer steps."""

    samples: int
    steps: int


@dataclass(frozen=True, slots=True)
class DataWindow:
    """The positions `first` up to `last`, exclusive, of an epoch's order; all count from 0.

    The order is the one that earlier windows have left.
    """

    epoch: int
    first: int
    last: int

    def holds(self, epoch: int, position: int) -> bool:
        """Whether a position of an epoch lies within."""
        return epoch == self.epoch and self.first <= position < self.last


def position_of(step: int, epoch: Epoch, global_batch_size: int) -> tuple[int, int]:
    """Find where optimizer step `step` (from 1) begins: the epoch, and the position in its order.

    >>> position_of(12, Epoch(samples=80, steps=10), global_batch_size=8)
    (1, 8)
    """
    number, steps_before = divmod(step - 1, epoch.steps)
    return number, steps_before * global_batch_size


def window_around(step: int, epoch: Epoch, global_batch_size: int, batches: int) -> DataWindow | None:
    """Place a window of `batches` global batches around a step, a quarter of it before; None where an epoch is too
    short to do without.

    It is no more than MAX_SHARE of an epoch, or MIN_BATCHES where that is more, never more than half of one, and ends
    with its epoch.
    """
    allowed = min(batches, max(MIN_BATCHES, int(MAX_SHARE * epoch.steps)), epoch.steps // 2)
    if allowed < 1:
        return None
    number, position = position_of(step, epoch, global_batch_size)
    length = allowed * global_batch_size
    first = max(0, min(position - allowed // 4 * global_batch_size, epoch.samples - length))
    return DataWindow(number, first, min(epoch.samples, first + length))


def windows_of(repairs: Iterable[Mapping[str, Any]]) -> tuple[DataWindow, ...]:
    """Read the windows out of a plan's repairs, oldest first."""
    kept = [repair["values"] for repair in repairs if repair["kind"] == "exclude_data"]
    return tuple(DataWindow(values["epoch"], values["first"], values["last"]) for values in kept)


def order_without(windows: Sequence[DataWindow], epoch: int, order_of: Callable[[int], Sequence[int]]) -> Sequence[int]:
    """Give an epoch's order of samples without the windows' samples, as long as it was: the epoch's first samples come
    once more at its end. `order_of` gives the whole order of an epoch.

    >>> order_without([DataWindow(0, 1, 3)], 0, lambda epoch: [5, 3, 1, 0, 2, 4])
    [5, 0, 2, 4, 5, 0]
    >>> order_without([DataWindow(0, 1, 3)], 1, lambda epoch: [[5, 3, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]][epoch])
    [0, 2, 4, 5, 0, 2]
    """
    order = order_of(epoch)
    for number, window in enumerate(windows):
        if epoch < window.epoch:
            continue
        there = order if epoch == window.epoch else order_without(windows[:number], window.epoch, order_of)
        start = window.first if epoch == window.epoch else 0
        left_out = frozenset(there[window.first : window.last])
        kept = [index for place, index in enumerate(order) if place < start or index not in left_out]
        order = list(islice(cycle(kept), len(order)))
    return order

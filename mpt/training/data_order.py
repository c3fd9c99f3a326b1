"""In which order a run sees its samples, and which numbers are drawn for them: a function of seed, epoch and position.

The Trainer's own sampler says the order. Around it stands one that leaves excluded windows out, and hands each sample's
place on to the collator, so that

- a collator which draws random numbers draws the same ones for the same position, whether the run was interrupted or
  not: transformers restores torch's random state only after the first batches were fetched;
- a step whose numbers go bad can say which samples it saw.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mpt.planning.data_window import DataWindow, order_without

SAMPLE_IDS = "sample_ids"
"""The key under which a batch carries the numbers of its samples in the data set, until the Trainer takes them out."""
SAMPLE_TOKENS = "sample_tokens"
"""The key under which a batch carries how many tokens each of its samples has: what is no padding."""


class Place(NamedTuple):
    """Where a sample stands in the data order, and its number in the data set; all count from 0."""

    epoch: int
    position: int
    sample: int


class DataOrder(Sampler[Place]):
    """The order of an epoch by another sampler, without the excluded windows."""

    def __init__(self, sampler: Sampler[int], seed: int, windows: Sequence[DataWindow]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.windows = windows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch (from 0) is asked for next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Place]:
        epoch = self.epoch
        order = order_without(self.windows, epoch, self._order_of) if self.windows else self._order_of(epoch)
        return (Place(epoch, position, sample) for position, sample in enumerate(order))

    def _order_of(self, epoch: int) -> list[int]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        with keyed_randomness(self.seed, epoch):  # some samplers draw from torch's own generator
            return list(self.sampler)


class Placed(Dataset[Any]):
    """A data set whose samples come with their places, where they are asked for by place."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Place | int) -> Any:
        return (place, self.samples[place.sample]) if isinstance(place, Place) else self.samples[place]

    def __getitems__(self, places: Sequence[Place | int]) -> list[Any]:
        if not (places and isinstance(places[0], Place)):
            return [self.samples[place] for place in places]
        numbers = [place.sample for place in places if isinstance(place, Place)]
        has_own = hasattr(self.samples, "__getitems__")  # a table reads rows together in less time
        samples = self.samples.__getitems__(numbers) if has_own else [self.samples[number] for number in numbers]
        return list(zip(places, samples, strict=True))


class PlacedCollator:
    """Collate samples with the random numbers of their place; samples without a place are collated as they are.

    A collator that says `draws_random_numbers = False` is spared the half a millisecond that other generators take.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]], seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self._draws = getattr(collator, "draws_random_numbers", True)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if not isinstance(samples[0], tuple):
            return {**self.collator(samples), **count_tokens(samples)}
        places, plain = zip(*samples, strict=True)
        key = (self.seed, places[0].epoch, places[0].position)
        with keyed_randomness(*key) if self._draws else nullcontext():
            batch = self.collator(plain)
        return {**batch, SAMPLE_IDS: torch.tensor([place.sample for place in places]), **count_tokens(plain)}


def count_tokens(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Count the tokens of each sample, under their key."""
    return {SAMPLE_TOKENS: torch.tensor([len(sample["input_ids"]) for sample in samples])}


def keep_order(loader: DataLoader[Any], seed: int, windows: Sequence[DataWindow]) -> DataOrder | None:
    """Let a prepared loader follow a DataOrder; None where it has no sampler of single samples, and keeps its own."""
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # accelerate's share of a rank stands around torch's own
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, Sampler):
        return None
    order = DataOrder(sampler, seed, windows)
    batches.sampler = order
    return order


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Draw from generators that follow from `key` alone, and leave the process's own as they were. CPU only."""
    words = np.random.SeedSequence(key).generate_state(2)
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.default_generator.manual_seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])

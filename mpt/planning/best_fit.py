"""Best-fit decreasing bin packing of documents, known by their lengths alone. Pure.

Ding et al. 2024 ("Fewer Truncations Improve Language Modeling", section 3): the longest document first, each into the
fullest bin that still has room for it. Documents of one length can't be told apart here, so whole stretches are placed
at once: a million documents come to some ten thousand placements. `mpt.training.packing` carries them out.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Placement(NamedTuple):
    """Put `per_bin` documents of `size` tokens into each of `bins` bins with `space` tokens left; None: new bins."""

    size: int
    space: int | None
    per_bin: int
    bins: int


def placements(counts: Mapping[int, int], capacity: int) -> Iterator[Placement]:
    """Place every document: `counts` has how many there are of each length, at most `capacity`.

    >>> list(placements({3: 1, 2: 2}, 5))
    [Placement(size=3, space=None, per_bin=1, bins=1), Placement(size=2, space=2, per_bin=1, bins=1), \
Placement(size=2, space=None, per_bin=1, bins=1)]
    """
    left: dict[int, int] = {}  # tokens left -> bins
    spaces = 0  # its keys as a bit set: the tightest fit is the lowest bit from `size` on
    for size in sorted(counts, reverse=True):
        waiting = counts[size]
        while waiting:
            fitting = spaces >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else None
            room = capacity if space is None else space
            per_bin = min(room // size, waiting)
            bins = waiting // per_bin if space is None else min(left[space], waiting // per_bin)
            yield Placement(size, space, per_bin, bins)
            waiting -= per_bin * bins
            if space is not None:
                left[space] -= bins
                spaces ^= (not left[space]) << space
            rest = room - per_bin * size
            if rest:
                left[rest] = left.get(rest, 0) + bins
                spaces |= 1 << rest


def pieces(counts: Mapping[int, int], capacity: int) -> dict[int, int]:
    """Cut documents longer than `capacity` into pieces; one token alone has nothing to predict and is left out.

    >>> pieces({25: 2, 7: 1, 21: 1}, 10)
    {10: 6, 5: 2, 7: 1}
    """
    cut: dict[int, int] = {}
    for length, count in counts.items():
        for size, number in ((capacity, length // capacity), (length % capacity, 1)):
            if size > 1 and number:
                cut[size] = cut.get(size, 0) + number * count
    return cut


def count_bins(counts: Mapping[int, int], capacity: int) -> int:
    """Count the bins that the documents take."""
    return sum(placed.bins for placed in placements(pieces(counts, capacity), capacity) if placed.space is None)

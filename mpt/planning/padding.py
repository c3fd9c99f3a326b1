"""How many of a batch's positions are padding, by the lengths of the documents and the way batches are made. Pure.

The numbers are expectations over the order of the data, so that they can be told before a batch is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpt.planning.best_fit import count_bins, pieces
from mpt.terms import Packing

# transformers 5.23, LengthGroupedSampler: batches are cut from stretches of 50 batches, sorted by length.
GROUPED_BATCHES = 50


@dataclass(frozen=True, slots=True)
class PaddingShares:
    """The share of positions that are padding, 0 to 1, for each way to make batches of these documents."""

    none: float
    """A document a row, in random order."""
    grouped: float
    """A document a row, `training.train_sampling_strategy: group_by_length`."""
    best_fit: float
    """`data.packing: best_fit`."""

    def to_json(self) -> dict[str, float]:
        """Give the shares, rounded to a tenth of a percent."""
        shares = {"none": self.none, "grouped": self.grouped, "best_fit": self.best_fit}
        return {way: round(share, 3) for way, share in shares.items()}


def describe(
    shares: PaddingShares, packing: str, *, is_grouped: bool, padding_free: bool, can_pack: bool = True
) -> str:
    """Say what share of the positions is padding, and what another way would leave.

    >>> describe(PaddingShares(0.31, 0.04, 0.02), "none", is_grouped=False, padding_free=False)
    'padding is 31 % of the positions; packing: best_fit would leave 2 %, train_sampling_strategy: group_by_length 4 %'
    """
    none, grouped, best_fit = (
        f"{share:.0%}".replace("%", " %") for share in (shares.none, shares.grouped, shares.best_fit)
    )
    if padding_free:
        return f"no padding: documents lie side by side; in rows it would be {none} of the positions"
    if packing == Packing.BEST_FIT:
        return (
            f"padding is {best_fit} of the positions; a document a row would have {none}, grouped by length {grouped}"
        )
    better = f"packing: best_fit would leave {best_fit}"
    told, others = f"padding is {grouped if is_grouped else none} of the positions", [better] * can_pack
    if not is_grouped:
        others.append(f"train_sampling_strategy: group_by_length{'' if can_pack else ' would leave'} {grouped}")
    return "; ".join([told, ", ".join(others)]) if others else told


def padding_shares(
    counts: Mapping[int, int], *, sequence_length: int, micro_batch_size: int, multiple: int = 1
) -> PaddingShares:
    """Work out the shares; `counts` has how many documents there are of each length in tokens.

    >>> padding_shares({10: 50, 30: 50}, sequence_length=40, micro_batch_size=2).to_json()
    {'none': 0.2, 'grouped': 0.0, 'best_fit': 0.0}
    >>> padding_shares({30: 23, 5: 30, 7: 4}, sequence_length=64, micro_batch_size=1).to_json()
    {'none': 0.0, 'grouped': 0.0, 'best_fit': 0.096}
    """
    rows: dict[int, int] = {}
    for length, count in counts.items():
        cut = min(length, sequence_length)
        if cut > 1:
            rows[cut] = rows.get(cut, 0) + count
    total = sum(rows.values())
    if not total:
        return PaddingShares(0.0, 0.0, 0.0)

    def padded(length: int) -> int:
        return min(-(-length // multiple) * multiple, sequence_length)

    mean = sum(length * count for length, count in rows.items()) / total
    longest_first = [(padded(length), rows[length] / total) for length in sorted(rows, reverse=True)]
    groups = max(1, min(GROUPED_BATCHES, total // micro_batch_size))
    cut_up = pieces(counts, sequence_length)
    tokens = sum(length * count for length, count in cut_up.items())
    # Rounded, for what is a little less than nothing would be told as -0 %.
    none = max(0.0, round(1 - mean / _expected_longest(longest_first, min(micro_batch_size, total)), 12))
    return PaddingShares(
        none=none,
        grouped=min(none, 1 - mean / _mean_of_tops(longest_first, groups)),
        best_fit=1 - tokens / (count_bins(counts, sequence_length) * sequence_length),
    )


def _expected_longest(longest_first: Sequence[tuple[int, float]], draws: int) -> float:
    """Expect the longest of `draws` documents: each length times the chance that it is the longest."""
    expected, below = 0.0, 1.0
    for length, share in longest_first:
        upto, below = below, max(0.0, below - share)
        expected += length * (upto**draws - below**draws)
    return expected


def _mean_of_tops(longest_first: Sequence[tuple[int, float]], groups: int) -> float:
    """Average the longest of each group, where sorted documents are cut into equal groups."""
    tops, upto, place = [], 0.0, 0
    for length, share in longest_first:
        upto += share
        while place < groups and place / groups < upto - 1e-12:
            tops.append(length)
            place += 1
    return sum(tops) / len(tops)

"""Batch arithmetic: global = micro x accumulation x world, always."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.errors import MptError
from mpt.planning.batching import AskedBatch, Batch, choose_batch, possible_micro_batches
from mpt.planning.decision import Origin


def sizes(batch: Batch) -> tuple[int, int, int]:
    return batch.micro.value, batch.accumulation.value, batch.global_size.value


@pytest.mark.parametrize(
    ("asked", "world", "largest_that_fits", "expected"),
    [
        (AskedBatch(), 1, 8, (8, 1, 8)),
        (AskedBatch(), 1, 7, (4, 1, 4)),
        (AskedBatch(), 4, 1000, (8, 1, 32)),
        (AskedBatch(accumulation=4), 2, 2, (2, 4, 16)),
        (AskedBatch(micro=3), 2, 3, (3, 1, 6)),
        (AskedBatch(micro=3, accumulation=5), 2, 3, (3, 5, 30)),
        (AskedBatch(global_size=64), 1, 64, (64, 1, 64)),
        (AskedBatch(global_size=64), 1, 63, (32, 2, 64)),
        (AskedBatch(global_size=1024), 1, 1000, (64, 16, 1024)),
        (AskedBatch(global_size=48), 4, 5, (4, 3, 48)),
        (AskedBatch(global_size=48, micro=2), 4, 100, (2, 6, 48)),
        (AskedBatch(global_size=48, accumulation=3), 4, 100, (4, 3, 48)),
        (AskedBatch(global_size=48, micro=2, accumulation=6), 4, 100, (2, 6, 48)),
        (AskedBatch(global_size=16), 16, 100, (1, 1, 16)),
    ],
)
def test_the_largest_micro_batch_that_divides_and_fits_is_taken(
    asked: AskedBatch, world: int, largest_that_fits: int, expected: tuple[int, int, int]
) -> None:
    assert sizes(choose_batch(asked, world, lambda micro: micro <= largest_that_fits)) == expected


@pytest.mark.parametrize(
    ("asked", "world", "nearest"),
    [
        (AskedBatch(global_size=30), 4, "28 or 32"),
        (AskedBatch(global_size=3), 8, "8"),
        (AskedBatch(global_size=30, micro=4), 2, "24 or 32"),
        (AskedBatch(global_size=30, accumulation=4), 2, "24 or 32"),
        (AskedBatch(global_size=64, micro=4, accumulation=4), 2, "32"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(asked: AskedBatch, world: int, nearest: str) -> None:
    with pytest.raises(MptError) as raised:
        choose_batch(asked, world, lambda micro: True)
    assert f"Set global_batch_size to {nearest}" in raised.value.remedy
    assert "not a multiple" in raised.value.problem


def test_where_nothing_fits_the_smallest_size_is_taken_and_says_so() -> None:
    batch = choose_batch(AskedBatch(global_size=12), 2, lambda micro: False)
    assert sizes(batch) == (1, 6, 12)
    assert "does not fit" in batch.micro.reason


def test_each_size_says_who_decided_it() -> None:
    batch = choose_batch(AskedBatch(global_size=12), 2, lambda micro: micro <= 3)
    assert (batch.micro.origin, batch.accumulation.origin, batch.global_size.origin) == (
        Origin.AUTO,
        Origin.DERIVED,
        Origin.ASKED,
    )
    assert "6 does not fit" in batch.micro.reason
    assert batch.accumulation.reason == "12 / (3 micro x 2 processes)"


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 70))
def test_the_product_is_the_global_batch_whatever_is_asked(each: int, world: int, fits: int) -> None:
    batch = choose_batch(AskedBatch(global_size=each * world), world, lambda micro: micro <= fits)
    micro, accumulation, total = sizes(batch)
    assert micro * accumulation * world == total == each * world
    assert micro <= max(fits, 1)
    assert all(each % size == 0 for size in possible_micro_batches(AskedBatch(global_size=each * world), world))

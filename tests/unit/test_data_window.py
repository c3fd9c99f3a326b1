"""Which samples a run leaves out, and the order that is left."""

import random

import pytest

from mpt.planning.data_window import DataWindow, Epoch, order_without, position_of, window_around, windows_of

EPOCH = Epoch(samples=8000, steps=1000)


def order_of(epoch: int) -> list[int]:
    order = list(range(40))
    random.Random(epoch).shuffle(order)
    return order


@pytest.mark.parametrize(
    ("step", "epoch", "size", "found"),
    [
        (1, Epoch(80, 10), 8, (0, 0)),
        (10, Epoch(80, 10), 8, (0, 72)),
        (11, Epoch(80, 10), 8, (1, 0)),
        (5, Epoch(75, 10), 8, (0, 32)),
        (11, Epoch(75, 10), 8, (1, 0)),  # the last batch of an epoch may be a short one
        (3, Epoch(5, 1), 8, (2, 0)),
    ],
)
def test_a_step_has_a_place_in_the_data(step: int, epoch: Epoch, size: int, found: tuple[int, int]) -> None:
    assert position_of(step, epoch, size) == found


@pytest.mark.parametrize(
    ("step", "batches", "epoch", "found"),
    [
        (501, 200, EPOCH, DataWindow(0, 3960, 4120)),  # 2 % of an epoch are 20 batches, 5 of them before
        (501, 4, EPOCH, DataWindow(0, 3992, 4024)),
        (501, 1, EPOCH, DataWindow(0, 4000, 4008)),
        (1501, 4, EPOCH, DataWindow(1, 3992, 4024)),
        (1, 200, EPOCH, DataWindow(0, 0, 160)),
        (1000, 200, EPOCH, DataWindow(0, 7840, 8000)),  # it ends with its epoch
        (11, 200, Epoch(160, 20), DataWindow(0, 64, 128)),  # 8 batches at least
        (3, 200, Epoch(48, 6), DataWindow(0, 16, 40)),  # half an epoch at most
        (1, 200, Epoch(7, 1), None),
        (2, 200, Epoch(13, 2), DataWindow(0, 5, 13)),
    ],
)
def test_a_window_lies_around_the_event(step: int, batches: int, epoch: Epoch, found: DataWindow | None) -> None:
    assert window_around(step, epoch, 8, batches) == found
    if found is not None:
        assert found.holds(*position_of(step, epoch, 8))
        assert not found.holds(found.epoch + 1, found.first) and not found.holds(found.epoch, found.last)


def test_nothing_before_a_window_moves_and_its_samples_never_come_again() -> None:
    window = DataWindow(epoch=1, first=8, last=12)
    gone = set(order_of(1)[8:12])
    assert order_without([window], 0, order_of) == order_of(0)
    assert list(order_without([window], 1, order_of))[:8] == order_of(1)[:8]
    assert list(order_without([window], 1, order_of))[8:36] == order_of(1)[12:]
    for epoch in (1, 2, 3):
        order = order_without([window], epoch, order_of)
        assert len(order) == 40 and not gone & set(order)
        assert set(order) == set(range(40)) - gone


def test_a_second_window_counts_in_the_order_that_the_first_one_left() -> None:
    first, second = DataWindow(0, 4, 8), DataWindow(1, 10, 12)
    once = list(order_without([first], 1, order_of))
    gone = {*order_of(0)[4:8], *once[10:12]}
    assert list(order_without([first, second], 1, order_of))[:10] == once[:10]
    assert order_without([first, second], 0, order_of) == order_without([first], 0, order_of)
    for epoch in (1, 2):
        order = order_without([first, second], epoch, order_of)
        assert len(order) == 40 and set(order) == set(range(40)) - gone


def test_an_epoch_keeps_its_length_whatever_is_left_of_it() -> None:
    windows = [DataWindow(0, 0, 8), DataWindow(1, 0, 6)]
    order = order_without(windows, 1, lambda epoch: list(range(16)))
    assert len(order) == 16 and set(order) == {14, 15}


def test_windows_are_read_out_of_a_plans_repairs() -> None:
    values = {"code": "N2", "onset": 7, "until": 9, "epoch": 0, "first": 8, "last": 24}
    repairs = [{"kind": "retry", "values": {"code": "N2", "onset": 7}}, {"kind": "exclude_data", "values": values}]
    assert windows_of(repairs) == (DataWindow(0, 8, 24),)

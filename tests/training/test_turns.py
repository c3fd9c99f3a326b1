"""Processes that prepare the same thing: one does it, the others wait, with signs of life; and a disk that refuses."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt.training.cache import making
from mpt.training.progress import heard_by
from mpt.training.turns import rank_0_first


def started(work: Callable[[], None]) -> tuple[threading.Thread, threading.Event]:
    """Run `work` in a thread; the event is set at its second sign of life."""
    alive = threading.Event()
    beats: list[int] = []

    def listen() -> None:
        beats.append(1)
        if len(beats) > 1:
            alive.set()

    def run() -> None:
        with heard_by(listen):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, alive


def test_the_others_wait_for_rank_0(tmp_path: Path) -> None:
    order = []

    def other() -> None:
        with rank_0_first(tmp_path, "reading", rank=1, world_size=2):
            order.append(1)

    thread, alive = started(other)
    assert alive.wait(30)
    with rank_0_first(tmp_path, "reading", rank=0, world_size=2):
        order.append(0)
    thread.join(30)
    assert order == [0, 1]


def test_a_turn_that_failed_is_nobodys_turn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), rank_0_first(tmp_path, "reading", rank=0, world_size=2):
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())


def test_one_process_makes_a_folder_and_the_others_take_it(tmp_path: Path) -> None:
    final, seen = tmp_path / "final", []

    def other() -> None:
        with making(final) as staging:
            seen.append(staging)

    with making(final) as staging:
        assert staging is not None
        thread, alive = started(other)
        assert alive.wait(30)
        assert seen == []
        (staging / "content").touch()
    thread.join(30)
    assert seen == [None]
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "content"]


def test_a_folder_that_could_not_be_made_is_made_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with pytest.raises(ValueError, match="bad"), making(final) as staging:
        assert staging is not None
        (staging / "half").touch()
        raise ValueError("bad")
    assert not final.exists()
    with making(final) as staging:
        assert staging is not None
        assert (staging / "half").exists()
    assert final.exists()

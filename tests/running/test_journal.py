"""The journal keeps what was written, whatever is killed whenever."""

import json
import multiprocessing
from pathlib import Path

import pytest

from mpt.errors import StorageError
from mpt.running.journal import Journal, last_word, read_events


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 1).append("phase", phase="data")
    Journal(path, 2, rank=3).append("finished", step=8)
    first, second = read_events(path)
    assert (first["kind"], first["attempt"], first["rank"], first["phase"]) == ("phase", 1, 0, "data")
    assert (second["kind"], second["attempt"], second["rank"], second["step"]) == ("finished", 2, 3, 8)
    assert first["time"] <= second["time"]


def test_there_are_no_events_where_there_is_no_journal(tmp_path: Path) -> None:
    assert read_events(tmp_path / "journal.jsonl") == []


@pytest.mark.parametrize(("value", "written"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_non_finite_number_is_written_as_a_text(tmp_path: Path, value: float, written: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 1).append("non_finite", value=value, nested={"list": [value]})
    event = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert event["value"] == written
    assert event["nested"] == {"list": [written]}


def test_a_record_cut_anywhere_loses_that_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 1).append("phase", phase="data")
    whole = path.read_bytes()
    Journal(path, 1).append("changes_accepted", changes=[{"key": "a", "was": 1.5, "now": True}], text='a "quoted" é')
    both = path.read_bytes()
    for cut in range(len(whole), len(both) - 1):
        path.write_bytes(both[:cut])
        assert [event["kind"] for event in read_events(path)] == ["phase"], cut
        Journal(path, 2).append("finished", step=1)
        assert [event["kind"] for event in read_events(path)] == ["phase", "finished"], both[:cut]


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"[1, 2]", b'{"no": "event"}', b"\xff\xfe", b'{"a": 1} {"b": 2}'])
def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 1).append("phase", phase="data")
    with path.open("ab") as file:
        file.write(damage + b"\n")
    Journal(path, 1).append("finished", step=1)
    with pytest.raises(StorageError, match=r"journal.jsonl:2"):
        read_events(path)


def _append_many(path: Path, rank: int) -> None:
    for number in range(50):
        Journal(path, 1, rank).append("notice", text="x" * 500, number=number)


def test_processes_that_append_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    writers = [multiprocessing.get_context("fork").Process(target=_append_many, args=(path, rank)) for rank in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = read_events(path)
    assert len(events) == 200
    for rank in range(4):
        assert [event["number"] for event in events if event["rank"] == rank] == list(range(50))


def test_the_first_last_word_of_an_attempt_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 1).append("stopped", step=3, checkpoint="checkpoint-3")
    Journal(path, 2, rank=1).append("failed", problem="the cause", exit_code=1)
    Journal(path, 2, rank=0).append("failed", problem="connection reset by peer", exit_code=1)
    events = read_events(path)
    assert last_word(events, 2)["problem"] == "the cause"  # type: ignore[index]
    assert last_word(events, 1)["kind"] == "stopped"  # type: ignore[index]
    assert last_word(events, 3) is None


def test_a_journal_that_can_not_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be written"):
        Journal(tmp_path / "missing" / "journal.jsonl", 1).append("phase", phase="data")

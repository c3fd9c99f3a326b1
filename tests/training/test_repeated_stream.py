"""A stream without an end: in another order each time, no token lost within a pass, and gone on with where it was."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.recipe.schema import DataSection
from mpt.training import repeated_stream
from mpt.training.data import prepare_samples, read_documents
from mpt.training.repeated_stream import Bookmark, RepeatedStream, Resume, StreamedRows, nearest
from mpt.training.tokenizer import train_tokenizer

TEXTS = [f"Document {number}" + " goes on" * (number % 5) + "." for number in range(120)]
FILES = 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_stream, "BATCH_ROWS", 10)
    monkeypatch.setattr(repeated_stream, "BOOKMARK_EVERY", 1)


@pytest.fixture
def open_stream(tokenizer: Any, tmp_path: Path) -> Callable[[str], StreamedRows]:
    def open_it(packing: str) -> StreamedRows:
        for number in range(FILES):
            rows = (json.dumps({"text": text}) + "\n" for text in TEXTS[number::FILES])
            tmp_path.joinpath(f"{number}.jsonl").write_text("".join(rows))
        section = DataSection(source=str(tmp_path / "*.jsonl"), streaming=True, eval_fraction=0)
        documents = read_documents(section, seed=3)
        samples = prepare_samples(documents, tokenizer, sequence_length=16, packing=packing, source="rows")
        assert isinstance(samples.train, StreamedRows)
        return samples.train

    return open_it


def load(stream: RepeatedStream, count: int, loaders: int = 0) -> list[tuple[int, ...]]:
    rows = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=loaders)
    return [tuple(row["input_ids"]) for row in islice(rows, count)]


@pytest.mark.parametrize("loaders", [0, 2, 4])  # the last of four has no part of three files
def test_a_stream_that_ends_begins_again_in_another_order(
    loaders: int, open_stream: Callable[[str], StreamedRows]
) -> None:
    stream = open_stream("none")
    seen = load(RepeatedStream(stream), 360, loaders)
    passes = [seen[:120], seen[120:240], seen[240:]]
    if not loaders:
        expected = stream.convert({"text": [row["text"] for row in stream.rows]})["input_ids"]
        assert passes[0] == [tuple(row) for row in expected]
        assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_blocks_are_cut_across_batches_and_only_the_last_tokens_of_a_pass_are_left_out(
    open_stream: Callable[[str], StreamedRows],
) -> None:
    stream = open_stream("blocks")
    rows = stream.convert({"text": [row["text"] for row in stream.rows]})["input_ids"]
    joined = [token for row in rows for token in row]
    whole = len(joined) // 16
    blocks = load(RepeatedStream(stream), whole)
    assert [token for block in blocks for token in block] == joined[: whole * 16]


@pytest.mark.parametrize("packing", ["blocks", "none", "best_fit"])
@pytest.mark.parametrize("consumed", [1, 37, 64, 150, 301])
def test_a_stream_goes_on_from_a_bookmark_and_makes_little_of_what_came_before(
    consumed: int, packing: str, open_stream: Callable[[str], StreamedRows], tmp_path: Path
) -> None:
    stream = open_stream(packing)
    notes = tmp_path / "stream/notes"
    whole = load(RepeatedStream(stream, bookmarks=notes), 400)
    converted = 0

    def counted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal converted
        converted += len(next(iter(batch.values())))
        return stream.convert(batch)

    resumed = RepeatedStream(
        StreamedRows(stream.rows, counted, stream.length), bookmarks=notes, resume=Resume(consumed, 1)
    )
    found = load(resumed, consumed + 1)
    assert converted <= 30  # of all rows before; a batch has ten
    assert len(found) == consumed + 1
    assert found[consumed] == whole[consumed]
    assert load(resumed, 400)[consumed:] == whole[consumed:]
    stood_in = sum(set(sample) == {-1} for sample in found[:consumed])
    assert stood_in == nearest(notes.with_name("notes-0.jsonl"), consumed).samples


def test_loader_processes_go_on_each_at_its_own_place(
    open_stream: Callable[[str], StreamedRows], tmp_path: Path
) -> None:
    stream, notes = open_stream("blocks"), tmp_path / "notes"

    def batches(resume: Resume | None, count: int) -> list[list[list[int]]]:
        rows = RepeatedStream(stream, bookmarks=notes, resume=resume)
        loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=2, collate_fn=list)
        return [[sample["input_ids"] for sample in batch] for batch in islice(loader, count)]

    whole = batches(None, 40)
    assert batches(Resume(23, 4), 40)[23:] == whole[23:]
    assert batches(Resume(23, 4), 1)[0][0] == [-1] * 16


def test_the_nearest_bookmark_is_none_beyond_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    assert nearest(notes, 9) == Bookmark()
    notes.write_text("[0, 0, 0, []]\n[5, 0, 20, [7]]\n[9, 1, 0, []]\n[8, 0, 3")
    assert nearest(notes, 4) == Bookmark()
    assert nearest(notes, 8) == Bookmark(5, 0, 20, (7,))
    assert nearest(notes, 9) == Bookmark(9, 1, 0, ())


def test_a_stream_that_gives_no_sample_ends(open_stream: Callable[[str], StreamedRows]) -> None:
    rows = open_stream("none").rows
    assert list(RepeatedStream(StreamedRows(rows, lambda batch: {"input_ids": []}))) == []

"""What a change of the data is known by."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from mpt.recipe.schema import DataSection
from mpt.training.data import prepare_samples, read_documents
from mpt.training.fingerprint import PIECE, fingerprint, measure
from mpt.training.packing import PackedBlocks
from mpt.training.tokenizer import train_tokenizer

TEXTS = [f"Document {number}, the only one of its kind.\nIt has a second line." for number in range(12)]
FORMS: dict[str, dict[str, Any]] = {
    "packed": {},
    "in bins": {"packing": "best_fit"},
    "padded": {"packing": "none"},
    "streamed": {"streaming": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


def write(folder: Path, texts: list[str], name: str = "a.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    folder.joinpath(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / name)


def found(source: str | list[str], tokenizer: Any, *, packing: str = "blocks", **keys: Any) -> dict[str, Any]:
    keys = keys if "eval_source" in keys else {"eval_fraction": 0} | keys
    section = DataSection(source=source, sequence_length=16, **keys)
    documents = read_documents(section, seed=1)
    samples = prepare_samples(documents, tokenizer, sequence_length=16, packing=packing, source="")
    return fingerprint(section, documents, samples, tokenizer)


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "a letter": lambda texts: [texts[0].replace("only", "onlx"), *texts[1:]],
    "a document less": lambda texts: texts[:-1],
    "a document more": lambda texts: [*texts, "Once more."],
    "another order": lambda texts: texts[::-1],
}


@pytest.mark.fault(32)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_of_the_text_shows(
    change: Callable[[list[str]], list[str]], form: str, tokenizer: Any, tmp_path: Path
) -> None:
    before = found(write(tmp_path / "before", TEXTS), tokenizer, **FORMS[form])
    after = found(write(tmp_path / "after", change(TEXTS)), tokenizer, **FORMS[form])
    assert after["fingerprint"] != before["fingerprint"]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("form", FORMS)
def test_where_a_file_lies_and_when_it_was_written_is_no_change(form: str, tokenizer: Any, tmp_path: Path) -> None:
    before = found(write(tmp_path / "before", TEXTS), tokenizer, **FORMS[form])
    moved = write(tmp_path / "after", TEXTS, "other.jsonl")
    os.utime(moved, (0, 0))
    assert found(moved, tokenizer, **FORMS[form]) == before


@pytest.mark.fault(32)
@pytest.mark.parametrize("form", FORMS)
def test_another_tokenizer_shows(form: str, tokenizer: Any, tmp_path: Path) -> None:
    source, other = write(tmp_path / "data", TEXTS), train_tokenizer(TEXTS, 280)
    assert found(source, tokenizer, **FORMS[form]) != found(source, other, **FORMS[form])


def test_where_one_document_ends_and_the_next_begins_shows_in_padded_samples() -> None:
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    table = [datasets.Dataset.from_dict({"input_ids": part}) for part in (rows, [rows[0][:3], [4, *rows[1]]])]
    assert measure(table[0])["tokens"] == measure(table[1])["tokens"] == 7
    assert measure(table[0])["fingerprint"] != measure(table[1])["fingerprint"]


def test_how_a_table_is_cut_into_chunks_is_no_change() -> None:
    rows = [[number, number + 1, number + 2] for number in range(20)]
    whole = datasets.Dataset.from_dict({"input_ids": rows})
    parts = [datasets.Dataset.from_dict({"input_ids": part}) for part in (rows[:7], rows[7:8], rows[8:])]
    cut = datasets.concatenate_datasets(parts)
    assert cut.data.column("input_ids").num_chunks == 3
    assert measure(cut) == measure(whole)
    assert measure(PackedBlocks(cut, 8)) == measure(PackedBlocks(whole, 8))


@pytest.mark.fault(32)
def test_what_is_evaluated_on_is_told_apart_from_what_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "data", TEXTS)
    for form in FORMS.values():
        before, after = (
            found(source, tokenizer, eval_source=write(tmp_path / name, texts), **form)
            for name, texts in (("before", TEXTS[:5]), ("after", TEXTS[1:6]))
        )
        assert after["fingerprint"] == before["fingerprint"]
        assert after["eval_fingerprint"] != before["eval_fingerprint"]


@pytest.mark.parametrize(
    ("place", "is_seen"),
    [(0, True), (PIECE - 1, True), (PIECE, False), (2 * PIECE + 5, True), (4 * PIECE, True), (5 * PIECE - 1, True)],
)
def test_of_a_large_streamed_file_size_beginning_middle_and_end_are_seen(
    place: int, is_seen: bool, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (5 * PIECE))
    before = found(str(path), tokenizer, streaming=True)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"y")
    assert (found(str(path), tokenizer, streaming=True) != before) is is_seen
    with path.open("ab") as file:
        file.write(b"x")
    assert found(str(path), tokenizer, streaming=True) != before

"""Text from files to samples, and what is said of text that can't be used."""

import gzip
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.collation import PackedCollator, PaddedCollator
from mpt.training.corpus import read_corpus
from mpt.training.data import prepare_samples, read_documents
from mpt.training.packing import PackedBlocks
from mpt.training.repeated_stream import RepeatedStream
from mpt.training.tokenizer import train_tokenizer

TEXTS = ["The first document, of one line.", "The second:\n\ntwo paragraphs, naïve and 日本.", "NA"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_texts(folder: Path, kind: str) -> str | list[str]:
    """Write TEXTS in a format; give the source that names them."""
    if kind.endswith((".gz", ".zst")):
        plain = write_texts(folder, kind.rpartition(".")[0])
        packed = [pack(Path(name), kind) for name in ([plain] if isinstance(plain, str) else plain)]
        return packed if isinstance(plain, list) else packed[0]
    if kind in (".txt", ".md"):
        return [write(folder, f"{number}{kind}", text) for number, text in enumerate(TEXTS)]
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    if kind == ".jsonl":
        return write(folder, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if kind == ".json":
        return write(folder, "rows.json", json.dumps(rows))
    path = str(folder / f"rows{kind}")
    table = datasets.Dataset.from_list(rows)
    table.to_csv(path) if kind == ".csv" else table.to_parquet(path)
    return path


def pack(path: Path, kind: str) -> str:
    """Compress a file, which goes."""
    codec = "gzip" if kind.endswith(".gz") else "zstd"
    path.with_name(path.name + Path(kind).suffix).write_bytes(pa.compress(path.read_bytes(), codec, asbytes=True))
    path.unlink()
    return str(path.with_name(path.name + Path(kind).suffix))


def read(source: str | list[str], **keys: Any) -> list[str]:
    return list(read_corpus(DataSection(source=source, **keys), source, split="train")["text"])


@pytest.mark.parametrize(
    "kind", [".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".jsonl.zst", ".txt.zst"]
)
def test_every_format_gives_the_documents_as_they_were_written(kind: str, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "data", kind)
    before = sorted((tmp_path / "data").iterdir())
    assert read(source) == TEXTS
    assert sorted((tmp_path / "data").iterdir()) == before  # nothing is written among the user's files


def test_the_builtin_corpus_is_the_language_reference() -> None:
    documents = read("builtin:python-reference")
    assert len(documents) > 50
    assert any('The "while" statement' in text for text in documents)


def test_a_glob_reads_its_files_in_order_and_a_list_may_mix_formats(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        write(tmp_path, name, name)
    rows = write(tmp_path, "d.jsonl", '{"text": "from json"}\n')
    assert read(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert read([f"{tmp_path}/**/*.txt", rows]) == ["a.txt", "b.txt", "deep/c.txt", "from json"]


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "before")
    assert read(source) == ["before"]
    assert read(write(tmp_path, "a.txt", "after, and longer")) == ["after, and longer"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, ["a.txt does not exist"]),
        ("*.txt", None, ["no file matches"]),
        ("a.docx", "x", ["a.docx is of no known kind"]),
        ("a.txt", b"caf\xe9\n", ["a.txt:1: not UTF-8 (byte 0xe9 at offset 3)"]),
        ("a.jsonl", b'{"text": "good"}\n{"text": "caf\xe9"}\n', ["a.jsonl:2: not UTF-8"]),
        ("a.csv", b"text\ngood\ncaf\xe9\n", ["a.csv:3: not UTF-8"]),
        ("a.txt", "", ["empty"]),
        ("a.txt", "  \n\n", ["empty"]),
        ("a.jsonl", "", ["empty"]),
        ("a.csv", "text\n", ["empty"]),
        ("a.json", "[]", ["empty"]),
        ("a.jsonl", '{"text": "good"}\n{"text": "torn\n', ["a.jsonl:2: not JSON"]),
        ("a.jsonl", '{"text": "good"}\n["a list"]\n', ["a.jsonl:2: not a JSON object"]),
        ("a.jsonl", '{"text": "good"}\n{"text": null}\n', ["a.jsonl:2: text is null, not text"]),
        ("a.jsonl", '{"text": "good"}\n{"text": 7}\n', ["a.jsonl:2: text is a number, not text"]),
        ("a.jsonl", '{"text": 7}\n', ["a.jsonl:1: text is a number, not text"]),
        ("a.jsonl", '{"title": "x", "body": "y"}\n', ["no column text", "title, body"]),
        ("a.csv", "title,body\nx,y\n", ["no column text", "title, body"]),
        ("a.json", '[{"text": "a"},\n {"text": }]', ["a.json:2: not JSON"]),
        ("a.parquet", "no parquet", ["a.parquet"]),
        ("a.jsonl.gz", "no gzip", ["a.jsonl.gz can't be read: Not a gzipped file"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "good"}\n')[:-9], ["a.jsonl.gz can't be read: Compressed file ended"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "good"}\n{"text"'), ["a.jsonl.gz:2: not JSON"]),
        ("a.jsonl.zst", "no zstd", ["a.jsonl.zst can't be read"]),
        ("a.parquet.gz", "x", ["a.parquet.gz is of no known kind"]),
        ("a.jsonl", '{"text": "\\ud83d"}\n', ["a.jsonl:1: \\ud83d is half of a surrogate pair"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1: not JSON that can be read"]),
        ("a.csv", "text\ngood,more\n", ["a.csv:2: 2 cells, more cells than the header has (1)"]),
        ("a.jsonl", '{"text": "a\u2028b"}\n{"text"}\n', ["a.jsonl:2: not JSON"]),
    ],
)
def test_text_that_cannot_be_used_is_refused_with_its_place(
    name: str, content: str | bytes | None, words: list[str], tmp_path: Path
) -> None:
    source = str(tmp_path / name) if content is None else write(tmp_path, name, content)
    with pytest.raises(MptError) as caught:
        read(source)
    assert all(word in caught.value.problem for word in words), caught.value.problem
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_directory_and_an_unknown_builtin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MptError, match="is a directory"):
        read(str(tmp_path))
    with pytest.raises(MptError, match="there is no builtin:shakespeare"):
        read("builtin:shakespeare")


def test_a_hub_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(MptError, match=r"hub data set nobody/nothing can't be loaded"):
        read("hub:nobody/nothing")


def test_documents_are_held_out_whole_and_the_same_ones_for_a_seed() -> None:
    section = DataSection(source="builtin:python-reference", eval_fraction=0.2)
    first, again, other = (read_documents(section, seed=seed) for seed in (1, 1, 2))
    train, held_out = set(first.train["text"]), set(first.held_out["text"])
    assert not train & held_out
    assert len(held_out) == round(0.2 * (len(train) + len(held_out)))
    assert list(again.held_out["text"]) == list(first.held_out["text"]) != list(other.held_out["text"])


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    documents = read_documents(DataSection(source=write(tmp_path, "a.txt", "".join(lines)), eval_fraction=0.1), seed=1)
    (kept,), (tail,) = documents.train["text"], documents.held_out["text"]
    assert kept + tail == "".join(lines)
    assert tail.startswith("line 9")
    assert "held out" in documents.notices[0]


def test_nothing_is_held_out_where_the_fraction_is_0_and_another_source_is_taken_where_given(tmp_path: Path) -> None:
    source, other = write(tmp_path, "a.txt", "train"), write(tmp_path, "b.txt", "evaluate")
    assert read_documents(DataSection(source=source, eval_fraction=0), seed=1).held_out is None
    assert list(read_documents(DataSection(source=source, eval_source=other), seed=1).held_out["text"]) == ["evaluate"]


def test_packing_joins_documents_with_the_end_of_text_and_drops_the_last_remainder(
    tokenizer: Any, tmp_path: Path
) -> None:
    end = tokenizer.eos_token_id
    stream = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], end]]
    source = write_texts(tmp_path, ".jsonl")
    documents = read_documents(DataSection(source=source, eval_fraction=0), seed=1)
    samples = prepare_samples(documents, tokenizer, sequence_length=9, packing="blocks", source="rows")
    assert len(samples.train) == len(stream) // 9
    joined = [token for index in range(len(samples.train)) for token in samples.train[index]["input_ids"].tolist()]
    assert joined == stream[: len(joined)]
    assert f"the last {len(stream) % 9} of {len(stream)} are left out" in samples.notices[-1]
    batch = PackedCollator()([samples.train[0], samples.train[1]])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [stream[:9], stream[9:18]]


def test_blocks_are_cut_across_the_chunks_of_a_table() -> None:
    rows = [list(range(start, start + 5)) for start in range(0, 40, 5)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    parts = [datasets.Dataset.from_dict({"input_ids": [row]}, features=features) for row in rows]
    blocks = PackedBlocks(datasets.concatenate_datasets(parts), 12)
    assert [blocks[index]["input_ids"].tolist() for index in range(len(blocks))] == [
        list(range(start, start + 12)) for start in (0, 12, 24)
    ]
    with pytest.raises(IndexError):
        blocks[3]


def test_without_packing_a_document_is_a_sample_padded_and_masked(tokenizer: Any, tmp_path: Path) -> None:
    documents = read_documents(DataSection(source=write_texts(tmp_path, ".csv"), eval_fraction=0), seed=1)
    samples = prepare_samples(documents, tokenizer, sequence_length=12, packing="none", source="rows")
    assert len(samples.train) == 3
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    over = sum(length > 12 for length in lengths)
    assert over and samples.notices == (f"{over} of 3 documents are longer than 12 tokens and were truncated",)
    batch = PaddedCollator(tokenizer.pad_token_id)([samples.train[index] for index in range(3)])
    assert batch["input_ids"].shape == (3, 12)
    assert batch["attention_mask"].sum(1).tolist() == [min(length, 12) for length in lengths]
    # "NA" and its end of text, which is the pad too: the one is learnt, the others are not.
    learnt = [*tokenizer("NA")["input_ids"], tokenizer.eos_token_id]
    assert batch["labels"][2].tolist() == learnt + [-100] * (12 - lengths[2])


def test_text_shorter_than_a_block_is_refused_and_says_what_to_do(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "short\nand shorter\n")

    def refusal(**keys: Any) -> MptError:
        documents = read_documents(DataSection(source=source, **keys), seed=1)
        with pytest.raises(MptError) as caught:
            prepare_samples(documents, tokenizer, sequence_length=64, packing="blocks", source="a.txt")
        return caught.value

    error = refusal(eval_fraction=0)
    assert re.fullmatch(r"a.txt has \d+ tokens, less than one block of data.sequence_length 64", error.problem)
    assert "packing: best_fit" in error.remedy
    # An evaluation of other data than a recipe's: nobody trains on them.
    assert refusal(eval_source=source).problem == error.problem
    assert " tokens left to train on, less than one block" in refusal(eval_fraction=0.5).problem


def test_a_stream_that_is_too_short_to_hold_anything_out_is_refused(tmp_path: Path) -> None:
    section = DataSection(source=write(tmp_path, "few.jsonl", json.dumps({"text": "one"}) + "\n"), streaming=True)
    with pytest.raises(MptError, match="no more to train on") as caught:
        read_documents(section, seed=1)
    assert "eval_fraction" in caught.value.remedy


def test_streamed_text_gives_the_same_blocks_each_time(tokenizer: Any, tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"text": f"Document {number}, the only one of its kind."}) + "\n" for number in range(400)
    )
    section = DataSection(source=write(tmp_path, "rows.jsonl", lines), streaming=True)

    def blocks() -> tuple[list[Any], list[Any]]:
        documents = read_documents(section, seed=3)
        samples = prepare_samples(documents, tokenizer, sequence_length=16, packing="blocks", source="rows")
        train = islice(RepeatedStream(samples.train), 200)
        return [row["input_ids"] for row in train], [row["input_ids"] for row in samples.held_out]

    train, held_out = blocks()
    assert {len(block) for block in train + held_out} == {16}
    assert blocks() == (train, held_out)
    assert "Document 0," in tokenizer.decode(held_out[0])
    assert "Document 0," not in tokenizer.decode([token for block in train for token in block])


def test_the_same_text_trains_the_same_tokenizer_and_bytes_it_never_saw_survive() -> None:
    first, second = train_tokenizer(TEXTS, 300), train_tokenizer(iter(TEXTS), 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) <= 300
    assert first.decode(first("Ünseen 🦆\t")["input_ids"]) == "Ünseen 🦆\t"
    assert first.eos_token == first.pad_token == "<|endoftext|>"

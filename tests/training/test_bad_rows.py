"""Rows that can't be used: found with file and line, left out where that is allowed, never too large for the memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from mpt.errors import MptError, StorageError
from mpt.recipe.schema import DataSection
from mpt.training.bad_rows import BadRows, told_to
from mpt.training.corpus import explain_rows, read_corpus, read_rows, stream_texts
from mpt.training.data import read_documents
from mpt.training.progress import heard_by
from mpt.training.row_files import DOCUMENT_BYTES, BadRow, read_file
from tests.training.tiny_runs import Run

GOOD = '{"text": "good"}\n'
BAD = ['{"text": "torn\n', '["a list"]\n', '{"text": null}\n', '{"text": 7}\n', '{"title": "x"}\n', "caf\xe9\n"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    return str(path)


def read(source: str | list[str], reader: Callable[..., Any] = read_corpus, **keys: Any) -> tuple[Any, BadRows]:
    section = DataSection(source=source, **keys)
    bad = BadRows(section.max_bad_rows)
    return reader(section, source, split="train", bad=bad), bad


def refusal(source: str | list[str], reader: Callable[..., Any] = read_corpus, **keys: Any) -> str:
    with pytest.raises(MptError) as caught:
        read(source, reader, **keys)
    assert caught.value.remedy
    return caught.value.problem


@pytest.mark.parametrize("limit", [6, 100, 0.5])
def test_bad_rows_within_the_limit_are_left_out_and_named(limit: float, tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", "".join(GOOD + bad for bad in BAD))
    for _ in range(2):  # from the file, and from the cache
        table, bad = read(source, max_bad_rows=limit)
        assert table["text"][:] == ["good"] * 6
        (notice,) = bad.notices(len(table))
        assert notice.startswith("6 of 12 rows are left out: ")
        assert f"{source}:2: not JSON" in notice
        assert f"{source}:6: text is null, not text" in notice
        assert notice.endswith("; and 1 more")


@pytest.mark.parametrize(
    ("limit", "words"), [(5, "more than 5 rows can't be used"), (0.49, "6 of 12 rows can't be used, more than a share")]
)
def test_more_bad_rows_than_the_limit_end_the_reading_with_the_first_few(
    limit: float, words: str, tmp_path: Path
) -> None:
    source = write(tmp_path, "a.jsonl", "".join(GOOD + bad for bad in BAD))
    problem = refusal(source, max_bad_rows=limit)
    assert words in problem
    assert f"\n    {source}:4: not a JSON object but a list" in problem
    read(source, max_bad_rows=6)
    assert words in refusal(source, max_bad_rows=limit)  # known from the cache now


def test_a_row_that_was_left_out_once_is_an_error_where_none_may_be(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", GOOD + BAD[0])
    read(source, max_bad_rows=1)
    assert refusal(source) == f"{source}:2: not JSON: Unterminated string starting at (column 10)"
    moved = Path(source).rename(tmp_path / "b.jsonl")
    assert refusal(str(moved)).startswith(f"{moved}:2: ")


def test_who_reads_the_documents_hears_of_the_rows_that_were_left_out(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", GOOD * 30 + BAD[0])
    other = write(tmp_path, "b.jsonl", GOOD + BAD[2] + GOOD)
    section = DataSection(source=source, eval_source=other, max_bad_rows=1)
    notices = read_documents(section, seed=1).notices
    assert notices[0].startswith(f"1 of 31 rows are left out: {source}:31: not JSON")
    assert notices[1].startswith(f"1 of 3 rows are left out: {other}:2: text is null")


def test_a_stream_tells_of_what_it_leaves_out_more_and_more_seldom(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", GOOD + BAD[0] * 150 + GOOD)
    told: list[str] = []
    with told_to(told.append):
        assert len(list(stream_texts([str(tmp_path / "a.jsonl")], "text", 1 << 20, 150))) == 2
    problem = "not JSON: Unterminated string starting at (column 10)"
    assert told == [
        f"streaming leaves out {tmp_path}/a.jsonl:2: {problem}; it says so again at the 10th such row",
        *(
            f"streaming has left out {count} rows so far, each time that it read them; the last: "
            f"{tmp_path}/a.jsonl:{count + 1}: {problem}"
            for count in (10, 100)
        ),
    ]


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_run_is_told_of_the_rows_that_its_stream_leaves_out(
    loaders: int, new_run: Callable[..., Run], tmp_path: Path
) -> None:
    texts = [json.dumps({"text": topics[name][:200]}) + "\n" for name in sorted(topics)[:40]]
    source = write(tmp_path, "a.jsonl", ("".join(texts) + BAD[0]).encode())
    data = {"source": source, "streaming": True, "eval_fraction": 0, "max_bad_rows": 1}
    run = new_run(data=data, training={"max_steps": 2, "dataloader_num_workers": loaders})
    assert run.train() == 0, run.log()
    assert any(f"streaming leaves out {source}:41: not JSON" in text for text in run.texts("notice", "text"))


def test_the_limit_counts_over_all_files(tmp_path: Path) -> None:
    sources = [write(tmp_path, f"{number}.jsonl", GOOD + BAD[0]) for number in range(3)]
    assert "more than 2 rows" in refusal(sources, max_bad_rows=2)
    assert read(sources, max_bad_rows=3)[1].count == 3


@pytest.mark.parametrize(
    ("name", "bad_row", "problem"),
    [
        ("a.csv", b'a,b,c,d\n', "4 cells, more cells than the header has (2)"),
        ("a.csv", b'caf\xe9,x\n', "not UTF-8 (byte 0xe9 at offset 17)"),
        ("a.csv", b"x" * 5000 + b",y\n", "longer than 2000 bytes"),
        ("a.csv", b'"caf\xe9\nand,more",x\n', "not UTF-8 (byte 0xe9 at offset 18)"),
        ("a.csv", b'"a"b,x\n', "not CSV: "),
        ("a.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n', "longer than 2000 bytes"),
        ("a.jsonl", b'{"text": NaN}\n', "not JSON that can be read: NaN is no JSON number"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"\ud800 is half of a surrogate pair"),
    ],
)  # fmt: skip
def test_reading_goes_on_after_a_bad_row(name: str, bad_row: bytes, problem: str, tmp_path: Path) -> None:
    before, after = (b"text,id\none,1\n", b"two,2\n") if name == "a.csv" else (GOOD.encode(), GOOD.encode())
    source = write(tmp_path, name, before + bad_row + after)
    table, bad = read(source, max_bad_rows=1, max_row_bytes=2000)
    assert len(table) == 2
    (example,) = bad.examples
    assert example.startswith(f"{source}:{3 if name == 'a.csv' else 2}: {problem}")


def test_a_quote_that_is_never_closed_takes_no_rows_along_in_silence(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", 'text,id\none,1\n"two,2\nthree,3\n')
    assert refusal(source).startswith(f"{source}:3: not CSV: ")


def test_a_row_of_a_csv_is_named_by_the_line_that_it_begins_with(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", 'text\n\n"one\nand\nmore"\ntwo,x\n')
    places = [place for place, _ in read_file(Path(source), max_row_bytes=2000)]
    assert places == [f"{source}:3", f"{source}:6"]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "two columns are named text" in refusal(write(tmp_path, "a.csv", "text,text\na,b\n"))
    assert read(write(tmp_path, "b.csv", "text,,\na,,\n"))[0]["text"][:] == ["a"]


@pytest.mark.parametrize(("coding", "named"), [("utf-16", "utf-16"), ("latin-1", "latin1")])
def test_the_remedy_converts_from_what_the_file_looks_like(coding: str, named: str, tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "caf\xe9".encode(coding))
    with pytest.raises(MptError) as caught:
        read(source)
    assert f"iconv -f {named} -t utf-8 old.txt" in caught.value.remedy


@pytest.mark.parametrize("content", [b"no zstd", pa.compress(GOOD.encode() * 9, "zstd", asbytes=True)[:-3]])
def test_a_torn_or_foreign_zst_is_said_to_be_that(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(MptError, match=r"a.jsonl.zst can't be read") as caught:
        read(write(tmp_path, "a.jsonl.zst", content))
    assert caught.value.remedy.startswith("The file is torn or of another kind")


def test_a_huge_row_never_stands_in_memory(tmp_path: Path) -> None:
    """Measured in a process of its own: its highest resident memory is that of a run without the row."""
    program = """if True:
        import resource, sys
        from pathlib import Path
        from mpt.training.row_files import BadRow, read_file
        rows = [row for _, row in read_file(Path(sys.argv[1]), max_row_bytes=1 << 20)]
        assert [isinstance(row, BadRow) for row in rows] == [False, True, False][: len(rows)]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_text(GOOD)
    with large.open("w") as file:
        file.write(GOOD + '{"text": "')
        for _ in range(200):
            file.write("x" * (1 << 20))
        file.write('"}\n' + GOOD)

    def peak_kib(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak_kib(str(large), "large") - peak_kib(str(small)) < 20 << 10


def test_a_long_text_file_is_read_as_documents_cut_at_the_ends_of_lines(tmp_path: Path) -> None:
    text = "".join(f"Line {number}, naïve and 日本.\n" for number in range(100_000))
    source = tmp_path / "long.txt"
    source.write_text(text, encoding="utf-8")
    documents = read(str(source))[0]["text"][:]
    assert "".join(documents) == text
    assert len(documents) == len(text.encode()) // DOCUMENT_BYTES + 1
    assert all(document.endswith("\n") for document in documents)
    one_line = "日本" * DOCUMENT_BYTES
    source.write_text(one_line, encoding="utf-8")
    documents = read(str(source))[0]["text"][:]
    assert "".join(documents) == one_line
    assert len(documents) > 1


def test_rows_keep_all_their_columns_and_what_is_nested_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hi"}], "score": 1},
        {"messages": [{"role": "tool", "arguments": {"x": [1, None]}}], "score": 0.5, "note": "later"},
        {"messages": None, "note": None, "big": 2**63 - 1},
    ]
    source = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        table, _bad = read(source, read_rows)
        assert table.column_names == ["messages", "score", "note", "big"]
        assert table["messages"][:] == [row["messages"] for row in rows]
        assert table["score"][:] == [1.0, 0.5, None]
        assert table["note"][:] == [None, "later", None]
        assert table["big"][2] == 2**63 - 1


def test_rows_of_later_batches_may_widen_the_schema(tmp_path: Path) -> None:
    rows = [{"a": number} for number in range(3000)] + [{"a": 0.5, "b": "new"}]
    source = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table, _ = read(source, read_rows)
    assert table["a"][:] == [row["a"] for row in rows]
    assert table["b"][:] == [None] * 3000 + ["new"]


def test_a_row_of_another_schema_is_one_message_with_both_places(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"messages": [], "id": 1}\n{"id": 2}\n{"messages": "Hi"}\n{"id": 3}\n')
    assert refusal(source, read_rows) == (
        f"{source}:3: column messages is text here and a list or object in {source}:1"
    )
    table, bad = read(source, read_rows, max_bad_rows=1)
    assert table["id"][:] == [1, 2, 3]
    assert bad.count == 1


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_rows_and_a_check_finds_the_wrong_one(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "answer": f"a{number}"} for number in range(4)]
    path, whole = str(tmp_path / f"a{kind}"), datasets.Dataset.from_list(rows)
    if kind == ".parquet":
        whole.to_parquet(path)
    elif kind == ".csv":
        whole.to_csv(path)
    else:
        lines = [json.dumps(row) for row in rows]
        write(tmp_path, f"a{kind}", f"[{', '.join(lines)}]" if kind == ".json" else "\n\n".join(lines))
    assert read(path, read_rows)[0].to_list() == rows

    def check(row: dict[str, Any]) -> BadRow | None:
        return BadRow("the answer is a2", "Write another.") if row["answer"] == "a2" else None

    with pytest.raises(MptError) as caught:
        explain_rows(DataSection(source=path), path, check)
    place = {".jsonl": ":5", ".json": ": row 3", ".csv": ":4", ".parquet": ": row 3"}[kind]
    assert caught.value.problem == f"{path}{place}: the answer is a2"


def test_an_integer_beyond_64_bits_is_refused_alone_and_nested(tmp_path: Path) -> None:
    for value in (str(2**63), f'[{{"a": {2**64}}}]'):
        source = write(tmp_path, "a.jsonl", f'{{"x": {value}}}\n')
        assert refusal(source, read_rows) == f"{source}:1: column x holds an integer beyond 64 bits"


@pytest.mark.parametrize("limit", [1.5, -1])
def test_a_limit_is_a_whole_number_or_a_share(limit: float) -> None:
    with pytest.raises(ValueError, match="max_bad_rows"):
        DataSection(source="a.jsonl", max_bad_rows=limit)


def test_files_without_a_row_are_refused(tmp_path: Path) -> None:
    assert "has no rows" in refusal(write(tmp_path, "a.jsonl", "\n\n"), read_rows)
    both = [write(tmp_path, "a.jsonl", "\n"), write(tmp_path, "b.jsonl", GOOD)]
    assert len(read(both, read_rows)[0]) == 1


def test_files_whose_columns_contradict_each_other_are_refused(tmp_path: Path) -> None:
    both = [write(tmp_path, "a.jsonl", '{"a": 1}\n'), write(tmp_path, "b.csv", "a\nx\n")]
    assert "have different columns" in refusal(both, read_rows)


@pytest.mark.parametrize("reader", [read_corpus, read_rows])
def test_a_file_that_changes_while_it_is_read_is_not_kept_under_its_old_name(
    reader: Callable[..., Any], tmp_path: Path
) -> None:
    source = write(tmp_path, "a.jsonl", GOOD * 3)

    def append_a_row() -> None:  # a sign of life comes amid the reading
        with Path(source).open("a") as file:
            file.write(GOOD)

    with heard_by(append_a_row):
        assert refusal(source, reader) == f"{source} changed while it was read"
    assert len(read(source, reader)[0]) > 3


def test_a_cache_that_cannot_be_written_is_named_with_what_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_CACHE", "/proc/nowhere")
    with pytest.raises(StorageError, match="kept in /proc/nowhere/contents: No such file") as caught:
        read(write(tmp_path, "a.jsonl", GOOD))
    assert "MPT_CACHE" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_fills_up_is_named_and_a_read_only_one_serves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    monkeypatch.setenv("MPT_CACHE", str(disk))
    few, many = write(tmp_path, "few.jsonl", GOOD), write(tmp_path, "many.jsonl", GOOD * 50_000)
    try:
        read(few)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert read(few)[0]["text"][:] == ["good"]
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        with pytest.raises(StorageError, match=f"kept in {disk}/rows: .*No space left") as caught:
            read(many)
        assert "MPT_CACHE" in caught.value.remedy
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

"""Tables prepared in shards: by any number of processes the same, kept, and gone on with after a kill."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training import shards
from mpt.training.conversation_samples import ConversationRows
from mpt.training.corpus import read_corpus
from mpt.training.data import prepare_samples, read_documents
from mpt.training.encoding import LENGTH, Encoder, TokenRows
from mpt.training.progress import heard_by
from mpt.training.shards import prepare_table
from mpt.training.tokenizer import train_tokenizer
from tests.training.failing_prepare import Failing

TEXTS = [topics[name] for name in sorted(topics)]


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS[:20], 400)


def corpus(tmp_path: Path, texts: list[str] = TEXTS) -> datasets.Dataset:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return read_corpus(DataSection(source=str(source)), str(source), split="train")


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache/mpt/tokens").iterdir()
    return folder


def content(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder_of(tmp_path).iterdir())}


@pytest.mark.parametrize("limit", [None, 50])
def test_any_number_of_processes_gives_the_same_bytes_and_those_of_the_tokenizer(
    limit: int | None, tokenizer: Any, tmp_path: Path
) -> None:
    rows = TokenRows(Encoder(tokenizer, marks_text=False), limit)
    found = []
    for workers in (1, 2):
        home = tmp_path / str(workers)
        home.mkdir()
        datasets.config.HF_DATASETS_CACHE = home / "cache"
        prepared = prepare_table(corpus(home), rows, workers=workers)
        assert prepared.shards > 5
        assert (prepared.found, prepared.notices) == (0, [])
        found.append(content(home))
    assert found[0] == found[1]
    end = [tokenizer.eos_token_id]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in TEXTS]
    assert prepared.table["input_ids"][:] == [row[:limit] for row in expected]
    if limit is not None:
        assert prepared.table[LENGTH][:] == [len(row) for row in expected]


def test_a_second_preparation_takes_everything_from_the_cache_and_says_so(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    section = DataSection(source=str(source))

    def prepare(known: Any) -> tuple[str, ...]:
        documents = read_documents(section, seed=1)
        return prepare_samples(documents, known, sequence_length=64, packing=True, source="").notices

    assert not any("cache" in notice for notice in prepare(tokenizer))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/mpt").rglob("*.arrow")}
    assert any("tokenised data taken from the cache" in notice for notice in prepare(tokenizer))
    os.utime(source)  # a new time is no new content
    assert any("tokenised data taken from the cache" in notice for notice in prepare(tokenizer))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/mpt").rglob("*.arrow")} == before
    other = train_tokenizer(TEXTS[:20], 401)
    assert not any("cache" in notice for notice in prepare(other))
    stat = source.stat()
    source.write_text(source.read_text().replace("assert", "asserT", 1))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other content
    assert not any("cache" in notice for notice in prepare(tokenizer))


@pytest.mark.parametrize(
    "change", [{"eos_token": "<|end|>"}, {"split_special_tokens": True}], ids=["end of text", "split special tokens"]
)
def test_a_tokenizer_with_another_setting_gets_tokens_of_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    """Neither stands in the tokenizer's engine, which is what its file tokenizer.json says."""
    tokenizer = train_tokenizer(TEXTS[:20], 400, special_tokens=["<|end|>"])
    table = corpus(tmp_path, ["Before.<|end|>After."])
    found = []
    for _ in range(2):
        encode = Encoder(tokenizer, marks_text=False)
        (row,) = prepare_table(table, TokenRows(encode, None), workers=1).table["input_ids"][:]
        assert [row] == list(encode(table["text"][:]))
        found.append(row)
        for name, value in change.items():
            setattr(tokenizer, name, value)
    assert found[0] != found[1]


KILLED = """
import sys, time
from pathlib import Path
import datasets
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1]) / "cache"
from mpt.training import shards
from mpt.training.progress import heard_by
from mpt.training.tokenizer import read_tokenizer
from tests.training.test_shards import corpus
from mpt.training.encoding import LENGTH, Encoder, TokenRows
shards.SHARD_BYTES = 1 << 16
rows = TokenRows(Encoder(read_tokenizer(Path(sys.argv[1]) / "tokenizer"), marks_text=False), None)
with heard_by(lambda: time.sleep(0.2)):
    shards.prepare_table(corpus(Path(sys.argv[1])), rows, workers=1)
"""


def test_a_preparation_that_is_killed_goes_on_where_it_was(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ)
    tokens = tmp_path / "cache/mpt/tokens"
    while len(finished := list(tokens.glob(".*.part/*.arrow"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = list(tokens.glob(".*.part/*.arrow"))
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    rows = TokenRows(Encoder(tokenizer, marks_text=False), None)
    prepared = prepare_table(corpus(tmp_path), rows, workers=1)
    assert prepared.found == len(kept) < prepared.shards
    assert prepared.notices == [
        f"an interrupted preparation goes on: {len(kept)} of {prepared.shards} shards of tokens were there"
    ]
    folder = folder_of(tmp_path)
    assert {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in kept} == kept
    interrupted = content(tmp_path)
    datasets.config.HF_DATASETS_CACHE = tmp_path / "again/cache"
    prepare_table(corpus(tmp_path), rows, workers=1)
    assert content(tmp_path / "again") == interrupted


def test_an_error_in_one_of_the_processes_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(MptError, match="a row is wrong") as caught:
        prepare_table(corpus(tmp_path), Failing(kills=False), workers=2)
    assert caught.value.remedy == "Mend it."
    with pytest.raises(MptError, match="was killed") as caught:
        prepare_table(corpus(tmp_path), Failing(kills=True), workers=2)
    assert "data.workers" in caught.value.remedy


def test_what_is_sent_to_another_process_prepares_the_same(tokenizer: Any) -> None:
    texts = {"text": TEXTS[:5]}
    rows = TokenRows(Encoder(tokenizer, marks_text=False), 30)
    assert pickle.loads(pickle.dumps(rows))(texts) == rows(texts)
    conversations = ConversationRows(tokenizer, 64, "assistant")
    batch = {
        "conversation": [json.dumps({"text": [text[:20], text[20:99]]}) for text in TEXTS[:5]],
        "place": ["x"] * 5,
    }
    first, second = pickle.loads(pickle.dumps(conversations))(batch), conversations(batch)
    assert {key: [list(row) for row in first[key]] for key in ("input_ids", "labels")} == {
        key: [list(row) for row in second[key]] for key in ("input_ids", "labels")
    }
    assert len(second["input_ids"]) > 0


def test_signs_of_life_come_while_a_table_is_prepared(tokenizer: Any, tmp_path: Path) -> None:
    beats = []
    with heard_by(lambda: beats.append(time.monotonic())):
        prepared = prepare_table(corpus(tmp_path), TokenRows(Encoder(tokenizer, marks_text=False), None), workers=1)
    assert len(beats) > prepared.shards


def test_documents_of_one_line_and_none_are_divided(tokenizer: Any, tmp_path: Path) -> None:
    rows = TokenRows(Encoder(tokenizer, marks_text=False), None)
    texts = ["x" * 200_000, "", "y", " "]
    table = prepare_table(corpus(tmp_path, texts), rows, workers=1).table
    assert [len(row) for row in table["input_ids"]] == [len(tokenizer(texts[0])["input_ids"]) + 1, 2]


def test_a_tokenizer_written_in_python_is_asked_itself(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    encode = Encoder(ByT5Tokenizer(), marks_text=False)
    table = prepare_table(corpus(tmp_path, ["ab"] * 3), TokenRows(encode, None), workers=1).table
    assert table["input_ids"][:] == [[100, 101, 1]] * 3

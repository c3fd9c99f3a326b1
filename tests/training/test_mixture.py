"""Several data sets: what is held out of each, and how their weights become a mixture."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from mpt.errors import MptError
from mpt.planning.mixing import rows_of_mixture
from mpt.recipe.schema import DataSection
from mpt.training.conversation_rows import CONVERSATION, read_conversations
from mpt.training.data import read_documents, read_texts
from mpt.training.mixture import read_parts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, name: str, count: int) -> str:
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{name}{n}", "completion": "x", "text": f"{name}{n}"} for n in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def names(rows: Any) -> list[str]:
    return [json.loads(row[CONVERSATION])["text"][0] for row in rows]


@pytest.mark.parametrize(
    ("lengths", "weights", "mixing", "rows"),
    [
        ([10, 10], [1, 1], "oversample", [10, 10]),
        ([1000, 10], [1, 1], "oversample", [1000, 1000]),
        ([1000, 10], [1, 1], "undersample", [10, 10]),
        ([1000, 10], [0.5, 1.5], "undersample", [3, 10]),
        ([7, 5, 3], [1, 2, 4], "oversample", [7, 14, 28]),
        ([1, 1000], [1, 1e9], "undersample", [1, 1000]),
    ],
)
def test_the_rows_are_as_the_weights_and_none_is_lost_or_none_repeated(
    lengths: list[int], weights: list[float], mixing: Any, rows: list[int]
) -> None:
    assert rows_of_mixture(lengths, weights, mixing) == rows


@pytest.mark.parametrize(("mixing", "of_a", "of_b"), [("oversample", 40, 120), ("undersample", 7, 20)])
def test_a_mixture_takes_every_row_before_any_comes_again(mixing: str, of_a: int, of_b: int, tmp_path: Path) -> None:
    sources = [{"source": write(tmp_path, "a", 40)}, {"source": write(tmp_path, "b", 20), "weight": 3}]

    def mixed(seed: int) -> list[str]:
        section = DataSection.model_validate({"source": sources, "mixing": mixing, "eval_fraction": 0})
        documents = read_parts(section, read_conversations, seed=seed)
        assert f"{of_b} rows (75%" in " ".join(documents.notices) or mixing == "undersample"
        return names(documents.train)

    found = mixed(1)
    count = Counter(found)
    for name, rows, length in (("a", of_a, 40), ("b", of_b, 20)):
        times = [count[f"{name}{n}"] for n in range(length)]
        assert sum(times) == rows
        assert max(times) - min(times) <= 1
    assert found != sorted(found)  # one follows the other throughout
    assert found == mixed(1) != mixed(2)


def test_what_is_held_out_of_a_mixture_is_never_trained_on(tmp_path: Path) -> None:
    sources = [{"source": write(tmp_path, "a", 40)}, {"source": write(tmp_path, "b", 20), "weight": 9}]
    section = DataSection.model_validate({"source": sources, "eval_fraction": 0.1})
    documents = read_parts(section, read_conversations, seed=1)
    held_out = names(documents.held_out)
    assert sorted(name[0] for name in held_out) == ["a"] * 4 + ["b"] * 2
    assert not set(held_out) & set(names(documents.train))


def test_of_each_source_its_share_is_held_out_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    section = DataSection(source=[write(tmp_path, "a", 40), write(tmp_path, "b", 20)], eval_fraction=0.1)

    def split(seed: int) -> tuple[set[str], set[str]]:
        documents = read_parts(section, read_conversations, seed=seed)
        train, held_out = names(documents.train), names(documents.held_out)
        assert (len(train), len(held_out)) == (54, 6)
        return set(train), set(held_out)

    train, held_out = split(1)
    assert not train & held_out and len(train | held_out) == 60
    assert sorted(name[0] for name in held_out) == ["a"] * 4 + ["b"] * 2
    assert split(1) == (train, held_out) != split(2)


def test_of_a_few_rows_one_is_held_out_and_of_a_single_one_none(tmp_path: Path) -> None:
    few, one = write(tmp_path, "few", 3), write(tmp_path, "one", 1)
    documents = read_parts(DataSection(source=few), read_conversations, seed=1)
    assert (len(documents.train), len(documents.held_out)) == (2, 1)
    documents = read_parts(DataSection(source=one), read_conversations, seed=1)
    assert (len(documents.train), documents.held_out) == (1, None)


def test_no_source_is_held_out_whole(tmp_path: Path) -> None:
    sources: list[Any] = [{"source": write(tmp_path, "one", 1), "weight": 3}, write(tmp_path, "two", 2)]
    documents = read_parts(DataSection(source=sources, eval_fraction=0.75), read_conversations, seed=1)
    assert (len(documents.train), len(documents.held_out)) == (4, 1)
    assert sorted(names(documents.train))[:3] == ["one0"] * 3
    text = read_documents(
        DataSection(source=str(tmp_path / "one.jsonl"), text_column="prompt", eval_fraction=0.9), seed=1
    )
    assert len(text.train) == 1 and text.train[0]["text"]


def test_maps_say_of_each_source_what_the_section_says_of_all(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    turns = [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "It is."}]
    other.write_text(f"{json.dumps({'chat': turns})}\n")
    entries = [write(tmp_path, "a", 2), {"source": str(other), "layout": "sharegpt", "messages_column": "chat"}]
    section = DataSection.model_validate({"source": entries, "eval_fraction": 0})
    rows = [json.loads(row[CONVERSATION]) for row in read_parts(section, read_conversations, seed=1).train]
    assert ["text" in row for row in rows] == [True, True, False]
    section = DataSection.model_validate({"source": entries[0], "eval_source": entries[1:]})
    documents = read_parts(section, read_conversations, seed=1)
    assert (len(documents.train), len(documents.held_out)) == (2, 1)


def test_text_is_mixed_too(tmp_path: Path) -> None:
    sources = [{"source": write(tmp_path, "a", 4), "text_column": "prompt"}, {"source": write(tmp_path, "b", 2)}]
    sources[1]["weight"] = 1
    section = DataSection.model_validate({"source": sources, "eval_fraction": 0})
    count = Counter(row["text"] for row in read_parts(section, read_texts, seed=1).train)
    assert count == {"a0": 1, "a1": 1, "a2": 1, "a3": 1, "b0": 2, "b1": 2}


@pytest.mark.parametrize("mixing", ["oversample", "undersample"])
def test_a_stream_draws_a_source_for_each_row(mixing: str, tmp_path: Path) -> None:
    sources = [{"source": write(tmp_path, "a", 300), "weight": 3}, {"source": write(tmp_path, "b", 300)}]
    keys = {"source": sources, "mixing": mixing, "eval_fraction": 0, "streaming": True}

    def rows(seed: int) -> list[str]:
        documents = read_parts(DataSection.model_validate(keys), read_conversations, seed=seed)
        return names(islice(documents.train, 2000))

    found = rows(1)
    count = Counter(found)
    assert sum(number for name, number in count.items() if name[0] == "a") / len(found) == pytest.approx(0.75, abs=0.06)
    if mixing == "oversample":
        assert len(count) == 600
    else:
        assert len(found) < 600 and max(count.values()) == 1
    assert found == rows(1) != rows(2)


def test_streams_too_short_to_hold_anything_out_are_refused(tmp_path: Path) -> None:
    section = DataSection(source=[write(tmp_path, "a", 400), write(tmp_path, "b", 20)], streaming=True)
    with pytest.raises(MptError, match="no more to train on"):
        read_parts(section, read_conversations, seed=1)

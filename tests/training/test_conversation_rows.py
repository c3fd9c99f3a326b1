"""Conversations from files of every kind and layout, and what is said of rows that are none."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from mpt.errors import MptError
from mpt.recipe.schema import DataSection
from mpt.training.conversation_rows import CONVERSATION, PLACE, read_conversations

ASKED = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]
ROWS: dict[str, Any] = {
    "messages": {"messages": ASKED},
    "prompt_completion": {"prompt": ASKED[:1], "completion": ASKED[1:]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "It is."}]},
    "alpaca": {"instruction": "Is it so?", "input": "", "output": "It is."},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, *rows: Any, name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def read(source: str, **keys: Any) -> list[dict[str, Any]]:
    table, _ = read_conversations(DataSection(source=source, **keys), "train")
    return [json.loads(row[CONVERSATION]) for row in table]


def refusal(source: str, **keys: Any) -> MptError:
    with pytest.raises(MptError) as caught:
        read(source, **keys)
    assert caught.value.remedy.endswith(".")
    return caught.value


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
def test_each_layout_is_known_by_its_columns_in_files_of_each_kind(layout: str, kind: str, tmp_path: Path) -> None:
    row, path = ROWS[layout] | {"id": 7}, tmp_path / f"a{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_list([row, row]).to_parquet(path)
    elif kind == ".json":
        path.write_text(json.dumps([row, row]))
    else:
        text = f"{json.dumps(row)}\n\n{json.dumps(row)}\n".encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    found = read(str(path))
    assert [one["messages"] for one in found] == [ASKED, ASKED]
    assert found[0]["prompt"] == (1 if layout == "prompt_completion" else 0)
    assert read(str(path), layout=layout) == found == read(str(path), streaming=True)


def test_a_csv_holds_alpaca_and_prompts_with_completions(tmp_path: Path) -> None:
    write(tmp_path, "instruction,input,output", "Add,1 and 2,3", name="a.csv")
    (one,) = read(str(tmp_path / "a.csv"))
    assert [message["content"] for message in one["messages"]] == ["Add\n\n1 and 2", "3"]
    write(tmp_path, "prompt,completion", "7 is,prime", name="b.csv")
    assert read(str(tmp_path / "b.csv")) == [{"text": ["7 is", "prime"]}]


def test_the_built_in_questions_are_conversations() -> None:
    table, _ = read_conversations(DataSection(source="builtin:python-questions"), "train")
    asked = {json.loads(row[CONVERSATION])["messages"][0]["content"] for row in table}
    assert "What does str.split do in Python?" in asked
    assert len(asked) == len(table) > 300


def test_tool_calls_keep_each_its_own_arguments(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": '{"text": null}'}]
    turns = [
        [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": call}]}]
        for call in calls
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    source = write(tmp_path, {"messages": turns[0], "tools": json.dumps(tools)}, {"messages": turns[1], "tools": None})
    first, second = read(source)
    assert first["tools"] == tools and "tools" not in second
    made = [one["messages"][1]["tool_calls"][0] for one in (first, second)]
    assert made[0] == {"id": "x", "type": "function", "function": calls[0]}
    assert made[1]["function"]["arguments"] == {"text": None}


def test_sharegpt_with_a_system_column_and_tools(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Add 1 and 2."},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ]
    (one,) = read(write(tmp_path, {"conversations": turns, "system": "Count."}))
    assert [message["role"] for message in one["messages"]] == ["system", "user", "assistant", "tool", "assistant"]


def test_alpaca_with_system_and_history(tmp_path: Path) -> None:
    (one,) = read(write(tmp_path, ROWS["alpaca"] | {"system": "Be kind.", "history": [["a", "b"]]}))
    assert [message["content"] for message in one["messages"]] == ["Be kind.", "a", "b", "Is it so?", "It is."]


def test_text_parts_are_joined_and_another_column_may_hold_the_conversation(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is."}]
    source = write(tmp_path, {"chat": [ASKED[0], {"role": "assistant", "content": parts}]})
    assert read(source, messages_column="chat")[0]["messages"] == ASKED
    shared = write(tmp_path, {"chat": ROWS["sharegpt"]["conversations"]}, name="b.jsonl")
    assert read(shared, messages_column="chat", layout="sharegpt")[0]["messages"] == ASKED
    assert "layout: sharegpt" in refusal(shared, messages_column="chat").remedy


BAD: dict[str, tuple[Any, str]] = {
    "no role": ({"messages": [{"content": "Hi"}]}, r"messages\[0\] has no role \(it has content\)"),
    "an unknown role": ({"messages": [{"role": "human", "content": "Hi"}]}, "role 'human', which is unknown"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
    "an empty list of messages": ({"messages": []}, "messages is an empty list"),
    "an empty list as content": ({"messages": [{"role": "user", "content": []}]}, "content is an empty list"),
    "a number as content": ({"messages": [{"role": "user", "content": 7}]}, "content is a number, not text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content.0. is image"),
    "messages as text": ({"messages": "Hi"}, "messages is a text, not a list"),
    "a message as text": ({"messages": ["Hi"]}, r"messages\[0\] is a text, not a message"),
    "no assistant turn": ({"messages": ASKED[:1]}, "has no answer to learn from"),
    "another layout": (ROWS["alpaca"], "has no messages .it has instruction, input, output"),
    "null for messages": ({"messages": None}, "has no messages"),
    "a list for a row": ("[1]", "not a JSON object"),
    "broken JSON": ('{"messages": [}', "not JSON"),
    "a call without a name": (
        {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "call without a name"),
    "tools as a number": ({"messages": ASKED, "tools": 5}, "tools is a number"),
    "an answer without text": ({"messages": [ASKED[0], ASKED[1] | {"content": " "}]}, "has no answer to learn from"),
    "an answer of weight 0": ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}]}, "has no answer to learn from"),
    "half a weight": ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, r"messages\[1\] has the weight 0.5"),
    "a weight in quotes": ({"messages": [ASKED[0], ASKED[1] | {"weight": "0"}]}, "has the weight '0'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "says"), BAD.values(), ids=BAD)
def test_a_row_that_is_no_conversation_is_one_message_with_its_line(row: Any, says: str, tmp_path: Path) -> None:
    source = write(tmp_path, ROWS["messages"], "", row, ROWS["messages"])
    problem = refusal(source).problem
    assert problem.startswith(f"{source}:3: ")
    assert re.search(says, problem), problem
    table, notices = read_conversations(DataSection(source=source, max_bad_rows=1), "train")
    assert len(table) == 2
    assert f"{source}:3: " in " ".join(notices)
    assert read_conversations(DataSection(source=source, max_bad_rows=1), "train")[1] == notices  # from the cache too


@pytest.mark.parametrize(
    ("layout", "row", "says"),
    [
        ("alpaca", {"instruction": "Add 0 and 0.", "output": 0}, "output is a number, not text"),
        ("alpaca", {"instruction": "So?", "input": False, "output": "No."}, "input is true or false, not text"),
        ("alpaca", {"instruction": "So?", "output": "No.", "history": 3}, "history holds something else"),
        (
            "sharegpt",
            {"conversations": [{"from": ["human"], "value": "So?"}]},
            r"is from \['human'\], which is unknown",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "So?"}, {"from": "function_call", "value": "[]"}]},
            r"conversations\[1\].value holds no call",
        ),
    ],
)
def test_a_bad_row_of_another_layout_is_one_message_too(layout: str, row: Any, says: str, tmp_path: Path) -> None:
    assert re.search(says, refusal(write(tmp_path, ROWS[layout], row), layout=layout).problem)


def test_a_turn_of_sharegpt_keeps_its_weight(tmp_path: Path) -> None:
    asked, answered = ROWS["sharegpt"]["conversations"]
    (one,) = read(write(tmp_path, {"conversations": [asked, answered | {"weight": 0}, asked, answered]}))
    assert [message.get("weight") for message in one["messages"]] == [None, 0, None, None]


@pytest.mark.parametrize("limit", [0.3, 1], ids=["a share", "a number"])
def test_more_bad_rows_of_a_stream_than_are_allowed_end_it(limit: float, tmp_path: Path) -> None:
    good = write(tmp_path, *[ROWS["messages"]] * 8, name="good.jsonl")
    source = write(tmp_path, ROWS["messages"], "[1]", ROWS["messages"], "[2]", ROWS["messages"])
    section = DataSection(source=str(tmp_path / "*.jsonl"), max_bad_rows=limit, streaming=True)
    with pytest.raises(MptError, match=rf"{source}:2: .*not a JSON object"):
        list(read_conversations(section, "train")[0])
    assert len(list(read_conversations(section.model_copy(update={"source": good}), "train")[0])) == 8
    assert len(list(read_conversations(section.model_copy(update={"max_bad_rows": 0.4}), "train")[0])) == 11


def test_bytes_that_are_no_utf8_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROWS["messages"]).encode() + b'\n{"messages": "\xff"}\n')
    assert refusal(str(path)).problem.startswith(f"{path}:2: not UTF-8")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "Hi"}, "has the columns text, which are no known layout"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no known layout"),
    ],
)
def test_an_unknown_layout_lists_the_columns_and_the_known_ones(row: Any, says: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path, row))
    assert says in error.problem
    assert all(layout in error.remedy for layout in ROWS)


def test_what_else_a_source_can_be_wrong_in(tmp_path: Path) -> None:
    text = write(tmp_path, "Plain text.", name="a.txt")
    assert "holds plain text" in refusal(text).problem
    conversations = write(tmp_path, ROWS["messages"])
    assert "only prompt_completion" in refusal(conversations, train_on="completion").problem
    assert "has no prompt" in refusal(conversations, layout="prompt_completion").problem
    empty = write(tmp_path, {"prompt": "a", "completion": ""}, name="b.jsonl")
    assert "empty completion" in refusal(empty).problem
    assert read(write(tmp_path, {"messages": ASKED[:1]}, name="c.jsonl"), train_on="all")


def test_a_changed_file_is_read_again_and_rows_know_their_places(tmp_path: Path) -> None:
    source = write(tmp_path, ROWS["messages"], ROWS["messages"])
    table, _ = read_conversations(DataSection(source=source), "train")
    assert table[PLACE][:] == [f"{source}:1", f"{source}:2"]
    assert len(read(write(tmp_path, ROWS["messages"]))) == 1

"""What is gathered of prepared data: real files, tokenised as a run tokenises them, with what is wrong counted."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

from mpt.hardware.specs import parse_machine
from mpt.planning.checks.data_facts import DataFacts
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.training import data_facts
from mpt.training.data import Cuts, Samples
from mpt.training.data_facts import gather
from mpt.training.tasks import ready_tokenizer, task_module
from mpt.training.tokenizer import train_tokenizer
from tests.training.tiny_runs import LLAMA

TEXTS = [topics[name] for name in sorted(topics)[:30]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer(TEXTS, 400).backend_tokenizer.to_str()


def tokenizer_of(trained: str, **keys: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    marks = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), **(marks | keys))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plan_of(data: dict[str, Any], task: str = "causal_lm") -> Plan:
    recipe = Recipe.model_validate(
        {"task": task, "model": {"config": LLAMA}, "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
         "data": {"sequence_length": 64, "packing": False, **data}, "precision": "fp32"}
    )  # fmt: skip
    return resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="a")


def look(plan: Plan, tokenizer: Any) -> DataFacts:
    """Prepare as the session does, and gather."""
    task = task_module(plan.value("task"))
    documents = task.read_documents(plan, seed=0)
    had_template = tokenizer.chat_template is not None
    ready_tokenizer(task, plan, documents, tokenizer)
    samples = task.prepare_data(plan, documents, tokenizer)
    return gather(plan, documents, samples, tokenizer, had_template=had_template)


def test_empty_and_repeated_rows_and_those_of_the_evaluation_are_counted_with_their_lines(
    tmp_path: Path, trained: str
) -> None:
    texts = [*TEXTS[:9], " \n", TEXTS[2], "", TEXTS[2], TEXTS[7]]
    source = write(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    held_out = write(tmp_path / "eval.jsonl", [{"text": text} for text in (TEXTS[2], TEXTS[20], "", TEXTS[8])])
    facts = look(plan_of({"source": source, "eval_source": held_out}), tokenizer_of(trained))
    assert (facts.empty.count, facts.empty.of) == (2, 14)
    assert facts.empty.examples == (f"{source}:10", f"{source}:12")
    assert facts.duplicates.count == 3
    assert [example.partition(": ")[0] for example in facts.duplicates.examples] == [
        f"{source}:{line} repeats {source}:{first}" for line, first in ((11, 3), (13, 3), (14, 8))
    ]
    assert facts.overlap is not None and (facts.overlap.count, facts.overlap.of) == (2, 4)
    assert facts.samples == 12


def test_a_held_out_part_of_the_source_shares_its_hashes_and_keeps_its_lines(tmp_path: Path, trained: str) -> None:
    source = write(tmp_path / "train.jsonl", [{"text": text} for text in [*TEXTS, *TEXTS]])
    facts = look(plan_of({"source": source, "eval_fraction": 0.25}), tokenizer_of(trained))
    assert facts.overlap is not None and facts.overlap.of == 15
    train = 60 - 15
    assert facts.duplicates.of == train
    # Each text stands twice: those with both copies in training repeat, those with one copy in each part overlap.
    assert 2 * facts.duplicates.count + facts.overlap.count == train
    for example in facts.duplicates.examples:
        one, other = (int(part.rpartition(":")[2]) for part in example.partition(": ")[0].split(" repeats "))
        assert one - other == 30


def test_what_the_cut_costs_is_counted_by_the_real_lengths(tmp_path: Path, trained: str) -> None:
    tokenizer = tokenizer_of(trained)
    source = write(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    facts = look(plan_of({"source": source, "eval_fraction": 0}), tokenizer)
    assert facts.truncated.count == sum(length > 64 for length in lengths) > 0
    assert facts.lost_tokens == sum(max(length - 64, 0) for length in lengths)
    assert facts.tokens == sum(min(length, 64) for length in lengths)
    assert facts.truncated.examples == (f"the longest has {max(lengths)} tokens",)
    assert facts.overlap is None
    packed = look(plan_of({"source": source, "eval_fraction": 0, "packing": True}), tokenizer)
    assert packed.truncated.count == packed.lost_tokens == 0


def test_unknown_tokens_and_the_highest_one_are_found_with_the_text_around(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "cat": 3, "sat": 9}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tokenizer_of(words.to_str(), eos_token="</s>", pad_token=None, unk_token="<unk>")
    source = write(tmp_path / "train.jsonl", [{"text": "the cat sat"}, {"text": "the dog sat"}, {"text": "the cat"}])
    facts = look(plan_of({"source": source, "eval_fraction": 0}), tokenizer)
    assert (facts.unknown.count, facts.unknown.of) == (1, 11)
    assert "the <unk> sat" in facts.unknown.examples[0]
    assert facts.highest_token == 9
    assert facts.tokenizer.size == 10
    assert (facts.tokenizer.pad_id, facts.tokenizer.eos_id, facts.tokenizer.unknown_id) == (None, 1, 0)


def test_conversations_tell_their_template_their_places_and_what_teaches_nothing(tmp_path: Path, trained: str) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    rows = [chat("What is it?", "A cat."), chat("word " * 200, "Too late."), chat("What is it?", "A cat.")]
    source = write(tmp_path / "train.jsonl", rows)
    facts = look(plan_of({"source": source, "eval_fraction": 0}, task="sft"), tokenizer_of(trained))
    assert (facts.nothing_learnt.count, facts.nothing_learnt.of) == (1, 3)
    assert facts.duplicates.examples[0].startswith(f"{source}:3 repeats {source}:1: ")
    told = facts.tokenizer
    assert (told.has_template, told.template) == (False, "chatml")
    assert told.marks_answers is not None


def test_a_sample_whose_only_label_is_its_first_token_teaches_nothing() -> None:
    labels = [[-100, 5, 6], [-100, -100], [7, -100, -100], [-100, -100, 8], [], [3]]
    features = datasets.Features({key: datasets.List(datasets.Value("int32")) for key in ("input_ids", "labels")})
    table = datasets.Dataset.from_dict({"input_ids": labels, "labels": labels}, features=features)
    found = data_facts._nothing_learnt(Samples(table, None, cuts=Cuts(left_out=2)))
    assert (found.count, found.of) == (6, 8)
    again = datasets.concatenate_datasets([table.select(range(2, 6)), table])
    assert data_facts._nothing_learnt(Samples(again, None)).count == 3 + 4


def test_more_rows_than_are_hashed_are_told_to_be_looked_at_in_part(
    tmp_path: Path, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_facts, "MOST_ROWS", 10)
    source = write(tmp_path / "train.jsonl", [{"text": text} for text in [*TEXTS[:5], *TEXTS[:20]]])
    facts = look(plan_of({"source": source, "eval_fraction": 0}), tokenizer_of(trained))
    assert (facts.duplicates.count, facts.duplicates.of) == (5, 10)
    assert facts.limits == ("repetitions among the first 10 of 25 rows",)


def test_the_first_rows_of_a_stream_are_looked_at(tmp_path: Path, trained: str) -> None:
    source = write(tmp_path / "train.jsonl", [{"text": text} for text in [*TEXTS, TEXTS[0], ""]])
    plan = plan_of({"source": source, "eval_fraction": 0})
    task = task_module("causal_lm")
    section = {"source": source, "eval_fraction": 0, "streaming": True, "packing": False, "sequence_length": 64}
    streamed = plan.recipe.model_dump(exclude_unset=True) | {"data": section, "training": {"max_steps": 2}}
    plan = replace(plan, recipe=Recipe.model_validate(streamed))
    documents = task.read_documents(plan, seed=0)
    tokenizer = tokenizer_of(trained)
    facts = gather(plan, documents, Samples(None, None), tokenizer, had_template=False)
    assert (facts.duplicates.count, facts.empty.count, facts.empty.of) == (1, 1, 32)
    assert facts.limits == ("a stream: the first 32 rows",)
    lengths = [len(row) + 1 for row in tokenizer([*TEXTS, TEXTS[0]])["input_ids"]]
    assert facts.truncated.count == sum(length > 64 for length in lengths)
    assert facts.lost_tokens == sum(max(length - 64, 0) for length in lengths)
    assert facts.highest_token >= 256


def test_rows_that_a_mixture_takes_several_times_are_no_repetitions(tmp_path: Path, trained: str) -> None:
    few = write(tmp_path / "few.jsonl", [{"text": text} for text in [*TEXTS[:4], TEXTS[0]]])
    many = write(tmp_path / "many.jsonl", [{"text": text} for text in TEXTS[4:]])
    sources = [{"source": few, "weight": 3}, {"source": many, "weight": 1}]
    plan = plan_of({"source": sources, "eval_fraction": 0, "mixing": "oversample"})
    task = task_module("causal_lm")
    documents = task.read_documents(plan, seed=0)
    assert len(documents.train) > 5 + len(TEXTS[4:])
    facts = look(plan, tokenizer_of(trained))
    assert facts.duplicates.count == 1


def test_rows_are_known_by_all_their_columns_whatever_their_type() -> None:
    one = {"text": ["a", "a", "a", "b"], "label": [1, 2, 1, 1], "scores": [[0.5], [0.5], [0.5], []]}
    rows = data_facts.Table(datasets.Dataset.from_dict(one))
    same = [[int(left == right) for right in rows.hashes] for left in rows.hashes]
    assert same == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]

"""Supervised fine-tuning for real: a tiny Llama on questions about Python and their answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.recipe.catalog import find_recipe
from mpt.recipe.load import load_recipe
from mpt.running.run_directory import RunDirectory
from mpt.training.builtin_questions import builtin_questions
from tests.training.tiny_runs import LLAMA, Run, continue_from, save_base, tiny_recipe

SHORT = [row for row in builtin_questions() if len(row["messages"][1]["content"]) < 200]


def recipe(**changes: Any) -> Any:
    sft: dict[str, Any] = {
        "task": "sft",
        "model": {"config": LLAMA | {"max_position_embeddings": 128}},
        "data": {"source": "builtin:python-questions", "sequence_length": 128},
        "sample": {"prompt": "What does str.split do in Python?", "max_new_tokens": 8},
    }
    return tiny_recipe(**{key: sft.get(key, {}) | value if isinstance(value, dict) else value
                          for key, value in (sft | changes).items()})  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    return lambda **changes: Run(RunDirectory(tmp_path_factory.mktemp("sft")), recipe(**changes))


@pytest.fixture(scope="module")
def run(make: Callable[..., Run]) -> Run:
    trained = make()
    assert trained.train() == 0, trained.log()
    return trained


def test_the_model_learns_and_what_is_saved_answers_by_itself(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = [row["loss"] for row in run.steps.values()]
    assert losses[0] > losses[-1]
    tokenizer = AutoTokenizer.from_pretrained(run.directory.final)
    model = AutoModelForCausalLM.from_pretrained(run.directory.final)
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert len(tokenizer) == model.config.vocab_size == 512  # the tokens of the template were trained with the others


def test_what_the_user_hears_at_the_start(run: Run) -> None:
    told = " / ".join(run.texts("notice", "text"))
    assert "conversations are written as chatml" in told
    assert "are longer than 128 tokens" in told and "of the tokens to learn are lost" in told


def test_the_sample_is_asked_as_a_question(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.directory.final)
    model = AutoModelForCausalLM.from_pretrained(run.directory.final)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does str.split do in Python?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    written = model.generate(**asked, max_new_tokens=8, do_sample=False)[0][asked["input_ids"].shape[1] :]
    (sample,) = [event for event in run.events if event["kind"] == "sample"]
    assert sample["text"] == tokenizer.decode(written, skip_special_tokens=True)


def test_the_loss_is_that_of_the_answers_alone(make: Callable[..., Run], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, source = save_base(tmp_path / "base"), tmp_path / "one.jsonl"
    source.write_text(f"{json.dumps(SHORT[0])}\n" * 8)
    changes = {"data": {"source": str(source), "chat_template": "vicuna", "eval_fraction": 0, "sequence_length": 64}}
    model_section = {"name_or_path": base, "config": None}
    run = make(model=model_section, tokenizer=None, training={"max_steps": 1}, sample=None, **changes)
    assert run.train() == 0, run.log()
    tokenizer = AutoTokenizer.from_pretrained(run.directory.final)
    made = tokenizer.apply_chat_template(SHORT[0]["messages"], return_assistant_tokens_mask=True, return_dict=True)
    tokens = torch.tensor([made["input_ids"][:64]])
    labels = torch.where(torch.tensor([made["assistant_masks"][:64]]) == 1, tokens, -100)
    assert 0 < int((labels != -100).sum()) < tokens.numel()
    model = AutoModelForCausalLM.from_pretrained(base)
    assert run.steps[1]["loss"] == pytest.approx(model(tokens, labels=labels).loss.item(), rel=1e-5)


def test_a_run_killed_after_step_4_goes_on_bit_for_bit(run: Run, make: Callable[..., Run]) -> None:
    import torch

    resumed = continue_from(run, "checkpoint-4", make)
    assert {step: row for step, row in run.trajectory.items() if step > 4} == {
        step: row for step, row in resumed.trajectory.items() if step > 4
    }
    first, second = run.weights(), resumed.weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_labels_are_other_data(run: Run, make: Callable[..., Run]) -> None:
    other = make(data={"train_on": "all"}, training={"max_steps": 1}, sample=None)
    assert other.train() == 0, other.log()
    (was,) = [event for event in run.events if event["kind"] == "data_prepared"]
    (now,) = [event for event in other.events if event["kind"] == "data_prepared"]
    assert was["tokens"] == now["tokens"]
    assert was["fingerprint"] != now["fingerprint"]


@pytest.mark.slow
def test_a_stream_of_conversations_goes_on_bit_for_bit(make: Callable[..., Run], tmp_path: Path) -> None:
    import torch

    source = tmp_path / "a.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in SHORT))
    keys = {"source": [{"source": str(source), "weight": 2}, {"source": str(source), "weight": 1}], "streaming": True}
    run = make(data=keys | {"eval_fraction": 0}, sample=None)
    assert run.train() == 0, run.log()
    resumed = continue_from(run, "checkpoint-4", make)
    assert resumed.trajectory[8] == run.trajectory[8]
    first, second = run.weights(), resumed.weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_train_what_one_does(run: Run, make: Callable[..., Run]) -> None:
    two = make(micro_batch_size=4, distributed={"processes_per_node": 2, "strategy": "ddp"}, training={"max_steps": 2})
    assert two.train(processes=2) == 0, two.log()
    assert two.steps[1]["loss"] == pytest.approx(run.steps[1]["loss"], rel=1e-4)
    assert two.steps[1]["tokens"] == run.steps[1]["tokens"]


@pytest.mark.slow
def test_adapters_on_a_base_without_a_template_learn_in_one_that_needs_no_new_tokens(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    run = make(
        model={"name_or_path": save_base(tmp_path / "base"), "config": None},
        tokenizer=None,
        lora={"rank": 4},
        data={"sequence_length": 64},
    )
    assert run.train() == 0, run.log()
    assert "conversations are written as vicuna" in " ".join(run.texts("notice", "text"))
    assert run.steps[8]["loss"] < run.steps[1]["loss"]
    assert (run.directory.final / "chat_template.jinja").read_text().startswith("{{- bos_token -}}")


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "template"), [(["embed_tokens", "lm_head"], "chatml"), (["embed_tokens"], "vicuna")])
def test_adapters_learn_new_tokens_where_both_their_tables_are_trained(
    saved: list[str], template: str, make: Callable[..., Run], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = Path(save_base(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(520)  # as models that are padded for the matrix units have room
    model.save_pretrained(base)
    run = make(
        model={"name_or_path": str(base), "config": None},
        tokenizer=None,
        lora={"rank": 4, "modules_to_save": saved},
        data={"sequence_length": 64},
        training={"max_steps": 2},
    )
    assert run.train() == 0, run.log()
    assert f"conversations are written as {template}" in " ".join(run.texts("notice", "text"))


def test_the_built_in_recipe_trains(tmp_path: Path) -> None:
    small = ["training.max_steps=2", "training.eval_steps=2", "model.config.hidden_size=64", "precision=fp32"]
    run = Run(RunDirectory(tmp_path), load_recipe(find_recipe("python-answers"), small))
    assert run.train() == 0, run.log()
    assert list(run.steps) == [1, 2]
    assert run.last_word()["eval_loss"] > 0


def test_a_source_whose_answers_lie_beyond_the_sequence_length_is_refused(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    asked = {"role": "user", "content": "word " * 200}
    source = tmp_path / "a.jsonl"
    source.write_text(f"{json.dumps({'messages': [asked, {'role': 'assistant', 'content': 'Yes.'}]})}\n" * 4)
    run = make(data={"source": str(source)})
    assert run.train() == 2
    assert "has a token to learn within data.sequence_length 128" in run.last_word()["problem"]


def test_text_with_completions_is_sampled_as_it_was_learnt(make: Callable[..., Run], run: Run, tmp_path: Path) -> None:
    """Even by a tokenizer that has a chat template, which such data does not use."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f"{json.dumps({'prompt': f'{n} is', 'completion': ' a number'})}\n" for n in range(40)))
    base = {"name_or_path": str(run.directory.final), "config": None}
    other = make(model=base, tokenizer=None, data={"source": str(source)}, sample="7 is", training={"max_steps": 30})
    assert other.train() == 0, other.log()
    (sample,) = [event for event in other.events if event["kind"] == "sample"]
    assert sample["text"].startswith(" a number")
    assert not other.texts("notice", "text")[0].startswith("conversations are written")
